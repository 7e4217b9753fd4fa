"""Normalisation of the residual stream: LayerNorm or nothing."""

from __future__ import annotations

from torch import nn

from entropi.model.configuration import EntropiConfig


def make_norm(config: EntropiConfig) -> nn.Module:
    """The norm before attention and before the FFN; the identity in LayerNorm-free architectures."""
    if config.parts.norm == "none":
        return nn.Identity()
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
