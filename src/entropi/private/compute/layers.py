"""What a layer does besides attention, and what happens to the logits: norms, matrices, gated networks, choices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from entropi.private.compute.description import Norm
from entropi.private.compute.functions import (
    argmax,
    gelu,
    gelu_tanh,
    relu,
    scale_rows,
    silu,
    silu_exact,
    square,
    sums_of_squares,
    times,
    times_matrix,
    top_k,
)


def normalise_state(state: Array, *, kind: Norm, epsilon: float, root: Callable[[Array], Array]) -> Array:
    """Rows by their root mean square, centred before where `kind` is "layer"; gain and bias are in what follows.

    `root` is the inverse root.
    """
    if kind == "layer":
        state = state - state.sum(axis=-1, keepdims=True) * (1.0 / state.shape[1])
    mean = sums_of_squares(state) * (1.0 / state.shape[1])
    return scale_rows(state, root(mean + epsilon))


def move(state: Array, *, shift: int) -> Array:
    """Rows times 2^`shift`, up by additions, which are free, and down for 3 bytes a number.

    It is a stage of its own, or the compiler would multiply what divides the rows by this.
    """
    for _ in range(shift):
        state = state + state
    return state * 2.0**shift if shift < 0 else state


def affine(state: Array, matrix: Array, bias: Array, *, rows: int | None = None) -> Array:
    """x W + b, for the last `rows` rows of x or all."""
    return times_matrix(state if rows is None else state[-rows:], matrix) + bias


def add_affine(base: Array, state: Array, matrix: Array, bias: Array, *, rows: int) -> Array:
    """base + x W + b, for the last `rows` rows."""
    return base[-rows:] + times_matrix(state[-rows:], matrix) + bias


def plain_and_gained(state: Array, matrix: Array, bias: Array, *, rows: int | None = None) -> tuple[Array, Array]:
    """What a branch computes before its norm, without and with the norm's gain, for the last `rows` rows or all."""
    joint = affine(state, matrix, bias, rows=rows)
    width = joint.shape[1] // 2
    return joint[:, :width], joint[:, width:]


def add_normalised(
    plain: Array, gained: Array, base: Array, *, epsilon: float, root: Callable[[Array], Array]
) -> Array:
    """base + gained / rms(plain), for the last rows of `base`: a branch with a norm after it."""
    rows, width = plain.shape
    mean = sums_of_squares(plain) * (1.0 / width)
    return base[-rows:] + scale_rows(gained, root(mean + epsilon))


def bilinear(hidden: Array) -> Array:
    """Left half times right half, elementwise."""
    width = hidden.shape[1] // 2
    return times(hidden[:, :width], hidden[:, width:])


def swiglu(hidden: Array, *, prepared: bool = False) -> Array:
    """SiLU of the left half times the right half, elementwise (Llama)."""
    width = hidden.shape[1] // 2
    return times(silu(hidden[:, :width], prepared=prepared), hidden[:, width:])


def swiglu_exact(hidden: Array) -> Array:
    """What `swiglu` approximates."""
    width = hidden.shape[1] // 2
    return silu_exact(hidden[:, :width]) * hidden[:, width:]


def geglu(hidden: Array, *, prepared: bool = False) -> Array:
    """GELU of the left half times the right half, elementwise (Gemma)."""
    width = hidden.shape[1] // 2
    return times(gelu(hidden[:, :width], prepared=prepared), hidden[:, width:])


def geglu_exact(hidden: Array) -> Array:
    """What `geglu` approximates."""
    width = hidden.shape[1] // 2
    return gelu_tanh(hidden[:, :width]) * hidden[:, width:]


# What computes each activation of `activations.folded_names`, and what that approximates, None where it is exact.
ACTIVATIONS: dict[str, tuple[Callable[..., Array], Callable[[Array], Array] | None]] = {
    "relu": (relu, None),
    "gelu": (gelu, gelu_tanh),
    "square": (square, None),
    "bilinear": (bilinear, None),
    "swiglu": (swiglu, swiglu_exact),
    "geglu": (geglu, geglu_exact),
}
PREPARED_FORMS = ("gelu", "swiglu", "geglu")  # those that are computed otherwise where comparisons are prepared


def rounded(logits: Array, *, bits: int) -> Array:
    """2^bits times the logits, to the nearest whole number.

    The engine's floor is exact. A product cut to fewer digits would round too, but its last digit is up or down at
    random, and whoever asks again and again could average that away.
    """
    return jnp.floor(logits * 2.0**bits + 0.5)


def likeliest(logits: Array) -> Array:
    """Index of the largest of each row of `(n, V)`, `(n,)`."""
    if len(logits) == 1:
        return argmax(logits[0]).reshape(1)
    return jax.vmap(argmax)(logits)


def likeliest_few(logits: Array, *, count: int) -> tuple[Array, Array]:
    """The `count` largest of each row of `(n, V)`, descending, and their indices, `(n, count)`; of one `(count,)`."""
    if len(logits) == 1:
        return top_k(logits[0], count)
    return jax.vmap(partial(top_k, k=count))(logits)
