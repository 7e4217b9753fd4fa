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
        kept = np.argsort(-logits, kind="stable")[: self.top_k]
        scaled = (logits[kept] - logits[kept[0]]).astype(np.float64) / self.temperature
        weights = np.exp(scaled)
        return int(random.choice(kept, p=weights / weights.sum()))


GREEDY = Sampling()
