"""The model's matrices: how they start, and the norms on weights that some architectures put on them (section 4.1).

A matrix gets its initial weights when it is made. transformers' own call of `_init_weights` comes later and skips what
it likes (5.23 skips every module without parameters of its own), so nothing here depends on it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from entropi.model.configuration import EntropiConfig

SPECTRAL_START = 15  # power iterations that an initial weight gets, torch's own number
Made = TypeVar("Made", bound=nn.Module)


def make_linear(
    config: EntropiConfig, kind: str, inputs: int, outputs: int, bias: bool, *, writes_to_stream: bool = False
) -> nn.Linear:
    """A Linear with initial weights, normalised if the architecture names its `kind`.

    Both norms act on weights, which do not change at inference: they cost nothing there and vanish in folding.

    Args:
        kind: "query", "key", "value", "output", "ffn" or "head".
        writes_to_stream: its output is added to the residual stream, see `initial_deviation`.
    """
    deviation = initial_deviation(config, writes_to_stream)
    linear = _drawn(nn.Linear(inputs, outputs, bias=bias), deviation)
    if not config.parts.normalises(kind):
        return linear
    if config.parts.weight_norm == "weight":
        parametrizations.weight_norm(linear)  # each output's row: a learned length times a unit vector
    else:
        parametrizations.spectral_norm(linear)  # divided by its largest singular value
        if config.spectral_gain:
            parametrize.register_parametrization(linear, "weight", SpectralGain())
    normalised: Any = linear.parametrizations["weight"]  # type: ignore[index]
    normalised.initial_deviation = deviation
    return linear


def make_embedding(config: EntropiConfig, entries: int) -> nn.Embedding:
    """An Embedding `(entries, d)` with initial weights."""
    return _drawn(nn.Embedding(entries, config.hidden_size), initial_deviation(config))


def initial_deviation(config: EntropiConfig, writes_to_stream: bool = False) -> float:
    """Standard deviation of a matrix's initial weights: `initializer_range`, and of one that writes to the residual
    stream, with initialization "depth_scaled", that by sqrt(2 L) (GPT-2: the stream's variance then does not grow with
    the number of its 2 L branches)."""
    deviation: Any = config.initializer_range
    if writes_to_stream and config.initialization == "depth_scaled":
        deviation /= (2 * config.num_hidden_layers) ** 0.5
    return float(deviation)


@torch.no_grad()
def redraw(module: Any, otherwise: float = 0.0) -> None:
    """Draw the weights of a Linear or Embedding anew, or what a normalised Linear's weight is made from.

    The standard deviation is that of the module, and `otherwise` in one that transformers made, to resize another.
    """
    deviation = getattr(module, "initial_deviation", otherwise)
    if isinstance(module, parametrize.ParametrizationList):
        like: Any = module.original1 if hasattr(module, "original1") else module.original
        for norm in module:
            if isinstance(norm, SpectralGain):
                norm.gain.fill_(1.0)
        module.right_inverse(torch.empty_like(like).normal_(0.0, deviation))
        iterate_spectral_norms(module, SPECTRAL_START)
        return
    # By torch.nn.init, in which transformers spares what it has loaded.
    if not parametrize.is_parametrized(module, "weight"):  # else the list of its parametrisations is drawn
        nn.init.normal_(module.weight, 0.0, deviation)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


def _drawn(module: Made, deviation: float) -> Made:
    module.initial_deviation = deviation  # type: ignore[assignment]  # for `redraw`, later too
    redraw(module)
    return module


class SpectralGain(nn.Module):
    """g W of a spectrally normalised W, g one learned number from 1: sigma-reparametrisation (2303.06296)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


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
