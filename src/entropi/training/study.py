"""A study: a grid of training runs from one file, each in a process of its own, and what they say together.

    recipe:                       # of all runs; any setting may be a list
      corpus: stdlib
      seed: [0, 1, 2]
      steps: 400
    rows:                         # names and what each changes, or a list of architectures
      baseline: {architecture: SM+LN+G}
      softmax: {architecture: EReg(SM(t)+ScFuFFN), entropy_margin: [0.1, 0.2]}
    claims:
      - baseline < softmax, entropy_margin=0.2

Lists make rows of all their combinations, named "row, setting=value"; seeds make repetitions of a row. A claim "A < B"
says that row A has the lower perplexity.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import msgspec
import torch
import yaml

from entropi import record_files, records
from entropi.console import ProgressLine, make_console
from entropi.errors import UserError
from entropi.model.architectures import split_training_name
from entropi.training.build import prepare_corpus
from entropi.training.comparison import compare, finished_run, summarise
from entropi.training.loading import MODEL_FOLDER
from entropi.training.recipe import CONFIG_FILE, Recipe, differences, load_recipe, make_recipe, save_recipe
from entropi.training.run_folder import lock_run

STUDY_KEYS = ("recipe", "rows", "claims")
MAX_FOLDER_NAME = 100
MAX_SEEDS = 20  # of a row: a claim's test goes through all 2^n signs
POLL_SECONDS = 0.2
SHOWN = 8  # runs that the line of progress names, those that are furthest
# The last line of a run that diverged, and where in it it says that it began.
DIVERGED = re.compile(r"entropi: (step (\d+): (?:the gradient is not finite|attention has collapsed)[^;]*)")
LAYER = re.compile(r"\blayers? (\d+)")
INTERRUPT_SECONDS = 60.0  # that an interrupted run may take to finish its step

Claim: TypeAlias = tuple[str, str]  # names of two rows: the one said to be lower, and the other


@dataclass(frozen=True)
class PlannedRun:
    """One cell of a study's grid and one seed."""

    row: str
    recipe: Recipe
    path: str  # of its run folder, below the study's

    @property
    def label(self) -> str:
        return f"{self.row}, seed {self.recipe.seed}"


@dataclass(frozen=True)
class Study:
    """What a study file asks for; runs of one row stand together."""

    runs: list[PlannedRun]
    claims: list[Claim]

    @property
    def rows(self) -> dict[str, list[PlannedRun]]:
        return {name: list(runs) for name, runs in itertools.groupby(self.runs, key=lambda run: run.row)}

    def settings(self) -> dict[str, dict[str, str]]:
        """By row, the settings in which rows differ."""
        recipes = {name: dataclasses.asdict(runs[0].recipe) for name, runs in self.rows.items()}
        differing = [
            key for key in next(iter(recipes.values())) if key != "seed" and len({r[key] for r in recipes.values()}) > 1
        ]
        return {name: {key: str(recipe[key]) for key in differing} for name, recipe in recipes.items()}


def load_study(path: Path) -> Study:
    """Read a study file; precision is fp32 unless it says otherwise.

    Raises:
        UserError: not readable, or with anything wrong in any of its rows or claims: all of it is named.
    """
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the study {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the study {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key) or {}, dict) for key in ("recipe",)):
        raise UserError(f"{path} is not a study: 'recipe:' with settings below it is expected, and 'rows:'")
    problems = [f"unknown key {key}, expected {', '.join(STUDY_KEYS)}" for key in content if key not in STUDY_KEYS]
    runs: list[PlannedRun] = []
    for name, settings in _rows(path, content):
        try:
            runs += _expand(path, name, settings)
        except UserError as error:
            problems.append(str(error).removeprefix(f"{path}: "))
    problems += _row_problems(runs)
    claims = _claims(content.get("claims") or [], list(dict.fromkeys(run.row for run in runs)), problems)
    if problems:
        raise UserError(f"{path}: {'; '.join(dict.fromkeys(problems))}")
    return Study(runs, claims)


def _rows(path: Path, content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of rows and their settings, lists not yet expanded."""
    common = {"precision": "fp32"} | (content.get("recipe") or {})
    rows = content.get("rows") or {"": {}}
    if isinstance(rows, list):
        rows = {str(architecture): {"architecture": architecture} for architecture in rows}
    if not isinstance(rows, dict) or not all(isinstance(changes or {}, dict) for changes in rows.values()):
        raise UserError(f"{path}: rows are a list of architectures, or names with the settings that each changes")
    for name, changes in rows.items():
        yield str(name), common | (changes or {})


def _expand(path: Path, name: str, settings: dict[str, Any]) -> list[PlannedRun]:
    """The runs of one entry of `rows`."""
    lists = {key: value for key, value in settings.items() if isinstance(value, list)}
    if empty := [key for key, value in lists.items() if not value]:
        raise UserError(f"{empty[0]} is an empty list")
    seeds = lists.pop("seed", [settings.get("seed", 0)])
    if len(set(map(str, seeds))) < len(seeds) or len(seeds) > MAX_SEEDS:
        raise UserError(f"seed is {seeds}, up to {MAX_SEEDS} different ones are possible")
    runs = []
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values))
        told = [str(chosen[key]) if key == "architecture" else f"{key}={chosen[key]}" for key in chosen]
        for seed in seeds:
            recipe = make_recipe(settings | chosen | {"seed": seed}, str(path))
            split_training_name(recipe.architecture)
            if recipe.precision == "auto":
                raise UserError("precision is 'auto', which every run would decide for itself: say bf16, fp16 or fp32")
            label = ", ".join([name, *told] if name else told) or recipe.architecture
            slug = re.sub(r"[^A-Za-z0-9+().,=_-]+", "-", label.replace(", ", ",")).strip("-.")[:MAX_FOLDER_NAME]
            runs.append(PlannedRun(label, recipe, f"{slug}/seed-{seed}"))
    return runs


def _row_problems(runs: Sequence[PlannedRun]) -> list[str]:
    """Runs that would share a folder, which rows of one name do too."""
    return [
        f"several rows would be kept in {path}" for path, times in Counter(r.path for r in runs).items() if times > 1
    ]


def _claims(given: Any, rows: list[str], problems: list[str]) -> list[Claim]:
    """Pairs of rows; what is wrong is added to `problems`."""
    claims: list[Claim] = []
    if not isinstance(given, list):
        problems.append("claims are a list of lines such as 'A < B'")
        return claims
    for claim in given:
        names = [part.strip() for part in str(claim).split(" < ")]
        if len(names) != 2:
            problems.append(f"claim {claim!r} is not of the form 'A < B'")
            continue
        if unknown := [name for name in names if name not in rows]:
            problems.append(f"claim {claim!r} names {unknown[0]!r}, but the rows are {'; '.join(rows)}")
            continue
        claims.append((names[0], names[1]))
    return claims


def run_study(study: Study, folder: Path, executor: Executor | None = None) -> list[records.Record]:
    """Train every run of `study` that has not ended yet, and say what all of them tell.

    A run that diverges is a result.

    Args:
        folder: gets a run folder for every run, `study.jsonl` and beside every run its recipe and what it printed.
        executor: where runs are trained, by default in processes on this machine.

    Returns:
        The records of `study.jsonl`: runs, rows, claims.

    Raises:
        UserError: a folder that holds another study's runs, or runs that failed for other reasons than divergence.
    """
    with lock_run(folder):
        ended = _ended(study, folder)
        waiting = [run for run in study.runs if (run.row, run.recipe.seed) not in ended]
        recipes = [run.recipe for run in waiting]
        corpora = {(r.corpus, r.tokenizer, r.taper_from, r.vocab_size, r.context_length, r.packing): r for r in recipes}
        for recipe in corpora.values():  # once, and not by all runs at the same time
            prepare_corpus(recipe, make_console())
        failed: list[str] = []
        try:
            with contextlib.closing(_train_all(study, waiting, folder, executor or Processes())) as trained:
                for run in trained:
                    try:
                        found = _outcome(run)
                    except UserError as error:
                        failed.append(f"{run.planned.label}: {error}")
                        continue
                    ended[found.row, found.seed] = found
                    record_files.append(folder / record_files.STUDY_FILE, found)
        finally:
            result = _write(study, folder, ended)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(study.runs)} runs failed, the same command tries them again: {'; '.join(failed)}"
        )
    return result


def run_one(study: Study, number: int, folder: Path) -> records.StudyRun:
    """Train run `number` of `study`, counted from 0, unless it has ended; `run_study` then finds it in its folder.

    Several machines that share `folder` can do this at the same time, each for other runs.

    Raises:
        UserError: no such run, or as `run_study`.
    """
    if not 0 <= number < len(study.runs):
        raise UserError(f"run is {number}, and the study's {len(study.runs)} runs are 0 to {len(study.runs) - 1}")
    alone = Study([study.runs[number]], [])
    if ended := list(_ended(alone, folder).values()):
        return ended[0]
    with contextlib.closing(_train_all(alone, alone.runs, folder, Processes(1))) as trained:
        return _outcome(next(trained))


def _ended(study: Study, folder: Path) -> dict[tuple[str, int], records.StudyRun]:
    """By row and seed, the runs below `folder` that need no more training."""
    path = folder / record_files.STUDY_FILE
    found = record_files.read(path) if path.exists() else []
    diverged = {(r.row, r.seed): r for r in found if isinstance(r, records.StudyRun) and r.diverged}
    ended = {}
    for run in study.runs:
        key, place = (run.row, run.recipe.seed), folder / run.path
        if not (place / CONFIG_FILE).exists():
            continue
        if differing := differences(run.recipe, load_recipe(place / CONFIG_FILE)):
            raise UserError(
                f"{place} holds a run of another recipe, which differs in {', '.join(differing)}; choose another folder"
            )
        if (place / MODEL_FOLDER).is_dir():
            ended[key] = finished_run(run.row, run.recipe.seed, place, run.path)
        elif found_diverged := diverged.get(key) or _divergence(run, log_of(place)):
            ended[key] = found_diverged
    return ended


def _write(study: Study, folder: Path, ended: dict[tuple[str, int], records.StudyRun]) -> list[records.Record]:
    """Write `study.jsonl` anew from the runs that have ended."""
    runs = [ended[key] for run in study.runs if (key := (run.row, run.recipe.seed)) in ended]
    settings = study.settings()
    rows = []
    for name in study.rows:
        if mine := [run for run in runs if run.row == name]:
            rows.append(summarise(name, settings[name], mine, folder))
    claims = [compare(lower, higher, runs) for lower, higher in study.claims]
    result: list[records.Record] = [*runs, *rows, *(claim for claim in claims if claim is not None)]
    record_files.rewrite(folder / record_files.STUDY_FILE, result)
    return result


# --- Runs that are training ------------------------------------------------------------------------------------------


class Worker(Protocol):
    """What trains a run, as far as a study has to do with it: the face of `subprocess.Popen`."""

    @property
    def returncode(self) -> int | None:
        """`entropi train`'s status, or minus the signal that ended it; None as long as it trains."""

    def poll(self) -> int | None:
        """Look whether it has ended, and return `returncode`."""

    def terminate(self) -> None:
        """Ask it to save what it has done and to end."""

    def kill(self) -> None:
        """End it at once."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, at most `timeout` seconds: then raises `subprocess.TimeoutExpired`."""


class Executor(Protocol):
    """Where the runs of a study are trained."""

    @property
    def slots(self) -> int:
        """Runs at a time."""

    def start(self, place: Path, recipe: Path, log: Path, slot: int) -> Worker:
        """Begin, or continue, the run in the folder `place`; what it prints is appended to `log`."""


class Processes:
    """Trains runs in processes on this machine, each with a share of the processor's cores, or a GPU each in turn.

    Args:
        parallel: runs at a time; 0 is one for each GPU, or one where there is none.
    """

    def __init__(self, parallel: int = 0) -> None:
        self._gpus = torch.cuda.device_count()
        self.slots = parallel or max(self._gpus, 1)

    def start(self, place: Path, recipe: Path, log: Path, slot: int) -> Worker:
        """Start the process of a run in its share of the machine."""
        environment = dict(os.environ)
        if self._gpus:
            visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            environment["CUDA_VISIBLE_DEVICES"] = (visible or list(map(str, range(self._gpus))))[slot % self._gpus]
        elif self.slots > 1:
            environment["OMP_NUM_THREADS"] = str(max(torch.get_num_threads() // self.slots, 1))
        command = [sys.executable, "-m", "entropi", "train", str(place), "--config", str(recipe)]
        with open(log, "ab") as output:
            # A group of its own: Ctrl-C on the terminal is for this process, which passes it on once.
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )


def log_of(place: Path) -> Path:
    """What the run in `place` printed."""
    return place.with_name(place.name + ".log")


@dataclass
class _Running:
    """A run that is training."""

    planned: PlannedRun
    place: Path
    worker: Worker
    slot: int
    offset: int = 0
    step: int = 0

    def progress(self) -> int:
        """The last step that is recorded; only what is new of the records is read."""
        path = self.place / record_files.RECORDS_FILE
        try:
            with open(path, "rb") as file:
                file.seek(self.offset)
                new = file.read()
                # A run that resumes puts a shorter file in this one's place, which may have grown again since: what was
                # read last then no longer ends where a line does.
                if self.offset and not new.startswith(b"\n"):
                    self.offset = 0
                    file.seek(0)
                    new = file.read()
        except OSError:
            return self.step
        whole = new.rpartition(b"\n")[0]
        self.offset += len(whole)
        for line in whole.split(b"\n"):
            if line.strip():
                self.step = max(self.step, _step_decoder.decode(line).step)
        return self.step


class _Step(msgspec.Struct):
    step: int = 0


_step_decoder = msgspec.json.Decoder(_Step)


def _train_all(
    study: Study, waiting: Sequence[PlannedRun], folder: Path, executor: Executor
) -> Generator[_Running, None, None]:
    """Train all of `waiting`, and yield each run when it has ended."""
    queue, free = deque(waiting), list(range(min(executor.slots, len(waiting))))
    running: list[_Running] = []
    steps = sum(run.recipe.steps for run in study.runs)
    done = steps - sum(run.recipe.steps for run in waiting)
    total = len(study.runs)
    ended = total - len(waiting)
    try:
        with ProgressLine("study, steps of all runs", steps, done=done) as line:
            while queue or running:
                while queue and free:
                    running.append(_start(queue.popleft(), folder, executor, free.pop(0)))
                time.sleep(POLL_SECONDS)
                for run in [run for run in running if run.worker.poll() is not None]:
                    running.remove(run)
                    free.append(run.slot)
                    done, ended = done + run.planned.recipe.steps, ended + 1
                    yield run
                reached = sum(run.progress() for run in running)
                furthest = sorted(running, key=lambda run: -run.step)[:SHOWN]
                shown = "; ".join(f"{run.planned.label} at step {run.step}" for run in furthest)
                line.update(done + reached, f"{ended} of {total} runs  {shown}")
    finally:
        _interrupt(running)


def _start(planned: PlannedRun, folder: Path, executor: Executor, slot: int) -> _Running:
    """Begin a run, its recipe beside it."""
    place = folder / planned.path
    place.parent.mkdir(parents=True, exist_ok=True)
    recipe = place.with_name(place.name + ".yaml")
    save_recipe(planned.recipe, recipe)
    return _Running(planned, place, executor.start(place, recipe, log_of(place), slot), slot)


def _interrupt(running: Sequence[_Running]) -> None:
    """End what still trains, between two steps if it can be had."""
    workers = [run.worker for run in running]
    for worker in workers:
        worker.terminate()  # not SIGINT, which is ignored by what a shell script has put into the background
    try:
        for worker in workers:
            worker.wait(INTERRUPT_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for worker in workers:
            worker.kill()  # it resumes from its last checkpoint
            worker.wait()


def _outcome(run: _Running) -> records.StudyRun:
    """The result of a run that has ended.

    Raises:
        UserError: it failed, and not because the training diverged: its last words.
    """
    planned, status, log = run.planned, run.worker.returncode, log_of(run.place)
    if status == 0:
        return finished_run(planned.row, planned.recipe.seed, run.place, planned.path)
    if status == 2 and (diverged := _divergence(planned, log)):
        return diverged
    if status is not None and status < 0:
        raise UserError(f"ended by signal {-status} ({log})")
    raise UserError(f"{_last_line(log).removeprefix('entropi: ') or f'status {status}'} ({log})")


def _last_line(log: Path) -> str:
    """Of what a run printed; empty if it printed nothing."""
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    return text[text.rfind("\n") + 1 :]


def _divergence(run: PlannedRun, log: Path) -> records.StudyRun | None:
    """The result of a run that ended because its training diverged, as the last line of its log says."""
    diverged = DIVERGED.match(_last_line(log))
    if diverged is None:
        return None
    layer = LAYER.search(diverged[1])
    return records.StudyRun(
        row=run.row,
        seed=run.recipe.seed,
        folder=run.path,
        diverged=True,
        reason=diverged[1],
        step=int(diverged[2]),
        layer=int(layer[1]) if layer else None,
        cross_entropy=float("nan"),
        perplexity=float("nan"),
        tokens_per_second=float("nan"),
    )
