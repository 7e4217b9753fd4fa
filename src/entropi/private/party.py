"""One party of one session, in a process of its own: `python -m entropi.private.party`.

Reads a `Job` and then a `Proceed` for every further token from standard input, writes `Event`s to standard output,
one JSON line each. Its parent may kill it at any moment; that ends the session and nothing else. When standard input
ends, the parent is gone, and the party goes too.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from typing import BinaryIO

import numpy as np
from safetensors.numpy import load_file

from entropi.private.engine import Engine, EngineError
from entropi.private.messages import (
    CLIENT,
    SERVER,
    Event,
    Failed,
    Job,
    Linked,
    Proceed,
    Revealed,
    Settings,
    StageDone,
    decode,
    encode,
)
from entropi.private.program import one_hot, warm_up
from entropi.private.session import stages_of_pass


def main() -> int:
    """Run the job on standard input; status 1 after a `Failed` event."""
    # SPU and its libraries may print; only events go to the parent.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()
    try:
        job = decode(lines.get(), Job)
        engine = Engine(job.rank, job.session, job.links, job.settings)
        _emit(events, Linked())
        _serve_session(engine, job, lines, events)
        engine.close()
    except EngineError as error:
        _emit(events, Failed(reason=str(error)))
        return 1
    except BrokenPipeError:
        return 1  # the parent is gone, and with it the session
    except Exception as error:  # the parent's user reads one line, wherever it comes from
        _emit(events, Failed(reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]))
        return 1
    return 0


def _read_lines(lines: queue.SimpleQueue[bytes]) -> None:
    """Pass on what the parent says; end this process, whatever it is doing, once the parent is gone."""
    # Unbuffered: at exit the interpreter could not take the lock that a blocked buffered reader holds.
    with os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0) as pipe:
        for line in pipe:
            lines.put(line)
    os._exit(1)


def _serve_session(engine: Engine, job: Job, lines: queue.SimpleQueue[bytes], events: BinaryIO) -> None:
    _warm_up(engine, events)
    model, settings = job.description, job.settings
    public = settings.embedding == "public"
    weights = load_file(job.weights) if job.weights else None
    table = load_file(job.table)["embedding"] if job.table and public else None
    if public and job.rank == CLIENT and table is None:
        raise EngineError("the embedding is public, but the client has no copy of it")
    for name, shape in model.weight_shapes().items():
        if name != "embedding" or not public:
            engine.hold(name, shape, weights[name] if weights is not None else None)
    fresh, count, past = job.prompt, job.prompt_length, 0
    for token in range(job.max_new_tokens):
        if public:
            engine.hold("embedded", (count, model.hidden_size), None if table is None else table[fresh])
        else:
            tokens = None
            if fresh is not None:
                tokens = one_hot(fresh, model.vocab_size, settings.paired, settings.fraction_bits)
            engine.hold("tokens", (-(-count // 2) if settings.paired else count, model.vocab_size), tokens)
        for stage in stages_of_pass(model, settings, count, past):
            _emit(events, StageDone(engine.run(stage, token)))
        _emit(events, _reveal(engine, settings))
        past += count
        if token + 1 < job.max_new_tokens:
            proceed = decode(lines.get(), Proceed)
            fresh, count = ([proceed.token] if proceed.token is not None else None), 1


def _reveal(engine: Engine, settings: Settings) -> Revealed:
    """Send the client its result, and nothing else of the logits."""
    tokens = logits = None
    size = 0
    if settings.output != "logits":
        indices, size = engine.reveal_to_client("tokens_out")
        tokens = None if indices is None else np.rint(indices).astype(int).tolist()
    if settings.output != "argmax":
        values, more = engine.reveal_to_client("logits" if settings.output == "logits" else "logits_out")
        size += more
        scale = 1.0 if settings.logit_bits is None else 2.0**-settings.logit_bits
        logits = None if values is None else (values.reshape(-1) * scale).tolist()
    return Revealed(bytes=size, logits=logits, tokens=tokens)


def _warm_up(engine: Engine, events: BinaryIO) -> None:
    """Keys and base oblivious transfers, before anything is counted as the prompt's."""
    stage, shapes = warm_up()
    for name, (shape, owner) in shapes.items():
        own = engine.rank == (SERVER if owner == "server" else CLIENT)
        engine.hold(name, shape, np.zeros(shape) if own else None)
    _emit(events, StageDone(engine.run(stage, 0)))


def _emit(events: BinaryIO, event: Event) -> None:
    events.write(encode(event) + b"\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
