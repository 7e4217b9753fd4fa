"""What tests of training share: a tiny recipe, and what runs are compared by."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entropi import record_files, records
from entropi.training.loading import open_model
from entropi.training.recipe import Recipe
from entropi.training.trainer import EntropiTrainer

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "entropi"
WORDS = ("def", "return", "self", "value", "entropy", "for", "in", "if", "None", "[]", "()", "=", "+", "name")
R = TypeVar("R", bound=records.Base)


def formula_text(seed: int, lines: int) -> str:
    """Text that depends on nothing but its arguments: not on Python's version, nor on its random module."""
    state, text = seed + 1, []
    for _ in range(lines):
        words = []
        for _ in range(3 + state % 5):
            state = (state * 1103515245 + 12345) % 2**31
            words.append(WORDS[(state >> 16) % len(WORDS)])
        text.append("    " * (state % 3) + " ".join(words) + "\n")
    return "".join(text)


def tiny(corpus: str, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "corpus": corpus,
        "vocab_size": 300,
        "context_length": 16,
        "layers": 2,
        "heads": 2,
        "hidden_size": 16,
        "steps": 10,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "log_every": 1,
        "entropy_every": 3,
        "evaluate_every": 4,
        "evaluation_blocks": 8,
        "save_every": 5,
    }
    return Recipe(**settings | changes)


def of_kind(folder: Path, kind: type[R]) -> list[R]:
    return [r for r in record_files.read(folder / record_files.RECORDS_FILE) if isinstance(r, kind)]


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in open_model(folder)[0].named_parameters()}


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], rtol=rtol, atol=1e-6), name


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two run folders tell of the same training: every record but the starts and the speed, and the weights."""
    for kind in (
        records.TrainingStep,
        records.EntropySnapshot,
        records.Evaluation,
        records.DiagnosisRecord,
        records.AttentionPattern,
        records.CountRecord,
        records.SkippedUpdate,
    ):
        mine, other = of_kind(ours, kind), of_kind(theirs, kind)
        assert [getattr(r, "step", None) for r in mine] == [getattr(r, "step", None) for r in other], kind
        for a, b in zip(mine, other):
            assert_close(dataclass_of(a), dataclass_of(b))
    assert_same_weights(weights(ours), weights(theirs))


def dataclass_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__ if name != "tokens_per_second"}


def assert_close(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list) and a and isinstance(a[0], list | float):
        assert np.array(a) == pytest.approx(np.array(b), rel=1e-5, nan_ok=True)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5, nan_ok=True)
    else:
        assert a == b


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def command(recipe: Recipe, folder: Path) -> list[str]:
    words = ["train", str(folder)]
    for name, value in dataclasses.asdict(recipe).items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Until the records show `step`."""
    path = folder / record_files.RECORDS_FILE
    deadline = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and any(r.step >= step for r in of_kind(folder, records.TrainingStep)):
            return
        time.sleep(0.002)
    process.kill()
    raise AssertionError(f"no step {step}: {(process.stderr.read() if process.stderr else b'').decode()[-2000:]}")


def rewind(folder: Path, *, to: int | None = None) -> None:
    """Make a finished run one that was killed after the checkpoint of step `to`, or right after the last one."""
    shutil.rmtree(folder / "model")
    for path in (folder / "checkpoints").iterdir():
        if to is not None and int(path.name.rpartition("-")[2]) > to:
            shutil.rmtree(path)


class Poison:
    """Makes the gradients of chosen updates NaN, and keeps the weights before every update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int], layer: int | None = None) -> None:
        self.before: dict[int, dict[str, Tensor]] = {}
        self.trainer: EntropiTrainer | None = None
        original = EntropiTrainer.training_step

        def training_step(trainer: EntropiTrainer, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            step = trainer.state.global_step + 1
            self.trainer, self.before[step] = trainer, self.weights(model)
            if step not in steps or layer is None:
                loss = original(trainer, model, *args, **kwargs)
            else:  # the forward pass itself breaks, from this layer's attention on
                bias = model.model.blocks[layer].attention.query.bias  # type: ignore[union-attr, index]
                kept = bias.data.clone()
                bias.data.fill_(math.nan)
                loss = original(trainer, model, *args, **kwargs)
                bias.data.copy_(kept)
            if step in steps and layer is None:
                next(iter(model.parameters())).grad.view(-1)[3] = math.nan  # type: ignore[union-attr]
            return loss

        monkeypatch.setattr(EntropiTrainer, "training_step", training_step)

    @staticmethod
    def weights(model: nn.Module) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


REGULARISED: dict[str, Any] = {
    "architecture": "EReg(SM(t)+ScFuFFN)",
    "entropy_weight": 1e-2,
    "entropy_margin": 0.05,
    "entropy_reduction": "mean",
}


def independent_cross_entropy(logits: Tensor, ids: Tensor) -> float:
    """By the definition, in float64 and numpy: -log of the probability of every next token, averaged."""
    total, count = 0.0, 0
    for row_logits, row in zip(logits.double().numpy(), ids.numpy()):
        for position in range(len(row) - 1):
            z = row_logits[position] - row_logits[position].max()
            total -= z[row[position + 1]] - math.log(np.exp(z).sum())
            count += 1
    return total / count
