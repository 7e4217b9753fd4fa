"""Which tokens a pass reads and what they see, where several prompts share it. Public sizes alone, and no JAX.

Prompts of any lengths share a pass without padding: what is computed row by row sees all their rows, and attention sees
pairs of a query and a key of the same prompt. Two orders of rows occur:

- *by prompt*: one prompt's tokens after the other's; so are the keys and values that stay for the next pass, behind
  those of a public prefix, which are there once for all prompts;
- *last rows last*: first all tokens but each prompt's last, by prompt, then these last ones. So the rows that the last
  layer needs are the last of all, whatever the lengths. Inputs and states have this order.

Of one prompt, and where every prompt has one token, both are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Tokens that a pass reads, by prompt, and those that were read before.

    Attributes:
        new: of each prompt, at least 1.
        past: of each prompt, before this pass; of a single prompt the public prefix included.
        prefix: public tokens that several prompts have in common, before theirs.
    """

    new: tuple[int, ...]
    past: tuple[int, ...]
    prefix: int = 0

    @classmethod
    def first(cls, lengths: Sequence[int], prefix: int) -> Layout:
        """Of the pass over prompts of these lengths."""
        return cls(tuple(lengths), (0,) * len(lengths), prefix)

    def following(self) -> Layout:
        """Of the pass over one further token of each prompt."""
        return Layout((1,) * self.prompts, tuple(np.add(self.past, self.new).tolist()), self.prefix)

    def of(self, staying: Sequence[int]) -> Layout:
        """The same pass of these prompts alone."""
        new, past = (tuple(one[place] for place in staying) for one in (self.new, self.past))
        return Layout(new, past, self.prefix)

    @property
    def prompts(self) -> int:
        """How many there are."""
        return len(self.new)

    @property
    def tokens(self) -> int:
        """That the pass reads, of all prompts."""
        return sum(self.new)

    @property
    def before(self) -> int:
        """Keys that stayed from the passes before."""
        return self.prefix + sum(self.past)

    @property
    def keys(self) -> int:
        """All keys, with those of this pass."""
        return self.before + self.tokens

    def asking(self, rows: int) -> tuple[int, ...]:
        """Rows of queries of each prompt, where there are so many of all: every token's, or the last ones'."""
        if rows == self.tokens:
            return self.new
        if self.prompts == 1:
            return (rows,)
        assert rows == self.prompts, f"{rows} rows of {self}"
        return (1,) * self.prompts

    def lengths(self) -> tuple[int, ...]:
        """Keys that each prompt's last token sees."""
        return tuple((self.prefix + np.add(self.past, self.new)).tolist())

    def seen(self, rows: int) -> np.ndarray:
        """How many keys each row of queries sees, by prompt."""
        ends = zip(self.asking(rows), self.lengths())
        return np.concatenate([np.arange(length - asking + 1, length + 1) for asking, length in ends])

    def positions(self) -> np.ndarray:
        """Of every token that is read, last rows last."""
        return (self.seen(self.tokens) - 1)[self.last_rows_last()]

    def last_rows_last(self) -> np.ndarray:
        """Places by prompt of the tokens, in the order of states."""
        last = np.cumsum(self.new) - 1
        return np.concatenate([np.delete(np.arange(self.tokens), last), last])

    def by_prompt(self) -> np.ndarray:
        """Places in the order of states of the tokens, by prompt."""
        return np.argsort(self.last_rows_last())

    def joined(self) -> np.ndarray:
        """Places of keys by prompt, in those of before and behind them those of this pass in the order of states."""
        own, fresh = self.prefix + np.arange(sum(self.past)), self.before + self.by_prompt()
        parts = [np.arange(self.prefix)]
        for old, new in zip(_cut(own, self.past), _cut(fresh, self.new)):
            parts += [old, new]
        return np.concatenate(parts)

    def keys_of(self, prompt: int) -> np.ndarray:
        """Places of the keys that a prompt's last token sees, among all by prompt."""
        own = np.add(self.past, self.new)
        start = self.prefix + own[:prompt].sum()
        return np.concatenate([np.arange(self.prefix), start + np.arange(own[prompt])])

    def kept(self, staying: Sequence[int]) -> np.ndarray:
        """Places of the keys, among all by prompt, of the prefix and of these prompts."""
        return np.concatenate([np.arange(self.prefix), *(self.keys_of(place)[self.prefix :] for place in staying)])


def _cut(places: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Consecutive parts of these sizes."""
    return np.split(places, np.cumsum(sizes)[:-1])
