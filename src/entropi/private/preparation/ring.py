"""Linear algebra modulo 2^64 on numpy arrays of `uint64`."""

from __future__ import annotations

import secrets
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from entropi.errors import UserError

Ring: TypeAlias = NDArray[np.uint64]

_DIGIT_BITS, _DIGITS = 16, 4
_EXACT = 2**53  # below which float64 holds every whole number
_COLUMNS = 4096  # of a matrix, as float64 at a time: 25 MB where it has 768 rows


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


def times_small(x: Ring, matrix: NDArray[np.signedinteger]) -> Ring:
    """`x` `(n, d)` times a matrix `(d, m)` of signed whole numbers of up to 37 bits, modulo 2^64.

    The digits of x to the base 2^16 are rows of one product in float64, whose sums stay below 2^53: as many columns
    of x at a time as the largest entry of the matrix allows. Numpy's own products of whole numbers take ten times as
    long. As many columns of the matrix at a time as `_COLUMNS` says, because float64 doubles their bytes.

    Raises:
        ValueError: an entry of the matrix has more bits.
    """
    shifts = np.uint64(_DIGIT_BITS) * np.arange(_DIGITS, dtype=np.uint64)[:, None, None]
    digits = ((x >> shifts) & np.uint64(2**_DIGIT_BITS - 1)).astype(np.float64)
    product = np.zeros((len(x), matrix.shape[1]), np.uint64)

    for first in range(0, matrix.shape[1], _COLUMNS):
        columns = slice(first, first + _COLUMNS)
        entries = matrix[:, columns].astype(np.float64)
        largest = np.abs(entries).max(initial=1.0) * (2**_DIGIT_BITS - 1)
        if largest >= _EXACT:
            raise ValueError("an entry of the matrix has more than 37 bits")
        step = int(_EXACT // largest)
        for start in range(0, x.shape[1], step):
            piece = digits[:, :, start : start + step].reshape(_DIGITS * len(x), -1) @ entries[start : start + step]
            whole = piece.astype(np.int64).view(np.uint64).reshape(_DIGITS, len(x), -1)
            product[:, columns] += (whole << shifts).sum(axis=0, dtype=np.uint64)
    return product
