"""How a client chooses the next token from what it learns of the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entropi.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the client chooses a token from what it learns.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens can be chosen; None for all that the client learns.
        seed: the same one makes the same choices from the same logits; None for a fresh one.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature is {self.temperature} but must be between 0 and 100")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k} but must be at least 1")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed is {self.seed} but must not be negative")

    def choose(self, logits: np.ndarray, random: np.random.Generator) -> int:
        """Index of the token taken, from `(n,)` logits."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        kept, weights = self._kept(logits)
        return int(random.choice(kept, p=weights))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """By which `choose` takes each of `(n,)` logits, `(n,)`; where no chance is left, 1 for the likeliest."""
        found = np.zeros(len(logits))
        if self.temperature == 0:
            found[np.argmax(logits)] = 1.0
        else:
            kept, weights = self._kept(logits)
            found[kept] = weights
        return found

    def choose_after(self, logits: np.ndarray, random: np.random.Generator, draft: int, drawn: np.ndarray) -> int:
        """Index of the token taken, as `choose` would, where `draft` was drawn with the probabilities `drawn` `(n,)`.

        The draft is taken with probability min(1, p / q), p being `choose`'s probability of it and q the one with which
        it was drawn; otherwise a token is drawn from what p has more than q (Leviathan et al. 2023, Theorem 3.5).
        """
        wanted = self.probabilities(logits)
        if random.random() * drawn[draft] < wanted[draft]:
            return draft
        rest = np.maximum(wanted - drawn, 0.0)
        if not (total := rest.sum()):  # equal but for rounding: then no draft is refused
            return draft
        return int(random.choice(len(rest), p=rest / total))

    def _kept(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices that can be chosen, and their probabilities."""
        kept = np.argsort(-logits, kind="stable")[: self.top_k]
        scaled = (logits[kept] - logits[kept[0]]).astype(np.float64) / self.temperature
        weights = np.exp(scaled)
        return kept, weights / weights.sum()


GREEDY = Sampling()
