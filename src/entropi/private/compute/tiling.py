"""How SPU's CHEETAH cuts a matrix product into ciphertexts: by public sizes alone, the rules of SPU 0.9.5."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

SLOTS = 8192  # numbers in a ciphertext, of matrix products and of products of numbers


@dataclass(frozen=True)
class Tiling:
    """How a matrix product is cut: ciphertexts or polynomials of either operand, and of the answer."""

    left: int
    right: int
    answers: int
    packed: bool  # several results were rotated into one ciphertext
    rotations: int
    products: int  # of a ciphertext and a polynomial


@functools.cache
def tiling(rows: int, inner: int, columns: int) -> Tiling:
    """SPU's choice for `(rows, inner)` times `(inner, columns)`: fewest ciphertexts, then least work.

    A tile of d0 rows, d1 inner and d2 columns fits one polynomial, d0 d1 d2 <= 8,192; its product holds d0 d2 results
    in places d1 apart, and d1 such products are packed into one answer.
    """
    tile = _cheapest_tile(rows, inner, columns, packed=True)
    blocks = [-(-size // side) for size, side in zip((rows, inner, columns), tile)]
    if packed := blocks[0] * blocks[2] > 1:
        answers = -(-blocks[0] * blocks[2] // tile[1])
        rotations = answers * tile[1]
        if tile[1] >= rows * columns:
            answers, rotations = -(-rows * columns // SLOTS), rows * columns
    else:
        tile = _cheapest_tile(rows, inner, columns, packed=False)
        blocks = [-(-size // side) for size, side in zip((rows, inner, columns), tile)]
        answers, rotations = blocks[0] * blocks[2], 0
    return Tiling(
        left=blocks[0] * blocks[1],
        right=blocks[1] * blocks[2],
        answers=answers,
        packed=packed,
        rotations=rotations,
        products=blocks[0] * blocks[1] * blocks[2],
    )


def _cheapest_tile(rows: int, inner: int, columns: int, *, packed: bool) -> tuple[int, int, int]:
    d0 = np.arange(1, min(SLOTS, rows) + 1)[:, None]
    if packed:
        d1 = 2 ** np.arange(min(inner, SLOTS).bit_length())[None]
    else:
        d1 = np.arange(1, min(inner, SLOTS) + 1)[None]
    d2 = np.minimum(columns, SLOTS // (d0 * d1))
    fits = d2 > 0
    d2 = np.maximum(d2, 1)
    b0, b1, b2 = -(-rows // d0), -(-inner // d1), -(-columns // d2)
    ciphertexts = np.minimum(b0, b2) * b1 + -(-b0 * b2 // d1)
    rotations = -(-rows * columns // SLOTS) * d1 if packed else 0
    cost = np.where(fits, ciphertexts * 1000.0 + rotations + b0 * b1 * b2 / 10.0, np.inf)
    # The last of equals, as SPU walks through them.
    place = cost.size - 1 - int(np.argmin(cost.reshape(-1)[::-1]))
    row, column = divmod(place, cost.shape[1])
    return int(d0[row, 0]), int(d1[0, column]), int(d2[row, column])
