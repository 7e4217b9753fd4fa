"""Run folders in, one HTML page out that holds everything it shows and asks the network for nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import yaml

from entropi import records
from entropi.errors import UserError
from entropi.records import (
    CostRecord,
    DiagnosisRecord,
    EntropySnapshot,
    Evaluation,
    PlaintextComparison,
    PrivateRun,
    Record,
    RunStarted,
    SkippedUpdate,
    TrainingStep,
)
from entropi.report import figures
from entropi.report.traffic import OperationTraffic, Traffic, by_operation, by_pass

MAX_PAGE_BYTES = 5_000_000
RESOLUTIONS = (110, 80, 55, 40)  # dots per inch; many runs share the page's size
MAX_QUOTE = 240  # characters of a prompt or an answer in the summary; the transcript has all

T = TypeVar("T")


@dataclass
class Run:
    """One run folder, read. Of kinds that are written more than once, the last record counts."""

    folder: Path
    name: str
    started: RunStarted | None = None
    steps: list[TrainingStep] = field(default_factory=list)
    snapshots: list[EntropySnapshot] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    skipped: list[SkippedUpdate] = field(default_factory=list)
    diagnosis: DiagnosisRecord | None = None
    cost: CostRecord | None = None
    private: PrivateRun | None = None
    comparison: PlaintextComparison | None = None
    config: str | None = None  # config.yaml as it stands
    environment: list[tuple[str, str]] | None = None
    command: str | None = None

    @property
    def architecture(self) -> str | None:
        if self.started is not None:
            return self.started.architecture
        return self.cost.architecture if self.cost is not None else None

    @property
    def parameters(self) -> int | None:
        if self.started is not None:
            return self.started.parameters
        return self.cost.parameters if self.cost is not None else None

    @property
    def evaluation(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def skipped_reasons(self) -> list[tuple[str, int]]:
        return Counter(update.reason for update in self.skipped).most_common()

    @property
    def operations(self) -> list[OperationTraffic]:
        return by_operation(self.private.stages) if self.private is not None else []

    @property
    def passes(self) -> list[tuple[int, Traffic]]:
        return by_pass(self.private.stages) if self.private is not None else []

    @property
    def staged(self) -> Traffic:
        """What all stages of the private run cost together."""
        return sum((operation.total for operation in self.operations), Traffic())

    @property
    def private_bytes(self) -> int:
        """All bytes of the private run: its stages, the set-up and the revealed shares."""
        return self.private.bytes if self.private is not None else 0

    @property
    def largest_logit_error(self) -> float | None:
        errors = self.comparison.max_logit_error if self.comparison is not None else []
        return next((error for error in errors if not math.isfinite(error)), max(errors, default=None))

    @property
    def agreement(self) -> list[tuple[int, int | None, int | None, float | None, bool | None]]:
        """Rows of (place, private token, plaintext token, largest logit error, same top-1)."""
        if self.private is None or self.comparison is None:
            return []
        compared = self.comparison
        columns = (
            self.private.new_tokens,
            compared.plaintext_tokens,
            compared.max_logit_error,
            compared.same_top1,
        )
        return [(place, *row) for place, row in enumerate(itertools.zip_longest(*columns), start=1)]


@dataclass
class Panel:
    """A figure of the page, or why there is none."""

    title: str
    note: str = ""  # what the reader sees under the figure
    alt: str = ""
    uri: str = ""
    missing: str = ""


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
    for dpi in RESOLUTIONS:
        page = _render(read, dpi)
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


def read_run(folder: Path) -> Run:
    """Read one run folder; `UserError` if it is none or if something in it is damaged."""
    path = folder / records.RECORDS_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {records.RECORDS_FILE}")
    run = Run(folder=folder, name=folder.resolve().name)
    for record in records.read(path):
        _check_shapes(record, path)
        match record:
            case RunStarted():
                run.started = record
                run.name = record.name.strip() or run.name
            case TrainingStep():
                run.steps.append(record)
            case EntropySnapshot():
                run.snapshots.append(record)
            case Evaluation():
                if run.evaluations and run.evaluations[-1].step == record.step:
                    run.evaluations.pop()  # a last step is measured again, on more text
                run.evaluations.append(record)
            case SkippedUpdate():
                run.skipped.append(record)
            case DiagnosisRecord():
                run.diagnosis = record
            case CostRecord():
                run.cost = record
            case PrivateRun():
                run.private = record
            case PlaintextComparison():
                run.comparison = record
    if len({len(snapshot.entropy) for snapshot in run.snapshots}) > 1:
        raise UserError(f"{path} is damaged: its entropy snapshots differ in their number of layers")
    _read_settings(run)
    return run


def _check_shapes(record: Record, path: Path) -> None:
    """Types are checked when a line is read; shapes are not."""
    for name in ("entropy", "threshold"):
        matrix = getattr(record, name, None)
        if matrix is not None:
            try:
                figures.grid(matrix, name)
            except UserError as error:
                raise UserError(f"{path} is damaged: {error}") from None
    if isinstance(record, DiagnosisRecord) and len(record.quartile_shares) != 4:
        raise UserError(f"{path} is damaged: a diagnosis has {len(record.quartile_shares)} quartile shares, not 4")


def _read_settings(run: Run) -> None:
    """`config.yaml` and `environment.json`, both allowed to be absent, and the command in either."""
    config = _parse(run.folder / "config.yaml", yaml.safe_load, yaml.YAMLError)
    environment = _parse(run.folder / "environment.json", json.loads, json.JSONDecodeError)
    if config is not None:
        run.config = config[0]
    if environment is not None:
        run.environment = [(key, text) for key, text in _flat(environment[1]) if key != "command"]
    for source in (environment, config):
        command = source[1].get("command") if source is not None and isinstance(source[1], dict) else None
        if command and run.command is None:
            run.command = shlex.join(map(str, command)) if isinstance(command, list) else str(command)


def _parse(path: Path, parse: Callable[[str], Any], damage: type[Exception]) -> tuple[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
        return text, parse(text)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, damage) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or cannot be read: {reason}") from None


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Leaves of nested dictionaries as ("outer.inner", text)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        items = value if isinstance(value, list) else [value]
        yield prefix or "value", ", ".join("none" if item is None else str(item) for item in items)


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


# Numbers in words


def number(value: float | None, digits: int = 2) -> str:
    """A number with thousands separated, or why there is none."""
    if value is None:
        return "not recorded"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def rounded(value: float) -> str:
    """1,712,345 -> "1.7 M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.1f} {unit}"
    return number(value, 0)


def size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """Seconds, and minutes where that is easier to grasp."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.1f} s" if seconds >= 0.95 else f"{1000 * seconds:.0f} ms"


def percent(part: float, whole: float = 1.0) -> str:
    """A share in percent; with nothing to share, a dash."""
    return f"{100 * part / whole:.1f} %" if whole and math.isfinite(part / whole) else "–"


def heads(pairs: Sequence[tuple[int, int]]) -> str:
    """[(0, 1), (0, 3)] -> "layer 0: heads 1, 3"."""
    if not pairs:
        return "none"
    layers = itertools.groupby(sorted(pairs), key=lambda pair: pair[0])
    texts = []
    for layer, group in layers:
        members = [str(head) for _, head in group]
        texts.append(f"layer {layer}: head{'s' if len(members) > 1 else ''} {', '.join(members)}")
    return "; ".join(texts)


def quote(text: str) -> str:
    """A text on one line, cut to a length that a sentence can bear."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_QUOTE else line[: MAX_QUOTE - 1] + "…"


def sentence(text: str) -> str:
    """The text with a full stop, if it does not end in one."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."


# Figures


def _panel(title: str, figure: Any, alt: str, note: str, dpi: float) -> Panel:
    return Panel(title, note, alt, figures.to_data_uri(figure, dpi))


def _last(items: Iterable[T | None]) -> T | None:
    return next((item for item in reversed(list(items)) if item is not None), None)


def _heatmap(run: Run, dpi: float) -> Panel:
    title = "Entropy of every head"
    context = run.started.context_length if run.started is not None else 0
    if run.diagnosis is not None:
        entropy, source = run.diagnosis.entropy, "from the diagnosis"
        context = run.diagnosis.context_length or context
    elif run.evaluation is not None:
        entropy, source = run.evaluation.entropy, f"held-out text, step {run.evaluation.step:,}"
    elif run.snapshots:
        entropy, source = run.snapshots[-1].entropy, f"training batch, step {run.snapshots[-1].step:,}"
    else:
        return Panel(title, missing="No attention entropies are recorded.")
    finite = [value for row in entropy for value in row if math.isfinite(value)]
    span = f"from {min(finite):.2f} to {max(finite):.2f} nats" if finite else "none of them finite"
    limit, scale = math.nan, "the context length T is not recorded"
    if context > 1:
        limit = math.log(context)
        ceiling = figures.causal_maximum(context)
        scale = f"the colour scale ends at log T = {limit:.2f}, of which a causal mask allows {ceiling:.2f}"
    alt = f"Heatmap of {len(entropy)} layers by {len(entropy[0])} heads of {run.name}, entropies {span}."
    note = (
        f"Mean attention entropy in nats ({source}); {scale}. Near the top a head is overloaded, near zero collapsed."
    )
    return _panel(title, figures.entropy_heatmap(entropy, limit), alt, note, dpi)


def _layerwise(run: Run, dpi: float) -> Panel:
    title = "Layerwise entropy during training"
    if not run.snapshots:
        return Panel(title, missing="No entropies were recorded during training.")
    context = run.started.context_length if run.started is not None else None
    first, last = run.snapshots[0], run.snapshots[-1]
    ends = ", ".join(
        f"layer {layer} {number(float(mean))}" for layer, mean in enumerate(figures.mean_over_heads(last.entropy))
    )
    alt = f"Mean entropy of each layer of {run.name} from step {first.step:,} to {last.step:,}; at the end {ends} nats."
    note = "Mean over the heads of a layer on training batches."
    if context is not None and context > 1:
        ceiling = figures.causal_maximum(context)
        note += f" Dashed: {ceiling:.2f} nats, the most that a causal mask over {context:,} tokens allows."
    return _panel(title, figures.layerwise_entropy(run.snapshots, context), alt, note, dpi)


def _thresholds(run: Run, dpi: float) -> Panel:
    title = "Learned entropy thresholds"
    latest = _last(snapshot if snapshot.threshold is not None else None for snapshot in run.snapshots)
    if latest is None or latest.threshold is None:
        return Panel(title, missing="No thresholds are recorded; only runs with the entropy regulariser learn them.")
    finite = [value for row in latest.threshold for value in row if math.isfinite(value)]
    span = f"between {min(finite):.2f} and {max(finite):.2f}" if finite else "not finite"
    alt = f"Heatmap of the thresholds of {run.name} by layer and head, {span}, and their mean by layer."
    note = f"Step {latest.step:,}: the share of the maximum entropy that each head has learned to aim for, {span}."
    return _panel(title, figures.thresholds(latest.threshold), alt, note, dpi)


def _losses(runs: Sequence[Run], dpi: float) -> Panel:
    title = "Loss" if len(runs) == 1 else "Loss of all runs"
    runs = [run for run in runs if run.steps or run.evaluations]
    if not runs:
        return Panel(title, missing="No training steps or evaluations are recorded.")
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


def _quartiles(runs: Sequence[Run], dpi: float) -> Panel:
    title = "Where the heads stand"
    diagnosed = {run.name: run.diagnosis.quartile_shares for run in runs if run.diagnosis is not None}
    if not diagnosed:
        return Panel(title, missing="No diagnosis is recorded in any of these runs.")
    texts = (f"{name}: {', '.join(percent(share) for share in shares)}" for name, shares in diagnosed.items())
    note = (
        "Share of heads in each quarter of M, the largest entropy observed in that run (Fig. 2a of the paper). "
        "A well-behaved model keeps about 90 % of its heads between M/4 and 3M/4."
    )
    alt = f"Shares of heads from the lowest to the highest quarter. {'; '.join(texts)}."
    return _panel(title, figures.quartile_shares(diagnosed), alt, note, dpi)


def _bytes(run: Run, dpi: float) -> Panel:
    title = "Bytes by operation"
    if run.private is None or not run.private.stages:
        return Panel(title, missing="No stages were metered in this private run.")
    top = run.operations[0]
    whole = size(run.staged.bytes)
    alt = f"Bars of bytes by operation; the longest is {top.name} with {size(top.total.bytes)} of {whole}."
    note = "Sent and received by the client, summed over layers."
    return _panel(title, figures.bytes_per_operation(run.private.stages), alt, note, dpi)


def _render(runs: Sequence[Run], dpi: float) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # prompts, answers and names come from anywhere
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = (number, rounded, size, duration, percent, heads, quote, sentence)
    environment.filters.update({function.__name__: function for function in words})
    private_runs = [run for run in runs if run.private is not None]
    page = environment.get_template("page.html.j2").render(
        runs=runs,
        panels=[[_heatmap(run, dpi), _layerwise(run, dpi), _thresholds(run, dpi), _losses([run], dpi)] for run in runs],
        private_runs=private_runs,
        traffic=[_bytes(run, dpi) for run in private_runs],
        quartiles=_quartiles(runs, dpi),
        losses=_losses(runs, dpi) if len(runs) > 1 else None,
    )
    return page.encode("utf-8", errors="replace")
