"""Folding: everything linear between two nonlinear operations disappears into the neighbouring matrices, exactly.

Row vectors: a token's residual state is a row x of width d, a Linear's matrix is `weight.T`.

**Without a norm of the residual stream** a block is  x^ = x + heads W_O + b_O,  x' = x^ M + c + f(x^ U) D,  where M is
the linear part of the feed-forward network with its residual connection: beta I + W / alpha for a linear network
(Eq. 8; alpha = beta = 1 and W = W_in W_out where it is plain), I + s U D for leaky ReLU of slope s, which is
(1 - s) relu + s, and I otherwise. Keep the state in another basis, z_l = x_l B_l with B_{l+1} = M_l^-1 B_l. Then

    z_{l+1} = z_l + heads (W_O B_l) + b_O B_l + c B_{l+1} + f(z^ B_l^-1 U) (D B_{l+1}),

so the linear part costs nothing; queries, keys and values read z_l through B_l^-1, and the final norm or the head
through B_L^-1. Products of many M are badly conditioned, so the basis that a group of layers starts from is free to
balance it: with M_a ... M_{b-1} = U S V^T the start U S^1/2 ends in V S^-1/2, both with the root of the product's
condition number. Where a group would still pass the limit, one layer keeps an explicit matrix, which also takes
the state from one group's basis to the next one's.

**With a norm** the basis stays, gain and bias of the norm go into the matrix that reads it, and LayerNorm's
centring into every matrix that writes to the stream (its mean is then always 0), which leaves root-mean-square
normalisation without parameters.

Everywhere: 1/sqrt(d_k) and temperatures per head go into W_Q; the value bias, because attention rows sum to 1, into
the output bias; norms on weights into the weights; the final norm's centring into B_L^-1, its gain and bias into the
head. Temperatures that differ between positions remain, as a factor on the rows of q. Of log-length scaling the learned
gain goes into W_Q, and log(n) / log(P) is public: it remains as a constant of the program, or in those temperatures.

**A norm of queries and keys, or of what a branch adds,** divides by the root mean square of x W and then multiplies by
a gain g. The rotation of queries and keys, and the sum with the residual stream, come after: there is no matrix behind
it that could take g in. So x W g is computed in place of x W, and x W beside it for the mean square alone: columns of
a product that is sent anyway, where a multiplication by g would be one of every number.

**Of the polynomial softmax** the weights (1 + s / (2^t T))^(2^t) are proportional to (a 2^t T + a s)^(2^t) for any a of
the head: temperatures become offsets, which the model's owner adds for nothing, and a goes into W_Q. It is chosen so
that a row's mean weight is about 16: larger ones would leave fixed-point numbers less room, smaller ones be less exact.

**Over the number of keys** or a constant nothing is proportional: temperatures stay factors on the queries;
the private program multiplies sums by K / n (`softmax.share_scale`), weights (a + a s / (2^t T))^(2^t) have a mean of
about 1 / K, and what they are wrong by in all, by head, goes out again in the output matrix. Larger weights would make
that matrix so small that it loses digits, as 2^t sqrt(d_k) would W_Q: half of it goes into W_K. Since rows of weights
do not sum to 1, the value bias stays with the values.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn

from entropi.errors import UserError
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.feedforward import FusedFeedForward, ScaledFeedForward
from entropi.model.shape import DESCRIPTION_FILE, describe
from entropi.softmax import share_scale

WEIGHTS_FILE = "folded.safetensors"
# Condition number of a basis beyond which the fixed-point arithmetic of private inference would lose accuracy: its 18
# fraction bits leave about five decimal digits, of which the basis may cost two.
WORST_CONDITION = 100.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Folded:
    """A folded model: `description` is public and plain JSON, `weights` are the owner's, float64.

    Shapes, with H heads and G heads of keys and values of width k, m the FFN's inner width, P positions: `embedding
    (V, d)`, `positions (P, d)` where they are learned; for each layer l `l.qkv (d, (H + 2 G) k)`, `l.qkv_bias`,
    `l.output (H k, d)`, `l.output_bias`; `l.inverse_temperature (H, P)` where temperatures depend on the position,
    `l.offset (H, P)` of a polynomial softmax;
    `l.up (d, m)`, `l.up_bias`, `l.down (m, d)`, `l.down_bias` around an activation (bilinear: `l.up (d, 2 m)`, whose
    halves are multiplied); `l.ffn (d, d)` and `l.ffn_bias` in the layers of `explicit_ffn`, which multiply the
    residual stream itself in models without a norm, and are added to it after a norm; `centre (d, d)` before
    the final norm, if the description says so; `head (d, V)`, `head_bias`. Norms of queries and keys have columns of
    `l.qkv` besides, plain queries after the queries and plain keys at the end; norms of branches twice the columns of
    `l.output` and `l.down`, the plain ones first.
    """

    description: dict[str, Any]
    weights: dict[str, Array]
    conditions: list[float]  # condition number of B_l, l = 0 .. L

    def save(self, folder: Path) -> None:
        """Write safetensors (float32) and the description; readable without torch."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: np.ascontiguousarray(v, np.float32) for k, v in self.weights.items()}, folder / WEIGHTS_FILE)
        (folder / DESCRIPTION_FILE).write_text(json.dumps(self.description, indent=2) + "\n", encoding="utf-8")


@dataclass
class _FeedForward:
    """x -> x matrix + offset + activation(x up + up_bias) down; the last term only where there is an activation.

    Without a norm of the stream `matrix` holds the residual connection; after a norm it does not, and None is 0.
    """

    matrix: Array | None
    offset: Array
    branch: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stream:
    """The bases that the residual stream is kept in, before every layer and after the last: lists of L + 1."""

    reading: list[Array]  # B_l^-1, for matrices that read it
    writing: list[Array]  # B_l, for those that write to it, with LayerNorm's centring where there is one
    explicit: list[int]  # layers whose matrix M stays
    conditions: list[float]  # of B_l


@torch.no_grad()
def fold(model: EntropiForCausalLM, worst_condition: float = WORST_CONDITION) -> Folded:
    """Fold a model, in float64.

    In a model without norms, feed-forward networks that would bring the condition number of the basis above
    `worst_condition` are kept as one explicit d x d matrix each.

    Raises:
        UserError: weights that are not finite.
    """
    config, decoder = model.config, model.model
    if broken := [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise UserError(f"the model's weights are not finite, first in {broken[0]}")
    blocks: list[Any] = list(decoder.blocks)
    common_slope = None if decoder.leaky_slope is None else float(decoder.leaky_slope)
    networks = [_feed_forward(copy.deepcopy(block.feed_forward).double(), common_slope) for block in blocks]
    with_branch = {bool(network.branch) for network in networks}
    assert len(with_branch) <= 1  # one description holds for all layers
    stream = _stream(config, networks, worst_condition)

    embedding = _array(decoder.token_embedding.weight) * config.embedding_scale
    weights = {"embedding": embedding @ stream.writing[0]}
    if decoder.position_embedding is not None:
        weights["positions"] = _array(decoder.position_embedding.weight) @ stream.writing[0]

    softmax = config.softmax_form
    tempered = (
        config.parts.temperature
        and not softmax.has_offsets
        and any(_by_position(block.attention.temperature) for block in blocks)
    )
    sizes: list[Array | None] = [None] * len(blocks) if softmax.of_distance else [*_sizes_of_bases(model)]
    for index, (block, network, size) in enumerate(zip(blocks, networks, sizes)):
        layer = _fold_layer(index, block, network, stream, config, tempered, size)
        weights |= {f"{index}.{name}": value for name, value in layer.items()}

    weights |= _fold_head(model, stream)
    description = describe(config, explicit_ffn=stream.explicit, temperature=tempered)
    return Folded(description, weights, stream.conditions)


def _stream(config: EntropiConfig, networks: Sequence[_FeedForward], worst_condition: float) -> _Stream:
    """Bases in which the linear parts of the networks vanish, or the model's own where a norm reads the stream."""
    eye: Array = np.eye(config.hidden_size)
    if config.parts.norm == "none":
        bases, inverses, explicit = _bases([f.matrix for f in networks], eye, worst_condition)
    else:
        bases = inverses = [eye] * (len(networks) + 1)
        explicit = [index for index, f in enumerate(networks) if f.matrix is not None]
    # Only the final norm makes the mean of the stream superfluous; the head would read it.
    centred = config.parts.norm == "layernorm" and config.final_norm
    writing = [basis @ _centring(config.hidden_size) for basis in bases] if centred else bases
    return _Stream(inverses, writing, explicit, [float(np.linalg.cond(basis)) for basis in bases])


def _centring(width: int) -> Array:
    """The matrix that takes the mean of a row away."""
    return np.eye(width) - 1.0 / width


def _fold_layer(
    index: int,
    block: Any,
    network: _FeedForward,
    stream: _Stream,
    config: EntropiConfig,
    tempered: bool,
    size: Array | None,
) -> dict[str, Array]:
    """One layer's part of `Folded.weights`, by the names without its number."""
    positions = config.max_position_embeddings
    attention = copy.deepcopy(block.attention).double()
    layer = _fold_attention(attention, block.attention_norm, tempered, size, positions)
    if size is not None:
        layer["offset"] = np.broadcast_to(layer["offset"], (config.num_attention_heads, positions))
    reading, after = stream.reading[index], stream.writing[index + 1]
    written = after if config.parallel_residual else stream.writing[index]
    layer["qkv"] = reading @ layer["qkv"]
    layer["output"], layer["output_bias"] = layer["output"] @ written, layer["output_bias"] @ written

    offset: Array = network.offset @ after
    if network.branch:
        layer["up"], layer["up_bias"] = reading @ network.branch["up"], network.branch["up_bias"]
        layer["down"], layer["down_bias"] = network.branch["down"] @ after, offset
    if index in stream.explicit:
        assert network.matrix is not None
        layer["ffn"] = reading @ network.matrix @ after
        layer["ffn_bias"] = np.zeros(config.hidden_size) if network.branch else offset
    elif not network.branch:  # then only the offset is left of the network
        layer["output_bias"] = layer["output_bias"] + offset

    if config.branch_norm:
        for name, norm in (("output", block.branch_norm), ("down", block.feed_forward.branch_norm)):
            for part in (name, f"{name}_bias"):
                layer[part] = np.concatenate([layer[part], layer[part] * _array(norm.weight)], axis=-1)
    return layer


def _fold_head(model: EntropiForCausalLM, stream: _Stream) -> dict[str, Array]:
    """Matrix and bias of the head, with what is left of the final norm."""
    config, table = model.config, _array(model.lm_head.weight).T
    if not config.final_norm:
        return {"head": stream.reading[-1] @ table, "head_bias": np.zeros(config.vocab_size)}
    gain, shift = _gain(model.model.final_norm, config.hidden_size)
    folded = {"head": gain[:, None] * table, "head_bias": shift @ table}
    if config.parts.norm == "none":
        folded["centre"] = stream.reading[-1] @ _centring(config.hidden_size)
    return folded


CALIBRATION_SEQUENCES, CALIBRATION_LENGTH = 4, 512  # of random tokens
MEAN_WEIGHT = 16.0  # of rows by a polynomial softmax


def _sizes_of_bases(model: EntropiForCausalLM) -> list[Array]:
    """For every layer the size of the polynomial's base 2^t T + s, or over a public number 1 + s / (2^t T), by head.

    Divided by it, rows' mean weights have `MEAN_WEIGHT` as their geometric mean, or over keys 1 / `share_scale`, over
    random tokens. The first row is left out, whose only weight may be anything.
    """
    config, found = model.config, list[Array]()
    undivided = config.softmax_form.public_divisor
    wanted = 1.0 / share_scale(config.max_position_embeddings) if undivided else MEAN_WEIGHT
    tokens = torch.randint(
        config.vocab_size,
        (CALIBRATION_SEQUENCES, min(config.max_position_embeddings, CALIBRATION_LENGTH)),
        generator=torch.Generator().manual_seed(0),
    )
    power = 2.0**config.softmax_form.iterations

    def measure(attention: Any, arguments: tuple[Any, ...]) -> None:
        hidden, position_ids, rotation, *_ = arguments
        query = attention.queries(hidden, position_ids, rotation).double()
        key = attention.keys(hidden, rotation).double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        offset = torch.ones(1, 1, dtype=torch.float64, device=query.device) * power
        if attention.temperature is not None:
            offset = power * attention.temperature(position_ids)[0].double()
        means = []
        for one in range(len(query)):
            logits = query[one] @ key[one].transpose(-1, -2) * attention.head_dim**-0.5
            bases = logits + offset[..., None]
            weights = (bases / offset[..., None] if undivided else bases) ** power
            seen = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
            means.append((weights.tril().sum(dim=-1) / seen)[:, 1:])
        found.append((torch.stack(means) / wanted).log().mean(dim=(0, 2)).div(power).exp().cpu().numpy())

    blocks: list[Any] = list(model.model.blocks)
    hooks = [block.attention.register_forward_pre_hook(measure) for block in blocks]
    training = model.training
    try:
        model.eval()(tokens.to(model.device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def _fold_attention(
    attention: Any, norm: nn.Module, tempered: bool, size: Array | None, positions: int
) -> dict[str, Array]:
    """Joint matrix and bias of q, k and v, output matrix and bias, temperatures that depend on the position.

    With the `size` of the polynomial's bases `offset (H, P or 1)` besides; it has temperatures in it, or over keys not.
    """
    query, query_bias = _linear(attention.query, norm)
    key, key_bias = _linear(attention.key, norm)
    value, value_bias = _linear(attention.value, norm)
    output, output_bias = _linear(attention.output)
    scale, folded = _fold_temperature(attention, tempered, size)
    head_dim = attention.head_dim
    groups = query.shape[1] // key.shape[1]  # query heads that share one head of keys and values
    kept_bias, key_scale = np.zeros_like(value_bias), 1.0
    if attention.softmax.public_divisor:
        assert size is not None
        power = 2.0**attention.softmax.iterations
        key_scale = (power * head_dim**0.5) ** -0.5  # W_Q alone would become so small that it loses digits
        output = np.repeat(size**power / share_scale(positions), head_dim)[:, None] * output
        kept_bias, value_bias = value_bias, kept_bias
    per_head = np.repeat(value_bias.reshape(-1, head_dim), groups, axis=0).reshape(-1)
    queries, keys = [(query, query_bias)], [(key, key_bias)]
    if not isinstance(attention.query_norm, nn.Identity):  # what is divided has the gain, what it is divided by not
        scale = scale * np.tile(_array(attention.query_norm.weight), len(query_bias) // head_dim)
        gain = np.tile(_array(attention.key_norm.weight), len(key_bias) // head_dim)
        queries, keys = [queries[0], queries[0]], [(key * gain, key_bias * gain), keys[0]]
    queries[0] = query * scale / key_scale, query_bias * scale / key_scale
    keys[0] = keys[0][0] * key_scale, keys[0][1] * key_scale
    columns = [*queries, keys[0], (value, kept_bias), *keys[1:]]
    folded["qkv"] = np.concatenate([matrix for matrix, _ in columns], axis=1)
    folded["qkv_bias"] = np.concatenate([bias for _, bias in columns])
    folded["output"], folded["output_bias"] = output, per_head @ output + output_bias
    return folded


def _fold_temperature(attention: Any, tempered: bool, size: Array | None) -> tuple[Array, dict[str, Array]]:
    """What the columns of queries are multiplied by, `(H k,)`, and what is left of temperatures and bases."""
    folded: dict[str, Array] = {}
    head_dim, softmax = attention.head_dim, attention.softmax
    scale: Array = np.full(attention.query.weight.shape[0], head_dim**-0.5)
    if attention.length_scale is not None:
        scale = scale * np.repeat(_array(attention.length_scale.gain), head_dim)
    if size is not None:
        base: Any = 2.0**softmax.iterations  # 2^t T + s, or over keys 1 + s / (2^t T)
        if softmax.public_divisor:
            base, scale = 1.0, scale / base
        elif attention.temperature is not None:
            base = base * _array(attention.temperature.values())
        folded["offset"] = base / size[:, None]
        scale = scale / np.repeat(size, head_dim)
    if attention.temperature is not None and not softmax.has_offsets:
        inverse_temperature = 1.0 / _array(attention.temperature.values())
        if not tempered:
            return scale * np.repeat(inverse_temperature[:, 0], head_dim), folded
        factors: Array = np.broadcast_to(
            inverse_temperature, (len(inverse_temperature), attention.temperature.parameter.shape[1])
        )
        if attention.length_scale is not None:  # the private factor of a row takes its public one in
            positions = attention.length_scale.positions
            factors = factors * np.log(np.arange(1, positions + 1)) / np.log(positions)
        folded["inverse_temperature"] = factors
    return scale, folded


def _by_position(temperature: Any) -> bool:
    """Whether a layer's temperatures differ between positions."""
    return bool(np.ptp(_array(temperature.values()), axis=1).max() > 0)


def _feed_forward(layer: Any, common_slope: float | None) -> _FeedForward:
    """The parts of a feed-forward network (Eq. 8 for the scaled ones), its residual connection in `matrix`."""
    alpha = beta = 1.0
    if isinstance(layer, FusedFeedForward | ScaledFeedForward):
        alpha, beta = float(layer.alpha), float(layer.beta)
    if isinstance(layer, FusedFeedForward):
        matrix, bias = _linear(layer.fused)
        return _FeedForward(beta * np.eye(len(matrix)) + matrix / alpha, bias / alpha)
    (up, up_bias), (down, down_bias) = _linear(layer.up, layer.norm), _linear(layer.down)
    normed = not isinstance(layer.norm, nn.Identity)
    around = np.zeros((len(up), len(up))) if normed else np.eye(len(up))  # the residual connection
    match layer.activation:
        case "identity":
            return _FeedForward(beta * around + up @ down / alpha, (up_bias @ down + down_bias) / alpha)
        case "leaky_relu":
            slope = common_slope if layer.leaky_slope is None else float(layer.leaky_slope)
            assert slope is not None
            branch = {"up": up, "up_bias": up_bias, "down": (1 - slope) * down}
            return _FeedForward(around + slope * up @ down, slope * up_bias @ down + down_bias, branch)
        case _:
            return _FeedForward(None if normed else around, down_bias, {"up": up, "up_bias": up_bias, "down": down})


def _bases(
    matrices: Sequence[Array | None], eye: Array, worst_condition: float
) -> tuple[list[Array], list[Array], list[int]]:
    """Bases B_0 .. B_L, their inverses, and the layers whose matrix M stays explicit.

    Layers are taken into a group for as long as every basis in it is well enough conditioned.
    """
    bases: list[Array] = []
    inverses: list[Array] = []
    explicit: list[int] = []
    first, layers = 0, len(matrices)
    while True:
        products, group = [eye], ([eye], [eye])  # M_first ... M_{k-1} for k = first, first + 1, ...
        while first + len(products) - 1 < layers:
            matrix = matrices[first + len(products) - 1]
            assert matrix is not None
            longer = [*products, products[-1] if np.array_equal(matrix, eye) else products[-1] @ matrix]
            if (balanced := _balance(longer, worst_condition)) is None:
                break
            products, group = longer, balanced
        bases += group[0]
        inverses += group[1]
        if len(bases) == layers + 1:
            return bases, inverses, explicit
        first = len(bases)
        explicit.append(first - 1)


def _balance(products: list[Array], worst_condition: float) -> tuple[list[Array], list[Array]] | None:
    """Bases A_k^-1 R and inverses R^-1 A_k for products A_0 = I .. A_n, or None where one is conditioned too badly.

    R = U S^1/2 of A_n = U S V^T. The first and last basis then share the condition number cond(A_n)^1/2.
    """
    if all(product is products[0] for product in products):
        return products, products
    left, scales, right = np.linalg.svd(products[-1])
    if not scales[-1] > 0 or (scales[0] / scales[-1]) ** 0.5 > worst_condition:
        return None
    root = scales**0.5
    inverses = [(left / root).T @ product for product in products]
    conditions = [(scales[0] / scales[-1]) ** 0.5, *(float(np.linalg.cond(inverse)) for inverse in inverses[1:-1])]
    if max(conditions) > worst_condition:
        return None
    # The ends are known without solving: R itself, and A_n^-1 R = V S^-1/2.
    bases = [left * root, *(np.linalg.inv(inverse) for inverse in inverses[1:-1]), right.T / root]
    return bases, inverses


def _array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


def _gain(norm: nn.Module, width: int) -> tuple[Array, Array]:
    """Gain and bias (d,) of a norm; 1 and 0 where it has none."""
    gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return (
        np.ones(width) if gain is None else _array(gain),
        np.zeros(width) if bias is None else _array(bias),
    )


def _linear(layer: nn.Linear, norm: nn.Module | None = None) -> tuple[Array, Array]:
    """Matrix (in, out) and bias (out,) of a Linear, with gain and bias of the norm it reads."""
    matrix = _array(layer.weight).T
    bias = _array(layer.bias) if layer.bias is not None else np.zeros(matrix.shape[1])
    gain, shift = _gain(norm or nn.Identity(), len(matrix))
    return gain[:, None] * matrix, shift @ matrix + bias
