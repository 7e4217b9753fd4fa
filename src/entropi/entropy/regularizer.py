"""The entropy regulariser of Algorithm 1, with every known ambiguity of the paper as an explicit option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Granularity = Literal["query", "head"]
MaxEntropy = Literal["context", "causal"]
Reduction = Literal["sum", "mean"]


def maximum_entropy(
    context_length: int, kind: MaxEntropy, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """E_max of every query row, `(T,)` nats: log T ("context", the paper) or log(i + 1) ("causal").

    Raises:
        ValueError: another `kind`.
    """
    if kind == "context":
        return torch.full((context_length,), math.log(context_length), dtype=dtype, device=device)
    if kind == "causal":
        return torch.arange(1, context_length + 1, dtype=dtype, device=device).log()
    raise ValueError(f"max_entropy must be 'context' or 'causal', got {kind!r}")


def entropy_penalty(
    entropies: Tensor | Sequence[Tensor],
    threshold: Tensor,
    *,
    margin: float = 0.2,
    granularity: Granularity = "query",
    max_entropy: MaxEntropy = "context",
    reduction: Reduction = "sum",
) -> Tensor:
    """L_entropy of Algorithm 1, a scalar in nats squared.

    deviation = E - threshold * E_max; the penalty is deviation^2 where |deviation| > margin * E_max, else 0,
    averaged over heads and then over layers.

    Args:
        entropies: `(L, B, H, T)` nats, or L tensors `(B, H, T)`.
        threshold: `(L, H)`, theta; fractions of E_max.
        margin: gamma; a fraction of E_max.
        granularity: "query" penalises every (batch, query) row, as the published listing does; "head" penalises
            the mean over batch and queries, one number a head, as Algorithm 1 is written.
        max_entropy: "context" is log T for every row (the paper); "causal" is log(i + 1), what row i can reach;
            with "head", its mean over rows.
        reduction: over rows, for "query" only: "sum" is the listing's, to which the published lambdas belong;
            "mean" makes the penalty independent of batch size and length.

    Raises:
        ValueError: entropies that do not fit the thresholds, or an option that is none of those named.
    """
    layers = list(entropies)
    if len(layers) != threshold.shape[0] or any(e.shape[1] != threshold.shape[1] for e in layers):
        shapes = [tuple(e.shape) for e in layers]
        raise ValueError(f"entropies {shapes} do not fit thresholds (L, H) = {tuple(threshold.shape)}")
    limit = _limit(layers, max_entropy)
    theta = threshold.to(limit.dtype)
    if granularity == "query":
        aims = [theta_layer[None, :, None] * limit for theta_layer in theta]
        return _penalty_of_rows(layers, aims, margin * limit, reduction)
    if granularity == "head":
        return _penalty_of_heads(layers, theta * limit.mean(), margin * limit.mean())
    raise ValueError(f"granularity must be 'query' or 'head', got {granularity!r}")


def entropy_distance_penalty(
    entropies: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    margin: float = 0.2,
    granularity: Granularity = "query",
    max_entropy: MaxEntropy = "context",
    reduction: Reduction = "sum",
) -> Tensor:
    """L_entropy of Algorithm 1 with given entropies in place of theta * E_max, a scalar in nats squared.

    The deviation is E - E_target, of a row ("query") or of a head's mean ("head"); all else is as in `entropy_penalty`.

    Args:
        entropies: L tensors `(B, H, T)` nats.
        targets: as many of the same shapes, such as another model's on the same tokens; they get no gradient.

    Raises:
        ValueError: shapes that differ, or a granularity that is none of those named.
    """
    layers, aims = list(entropies), [target.detach() for target in targets]
    if [e.shape for e in layers] != [a.shape for a in aims]:
        shapes = [[tuple(e.shape) for e in one] for one in (layers, aims)]
        raise ValueError(f"entropies {shapes[0]} and targets {shapes[1]} differ in shape")
    limit = _limit(layers, max_entropy)
    if granularity == "query":
        return _penalty_of_rows(layers, [aim.to(limit.dtype) for aim in aims], margin * limit, reduction)
    if granularity == "head":
        means = torch.stack([aim.to(limit.dtype).mean(dim=(0, 2)) for aim in aims])
        return _penalty_of_heads(layers, means, margin * limit.mean())
    raise ValueError(f"granularity must be 'query' or 'head', got {granularity!r}")


def _limit(layers: Sequence[Tensor], max_entropy: MaxEntropy) -> Tensor:
    """E_max of the rows of `layers`, `(T,)`, at least float32."""
    like = layers[0]
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return maximum_entropy(like.shape[-1], max_entropy, wide, like.device)


def _penalty_of_rows(layers: Sequence[Tensor], aims: Sequence[Tensor], margin: Tensor, reduction: Reduction) -> Tensor:
    """Penalty of every row `(B, H, T)` of every layer around its aim `(B or 1, H, T)`."""
    per_head = []
    for entropy, aim in zip(layers, aims):
        penalty = _outside_margin(entropy - aim, margin)
        per_head.append(penalty.sum(dim=(0, 2)) if reduction == "sum" else penalty.mean(dim=(0, 2)))
    return torch.stack(per_head).mean(dim=1).mean()


def _penalty_of_heads(layers: Sequence[Tensor], aims: Tensor, margin: Tensor) -> Tensor:
    """Penalty of every head's mean over batch and rows around its aim `(L, H)`."""
    mean_entropy = torch.stack([e.mean(dim=(0, 2)) for e in layers])
    return _outside_margin(mean_entropy - aims, margin).mean(dim=1).mean()


def _outside_margin(deviation: Tensor, margin: Tensor) -> Tensor:
    """Square of `deviation`, zero within `margin`; the gradient is zero there too."""
    return torch.where(deviation.abs() > margin, deviation, torch.zeros_like(deviation)).square()


class EntropyRegularizer(nn.Module):
    """The entropy regulariser of Algorithm 1 with thresholds that are learned, of any model's row entropies.

    Called with the entropies of a forward pass, for example the `rows` of `record_entropy(model, keep_rows=True,
    gradients=True)`, it returns L_entropy, a scalar in nats squared, to be weighted with lambda and added to the loss.
    Its parameters have to be given to the optimizer.

    Args:
        num_layers: L, layers whose entropies it is given.
        num_heads: H, heads of each.
        margin: gamma, a fraction of the maximum entropy within which nothing is penalised; from 0 to below 1.
        granularity: "query" penalises every row, "head" the mean of every head; see `entropy_penalty`.
        max_entropy: "context" or "causal", the entropy that thresholds are fractions of; see `maximum_entropy`.
        reduction: "sum" or "mean" over rows, with "query".
        threshold_init: where theta starts; the paper does not say, learned values end between 0.20 and 0.52.

    Attributes:
        threshold: theta `(L, H)`, the learned fractions of the maximum entropy, a parameter (`reg_threshold_weights` in
            the authors' code).

    Raises:
        ValueError: an option that is none of those named, or a margin out of range.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        margin: float = 0.2,
        granularity: Granularity = "query",
        max_entropy: MaxEntropy = "context",
        reduction: Reduction = "sum",
        threshold_init: float = 0.5,
    ) -> None:
        super().__init__()
        if granularity not in ("query", "head"):
            raise ValueError(f"granularity must be 'query' or 'head', got {granularity!r}")
        if max_entropy not in ("context", "causal"):
            raise ValueError(f"max_entropy must be 'context' or 'causal', got {max_entropy!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        if not 0.0 <= margin < 1.0:
            raise ValueError(f"margin is a fraction of the maximum entropy in [0, 1), got {margin}")
        self.margin, self.granularity = margin, granularity
        self.max_entropy, self.reduction = max_entropy, reduction
        self.threshold_init = threshold_init
        self.threshold = nn.Parameter(torch.full((num_layers, num_heads), threshold_init))

    def forward(self, entropies: Tensor | Sequence[Tensor]) -> Tensor:
        """L_entropy, a scalar in nats squared, of `entropies` `(L, B, H, T)` in nats, or L tensors `(B, H, T)`.

        Raises:
            ValueError: entropies of other numbers of layers or heads than the thresholds have.
        """
        return entropy_penalty(
            entropies,
            self.threshold,
            margin=self.margin,
            granularity=self.granularity,
            max_entropy=self.max_entropy,
            reduction=self.reduction,
        )
