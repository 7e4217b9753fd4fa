"""Nonlinear functions as the secure engine evaluates them cheaply: pure JAX, public shapes and indices.

Prices are bytes per element under CHEETAH, both directions, ring of 64 bits. Gathers by public index are free.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def segment_max(packed: Array, lengths: np.ndarray) -> Array:
    """Largest element of every segment of `packed` `(..., sum(lengths))`, `(..., len(lengths))`.

    A tournament of all segments at once: about one comparison (98 bytes) an element, ceil(log2(longest)) rounds
    of them. Segments of different length cost what they hold, where a padded rectangle would cost twice for a
    causal triangle.
    """
    lengths = np.asarray(lengths)
    while lengths.max() > 1:
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        pairs, singles = lengths // 2, lengths % 2
        left = np.concatenate([s + 2 * np.arange(n) for s, n in zip(starts, pairs)])
        winners = jnp.maximum(packed[..., left], packed[..., left + 1])
        last = (starts + lengths - 1)[singles == 1]
        pool = jnp.concatenate([winners, packed[..., last]], axis=-1)
        # Put each segment's odd one out behind its winners again.
        first_winner = np.concatenate([[0], np.cumsum(pairs)[:-1]])
        left_over = len(left) + np.cumsum(singles) - 1
        order = np.concatenate(
            [
                np.concatenate([f + np.arange(n), [o] if single else []])
                for f, n, single, o in zip(first_winner, pairs, singles, left_over)
            ]
        ).astype(np.int64)
        packed, lengths = pool[..., order], pairs + singles
    return packed


def exp_of_nonpositive(x: Array, iterations: int) -> Array:
    """exp(x) for x <= 0 as the engine's (1 + x / 2^t)^(2^t), t = `iterations`; relative error about x^2 / 2^(t+1).

    The clip (98 bytes) keeps 1 + x / 2^t positive: the engine's squarings (107 bytes each, t of them) rely on
    the sign being known, and below -2^t they would return garbage of size 1e9 silently. What is clipped comes
    out as 0.1^(2^t), nothing at any precision used here.
    """
    return jnp.exp(jnp.maximum(x, -0.9 * 2.0**iterations))


def exp_kernel(x: Array, iterations: int) -> Array:
    """What the engine computes for `exp_of_nonpositive`, in plain arithmetic."""
    return (1.0 + jnp.maximum(x, -0.9 * 2.0**iterations) / 2.0**iterations) ** (2**iterations)


def reciprocal(x: Array) -> Array:
    """1 / x for x in [1, 2^16], about 2,400 bytes; written so that the engine does not broadcast a denominator."""
    return jax.lax.reciprocal(x)


def inverse_root(x: Array) -> Array:
    """1 / sqrt(x) for positive x, about 2,900 bytes."""
    return jax.lax.rsqrt(x)
