"""Normalisation: of the residual stream (LayerNorm, RMSNorm or nothing), or of weights instead (section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from entropi.model.configuration import EntropiConfig

SPECTRAL_START = 15  # power iterations that an initial weight gets, torch's own number


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


def make_linear(config: EntropiConfig, kind: str, inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """A Linear whose weight is normalised if the architecture names its `kind`: query, key, value, output or ffn.

    Both norms act on weights, which do not change at inference: they cost nothing there and vanish in folding.
    """
    linear = nn.Linear(inputs, outputs, bias=bias)
    if config.parts.normalises(kind):
        if config.parts.weight_norm == "weight":
            parametrizations.weight_norm(linear)  # each output's row: a learned length times a unit vector
        else:
            parametrizations.spectral_norm(linear)  # divided by its largest singular value
    return linear


def set_weight(layer: Any, weight: Tensor) -> None:
    """Give a Linear or Embedding this weight, through whatever normalisation it has."""
    if parametrize.is_parametrized(layer, "weight"):
        layer.weight = weight.to(layer.weight)
        iterate_spectral_norms(layer, SPECTRAL_START)
    else:
        layer.weight.copy_(weight)


@torch.no_grad()
def iterate_spectral_norms(model: nn.Module, times: int = 1) -> None:
    """Improve the estimates of the largest singular values by so many power iterations.

    torch's parametrisation does this whenever a weight is read in training mode, gradient checkpointing included,
    which reads it twice and would get two weights. It is therefore kept in evaluation mode, and this is called once
    a forward pass.
    """
    for norm, original in spectral_norms(model):
        norm.train()
        for _ in range(times):
            norm(original)
        norm.eval()


def spectral_norms(model: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """Every spectral normalisation within `model`, and the weight it divides."""
    found: list[tuple[nn.Module, Tensor]] = []
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList) and hasattr(module[0], "_u"):
            found.append((module[0], module.original))
    return found
