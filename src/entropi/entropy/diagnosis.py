"""Entropic overload and entropy collapse read off the mean entropies of the heads (section 3, Fig. 2a)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The paper's well-behaved baseline keeps about 90 % of its heads between M/4 and 3M/4; the overloaded models it
# names have 23 % (SM+R), 45 % (SM) and 58 % (SM+G) in the top quarter, and the collapsing one 33 % in the bottom.
WELL_BEHAVED_SHARE = 0.90
OVERLOAD_SHARE = 0.20
COLLAPSE_SHARE = 0.20
# Where even the largest entropy is this small a part of log T, quarters of it say nothing: all heads collapsed.
NEGLIGIBLE = 0.05


@dataclass(frozen=True)
class Diagnosis:
    """Where the heads of a model stand; entropies in nats, heads as (layer, head)."""

    entropy: list[list[float]]  # (L, H)
    max_observed: float  # M
    max_possible: float  # log T, nan where the context length is not given
    quartile_shares: tuple[float, float, float, float]  # of heads in [0,M/4), [M/4,M/2), [M/2,3M/4), [3M/4,M]
    overloaded: list[tuple[int, int]]
    collapsed: list[tuple[int, int]]
    verdict: str


def diagnose(entropy: Tensor, context_length: int | None = None) -> Diagnosis:
    """Diagnose mean head entropies.

    Args:
        entropy: `(L, H)` nats, the mean over batch and query rows (Eq. 5-7).
        context_length: T; lets the verdict judge M against log T.

    Raises:
        ValueError: not a matrix, or not finite.
    """
    values = torch.as_tensor(entropy).detach().double().cpu()
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(f"entropy must be a matrix (layers, heads), got shape {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()):
        layer, head = (int(i) for i in (~torch.isfinite(values)).nonzero()[0])
        raise ValueError(f"the entropy of layer {layer}, head {head} is not finite: the model has diverged")
    largest = float(values.max())
    limit = math.log(context_length) if context_length else math.nan
    quarter = torch.clamp((values / max(largest, 1e-12) * 4).long(), 0, 3)
    if context_length and largest < NEGLIGIBLE * limit:
        quarter = torch.zeros_like(quarter)
    shares = tuple(float((quarter == i).double().mean()) for i in range(4))
    overloaded = _heads(quarter == 3)
    collapsed = _heads(quarter == 0)
    return Diagnosis(
        entropy=values.tolist(),
        max_observed=largest,
        max_possible=limit,
        quartile_shares=shares,  # type: ignore[arg-type]
        overloaded=overloaded,
        collapsed=collapsed,
        verdict=_verdict(shares, overloaded, collapsed, values.shape[0]),
    )


def _heads(where: Tensor) -> list[tuple[int, int]]:
    return [(int(layer), int(head)) for layer, head in where.nonzero()]


def _verdict(
    shares: tuple[float, ...],
    overloaded: list[tuple[int, int]],
    collapsed: list[tuple[int, int]],
    layers: int,
) -> str:
    sentences = []
    if shares[3] >= OVERLOAD_SHARE:
        sentences.append(
            f"Entropic overload: {shares[3]:.0%} of the heads are in the top quarter, {_where(overloaded, layers)}; "
            "they attend almost evenly and are under-used."
        )
    if shares[0] >= COLLAPSE_SHARE:
        sentences.append(
            f"Entropy collapse: {shares[0]:.0%} of the heads are in the bottom quarter, {_where(collapsed, layers)}; "
            "they attend to almost one token, and training may become unstable."
        )
    middle = shares[1] + shares[2]
    if not sentences:
        if middle >= WELL_BEHAVED_SHARE:
            sentences.append("Well-behaved:")
        else:
            sentences.append("Neither overload nor collapse dominates, but the spread is wider than the baseline's:")
    sentences.append(f"{middle:.0%} of the heads lie between M/4 and 3M/4 (the paper's baseline: about 90%).")
    return " ".join(sentences)


def _where(heads: list[tuple[int, int]], layers: int) -> str:
    touched = sorted({layer for layer, _ in heads})
    if len(touched) == layers:
        return "in every layer"
    names = ", ".join(map(str, touched))
    return f"in layer {names}" if len(touched) == 1 else f"in layers {names}"
