"""Numbers that are not finite: the update is refused, and the message says where it began."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerControl

from entropi import record_files, records
from entropi.console import ProgressLine
from entropi.errors import UserError
from entropi.training import run
from entropi.training.callbacks import NonFiniteGuard, NonFiniteUpdate, RunRecorder
from entropi.training.evaluation import HeldOut, diagnose_heldout
from entropi.training.run import train
from entropi.training.study import DIVERGED, LAYER
from entropi.training.trainer import EntropiTrainer
from training_runs import (
    Poison,
    assert_equal_weights,
    checkpoints,
    of_kind,
    tiny,
)

pytestmark = pytest.mark.usefixtures("surroundings")


def test_stop_refuses_the_update_and_names_step_and_layer(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    poison = Poison(monkeypatch, {7}, layer=1)
    recipe, folder = tiny(corpus, steps=9, save_every=6), tmp_path / "run"
    with pytest.raises(
        NonFiniteUpdate, match="step 7: the gradient is not finite, beginning in the attention of layer 1"
    ):
        train(recipe, folder)
    assert poison.trainer is not None
    assert poison.trainer.model is not None
    after = poison.weights(poison.trainer.model)
    assert_equal_weights(after, poison.before[7])
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    assert [r.step for r in of_kind(folder, records.SkippedUpdate)] == [7]
    assert not (folder / "model").exists()
    assert checkpoints(folder) == ["checkpoint-6"]

    monkeypatch.undo()  # without the poison, the run goes on from what is on disk
    monkeypatch.setenv("ENTROPI_CACHE", str(tmp_path / "cache"))
    train(recipe, folder)
    assert of_kind(folder, records.RunStarted)[-1].resumed_at == 6
    assert [r.step for r in of_kind(folder, records.TrainingStep)] == list(range(1, 10))
    assert of_kind(folder, records.SkippedUpdate) == []


def test_stop_without_a_broken_attention_names_no_layer(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    Poison(monkeypatch, {2})
    with pytest.raises(
        NonFiniteUpdate, match=r"step 2: .*not finite, beginning in that of model.token_embedding.weight; the"
    ):
        train(tiny(corpus), tmp_path / "run")


@pytest.mark.parametrize("layer", [None, 0, 1])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_skip_leaves_the_weights_and_goes_on(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, layer: int | None, clip: float
):
    poison = Poison(monkeypatch, {3, 4, 6}, layer)
    recipe, folder = tiny(corpus, steps=8, nonfinite="skip", log_every=2, gradient_clip=clip), tmp_path / "run"
    train(recipe, folder)
    before = poison.before
    for step in range(1, 8):  # the rate of the first update is 0 only where there is warm-up
        unchanged = all(torch.equal(before[step][name], before[step + 1][name]) for name in before[step])
        assert unchanged == (step in {3, 4, 6}), step
    skipped = of_kind(folder, records.SkippedUpdate)
    assert [r.step for r in skipped] == [3, 4, 6]
    where = "that of model.token_embedding.weight" if layer is None else f"the attention of layer {layer}"
    assert all(r.reason.endswith(f"not finite, beginning in {where}") for r in skipped)
    steps = of_kind(folder, records.TrainingStep)
    assert [r.step for r in steps] == [2, 4, 6, 8]
    # Steps 3 and 4 were both refused; of steps 5 and 6 the mean is that of step 5.
    assert [math.isfinite(r.cross_entropy) for r in steps] == [True, False, True, True]
    assert math.isfinite(of_kind(folder, records.Evaluation)[-1].cross_entropy)


def test_a_skipped_update_leaves_the_optimizer_state(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    poison = Poison(monkeypatch, {2, 3})
    train(tiny(corpus, steps=5, nonfinite="skip"), tmp_path / "run")
    assert poison.trainer is not None
    state = poison.trainer.optimizer.state
    assert {int(entry["step"]) for entry in state.values()} == {3}
    assert all(bool(torch.isfinite(entry["exp_avg"]).all()) for entry in state.values())


def test_ten_skipped_in_a_row_stop_the_run(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    Poison(monkeypatch, {1, *range(3, 30)})
    with pytest.raises(NonFiniteUpdate, match=r"step 12: .*, for the 10th time in a row: the run has diverged"):
        train(tiny(corpus, steps=30, nonfinite="skip"), tmp_path / "run")
    assert len(of_kind(tmp_path / "run", records.SkippedUpdate)) == 11


def test_nine_skipped_in_a_row_do_not(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    Poison(monkeypatch, {*range(2, 11), *range(12, 21)})
    train(tiny(corpus, steps=22, nonfinite="skip"), tmp_path / "run")


def test_poison_in_one_micro_batch_of_two(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    """The layer is found even if only the first micro-batch of the update was broken."""
    original, calls = EntropiTrainer.compute_loss, []

    def compute_loss(trainer: EntropiTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(trainer.state.global_step + 1)
        bias = model.model.blocks[0].attention.query.bias
        kept = bias.data.clone()
        if calls[-2:] != [3, 3] and calls[-1] == 3:
            bias.data.fill_(math.nan)
        loss = original(trainer, model, *args, **kwargs)
        bias.data.copy_(kept)
        return loss

    monkeypatch.setattr(EntropiTrainer, "compute_loss", compute_loss)
    with pytest.raises(NonFiniteUpdate, match=r"step 3: .*in the attention of layer 0"):
        train(tiny(corpus, gradient_accumulation=2), tmp_path / "run")


def guarded(
    tmp_path: Path, loss: float, gradient: float = math.inf, **arguments: Any
) -> tuple[NonFiniteGuard, nn.Module, Callable[[], None]]:
    """A guard by itself, over one layer with a gradient that is not finite."""
    recorder = RunRecorder(
        tmp_path / "records.jsonl", ProgressLine("", 1), log_every=1, entropy_every=1, tokens_per_step=1
    )
    model: nn.Module = nn.Linear(2, 2)
    for name in reversed(arguments.pop("below", "").split()):  # the names of the modules that hold it
        model = nn.ModuleDict({name: model})
    guard = NonFiniteGuard(arguments.pop("policy"), recorder)
    args, state = SimpleNamespace(**arguments), SimpleNamespace(global_step=0)

    def update() -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        recorder._losses = [(torch.tensor(loss), None)]
        guard.on_pre_optimizer_step(args, state, TrainerControl(), model=model)  # type: ignore[arg-type]

    return guard, model, update


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_an_overflow_of_the_loss_scale_is_left_to_the_scaler(tmp_path: Path, policy: str):
    """In float16 the first gradients overflow as a matter of course; the scaler must see them to lower its scale."""
    _, model, update = guarded(tmp_path, loss=5.0, policy=policy, fp16=True)
    update()
    assert all(p.grad is not None for p in model.parameters())
    assert len(record_files.read(tmp_path / "records.jsonl")) == 1
    for _ in range(8):
        update()
    with pytest.raises(NonFiniteUpdate, match="10th time in a row: the run has diverged"):
        update()


@pytest.mark.parametrize(
    ("below", "where"),
    [("", "as the squares of weight"), ("blocks 6", "in layer 6, as the squares of blocks.6.weight")],
)
def test_gradients_whose_squares_overflow_are_named(tmp_path: Path, below: str, where: str):
    _, _, update = guarded(tmp_path, loss=5.0, gradient=2e30, below=below, policy="stop", fp16=False)
    with pytest.raises(NonFiniteUpdate) as raised:
        update()
    assert f"the gradient is not finite, {where} overflow, up to 2e+30; the update" in str(raised.value)
    found = DIVERGED.match(f"entropi: {raised.value}")  # as it stands in a run's log
    assert found is not None
    assert (found[2], LAYER.findall(found[1])) == ("1", ["6"] if below else [])


def test_a_loss_that_is_not_finite_stops_float16_too(tmp_path: Path):
    _, _, update = guarded(tmp_path, loss=math.nan, policy="stop", fp16=True)
    with pytest.raises(NonFiniteUpdate, match="the run stopped"):
        update()


def test_a_model_that_diverged_in_its_last_step_is_kept_without_a_diagnosis(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
):
    def diverged(*args: Any, **kwargs: Any) -> HeldOut:
        return HeldOut(math.nan, 10, dict(enumerate(torch.full((2, 2), math.nan))))

    monkeypatch.setattr(run, "evaluate_blocks", diverged)
    train(tiny(corpus, steps=2), tmp_path / "run")
    (found,) = of_kind(tmp_path / "run", records.Evaluation)
    assert math.isnan(found.perplexity)
    assert of_kind(tmp_path / "run", records.DiagnosisRecord) == []
    with pytest.raises(UserError, match="the model has diverged"):
        diagnose_heldout(diverged(), 16)
