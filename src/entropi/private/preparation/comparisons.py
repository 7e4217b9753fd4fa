"""Comparing functions of shared numbers, with random numbers that were prepared: signs, and one message each way more.

What follows from a sign t is computed in the one exchange that makes a number of it. Of a random bit r the parties
have shares that add up to it modulo 2^64, whose lowest bits then add up to it modulo two. They open e = t + r (modulo
two), and t = e + (1 - 2 e) r is linear in r. Of a number x that is kept where t is 1 they open d = x - a too, and

    t x = (e + (1 - 2 e) r) (d + a) = e d + e a + (1 - 2 e) (r d + r a)

with shares of a and of r a that were prepared beside r.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

import numpy as np

from entropi.private.compute import windows
from entropi.private.compute.windows import Window
from entropi.private.preparation import signs
from entropi.private.preparation.cutting import Comparison
from entropi.private.preparation.ring import Ring, words_for

# Over which numbers the functions of `compute.functions` compare, by their names.
WINDOWS = {"relu": windows.narrow, "by_edges": windows.exact, "by_edges_of_any": windows.wide}


class Prepared(Protocol):
    """Where random numbers are taken from: `material.Material`."""

    def of_signs(self, digit_bits: int, words: int) -> tuple[Ring, Ring]:
        """Masks and their products for so many words of signs, see `signs.signs`."""

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
    shape = comparison.shape if comparison.kind == "relu" else _differences(comparison)
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
        found = yield from _signs(np.concatenate([numbers[place] for place in places]), which, material, server=server)
        for place, part in zip(places, np.split(found, np.cumsum(sizes)[:-1])):
            negative[place] = part

    opened, drawn = list[np.ndarray](), list[tuple[Ring, ...]]()
    for comparison, share, sign in zip(comparisons, shares, negative):
        if comparison.kind == "relu":
            a, bit, product = material.of_kept(share.size)
            drawn.append((bit, a, product))
            opened += [_bit(sign ^ np.uint8(server), bit), share.reshape(-1) - a]
        else:
            drawn.append((material.of_bits(sign.size),))
            opened.append(_bit(sign, drawn[-1][0]))
    seen = iter((yield from _open(opened)))
    results = []
    for comparison, masks in zip(comparisons, drawn):
        if comparison.kind == "relu":
            results.append(_kept(next(seen), next(seen), *masks, server=server).reshape(comparison.result_shape))
        else:
            whole = _number(next(seen), *masks, server=server).reshape(_differences(comparison))
            results.append(_by_edges(whole, comparison, fraction_bits, server=server))
    return results


def _compared(comparison: Comparison, share: Ring, fraction_bits: int, *, server: bool) -> Ring:
    """This party's share of the numbers whose signs are asked for, in a row."""
    if comparison.kind == "relu":
        return share.reshape(-1)
    differences = np.broadcast_to(share[None], _differences(comparison))
    if server:
        differences = differences - _fixed(comparison.public[0], fraction_bits)
    return differences.reshape(-1)


def _signs(x: Ring, which: Window, material: Prepared, *, server: bool) -> Generator[bytes, bytes, np.ndarray]:
    masks, products = material.of_signs(which.digit_bits, words_for(x.size))
    finding = signs.signs(x, which, masks, products, server=server)
    sent = next(finding)
    while True:
        theirs = yield sent.astype("<u8", copy=False).tobytes()
        try:
            sent = finding.send(np.frombuffer(theirs, "<u8").astype(np.uint64, copy=False).reshape(sent.shape))
        except StopIteration as done:
            result: np.ndarray = done.value
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
