"""Normalisation of the residual stream: LayerNorm, RMSNorm or nothing. Norms on weights are in `linear.py`."""

from __future__ import annotations

from torch import nn

from entropi.model.configuration import EntropiConfig


def make_norm(config: EntropiConfig) -> nn.Module:
    """The norm before attention and before the FFN; the identity in architectures without one."""
    match config.parts.norm:
        case "layernorm":
            return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        case "rmsnorm":
            return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        case "none":
            return nn.Identity()


def make_final_norm(config: EntropiConfig) -> nn.Module:
    """The norm before the LM head: the authors keep a LayerNorm there in models that have none elsewhere."""
    if not config.final_norm:
        return nn.Identity()
    if config.parts.norm == "rmsnorm":
        return make_norm(config)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
