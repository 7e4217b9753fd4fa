"""Folding: everything linear between two softmaxes disappears into the neighbouring matrices, exactly.

Row vectors: a token's residual state is a row x of width d, a Linear's matrix is `weight.T`. In a softmax-only
model a block is  x^ = x + heads W_O + b_O,  x' = x^ M + c  with M = beta I + W / alpha (Eq. 8; alpha = beta = 1
and W = W_in W_out where the FFN is plain). Keep the state in another basis, z_l = x_l P_l with P_0 = I and
P_{l+1} = M_l^-1 P_l. Then

    z_{l+1} = z_l + heads (W_O P_l) + b_O P_l + c P_{l+1},

so the feed-forward network costs nothing; queries, keys and values of layer l read z_l through P_l^-1 = M_0 ...
M_{l-1}, and the final norm or the head through P_L^-1. 1/sqrt(d_k) goes into W_Q; the value bias, because
attention rows sum to 1, into the output bias; the final norm's centring into P_L^-1, its gain and bias into the
head. Temperatures that differ between positions remain, as a factor on the rows of q.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn

from entropi.errors import UserError
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.feedforward import FusedFeedForward, PlainFeedForward, ScaledFeedForward

FORMAT_VERSION = 1
WEIGHTS_FILE = "folded.safetensors"
DESCRIPTION_FILE = "folded.json"
# Condition number of P_l beyond which the fixed-point arithmetic of private inference would lose accuracy: its 18
# fraction bits leave about five decimal digits, of which the basis may cost two.
WORST_CONDITION = 100.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Folded:
    """A folded model: `description` is public and plain JSON, `weights` are the owner's, float64.

    Shapes: `embedding (V, d)`, `positions (P, d)`; for each layer l `l.qkv (d, 3d)`, `l.qkv_bias (3d,)`,
    `l.output (d, d)`, `l.output_bias (d,)`, `l.inverse_temperature (H, P)` where temperatures depend on the
    position, `l.ffn (d, d)` and `l.ffn_bias (d,)` where the feed-forward network was not folded away;
    `centre (d, d)` before the final norm, if there is one; `head (d, V)`, `head_bias (V,)`.
    """

    description: dict[str, Any]
    weights: dict[str, Array]
    conditions: list[float]  # condition number of P_l, l = 0 .. L

    def save(self, folder: Path) -> None:
        """Write safetensors (float32) and the description; readable without torch."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: np.ascontiguousarray(v, np.float32) for k, v in self.weights.items()}, folder / WEIGHTS_FILE)
        (folder / DESCRIPTION_FILE).write_text(json.dumps(self.description, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def fold(model: EntropiForCausalLM, worst_condition: float = WORST_CONDITION) -> Folded:
    """Fold a softmax-only model, in float64.

    A feed-forward network that would bring the condition number of the basis above `worst_condition` is kept as
    one explicit d x d matrix, and the basis stays as it is.

    Raises:
        UserError: an architecture with LayerNorm or an activation in its layers, or weights that are not finite.
    """
    config = model.config
    if not config.parts.softmax_only:
        raise UserError(
            f"{config.architecture} cannot be folded: private inference runs softmax-only models, "
            "such as SM+ScFuFFN and SM(t)+ScFuFFN"
        )
    if broken := [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise UserError(f"the model's weights are not finite, first in {broken[0]}")
    width, heads = config.hidden_size, config.num_attention_heads
    weights: dict[str, Array] = {
        "embedding": _array(model.model.token_embedding.weight),
        "positions": _array(model.model.position_embedding.weight),
    }
    basis, inverse = np.eye(width), np.eye(width)  # P_l and P_l^-1
    conditions, explicit, tempered = [1.0], [], False
    for index, block in enumerate(model.model.blocks):
        attention: Any = block.attention
        query, query_bias = _linear(attention.query)
        scale = config.head_dim**-0.5
        if attention.temperature is not None:
            inverse_temperature = 1.0 / _array(attention.temperature)
            if np.ptp(inverse_temperature, axis=1).max() == 0:
                per_column = np.repeat(inverse_temperature[:, 0], width // heads)
                query, query_bias = query * per_column, query_bias * per_column
            else:
                weights[f"{index}.inverse_temperature"] = inverse_temperature
                tempered = True
        key, key_bias = _linear(attention.key)
        value, value_bias = _linear(attention.value)
        output, output_bias = _linear(attention.output)
        weights[f"{index}.qkv"] = inverse @ np.concatenate([query * scale, key, value], axis=1)
        weights[f"{index}.qkv_bias"] = np.concatenate([query_bias * scale, key_bias, np.zeros(width)])
        weights[f"{index}.output"] = output @ basis
        bias = (value_bias @ output + output_bias) @ basis

        matrix, offset = _feed_forward_map(block.feed_forward)
        new_inverse = inverse @ matrix
        condition = float(np.linalg.cond(new_inverse))
        if condition <= worst_condition:
            basis, inverse = np.linalg.solve(matrix, basis), new_inverse
            bias = bias + offset @ basis
        else:
            weights[f"{index}.ffn"] = inverse @ matrix @ basis
            weights[f"{index}.ffn_bias"] = offset @ basis
            explicit.append(index)
        weights[f"{index}.output_bias"] = bias
        conditions.append(float(np.linalg.cond(inverse)))

    table = _array(model.lm_head.weight).T
    norm = model.model.final_norm
    if isinstance(norm, nn.LayerNorm):
        centring = np.eye(width) - 1.0 / width
        weights["centre"] = inverse @ centring
        weights["head"] = _array(norm.weight)[:, None] * table
        weights["head_bias"] = _array(norm.bias) @ table
    else:
        weights["head"] = inverse @ table
        weights["head_bias"] = np.zeros(config.vocab_size)
    description = {
        "format": FORMAT_VERSION,
        "architecture": config.architecture,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "hidden_size": width,
        "vocab_size": config.vocab_size,
        "positions": config.max_position_embeddings,
        "temperature": tempered,
        "final_norm": isinstance(norm, nn.LayerNorm),
        "norm_epsilon": config.layer_norm_epsilon,
        "explicit_ffn": explicit,
        "end_of_text": config.eos_token_id if isinstance(config.eos_token_id, int) else None,
    }
    return Folded(description, weights, conditions)


def _array(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()


def _linear(layer: nn.Linear) -> tuple[Array, Array]:
    """Matrix (in, out) and bias (out,) of a Linear."""
    matrix = _array(layer.weight).T
    return matrix, _array(layer.bias) if layer.bias is not None else np.zeros(matrix.shape[1])


def _feed_forward_map(layer: Any) -> tuple[Array, Array]:
    """M and c of x' = x M + c for a linear feed-forward network with its residual connection (Eq. 8)."""
    if isinstance(layer, FusedFeedForward):
        matrix, bias = _linear(layer.fused)
    else:
        assert isinstance(layer, PlainFeedForward)
        (up, up_bias), (down, down_bias) = _linear(layer.up), _linear(layer.down)
        matrix, bias = up @ down, up_bias @ down + down_bias
    alpha = beta = 1.0
    if isinstance(layer, FusedFeedForward | ScaledFeedForward):
        alpha, beta = float(layer.alpha), float(layer.beta)
    return beta * np.eye(len(matrix)) + matrix / alpha, bias / alpha
