"""Known answers: the real fixed-point program on a known prompt against plaintext, before anybody relies on it.

The check of ranges reasons about what fixed point holds; this runs it. REF2K is the engine's own arithmetic in one
party; CHEETAH runs the cryptography too, both parties as threads. It is a process of its own,
`python -m entropi.private.compute.self_test`, so that the engine's memory and crashes are not the server's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np

from entropi.errors import UserError
from entropi.private.compute.description import Description, TokenId
from entropi.private.compute.process import answer_one, answers
from entropi.private.compute.settings import CLIENT, SERVER, Settings

if TYPE_CHECKING:
    from entropi.private.compute.engine import Simulation

CHEETAH_TOKENS = 8  # of the one pass with cryptography
# What a logit may be wrong by, in itself and as a share of the largest. Right runs of small models are wrong by 0.0015
# with 18 fraction bits and by about 0.02 with 14; of SmolLM2's 30 layers by 0.11 at the worst of six million logits, of
# up to about 25. Wrapped numbers are wrong by whole logits.
TOLERANCE, RELATIVE_TOLERANCE = 0.1, 5e-3
PATIENCE_SECONDS = 3600


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """What to compute: the folded model in a folder on these tokens."""

    folder: str
    settings: Settings
    protocol: Literal["ref2k", "cheetah"]
    tokens: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    prefix: list[TokenId] = []  # public, before them


class Finding(msgspec.Struct, forbid_unknown_fields=True):
    """How far logits are from plaintext's, the largest of these, and how long the run took."""

    error: float | None  # None where it is not finite
    largest: float
    seconds: float


def self_test(
    folder: Path,
    settings: Settings,
    protocol: Literal["ref2k", "cheetah"],
    tokens: list[int],
    prefix: Sequence[int] = (),
) -> str:
    """Run the program on a prompt of `tokens` and on one more token; one line that says what came out.

    The prompt continues the public `prefix`.

    Raises:
        UserError: logits that are wrong, or a run that failed.
    """
    if protocol == "cheetah":
        tokens = tokens[:CHEETAH_TOKENS]
    name = {"ref2k": "fixed point", "cheetah": "the cryptographic protocol"}[protocol]
    failed = f"the test of known answers in {name} failed to run"
    question = Question(str(folder), settings, protocol, tokens, list(prefix))
    said = list(answers("entropi.private.compute.self_test", question, Finding, failed, PATIENCE_SECONDS))
    if len(said) != 1:
        raise UserError(failed)
    found = said[0]
    bound = TOLERANCE + RELATIVE_TOLERANCE * found.largest
    if found.error is None or not found.error < bound:
        wrong = "not even finite" if found.error is None else f"wrong by {found.error:.2g}"
        raise UserError(
            f"in {name} this model's logits are {wrong} on a known prompt, and {bound:.2g} is allowed: its values do "
            "not suit these settings although they seemed to"
        )
    return (
        f"known answers in {name}: logits of {len(tokens)} tokens and one more are wrong by {found.error:.2g} at most, "
        f"{found.seconds:.1f} s"
    )


def main() -> None:
    """Answer the `Question` on standard input with a `Finding` on standard output."""
    answer_one(Question, lambda question, say: say(compare(question)))


def compare(question: Question) -> Finding:
    """Logits under the engine against the same program's in plaintext."""
    from entropi.private.compute.engine import Simulation
    from entropi.private.compute.folded import load_folded
    from entropi.private.compute.prefix import with_prefix
    from entropi.private.compute.program import run_plain

    started = time.monotonic()
    settings = question.settings
    model, weights = load_folded(Path(question.folder))
    weights = with_prefix(model, weights, question.prefix)
    past = len(question.prefix)
    prompt = question.tokens[: max(model.positions - past - 1, 1)]
    every_row = question.protocol == "ref2k"
    passes = 2 if past + len(prompt) < model.positions else 1
    generated, expected = run_plain(model, weights, prompt, passes, settings.exact_softmax_as, every_row=every_row)
    engine = Simulation(question.protocol, settings)
    for name, weight in weights.items():
        engine.hold(name, weight, SERVER)
    error, largest = 0.0, 0.0
    for tokens, plain in zip([prompt, generated[:1]], expected):
        found = logits_of_pass(engine, model, settings, weights["embedding"], tokens, past, every_row=every_row)
        difference = np.abs(found.astype(np.float64) - plain.reshape(-1, model.vocab_size)).max()
        error, largest = max(error, float(difference)), max(largest, float(np.abs(plain).max()))
        past += len(tokens)
    finite = bool(np.isfinite(error) and np.isfinite(largest))
    return Finding(error if finite else None, largest if finite else 0.0, time.monotonic() - started)


def logits_of_pass(
    engine: Simulation,
    model: Description,
    settings: Settings,
    table: np.ndarray,
    tokens: list[int],
    past: int,
    *,
    every_row: bool,
    watch: Callable[[int, int], None] = lambda done, stages: None,
) -> np.ndarray:
    """Logits of a pass over `tokens` after `past` cached ones, `(1, V)`, or `(m, V)` with `every_row`.

    The engine holds the weights; `table` are the embeddings, for a client who looks its tokens up. `watch` is told how
    many stages are done, out of how many.
    """
    from entropi.private.compute.embedding import one_hot
    from entropi.private.compute.program import forward

    if settings.embedding == "public":
        engine.hold("embedded", table[tokens], CLIENT)
    else:
        engine.hold("tokens", one_hot(tokens, model.vocab_size, settings.paired, settings.fraction_bits), CLIENT)
    passing = forward(
        model,
        len(tokens),
        past,
        settings.exact_softmax_as,
        embedding=settings.embedding,
        paired=settings.paired,
        fraction_bits=settings.fraction_bits,
        every_row=every_row,
        norm_shifts=settings.norm_shifts,
    )
    stages = list(passing)
    for done, stage in enumerate(stages, 1):
        engine.run(stage)
        watch(done, len(stages))
    return engine.reveal("logits")


if __name__ == "__main__":
    main()
