"""The private program: a folded model as a list of pure JAX stages over named values.

A stage is a function of arrays with public shapes. The same list runs in plaintext (`run_plain`), and under
secure computation, where every named value stays secret-shared between the stages and only the result is
revealed. Stages are what bytes and seconds are attributed to.

Notation: m new tokens after p cached ones, s = p + m; r rows of queries, m in all layers but the last, where
only the last token's row is needed; H heads of width k, G of them with keys and values of their own; d = H k;
n pairs of a query and a key it sees; V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array

from entropi.private.compute.functions import (
    argmax,
    exp_of_nonpositive,
    gelu,
    gelu_tanh,
    inverse_root,
    power,
    product_bytes,
    reciprocal,
    reciprocal_of_wide,
    relu,
    scale_rows,
    segment_max,
    silu,
    silu_exact,
    square,
    sums_of_squares,
    times_matrix,
    times_table,
    top_k,
)

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Norm: TypeAlias = Literal["none", "rms", "layer"]
Embedding: TypeAlias = Literal["private", "public"]
Output: TypeAlias = Literal["logits", "top_k", "argmax"]

LEAST_PAIR_FRACTION_BITS = 18  # with fewer, the shift of a pair is more than the 24 digits of a float32 can tell apart
# By the polynomial kernel a row's mean weight is about 16 (see folding). The division is right from 2^-8 to 2^8 of
# MIDDLE_WEIGHT; below it falls short, above it would be nonsense, and so has a bit more room.
MIDDLE_WEIGHT, MEAN_WEIGHT_BITS = 32.0, 8
_BLOCK_ROWS = 128  # of queries: with heads of 64 their keys' part fills a ciphertext


class Description(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What both parties know of a model: its architecture and sizes, no weight. Read from `folded.json`.

    What the fields mean for the computation is `forward`'s docstring.
    """

    format: Annotated[int, msgspec.Meta(ge=2, le=2)]
    architecture: Annotated[str, msgspec.Meta(max_length=64, pattern=r"^[ -~]*\Z")]  # callers print it
    layers: Annotated[int, msgspec.Meta(ge=1, le=256)]
    heads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    key_value_heads: Annotated[int, msgspec.Meta(ge=1, le=1024)]  # fewer than heads: groups of queries share theirs
    hidden_size: Size
    vocab_size: Size
    positions: Size
    intermediate_size: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]  # between up and down; 0 without an activation
    position_embedding: Literal["learned", "rotary"]
    rotary_dimensions: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]  # first columns of a head that rotate; even
    rotary_base: Annotated[float, msgspec.Meta(ge=1, le=1e9)]
    temperature: bool  # q is scaled by a private factor per head and position
    exp_iterations: Annotated[int, msgspec.Meta(ge=1, le=8)] | None  # of the kernel it was trained with; None: exp
    norm: Norm  # before attention and before the FFN; gains and biases are folded away
    norm_epsilon: Annotated[float, msgspec.Meta(gt=0, le=0.1)]
    parallel_residual: bool  # the FFN reads what attention reads
    activation: Literal["identity", "relu", "gelu", "square", "bilinear", "swiglu"]
    explicit_ffn: Annotated[list[int], msgspec.Meta(max_length=256)]  # layers with a linear map in the FFN's place
    final_norm: Norm
    centre: bool  # a matrix multiplies the state before the final norm or the head
    end_of_text: Annotated[int, msgspec.Meta(ge=0)] | None = None  # the token id that ends an answer
    polynomial: bool = False  # the kernel is a power of the logits and private offsets, with no maximum
    log_length: bool = False  # q is scaled by log(n) / log(positions), n the keys that its row sees

    def __post_init__(self) -> None:
        problems = []
        if self.hidden_size % self.heads:
            problems.append(f"hidden_size {self.hidden_size} is not a multiple of {self.heads} heads")
        if self.heads % self.key_value_heads:
            problems.append(f"{self.heads} heads are not a multiple of {self.key_value_heads} key_value_heads")
        if any(not 0 <= layer < self.layers for layer in self.explicit_ffn):
            problems.append(f"explicit_ffn names layers outside 0..{self.layers - 1}")
        if (self.activation == "identity") != (self.intermediate_size == 0):
            problems.append(f"intermediate_size is {self.intermediate_size} with activation {self.activation}")
        if self.polynomial and (self.exp_iterations is None or self.temperature):
            problems.append("a polynomial kernel needs exp_iterations, and has offsets instead of a temperature")
        if self.log_length and self.positions < 2:
            problems.append("log_length needs at least 2 positions")
        rotary = self.position_embedding == "rotary"
        if self.rotary_dimensions % 2 or self.rotary_dimensions > self.hidden_size // self.heads:
            problems.append(f"rotary_dimensions {self.rotary_dimensions} are odd or more than a head has")
        if rotary != (self.rotary_dimensions > 0):
            problems.append(f"rotary_dimensions are {self.rotary_dimensions} with {self.position_embedding} positions")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def head_size(self) -> int:
        """k, the width of a head."""
        return self.hidden_size // self.heads

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the server's weights; the client needs them to hold its empty shares."""
        d, v, m = self.hidden_size, self.vocab_size, self.intermediate_size
        joint = d + 2 * self.key_value_heads * self.head_size
        up = 2 * m if self.activation in ("bilinear", "swiglu") else m
        shapes: dict[str, tuple[int, ...]] = {"embedding": (v, d)}
        if self.position_embedding == "learned":
            shapes["positions"] = (self.positions, d)
        for layer in range(self.layers):
            shapes[f"{layer}.qkv"], shapes[f"{layer}.qkv_bias"] = (d, joint), (joint,)
            shapes[f"{layer}.output"], shapes[f"{layer}.output_bias"] = (d, d), (d,)
            if self.temperature:
                shapes[f"{layer}.inverse_temperature"] = (self.heads, self.positions)
            if self.polynomial:
                shapes[f"{layer}.offset"] = (self.heads, self.positions)
            if self.activation != "identity":
                shapes[f"{layer}.up"], shapes[f"{layer}.up_bias"] = (d, up), (up,)
                shapes[f"{layer}.down"], shapes[f"{layer}.down_bias"] = (m, d), (d,)
            if layer in self.explicit_ffn:
                shapes[f"{layer}.ffn"], shapes[f"{layer}.ffn_bias"] = (d, d), (d,)
        if self.centre:
            shapes["centre"] = (d, d)
        shapes["head"], shapes["head_bias"] = (d, v), (v,)
        return shapes


@dataclass(frozen=True)
class Stage:
    """One operation: reads values `inputs`, writes values `outputs`; `layer` is -1 outside the layers.

    `exact` is the function that `function` approximates, None where it computes what it says.
    """

    name: str
    layer: int
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    exact: Callable[..., Any] | None = None


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


def forward(
    model: Description,
    new: int,
    past: int,
    exp_iterations: int,
    *,
    embedding: Embedding = "private",
    paired: bool = False,
    fraction_bits: int = 18,
    output: Output = "logits",
    choices: int = 1,
    logit_bits: int | None = None,
    every_row: bool = False,
) -> Iterator[Stage]:
    """Stages of one pass over `new` tokens after `past` cached ones, from the client's input to the result.

    The input is "tokens", `one_hot`, for a private table, in pairs if `paired` (see `pair_products`, which depends on
    the engine's fraction bits); or "embedded" `(m, d)`, rows of a public table, looked up by the client. The result is
    "logits" `(1, V)`; or "tokens_out" `(choices,)` and "logits_out" `(choices,)`, the likeliest tokens; or
    "tokens_out" `(1,)` alone. With `logit_bits` b these logits are whole numbers, 2^b times the logits, rounded.
    With `every_row` the logits are those after every token, `(m, V)`, for measuring perplexity. Keys and values of
    all tokens seen stay behind as values "l.k" and "l.v" `(G, s, k)` for the next pass. The softmax kernel has the
    model's own t, or `exp_iterations` for a model that was trained with the exact exponential. The polynomial
    kernel takes no maximum and weighs a pair (q k^T + offset)^(2^t), `offset` by head and row.

    One layer, n = norm(state), norm(x) = x / sqrt(mean x^2 + eps):

        state' = state + softmax(q k^T) v output + output_bias,    q, k, v = n qkv + qkv_bias
        state'' = state' + act(n' up + up_bias) down + down_bias + n' ffn + ffn_bias

    with n' = norm(state'), or n where residuals are parallel; without norms, "ffn" replaces the residual state instead
    of adding to it.
    """
    read = "normed" if model.norm != "none" else "state"
    normalise_rows = partial(normalise_state, kind=model.norm, epsilon=model.norm_epsilon)
    keys = past + new
    iterations = exp_iterations if model.exp_iterations is None else model.exp_iterations
    position = ("positions",) if model.position_embedding == "learned" else ()
    if embedding == "public":
        yield Stage("embedding", -1, partial(add_positions, past=past), ("embedded", *position), ("state",))
    elif paired and new > 1:
        shift = pair_shift(fraction_bits)
        products = partial(pair_products, shift=shift)
        yield Stage("embedding", -1, products, ("tokens", "embedding"), ("pairs", "raised"))
        yield Stage("embedding", -1, partial(lower, shift=shift // 2), ("pairs", "raised"), ("pairs", "raised"))
        unpaired = partial(separate, shift=shift - shift // 2, tokens=new, past=past)
        yield Stage("embedding", -1, unpaired, ("pairs", "raised", *position), ("state",))
    else:
        yield Stage("embedding", -1, partial(embed, past=past), ("tokens", "embedding", *position), ("state",))
    for layer in range(model.layers):
        rows = 1 if layer == model.layers - 1 and not every_row else new
        w = f"{layer}."
        if model.norm != "none":
            yield Stage("norm", layer, normalise_rows, ("state",), ("normed",))
        base = "state"
        if model.parallel_residual:
            yield from feed_forward(model, layer, rows, read, "base")
            base = "base" if layer in model.explicit_ffn or model.activation != "identity" else "state"
        cached = (w + "k", w + "v") if past else ()
        projection = partial(project, model=model, rows=rows, past=past)
        yield Stage("qkv", layer, projection, (read, w + "qkv", w + "qkv_bias", *cached), ("q", w + "k", w + "v"))
        if model.temperature:
            temperature = partial(temper, rows=slice(keys - rows, keys))
            yield Stage("temperature", layer, temperature, ("q", w + "inverse_temperature"), ("q",))
        if model.log_length:
            lengthen = partial(scale_by_length, first=keys - rows, positions=model.positions)
            yield Stage("length", layer, lengthen, ("q",), ("q",))
        yield Stage("scores", layer, scores, ("q", w + "k"), ("scores",))
        if model.polynomial:
            weigh = partial(powers, rows=rows, keys=keys, iterations=iterations)
            yield Stage("power", layer, weigh, ("scores", w + "offset"), ("weights",))
        else:
            yield Stage("max", layer, partial(shift_by_row_max, rows=rows, keys=keys), ("scores",), ("shifted",))
            exponential = partial(exp_of_nonpositive, iterations=iterations)
            exact = jnp.exp if model.exp_iterations is None else None
            yield Stage("exp", layer, exponential, ("shifted",), ("weights",), exact=exact)
        yield Stage("values", layer, partial(weighted_values, rows=rows), ("weights", w + "v"), ("heads", "totals"))
        division = partial(normalise_means if model.polynomial else normalise, keys=keys)
        yield Stage("normalise", layer, division, ("heads", "totals"), ("heads",), exact=divide)
        merge = partial(merge_heads, rows=rows)
        yield Stage("output", layer, merge, (base, "heads", w + "output", w + "output_bias"), ("state",))
        if not model.parallel_residual:
            if model.norm != "none" and (layer in model.explicit_ffn or model.activation != "identity"):
                yield Stage("norm", layer, normalise_rows, ("state",), ("normed",))
            yield from feed_forward(model, layer, rows, read, "state")
    if model.centre:
        yield Stage("centre", -1, times_matrix, ("state", "centre"), ("state",))
    if model.final_norm != "none":
        norm = partial(normalise_state, kind=model.final_norm, epsilon=model.norm_epsilon)
        yield Stage("norm", -1, norm, ("state",), ("state",))
    yield Stage("head", -1, affine, ("state", "head", "head_bias"), ("logits",))
    if output == "argmax":
        yield Stage("choose", -1, likeliest, ("logits",), ("tokens_out",))
    elif output == "top_k":
        yield Stage("choose", -1, partial(likeliest_few, count=choices), ("logits",), ("logits_out", "tokens_out"))
    if logit_bits is not None and output != "argmax":
        result = "logits" if output == "logits" else "logits_out"
        yield Stage("round", -1, partial(rounded, bits=logit_bits), (result,), (result,))


def feed_forward(model: Description, layer: int, rows: int, read: str, result: str) -> Iterator[Stage]:
    """Stages of a layer's FFN, the residual connection included, from `read` and "state" to the value `result`."""
    w, base = f"{layer}.", "state"
    if model.activation != "identity":
        up = partial(affine, rows=rows)
        yield Stage("ffn", layer, up, (read, w + "up", w + "up_bias"), ("hidden",))
        functions = {"relu": relu, "gelu": gelu, "square": square, "bilinear": bilinear, "swiglu": swiglu}
        exact = {"gelu": gelu_tanh, "swiglu": swiglu_exact}.get(model.activation)
        yield Stage("activation", layer, functions[model.activation], ("hidden",), ("hidden",), exact=exact)
    if layer in model.explicit_ffn:
        matrix = (w + "ffn", w + "ffn_bias")
        if model.norm == "none":
            yield Stage("ffn", layer, partial(affine, rows=rows), (base, *matrix), (result,))
        else:
            yield Stage("ffn", layer, partial(add_affine, rows=rows), (base, read, *matrix), (result,))
        base = result
    if model.activation != "identity":
        down = partial(add_affine, rows=rows)
        yield Stage("ffn", layer, down, (base, "hidden", w + "down", w + "down_bias"), (result,))


def warm_up() -> tuple[Stage, dict[str, tuple[tuple[int, int], Literal["server", "client"]]]]:
    """A small stage that makes the engine exchange keys and base oblivious transfers; its inputs' shapes and owners.

    Without it the first use of each kind of operation would pay for them.
    """

    def operations(x: Array, y: Array) -> Array:
        product = x @ y  # private times private, then shared times shared, then shared times private
        product = product @ product @ x[:, :4]
        larger = jnp.maximum(product[:, :2], product[:, 2:])
        return exp_of_nonpositive(larger - 1.0, 1) * reciprocal(larger + 1.0, np.array(4))

    stage = Stage("setup", -1, operations, ("warm_x", "warm_y"), ("warm_z",))
    return stage, {"warm_x": ((4, 8), "server"), "warm_y": ((8, 4), "client")}


def embed(tokens: Array, table: Array, *positions: Array, past: int = 0) -> Array:
    """`(m, V)` one-hot rows -> `(m, d)`, with the rows of their positions where these are learned."""
    return add_positions(times_table(tokens, table), *positions, past=past)


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


def separate(pairs: Array, raised: Array, *positions: Array, shift: int, tokens: int, past: int) -> Array:
    """Rows `(m, d)` of the tokens: the second of each pair in what is left of `pairs`, the first of `raised`.

    `lower` has divided by half of the pairs' shift; this divides by the rest.
    """
    both = jnp.stack([raised, pairs], axis=1) * 2.0**-shift
    return add_positions(both.reshape(-1, pairs.shape[1])[:tokens], *positions, past=past)


def add_positions(embedded: Array, *positions: Array, past: int) -> Array:
    """Rows of the embedding with those of their positions, if these are learned."""
    return embedded + positions[0][past : past + embedded.shape[0]] if positions else embedded


def normalise_state(state: Array, *, kind: Norm, epsilon: float) -> Array:
    """Rows by their root mean square, centred before where `kind` is "layer"; gain and bias are in what follows."""
    if kind == "layer":
        state = state - state.sum(axis=-1, keepdims=True) * (1.0 / state.shape[1])
    mean = sums_of_squares(state) * (1.0 / state.shape[1])
    return scale_rows(state, inverse_root(mean + epsilon))


def project(
    state: Array, matrix: Array, bias: Array, *cached: Array, model: Description, rows: int, past: int
) -> tuple[Array, ...]:
    """`(m, d)` -> q `(H, r, k)`, k and v `(G, s, k)`; one wide product where every row's query is needed."""
    width, shared = model.hidden_size, model.key_value_heads * model.head_size

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, model.head_size).transpose(1, 0, 2)

    new = state.shape[0]
    if rows == new:
        joint = times_matrix(state, matrix) + bias
        query, key, value = joint[:, :width], joint[:, width : width + shared], joint[:, width + shared :]
    else:
        query = state[-rows:] @ matrix[:, :width] + bias[:width]
        joint = times_matrix(state, matrix[:, width:]) + bias[width:]
        key, value = joint[:, :shared], joint[:, shared:]
    queries, keys, values = split(query), split(key), split(value)
    if model.position_embedding == "rotary":
        turn = partial(rotate, dimensions=model.rotary_dimensions, base=model.rotary_base)
        queries, keys = turn(queries, first=past + new - rows), turn(keys, first=past)
    if cached:
        keys, values = jnp.concatenate([cached[0], keys], axis=1), jnp.concatenate([cached[1], values], axis=1)
    return queries, keys, values


def rotate(x: Array, *, first: int, dimensions: int, base: float) -> Array:
    """Rotary position embedding of `(H, r, k)` at positions from `first` on: angles are public, so this is local.

    The first `dimensions` columns rotate, column j with column j + dimensions / 2 (GPT-NeoX's and Llama's order).
    """
    frequencies = base ** (-np.arange(0, dimensions, 2) / dimensions)
    angles = np.arange(first, first + x.shape[1])[:, None] * np.tile(frequencies, 2)
    turned, kept = x[..., :dimensions], x[..., dimensions:]
    half = dimensions // 2
    other = jnp.concatenate([-turned[..., half:], turned[..., :half]], axis=-1)
    cosine, sine = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    return jnp.concatenate([turned * cosine + other * sine, kept], axis=-1)


def temper(query: Array, inverse_temperature: Array, *, rows: slice) -> Array:
    """Rows of q `(H, r, k)` divided by the temperature of their head and position (Eq. 9)."""
    return scale_rows(query, inverse_temperature[:, rows], private=True)


def scale_by_length(query: Array, *, first: int, positions: int) -> Array:
    """Rows of q `(H, r, k)` times log(n) / log(positions), n the keys that they see: public, so this is local."""
    factors = np.log(np.arange(first + 1, first + 1 + query.shape[1])) / np.log(positions)
    return query * factors[:, None].astype(query.dtype)


def visible(rows: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and key index of every pair a causal model sees, row by row; the last row sees every key."""
    row, column = np.nonzero(np.tril(np.ones((rows, keys), dtype=bool), keys - rows))
    return row, column


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
    for start in range(0, rows, _BLOCK_ROWS):
        block = query[:, start : start + _BLOCK_ROWS]
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
    return jnp.where(where, blocks[:, :, None, :], 0.0).reshape(groups * high, groups * wide)


def shift_by_row_max(logits: Array, *, rows: int, keys: int) -> Array:
    """`(H, n)`: visible logits, each less its row's largest."""
    row, _ = visible(rows, keys)
    return logits - segment_max(logits, np.bincount(row))[:, row]


def powers(logits: Array, offset: Array, *, rows: int, keys: int, iterations: int) -> Array:
    """`(H, n)` weights by the polynomial kernel, of visible logits and offsets `(H, P)` that the server adds.

    A first row sees itself alone: its weight is constant whatever its logit, which may be too small to divide by.
    """
    row, _ = visible(rows, keys)
    weights = power(logits + offset[:, keys - rows : keys][:, row], iterations)
    if rows == keys:
        weights = jnp.concatenate([jnp.full_like(weights[:, :1], MIDDLE_WEIGHT), weights[:, 1:]], axis=1)
    return weights


def weighted_values(weights: Array, value: Array, *, rows: int) -> tuple[Array, Array]:
    """Packed weights `(H, n)` and v `(G, s, k)` -> unnormalised heads `(H, r, k)` and row sums `(H, r)`."""
    heads, (groups, keys, width) = weights.shape[0], value.shape
    row, column = visible(rows, keys)
    where = np.full((rows, keys), len(row))  # one entry past the end holds the zero of the future
    where[row, column] = np.arange(len(row))
    padded = jnp.concatenate([weights, jnp.zeros((heads, 1), weights.dtype)], axis=1)
    shared = heads // groups * rows
    matrix = padded[:, where.reshape(-1)].reshape(groups, shared, keys)
    totals = matrix.sum(axis=-1).reshape(heads, rows)
    if product_bytes(shared, groups * keys, groups * width) < groups * product_bytes(shared, keys, width):
        # All heads side by side in one product, as in `scores`: their values on the diagonal.
        joint = matrix.transpose(1, 0, 2).reshape(shared, groups * keys) @ block_rows(value)
        return joint.reshape(shared, groups, width).transpose(1, 0, 2).reshape(heads, rows, width), totals
    return (matrix @ value).reshape(heads, rows, width), totals


def normalise(heads: Array, totals: Array, *, keys: int) -> Array:
    """Divide after the value product: r d multiplications instead of H r s.

    A row of v weights sums to between 1 and v; divided by the root of v first, sum and reciprocal have the same number
    of digits to stand on.
    """
    rows = heads.shape[1]
    seen = np.arange(keys - rows + 1, keys + 1)
    root = (seen**-0.5).astype(heads.dtype)
    return scale_rows(heads, reciprocal(totals * root, seen)) * root[:, None]


def normalise_means(heads: Array, totals: Array, *, keys: int) -> Array:
    """The same where a row's mean weight, not its largest, is known to be about `MIDDLE_WEIGHT`."""
    rows = heads.shape[1]
    share = (1.0 / (MIDDLE_WEIGHT * np.arange(keys - rows + 1, keys + 1))).astype(heads.dtype)
    return scale_rows(heads, reciprocal_of_wide(totals * share, MEAN_WEIGHT_BITS)) * share[:, None]


def divide(heads: Array, totals: Array) -> Array:
    """What `normalise` and `normalise_means` approximate."""
    return heads / totals[..., None]


def merge_heads(state: Array, heads: Array, matrix: Array, bias: Array, *, rows: int) -> Array:
    """Residual connection around the output projection, for the last `rows` tokens."""
    return state[-rows:] + times_matrix(heads.transpose(1, 0, 2).reshape(rows, -1), matrix) + bias


def affine(state: Array, matrix: Array, bias: Array, *, rows: int | None = None) -> Array:
    """x W + b, for the last `rows` rows of x or all."""
    return times_matrix(state if rows is None else state[-rows:], matrix) + bias


def add_affine(base: Array, state: Array, matrix: Array, bias: Array, *, rows: int) -> Array:
    """base + x W + b, for the last `rows` rows."""
    return base[-rows:] + times_matrix(state[-rows:], matrix) + bias


def bilinear(hidden: Array) -> Array:
    """Left half times right half, elementwise."""
    width = hidden.shape[1] // 2
    return hidden[:, :width] * hidden[:, width:]


def swiglu(hidden: Array) -> Array:
    """SiLU of the left half times the right half, elementwise (Llama)."""
    width = hidden.shape[1] // 2
    return silu(hidden[:, :width]) * hidden[:, width:]


def swiglu_exact(hidden: Array) -> Array:
    """What `swiglu` approximates."""
    width = hidden.shape[1] // 2
    return silu_exact(hidden[:, :width]) * hidden[:, width:]


def rounded(logits: Array, *, bits: int) -> Array:
    """2^bits times the logits, to the nearest whole number.

    The engine's floor is exact. A product cut to fewer digits would round too, but its last digit is up or down at
    random, and whoever asks again and again could average that away.
    """
    return jnp.floor(logits * 2.0**bits + 0.5)


def likeliest(logits: Array) -> Array:
    """Index of the largest of `(1, V)`, `(1,)`."""
    return argmax(logits[0]).reshape(1)


def likeliest_few(logits: Array, *, count: int) -> tuple[Array, Array]:
    """The `count` largest of `(1, V)`, descending, and their indices."""
    return top_k(logits[0], count)


def run_plain(
    model: Description,
    weights: Mapping[str, np.ndarray],
    token_ids: list[int],
    new_tokens: int,
    exp_iterations: int,
    *,
    exact: bool = False,
    every_row: bool = False,
    watch: Callable[[Stage, tuple[Array, ...], Array], None] | None = None,
) -> tuple[list[int], list[np.ndarray]]:
    """Greedy generation in plaintext: tokens and the logits `(V,)` they were chosen from.

    With `every_row` the logits after every token of each pass instead, `(m, V)`.

    With `exact` the model's own functions are computed, the exact softmax (unless it was trained with the kernel) and
    GELU, otherwise what stands for them in a secure run. `watch` sees every stage's operands and each value it writes.
    """
    values: dict[str, Any] = {name: jnp.asarray(w) for name, w in weights.items()}
    fresh, past = list(token_ids), 0
    generated: list[int] = []
    all_logits: list[np.ndarray] = []
    for _ in range(new_tokens):
        values["embedded"] = values["embedding"][np.asarray(fresh)]
        for stage in forward(model, len(fresh), past, exp_iterations, embedding="public", every_row=every_row):
            function = stage.exact if exact and stage.exact is not None else stage.function
            operands = tuple(values[name] for name in stage.inputs)
            results = function(*operands)
            for name, value in zip(stage.outputs, results if len(stage.outputs) > 1 else (results,)):
                values[name] = value
                if watch is not None:
                    watch(stage, operands, value)
        past += len(fresh)
        rows = np.asarray(values["logits"])
        logits = rows if every_row else rows[-1]
        fresh = [int(rows[-1].argmax())]
        generated += fresh
        all_logits.append(logits)
    return generated, all_logits
