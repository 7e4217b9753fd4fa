"""Long runs: killed at any moment, disks that fill up, runs that diverge; nothing lost, nothing done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entropi import records
from entropi.errors import UserError
from entropi.training.callbacks import CollapsedAttention, CollapseGuard, Diverged, NonFiniteUpdate
from entropi.training.recipe import Recipe, save_recipe
from entropi.training.run import train
from entropi.training.trainer import EntropiTrainer
from training_runs import (
    REGULARISED,
    Poison,
    assert_same_run,
    checkpoints,
    of_kind,
    rewind,
    tiny,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("surroundings")]
KILLS = 20

# Forks a process for every life of the run, which spares the seconds that importing torch takes, and ends each by
# kill -9 a random time after a random step: between steps, within one, or while a checkpoint is written.
LIVES = """
import os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from entropi import record_files, records
from entropi.training.recipe import load_recipe
from entropi.training.run import train

torch.set_num_threads(1)
recipe, folder, kills = load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
chance = random.Random(int(sys.argv[4]))

def last_step():
    path = folder / "records.jsonl"
    found = record_files.read(path) if path.exists() else []
    return max([r.step for r in found if isinstance(r, records.TrainingStep)], default=0)

killed = 0
while True:
    child = os.fork()
    if child == 0:
        try:
            train(recipe, folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    # Counted from where this life resumes: the steps after the last checkpoint are dropped from the records first.
    told = record_files.read(folder / "records.jsonl") if killed else []
    before = sum(isinstance(r, records.RunStarted) for r in told)
    wanted = None
    while killed < kills:
        found = record_files.read(folder / "records.jsonl") if (folder / "records.jsonl").exists() else []
        starts = [r for r in found if isinstance(r, records.RunStarted)]
        if len(starts) > before:
            wanted = wanted or starts[-1].resumed_at + chance.randint(1, 9)
            if last_step() >= wanted:
                time.sleep(chance.random() * 0.03)
                os.kill(child, signal.SIGKILL)
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.001)
    else:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    killed += 1
    print(killed, "killed after step", last_step(), flush=True)
"""


def test_killed_twenty_times(tmp_path: Path, corpus: str) -> None:
    recipe = tiny(corpus, **REGULARISED, steps=240, save_every=4, evaluate_every=50, schedule="cosine")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    seed = random.SystemRandom().randrange(10**6)
    words = [
        sys.executable,
        "-c",
        LIVES,
        str(tmp_path / "recipe.yaml"),
        str(tmp_path / "killed"),
        str(KILLS),
        str(seed),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    said = f"seed {seed}\n{done.stdout}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    assert done.stdout.count("killed after step") == KILLS, said
    starts = of_kind(tmp_path / "killed", records.RunStarted)
    assert len(starts) == KILLS + 1, said
    assert [r.resumed_at for r in starts] == sorted(r.resumed_at for r in starts), said  # no checkpoint was lost
    assert [r.step for r in of_kind(tmp_path / "killed", records.TrainingStep)] == list(range(1, 241)), said
    train(recipe, tmp_path / "whole")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


# --- Disks that fill up -----------------------------------------------------------------------------------------------


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Do something once, before an update."""

    def arrange(wanted: int, act: Callable[[], None]) -> None:
        original, left = EntropiTrainer.training_step, [act]

        def training_step(trainer: EntropiTrainer, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            if left and trainer.state.global_step + 1 == wanted:
                left.pop()()
            return original(trainer, model, *args, **kwargs)

        monkeypatch.setattr(EntropiTrainer, "training_step", training_step)

    return arrange


def assert_refused_and_resumed(recipe: Recipe, folder: Path, whole: Path, make_room: Callable[[], None]) -> None:
    with pytest.raises(UserError) as caught:
        train(recipe, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("checkpoint-10 could not be written to")
    assert message.endswith("the same command continues the run from checkpoint-5")
    assert checkpoints(folder) == ["checkpoint-5"]  # what there was no room for takes none
    make_room()
    train(recipe, folder)
    assert [r.resumed_at for r in of_kind(folder, records.RunStarted)] == [0, 5]
    assert_same_run(folder, whole)


@pytest.mark.parametrize("limit", [4_000, 60_000])
def test_files_that_may_not_grow(tmp_path: Path, corpus: str, at_step: Any, limit: int) -> None:
    """A limit of the system on the size of files, smaller than the weights or than the optimizer's state."""
    recipe = tiny(corpus, hidden_size=32, steps=11, log_every=20, entropy_every=20, evaluate_every=0)
    train(recipe, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))

    def make_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        assert_refused_and_resumed(recipe, tmp_path / "run", tmp_path / "whole", make_room)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of which one can be sure that it is full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("only a superuser can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("left", [8_192, 120_000])
def test_a_full_disk(tmp_path: Path, corpus: str, small_disk: Path, at_step: Any, left: int) -> None:
    recipe = tiny(corpus, hidden_size=32, steps=11)
    train(recipe, tmp_path / "whole")
    ballast = small_disk / "ballast"

    def fill() -> None:
        free = int(subprocess.check_output(["df", "--output=avail", "-B1", small_disk]).split()[-1])
        ballast.write_bytes(bytes(free - left))

    at_step(8, fill)
    assert_refused_and_resumed(recipe, small_disk / "run", tmp_path / "whole", ballast.unlink)


def test_records_on_a_full_disk(corpus: str, small_disk: Path, at_step: Any, tmp_path: Path) -> None:
    recipe = tiny(corpus, steps=60, save_every=30)
    ballast = small_disk / "ballast"

    def fill() -> None:
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    at_step(31, fill)
    with pytest.raises(UserError, match=r"cannot write .*records.jsonl: No space left on device; make room"):
        train(recipe, small_disk / "run")
    ballast.unlink()
    train(recipe, small_disk / "run")
    train(recipe, tmp_path / "whole")
    assert_same_run(small_disk / "run", tmp_path / "whole")


# --- Divergence -------------------------------------------------------------------------------------------------------


def test_a_broken_gradient_names_the_layer_it_began_in(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    """Clipping would make every gradient NaN, and the last layer the culprit of everything."""
    original = EntropiTrainer.training_step

    def training_step(trainer: EntropiTrainer, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = original(trainer, model, *args, **kwargs)
        if trainer.state.global_step == 3:  # as after an overflow in the backward pass of layer 1 of 3
            for block in model.model.blocks[:2]:
                block.attention.value.weight.grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(EntropiTrainer, "training_step", training_step)
    with pytest.raises(
        NonFiniteUpdate, match="step 4: the gradient is not finite, beginning in the gradient of layer 1"
    ):
        train(tiny(corpus, layers=3), tmp_path / "run")


def test_a_broken_loss_is_no_layer_s(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = EntropiTrainer.compute_loss

    def compute_loss(trainer: EntropiTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        norm = model.model.final_norm.weight
        kept = norm.data.clone()
        if trainer.state.global_step == 1:
            norm.data.fill_(math.inf)
        loss = original(trainer, model, *args, **kwargs)
        norm.data.copy_(kept)
        return loss

    monkeypatch.setattr(EntropiTrainer, "compute_loss", compute_loss)
    with pytest.raises(NonFiniteUpdate, match="step 2: the gradient is not finite, beginning in the loss"):
        train(tiny(corpus), tmp_path / "run")


def test_a_run_goes_back_and_on_at_half_the_rate(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    """Poisoned once, it continues as a run that had been at half the rate since the checkpoint."""
    Poison(monkeypatch, {8}, layer=1)
    recipe = tiny(corpus, steps=12, nonfinite="rollback", schedule="cosine", learning_rate_floor=1e-3)
    poisoned, original = [], Poison.weights

    def once(model: nn.Module) -> dict[str, Tensor]:  # the second time, step 8 is clean
        poisoned.append(1)
        if len(poisoned) == 9:
            monkeypatch.undo()
        return original(model)

    cache = tmp_path / "cache"
    monkeypatch.setenv("ENTROPI_CACHE", str(cache))
    monkeypatch.setattr(Poison, "weights", staticmethod(once))
    train(recipe, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setenv("ENTROPI_CACHE", str(cache))
    (back,) = of_kind(tmp_path / "run", records.RolledBack)
    assert (back.step, back.from_step, back.rate_factor) == (5, 8, 0.5)
    assert back.reason == "step 8: the gradient is not finite, beginning in the attention of layer 1"
    assert f"{back.reason}; going back to step 5, on at 0.5 of the learning rate" in capfd.readouterr().err
    steps = of_kind(tmp_path / "run", records.TrainingStep)
    assert [r.step for r in steps] == list(range(1, 13))

    def rate(step: int) -> float:  # no warm-up to speak of: 0.05 of 12 steps is 1
        share = 0.5 * (1 + math.cos(math.pi * (step - 1) / 11))
        return 1e-3 + (1e-2 - 1e-3) * share

    for r in steps[1:]:
        assert r.learning_rate == pytest.approx(rate(r.step - 1) * (1 if r.step <= 5 else 0.5), rel=1e-6), r.step

    # Killed later, the run still knows its rate.
    rewind(tmp_path / "run", to=10)
    train(recipe, tmp_path / "run")
    again = of_kind(tmp_path / "run", records.TrainingStep)
    assert [r.learning_rate for r in again] == [r.learning_rate for r in steps]
    assert [r.cross_entropy for r in again] == pytest.approx([r.cross_entropy for r in steps], rel=1e-5)


def test_a_run_goes_back_three_times_at_most(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Poison(monkeypatch, {3})
    with pytest.raises(UserError, match=r"step 3: .*; the run has gone back 3 times already: it has diverged"):
        train(tiny(corpus, nonfinite="rollback"), tmp_path / "run")
    back = of_kind(tmp_path / "run", records.RolledBack)
    assert [(r.step, r.rate_factor) for r in back] == [(0, 0.5), (0, 0.25), (0, 0.125)]
    assert len(of_kind(tmp_path / "run", records.TrainingStep)) == 2  # those of the last attempt


def collapse_attention(monkeypatch: pytest.MonkeyPatch, after: int, layer: int) -> None:
    """From one step on the keys of a layer are so large that every row looks at one token."""
    original = EntropiTrainer.training_step

    def training_step(trainer: EntropiTrainer, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        if trainer.state.global_step == after:
            with torch.no_grad():
                model.model.blocks[layer].attention.key.weight.mul_(1e4)
        return original(trainer, model, *args, **kwargs)

    monkeypatch.setattr(EntropiTrainer, "training_step", training_step)


def test_collapse_stops_a_run_and_names_the_layer(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    collapse_attention(monkeypatch, after=6, layer=1)
    recipe = tiny(corpus, layers=3, steps=12, collapse="stop", collapse_below=0.2)
    with pytest.raises(
        CollapsedAttention, match=r"step 9: attention has collapsed, beginning in layer 1 \(0\.\d+ nats\), "
    ):
        train(recipe, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == ["checkpoint-5"]
    train(dataclasses.replace(recipe, collapse="ignore"), tmp_path / "other")
    assert of_kind(tmp_path / "other", records.Evaluation)[-1].step == 12


def test_collapse_goes_back(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    collapse_attention(monkeypatch, after=6, layer=0)
    recipe = tiny(corpus, steps=12, collapse="rollback", collapse_below=0.2)
    with pytest.raises(UserError, match=r"step 9: attention has collapsed, beginning in layer 0 .* 3 times already"):
        train(recipe, tmp_path / "run")
    assert [r.step for r in of_kind(tmp_path / "run", records.RolledBack)] == [5, 5, 5]
    assert [r.step for r in of_kind(tmp_path / "run", records.TrainingStep)] == list(range(1, 9))


def test_what_collapse_is() -> None:
    """A share of the mean over rows of log(i + 1), by layers."""
    length = 64
    allowed = sum(math.log(i + 1) for i in range(length)) / length
    entropy = torch.tensor([[1.0, 1.0], [0.0, 0.5], [0.2, 0.0]]) * allowed
    CollapseGuard("stop", 0.09, length)(1, entropy)
    with pytest.raises(CollapsedAttention, match=r"beginning in layer 2 \("):
        CollapseGuard("stop", 0.11, length)(1, entropy)
    with pytest.raises(Diverged, match=r"beginning in layers 1 \(.*\), 2 \("):
        CollapseGuard("rollback", 0.3, length)(1, entropy)
