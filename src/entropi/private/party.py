"""One party of one session, in a process of its own: `python -m entropi.private.party`.

Reads a `Job` and then a `Proceed` for every further token from standard input, writes `Event`s to standard output,
one JSON line each. Its parent may kill it at any moment; that ends the session and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from entropi.private.engine import Engine, EngineError
from entropi.private.functions import exp_of_nonpositive
from entropi.private.messages import (
    CLIENT,
    SERVER,
    Event,
    Failed,
    Job,
    Linked,
    Proceed,
    Revealed,
    StageDone,
    decode,
    encode,
)
from entropi.private.program import Stage, forward, one_hot


def main() -> int:
    """Run the job on standard input; status 1 after a `Failed` event."""
    # SPU and its libraries may print; only events go to the parent.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    jobs = sys.stdin.buffer
    job = decode(jobs.readline(), Job)
    with tempfile.TemporaryDirectory(prefix="entropi-party-") as folder:
        try:
            engine = Engine(job.rank, job.links, job.settings, Path(folder) / "engine.log")
            _emit(events, Linked())
            _serve_session(engine, job, jobs, events)
            engine.close()
        except EngineError as error:
            _emit(events, Failed(reason=str(error)))
            return 1
        except BrokenPipeError:
            return 1  # the parent is gone, and with it the session
    return 0


def _serve_session(engine: Engine, job: Job, jobs: BinaryIO, events: BinaryIO) -> None:
    _warm_up(engine, events)
    weights = load_file(job.weights) if job.weights else None
    for name, shape in job.description.weight_shapes().items():
        engine.hold(name, shape, weights[name] if weights is not None else None)
    fresh, count, past = job.prompt, job.prompt_length, 0
    for token in range(job.max_new_tokens):
        tokens = one_hot(fresh, job.description.vocab_size) if fresh is not None else None
        engine.hold("tokens", (count, job.description.vocab_size), tokens)
        for stage in forward(job.description, count, past, job.settings.exp_iterations):
            _emit(events, StageDone(engine.run(stage, token)))
        logits, size = engine.reveal_to_client("logits")
        _emit(events, Revealed(bytes=size, logits=None if logits is None else logits[0].tolist()))
        past += count
        line = jobs.readline() if token + 1 < job.max_new_tokens else b""
        if not line:  # enough tokens, or the parent has closed the pipe
            break
        proceed = decode(line, Proceed)
        fresh, count = ([proceed.token] if proceed.token is not None else None), 1


def _warm_up(engine: Engine, events: BinaryIO) -> None:
    """Keys and base oblivious transfers, which the first use of each kind of operation would otherwise pay."""

    def operations(x: jax.Array, y: jax.Array) -> jax.Array:
        product = x @ y
        larger = jnp.maximum(product[:, :2], product[:, 2:])
        return exp_of_nonpositive(larger - 1.0, 1) * jax.lax.reciprocal(larger + 2.0)

    engine.hold("x", (4, 8), np.zeros((4, 8)) if engine.rank == SERVER else None)
    engine.hold("y", (8, 4), np.zeros((8, 4)) if engine.rank == CLIENT else None)
    _emit(events, StageDone(engine.run(Stage("setup", -1, operations, ("x", "y"), ("z",)), 0)))


def _emit(events: BinaryIO, event: Event) -> None:
    events.write(encode(event) + b"\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
