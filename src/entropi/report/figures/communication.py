"""What private inference sends, measured and predicted, and what it buys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from entropi.records import (
    CountRecord,
    PredictionRecord,
    StageCommunication,
)
from entropi.report.communication import by_operation
from entropi.report.figures.drawing import PALETTE, short_name, styled


@styled
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
            f"{short_name(name)}\n{kernels[name]}" if shared and name in kernels else short_name(name),
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


@styled
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


@styled
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
    axes.set_yticks(rows, [short_name(operation.name) for operation in operations])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * ((prompt + further).max(initial=0.0) or 1.0))  # room for the labels
    axes.set_xlabel("sent and received (MB)")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8.5)
    return figure


@styled
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
        label = f"{short_name(name)}, {total:,.0f} MB, {predictions[name].kernel_label}"
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
    axes.set_yticks(places, [short_name(operation) for operation in operations])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("predicted, both directions (MB)")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8.5)
    return figure
