"""The bilinear functions that can be prepared, modulo 2^64, and which random numbers one session of them takes.

Notation as in `compute.program`. A session of T tokens, whichever passes it comes in, takes

- of a product with the server's matrix W `(d, m)`: R `(T, d)`, which the client draws, and shares of R W, row by row
  as they are needed; of the last layer and the head as many rows as there are passes;
- of scores: shares of A `(H, T, k)` and B `(G, T, k)`, and of their products, packed as `attention.scores` packs pairs;
- of mixed values: shares of A `(H, T (T + 1) / 2)`, packed, and B `(G, T, k)`, and of their products `(H, T, k)`;
- of what is multiplied number by number: shares of as many random numbers and of their products.

Keys and values are masked by row t of B as their token is, in all passes: they are opened once.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

from entropi.private.compute.attention import visible
from entropi.private.preparation.cutting import Product, Shape
from entropi.private.preparation.ring import Ring

# Who masks what: of two shared operands both parties open both; of a square its one; of a server's matrix the client
# alone draws the other operand's mask, and the server alone sees that operand under it. The highest bits of what is
# truncated are masked by a bit of each party, signs by shared bits.
Masking: TypeAlias = Literal["pair", "self", "server", "signs", "bits"]
OF_SERVER = ("times_matrix", "times_table")  # kinds whose second operand is one of the server's weights


def packed_size(rows: int) -> int:
    """Pairs of a row and a key it sees, of the first `rows` tokens."""
    return rows * (rows + 1) // 2


def _scores(query: Ring, key: Ring) -> Ring:
    """`(H, r, k)`, `(G, s, k)` -> packed `(H, n)`."""
    (heads, rows, width), (groups, keys, _) = query.shape, key.shape
    joint = query.reshape(groups, -1, width) @ key.transpose(0, 2, 1)
    row, column = visible(rows, keys)
    return joint.reshape(heads, rows * keys)[:, row * keys + column]


def _mix(weights: Ring, value: Ring) -> Ring:
    """Packed `(H, n)`, `(G, s, k)` -> `(H, r, k)`."""
    (heads, pairs), (groups, keys, width) = weights.shape, value.shape
    rows = _rows(pairs, keys)
    row, column = visible(rows, keys)
    matrix = np.zeros((heads, rows, keys), np.uint64)
    matrix[:, row, column] = weights
    return (matrix.reshape(groups, -1, keys) @ value).reshape(heads, rows, width)


def _rows(pairs: int, keys: int) -> int:
    """How many rows, the last of them seeing `keys`, have so many pairs."""
    return next(rows for rows in range(1, keys + 1) if packed_size(keys) - packed_size(keys - rows) == pairs)


def multiply(kind: str, x: Ring, y: Ring) -> Ring:
    """What a product of this kind is of two operands, modulo 2^64; a square's, and a sum of squares', are of two, too.

    Numpy's products of whole numbers are slow, but digits in float64 are no faster here, where both operands have 64
    bits: six products of digits of 22 bits.
    """
    if kind in OF_SERVER:
        return x @ y
    if kind == "scores":
        return _scores(x, y)
    if kind == "mix":
        return _mix(x, y)
    if kind == "scale_rows":
        return x * y[..., None]
    if kind == "sums_of_squares":
        result: Ring = (x * y).sum(axis=-1, dtype=np.uint64)
        return result
    if kind in ("times", "square"):
        return x * y
    raise ValueError(f"no product is called {kind}")


def masking(product: Product, of_server: set[str]) -> Masking:
    """Who masks the operands of a product, of which those named `of_server` are the server's weights.

    Only matrices are worth a masking of their own: a factor of the server's is masked like a shared one.
    """
    if len(product.operands) == 1:
        return "self"
    if product.kind not in OF_SERVER:
        return "pair"
    assert product.operands[1] in of_server, f"{product.operands[1]} is no weight"
    return "server"


def pool_of(kind: str, first: Shape) -> str | None:
    """The pool from which products of this kind and first operand take what they need, None if each has a place."""
    if kind in ("square", "times", "truncate"):
        return kind
    return f"{kind}.{first[-1]}" if kind in ("scale_rows", "sums_of_squares") else None


def token_rows(kind: str, first: Shape, result: Shape) -> int:
    """For how many tokens a product that has a place of its own is, from its first operand's and its result's shape."""
    return result[1] if kind == "mix" else first[-2]
