"""Entropic overload and entropy collapse read off the mean entropies of the heads (section 3, Fig. 2a)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entropi.bounds import causal_maximum

# The paper's well-behaved baseline keeps about 90 % of its heads between M/4 and 3M/4; the overloaded models it
# names have 23 % (SM+R), 45 % (SM) and 58 % (SM+G) in the top quarter, and the collapsing one 33 % in the bottom.
WELL_BEHAVED_SHARE = 0.90
OVERLOAD_SHARE = 0.20
COLLAPSE_SHARE = 0.20
# Where even the largest entropy is this small a part of log T, quarters of it say nothing: all heads collapsed.
NEGLIGIBLE = 0.05
# From this part of the largest possible mean on, a head attends almost evenly. Quarters of M alone do not say so: where
# all heads are alike, all are in the top quarter, whatever their entropy is.
ALMOST_EVEN = 0.90
MAX_NAMED_LAYERS = 8  # where all that have attention are meant


@dataclass(frozen=True)
class Diagnosis:
    """Where the heads of a model stand; entropies in nats, heads as (layer, head), the layer by the model's number.

    Attributes:
        entropy: the mean entropies, a row a layer that has attention, a number a head of it.
        layers: the model's number of each row's layer.
        max_observed: M, the largest of them.
        max_possible: log T; nan where the context length is not known.
        max_causal: the largest mean that a causal mask allows, about log T - 1; nan where T is not known.
        quartile_shares: of the heads in [0, M/4), [M/4, M/2), [M/2, 3M/4) and [3M/4, M]; the sum is 1 (Fig. 2a).
        overloaded: the heads of the top quarter.
        collapsed: the heads of the bottom quarter; all of them where M is below a twentieth of log T.
        verdict: the same in a sentence or two.
    """

    entropy: list[list[float]]
    layers: list[int]
    max_observed: float
    max_possible: float
    max_causal: float
    quartile_shares: tuple[float, float, float, float]
    overloaded: list[tuple[int, int]]
    collapsed: list[tuple[int, int]]
    verdict: str


def diagnose(
    entropy: Tensor | Sequence[Tensor],
    context_length: int | None = None,
    layers: Sequence[int] | None = None,
    *,
    causal: bool = True,
) -> Diagnosis:
    """Diagnose mean head entropies.

    Args:
        entropy: `(L, H)` nats, the mean over batch and query rows (Eq. 5-7); or a list of L tensors `(heads,)`, one a
            layer, where the number of heads differs between layers.
        context_length: T; lets the verdict judge M against what is possible.
        layers: the model's number of each row's layer, ascending, where not every layer has attention; by default 0
            to L-1, and these are all layers of the model.
        causal: rows see no later tokens, so that a mean is at most `max_causal`; False for encoders. A larger M says
            the same.

    Raises:
        ValueError: no matrix and no list of vectors, not finite, or layers that do not fit the rows.
    """
    if isinstance(entropy, Tensor):
        entropy = list(entropy.detach().cpu().unbind()) if entropy.dim() else [entropy]
    rows = [torch.as_tensor(row).detach().double().cpu() for row in entropy]
    if not rows or any(row.dim() != 1 or row.numel() == 0 for row in rows):
        shapes = [tuple(row.shape) for row in rows]
        raise ValueError(
            f"entropy must be a matrix (layers, heads), or a vector (heads,) a layer, got rows of shapes {shapes}"
        )
    numbers = list(range(len(rows))) if layers is None else [int(layer) for layer in layers]
    if len(numbers) != len(rows) or numbers != sorted(set(numbers)) or numbers[0] < 0:
        raise ValueError(f"layers must be {len(rows)} ascending numbers, one a row of entropy, got {numbers}")
    heads = [(layer, head) for layer, row in zip(numbers, rows) for head in range(len(row))]
    values = torch.cat(rows)
    if not bool(torch.isfinite(values).all()):
        layer, head = heads[int((~torch.isfinite(values)).nonzero()[0])]
        raise ValueError(f"the entropy of layer {layer}, head {head} is not finite: the model has diverged")
    largest = float(values.max())
    limit = math.log(context_length) if context_length else math.nan
    ceiling = causal_maximum(context_length) if context_length else math.nan
    causal = causal and not largest > ceiling * (1 + 1e-6)
    even = values >= ALMOST_EVEN * (ceiling if causal else limit)
    quarter = torch.clamp((values / max(largest, 1e-12) * 4).long(), 0, 3)
    if context_length and largest < NEGLIGIBLE * limit:
        quarter = torch.zeros_like(quarter)
    first, second, third, fourth = (float((quarter == i).double().mean()) for i in range(4))
    shares = (first, second, third, fourth)
    overloaded = [head for head, place in zip(heads, quarter.tolist()) if place == 3]
    collapsed = [head for head, place in zip(heads, quarter.tolist()) if place == 0]
    reached = _Reached(largest / limit, "log T", int(even.sum()), len(even))
    if causal:
        reached = _Reached(largest / ceiling, "what a causal mask allows", int(even.sum()), len(even))
    return Diagnosis(
        entropy=[row.tolist() for row in rows],
        layers=numbers,
        max_observed=largest,
        max_possible=limit,
        max_causal=ceiling,
        quartile_shares=shares,
        overloaded=overloaded,
        collapsed=collapsed,
        verdict=_verdict(shares, overloaded, collapsed, numbers, reached, all_layers=layers is None),
    )


@dataclass(frozen=True)
class _Reached:
    """How near the heads are to the largest mean entropy that is possible."""

    share: float  # M as a part of it; nan where it is not known
    what: str  # it, in words
    even: int  # heads that attend almost evenly
    heads: int

    def in_words(self, overload: str) -> str:
        """The sentence about heads that are in the top quarter of M."""
        if math.isnan(self.share):
            return f"Entropic overload: {overload}; without a context length, whether they attend evenly is not known."
        if self.even:
            return (
                f"Entropic overload: {overload}; {self.even} of {self.heads} heads attend almost evenly (from "
                f"{ALMOST_EVEN:.0%} of {self.what}) and are under-used."
            )
        return (
            f"{overload[0].upper()}{overload[1:]}; the paper counts that as overload, but M, the largest entropy, is "
            f"{self.share:.0%} of {self.what}: no head attends almost evenly."
        )


def _verdict(
    shares: tuple[float, ...],
    overloaded: list[tuple[int, int]],
    collapsed: list[tuple[int, int]],
    layers: list[int],
    reached: _Reached,
    *,
    all_layers: bool,
) -> str:
    def where(heads: list[tuple[int, int]]) -> str:
        touched = sorted({layer for layer, _ in heads})
        names = f"in layer{'s' if len(touched) > 1 else ''} {_listed(touched)}"
        if touched != layers:
            return names
        if all_layers:
            return "in every layer"
        if len(layers) > MAX_NAMED_LAYERS:
            return "in every layer that has attention"
        return names + {1: ", the only one that has attention", 2: ", both that have attention"}.get(
            len(layers), ", all that have attention"
        )

    sentences = []
    if shares[3] >= OVERLOAD_SHARE:
        sentences.append(
            reached.in_words(f"{shares[3]:.0%} of the heads are in the top quarter of M, {where(overloaded)}")
        )
    if shares[0] >= COLLAPSE_SHARE:
        sentences.append(
            f"Entropy collapse: {shares[0]:.0%} of the heads are in the bottom quarter, {where(collapsed)}; "
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


def _listed(numbers: Sequence[int]) -> str:
    """[1, 3, 5] -> "1, 3 and 5"."""
    *firsts, last = map(str, numbers)
    return f"{', '.join(firsts)} and {last}" if firsts else last
