"""Cutting shared numbers to fewer fraction bits, with random bits that were prepared.

A number x of 2 f fraction bits, -2^62 <= x < 2^62, is moved up by 2^62; the parties' shares of it then add up to
x + 2^62 or, where they wrap, to 2^64 more. Each party shifts its own share, and what is missing is 2^(64 - f) times the
wrap. A sum of 63 bits wraps if either share has its highest bit set: so a wrap is s + t - s t, where one party
knows s and the other t. That product is the only thing that neither can compute by itself. Of it a product of random
bits u v is prepared, u known to the one and v to the other; each sends its bit less its random one, modulo two,
one bit a number (Beaver, CRYPTO 1991).

What the shares have below the last place is lost: one last place in the mean, whatever the number. The server adds it,
so results are rounded down or up, and are the numbers in the mean. The engine truncates in the same way (Cheetah,
USENIX Security 2022), with an oblivious transfer in place of what was prepared, and does not add it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from entropi.private.preparation.ring import WORD, Ring, words_for

Bits: TypeAlias = NDArray[np.uint8]
_HALF = np.uint64(62)
_SIGN = np.uint64(63)


@dataclass(frozen=True)
class TruncationMasks:
    """This party's random bits, and its share of their products with the other party's, modulo 2^f."""

    bits: Bits
    products: NDArray[np.uint32]


def masked_signs(x: Ring, masks: TruncationMasks, *, server: bool) -> Bits:
    """What this party sends to truncate `x`, its share of some numbers: the highest bits under masks."""
    return _sign(_moved(x, server=server)) ^ masks.bits


def truncated(x: Ring, own: Bits, theirs: Bits, masks: TruncationMasks, fraction_bits: int, *, server: bool) -> Ring:
    """This party's share of x / 2^f, of its share of x and of what both parties have sent."""
    moved, shift = _moved(x, server=server), np.uint64(fraction_bits)

    # s t = (e + (1 - 2 e) u) (d + (1 - 2 d) v), of which everyone knows e and d: e d is the server's part. What is not
    # a share is one of a few small numbers, and 8 bits wide.
    small = (theirs & masks.bits).astype(np.int8) * (1 - 2 * own.view(np.int8))
    if server:
        small += (own & theirs).view(np.int8)
    small = _sign(moved).view(np.int8) - small
    products = masks.products.astype(np.int64)
    np.negative(products, out=products, where=own == theirs)
    wrap = (products + small).view(np.uint64)  # which is what remains of the signs less their product

    result: Ring = (moved >> shift) - (wrap << (np.uint64(WORD) - shift))
    if server:
        result -= (np.uint64(1) << (_HALF - shift)) - np.uint64(1)
    return result


def _moved(x: Ring, *, server: bool) -> Ring:
    return x + (np.uint64(1) << _HALF) if server else x


def _sign(x: Ring) -> Bits:
    return (x >> _SIGN).astype(np.uint8)


def packed(bits: Bits, products: NDArray[np.uint32]) -> tuple[Ring, Ring]:
    """Random bits, and shares of their products, as 64-bit words."""
    words = np.packbits(np.pad(bits, (0, -len(bits) % WORD))).view(np.uint64)
    halves = np.pad(products, (0, len(products) % 2)).view(np.uint64)
    return words, halves


def unpacked(words: Ring, halves: Ring, count: int) -> TruncationMasks:
    """The reverse, for so many numbers."""
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), count=count)
    return TruncationMasks(bits, np.ascontiguousarray(halves).view(np.uint32)[:count])


def packed_shapes(count: int) -> tuple[tuple[int], tuple[int]]:
    """Of what `packed` makes of so many."""
    return (words_for(count),), (-(-count // 2),)
