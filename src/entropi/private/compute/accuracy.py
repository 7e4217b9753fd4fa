"""What private inference does to a model's answers: perplexity and likeliest tokens in fixed point, against float.

The real program runs on text under REF2K, which is the engine's own arithmetic in one party, or under CHEETAH with the
cryptography; both approximate the same functions with the same fraction bits as a session would. It is a process of its
own, `python -m entropi.private.compute.accuracy`, because an engine's log belongs to a process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from entropi.errors import UserError
from entropi.private.compute.description import TokenId
from entropi.private.compute.process import answer_one, answers
from entropi.private.compute.settings import SERVER, Settings


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """What to compute: the folded model in a folder on sequences of tokens, each behind the public prefix."""

    folder: str
    settings: Settings
    protocol: Literal["ref2k", "cheetah"]
    sequences: list[Annotated[list[TokenId], msgspec.Meta(min_length=2)]]
    prefix: list[TokenId] = []


class Compared(msgspec.Struct, forbid_unknown_fields=True):
    """What came out for one sequence; losses in nats, summed over all tokens but the first."""

    positions: int
    plain_loss: float
    private_loss: float
    same: int  # positions whose likeliest token is the same
    error: float  # largest difference of a logit


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """The share of a pass over a sequence that is done, and after the whole of it what came out."""

    done: float
    compared: Compared | None = None


@dataclass(frozen=True)
class Accuracy:
    """A model in fixed point against the same model in float32.

    Attributes:
        positions: tokens after which logits were compared.
        plain_perplexity, private_perplexity: over all tokens but the first of every sequence.
        same_token: share of the positions at which the likeliest token is the same.
        largest_error: of any logit.
    """

    positions: int
    plain_perplexity: float
    private_perplexity: float
    same_token: float
    largest_error: float

    @property
    def change(self) -> float:
        """Relative change of the perplexity."""
        return self.private_perplexity / self.plain_perplexity - 1

    @classmethod
    def of(cls, found: Sequence[Compared]) -> Accuracy:
        positions = sum(one.positions for one in found)
        predicted = positions - len(found)
        return cls(
            positions,
            _perplexity(sum(one.plain_loss for one in found) / predicted),
            _perplexity(sum(one.private_loss for one in found) / predicted),
            sum(one.same for one in found) / positions,
            max(one.error for one in found),
        )


def _perplexity(loss: float) -> float:
    """exp(loss), infinite where no float holds it: numbers that wrapped may give logits of any size."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def measure(
    folder: Path,
    settings: Settings,
    protocol: Literal["ref2k", "cheetah"],
    sequences: Sequence[Sequence[int]],
    prefix: Sequence[int] = (),
    watch: Callable[[float, Accuracy | None], None] = lambda done, so_far: None,
) -> Accuracy:
    """Run the program on every sequence of token ids, and compare.

    Args:
        folder: of the folded model.
        prefix: public token ids before every sequence, computed in the clear.
        watch: is called after every stage with the sequences that are done, the one at work by its share, and with what
            has been found so far.

    Raises:
        UserError: the run failed.
    """
    question = Question(str(folder), settings, protocol, [list(map(int, one)) for one in sequences], list(prefix))
    found: list[Compared] = []
    failed = f"the run under {protocol} failed"
    try:
        for one in answers("entropi.private.compute.accuracy", question, Answer, failed):
            done = len(found) + one.done
            if one.compared is not None:
                found.append(one.compared)
            watch(done, Accuracy.of(found) if found else None)
    except UserError as error:
        raise UserError(f"{error}, after {len(found)} of {len(question.sequences)} sequences") from None
    if len(found) != len(question.sequences):
        raise UserError(f"{failed} after {len(found)} of {len(question.sequences)} sequences")
    return Accuracy.of(found)


def main() -> None:
    """Answer the `Question` on standard input, a line for every stage."""
    answer_one(Question, compare)


def compare(question: Question, say: Callable[[Answer], None]) -> None:
    """Say of every sequence what comes out in private and in float32."""
    from entropi.private.compute.engine import Simulation
    from entropi.private.compute.folded import load_folded
    from entropi.private.compute.prefix import names, with_prefix
    from entropi.private.compute.program import run_plain
    from entropi.private.compute.self_test import logits_of_pass

    model, weights = load_folded(Path(question.folder))
    weights = with_prefix(model, weights, question.prefix)
    engine = Simulation(question.protocol, question.settings)
    for name, weight in weights.items():
        engine.hold(name, weight, SERVER)
    past = len(question.prefix)
    for tokens in question.sequences:
        form = question.settings.exact_softmax_as
        _, (plain,) = run_plain(model, weights, tokens, 1, form, exact=True, every_row=True)
        for name in names(model) if past else ():  # a pass leaves all tokens' behind
            engine.hold(name, weights[name], SERVER)
        private = logits_of_pass(
            engine,
            model,
            question.settings,
            weights["embedding"],
            tokens,
            past,
            every_row=True,
            watch=lambda done, stages: say(Answer(done / stages)),
        )
        found = Compared(
            len(tokens),
            _loss(plain, tokens),
            _loss(private, tokens),
            int((plain.argmax(axis=-1) == private.argmax(axis=-1)).sum()),
            float(np.abs(plain.astype(np.float64) - private).max()),
        )
        say(Answer(1.0, found))


def _loss(logits: np.ndarray, tokens: list[int]) -> float:
    """Cross-entropy in nats, summed, of the tokens that follow the rows of `(m, V)`."""
    rows = logits[:-1].astype(np.float64)
    rows = rows - rows.max(axis=-1, keepdims=True)
    chosen = rows[np.arange(len(rows)), tokens[1:]]
    return float((np.log(np.exp(rows).sum(axis=-1)) - chosen).sum())


if __name__ == "__main__":
    main()
