"""A run is killed, interrupted or damaged, and started again: as if nothing had happened."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from entropi import records
from entropi.data.split import split_by_name
from entropi.training import callbacks
from entropi.training.callbacks import SaveOnInterrupt
from entropi.training.loading import open_with_text
from entropi.training.recipe import Recipe, load_recipe, save_recipe
from entropi.training.run import train
from entropi.training.trainer import EntropiTrainer
from training_runs import (
    assert_same_run,
    checkpoints,
    command,
    formula_text,
    of_kind,
    rewind,
    tiny,
    wait_for_step,
)

pytestmark = pytest.mark.usefixtures("surroundings")


# Kills itself while a checkpoint is written: before the optimizer's state, or with every file there but not committed.
SUICIDE = """
import os, signal, sys
from entropi.cli import main
from entropi.training import callbacks, trainer

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at_step(step, name):
    owner = trainer.EntropiTrainer if name.startswith("_") else callbacks
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        folder = args[1] if name.startswith("_") else args[0]
        return die() if str(folder).endswith(f"checkpoint-{step}") else original(*args, **kwargs)
    setattr(owner, name, patched)

at_step(int(sys.argv[1]), sys.argv[2])
main(sys.argv[3:])
"""


@pytest.mark.slow
def test_killed_at_three_moments_and_resumed(tmp_path: Path, corpus: str):
    """kill -9 at some step, while files are written, and before the commit; then as if nothing had happened."""
    recipe = tiny(corpus, architecture="EReg(SM(t)+ScFuFFN)", steps=130, save_every=10, log_every=1, schedule="cosine")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(recipe, whole)
    words = command(recipe, killed)

    first = subprocess.Popen([sys.executable, "-m", "entropi", *words], stderr=subprocess.PIPE)
    wait_for_step(first, killed, 23)  # past the checkpoint of step 20
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not (killed / "model").exists()

    for step, name, left in (
        (80, "_save_optimizer_and_scheduler", "model.safetensors"),
        (110, "commit", "rng_state.pth"),
    ):
        done = subprocess.run([sys.executable, "-c", SUICIDE, str(step), name, *words], stderr=subprocess.PIPE)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        unfinished = killed / "checkpoints" / f"checkpoint-{step}"
        assert (unfinished / left).exists()
        assert not (unfinished / "seal.json").exists()
        assert (killed / "checkpoints" / f"checkpoint-{step - 10}" / "seal.json").exists()

    last = subprocess.run([sys.executable, "-m", "entropi", *words], stderr=subprocess.PIPE)
    assert last.returncode == 0, last.stderr.decode()
    assert "checkpoint-110 was cut short and is removed" in last.stderr.decode()
    starts = of_kind(killed, records.RunStarted)
    assert [r.resumed_at for r in starts[:1] + starts[2:]] == [0, 70, 100]
    assert 20 <= starts[1].resumed_at < 80
    assert [r.step for r in of_kind(killed, records.TrainingStep)] == list(range(1, 131))
    assert_same_run(killed, whole)


def test_a_finished_run_does_nothing(again: tuple[Recipe, Path], capfd: pytest.CaptureFixture[str]):
    recipe, folder = again
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train(recipe, folder) == folder / "model"
    assert "nothing to do" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_resumed_between_two_records(again: tuple[Recipe, Path], finished: tuple[Recipe, Path]):
    """The record of step 8 is the mean of steps 5 to 8, of which step 5 came before the checkpoint."""
    recipe, folder = again
    rewind(folder, to=5)
    train(recipe, folder)
    assert of_kind(folder, records.RunStarted)[-1].resumed_at == 5
    assert [r.step for r in of_kind(folder, records.TrainingStep)] == [4, 8, 10]
    assert_same_run(folder, finished[1])


def test_killed_in_the_last_evaluation(again: tuple[Recipe, Path], finished: tuple[Recipe, Path]):
    """All steps are done: none is taken again, and nothing is recorded twice."""
    recipe, folder = again
    rewind(folder)
    train(recipe, folder)
    assert of_kind(folder, records.RunStarted)[-1].resumed_at == 10
    assert_same_run(folder, finished[1])


def test_killed_before_the_first_checkpoint(again: tuple[Recipe, Path], finished: tuple[Recipe, Path]):
    recipe, folder = again
    rewind(folder, to=0)
    train(recipe, folder)
    assert [r.resumed_at for r in of_kind(folder, records.RunStarted)] == [0, 0]
    assert_same_run(folder, finished[1])


@pytest.mark.parametrize("started", ["config.yaml", "config.yaml.partial", None])
def test_killed_before_the_first_record(tmp_path: Path, corpus: str, started: str | None):
    """Whatever the first moments left in the folder, it is still the folder of that run."""
    recipe, folder = tiny(corpus, steps=1), tmp_path / "run"
    folder.mkdir()
    if started == "config.yaml":
        save_recipe(recipe, folder / started)
    elif started:
        (folder / started).write_text("architec")
    train(recipe, folder)
    assert load_recipe(folder / "config.yaml") == recipe
    assert json.loads((folder / "environment.json").read_text())["python"]


def damage_commit(path: Path) -> None:
    (path / "seal.json").unlink()


def damage_commit_text(path: Path) -> None:
    (path / "seal.json").write_text('{"files": {"mod')


def truncate(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])

    return damage


def flip(path: Path) -> None:
    """One bit, in the middle of the weights: such a file still parses."""
    content = bytearray((path / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "model.safetensors").write_bytes(content)


def remove_state(path: Path) -> None:
    (path / "trainer_state.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_commit, "checkpoint-10 was cut short and is removed"),
        (damage_commit_text, "checkpoint-10 is damaged, first in seal.json, and is removed"),
        (truncate("model.safetensors"), "checkpoint-10 is damaged, first in model.safetensors, and is removed"),
        (truncate("optimizer.pt"), "checkpoint-10 is damaged, first in optimizer.pt, and is removed"),
        (truncate("rng_state.pth"), "checkpoint-10 is damaged, first in rng_state.pth, and is removed"),
        (flip, "checkpoint-10 is damaged, first in model.safetensors, and is removed"),
        (remove_state, "checkpoint-10 is damaged, first in trainer_state.json, and is removed"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    again: tuple[Recipe, Path],
    finished: tuple[Recipe, Path],
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
):
    recipe, folder = again
    rewind(folder)
    damage(folder / "checkpoints" / "checkpoint-10")
    train(recipe, folder)
    lines = capfd.readouterr().err.splitlines()
    assert message in lines
    assert f"resuming {folder} after step 5 of 10" in lines
    assert_same_run(folder, finished[1])


def test_every_checkpoint_damaged(again: tuple[Recipe, Path], finished: tuple[Recipe, Path]):
    recipe, folder = again
    rewind(folder)
    for path in (folder / "checkpoints").iterdir():
        truncate("optimizer.pt")(path)
    train(recipe, folder)
    assert of_kind(folder, records.RunStarted)[-1].resumed_at == 0
    assert_same_run(folder, finished[1])


def test_an_old_checkpoint_goes_only_when_the_new_one_is_committed(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
):
    seen = {}

    def commit(folder: Path, pending: Any) -> None:
        seen[folder.name] = sorted(path.name for path in folder.parent.iterdir() if (path / "seal.json").exists())
        original(folder, pending)

    original = callbacks.commit
    monkeypatch.setattr(callbacks, "commit", commit)
    train(tiny(corpus, steps=6, save_every=2, keep_checkpoints=1), tmp_path / "run")
    assert seen == {
        "checkpoint-2": [],
        "checkpoint-4": ["checkpoint-2"],
        "checkpoint-6": ["checkpoint-4"],
    }
    assert checkpoints(tmp_path / "run") == ["checkpoint-6"]


def test_keep_checkpoints_keeps_the_newest(tmp_path: Path, corpus: str):
    """By number, not by name: 10 is after 8."""
    train(tiny(corpus, steps=11, save_every=2, keep_checkpoints=3), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["checkpoint-10", "checkpoint-11", "checkpoint-8"]


# --- Interrupted ------------------------------------------------------------------------------------------------------


def ask_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """The process gets a signal in the middle of `step`."""
    original = EntropiTrainer.training_step

    def training_step(trainer: EntropiTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if trainer.state.global_step == step - 1:
            signal.raise_signal(number)
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(EntropiTrainer, "training_step", training_step)


@pytest.fixture
def own_handlers() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("another handler has Ctrl-C")


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_where_it_is(
    tmp_path: Path,
    finished: tuple[Recipe, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
):
    recipe, folder = finished[0], tmp_path / "run"
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        ask_at(patch, 7, number)
        with pytest.raises(KeyboardInterrupt) as caught:
            train(recipe, folder)
    assert caught.value.args == ("step 7 is saved", f"the same command or `entropi train {folder}` continues the run")
    assert "a second Ctrl-C gives it up" in capfd.readouterr().err
    assert {number: signal.getsignal(number) for number in before} == before
    assert (folder / "checkpoints" / "checkpoint-7" / "seal.json").exists()
    train(recipe, folder)
    assert [r.resumed_at for r in of_kind(folder, records.RunStarted)] == [0, 7]
    assert_same_run(folder, finished[1])


@pytest.mark.usefixtures("own_handlers")
def test_a_second_interrupt_gives_up_at_once(
    tmp_path: Path, finished: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
):
    """While the interrupted step is being saved: the half-written checkpoint does not count, the one before does."""
    recipe, folder = finished[0], tmp_path / "run"

    def commit(folder: Path, pending: Any) -> None:
        if folder.name == "checkpoint-7":
            signal.raise_signal(signal.SIGINT)
        original(folder, pending)

    original = callbacks.commit
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "commit", commit)
        ask_at(patch, 7, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="the step in progress is lost"):
            train(recipe, folder)
    assert (folder / "checkpoints" / "checkpoint-7" / "optimizer.pt").exists()
    assert not (folder / "checkpoints" / "checkpoint-7" / "seal.json").exists()
    train(recipe, folder)
    assert [r.resumed_at for r in of_kind(folder, records.RunStarted)] == [0, 5]
    assert_same_run(folder, finished[1])


@pytest.mark.usefixtures("own_handlers")
def test_an_interrupt_in_the_last_step_leaves_the_evaluation(
    tmp_path: Path, finished: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
):
    recipe, folder = finished[0], tmp_path / "run"
    with monkeypatch.context() as patch:
        ask_at(patch, 10, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="step 10 is saved"):
            train(recipe, folder)
    assert not (folder / "model").exists()
    train(recipe, folder)
    assert_same_run(folder, finished[1])


@pytest.mark.usefixtures("own_handlers")
def test_the_handlers_are_given_back_after_a_signal_that_came_too_late():
    interrupt, reached = SaveOnInterrupt(), []
    with pytest.raises(KeyboardInterrupt), interrupt.listening():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        reached.append("after the last step")
    assert reached == ["after the last step"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("own_handlers")
@pytest.mark.parametrize("processes", ["1", "2"])
def test_one_of_several_processes_is_not_ended_before_it_has_said_why_it_fails(
    monkeypatch: pytest.MonkeyPatch, processes: str
):
    """Its launcher sends SIGTERM to all as soon as one has died."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match="connection lost"), SaveOnInterrupt().listening():
            raise RuntimeError("connection lost")
        assert signal.getsignal(signal.SIGTERM) is (signal.SIG_DFL if processes == "1" else signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


# --- The split of older versions --------------------------------------------------------------------------------------


def test_a_run_keeps_the_split_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Of eight files, older versions held out one, an eighth of the text; now it is the end of each."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(formula_text(number, 60))
    recipe, folder = tiny(str(texts), steps=4, save_every=2), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("entropi.data.corpus.split", split_by_name)
        train(recipe, folder)
    assert re.search(r"held out [0-9,]+ tokens of 1 text \(", capfd.readouterr().err)
    shutil.copytree(folder, tmp_path / "whole")
    rewind(folder, to=2)
    train(recipe, folder)
    assert re.search(r"held out [0-9,]+ tokens of 1 text \(", capfd.readouterr().err)
    assert_same_run(folder, tmp_path / "whole")
    evaluated = open_with_text(folder)
    assert evaluated.blocks.size == of_kind(folder, records.RunStarted)[-1].heldout_tokens

    train(recipe, tmp_path / "new")
    parts = r"training on .* tokens of 8 texts; held out .* tokens of 8 texts \((.*)% of all\)"
    told = re.search(parts, capfd.readouterr().err)
    assert told is not None
    assert 4 < float(told[1]) < 8
