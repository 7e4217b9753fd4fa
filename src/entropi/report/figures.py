"""Records and matrices in, matplotlib figures out; no global state of pyplot, no window.

Entropies are in nats. Layers and heads are counted from 0, layers by the model's own numbers where it has some without
attention. A number that is not finite leaves a gap and never an exception; a matrix that is empty, or ragged where
layers cannot differ, is a `UserError`.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from PIL import Image

from entropi.bounds import causal_maximum
from entropi.errors import UserError
from entropi.records import (
    AttentionPattern,
    CountRecord,
    EntropySnapshot,
    Evaluation,
    PredictionRecord,
    StageCommunication,
    TrainingStep,
)
from entropi.report.communication import by_operation

# Okabe and Ito's colours, told apart by colour-blind readers; their yellow is left out as too pale for white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")  # once the colours are used up
MISSING = "#d0d0d0"
MAX_CELLS_WITH_NUMBERS = 200
MAX_LABELLED_LINES = 12
MAX_NAME = 40

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.color": "#222222",
    "text.parse_math": False,  # a run may be called "$x"
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}

P = ParamSpec("P")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under our style whatever the user's matplotlibrc says, and leave theirs as it was."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return wrapper


def grid(values: Sequence[Sequence[float]], what: str = "the matrix", *, ragged: bool = False) -> np.ndarray:
    """`values` as a float array `(L, H)`; `UserError` if it is empty or its rows differ in length.

    With `ragged` they may differ: shorter rows are filled up with NaN. None may be empty.
    """
    widths = {len(row) for row in values}
    if not widths or 0 in widths or (len(widths) > 1 and not ragged):
        raise UserError(f"{what} must have one row a layer and one column a head, but has rows of {sorted(widths)}")
    result = np.full((len(values), max(widths)), np.nan)
    for filled, row in zip(result, values):
        filled[: len(row)] = row
    return result


def mean_over_heads(values: Sequence[Sequence[float]]) -> np.ndarray:
    """`(L, H)` -> `(L,)`; heads that are not finite are left out, a layer without any other is NaN."""
    return np.ma.masked_invalid(grid(values, ragged=True)).mean(axis=1).filled(np.nan)


def _name(text: str) -> str:
    """A run's name as a label: short, on one line, and not starting with the "_" that legends leave out."""
    text = " ".join(text.split())
    text = text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"
    return " " + text if text.startswith("_") else text


def _dark(colour: Any) -> bool:
    """Whether white reads better on it than black: relative luminance as the Web Content Guidelines 2.2 define it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.179


def _numbers(rows: int, layers: Sequence[int] | None) -> FuncFormatter:
    """The labels of an axis with a place a row: the layers' own numbers."""
    numbers = layers or range(rows)
    return FuncFormatter(lambda place, _: str(numbers[int(place)]) if place in range(rows) else "")


def _cells(
    axes: Any,
    values: np.ndarray,
    low: float,
    high: float,
    label: str,
    numbers: Sequence[int] | None = None,
    widths: Sequence[int] | None = None,
    mark: float | None = None,
) -> None:
    """A heatmap with layers downwards and heads to the right, and numbers where they fit.

    `numbers` are those of the layers, `widths` how many heads each has, where they differ. `mark` is a value that gets
    a line across the colour scale.
    """
    layers, heads = values.shape
    widths = widths or [heads] * layers
    cmap = matplotlib.colormaps["cividis"].with_extremes(bad=MISSING)
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=cmap, vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(min(heads, 16), integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(min(layers, 16), integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(_numbers(layers, numbers))
    axes.set_xlim(-0.5, heads - 0.5)
    axes.set_ylim(layers - 0.5, -0.5)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for row, width in enumerate(widths):
        if width < heads:  # no such heads, which is not the same as an entropy that is not finite
            blank = Rectangle((width - 0.5, row - 0.5), heads - width, 1, facecolor="white", edgecolor="none")
            axes.add_patch(blank)
    if values.size <= MAX_CELLS_WITH_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if column >= widths[row]:
                continue
            finite = math.isfinite(value)
            ink = "white" if finite and _dark(cmap(image.norm(value))) else "black"
            text = f"{value:.2f}" if finite else "n/a"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    bar = axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)
    if mark is not None:
        bar.ax.axhline(mark, color="black", linewidth=1.5)


def _heatmap_height(layers: int) -> float:
    return min(1.5 + 0.3 * max(layers, 4), 8.0)


@_styled
def entropy_heatmap(
    entropy: Sequence[Sequence[float]],
    max_possible: float,
    title: str = "",
    layers: Sequence[int] | None = None,
    context_length: int | None = None,
) -> Figure:
    """Mean entropy of every head, `(L, H)` in nats, on the fixed scale 0 to `max_possible` (Fig. 3).

    Rows may differ in length. `layers` are the model's numbers of the rows' layers, by default 0 to L-1. With a context
    length the largest mean that a causal mask allows is marked on the scale, which no causal head exceeds.
    """
    values = grid(entropy, "entropy", ragged=True)
    if not (math.isfinite(max_possible) and max_possible > 0):
        max_possible = float(values[np.isfinite(values)].max(initial=1.0))
    figure = Figure(figsize=(max(6.0, 1.6 + 0.5 * min(values.shape[1], 16)), _heatmap_height(len(values))))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    ceiling = causal_maximum(context_length) if context_length is not None and context_length > 1 else None
    label = "mean entropy (nats)" + (f"\nline: causal maximum, {ceiling:.2f}" if ceiling is not None else "")
    _cells(axes, values, 0.0, max_possible, label, layers, [len(row) for row in entropy], ceiling)
    axes.set_title(_name(title))
    return figure


@_styled
def layerwise_entropy(snapshots: Sequence[EntropySnapshot], context_length: int | None = None) -> Figure:
    """Mean over heads of the entropy, one line a layer over training steps (Fig. 5 and 8).

    With a context length, the ceiling that a causal mask sets is drawn too.
    """
    figure = Figure(figsize=(6.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("training step")
    axes.set_ylabel("mean entropy (nats)")
    axes.grid(axis="y")
    means = [mean_over_heads(snapshot.entropy) for snapshot in snapshots]
    if len({len(mean) for mean in means}) != 1:
        raise UserError("entropy snapshots must all have the same number of layers, and there must be one")
    steps = [snapshot.step for snapshot in snapshots]
    ceiling = None
    if context_length is not None and context_length > 1:
        ceiling = np.full(len(steps), causal_maximum(context_length))
    _lines_by_layer(axes, steps, np.stack(means, axis=1), ceiling)
    return figure


def _lines_by_layer(
    axes: Any,
    x: Sequence[int],
    series: np.ndarray,
    ceiling: np.ndarray | None,
    numbers: Sequence[int] | None = None,
) -> None:
    """A line a layer of `series` `(L, len(x))` nats, told apart by a legend or, where they are many, by a scale."""
    layers = len(series)
    numbers = numbers or range(layers)
    cmap = matplotlib.colormaps["viridis"]
    marker = "o" if len(x) <= 12 else ""
    for layer, values in enumerate(series):
        colour = cmap(0.9 * layer / max(layers - 1, 1))  # the last tenth is too pale for white
        axes.plot(x, values, color=colour, marker=marker, markersize=3.5, label=f"layer {numbers[layer]}")
    top = float(series[np.isfinite(series)].max(initial=0.0))
    if ceiling is not None:
        top = max(top, float(ceiling.max()))
        if len(x) == 1 or (ceiling == ceiling[0]).all():
            axes.axhline(ceiling[0], color="#777777", linewidth=1, linestyle=(0, (4, 3)), label="causal maximum")
        else:
            axes.plot(x, ceiling, color="#777777", linewidth=1, linestyle=(0, (4, 3)), label="causal maximum")
    axes.set_ylim(0, 1.05 * top or 1.0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
    if layers <= MAX_LABELLED_LINES:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
    else:
        shades = matplotlib.colors.ListedColormap([cmap(0.9 * i / (layers - 1)) for i in range(layers)])
        norm = matplotlib.colors.Normalize(-0.5, layers - 0.5)
        scale = matplotlib.cm.ScalarMappable(norm=norm, cmap=shades)
        ticks = dict(ticks=MaxNLocator(12, integer=True), format=_numbers(layers, numbers))
        bar = axes.figure.colorbar(scale, ax=axes, label="layer", **ticks)
        bar.ax.invert_yaxis()


@_styled
def entropy_by_position(pattern: AttentionPattern) -> Figure:
    """Mean entropy of the rows at each position of a sequence, one line a layer, under a causal mask's log(i+1)."""
    values = grid(pattern.entropy_by_position, "entropy by position")
    if values.shape[1] != len(pattern.positions):
        raise UserError(f"entropy by position has {values.shape[1]} columns for {len(pattern.positions)} positions")
    figure = Figure(figsize=(6.8, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("position in the sequence (tokens)")
    axes.set_ylabel("mean entropy (nats)")
    axes.grid(axis="y")
    edges = np.array([*pattern.positions, max(pattern.context_length, pattern.positions[-1] + 1)])
    # Means over a stretch of rows, as the values are.
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, edges[-1] + 1)))])
    ceiling = (logs[edges[1:]] - logs[edges[:-1]]) / np.diff(edges)
    _lines_by_layer(axes, ((edges[1:] + edges[:-1] - 1) / 2).tolist(), values, ceiling, pattern.layers)
    return figure


QUARTERS = ("0 to M/4", "M/4 to M/2", "M/2 to 3M/4", "3M/4 to M")


def _quarter_colour(quarter: int) -> Any:
    return matplotlib.colormaps["cividis"]((0.0, 0.36, 0.7, 1.0)[quarter])


def _stacked_quarters(axes: Any, rows: Sequence[Sequence[float]], *, upright: bool, unit: str) -> None:
    """Shares between 0 and 1 of heads in each quarter of M as stacked bars, in percent, a bar a row of `rows`."""
    table = 100 * np.array([[value if math.isfinite(value) else 0.0 for value in row] for row in rows])
    ends = np.zeros(len(rows))
    for quarter, label in enumerate(QUARTERS):
        colour = _quarter_colour(quarter)
        lengths = table[:, quarter]
        draw, start = (axes.bar, "bottom") if upright else (axes.barh, "left")
        draw(np.arange(len(rows)), lengths, 0.72, color=colour, edgecolor="white", label=label, **{start: ends})
        for place, (length, end) in enumerate(zip(lengths, ends)):
            if length >= 6:  # or there is no room for a number
                middle = (place, end + length / 2)
                x, y = middle if upright else reversed(middle)
                ink = "white" if _dark(colour) else "black"
                axes.text(x, y, f"{length:.0f}{unit}", ha="center", va="center", color=ink, fontsize=8.5)
        ends += lengths

    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8.5)


@_styled
def quartile_shares(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Share of heads in each quarter of the largest observed entropy M, one bar a run (Fig. 2a and 7).

    `shares` maps a run's name to the four shares between 0 and 1 that a diagnosis holds.
    """
    figure = Figure(figsize=(7.2, 1.2 + 0.42 * max(len(shares), 1)), layout="constrained")
    axes = figure.add_subplot()
    _stacked_quarters(axes, list(shares.values()), upright=False, unit=" %")

    axes.set_yticks(np.arange(len(shares)), [_name(name) for name in shares])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of heads (%)")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


@_styled
def thresholds(threshold: Sequence[Sequence[float]]) -> Figure:
    """Learned thresholds theta `(L, H)` as fractions of E_max, with mean and spread by layer (Fig. 6)."""
    values = grid(threshold, "threshold")
    finite = np.ma.masked_invalid(values)
    low, high = (float(finite.min()), float(finite.max())) if finite.count() else (0.0, 1.0)
    if high - low < 0.05:  # untrained thresholds differ by nothing, and should look it
        low, high = low - 0.05, high + 0.05
    figure = Figure(figsize=(7.4, _heatmap_height(len(values))), layout=ConstrainedLayoutEngine(wspace=0.06))
    cells, layers = figure.subplots(1, 2, width_ratios=(2.4, 1), sharey=True)
    _cells(cells, values, low, high, "threshold θ (fraction of E_max)")
    mean, spread = finite.mean(axis=1).filled(np.nan), finite.std(axis=1).filled(np.nan)
    layers.errorbar(mean, np.arange(len(values)), xerr=spread, fmt="o", color=PALETTE[0], capsize=2.5)
    layers.set_xlabel("mean over heads ± std")
    layers.set_xlim(low, high)  # the heatmap's scale; its own would show the rounding of thresholds that are alike
    layers.xaxis.set_major_locator(MaxNLocator(3))
    layers.ticklabel_format(axis="x", useOffset=False, style="plain")
    layers.grid(axis="x")
    layers.tick_params(axis="y", labelleft=True)
    return figure


@_styled
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
    _stacked_quarters(axes, [shares[margin] for margin in margins], upright=True, unit="")

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


@_styled
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
    axes.set_yticks(np.arange(len(values)), [_name(name) for name in values])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel("held-out perplexity")
    axes.tick_params(axis="y", length=0)
    axes.grid()
    axes.set_axisbelow(True)
    return figure


@_styled
def pareto(points: Mapping[str, tuple[float, float]], cost: str, kernels: Mapping[str, str] | None = None) -> Figure:
    """Cost against held-out perplexity, a point a run, and the staircase of runs that no other beats in both.

    `points` maps a run's name to (cost, perplexity), both positive; `cost` is the axis' label with its unit. `kernels`
    are the softmax kernels that the costs are for, said once where all are the same, and else under each name.
    """
    kernels = kernels or {}
    shared = set(kernels.values()) if kernels.keys() >= points.keys() else set()
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(f"{cost}, {shared.pop()}" if len(shared) == 1 else cost)
    axes.set_ylabel("held-out perplexity")
    axes.grid()
    axes.set_axisbelow(True)
    usable = {name: pair for name, pair in points.items() if all(math.isfinite(x) and x > 0 for x in pair)}
    if not usable:
        axes.text(0.5, 0.5, "no finite value is recorded", transform=axes.transAxes, ha="center")
        return figure
    best = frontier(usable)
    steps = [usable[name] for name in best]
    axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color="#777777", linewidth=1, zorder=1)
    middle = (min(x for x, _ in usable.values()) * max(x for x, _ in usable.values())) ** 0.5
    for index, (name, (x, y)) in enumerate(usable.items()):
        beaten = name not in best
        colour = PALETTE[index % len(PALETTE)]
        face = "white" if beaten else colour
        axes.plot(x, y, "o", markersize=7, markeredgecolor=colour, markerfacecolor=face, markeredgewidth=1.6)
        right = x > middle
        axes.annotate(
            f"{_name(name)}\n{kernels[name]}" if shared and name in kernels else _name(name),
            (x, y),
            xytext=(-7 if right else 7, 6),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=8.5,
        )
    if max(x for x, _ in usable.values()) > 4 * min(x for x, _ in usable.values()):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
    axes.margins(x=0.12, y=0.16)
    return figure


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other beats in one coordinate without losing in the other, cheapest first."""
    best: list[str] = []
    for name, (_, value) in sorted(points.items(), key=lambda item: item[1]):
        if not best or value < points[best[-1]][1]:
            best.append(name)
    return best


@_styled
def folding(before: CountRecord, after: CountRecord) -> Figure:
    """What folding leaves of a model: its FLOPs, numbers held and nonlinear operations, before and after."""
    rows: dict[str, tuple[float, float]] = {
        "FLOPs, feed-forward": (before.ffn_flops, after.ffn_flops),
        "FLOPs, attention": (before.attention_flops, after.attention_flops),
        "parameters": (before.parameters, after.parameters),
    }
    for index, record in enumerate((before, after)):
        for item in record.nonlinear:
            elements = item.count * item.shape[0] * item.shape[1]
            old, new = rows.get(f"{item.operation}, elements", (0, 0))
            rows[f"{item.operation}, elements"] = (old + elements, new) if index == 0 else (old, new + elements)
    figure = Figure(figsize=(7.6, 1.4 + 0.52 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    for index, (label, colour) in enumerate((("before folding", PALETTE[4]), ("after folding", PALETTE[0]))):
        shares = [100 * pair[index] / max(*pair, 1) for pair in rows.values()]
        y = places + (index - 0.5) * 0.38
        axes.barh(y, shares, height=0.36, color=colour, label=label)
        for place, share, pair in zip(y, shares, rows.values()):
            axes.annotate(
                quantity(pair[index]),
                (share, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
    axes.set_yticks(places, list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 118)
    axes.set_xlabel("share of the larger of the two (%)")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8.5)
    return figure


def quantity(value: float) -> str:
    """12,345,678 -> "12.3 M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


@_styled
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
        dash = DASHES[index // len(PALETTE) % len(DASHES)]
        prefix = _name(name) + ", " if len(names) > 1 else ""
        taken, held_out = runs.get(name, ()), evaluations.get(name, ())
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
                label=f"{prefix}training",
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
    if not any(map(math.isfinite, drawn)):
        axes.text(0.5, 0.5, "no finite value is recorded", transform=axes.transAxes, ha="center")
    elif len(names) > 3:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        figure.set_size_inches(9.2, max(3.8, 0.8 + 0.36 * len(names)))
    else:
        axes.legend(fontsize=8.5)
    return figure


@_styled
def bytes_per_operation(stages: Iterable[StageCommunication]) -> Figure:
    """Bytes in both directions by operation, over all layers; prompt pass and further tokens told apart."""
    operations = by_operation(stages)
    total = sum(operation.total.bytes for operation in operations)
    figure = Figure(figsize=(7.6, 1.5 + 0.3 * max(len(operations), 1)), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(operations))
    prompt = np.array([operation.prompt.bytes / 1e6 for operation in operations])
    further = np.array([operation.further.bytes / 1e6 for operation in operations])
    axes.barh(rows, prompt, height=0.7, color=PALETTE[0], label="pass over the prompt")
    axes.barh(rows, further, left=prompt, height=0.7, color=PALETTE[5], label="further tokens")
    for row, operation in enumerate(operations):
        size = operation.total.bytes / 1e6
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
        share = f" ({100 * operation.total.bytes / total:.1f} %)" if total else ""
        axes.annotate(
            f"{size:,.{digits}f} MB{share}",
            (prompt[row] + further[row], row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(rows, [_name(operation.name) for operation in operations])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * ((prompt + further).max(initial=0.0) or 1.0))  # room for the labels
    axes.set_xlabel("sent and received (MB)")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8.5)
    return figure


@_styled
def predicted_bytes(predictions: Mapping[str, PredictionRecord]) -> Figure:
    """Predicted bytes of the pass over a prompt by operation, a group of bars an operation, a colour a model."""
    sums = {name: record.prompt.by_operation() for name, record in predictions.items()}
    operations = sorted(
        {name for found in sums.values() for name in found},
        key=lambda name: -max(found[name].bytes for found in sums.values() if name in found),
    )
    figure = Figure(figsize=(7.6, 1.5 + 0.22 * max(len(operations) * len(sums), 3)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(operations))
    height = 0.8 / len(sums)
    for index, (name, found) in enumerate(sums.items()):
        sizes = [found[operation].bytes / 1e6 if operation in found else 0.0 for operation in operations]
        y = places + (index - (len(sums) - 1) / 2) * height
        total = sum(sizes)
        label = f"{_name(name)}, {total:,.0f} MB, {predictions[name].kernel_label}"
        axes.barh(y, sizes, height=0.92 * height, color=PALETTE[index % len(PALETTE)], label=label)
        for place, size in zip(y, sizes):
            if size:
                axes.annotate(
                    f"{size:,.{0 if size >= 100 else 1}f}",
                    (size, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
    axes.set_yticks(places, [_name(operation) for operation in operations])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("predicted, both directions (MB)")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8.5)
    return figure


def ink_on(colour: str) -> str:
    """Black or white, whichever is read better on `colour`."""
    return "#ffffff" if _dark(matplotlib.colors.to_rgb(colour)) else "#000000"


def colour_scale(steps: int = 64) -> list[str]:
    """The heatmaps' colours from low to high as "#rrggbb"; each step is lighter than the one before it."""
    cmap = matplotlib.colormaps["cividis"]
    return [matplotlib.colors.to_hex(cmap(i / (steps - 1))) for i in range(steps)]


def _save(figure: Figure, file: Any, kind: str, dpi: float) -> None:
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # The same figure is the same file, whenever it is drawn.
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": "entropi"})
        figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)


def write_figure(figure: Figure, path: Path | str, dpi: float = 150) -> None:
    """Write a figure as PNG, or as SVG where the file's name ends so."""
    path = Path(path)
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    buffer = io.BytesIO()
    _save(figure, buffer, kind, dpi)
    path.write_bytes(buffer.getvalue())


def to_data_uri(figure: Figure, dpi: float = 110) -> str:
    """A figure as a `data:` URI, a PNG that an HTML page can hold."""
    buffer = io.BytesIO()
    _save(figure, buffer, "png", dpi)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def to_pixels(figure: Figure, dpi: float = 80) -> np.ndarray:
    """A figure as pixels `(height, width, 3)`, uint8, for a live view."""
    buffer = io.BytesIO()
    _save(figure, buffer, "png", dpi)
    with Image.open(buffer) as picture:
        return np.asarray(picture.convert("RGB"))
