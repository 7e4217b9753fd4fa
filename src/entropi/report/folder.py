"""A run folder as the report reads it: its records by kind, its settings, its moments."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from entropi import record_files, records
from entropi.errors import UserError
from entropi.records import (
    AttentionPattern,
    CountRecord,
    DiagnosisRecord,
    EntropySnapshot,
    Evaluation,
    PlaintextComparison,
    PredictionRecord,
    PrivateRun,
    Record,
    RolledBack,
    RunStarted,
    SkippedUpdate,
    TaperSnapshot,
    TrainingStep,
)
from entropi.report import figures
from entropi.report.communication import Communication, OperationCommunication, by_operation, by_pass

# Fields that hold a row a layer; all but the last a column a head, of which layers may have different numbers.
LOOKS = ("distance", "on_first", "on_previous", "on_itself")
MATRICES = ("entropy", "threshold", "temperature", *LOOKS, "entropy_by_position")


@dataclass
class Run:
    """One run folder, read. Of kinds that are written more than once, the last record counts."""

    folder: Path
    name: str
    started: RunStarted | None = None
    steps: list[TrainingStep] = field(default_factory=list)
    snapshots: list[EntropySnapshot] = field(default_factory=list)
    tapers: list[TaperSnapshot] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    skipped: list[SkippedUpdate] = field(default_factory=list)
    rolled_back: list[RolledBack] = field(default_factory=list)
    diagnosis: DiagnosisRecord | None = None
    pattern: AttentionPattern | None = None
    cost: CountRecord | None = None  # before folding
    folded_cost: CountRecord | None = None
    prediction: PredictionRecord | None = None
    private: PrivateRun | None = None
    comparison: PlaintextComparison | None = None
    config: str | None = None  # config.yaml as it stands
    settings: dict[str, Any] = field(default_factory=dict)  # what it says
    environment: list[tuple[str, str]] | None = None
    command: str | None = None

    @property
    def architecture(self) -> str | None:
        if self.started is not None:
            return self.started.architecture
        if self.cost is not None:
            return self.cost.architecture
        return (self.diagnosis.model or None) if self.diagnosis is not None else None

    @property
    def parameters(self) -> int | None:
        if self.started is not None:
            return self.started.parameters
        if self.cost is not None:
            return self.cost.parameters
        return (self.diagnosis.parameters or None) if self.diagnosis is not None else None

    @property
    def context_length(self) -> int | None:
        """T of the newest record that tells it."""
        for record in (self.diagnosis, self.pattern, self.started):
            if record is not None and record.context_length > 1:
                return record.context_length
        return None

    @property
    def layers(self) -> list[int]:
        """The model's number of each row's layer."""
        for record in (self.diagnosis, self.pattern):
            if record is not None:
                return _numbers(record)
        found = frames(self)
        return list(range(len(found[-1].entropy) if found else 0))

    @property
    def margin(self) -> float | None:
        """Gamma of a run trained with the entropy regulariser."""
        gamma = self.settings.get("entropy_margin")
        regularised = self.started is not None and self.started.name.strip().startswith("EReg(")
        return float(gamma) if regularised and isinstance(gamma, (int, float)) else None

    @property
    def evaluation(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to say of its results."""
        said = self.evaluation or self.diagnosis or self.pattern or self.private or self.skipped
        return not (said or self.steps or self.snapshots)

    @property
    def skipped_reasons(self) -> list[tuple[str, int]]:
        return Counter(update.reason for update in self.skipped).most_common()

    @property
    def operations(self) -> list[OperationCommunication]:
        return by_operation(self.private.stages) if self.private is not None else []

    @property
    def passes(self) -> list[tuple[int, Communication]]:
        return by_pass(self.private.stages) if self.private is not None else []

    @property
    def staged(self) -> Communication:
        """What all stages of the private run cost together."""
        return sum((operation.total for operation in self.operations), Communication())

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


def read_run(folder: Path) -> Run:
    """Read one run folder; `UserError` if it is none or if something in it is damaged."""
    path = folder / record_files.RECORDS_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {record_files.RECORDS_FILE}")
    run = Run(folder=folder, name=folder.resolve().name)
    for record in record_files.read(path):
        _check_shapes(record, path)
        match record:
            case RunStarted():
                run.started = record
                run.name = record.name.strip() or run.name
            case TrainingStep():
                run.steps.append(record)
            case EntropySnapshot():
                run.snapshots.append(record)
            case TaperSnapshot():
                run.tapers.append(record)
            case Evaluation():
                if run.evaluations and run.evaluations[-1].step == record.step:
                    run.evaluations.pop()  # a last step is measured again, on more text
                run.evaluations.append(record)
            case SkippedUpdate():
                run.skipped.append(record)
            case RolledBack():
                run.rolled_back.append(record)
            case DiagnosisRecord():
                run.diagnosis = record
            case AttentionPattern():
                run.pattern = record
            case PredictionRecord():
                run.prediction = record
            case CountRecord(folded=True):
                run.folded_cost = record
            case CountRecord():
                run.cost = record
            case PrivateRun():
                run.private = record
            case PlaintextComparison():
                run.comparison = record
    if len({len(snapshot.entropy) for snapshot in run.snapshots}) > 1:
        raise UserError(f"{path} is damaged: its entropy snapshots differ in their number of layers")
    if len({shape for frame in frames(run) for shape in _shapes(frame)}) > 1:
        raise UserError(f"{path} is damaged: its entropies differ in their numbers of layers and heads")
    if run.pattern is not None and (found := frames(run)) and _shape(run.pattern.distance) not in _shapes(found[-1]):
        raise UserError(f"{path} is damaged: its attention pattern is that of a model of another shape")
    if run.pattern and run.diagnosis and _numbers(run.pattern) != _numbers(run.diagnosis):
        raise UserError(f"{path} is damaged: its diagnosis and its attention pattern are of different layers")
    _read_settings(run)
    return run


def _check_shapes(record: Record, path: Path) -> None:
    """Types are checked when a line is read; shapes are not."""
    may_differ = isinstance(record, Evaluation | DiagnosisRecord | AttentionPattern)  # of any model, not ours alone
    for name in MATRICES:
        matrix = getattr(record, name, None)
        if matrix is not None:
            try:
                figures.grid(matrix, name, ragged=may_differ and name != "entropy_by_position")
            except UserError as error:
                raise UserError(f"{path} is damaged: {error}") from None
    if isinstance(record, AttentionPattern):
        stretches = len(record.entropy_by_position[0])
        if stretches != len(record.positions) or record.positions != sorted(set(record.positions)):
            raise UserError(
                f"{path} is damaged: an attention pattern has {stretches} entropies for {len(record.positions)} places"
            )
        if len({_shape(getattr(record, name)) for name in LOOKS}) > 1:
            raise UserError(f"{path} is damaged: an attention pattern has matrices of several shapes")
    if isinstance(record, DiagnosisRecord | AttentionPattern):
        rows, numbers = _rows(record), _numbers(record)
        if len(numbers) != rows or numbers != sorted(set(numbers)) or numbers[0] < 0:
            raise UserError(
                f"{path} is damaged: {len(numbers)} layers are named for {rows} rows, or not in their order"
            )
    if isinstance(record, DiagnosisRecord) and len(record.quartile_shares) != 4:
        raise UserError(f"{path} is damaged: a diagnosis has {len(record.quartile_shares)} quartile shares, not 4")


def _rows(record: DiagnosisRecord | AttentionPattern) -> int:
    return len(record.entropy if isinstance(record, DiagnosisRecord) else record.distance)


def _numbers(record: DiagnosisRecord | AttentionPattern) -> list[int]:
    """The model's number of each row's layer, which older records do not hold."""
    return record.layers or list(range(_rows(record)))


def _read_settings(run: Run) -> None:
    """`config.yaml` and `environment.json`, both allowed to be absent, and the command in either."""
    config = _parse(run.folder / "config.yaml", yaml.safe_load, yaml.YAMLError)
    environment = _parse(run.folder / "environment.json", json.loads, json.JSONDecodeError)
    if config is not None:
        run.config = config[0]
        run.settings = config[1] if isinstance(config[1], dict) else {}
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


@dataclass
class Frame:
    """The heads of a run at one moment; matrices `(L, H)`, whose rows may differ in length."""

    label: str
    step: int
    entropy: records.Matrix
    threshold: records.Matrix | None = None
    temperature: records.Matrix | None = None
    end: bool = False  # the diagnosis, or what comes nearest to it


def frames(run: Run, most: int | None = None) -> list[Frame]:
    """Moments of a training, at most `most` and the first and last among them; then the heads on held-out text."""
    snapshots = run.snapshots
    if most is not None and len(snapshots) > most:
        last = len(snapshots) - 1
        snapshots = [snapshots[round(i * last / (most - 1))] for i in range(most)]
    result = [
        Frame(f"step {s.step:,}, training batch", s.step, s.entropy, s.threshold, s.temperature) for s in snapshots
    ]
    learned = run.snapshots[-1] if run.snapshots else None
    entropy, label = None, ""
    if run.diagnosis is not None:
        entropy, label = run.diagnosis.entropy, run.diagnosis.source or "held-out text, from the diagnosis"
    elif run.evaluation is not None:
        entropy, label = run.evaluation.entropy, f"held-out text, step {run.evaluation.step:,}"
    if entropy is not None:
        step = result[-1].step if result else 0
        result.append(
            Frame(
                label,
                step,
                entropy,
                learned.threshold if learned else None,
                learned.temperature if learned else None,
                end=True,
            )
        )
    return result


def _shapes(frame: Frame) -> list[tuple[int, ...]]:
    matrices = (frame.entropy, frame.threshold, frame.temperature)
    return [_shape(matrix) for matrix in matrices if matrix is not None]


def _shape(matrix: records.Matrix) -> tuple[int, ...]:
    """How many heads each layer has."""
    return tuple(len(row) for row in matrix)
