"""Which of a few shared numbers is the largest, of the signs of all their differences: one message each way.

A number wins where it beats all others, which is a product of as many bits, and so one exchange, see `gates`. All
signs have to be of one order, in which of equal numbers the first is the larger: then one number wins and no other. A
number that wins is kept, its bit being 1; of the last one that bit is what is missing.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cache
from itertools import combinations

import numpy as np

from entropi.private.compute.functions import GROUP
from entropi.private.preparation.gates import Gate, Gates, masks_of
from entropi.private.preparation.ring import WORD, Ring, as_words, from_words, words_for


def pairs(size: int) -> list[tuple[int, int]]:
    """Which numbers are compared, of so many."""
    return list(combinations(range(size), 2))


@cache
def gate() -> Gate:
    """Which of `GROUP` numbers wins, but for the last: "ij" is whether i beats j; smaller groups lack the last ones."""
    beats = {(one, other): f"{one}{other}" for one in range(GROUP) for other in range(GROUP)}
    wins = tuple((tuple(beats[one, other] for other in range(GROUP) if other != one),) for one in range(GROUP - 1))
    opened = tuple(beats[other, one] for one, other in pairs(GROUP))
    return Gate(opened, (), wins, negated=tuple((beats[one, other], beats[other, one]) for one, other in pairs(GROUP)))


def gates() -> Gates:
    """The only one."""
    return [(gate(), 1)]


def opened() -> int:
    """Bits that each party sends of one group."""
    return masks_of(gates())


def winners(
    negative: Sequence[np.ndarray], sizes: Sequence[int], masks: Ring, products: Ring, *, server: bool
) -> Generator[Ring, Ring, list[np.ndarray]]:
    """This party's shares of which numbers win but for the last of each group, bits `(size - 1, groups)`, `uint8`.

    Yields what this party sends, and is sent what the other one did.

    Args:
        negative: for groups of every size its shares of which differences of `pairs` are negative, `(pairs, groups)`.
        masks: `(words, masks_of)`, as prepared.
        products: `(words, products_of)`.
    """
    counts = [bits.shape[1] for bits in negative]
    beaten = np.zeros((len(pairs(GROUP)), words_for(sum(counts)) * WORD), np.uint8)  # nothing beats what is not there
    done = 0
    for size, bits in zip(sizes, negative):
        beaten[[pairs(GROUP).index(pair) for pair in pairs(size)], done : done + bits.shape[1]] = bits
        done += bits.shape[1]
    sent = as_words(beaten) ^ masks.T
    seen = sent ^ (yield sent)
    found = from_words(np.stack(gate().evaluated({}, seen, masks.T, products.T, server=server)), done)
    ends = np.cumsum(counts)[:-1]
    return [bits[: size - 1] for size, bits in zip(sizes, np.split(found, ends, axis=1))]
