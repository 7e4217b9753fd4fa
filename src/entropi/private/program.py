"""The private program: a folded softmax-only model as a list of pure JAX stages over named values.

A stage is a function of arrays with public shapes. The same list runs in plaintext (`run_plain`), and under
secure computation, where every named value stays secret-shared between the stages and only the logits are
revealed. Stages are what bytes and seconds are attributed to.

Notation: m new tokens after p cached ones, s = p + m; r rows of queries, m in all layers but the last, where
only the last token's row is needed; H heads of width k; d = H k; V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array

from entropi.private.functions import exp_kernel, exp_of_nonpositive, inverse_root, reciprocal, segment_max

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class Description(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What both parties know of a model: its architecture and sizes, no weight. Read from `folded.json`."""

    format: Annotated[int, msgspec.Meta(ge=1, le=1)]
    architecture: Annotated[str, msgspec.Meta(max_length=64)]
    layers: Annotated[int, msgspec.Meta(ge=1, le=256)]
    heads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    hidden_size: Size
    vocab_size: Size
    positions: Size
    temperature: bool  # q is scaled by a private factor per head and position
    final_norm: bool
    norm_epsilon: Annotated[float, msgspec.Meta(gt=0, le=0.1)]
    explicit_ffn: Annotated[list[int], msgspec.Meta(max_length=256)]  # layers whose FFN was not folded away
    end_of_text: Annotated[int, msgspec.Meta(ge=0)] | None = None  # the token id that ends an answer

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.heads} heads")
        if any(not 0 <= layer < self.layers for layer in self.explicit_ffn):
            raise ValueError(f"explicit_ffn names layers outside 0..{self.layers - 1}")

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the server's weights; the client needs them to hold its empty shares."""
        d, v = self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"embedding": (v, d), "positions": (self.positions, d)}
        for layer in range(self.layers):
            shapes[f"{layer}.qkv"], shapes[f"{layer}.qkv_bias"] = (d, 3 * d), (3 * d,)
            shapes[f"{layer}.output"], shapes[f"{layer}.output_bias"] = (d, d), (d,)
            if self.temperature:
                shapes[f"{layer}.inverse_temperature"] = (self.heads, self.positions)
            if layer in self.explicit_ffn:
                shapes[f"{layer}.ffn"], shapes[f"{layer}.ffn_bias"] = (d, d), (d,)
        if self.final_norm:
            shapes["centre"] = (d, d)
        shapes["head"], shapes["head_bias"] = (d, v), (v,)
        return shapes


@dataclass(frozen=True)
class Stage:
    """One operation: reads values `inputs`, writes values `outputs`; `layer` is -1 outside the layers."""

    name: str
    layer: int
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def one_hot(token_ids: list[int], vocab_size: int) -> np.ndarray:
    """The client's input, `(m, V)` float32: a table look-up that does not show the row."""
    return np.eye(vocab_size, dtype=np.float32)[np.asarray(token_ids)]


def forward(model: Description, new: int, past: int, exp_iterations: int) -> Iterator[Stage]:
    """Stages of one pass over `new` tokens after `past` cached ones: value "tokens" `(m, V)` to "logits" `(1, V)`.

    Keys and values of all tokens seen stay behind as values "l.k" and "l.v" `(H, s, k)` for the next pass.
    """
    heads, width = model.heads, model.hidden_size
    yield Stage("embedding", -1, partial(embed, past=past), ("tokens", "embedding", "positions"), ("state",))
    for layer in range(model.layers):
        rows = 1 if layer == model.layers - 1 else new
        w = f"{layer}."
        cached = (w + "k", w + "v") if past else ()
        yield Stage(
            "qkv",
            layer,
            partial(project, heads=heads, rows=rows),
            ("state", w + "qkv", w + "qkv_bias", *cached),
            ("q", w + "k", w + "v"),
        )
        if model.temperature:
            scale = partial(temper, rows=slice(past + new - rows, past + new))
            yield Stage("temperature", layer, scale, ("q", w + "inverse_temperature"), ("q",))
        yield Stage("scores", layer, scores, ("q", w + "k"), ("scores",))
        yield Stage("max", layer, shift_by_row_max, ("scores",), ("shifted",))
        yield Stage("exp", layer, partial(exp_of_nonpositive, iterations=exp_iterations), ("shifted",), ("weights",))
        values = partial(weighted_values, rows=rows)
        yield Stage("values", layer, values, ("weights", w + "v"), ("heads", "totals"))
        yield Stage("normalise", layer, normalise, ("heads", "totals"), ("heads",))
        merge = partial(merge_heads, rows=rows)
        yield Stage("output", layer, merge, ("state", "heads", w + "output", w + "output_bias"), ("state",))
        if layer in model.explicit_ffn:
            yield Stage("ffn", layer, affine, ("state", w + "ffn", w + "ffn_bias"), ("state",))
    if model.final_norm:
        yield Stage("centre", -1, jnp.matmul, ("state", "centre"), ("state",))
        norm = partial(normalise_state, epsilon=model.norm_epsilon, width=width)
        yield Stage("norm", -1, norm, ("state",), ("state",))
    yield Stage("head", -1, affine, ("state", "head", "head_bias"), ("logits",))


def embed(tokens: Array, table: Array, positions: Array, *, past: int) -> Array:
    """`(m, V)` one-hot rows -> `(m, d)`."""
    return tokens @ table + positions[past : past + tokens.shape[0]]


def project(state: Array, matrix: Array, bias: Array, *cached: Array, heads: int, rows: int) -> tuple[Array, ...]:
    """`(m, d)` -> q `(H, r, k)`, k and v `(H, s, k)`; one wide product where every row's query is needed."""
    width = state.shape[1]

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0], heads, -1).transpose(1, 0, 2)

    if rows == state.shape[0]:
        joint = state @ matrix + bias
        query, key, value = joint[:, :width], joint[:, width : 2 * width], joint[:, 2 * width :]
    else:
        query = state[-rows:] @ matrix[:, :width] + bias[:width]
        joint = state @ matrix[:, width:] + bias[width:]
        key, value = joint[:, :width], joint[:, width:]
    keys, values = split(key), split(value)
    if cached:
        keys, values = jnp.concatenate([cached[0], keys], axis=1), jnp.concatenate([cached[1], values], axis=1)
    return split(query), keys, values


def temper(query: Array, inverse_temperature: Array, *, rows: slice) -> Array:
    """Rows of q `(H, r, k)` divided by the temperature of their head and position (Eq. 9)."""
    return query * inverse_temperature[:, rows, None]


def scores(query: Array, key: Array) -> Array:
    """`(H, r, s)` logits of all pairs: packing wants one large product, the future is dropped afterwards."""
    return query @ key.transpose(0, 2, 1)


def visible(rows: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and key index of every pair a causal model sees, row by row; the last row sees every key."""
    row, column = np.nonzero(np.tril(np.ones((rows, keys), dtype=bool), keys - rows))
    return row, column


def shift_by_row_max(logits: Array) -> Array:
    """`(H, r, s)` -> `(H, n)`: the n visible logits, each less its row's largest."""
    _, rows, keys = logits.shape
    row, column = visible(rows, keys)
    packed = logits.reshape(logits.shape[0], -1)[:, row * keys + column]
    largest = segment_max(packed, np.bincount(row))
    return packed - largest[:, row]


def weighted_values(weights: Array, value: Array, *, rows: int) -> tuple[Array, Array]:
    """Packed weights `(H, n)` and v `(H, s, k)` -> unnormalised heads `(H, r, k)` and row sums `(H, r)`."""
    heads, keys, _ = value.shape
    row, column = visible(rows, keys)
    where = np.full((rows, keys), len(row))  # one entry past the end holds the zero of the future
    where[row, column] = np.arange(len(row))
    padded = jnp.concatenate([weights, jnp.zeros((heads, 1), weights.dtype)], axis=1)
    square = padded[:, where.reshape(-1)].reshape(heads, rows, keys)
    return square @ value, square.sum(axis=-1)


def normalise(heads: Array, totals: Array) -> Array:
    """Divide after the value product: r d multiplications instead of H r s."""
    return heads * reciprocal(totals)[:, :, None]


def merge_heads(state: Array, heads: Array, matrix: Array, bias: Array, *, rows: int) -> Array:
    """Residual connection around the output projection, for the last `rows` tokens."""
    return state[-rows:] + heads.transpose(1, 0, 2).reshape(rows, -1) @ matrix + bias


def affine(state: Array, matrix: Array, bias: Array) -> Array:
    """x W + b."""
    return state @ matrix + bias


def normalise_state(centred: Array, *, epsilon: float, width: int) -> Array:
    """LayerNorm of a row that is centred already; gain and bias live in the head."""
    variance = (centred * centred).sum(axis=-1, keepdims=True) * (1.0 / width)
    return centred * inverse_root(variance + epsilon)


def run_plain(
    model: Description,
    weights: Mapping[str, np.ndarray],
    token_ids: list[int],
    new_tokens: int,
    exp_iterations: int,
    *,
    exact_exp: bool = False,
    watch: Callable[[Stage, Array], None] | None = None,
) -> tuple[list[int], list[np.ndarray]]:
    """Greedy generation in plaintext: tokens and the logits `(V,)` they were chosen from.

    With `exact_exp` the softmax is the exact one, otherwise the engine's (1 + x/2^t)^(2^t). `watch` sees every
    value a stage writes.
    """
    values: dict[str, Any] = {name: jnp.asarray(w) for name, w in weights.items()}
    fresh, past = list(token_ids), 0
    generated: list[int] = []
    all_logits: list[np.ndarray] = []
    for _ in range(new_tokens):
        values["tokens"] = jnp.asarray(one_hot(fresh, model.vocab_size), values["embedding"].dtype)
        for stage in forward(model, len(fresh), past, exp_iterations):
            function = stage.function
            if stage.name == "exp":
                function = jnp.exp if exact_exp else partial(exp_kernel, iterations=exp_iterations)
            results = function(*(values[name] for name in stage.inputs))
            for name, value in zip(stage.outputs, results if len(stage.outputs) > 1 else (results,)):
                values[name] = value
                if watch is not None:
                    watch(stage, value)
        past += len(fresh)
        logits = np.asarray(values["logits"])[0]
        fresh = [int(logits.argmax())]
        generated += fresh
        all_logits.append(logits)
    return generated, all_logits
