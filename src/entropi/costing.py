"""What `entropi cost` shows: counts, predictions, comparisons, advice, what fits a budget, cost against perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from entropi.console import ProgressLine
from entropi.costs import advice
from entropi.costs.calibration import Calibration
from entropi.costs.operations import count
from entropi.costs.prediction import Cost, Network, Options, predict
from entropi.downloads import CONFIGURATION, SCHEME, name_of, on_disk
from entropi.errors import UserError
from entropi.model.architectures import split_training_name
from entropi.model.shape import Shape, read_shape
from entropi.records import PassCost, PredictionRecord

_BAR = 24  # characters of the longest bar
_FILE_WIDTH = 120  # columns


@dataclass(frozen=True)
class Costed(Cost):
    """What one configuration costs, and what is said beside it."""

    name: str
    shape: Shape
    paper: tuple[float, float] | None  # GB, minutes
    changes: list[advice.Change]

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(
            {"name": self.name, "counts": self.counts, "folded": self.folded, "prediction": self.prediction}
        )
        parts: list[tuple[str, PassCost | None]] = [
            ("set_up", self.prediction.set_up),
            ("prompt", self.prediction.prompt),
            ("further", self.prediction.further),
        ]
        for name, part in parts:
            if part is not None:
                found["prediction"][name]["total"] = _total(part)
        found["prediction"]["kernel"] = self.prediction.kernel
        found["paper"] = None if self.paper is None else {"GB": self.paper[0], "minutes": self.paper[1]}
        found["changes"] = [asdict(change) for change in self.changes]
        return found


def _total(part: PassCost) -> dict[str, float]:
    return {name: getattr(part, name) for name in ("bytes", "messages", "trips", "seconds", "latency")}


def shape_of(model: str, otherwise: Shape) -> tuple[str, Shape]:
    """The shape that a word names: an architecture of `otherwise`'s sizes, or a file, a folder or a model of the hub
    with a config.json.

    Raises:
        UserError: none of them.
    """
    if model.startswith(SCHEME):
        return name_of(model), read_shape(on_disk(model, CONFIGURATION))
    if brings_its_own(model):
        return model, read_shape(Path(model))
    return model, replace(otherwise, architecture=split_training_name(model)[0])


def brings_its_own(model: str) -> bool:
    """Whether a word names a model with sizes of its own, and not an architecture."""
    return Path(model).exists() or model.endswith(".json") or model.startswith((SCHEME, ".", "/"))


def refuse_ignored(models: Sequence[str], sizes: Sequence[str], *, polynomial: bool) -> None:
    """Refuse options, `sizes` and `polynomial`, that would do nothing because `models` bring their own.

    Raises:
        UserError: names them.
    """
    own = [model for model in models if brings_its_own(model)]
    options = [f"--{name.replace('_', '-')}" for name in sizes if len(own) == len(models)]
    options += ["--polynomial"] * (polynomial and bool(own))
    if options:
        raise UserError(
            f"{' and '.join(options)} would be ignored, as {own[0]} brings its own: leave out, or name an architecture"
        )


def refuse_other_kernel(shapes: Sequence[tuple[str, Shape]], exp_iterations: int | None) -> None:
    """Refuse a softmax kernel for models that have their own.

    Raises:
        UserError: names one.
    """
    for name, shape in shapes:
        if exp_iterations is not None and shape.exp_iterations not in (None, exp_iterations):
            raise UserError(
                f"--exp-iterations {exp_iterations} would be ignored: {name} is trained with a kernel of its own, "
                f"t={shape.exp_iterations}"
            )


def costed(
    name: str,
    shape: Shape,
    seq_len: int,
    calibration: Calibration,
    line: Network,
    options: Options,
    *,
    advise: bool = True,
) -> Costed:
    """Counts, prediction and advice for one configuration."""
    counts, folded = count(shape, seq_len), count(shape, seq_len, folded=True)  # they refuse impossible lengths
    prediction = predict(shape, seq_len, calibration, line, options)
    return Costed(
        name=name,
        shape=shape,
        counts=counts,
        folded=folded,
        prediction=prediction,
        paper=advice.paper_figures(shape, seq_len),
        changes=advice.changes(shape, seq_len, calibration, line, options, prediction) if advise else [],
    )


def show(found: Costed) -> None:
    """One configuration on standard output."""
    console, record = _console(), found.prediction
    counts = found.counts
    console.print(
        f"{found.name}: {counts.parameters:,} parameters, {record.layers} layers, {record.heads} heads,"
        f" width {record.hidden_size}, {record.seq_len} tokens"
    )
    for operation in counts.nonlinear:
        rows, columns = operation.shape
        console.print(f"  {operation.operation:10} {operation.count:4} x R^({rows} x {columns})")
    console.print(f"  FLOPs      FFN {counts.ffn_flops / 1e9:.1f} G, attention {counts.attention_flops / 1e9:.1f} G")
    console.print(f"  folded     FFN {found.folded.ffn_flops / 1e9:.1f} G, what private inference computes\n")
    console.print(f"{record.protocol}: {record.trust}")
    console.print(
        f"{record.network}; {record.embedding} token table; {record.kernel}; prices of {record.calibrated_on}\n"
    )
    table = Table(title=f"pass over the prompt, by operation, {record.kernel_label}", title_justify="left", box=SIMPLE)
    for column in ("operation", "MB", "", "messages", "trips", "computing s", "latency s"):
        table.add_column(column, justify="left" if column in ("operation", "") else "right", no_wrap=True)
    operations = record.prompt.by_operation()
    largest = max(operation.bytes for operation in operations.values())
    for number, (name, o) in enumerate(operations.items()):
        share = o.bytes / record.prompt.bytes if record.prompt.bytes else 0.0
        bar = "█" * round(_BAR * o.bytes / largest) if largest else ""
        table.add_row(
            f"[bold]{name}[/bold]" if number == 0 else name,
            f"{o.bytes / 1e6:,.1f}",
            f"{bar} {share:.0%}",
            f"{o.messages:,.0f}",
            f"{o.trips:,.0f}",
            f"{o.seconds:.1f}",
            f"{o.latency:.1f}",
        )
    console.print(table)
    for words, part in (
        ("set-up, once", record.set_up),
        ("prompt", record.prompt),
        ("each further token", record.further),
    ):
        if part is not None:
            console.print(
                f"{words:20} {_size(part.bytes):>10}, {part.messages:,.0f} messages, {part.trips:,.0f} trips,"
                f" {part.seconds:,.1f} s computing, {part.latency:,.1f} s in all"
                + ("" if part is record.set_up else f"; {record.kernel_label}")
            )
    if found.paper is not None:
        console.print(f"\nthe paper: {found.paper[0]} GB, {found.paper[1]} min. {advice.PAPER_REMARK}")
    if found.changes:
        dominant = next(iter(operations.values()))
        console.print(f"\n{dominant.name} is {dominant.bytes / record.prompt.bytes:.0%} of the bytes. What would help:")
        for change in found.changes:
            console.print(f"  {change.words} would save {_size(change.saved_bytes)} and {change.saved_latency:,.0f} s")


def compare(configurations: Sequence[Costed]) -> None:
    """Several configurations side by side, on standard output."""
    console = _console()
    first = configurations[0].prediction
    console.print(f"{first.protocol}: {first.trust}\n{first.network}; prices of {first.calibrated_on}\n")
    names = list(dict.fromkeys(name for one in configurations for name in one.prediction.prompt.by_operation()))
    table = Table(
        title="MB of the pass over the prompt, by operation; what dominates is marked *",
        title_justify="left",
        box=SIMPLE,
    )
    table.add_column("operation", no_wrap=True)
    for one in configurations:
        table.add_column(f"{one.name}, {one.prediction.seq_len} tokens", justify="right")
    sums = [one.prediction.prompt.by_operation() for one in configurations]
    for name in names:
        cells = []
        for operations in sums:
            mark = "*" if name == next(iter(operations)) else ""
            cells.append(f"{mark}{operations[name].bytes / 1e6:,.1f}" if name in operations else "")
        table.add_row(name, *cells)
    rows = (
        ("softmax kernel", lambda one: one.prediction.kernel_label),
        ("sum", lambda one: f"{one.prediction.prompt.bytes / 1e6:,.1f}"),
        ("the paper's, GB", lambda one: "" if one.paper is None else f"{one.paper[0]}"),
        ("messages", lambda one: f"{one.prediction.prompt.messages:,.0f}"),
        ("trips", lambda one: f"{one.prediction.prompt.trips:,.0f}"),
        ("computing s", lambda one: f"{one.prediction.prompt.seconds:,.1f}"),
        ("latency s", lambda one: f"{one.prediction.prompt.latency:,.1f}"),
        ("further token, MB", lambda one: _further(one.prediction)),
    )
    for number, (name, cell) in enumerate(rows):
        if number == 0:
            table.add_section()
        table.add_row(name, *(cell(one) for one in configurations))
    console.print(table)
    largest = max(one.prediction.prompt.bytes for one in configurations) or 1.0
    for one, operations in zip(configurations, sums):
        console.print(f"\n{one.name}, {one.prediction.kernel_label}")
        for o in operations.values():
            bar = "█" * round(2 * _BAR * o.bytes / largest)
            if bar:
                console.print(f"  {o.name:12} {bar} {_size(o.bytes)}")
    for one, operations in zip(configurations, sums):
        if one.changes:
            dominant = next(iter(operations.values()))
            best = one.changes[0]
            share = dominant.bytes / one.prediction.prompt.bytes
            console.print(
                f"\n{one.name}: {dominant.name} is {share:.0%} of the bytes; {best.words} would save"
                f" {_size(best.saved_bytes)}"
            )
    if any(one.paper is not None for one in configurations):
        console.print(f"\n{advice.PAPER_REMARK}")


def within(
    text: str, shape: Shape, seq_len: int, calibration: Calibration, line: Network, options: Options
) -> list[advice.Fitting]:
    """The configurations that fit a budget, with progress on standard error."""
    limit = advice.budget(text)
    with ProgressLine("searching", len(advice.SEARCHED) * len(advice.WIDTHS)) as progress:
        return advice.fitting(
            limit, shape, seq_len, calibration, line, options, lambda done, _: progress.update(done, "")
        )


def show_fitting(found: Sequence[advice.Fitting], text: str, seq_len: int) -> None:
    """What fits a budget, on standard output."""
    console = _console()
    if not found:
        console.print(f"nothing that was searched answers a prompt of {seq_len} tokens within {text}")
        return
    table = Table(
        title=(
            f"the deepest of every width within {text} for {seq_len} tokens, most parameters first;"
            f" {found[0].prediction.kernel}"
        ),
        title_justify="left",
        box=SIMPLE,
    )
    for column in ("architecture", "layers", "width", "parameters in layers", "MB", "latency s", "further token, MB"):
        table.add_column(column, justify="left" if column == "architecture" else "right")
    for one in found:
        table.add_row(
            one.shape.architecture,
            str(one.shape.num_hidden_layers),
            str(one.shape.hidden_size),
            f"{one.parameters / 1e6:,.1f} M",
            f"{one.prediction.prompt.bytes / 1e6:,.1f}",
            f"{one.prediction.prompt.latency:,.1f}",
            _further(one.prediction),
        )
    console.print(table)


@dataclass(frozen=True)
class Placed:
    """A run by what a private prompt is predicted to cost and its measured perplexity."""

    megabytes: float
    perplexity: float
    kernel: str  # what the prediction is for, in words
    kernel_label: str


def against_perplexity(
    runs: Sequence[Path],
    seq_len: int,
    calibration: Calibration,
    line: Network,
    options: Options,
    exp_iterations: int | None = None,
) -> dict[str, Placed]:
    """Predicted MB of a prompt's pass and measured perplexity of run folders, by name.

    `exp_iterations` is the kernel that was asked for, which no run may have another of.

    Raises:
        UserError: a folder without a run, or a run that was not evaluated.
        ModuleNotFoundError: the report's packages, which nothing else here needs, are not installed.
    """
    from entropi.report.folder import read_run

    points = {}
    for folder in runs:
        run = read_run(folder)
        if run.evaluation is None:
            raise UserError(f"{folder} has no evaluation on held-out text: see entropi evaluate")
        shape = read_shape(folder)
        refuse_other_kernel([(str(folder), shape)], exp_iterations)
        prediction = predict(shape, min(seq_len, shape.max_position_embeddings), calibration, line, options)
        name = run.name if run.name not in points else str(folder)
        points[name] = Placed(
            prediction.prompt.bytes / 1e6, run.evaluation.perplexity, prediction.kernel, prediction.kernel_label
        )
    return points


def _further(prediction: PredictionRecord) -> str:
    return "" if prediction.further is None else f"{prediction.further.bytes / 1e6:,.1f}"


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _console() -> Console:
    """Standard output; a file is as wide as a table needs."""
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, emoji=False, soft_wrap=True, width=_FILE_WIDTH)
