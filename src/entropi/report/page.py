"""Run folders in, one HTML page out that holds everything it shows and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import markupsafe

from entropi import record_files
from entropi.bounds import causal_maximum
from entropi.errors import UserError
from entropi.records import CountRecord, DiagnosisRecord, Evaluation, Record
from entropi.report import figures
from entropi.report.folder import Run, frames, read_run
from entropi.report.formatting import (
    PAPER,
    counted,
    duration,
    heads,
    number,
    pattern_in_words,
    percent,
    quote,
    rounded,
    sentence,
    size,
    visible,
)
from entropi.report.heads import cells, explorer, in_script, scale_top

MAX_PAGE_BYTES = 5_000_000
# Dots per inch of figures, and moments of a training to slide through: many runs share the page's size.
RESOLUTIONS = ((110, 100), (80, 60), (55, 30), (40, 10))
MAX_CELLS_WITH_NUMBERS = 200  # a run; with more heads than that, a number has no room in its cell

T = TypeVar("T")


@dataclass
class Panel:
    """A figure of the page."""

    title: str
    note: str  # what the reader sees under the figure
    alt: str
    uri: str


@dataclass
class Column:
    """A column of the table that compares runs; None is a cell whose run has no such record."""

    title: str
    cell: Callable[[Run], list[str] | None]  # lines of text
    text: bool = False  # no number


def write_report(runs: list[Path], output: Path) -> Path:
    """Write one self-contained HTML page about run folders, and return where it is.

    Args:
        runs: folders with `records.jsonl` and, as far as there are any, `config.yaml` and `environment.json`.
        output: the file to write; a folder is taken to mean `report.html` in it.

    The page stays below 5 MB: with many runs, figures are drawn at a lower resolution. It holds the prompts
    and answers of private runs in the clear.

    Raises:
        UserError: no run, a folder that is none, damaged records, or a file that cannot be written.
    """
    if not runs:
        raise UserError("a report needs at least one run folder")
    read = _with_distinct_names([read_run(Path(folder)) for folder in runs])
    for dpi, moments in RESOLUTIONS:
        page = _render(read, dpi, moments)
        if len(page) < MAX_PAGE_BYTES:
            break
    else:
        raise UserError(f"{len(runs)} runs do not fit a page of 5 MB; give fewer run folders")
    if output.is_dir():
        output = output / "report.html"
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(page)
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"cannot write the report {output}: {error.strerror}") from None
    return output


def write_diagnosis(model: Path, found: Iterable[Record], output: Path, name: str | None = None) -> Path:
    """Write the page about a model with what was just `found` about it, and return where it is.

    The page calls the model by `name`, or else by its folder's.
    What stands in `model`'s own folder, if it is a run folder, is shown as well; nothing is written there.
    An `Evaluation` among the findings counts only for a model that has none.
    """
    with tempfile.TemporaryDirectory(prefix="entropi-page-") as temporary:
        folder = Path(temporary) / (name or model.resolve().name or "model")
        folder.mkdir()
        for name in (record_files.RECORDS_FILE, "config.yaml", "environment.json"):
            if (model / name).is_file() and (model / record_files.RECORDS_FILE).is_file():
                shutil.copyfile(model / name, folder / name)
        path = folder / record_files.RECORDS_FILE
        evaluated = path.exists() and any(isinstance(record, Evaluation) for record in record_files.read(path))
        for record in found:
            if not (evaluated and isinstance(record, Evaluation)):
                record_files.append(path, record)
        return write_report([folder], output)


def _with_distinct_names(runs: list[Run]) -> list[Run]:
    """Runs of one name get their folder's name too, and a number if that is the same as well."""
    repeated = {name for name, times in Counter(run.name for run in runs).items() if times > 1}
    taken: set[str] = set()
    for run in runs:
        base = f"{run.name} ({run.folder.resolve().name})" if run.name in repeated else run.name
        numbers = itertools.count(2)
        run.name = base
        while run.name in taken:
            run.name = f"{base}, {next(numbers)}"
        taken.add(run.name)
    return runs


# Figures


def _panel(title: str, figure: Any, alt: str, note: str, dpi: float) -> Panel:
    return Panel(title, note, alt, figures.to_data_uri(figure, dpi))


def _last(items: Iterable[T | None]) -> T | None:
    return next((item for item in reversed(list(items)) if item is not None), None)


def _layerwise(run: Run, dpi: float) -> Panel | None:
    title = "Layerwise entropy during training"
    if not run.snapshots:
        return None
    context = run.started.context_length if run.started is not None else None
    first, last = run.snapshots[0], run.snapshots[-1]
    ends = ", ".join(
        f"layer {layer} {number(float(mean))}" for layer, mean in enumerate(figures.mean_over_heads(last.entropy))
    )
    alt = f"Mean entropy of each layer of {run.name} from step {first.step:,} to {last.step:,}; at the end {ends} nats."
    note = "Mean over the heads of a layer on training batches."
    if context is not None and context > 1:
        ceiling = causal_maximum(context)
        note += f" Dashed: {ceiling:.2f} nats, the most that a causal mask over {context:,} tokens allows."
    return _panel(title, figures.layerwise_entropy(run.snapshots, context), alt, note, dpi)


def _thresholds(run: Run, dpi: float) -> Panel | None:
    title = "Learned entropy thresholds"
    latest = _last(snapshot if snapshot.threshold is not None else None for snapshot in run.snapshots)
    if latest is None or latest.threshold is None:
        return None
    finite = [value for row in latest.threshold for value in row if math.isfinite(value)]
    span = f"between {min(finite):.2f} and {max(finite):.2f}" if finite else "not finite"
    alt = f"Heatmap of the thresholds of {run.name} by layer and head, {span}, and their mean by layer."
    note = f"Step {latest.step:,}: the share of the maximum entropy that each head has learned to aim for, {span}."
    return _panel(title, figures.thresholds(latest.threshold), alt, note, dpi)


def _gates(run: Run, dpi: float) -> Panel | None:
    if not run.tapers:
        return None
    last = run.tapers[-1]
    leave = ", ".join(last.gates)
    alt = f"Gates of {run.name} over steps, one line each for {leave}; at step {last.step:,} the stage is {last.stage}."
    teacher = run.started.teacher if run.started is not None else ""
    note = f"The teacher is {teacher}, and what leaves it {leave}. Gates are means over layers: 1 is before, 0 after."
    return _panel("What leaves the teacher", figures.taper_gates(run.tapers), alt, note, dpi)


def _distances(run: Run, dpi: float) -> Panel | None:
    if not run.tapers:
        return None
    last = run.tapers[-1]
    most = max((value for row in last.distance for value in row if math.isfinite(value)), default=math.nan)
    alt = (
        f"Heatmap of the distance of the entropies of {run.name} from its teacher's by head; the largest is {most:.2f}."
    )
    note = (
        f"Step {last.step:,}: mean over rows of the difference of entropies on the same text, at most {number(most)} "
        f"nats. The next token's distribution is {number(last.divergence, 3)} nats from the teacher's."
    )
    return _panel("Entropies, from the teacher's", figures.entropy_distance(last.distance), alt, note, dpi)


def _loss(run: Run, dpi: float) -> Panel | None:
    return _losses([run], dpi)


def _losses(runs: Sequence[Run], dpi: float) -> Panel | None:
    title = "Loss" if len(runs) == 1 else "Loss of all runs"
    runs = [run for run in runs if max(len(run.steps), len(run.evaluations)) > 1]  # a dot is no curve
    if not runs:
        return None
    figure = figures.loss_curves({run.name: run.steps for run in runs}, {run.name: run.evaluations for run in runs})
    ends = []
    for run in runs:
        parts = []
        if run.steps:
            parts.append(f"training ends at {number(run.steps[-1].cross_entropy)}")
        if run.evaluation is not None:
            parts.append(f"held-out text ends at {number(run.evaluation.cross_entropy)}")
        ends.append(f"{run.name}: {', '.join(parts)}")
    note = "Cross-entropy in nats per token, without the entropy penalty."
    if any(not math.isfinite(step.cross_entropy) for run in runs for step in run.steps):
        note += " Gaps are steps whose loss was not finite."
    return _panel(title, figure, f"Cross-entropy over training steps. {'; '.join(ends)}.", note, dpi)


def _positions(run: Run, dpi: float) -> Panel | None:
    title = "Entropy by position"
    if run.pattern is None:
        return None
    pattern = run.pattern
    numbers = pattern.layers or range(len(pattern.entropy_by_position))
    ends = ", ".join(f"layer {layer} {number(row[-1])}" for layer, row in zip(numbers, pattern.entropy_by_position))
    alt = f"Mean entropy of each layer of {run.name} by position in the sequence; at its end {ends} nats."
    note = (
        f"Mean over the heads of a layer, {pattern.sequences} held-out sequences of {pattern.context_length:,} tokens. "
        "Dashed: the most a causal mask allows, which grows with the position; a layer that follows it attends evenly."
    )
    return _panel(title, figures.entropy_by_position(pattern), alt, note, dpi)


def _folding(run: Run, dpi: float) -> Panel | None:
    title = "Before and after folding"
    if run.cost is None or run.folded_cost is None:
        return None
    before, after = run.cost, run.folded_cost
    alt = (
        f"Bars of {run.name} before and after folding: feed-forward FLOPs {rounded(before.ffn_flops)} and "
        f"{rounded(after.ffn_flops)}, parameters {rounded(before.parameters)} and {rounded(after.parameters)}."
    )
    note = (
        "What was trained, and what private inference computes if every layer folds. Folding merges what is linear; it "
        "holds embedding and head as two matrices and every matrix with a bias, so the numbers held may grow."
    )
    return _panel(title, figures.folding(before, after), alt, note, dpi)


def _prediction(run: Run, dpi: float) -> Panel | None:
    title = "Predicted private inference"
    record = run.prediction
    if record is None:
        return None
    prompt = record.prompt
    whole, top = size(round(prompt.bytes)), next(iter(prompt.by_operation().values()))
    alt = f"Bars of predicted bytes by operation; the longest is {top.name} with {size(round(top.bytes))} of {whole}."
    note = (
        f"Not run: {record.tokens_in_words} under {record.protocol} ({record.trust}), {record.embedding} token table, "
        f"{record.kernel}. {whole}, {rounded(prompt.messages)} messages, "
        f"{rounded(prompt.rounds)} rounds (message latencies, one way); with the network {record.network} "
        f"{duration(prompt.latency)}, of which computing {duration(prompt.seconds)} by the prices of "
        f"{record.calibrated_on}."
    )
    if record.further is not None:
        note += f" Each further token {size(round(record.further.bytes))} and {duration(record.further.latency)}."
    if (batch := record.batch) is not None and batch.tokens_a_minute:
        note += (
            f" {batch.prompts} prompts that share their passes make {batch.tokens_a_minute:.3g} tokens a minute, "
            f"one at a time {record.tokens_a_minute:.3g}."
        )
    alone = run.private is not None and run.private.batch_prompts == 1
    if run.private is not None and alone and len(run.private.prompt_tokens) == record.seq_len:
        metered = sum(stage.bytes for stage in run.private.stages if stage.token == 0)
        note += f" The run below metered {size(metered)} for its prompt of as many tokens."
    return _panel(title, figures.predicted_bytes({run.name: record}), alt, note, dpi)


def _pareto(runs: Sequence[Run], dpi: float) -> Panel | None:
    title = "Cost against perplexity"
    kernels: dict[str, str] = {}  # that stand for the softmax in these costs
    evaluated = [run for run in runs if run.evaluation is not None]
    asked = [run for run in evaluated if run.private is not None and run.private.new_tokens]
    counted = [run for run in evaluated if run.cost is not None]
    predicted = [run for run in evaluated if run.prediction is not None]
    if len(asked) >= 2:
        label = "private inference, both directions (MB a generated token)"
        kernels = {run.name: run.private.kernel_label for run in asked if run.private is not None}
        cost = {run.name: run.private_bytes / 1e6 / run.private.all_new_tokens for run in asked if run.private}
        chosen = asked
    elif len(predicted) >= 2:
        label = "private inference of a prompt, predicted (MB)"
        kernels = {run.name: run.prediction.kernel_label for run in predicted if run.prediction is not None}
        cost = {run.name: run.prediction.prompt.bytes / 1e6 for run in predicted if run.prediction is not None}
        chosen = predicted
    elif len(counted) >= 2:
        label = "one forward pass after folding (FLOPs)"
        records_of = {run.name: run.folded_cost or run.cost for run in counted}
        if not all(run.folded_cost for run in counted):
            label = "one forward pass (FLOPs)"
            records_of = {run.name: run.cost for run in counted}
        cost = {name: float(c.ffn_flops + c.attention_flops) for name, c in records_of.items() if c is not None}
        chosen = counted
    else:
        return None
    points = {run.name: (cost[run.name], run.evaluation.perplexity) for run in chosen if run.evaluation is not None}
    texts = (
        f"{name}: {figures.quantity(x)} and perplexity {number(y)}" + (f", {kernels[name]}" if kernels else "")
        for name, (x, y) in points.items()
    )
    note = "Filled: no other run is both cheaper and better. Perplexities compare only on the same text and tokenizer."
    if any(run.name not in points for run in runs):
        note += " Runs without both figures are left out."
    alt = f"{label} against perplexity. {'; '.join(texts)}."
    return _panel(title, figures.pareto(points, label, kernels), alt, note, dpi)


def _sweep(runs: Sequence[Run], dpi: float) -> Panel | None:
    """Runs that differ in gamma alone, as far as their names tell."""
    swept: dict[float, Run] = {run.margin: run for run in runs if run.margin is not None and run.diagnosis is not None}
    if len(swept) < 2 or len({run.started.name for run in swept.values() if run.started}) > 1:
        return None
    shares = {margin: run.diagnosis.quartile_shares for margin, run in swept.items() if run.diagnosis}
    perplexity = {margin: run.evaluation.perplexity for margin, run in swept.items() if run.evaluation}
    texts = (f"γ = {m:g}: {', '.join(percent(share) for share in row)}" for m, row in sorted(shares.items()))
    return _panel(
        "The margin of the regulariser",
        figures.gamma_sweep(shares, perplexity),
        f"Shares of heads from the lowest to the highest quarter by margin. {'; '.join(texts)}.",
        "Share of heads in each quarter of M by the tolerated deviation γ (Fig. 7 of the paper).",
        dpi,
    )


def _quartiles(runs: Sequence[Run], dpi: float) -> Panel | None:
    title = "Where the heads stand"
    diagnosed = {run.name: run.diagnosis.quartile_shares for run in runs if run.diagnosis is not None}
    if not diagnosed:
        return None
    texts = (f"{name}: {', '.join(percent(share) for share in shares)}" for name, shares in diagnosed.items())
    note = (
        "Share of heads in each quarter of M, the largest entropy observed in that run (Fig. 2a of the paper). "
        "A well-behaved model keeps about 90 % of its heads between M/4 and 3M/4."
    )
    alt = f"Shares of heads from the lowest to the highest quarter. {'; '.join(texts)}."
    return _panel(title, figures.quartile_shares(diagnosed), alt, note, dpi)


def _bytes(run: Run, dpi: float) -> Panel | None:
    title = "Bytes by operation"
    if run.private is None or not run.private.stages:
        return None
    top = run.operations[0]
    whole = size(run.staged.bytes)
    alt = f"Bars of bytes by operation; the longest is {top.name} with {size(top.total.bytes)} of {whole}."
    note = f"Sent and received by the client, summed over layers; {run.private.kernel}."
    return _panel(title, figures.bytes_per_operation(run.private.stages), alt, note, dpi)


# The page


def _columns(runs: Sequence[Run]) -> list[Column]:
    """Those columns of the comparison that any of `runs` has something for."""
    columns = [
        Column("Architecture", lambda run: [run.architecture] if run.architecture else None, text=True),
        Column("Parameters", lambda run: None if run.parameters is None else [number(run.parameters)]),
        Column("Held-out nats per token", lambda run: [number(e.cross_entropy, 3)] if (e := run.evaluation) else None),
        Column("Perplexity", lambda run: [number(e.perplexity)] if (e := run.evaluation) else None),
        Column("Nonlinear operations", _operations, text=True),
        Column("FLOPs FFN / attention", lambda run: [_flops(run.cost)] if run.cost else None),
        Column("Heads by quarter of M (%)", lambda run: [_quarters(run.diagnosis)] if run.diagnosis else None),
        Column("Overloaded / collapsed heads", lambda run: [_outliers(run.diagnosis)] if run.diagnosis else None),
    ]
    return [column for column in columns if any(column.cell(run) is not None for run in runs)]


def _operations(run: Run) -> list[str] | None:
    if run.cost is None:
        return None
    found = [f"{item.operation} {number(item.count)} × {item.shape[0]}×{item.shape[1]}" for item in run.cost.nonlinear]
    return found or ["none"]


def _flops(cost: CountRecord) -> str:
    return f"{rounded(cost.ffn_flops)} / {rounded(cost.attention_flops)}"


def _quarters(diagnosis: DiagnosisRecord) -> str:
    return " / ".join(number(100 * share, 0) for share in diagnosis.quartile_shares)


def _outliers(diagnosis: DiagnosisRecord) -> str:
    return f"{len(diagnosis.overloaded)} / {len(diagnosis.collapsed)}"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # prompts, answers and names come from anywhere
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, rounded, size, duration, percent, heads, quote, visible, sentence, pattern_in_words, counted)
    environment.filters["causal_maximum"] = causal_maximum
    environment.filters.update({function.__name__: function for function in filters})
    return environment


def _render(runs: Sequence[Run], dpi: float, moments: int) -> bytes:
    explored = explorer(runs, moments)
    top = scale_top(runs)
    contexts = sorted({context for run in runs if (context := run.context_length)})
    several = len(runs) > 1
    private_runs = [run for run in runs if run.private is not None]
    drawings = (_loss, _layerwise, _positions, _thresholds, _gates, _distances)
    parts: dict[str, Any] = {
        "cells": [cells(run, explored["colours"], top) for run in runs],
        "columns": _columns(runs),
        "panels": [[panel for draw in drawings if (panel := draw(run, dpi)) is not None] for run in runs],
        "folding": [_folding(run, dpi) for run in runs],
        "predictions": [_prediction(run, dpi) for run in runs],
        "traffic": [_bytes(run, dpi) for run in private_runs],
        "quartiles": _quartiles(runs, dpi),
        "losses": _losses(runs, dpi) if several else None,
        "pareto": _pareto(runs, dpi) if several else None,
        "sweep": _sweep(runs, dpi),
    }

    trained = any(run.started or run.steps for run in runs)
    entropies = any(run.diagnosis or run.snapshots for run in runs)
    sections = {
        "summary": "Summary",
        "heads": "Every head" if any(parts["cells"]) else "",
        "comparison": ("Comparison" if several else "In numbers") if parts["columns"] else "",
        "runs": ("Entropy and training" if entropies and trained else "Training" if trained else "Entropy")
        if trained or any(run.diagnosis for run in runs) or any(parts["panels"])
        else "",
        "private": "Private inference" if private_runs else "",
        "cost": "Cost counts" if any(run.cost for run in runs) or any(parts["predictions"]) else "",
        "settings": "Settings and reproduction" if any(r.command or r.config or r.environment for r in runs) else "",
    }
    shown = [(anchor, title) for anchor, title in sections.items() if title]

    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            **parts,
            runs=runs,
            private_runs=private_runs,
            sections=shown,
            anchors=[anchor for anchor, _ in shown],
            titles=sections,
            paper=PAPER,
            labels=[found[-1].label if (found := frames(run)) else "" for run in runs],
            top=top,
            ceilings=[(context, causal_maximum(context)) for context in contexts],
            dense=MAX_CELLS_WITH_NUMBERS,
            script=markupsafe.Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
            data=markupsafe.Markup(in_script(explored)),
        )
    )
    return page.encode("utf-8", errors="replace")
