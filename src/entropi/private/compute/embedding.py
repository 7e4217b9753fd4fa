"""Token embeddings in private: one-hot rows times the server's table, two tokens in one row where they fit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from entropi.private.compute.functions import (
    times_table,
)
from entropi.private.compute.layout import Layout


def pair_shift(fraction_bits: int) -> int:
    """By how many binary digits the second token of a pair is moved, so that twice the shift leaves a 64-bit ring."""
    return (65 - fraction_bits) // 2


def pair_limit(fraction_bits: int) -> float:
    """Magnitude below which all entries of a table must stay for `pair_products`."""
    return 2.0 ** (61 - pair_shift(fraction_bits) - 2 * fraction_bits)


def one_hot(token_ids: list[int], vocab_size: int, paired: bool = False, fraction_bits: int = 18) -> np.ndarray:
    """The client's input, a table look-up that does not show the row: float32 `(m, V)`, in pairs `(ceil(m / 2), V)`."""
    ids = np.asarray(token_ids)
    share = 2 if paired else 1
    rows = np.zeros((-(-len(ids) // share), vocab_size), np.float32)
    for place, row in enumerate(ids):
        # Exact: 24 digits even where both of a pair are the same token.
        rows[place // share, row] += 2.0 ** pair_shift(fraction_bits) if place % share else 1.0
    return rows


def embed(tokens: Array, table: Array, *positions: Array, layout: Layout) -> Array:
    """`(m, V)` one-hot rows -> `(m, d)`, with the rows of their positions where these are learned."""
    return add_positions(times_table(tokens, table), *positions, layout=layout)


def pair_products(tokens: Array, table: Array, *, shift: int) -> tuple[Array, Array]:
    """Pairs of rows of the table, a + 2^s b with s = `shift`, and that times 2^s: half the ciphertexts of single rows.

    This relies on the ring of 64 bits. With f fraction bits 2^s is held as 2^(s + f), so that in the second result b's
    part is a multiple of 2^(2 s + f), at least 2^64, and vanishes: what remains is 2^s a. In plaintext it would not.
    Products must stay below 2^61 last digits, of which there are 2 f in a unit: that limits the table's entries.
    """
    pairs = times_table(tokens, table)
    return pairs, pairs * 2.0**shift


def lower(pairs: Array, raised: Array, *, shift: int) -> tuple[Array, Array]:
    """Both divided by 2^`shift`; a stage of its own, or the compiler would multiply the constants with each other."""
    return pairs * 2.0**-shift, raised * 2.0**-shift


def separate(pairs: Array, raised: Array, *positions: Array, shift: int, layout: Layout) -> Array:
    """Rows `(m, d)` of the tokens: the second of each pair in what is left of `pairs`, the first of `raised`.

    `lower` has divided by half of the pairs' shift; this divides by the rest.
    """
    both = jnp.stack([raised, pairs], axis=1) * 2.0**-shift
    return add_positions(both.reshape(-1, pairs.shape[1])[: layout.tokens], *positions, layout=layout)


def add_positions(embedded: Array, *positions: Array, layout: Layout) -> Array:
    """Rows of the embedding with those of their positions, if these are learned."""
    if not positions:
        return embedded
    if layout.prompts > 1:
        return embedded + positions[0][layout.positions()]
    return embedded + positions[0][layout.before : layout.keys]
