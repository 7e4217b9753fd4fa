"""Drafts: the client guesses its answer's next tokens, by itself and in the clear, and has them read in one pass.

A pass over k + 1 tokens waits as often as one over a single token. The client learns the logits after each of them and
keeps the drafts that it would have chosen anyway; those behind the first that it would not are forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from entropi.errors import UserError
from entropi.private.sessions.sampling import Sampling
from entropi.private.wire.messages import MAX_DRAFT

NGRAM = "ngram"
LONGEST_MATCH = 8  # tokens; longer ones are no better at telling what follows


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow.

    Attributes:
        tokens: the first of them right after what is known.
        drawn: by which probabilities `(V,)` each of them was drawn; None if no chance was involved.
    """

    tokens: list[int] = field(default_factory=list)
    drawn: list[np.ndarray] | None = None

    def verified(self, place: int, logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
        """The token that follows the first `place` of these, of which `logits` `(V,)` tell; maybe the next of these.

        Its distribution is that of `sampling.choose`. A draft without chance holds if that chooses it: with
        probability p, and otherwise the token is one of the others by their share, as the rule for drafts has it. So
        the same seed makes the same choices as without drafts.
        """
        if self.drawn is None or place == len(self.tokens) or sampling.temperature == 0:
            return sampling.choose(logits, random)
        return sampling.choose_after(logits, random, self.tokens[place], self.drawn[place])


NOTHING = Draft()


class Drafter(Protocol):
    """Where drafts come from. Nothing of what it is told leaves this process."""

    def check(self, tokenizer: Tokenizer, where: str) -> None:
        """Raise `UserError` if these drafts are no tokens of the server's model."""

    def draft(
        self, ids: Sequence[int], most: int, vocab_size: int, sampling: Sampling, random: np.random.Generator
    ) -> Draft:
        """At most `most` tokens, >= 1, that may follow `ids`, to be chosen by `sampling`."""


class NgramDrafter:
    """Drafts what followed when the latest tokens occurred before: prompt lookup (Saxena 2023).

    Args:
        shortest: so many tokens at least have to have occurred before.
    """

    def __init__(self, shortest: int = 2) -> None:
        self._shortest = shortest

    def check(self, tokenizer: Tokenizer, where: str) -> None:
        """Any tokens can be looked for."""

    def draft(
        self, ids: Sequence[int], most: int, vocab_size: int, sampling: Sampling, random: np.random.Generator
    ) -> Draft:
        """What followed the longest match, the latest of equally long ones; it may go on into the draft itself."""
        known = list(ids)
        start = self._after_match(np.asarray(known))
        if start is None:
            return NOTHING
        for place in range(start, start + most):
            known.append(known[place])
        return Draft(known[len(ids) :])

    def _after_match(self, ids: np.ndarray) -> int | None:
        """Where the tokens stand that followed the last ones before."""
        length = np.zeros(max(len(ids) - 1, 0), np.int64)  # of the match that ends before each place but the first
        matching = np.ones(len(length), bool)
        for back in range(1, min(LONGEST_MATCH, len(length)) + 1):
            matching[: back - 1] = False
            matching[back - 1 :] &= ids[: len(ids) - back] == ids[len(ids) - back]
            length += matching
        if not len(length) or length.max() < self._shortest:
            return None
        return int(np.flatnonzero(length == length.max())[-1]) + 1


class Reading(Protocol):
    """A text that a model has read."""

    logits: np.ndarray  # of its next token, `(V,)`

    def go_on(self, token: int) -> None:
        """Read one more token."""


class Reader(Protocol):
    """A model that this side runs by itself, in the clear; `entropi.model.reading.Reader` is one."""

    name: str
    positions: int
    vocabulary: dict[str, int]

    def read(self, ids: Sequence[int]) -> Reading:
        """Read a text of at least one token."""


class ModelDrafter:
    """Drafts what a small public model of the server's tokenizer says, its tokens chosen as the answer's are."""

    def __init__(self, model: Reader) -> None:
        self._model = model

    def check(self, tokenizer: Tokenizer, where: str) -> None:
        """Raise `UserError` unless this model's tokens are the server's, by name and number."""
        if self._model.vocabulary != tokenizer.get_vocab():
            raise UserError(f"{self._model.name} has other tokens than the model of {where}: it cannot draft for it")

    def draft(
        self, ids: Sequence[int], most: int, vocab_size: int, sampling: Sampling, random: np.random.Generator
    ) -> Draft:
        """Tokens one by one; none where the model has no positions left."""
        most = min(most, self._model.positions - len(ids))
        if most < 1:
            return NOTHING
        reading, tokens, drawn = self._model.read(ids), list[int](), list[np.ndarray]()
        while True:
            logits = reading.logits[:vocab_size]  # either model may have rows that no token has
            tokens.append(sampling.choose(logits, random))
            probabilities = sampling.probabilities(logits)
            drawn.append(np.pad(probabilities, (0, vocab_size - len(probabilities))))
            if len(tokens) == most:
                return Draft(tokens, drawn)
            reading.go_on(tokens[-1])


class Window:
    """How long drafts are: twice as long as before where all of one held, else one more than held."""

    def __init__(self) -> None:
        self.size = MAX_DRAFT

    def note(self, drafted: int, held: int) -> None:
        """What became of a draft."""
        if drafted:
            self.size = min(MAX_DRAFT, 2 * max(self.size, 1)) if held == drafted else held + 1


def drafter_of(draft: str | Drafter | None) -> Drafter | None:
    """The drafter that a Python program names: "ngram", one of its own, or None.

    Raises:
        UserError: another name.
    """
    if isinstance(draft, str):
        if draft != NGRAM:
            raise UserError(f"draft is {draft!r} but must be {NGRAM!r} or a drafter")
        return NgramDrafter()
    return draft
