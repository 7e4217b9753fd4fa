"""Losses of runs, and what came of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from entropi.errors import UserError
from entropi.records import (
    Evaluation,
    TaperSnapshot,
    TrainingStep,
)
from entropi.report.figures.drawing import DASHES, PALETTE, short_name, styled
from entropi.report.figures.entropy import stacked_quarters

OUTLIER = 5.0  # times the median, beyond which a loss does not set the scale


@styled
def gamma_sweep(shares: Mapping[float, Sequence[float]], perplexity: Mapping[float, float] | None = None) -> Figure:
    """Share of heads in each quarter of M by the regulariser's margin gamma, and what it does to perplexity (Fig. 7).

    `shares` maps gamma to the four shares between 0 and 1 that a diagnosis holds.
    """
    if not shares:
        raise UserError("a sweep over gamma needs at least one run")
    margins = sorted(shares)
    known = {margin: value for margin, value in (perplexity or {}).items() if math.isfinite(value)}
    figure = Figure(figsize=(9.2 if known else 6.4, 3.8), layout=ConstrainedLayoutEngine(wspace=0.06))
    axes, *more = figure.subplots(1, 2 if known else 1, squeeze=False, width_ratios=(1.6, 1) if known else None)[0]
    stacked_quarters(axes, [shares[margin] for margin in margins], upright=True, unit="")

    axes.set_xticks(np.arange(len(margins)), [f"{margin:g}" for margin in margins])
    axes.set_xlabel("margin γ (share of E_max)")
    axes.set_ylabel("share of heads (%)")
    axes.set_ylim(0, 100)
    for beside in more:
        beside.plot(list(known), list(known.values()), "o", color=PALETTE[0])
        beside.plot(sorted(known), [known[margin] for margin in sorted(known)], color=PALETTE[0], linewidth=1)
        beside.set_xticks(sorted(known), [f"{margin:g}" for margin in sorted(known)])
        beside.set_xlabel("margin γ (share of E_max)")
        beside.set_ylabel("held-out perplexity")
        beside.grid(axis="y")
    return figure


@styled
def perplexity_by_row(values: Mapping[str, Sequence[float]]) -> Figure:
    """Held-out perplexity of every run of a study, a ring a seed, and the mean of each row (Tables 2, 3, 5 and 6)."""
    figure = Figure(figsize=(7.2, 1.3 + 0.36 * max(len(values), 1)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(values.values()):
        finite = [value for value in row if math.isfinite(value)]
        rings: dict[str, Any] = dict(markersize=5, markerfacecolor="none", markeredgecolor=PALETTE[0])
        axes.plot(finite, [place] * len(finite), linestyle="none", marker="o", **rings)
        if finite:
            axes.plot(np.mean(finite), place, "o", markersize=6, color=PALETTE[1])
    axes.set_yticks(np.arange(len(values)), [short_name(name) for name in values])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel("held-out perplexity")
    axes.tick_params(axis="y", length=0)
    axes.grid()
    axes.set_axisbelow(True)
    return figure


@styled
def taper_gates(snapshots: Sequence[TaperSnapshot]) -> Figure:
    """Gates of a tapering over steps, a line an operation, mean over its layers: 1 is the teacher's, 0 has left."""
    figure = Figure(figsize=(6.8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, dict[int, float]] = {}
    for snapshot in snapshots:
        for name, gates in snapshot.gates.items():
            lines.setdefault(name, {})[snapshot.step] = float(np.mean(gates))
    for index, name in enumerate(sorted(lines, key=lambda name: sum(lines[name].values()))):  # what leaves first
        style: dict[str, Any] = dict(color=PALETTE[index % len(PALETTE)], linestyle=DASHES[index % len(DASHES)])
        label = short_name(name.replace("_", " "))
        axes.plot(list(lines[name]), list(lines[name].values()), marker=".", label=label, **style)
    axes.set_xlabel("training step")
    axes.set_ylabel("gate")
    axes.set_ylim(-0.05, 1.05)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
    return figure


@styled
def loss_curves(runs: Mapping[str, Sequence[TrainingStep]], evaluations: Mapping[str, Sequence[Evaluation]]) -> Figure:
    """Cross-entropy in nats per token over steps: a line for training, points for held-out text, by run."""
    figure = Figure(figsize=(6.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("training step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.grid(axis="y")
    names = list(dict.fromkeys([*runs, *evaluations]))
    drawn: list[float] = []
    for index, name in enumerate(names):
        colour = PALETTE[index % len(PALETTE)]
        dash = DASHES[index % len(DASHES)]  # of lines that coincide both are seen
        taken, held_out = runs.get(name, ()), evaluations.get(name, ())
        what = short_name(name) if len(names) > 1 else ""
        prefix = f"{what}, " if what else ""
        if taken:
            losses = [step.cross_entropy for step in taken]
            marker = "." if len(losses) == 1 else ""
            axes.plot(
                [step.step for step in taken],
                losses,
                color=colour,
                linestyle=dash,
                marker=marker,
                linewidth=1.1,
                alpha=0.75,
                label=f"{prefix}training" if any(evaluations.values()) else what or "training",
            )
            drawn += losses
        if held_out:
            losses = [evaluation.cross_entropy for evaluation in held_out]
            axes.plot(
                [evaluation.step for evaluation in held_out],
                losses,
                color=colour if len(names) > 1 else PALETTE[1],
                linestyle="none",
                marker="o",
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                label=f"{prefix}held out",
            )
            drawn += losses
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    finite = np.array([value for value in drawn if math.isfinite(value)])
    _keep_readable(axes, finite)
    if not finite.size:
        axes.text(0.5, 0.5, "no finite value is recorded", transform=axes.transAxes, ha="center")
    elif len(names) > 3:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        figure.set_size_inches(9.2, max(3.8, 0.8 + 0.36 * len(names)))
    else:
        axes.legend(fontsize=8.5)
    return figure


def _keep_readable(axes: Any, values: np.ndarray) -> None:
    """Scale to what is no outlier and tell of the rest: beside one batch's loss of 1e14 all others are a flat line."""
    most = OUTLIER * float(np.median(values)) if values.size else math.inf
    if not (values > most).any():
        return
    shown = values[values <= most]
    space = 0.05 * (float(np.ptp(shown)) or 1.0)
    axes.set_ylim(float(shown.min()) - space, float(shown.max()) + space)
    beyond = f"{(values > most).sum()} beyond, up to {values.max():.2g}"
    axes.text(0.01, 0.02, beyond, transform=axes.transAxes, fontsize=8.5)
