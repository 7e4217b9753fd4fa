"""Linear algebra modulo 2^64 on numpy arrays of `uint64`."""

from __future__ import annotations

import secrets
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ring: TypeAlias = NDArray[np.uint64]

_LIMB_BITS, _LIMBS = 16, 4
_EXACT = 2**53  # below which float64 holds every whole number


def uniform(shape: tuple[int, ...]) -> Ring:
    """Numbers that are uniformly random, from the operating system's generator."""
    size = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(secrets.token_bytes(8 * size), dtype="<u8").astype(np.uint64).reshape(shape)


def encode(x: np.ndarray, fraction_bits: int) -> NDArray[np.int64]:
    """Real numbers as whole ones, 2^`fraction_bits` times as large, to the nearest."""
    return np.rint(np.asarray(x, np.float64) * 2.0**fraction_bits).astype(np.int64)


def times_small(x: Ring, matrix: NDArray[np.signedinteger]) -> Ring:
    """`x` `(n, d)` times a matrix `(d, m)` of signed whole numbers, modulo 2^64.

    The digits of x to the base 2^16 are rows of one product in float64, whose sums stay below 2^53: as many columns
    of x at a time as the largest entry of the matrix allows. Numpy's own products of whole numbers take ten times as long.
    """
    rows, inner = x.shape
    largest = int(np.abs(matrix).max(initial=1)) * (2**_LIMB_BITS - 1)
    step = max(_EXACT // largest, 1)
    assert largest < _EXACT, "an entry of the matrix has more than 37 bits"

    shifts = np.uint64(_LIMB_BITS) * np.arange(_LIMBS, dtype=np.uint64)
    total = np.zeros((rows, matrix.shape[1]), np.uint64)
    for start in range(0, inner, step):
        piece = x[:, start : start + step]
        digits = (piece[None] >> shifts[:, None, None]) & np.uint64(2**_LIMB_BITS - 1)
        products = digits.reshape(_LIMBS * rows, -1).astype(np.float64) @ matrix[start : start + step].astype(
            np.float64
        )
        whole = products.astype(np.int64).view(np.uint64).reshape(_LIMBS, rows, -1)
        total += (whole << shifts[:, None, None]).sum(axis=0, dtype=np.uint64)
    return total
