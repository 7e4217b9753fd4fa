"""Attention, as pure JAX over packed pairs of a query and a key it sees; public shapes.

Notation as in `program`: m new tokens after p cached ones, s = p + m; r rows of queries; H heads of width k, G of them
with keys and values of their own; n pairs of a query and a key it sees. Where several prompts share a pass, rows,
keys and pairs stand by prompt between `place` and the output projection: see `layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array

from entropi.private.compute.description import MEAN_WEIGHT_BITS, MIDDLE_WEIGHT, Description
from entropi.private.compute.functions import (
    bilinear,
    power,
    product_bytes,
    reciprocal,
    reciprocal_of_wide,
    scale_rows,
    segment_max,
    sums_of_squares,
    times_matrix,
)
from entropi.private.compute.layers import plain_and_gained
from entropi.private.compute.layout import Layout
from entropi.softmax import Divisor, share_scale

BLOCK_ROWS = 128  # of queries: with heads of 64 their keys' part fills a ciphertext


def project(
    state: Array, matrix: Array, bias: Array, *, model: Description, rows: int, wide: bool = False
) -> tuple[Array, ...]:
    """`(m, d)` -> what `split_columns` returns; one wide product where every row's query is needed, or if `wide`."""
    if rows == state.shape[0] or wide:
        joint = times_matrix(state, matrix) + bias
        return split_columns(joint[-rows:, : _asking(model)], joint[:, _asking(model) :], model)
    query = state[-rows:] @ matrix[:, : _asking(model)] + bias[: _asking(model)]
    rest = times_matrix(state, matrix[:, _asking(model) :]) + bias[_asking(model) :]
    return split_columns(query, rest, model)


def merge_and_project(
    state: Array, heads: Array, matrix: Array, bias: Array, *, model: Description, rows: int
) -> tuple[Array, ...]:
    """`merge_heads` with the last `rows` of the state, and what `project` makes of it for the next layer, at once.

    Of the state and the heads side by side one product, see `lookahead`.
    """
    width = state.shape[1]
    joint = times_matrix(jnp.concatenate([state, side_by_side(heads, None)], axis=1), matrix) + bias
    query, rest = joint[-rows:, width : width + _asking(model)], joint[:, width + _asking(model) :]
    return state[-rows:] + joint[-rows:, :width], *split_columns(query, rest, model)


def _asking(model: Description) -> int:
    """How many columns are of queries, the plain ones included."""
    return 2 * model.query_size if model.query_key_norm else model.query_size


def split_columns(query: Array, rest: Array, model: Description) -> tuple[Array, ...]:
    """Columns of queries `(r, ...)` and all others `(m, ...)` -> q `(H, r, k)`, k and v `(G, m, k)`.

    Where queries and keys are normalised also their rows without the norms' gains, `(H r + G m, k)`. Columns are
    queries, plain queries, keys, values and plain keys.
    """
    width, shared = model.query_size, model.key_value_heads * model.head_size

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, model.head_size).transpose(1, 0, 2)

    queries, keys, values = split(query[:, :width]), split(rest[:, :shared]), split(rest[:, shared : 2 * shared])
    if not model.query_key_norm:
        return queries, keys, values
    plain = [split(one).reshape(-1, model.head_size) for one in (query[:, width:], rest[:, 2 * shared :])]
    return queries, keys, values, jnp.concatenate(plain)


def normalise_heads(
    plain: Array, query: Array, key: Array, *, epsilon: float, root: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """q `(H, r, k)` and k `(G, m, k)`, each row by the root mean square of its row of `plain` `(H r + G m, k)`."""
    roots = root(sums_of_squares(plain) * (1.0 / plain.shape[1]) + epsilon)
    width, many = plain.shape[1], query.shape[0] * query.shape[1]
    queries = scale_rows(query.reshape(-1, width), roots[:many]).reshape(query.shape)
    return queries, scale_rows(key.reshape(-1, width), roots[many:]).reshape(key.shape)


def place(
    query: Array, key: Array, value: Array, *cached: Array, frequencies: Sequence[float], layout: Layout
) -> tuple[Array, ...]:
    """q, and all keys and values `(G, s, k)`, the cached ones included; queries and keys rotate by their positions.

    From here on they stand by prompt.
    """
    if len(frequencies):
        positions = layout.positions()
        query = rotate(query, positions=positions[-query.shape[1] :], frequencies=frequencies)
        key = rotate(key, positions=positions, frequencies=frequencies)
    if cached:
        key, value = jnp.concatenate([cached[0], key], axis=1), jnp.concatenate([cached[1], value], axis=1)
    if layout.prompts > 1:
        places = layout.joined()
        key, value = key[:, places], value[:, places]
        if query.shape[1] == layout.tokens:
            query = query[:, layout.by_prompt()]
    return query, key, value


def project_and_place(
    *operands: Array,
    projection: Callable[..., tuple[Array, ...]],
    read: int,
    frequencies: Sequence[float],
    layout: Layout,
) -> tuple[Array, ...]:
    """A `projection` of the first `read` operands, and `place` with the cached keys and values behind them, at once."""
    *others, query, key, value = projection(*operands[:read])
    return *others, *place(query, key, value, *operands[read:], frequencies=frequencies, layout=layout)


def rotate(x: Array, *, positions: np.ndarray, frequencies: Sequence[float]) -> Array:
    """Rotary position embedding of `(H, r, k)` at `positions` `(r,)`: angles are public, so this is local.

    Twice as many columns as there are frequencies rotate, column j with the one half of them further (GPT-NeoX's and
    Llama's order).
    """
    dimensions = 2 * len(frequencies)
    angles = positions[:, None] * np.tile(frequencies, 2)
    turned, kept = x[..., :dimensions], x[..., dimensions:]
    half = dimensions // 2
    other = jnp.concatenate([-turned[..., half:], turned[..., :half]], axis=-1)
    cosine, sine = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    return jnp.concatenate([turned * cosine + other * sine, kept], axis=-1)


def temper(query: Array, inverse_temperature: Array, *, rows: int, layout: Layout) -> Array:
    """Rows of q `(H, r, k)` divided by the temperature of their head and position (Eq. 9)."""
    return scale_rows(query, at_positions(inverse_temperature, layout.seen(rows) - 1), private=True)


def at_positions(table: Array, positions: np.ndarray) -> Array:
    """Columns of a table `(H, P)` by position; a slice where they follow each other."""
    first, last = int(positions[0]), int(positions[-1])
    if np.array_equal(positions, np.arange(first, last + 1)):
        return table[:, first : last + 1]
    return table[:, positions]


def scale_by_length(query: Array, *, layout: Layout, positions: int) -> Array:
    """Rows of q `(H, r, k)` times log(n) / log(positions), n the keys that they see: public, so this is local."""
    factors = np.log(layout.seen(query.shape[1])) / np.log(positions)
    return query * factors[:, None].astype(query.dtype)


def visible(rows: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and key index of every pair a causal model sees, row by row; the last row sees every key."""
    row, column = np.nonzero(np.tril(np.ones((rows, keys), dtype=bool), keys - rows))
    return row, column


@bilinear
def scores(query: Array, key: Array) -> Array:
    """`(H, n)` logits of the visible pairs.

    In blocks of queries against the keys that the block's last one sees: blocks of 128 rows of 64 fill a ciphertext
    and save the products beyond; smaller ones would send more than they save. Few rows do not fill one, and are one
    product of all heads, every row holding zeros in the columns of the others.
    """
    heads, rows, width = query.shape
    groups, keys, _ = key.shape
    shared = heads // groups  # queries that share their keys are rows of one product
    parts = []
    for start in range(0, rows, BLOCK_ROWS):
        block = query[:, start : start + BLOCK_ROWS]
        size = block.shape[1]
        seen = keys - rows + start + size
        grouped, seen_keys = block.reshape(groups, shared * size, width), key[:, :seen]
        apart = groups * product_bytes(shared * size, width, seen)
        if product_bytes(heads * size, groups * width, seen) < apart:
            joint = block_rows(grouped) @ seen_keys.transpose(0, 2, 1).reshape(groups * width, seen)
        else:
            joint = grouped @ seen_keys.transpose(0, 2, 1)
        row, column = visible(size, seen)
        parts.append(joint.reshape(heads, size * seen)[:, row * seen + column])
    return jnp.concatenate(parts, axis=1)


def block_rows(blocks: Array) -> Array:
    """Blocks `(G, a, b)` on the diagonal of `(G a, G b)`, zeros elsewhere; public, so that nothing is sent."""
    groups, high, wide = blocks.shape
    where = np.eye(groups, dtype=bool)[:, None, :, None]
    return jnp.where(where, blocks[:, :, None, :], jnp.zeros((), blocks.dtype)).reshape(groups * high, groups * wide)


def shift_by_row_max(logits: Array, *, rows: int, layout: Layout, prepared: bool = False) -> Array:
    """`(H, n)`: visible logits, each less its row's largest."""
    seen = layout.seen(rows)
    return logits - segment_max(logits, seen, prepared=prepared)[:, np.repeat(np.arange(rows), seen)]


def powers(logits: Array, offset: Array, *, rows: int, layout: Layout, iterations: int, divided: bool = True) -> Array:
    """`(H, n)` weights by a polynomial softmax, of visible logits and offsets `(H, P)` that the server adds.

    A first row sees itself alone: `divided` by its sum, its weight is 1 whatever its logit, which may be too small to
    divide by; so it is a constant.
    """
    seen = layout.seen(rows)
    weights = power(logits + at_positions(offset, seen - 1)[:, np.repeat(np.arange(rows), seen)], iterations)
    alone = (np.cumsum(seen) - seen)[seen == 1]
    if not divided or not len(alone):
        return weights
    middle = jnp.full_like(weights[:, :1], MIDDLE_WEIGHT)
    if layout.prompts == 1:
        return jnp.concatenate([middle, weights[:, 1:]], axis=1)
    places = np.arange(weights.shape[1])
    places[alone] = len(places)
    return jnp.concatenate([weights, middle], axis=1)[:, places]


def weighted_values(weights: Array, value: Array, *, rows: int) -> tuple[Array, Array]:
    """Packed weights `(H, n)` and v `(G, s, k)` -> unnormalised heads `(H, r, k)` and row sums `(H, r)`."""
    totals = as_rectangle(weights, rows, value.shape[1]).sum(axis=-1)
    return mix(weights, value, rows=rows), totals


def mix_and_divide(
    weights: Array, value: Array, *, mixing: Callable[..., tuple[Array, Array]], division: Callable[..., Array]
) -> Array:
    """`weighted_values` and the division of its results, as one function of two parts that wait for each other late."""
    return division(*mixing(weights, value), prepared=True)


def as_rectangle(weights: Array, rows: int, keys: int) -> Array:
    """Packed weights `(H, n)` as `(H, r, s)`, zero where nothing is seen."""
    heads = weights.shape[0]
    row, column = visible(rows, keys)
    where = np.full((rows, keys), len(row))  # one entry past the end holds the zero of the future
    where[row, column] = np.arange(len(row))
    padded = jnp.concatenate([weights, jnp.zeros((heads, 1), weights.dtype)], axis=1)
    return padded[:, where.reshape(-1)].reshape(heads, rows, keys)


@partial(bilinear, static_argnames=("rows",))
def mix(weights: Array, value: Array, *, rows: int) -> Array:
    """Packed weights `(H, n)` times v `(G, s, k)`: `(H, r, k)`, before any division."""
    heads, (groups, keys, width) = weights.shape[0], value.shape
    shared = heads // groups * rows
    matrix = as_rectangle(weights, rows, keys).reshape(groups, shared, keys)
    if product_bytes(shared, groups * keys, groups * width) < groups * product_bytes(shared, keys, width):
        # All heads side by side in one product, as in `scores`: their values on the diagonal.
        joint = matrix.transpose(1, 0, 2).reshape(shared, groups * keys) @ block_rows(value)
        return joint.reshape(shared, groups, width).transpose(1, 0, 2).reshape(heads, rows, width)
    return (matrix @ value).reshape(heads, rows, width)


def average(heads: Array, *, layout: Layout, positions: int, divisor: Divisor) -> Array:
    """Sums over keys `(H, r, k)` times `share_scale` over the divisor: public, so this is local; 3 bytes."""
    seen = layout.seen(heads.shape[1])
    share = share_scale(positions) / (seen if divisor == "keys" else np.full(len(seen), float(divisor)))
    return heads * share.astype(heads.dtype)[:, None]


def normalise(heads: Array, totals: Array, *, layout: Layout, prepared: bool = False) -> Array:
    """Divide after the value product: r d multiplications instead of H r s.

    A row of v weights sums to between 1 and v; divided by the root of v first, sum and reciprocal have the same number
    of digits to stand on.
    """
    seen = layout.seen(heads.shape[1])
    heads, totals = _both(heads, totals, seen**-0.5, prepared)
    return scale_rows(heads, reciprocal(totals, seen, prepared=prepared))


def normalise_means(heads: Array, totals: Array, *, layout: Layout, prepared: bool = False) -> Array:
    """The same where a row's mean weight, not its largest, is known to be about `MIDDLE_WEIGHT`.

    Error 2^-18 (1 / x + x) and what the reciprocal has, x the mean weight by the middle one, of values of about 1.
    """
    share = 1.0 / (MIDDLE_WEIGHT * layout.seen(heads.shape[1]))
    heads, totals = _both(heads, totals, share, prepared)
    return scale_rows(heads, reciprocal_of_wide(totals, MEAN_WEIGHT_BITS, prepared=prepared))


def _both(heads: Array, totals: Array, share: np.ndarray, apart: bool) -> tuple[Array, Array]:
    """Heads `(H, r, k)` and sums `(H, r)`, every row times its public share: one truncation, and one wait for it.

    Where sums are not to wait for heads: two, `apart`.
    """
    share = share.astype(heads.dtype)
    if apart:
        return heads * share[:, None], totals * share
    joint = jnp.concatenate([heads, totals[..., None]], axis=-1) * share[:, None]
    return joint[..., :-1], joint[..., -1]


def divide(heads: Array, totals: Array) -> Array:
    """What `normalise` and `normalise_means` approximate."""
    return heads / totals[..., None]


def merge_heads(
    state: Array, heads: Array, matrix: Array, bias: Array, *, rows: int, layout: Layout | None = None
) -> Array:
    """Residual connection around the output projection, for the last `rows` tokens."""
    return state[-rows:] + times_matrix(side_by_side(heads, layout), matrix) + bias


def side_by_side(heads: Array, layout: Layout | None) -> Array:
    """Heads `(H, r, k)` as rows `(r, H k)`; of a `layout` that is given, in its order of states."""
    rows = heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)
    return rows if layout is None else rows[layout.last_rows_last()]


def merge_before_norm(heads: Array, matrix: Array, bias: Array, *, layout: Layout | None = None) -> tuple[Array, Array]:
    """The output projection where a norm follows: its rows without and with the norm's gain."""
    return plain_and_gained(side_by_side(heads, layout), matrix, bias)
