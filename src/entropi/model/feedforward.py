"""Feed-forward networks: plain, scaled, and scaled with the two matrices fused into one.

Each maps the residual stream `(B, T, d)` to the residual stream, its own residual connection included, because
the scaled forms weigh that connection (Eq. 8).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from entropi.model.configuration import EntropiConfig


def make_activation(config: EntropiConfig) -> nn.Module:
    """The module between the two FFN matrices."""
    name = {"gelu": config.activation_function, "relu": "relu", "identity": "linear"}[config.parts.activation]
    return ACT2FN[name]


class PlainFeedForward(nn.Module):
    """X + W_out f(W_in norm(X))."""

    def __init__(self, config: EntropiConfig, norm: nn.Module) -> None:
        super().__init__()
        bias = config.bias == "all"
        assert config.intermediate_size is not None
        self.norm = norm
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.activation = make_activation(config)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.branch(self.norm(hidden))

    def branch(self, hidden: Tensor) -> Tensor:
        """The network without its residual connection."""
        return self.down(self.activation(self.up(hidden)))


class ScaledFeedForward(PlainFeedForward):
    """beta X + FFN(X) / alpha with learnable alpha and beta (Eq. 8)."""

    def __init__(self, config: EntropiConfig, norm: nn.Module) -> None:
        super().__init__(config, norm)
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.beta * hidden + self.branch(self.norm(hidden)) / self.alpha


class FusedFeedForward(nn.Module):
    """beta X + X W / alpha: the two linear matrices as one of d x d (ScFuFFN)."""

    def __init__(self, config: EntropiConfig) -> None:
        super().__init__()
        self.fused = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias == "all")
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor) -> Tensor:
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
