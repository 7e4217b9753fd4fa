"""One run in two processes, on CPUs over gloo: the same training as in one, checkpoints for both, a death noticed."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from entropi import records
from entropi.errors import UserError
from entropi.training.build import check_processes
from entropi.training.recipe import Recipe
from entropi.training.run import train
from training_runs import REGULARISED, command, of_kind, rewind, tiny, wait_for_step, weights

pytestmark = [
    pytest.mark.usefixtures("surroundings"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="counts on CPUs: one GPU cannot hold two processes"),
]

DIES = """
import os, signal, sys
from entropi.cli import main
from entropi.training.trainer import EntropiTrainer

original = EntropiTrainer.training_step

def training_step(trainer, *args, **kwargs):
    if os.environ["RANK"] == sys.argv[1] and trainer.state.global_step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(trainer, *args, **kwargs)

EntropiTrainer.training_step = training_step
main(sys.argv[2:])
"""


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")


def in_two_processes(*words: str, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True, timeout=900, check=False)


def of_two(corpus: str, **changes: Any) -> Recipe:
    # Without biases: softmax does not feel those of keys, whose gradients are rounding alone.
    settings = {**REGULARISED, "bias": "none", "gradient_accumulation": 2, **changes}
    return tiny(corpus, **settings)


def rounding_of_muon(updates: int, rate: float, shape: torch.Size) -> float:
    """How far apart entries of a matrix may be after so many updates whose sums were made in another order.

    An update's entries are at most rate * 0.2 sqrt(larger side); each of the five Newton-Schulz iterations that make it
    rounds to bfloat16. How much of that shows depends on the processor's bfloat16 products.
    """
    return 5 * 2**-8 * updates * rate * 0.2 * max(shape) ** 0.5


def assert_same_training(ours: Path, theirs: Path, rel: float = 1e-4, muon: tuple[int, float] | None = None) -> None:
    for a, b in zip(of_kind(ours, records.TrainingStep), of_kind(theirs, records.TrainingStep), strict=True):
        for name in ("step", "cross_entropy", "entropy_penalty", "learning_rate", "grad_norm"):
            assert (getattr(a, name) or 0) == pytest.approx(getattr(b, name) or 0, rel=rel), (name, a.step)
    for kind in (records.EntropySnapshot, records.Evaluation):
        for a, b in zip(of_kind(ours, kind), of_kind(theirs, kind), strict=True):
            assert a.step == b.step
            assert torch.allclose(torch.tensor(a.entropy), torch.tensor(b.entropy), rtol=rel)
    for a, b in zip(of_kind(ours, records.Evaluation), of_kind(theirs, records.Evaluation), strict=True):
        assert (a.tokens, a.cross_entropy) == (b.tokens, pytest.approx(b.cross_entropy, rel=rel))
    one, two = weights(ours), weights(theirs)
    for name, value in one.items():
        atol = max(1e-5, rel * float(value.abs().max()))
        if muon is not None and name.startswith("model.blocks") and value.ndim == 2:
            atol = rounding_of_muon(*muon, value.shape)
        assert torch.allclose(value, two[name], rtol=10 * rel, atol=atol), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[Recipe, Path]:
    """The run that the others are compared with: in one process."""
    recipe, folder = of_two(corpus, steps=12), tmp_path_factory.mktemp("alone") / "run"
    train(recipe, folder)
    return recipe, folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [((*TORCHRUN, "-m"), []), ((*TORCHRUN, "-m"), ["--shard"]), ((*ACCELERATE, "--module"), [])],
    ids=["DDP", "FSDP2", "DDP by accelerate"],
)
def test_two_processes_train_as_one(
    alone: tuple[Recipe, Path], tmp_path: Path, launcher: tuple[str, ...], options: list[str]
) -> None:
    recipe, folder = alone
    words = command(recipe, tmp_path / "two")
    done = in_two_processes("entropi", *words, *options, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("held-out perplexity") == 1  # one of them speaks
    assert (tmp_path / "two" / "checkpoints" / "checkpoint-12" / "rng_state_1.pth").exists()
    assert_same_training(tmp_path / "two", folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (["--shard"], {"architecture": "EReg(SM(t)+ScFuFFN)", "optimizer": "muon"}),
        ([], {"architecture": "SM+WNorm(QK+FFN)+LeakyR", "leaky_slope_learned": "global"}),
    ],
    ids=["Muon in shards", "no penalty"],
)
def test_checkpoints_serve_any_number_of_processes(
    tmp_path: Path, corpus: str, options: list[str], changes: dict[str, Any]
) -> None:
    """One process, then two, then one: as if it had been one."""
    recipe = of_two(corpus, steps=12, save_every=4, keep_checkpoints=3, **changes)
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    train(recipe, whole)
    shutil.copytree(whole, mixed)
    rewind(mixed, to=4)
    done = in_two_processes("-m", "entropi", *command(recipe, mixed), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    # Newton-Schulz iterations are bfloat16: sums in another order differ by that much.
    rel = 2e-3 if recipe.optimizer == "muon" else 1e-4
    muon = (8, recipe.learning_rate) if recipe.optimizer == "muon" else None
    assert_same_training(mixed, whole, rel, muon)
    rewind(mixed, to=8)
    train(recipe, mixed)
    assert [r.resumed_at for r in of_kind(mixed, records.RunStarted)] == [0, 4, 8]
    assert_same_training(mixed, whole, rel, muon)
    kept = {p.name for p in (mixed / "checkpoints" / "checkpoint-8").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt"} <= kept


@pytest.mark.slow
@pytest.mark.parametrize("dying", ["0", "1"])
def test_a_dead_process_is_noticed_and_the_run_resumes(alone: tuple[Recipe, Path], tmp_path: Path, dying: str) -> None:
    recipe, whole = alone
    script, folder = tmp_path / "dies.py", tmp_path / "run"
    script.write_text(DIES)
    words = command(recipe, folder)
    done = in_two_processes(str(script), dying, *words)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "another process of this run has stopped" in line]
    assert len(said) == 1, done.stderr[-3000:]
    assert said[0].endswith("the same command continues the run after its last checkpoint")
    assert not (folder / "model").exists()
    done = in_two_processes("-m", "entropi", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r.resumed_at for r in of_kind(folder, records.RunStarted)] == [0, 5]
    assert_same_training(folder, whole)


@pytest.mark.slow
def test_an_interrupt_saves_where_all_processes_are(alone: tuple[Recipe, Path], tmp_path: Path) -> None:
    """Ctrl-C for the launcher, which passes it on to each: the same step is saved in all, and the run goes on there."""
    recipe, folder = dataclasses.replace(alone[0], save_every=0, steps=90), tmp_path / "run"
    words = command(recipe, folder)
    launched = subprocess.Popen([sys.executable, *TORCHRUN, "-m", "entropi", *words], stderr=subprocess.PIPE)
    wait_for_step(launched, folder, 3)
    launched.send_signal(signal.SIGINT)
    _, said = launched.communicate(timeout=600)
    assert launched.returncode != 0
    (saved,) = (folder / "checkpoints").iterdir()
    assert (saved / "seal.json").exists(), said.decode()[-3000:]
    step = int(saved.name.removeprefix("checkpoint-"))
    assert 3 <= step < 90
    assert f"interrupted; step {step} is saved" in said.decode()

    done = in_two_processes("-m", "entropi", "train", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r.resumed_at for r in of_kind(folder, records.RunStarted)] == [0, step]
    assert [r.step for r in of_kind(folder, records.TrainingStep)] == list(range(1, 91))


def test_processes_share_out_whole_micro_batches(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="gradient_accumulation is 3: a multiple of 2 is needed"):
        train(tiny(corpus, gradient_accumulation=3), tmp_path / "run")
    check_processes(tiny(corpus, gradient_accumulation=4), True)
    with pytest.raises(UserError, match="cannot be trained in fp16"):
        check_processes(dataclasses.replace(tiny(corpus, gradient_accumulation=4), precision="fp16"), True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="one process has nothing to shard"):
        train(tiny(corpus), tmp_path / "run", shard=True)
    assert not (tmp_path / "run").exists()
