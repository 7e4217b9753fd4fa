"""Entropies by layer, head and position, and the thresholds of the regulariser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from entropi.bounds import causal_maximum
from entropi.errors import UserError
from entropi.records import (
    AttentionPattern,
    EntropySnapshot,
)
from entropi.report.figures.drawing import MAX_LABELLED_LINES, MISSING, PALETTE, is_dark, short_name, styled

MAX_CELLS_WITH_NUMBERS = 200


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
            ink = "white" if finite and is_dark(cmap(image.norm(value))) else "black"
            text = f"{value:.2f}" if finite else "n/a"
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    bar = axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)
    if mark is not None:
        bar.ax.axhline(mark, color="black", linewidth=1.5)


def _heatmap_height(layers: int) -> float:
    return min(1.5 + 0.3 * max(layers, 4), 8.0)


@styled
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
    axes.set_title(short_name(title))
    return figure


@styled
def entropy_distance(distance: Sequence[Sequence[float]]) -> Figure:
    """How far the row entropies of every head are from the teacher's, mean over rows, `(L, H)` in nats."""
    values = grid(distance, "distance")
    top = float(values[np.isfinite(values)].max(initial=0.0)) or 1.0
    figure = Figure(figsize=(max(6.0, 1.6 + 0.5 * min(values.shape[1], 16)), _heatmap_height(len(values))))
    figure.set_layout_engine("constrained")
    _cells(figure.add_subplot(), values, 0.0, top, "distance from the teacher (nats)")
    return figure


@styled
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


@styled
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


def stacked_quarters(axes: Any, rows: Sequence[Sequence[float]], *, upright: bool, unit: str) -> None:
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
                ink = "white" if is_dark(colour) else "black"
                axes.text(x, y, f"{length:.0f}{unit}", ha="center", va="center", color=ink, fontsize=8.5)
        ends += lengths

    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8.5)


@styled
def quartile_shares(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Share of heads in each quarter of the largest observed entropy M, one bar a run (Fig. 2a and 7).

    `shares` maps a run's name to the four shares between 0 and 1 that a diagnosis holds.
    """
    figure = Figure(figsize=(7.2, 1.2 + 0.42 * max(len(shares), 1)), layout="constrained")
    axes = figure.add_subplot()
    stacked_quarters(axes, list(shares.values()), upright=False, unit=" %")

    axes.set_yticks(np.arange(len(shares)), [short_name(name) for name in shares])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of heads (%)")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


@styled
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
