"""Feed-forward networks: plain, scaled, and scaled with the two matrices fused into one.

Each maps the residual stream `(B, T, d)` to the residual stream, its own residual connection included, because
the scaled forms weigh that connection (Eq. 8).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN

from entropi.model.configuration import EntropiConfig
from entropi.model.linear import make_linear
from entropi.model.normalization import make_branch_norm
from entropi.model.shape import BIASES


def _square(hidden: Tensor) -> Tensor:
    return hidden * hidden


def _bilinear(hidden: Tensor) -> Tensor:
    left, right = hidden.chunk(2, dim=-1)
    return left * right


def _swiglu(hidden: Tensor) -> Tensor:
    left, right = hidden.chunk(2, dim=-1)
    return functional.silu(left) * right


# What each activation of `entropi.activations` computes; GELU, GeGLU and leaky ReLU have options and stand in `branch`.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "square": _square,
    "bilinear": _bilinear,
    "swiglu": _swiglu,
}


class PlainFeedForward(nn.Module):
    """X + W_out f(W_in norm(X))."""

    def __init__(self, config: EntropiConfig, norm: nn.Module) -> None:
        super().__init__()
        bias = "ffn" in BIASES[config.bias]
        inner = config.intermediate_size
        assert inner is not None
        self.norm, self.branch_norm = norm, make_branch_norm(config)
        # torch's one kernel for the tanh form; "gelu_new", the same formula in eight, took a tenth of a training step.
        gelu = "gelu_pytorch_tanh" if config.activation_function == "gelu_new" else config.activation_function
        self.activation, self.gelu = config.parts.activation, ACT2FN[gelu]
        self.gated = config.parts.gated
        self.up = make_linear(config, "ffn", config.hidden_size, self.branches * inner, bias)
        self.down = make_linear(config, "ffn", inner, config.hidden_size, bias, writes_to_stream=True)
        self.leaky_slope: nn.Parameter | float | None = None  # None: the model's, common to all layers
        if config.leaky_slope_learned == "fixed":
            self.leaky_slope = config.leaky_slope
        elif config.leaky_slope_learned == "layer" and self.activation == "leaky_relu":
            self.leaky_slope = nn.Parameter(torch.tensor(config.leaky_slope))

    @property
    def branches(self) -> int:
        """How many times the inner width `up` computes: bilinear networks and SwiGLU multiply two halves."""
        return 2 if self.gated else 1

    def forward(self, hidden: Tensor, common_slope: Tensor | None = None) -> Tensor:
        return hidden + self.branch_norm(self.branch(self.norm(hidden), common_slope))

    def branch(self, hidden: Tensor, common_slope: Tensor | None) -> Tensor:
        """The network without its residual connection."""
        return self.down(self.activate(self.up(hidden), common_slope))

    def activate(self, inner: Tensor, common_slope: Tensor | None) -> Tensor:
        """What stands between the two matrices: `(B, T, m)`, or `(B, T, 2 m)` of a gated one, -> `(B, T, m)`."""
        match self.activation:
            case "gelu":
                return self.gelu(inner)
            case "geglu":
                left, right = inner.chunk(2, dim=-1)
                return self.gelu(left) * right
            case "leaky_relu":
                slope = common_slope if self.leaky_slope is None else self.leaky_slope
                assert slope is not None
                return functional.relu(inner) * (1 - slope) + inner * slope
            case "identity":
                return inner
            case name:
                return ACTIVATIONS[name](inner)


class ScaledFeedForward(PlainFeedForward):
    """beta X + FFN(X) / alpha with learnable alpha and beta (Eq. 8)."""

    def __init__(self, config: EntropiConfig, norm: nn.Module) -> None:
        super().__init__(config, norm)
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor, common_slope: Tensor | None = None) -> Tensor:
        return self.beta * hidden + self.branch(self.norm(hidden), common_slope) / self.alpha


class FusedFeedForward(nn.Module):
    """beta X + X W / alpha: the two linear matrices as one of d x d (ScFuFFN)."""

    def __init__(self, config: EntropiConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, "ffn" in BIASES[config.bias]
        self.fused = make_linear(config, "ffn", width, width, bias, writes_to_stream=True)
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor, common_slope: Tensor | None = None) -> Tensor:
        return self.beta * hidden + self.fused(hidden) / self.alpha


def make_feed_forward(config: EntropiConfig, norm: nn.Module) -> nn.Module:
    """The feed-forward network an architecture names."""
    match config.parts.ffn:
        case "plain":
            return PlainFeedForward(config, norm)
        case "scaled":
            return ScaledFeedForward(config, norm)
        case "fused":
            return FusedFeedForward(config)
