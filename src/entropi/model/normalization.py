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


def make_head_norm(config: EntropiConfig) -> nn.Module:
    """The norm of every head's query or key, with one gain for each of its columns; the identity without one."""
    return nn.RMSNorm(config.head_dim, eps=config.layer_norm_epsilon) if config.query_key_norm else nn.Identity()


def make_branch_norm(config: EntropiConfig) -> nn.Module:
    """The norm of what attention or the FFN adds to the residual stream; the identity without one."""
    return nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon) if config.branch_norm else nn.Identity()


def make_final_norm(config: EntropiConfig) -> nn.Module:
    """The norm before the LM head: the authors keep a LayerNorm there in models that have none elsewhere."""
    if not config.final_norm:
        return nn.Identity()
    if config.parts.norm == "rmsnorm":
        return make_norm(config)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
