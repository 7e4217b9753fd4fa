"""Linear algebra modulo 2^64 on numpy arrays of `uint64`."""

from __future__ import annotations

import secrets
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from entropi.errors import UserError

Ring: TypeAlias = NDArray[np.uint64]

WORD = 64  # bits of a ring element
_DIGIT_BITS, _DIGITS = 16, 4
_EXACT = 2**53  # below which float64 holds every whole number
_COLUMNS = 4096  # of a matrix, as float64 at a time: 25 MB where it has 768 rows
_FEW_ROWS = 12  # for which whole numbers are faster: one of 768 x 2304 takes 2 ms, by digits 14


def words_for(bits: int) -> int:
    """Ring elements that hold so many bits."""
    return -(-bits // WORD)


def as_words(bits: NDArray[np.uint8]) -> Ring:
    """Bits `(..., n)`, n a multiple of 64, as words: the first in a word's lowest place."""
    words: Ring = np.packbits(bits, axis=-1, bitorder="little").view("<u8").astype(np.uint64, copy=False)
    return words


def from_words(words: Ring, count: int) -> NDArray[np.uint8]:
    """The first `count` bits of words `(..., n)`."""
    octets = np.ascontiguousarray(words, "<u8").view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=count, bitorder="little")


def uniform(shape: tuple[int, ...]) -> Ring:
    """Numbers that are uniformly random, from the operating system's generator."""
    size = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(secrets.token_bytes(8 * size), dtype="<u8").astype(np.uint64).reshape(shape)


def encode(x: np.ndarray, fraction_bits: int) -> NDArray[np.int32]:
    """Real numbers as whole ones, 2^`fraction_bits` times as large, to the nearest.

    Raises:
        UserError: one of them does not fit 32 bits.
    """
    whole = np.rint(np.asarray(x, np.float64) * 2.0**fraction_bits)
    if not np.abs(whole).max(initial=0.0) < 2**31:
        largest = 2.0 ** (31 - fraction_bits)
        raise UserError(f"with {fraction_bits} fraction bits weights of {largest:g} or more cannot be prepared")
    return whole.astype(np.int32)


class SmallMatrix:
    """A matrix `(d, m)` of signed whole numbers of up to 37 bits, made ready for many products modulo 2^64.

    Raises:
        ValueError: an entry has more bits.
    """

    def __init__(self, matrix: NDArray[np.signedinteger]) -> None:
        largest = max(int(matrix.max(initial=1)), -int(matrix.min(initial=-1))) * (2**_DIGIT_BITS - 1)
        if largest >= _EXACT:
            raise ValueError("an entry of the matrix has more than 37 bits")
        self._step = _EXACT // largest
        # Side by side what a sum runs over: along a column numpy's whole numbers are several times as fast.
        self._columns = np.ascontiguousarray(matrix.T, np.int64)

    def after(self, x: Ring) -> Ring:
        """`x` `(n, d)` times this matrix, `(n, m)`, modulo 2^64."""
        if len(x) <= _FEW_ROWS:
            product: Ring = np.einsum("rd,cd->rc", x, self._columns.view(np.uint64))
            return product
        return self._by_digits(x)

    def _by_digits(self, x: Ring) -> Ring:
        """Digits to the base 2^16 are rows of one product in float64, whose sums stay below 2^53.

        As many columns of x at a time as the largest entry of the matrix allows, and as many columns of the matrix as
        `_COLUMNS` says, for which float64 takes memory of its own. Of many rows whole numbers take ten times as long;
        of few, turning the matrix into float64 does.
        """
        shifts = np.uint64(_DIGIT_BITS) * np.arange(_DIGITS, dtype=np.uint64)[:, None, None]
        digits = ((x >> shifts) & np.uint64(2**_DIGIT_BITS - 1)).astype(np.float64)
        product = np.zeros((len(x), len(self._columns)), np.uint64)

        for first in range(0, len(self._columns), _COLUMNS):
            columns = slice(first, first + _COLUMNS)
            entries = self._columns[columns].astype(np.float64).T
            for start in range(0, x.shape[1], self._step):
                part = slice(start, start + self._step)
                piece = digits[:, :, part].reshape(_DIGITS * len(x), -1) @ entries[part]
                whole = piece.astype(np.int64).view(np.uint64).reshape(_DIGITS, len(x), -1)
                product[:, columns] += (whole << shifts).sum(axis=0, dtype=np.uint64)
        return product
