"""Comparing functions of shared numbers, with random numbers that were prepared: signs, and one message each way more.

The largest of three or more takes two more, see `winners`.

What follows from a sign t is computed in the one exchange that makes a number of it. Of a random bit r the parties
have shares that add up to it modulo 2^64, whose lowest bits then add up to it modulo two. They open e = t + r (modulo
two), and t = e + (1 - 2 e) r is linear in r. Of a number x that is kept where t is 1 they open d = x - a too, and

    t x = (e + (1 - 2 e) r) (d + a) = e d + e a + (1 - 2 e) (r d + r a)

with shares of a and of r a that were prepared beside r.

The largest of a group is its last number and, of another that wins, the difference of both. Signs lose carries from
below the window, otherwise for each difference: so the shares of the numbers themselves lose what is below, before
they are subtracted. What is left has one order, whoever it is compared with, and the first of equal numbers wins.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from entropi.private.compute import windows
from entropi.private.compute.windows import Window
from entropi.private.preparation import signs, winners
from entropi.private.preparation.cutting import Comparison
from entropi.private.preparation.ring import Ring, words_for

# Over which numbers the functions of `compute.functions` compare, by their names.
WINDOWS = {
    "relu": windows.narrow,
    "largest": windows.narrow,
    "by_edges": windows.exact,
    "by_edges_of_any": windows.wide,
}

Bits = TypeVar("Bits")


class Prepared(Protocol):
    """Where random numbers are taken from: `material.Material`."""

    def of_signs(self, digit_bits: int, words: int) -> tuple[Ring, Ring]:
        """Masks and their products for so many words of signs, see `signs.signs`."""

    def of_winners(self, words: int) -> tuple[Ring, Ring]:
        """Masks and their products for so many words of groups, see `winners.winners`."""

    def of_bits(self, count: int) -> Ring:
        """Shares of so many random bits r."""

    def of_kept(self, count: int) -> tuple[Ring, Ring, Ring]:
        """Shares of so many random numbers a, bits r and products r a."""


def by_window(comparisons: Sequence[Comparison], fraction_bits: int) -> Mapping[Window, list[int]]:
    """Places of the comparisons whose signs are found together."""
    found: dict[Window, list[int]] = {}
    for place, comparison in enumerate(comparisons):
        found.setdefault(WINDOWS[comparison.kind](fraction_bits), []).append(place)
    return found


def signs_of(comparison: Comparison) -> int:
    """How many signs it takes."""
    if comparison.kind == "largest":
        return _groups(comparison) * len(winners.pairs(comparison.shape[-1]))
    return _size(comparison.shape if comparison.kind == "relu" else _differences(comparison))


def kept_by(comparison: Comparison) -> int:
    """How many numbers it keeps or not."""
    if comparison.kind == "largest":
        return _groups(comparison) * (comparison.shape[-1] - 1)
    return _size(comparison.shape) if comparison.kind == "relu" else 0


def numbers_by(comparison: Comparison) -> int:
    """How many bits it makes numbers of."""
    return 0 if kept_by(comparison) else signs_of(comparison)


def groups_of(comparisons: Sequence[Comparison]) -> int:
    """Of how many groups the winners are found together. The larger of two follows from one sign."""
    return sum(_groups(comparison) for comparison in comparisons if _has_winners(comparison))


def _has_winners(comparison: Comparison) -> bool:
    return comparison.kind == "largest" and comparison.shape[-1] > 2


def _groups(comparison: Comparison) -> int:
    return _size(comparison.shape[:-1])


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _differences(comparison: Comparison) -> tuple[int, ...]:
    """Shape of all differences of x and the edges."""
    return np.broadcast_shapes((1, *comparison.shape), comparison.public[0].shape)


def compute(
    comparisons: Sequence[Comparison], shares: Sequence[Ring], material: Prepared, fraction_bits: int, *, server: bool
) -> Generator[bytes, bytes, list[Ring]]:
    """This party's shares of the results, of its `shares` of the operands.

    Yields what it sends, and is sent what the other party did, of the same size.
    """
    numbers = [_compared(*pair, fraction_bits, server=server) for pair in zip(comparisons, shares)]
    negative = [np.empty(0, np.uint8)] * len(comparisons)
    for which, places in by_window(comparisons, fraction_bits).items():
        sizes = [numbers[place].size for place in places]
        joint = np.concatenate([numbers[place] for place in places])
        words = material.of_signs(which.digit_bits, words_for(joint.size))
        found = yield from _in_words(signs.signs(joint, which, *words, server=server))
        for place, part in zip(places, np.split(found, np.cumsum(sizes)[:-1])):
            negative[place] = part
    decided = yield from _decided(comparisons, negative, material, server=server)

    opened, drawn = list[np.ndarray](), list[tuple[Ring, ...]]()
    for comparison, share, bits in zip(comparisons, shares, decided):
        if kept_by(comparison):
            a, bit, product = material.of_kept(bits.size)
            drawn.append((bit, a, product))
            opened += [_bit(bits, bit), _to_keep(comparison, share) - a]
        else:
            drawn.append((material.of_bits(bits.size),))
            opened.append(_bit(bits, drawn[-1][0]))
    seen = iter((yield from _open(opened)))
    results = []
    for comparison, share, masks in zip(comparisons, shares, drawn):
        if kept_by(comparison):
            kept = _kept(next(seen), next(seen), *masks, server=server)
            if comparison.kind == "largest":
                kept = _by_rank(share)[-1] + kept.reshape(share.shape[-1] - 1, -1).sum(axis=0, dtype=np.uint64)
            results.append(kept.reshape(comparison.result_shape))
        else:
            whole = _number(next(seen), *masks, server=server).reshape(_differences(comparison))
            results.append(_by_edges(whole, comparison, fraction_bits, server=server))
    return results


def _decided(
    comparisons: Sequence[Comparison], negative: Sequence[np.ndarray], material: Prepared, *, server: bool
) -> Generator[bytes, bytes, list[np.ndarray]]:
    """This party's shares of the bits by which numbers are kept or made, of those of signs."""
    decided = [bits ^ np.uint8(server and kept_by(one) > 0) for one, bits in zip(comparisons, negative)]
    places = [place for place, comparison in enumerate(comparisons) if _has_winners(comparison)]
    if places:
        sizes = [comparisons[place].shape[-1] for place in places]
        by_pair = [negative[place].reshape(len(winners.pairs(size)), -1) for place, size in zip(places, sizes)]
        words = material.of_winners(words_for(groups_of(comparisons)))
        found = yield from _in_words(winners.winners(by_pair, sizes, *words, server=server))
        for place, bits in zip(places, found):
            decided[place] = bits.reshape(-1)
    return decided


def _compared(comparison: Comparison, share: Ring, fraction_bits: int, *, server: bool) -> Ring:
    """This party's share of the numbers whose signs are asked for, in a row."""
    if comparison.kind == "relu":
        return share.reshape(-1)
    if comparison.kind == "largest":
        dropped = np.uint64(WINDOWS[comparison.kind](fraction_bits).dropped)
        left, right = np.array(winners.pairs(share.shape[-1])).T
        whole = _by_rank(share) >> dropped
        return ((whole[left] - whole[right]) << dropped).reshape(-1)
    differences = np.broadcast_to(share[None], _differences(comparison))
    if server:
        differences = differences - _fixed(comparison.public[0], fraction_bits)
    return differences.reshape(-1)


def _by_rank(share: Ring) -> Ring:
    """Groups `(..., n)` as `(n, groups)`."""
    return share.reshape(-1, share.shape[-1]).T


def _to_keep(comparison: Comparison, share: Ring) -> Ring:
    """This party's share of the numbers that are kept or not, in a row."""
    if comparison.kind == "relu":
        return share.reshape(-1)
    *others, last = _by_rank(share)
    return (np.stack(others) - last).reshape(-1)


def _in_words(finding: Generator[Ring, Ring, Bits]) -> Generator[bytes, bytes, Bits]:
    """What finds bits of words that are exchanged, with these words as bytes."""
    sent = next(finding)
    while True:
        theirs = yield sent.astype("<u8", copy=False).tobytes()
        try:
            sent = finding.send(np.frombuffer(theirs, "<u8").astype(np.uint64, copy=False).reshape(sent.shape))
        except StopIteration as done:
            result: Bits = done.value
            return result


def _bit(share: np.ndarray, random: Ring) -> np.ndarray:
    """This party's share of a bit under a random one, modulo two."""
    return share ^ (random & np.uint64(1)).astype(np.uint8)


def _open(own: list[np.ndarray]) -> Generator[bytes, bytes, list[np.ndarray]]:
    """What these are shares of: bits, `uint8`, modulo two, and numbers. One message, with the bits at its end."""
    bits = np.concatenate([one for one in own if one.dtype == np.uint8])
    numbers = [one for one in own if one.dtype != np.uint8]
    content = b"".join([*(one.astype("<u8", copy=False).tobytes() for one in numbers), np.packbits(bits).tobytes()])
    theirs = yield content

    size = 8 * sum(one.size for one in numbers)
    other_numbers = np.frombuffer(theirs[:size], "<u8").astype(np.uint64, copy=False)
    other_bits = np.unpackbits(np.frombuffer(theirs[size:], np.uint8), count=bits.size)
    opened = []
    for one in own:
        if one.dtype == np.uint8:
            opened.append(one ^ other_bits[: one.size])
            other_bits = other_bits[one.size :]
        else:
            opened.append(one + other_numbers[: one.size])
            other_numbers = other_numbers[one.size :]
    return opened


def _number(opened: np.ndarray, bit: Ring, *, server: bool) -> Ring:
    """This party's share of t, a whole number."""
    one = np.uint64(server)
    result: Ring = np.where(opened == 1, one - bit, bit)
    return result


def _kept(opened: np.ndarray, difference: Ring, bit: Ring, a: Ring, product: Ring, *, server: bool) -> Ring:
    """This party's share of t x."""
    mixed = bit * difference + product
    result: Ring = np.where(opened == 1, (difference + a if server else a) - mixed, mixed)
    return result


def _by_edges(negative: Ring, comparison: Comparison, fraction_bits: int, *, server: bool) -> Ring:
    """This party's share of the sums of what stands below and above edges, of which signs are whole numbers."""
    _, below, above = (_fixed(public, fraction_bits) for public in comparison.public)
    chosen = (below - above) * negative[None]
    if server:
        chosen = chosen + above
    result: Ring = np.broadcast_to(chosen, (len(below), *negative.shape)).sum(axis=1, dtype=np.uint64)
    return result


def _fixed(public: np.ndarray, fraction_bits: int) -> Ring:
    """Public real numbers as ring elements."""
    return np.rint(public.astype(np.float64) * 2.0**fraction_bits).astype(np.int64).view(np.uint64)
