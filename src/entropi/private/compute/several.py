"""Products of attention where several prompts share a pass: few large ones in place of one a prompt and head.

Every prompt and every head of keys and values is a block of its own, and a product waits for the line four times
whatever its size. So blocks are multiplied several at a time, as many as by public sizes take least time. Notation as
in `attention`; B prompts, R and S the most rows of queries and keys that one of them has.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

from entropi.private.compute.attention import BLOCK_ROWS, as_rectangle, block_rows, mix, scores, visible
from entropi.private.compute.functions import POLYNOMIALS
from entropi.private.compute.layout import Layout
from entropi.private.compute.tiling import tiling

# Seconds that a product of two shared matrices takes by the calibration that comes with the package, on a line of 100
# Mbit/s and 80 ms, on which batches save most: by itself, and by what it is cut into, each at both parties.
_CALL, _OPERAND, _ANSWER, _ROTATION, _POLYNOMIAL = 0.19, 0.023, 0.058, 1.28e-3, 6.9e-4


def scores_of_prompts(query: Array, key: Array, *, layout: Layout) -> Array:
    """`(H, n)` logits of the visible pairs, one prompt's after the other's, of q `(H, r, k)` and keys `(G, s, k)`."""
    rows, groups, width = query.shape[1], key.shape[0], query.shape[2]
    asking, lengths = layout.asking(rows), layout.lengths()
    shared = query.shape[0] // groups
    most, longest = max(asking), max(lengths)
    apart = sum(_apart(groups, shared, width, asking, length) for asking, length in zip(asking, lengths))
    if apart < _at_best(layout.prompts * groups, shared * most, width, longest):
        own = [key[:, layout.keys_of(prompt)] for prompt in range(layout.prompts)]
        parts = zip(np.split(np.arange(rows), np.cumsum(asking)[:-1]), own)
        return jnp.concatenate([scores(query[:, places], keys) for places, keys in parts], axis=1)

    blocks = _padded(query, _places_of_rows(layout, rows)).reshape(groups, shared, -1, most, width)
    left = blocks.transpose(2, 0, 1, 3, 4).reshape(-1, shared * most, width)
    right = _padded(key, _places_of_keys(layout)).transpose(1, 0, 3, 2).reshape(-1, width, longest)
    found = product_of_blocks(left, right).reshape(-1, groups, shared, most, longest)
    found = found.transpose(1, 2, 0, 3, 4).reshape(query.shape[0], -1)
    return found[:, _places_of_pairs(layout, rows)]


def mix_of_prompts(weights: Array, value: Array, *, rows: int, layout: Layout) -> Array:
    """Packed weights `(H, n)` times v `(G, s, k)`: `(H, r, k)`, before any division."""
    (heads, pairs), (groups, _, width) = weights.shape, value.shape
    asking, lengths = layout.asking(rows), layout.lengths()
    shared, most, longest = heads // groups, max(asking), max(lengths)
    apart = sum(_mixed_apart(groups, shared * asking, length, width) for asking, length in zip(asking, lengths))
    if apart < _at_best(layout.prompts * groups, shared * most, longest, width):
        parts = zip(_parts_by_prompt(weights, layout, rows), asking, range(layout.prompts))
        mixed = [mix(part, value[:, layout.keys_of(prompt)], rows=asking) for part, asking, prompt in parts]
        return jnp.concatenate(mixed, axis=1)

    where = np.full(layout.prompts * most * longest, pairs)
    where[_places_of_pairs(layout, rows)] = np.arange(pairs)
    blocks = _padded(weights, where).reshape(groups, shared, -1, most, longest)
    left = blocks.transpose(2, 0, 1, 3, 4).reshape(-1, shared * most, longest)
    right = _padded(value, _places_of_keys(layout)).transpose(1, 0, 2, 3).reshape(-1, longest, width)
    found = product_of_blocks(left, right).reshape(-1, groups, shared, most, width)
    found = found.transpose(1, 2, 0, 3, 4).reshape(heads, -1, width)
    return found[:, np.flatnonzero(_places_of_rows(layout, rows).reshape(-1) < rows)]


def weighted_values_of_prompts(weights: Array, value: Array, *, rows: int, layout: Layout) -> tuple[Array, Array]:
    """The same, and row sums `(H, r)`."""
    parts = zip(_parts_by_prompt(weights, layout, rows), layout.asking(rows), layout.lengths())
    totals = [as_rectangle(part, asking, length).sum(axis=-1) for part, asking, length in parts]
    return mix_of_prompts(weights, value, rows=rows, layout=layout), jnp.concatenate(totals, axis=1)


def product_of_blocks(left: Array, right: Array) -> Array:
    """`(N, a, b)` times `(N, b, c)`, block by block: `(N, a, c)`; as many in one product as `_at_once` says.

    Of i times j blocks, i have a row of zeros in the columns of the others, and j stand side by side, of whose products
    with each other's rows nothing is kept.
    """
    blocks, rows, inner = left.shape
    columns = right.shape[2]
    apart, beside = _at_once(blocks, rows, inner, columns)
    if apart == beside == 1:
        return left @ right
    parts = []
    for first in range(0, blocks, apart * beside):
        own = left[first : first + apart * beside]
        joined = len(own) // beside
        tall = jnp.concatenate([block_rows(own[start : start + joined]) for start in range(0, len(own), joined)])
        wide = right[first : first + len(own)].reshape(beside, joined * inner, columns)
        found = (tall @ wide.transpose(1, 0, 2).reshape(joined * inner, -1)).reshape(beside, -1, beside, columns)
        parts.append(found[np.arange(beside), :, np.arange(beside)].reshape(len(own), rows, columns))
    return jnp.concatenate(parts)


# --- Which products take least time -----------------------------------------------------------------------------------


@functools.cache
def _seconds(rows: int, inner: int, columns: int) -> float:
    """Of one product, see above; infinite where it would not fit the server's memory."""
    cut = tiling(rows, inner, columns)
    if cut.products > POLYNOMIALS:
        return float("inf")
    ciphertexts = min(cut.left, cut.right) * _OPERAND + cut.answers * _ANSWER
    return _CALL + ciphertexts + cut.rotations * _ROTATION + cut.products * _POLYNOMIAL


def _seconds_of_blocks(chosen: tuple[int, int], blocks: int, rows: int, inner: int, columns: int) -> float:
    """Of `blocks` products, so many at a time: see `product_of_blocks`."""
    apart, beside = chosen
    size = apart * beside
    found = blocks // size * _seconds(size * rows, apart * inner, beside * columns)
    return found + (_seconds(blocks % size * rows, blocks % size * inner, columns) if blocks % size else 0.0)


@functools.cache
def _at_once(blocks: int, rows: int, inner: int, columns: int) -> tuple[int, int]:
    """How many blocks of these sizes to multiply at a time: with zeros in the others' columns, and side by side."""
    sizes = {blocks, *(step << halvings for step in (1, 3) for halvings in range(blocks.bit_length()))}
    chosen = [(size, 1) for size in sorted(sizes) if size <= blocks]
    chosen += [(size, beside) for size, _ in chosen for beside in (2, 4, 8) if blocks % (size * beside) == 0]
    return min(chosen, key=lambda one: _seconds_of_blocks(one, blocks, rows, inner, columns))


def _at_best(blocks: int, rows: int, inner: int, columns: int) -> float:
    return _seconds_of_blocks(_at_once(blocks, rows, inner, columns), blocks, rows, inner, columns)


def _apart(groups: int, shared: int, width: int, asking: int, length: int) -> float:
    """Seconds of one prompt's scores by themselves, about."""
    found = 0.0
    for start in range(0, asking, BLOCK_ROWS):
        size = min(BLOCK_ROWS, asking - start)
        seen = length - asking + start + size
        joint = _seconds(groups * shared * size, groups * width, seen)
        found += min(joint, groups * _seconds(shared * size, width, seen))
    return found


def _mixed_apart(groups: int, rows: int, length: int, width: int) -> float:
    """Seconds of one prompt's values by themselves, about."""
    return min(_seconds(rows, groups * length, groups * width), groups * _seconds(rows, length, width))


# --- Places in padded arrays; behind the last one are zeros -----------------------------------------------------------


def _padded(x: Array, places: np.ndarray) -> Array:
    """Columns of `x` `(h, c, ...)` at these places; the one behind the last is of zeros."""
    zeros = jnp.zeros((x.shape[0], 1, *x.shape[2:]), x.dtype)
    return jnp.concatenate([x, zeros], axis=1)[:, places]


def _places_of_rows(layout: Layout, rows: int) -> np.ndarray:
    """`(B, R)`: where the rows of each prompt stand among all."""
    return _filled(np.split(np.arange(rows), np.cumsum(layout.asking(rows))[:-1]), rows)


def _places_of_keys(layout: Layout) -> np.ndarray:
    """`(B, S)`: where the keys of each prompt stand among all."""
    return _filled([layout.keys_of(prompt) for prompt in range(layout.prompts)], layout.keys)


def _filled(parts: list[np.ndarray], otherwise: int) -> np.ndarray:
    found = np.full((len(parts), max(map(len, parts))), otherwise)
    for row, part in zip(found, parts):
        row[: len(part)] = part
    return found


def _places_of_pairs(layout: Layout, rows: int) -> np.ndarray:
    """`(n,)`: where the visible pairs, one prompt's after the other's, stand in `(B, R, S)`."""
    asking, lengths = layout.asking(rows), layout.lengths()
    most, longest = max(asking), max(lengths)
    found = []
    for prompt, (own, length) in enumerate(zip(asking, lengths)):
        row, column = visible(own, length)
        found.append((prompt * most + row) * longest + column)
    return np.concatenate(found)


def _parts_by_prompt(packed: Array, layout: Layout, rows: int) -> list[Array]:
    """Packed pairs `(H, n)` of each prompt."""
    sizes = [len(visible(asking, length)[0]) for asking, length in zip(layout.asking(rows), layout.lengths())]
    return jnp.split(packed, np.cumsum(sizes)[:-1].tolist(), axis=1)
