"""How an update is made: precision, accumulation, decay, clipping, schedules, Muon, the regulariser's penalty."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entropi import records
from entropi.console import ProgressLine
from entropi.data.prepare import prepare
from entropi.entropy.regularizer import entropy_penalty
from entropi.errors import UserError
from entropi.model.architectures import split_training_name
from entropi.model.decoder import EntropiForCausalLM
from entropi.training import build, environment, run_folder
from entropi.training.callbacks import NonFiniteGuard, RunRecorder
from entropi.training.evaluation import evaluate_blocks
from entropi.training.loading import open_model
from entropi.training.recipe import load_recipe
from entropi.training.run import train
from entropi.training.trainer import EntropiTrainer
from training_runs import (
    REGULARISED,
    assert_same_run,
    assert_same_weights,
    independent_cross_entropy,
    of_kind,
    rewind,
    tiny,
    weights,
)

pytestmark = pytest.mark.usefixtures("surroundings")


def test_bfloat16_trains_and_is_evaluated_in_float32(tmp_path: Path, corpus: str):
    recipe = tiny(corpus, steps=8, precision="bf16", architecture="EReg(SM(t)+ScFuFFN)", learning_rate=3e-2)
    train(recipe, tmp_path / "bf16")
    train(dataclasses.replace(recipe, precision="fp32"), tmp_path / "fp32")
    steps = of_kind(tmp_path / "bf16", records.TrainingStep)
    assert steps[-1].cross_entropy < steps[0].cross_entropy
    half, single = (of_kind(tmp_path / name, records.TrainingStep)[0].cross_entropy for name in ("bf16", "fp32"))
    assert half != single
    assert half == pytest.approx(single, rel=1e-2)
    model, _, _ = open_model(tmp_path / "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # A process that never trained has no autocast: the recorded figures must be those of such a process.
    result = evaluate_blocks(model, prepare(corpus, 300, 16).packed.heldout)
    recorded = of_kind(tmp_path / "bf16", records.Evaluation)[-1]
    assert recorded.cross_entropy == pytest.approx(result.cross_entropy, rel=1e-6)
    assert np.array(recorded.entropy) == pytest.approx(result.entropy.numpy(), rel=1e-6)


def test_precision_auto_is_resolved_once(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    for fast, resolved in ((True, "bf16"), (False, "fp32")):
        folder = tmp_path / resolved
        monkeypatch.setattr(run_folder, "bf16_is_fast", lambda recipe, fast=fast: fast)
        train(tiny(corpus, steps=2, precision="auto"), folder)
        assert load_recipe(folder / "config.yaml").precision == resolved
        monkeypatch.setattr(
            run_folder, "bf16_is_fast", lambda recipe, fast=fast: not fast
        )  # the next start finds otherwise
        rewind(folder)
        train(tiny(corpus, steps=2, precision="auto"), folder)
        assert load_recipe(folder / "config.yaml").precision == resolved
        assert {r.precision for r in of_kind(folder, records.RunStarted)} == {resolved}


def test_bf16_is_fast_answers(corpus: str):
    assert environment.bf16_is_fast(tiny(corpus)) in (True, False)


def test_thresholds_and_temperatures_move(tmp_path: Path, corpus: str):
    train(tiny(corpus, entropy_every=1, steps=12, **REGULARISED), tmp_path / "run")
    snapshots = of_kind(tmp_path / "run", records.EntropySnapshot)
    assert [r.step for r in snapshots] == list(range(1, 13))
    for name, initial in (("threshold", 0.5), ("temperature", 1.0)):
        first, last = (np.array(getattr(r, name)) for r in (snapshots[0], snapshots[-1]))
        assert first.shape == (2, 2)
        assert np.abs(first - initial).max() < 1e-5  # warm-up begins at a rate of 0
        assert np.abs(last - initial).min() > 1e-3, name
    model, _, _ = open_model(tmp_path / "run")
    assert model.entropy_regularizer is not None
    assert np.array(snapshots[-1].threshold) == pytest.approx(
        model.entropy_regularizer.threshold.detach().numpy(), rel=1e-6
    )
    assert all(r.entropy_penalty is not None for r in of_kind(tmp_path / "run", records.TrainingStep))


def test_without_the_regulariser_there_is_no_penalty(tmp_path: Path, corpus: str):
    train(tiny(corpus, steps=2, architecture="SM+LN+G"), tmp_path / "run")
    assert all(r.entropy_penalty is None for r in of_kind(tmp_path / "run", records.TrainingStep))
    snapshot = of_kind(tmp_path / "run", records.EntropySnapshot)[-1]
    assert (snapshot.threshold, snapshot.temperature) == (None, None)


@pytest.mark.parametrize("architecture", ["EReg(SM(t)+ScFuFFN)", "SM+LN+G"])
def test_accumulated_micro_batches_are_one_batch(tmp_path: Path, corpus: str, architecture: str):
    """Two micro-batches of 4 and one batch of 8: the same sequences, losses, penalties, gradients and weights."""
    # Without biases: softmax does not feel a bias of the keys, whose gradient is rounding alone and whose weights,
    # since AdamW divides by the size of the gradient, wander with it.
    recipe = tiny(corpus, **REGULARISED | {"architecture": architecture, "bias": "none"}, steps=8)
    train(dataclasses.replace(recipe, batch_size=4, gradient_accumulation=2), tmp_path / "two")
    train(dataclasses.replace(recipe, batch_size=8), tmp_path / "one")
    one, two = (of_kind(tmp_path / name, records.TrainingStep) for name in ("one", "two"))
    assert [r.step for r in one] == [r.step for r in two] == list(range(1, 9))
    for a, b in zip(one, two):
        assert a.cross_entropy == pytest.approx(b.cross_entropy, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert (a.entropy_penalty or 0) == pytest.approx(b.entropy_penalty or 0, rel=1e-4)
        assert (a.entropy_penalty is None) == (architecture == "SM+LN+G")
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-3)


def test_recorded_losses_are_the_mean_over_predicted_tokens(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
):
    """15 of 16 tokens are predicted: a mean over all 16 would be too small by a fifteenth."""
    batches: list[Tensor] = []
    original = EntropiTrainer.compute_loss

    def compute_loss(trainer: EntropiTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(inputs["input_ids"].clone())
        return original(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EntropiTrainer, "compute_loss", compute_loss)
    recipe = tiny(corpus, **REGULARISED, steps=1, warmup=0.9, gradient_accumulation=2)
    train(recipe, tmp_path / "run")  # the only update has a rate of 0, so the model is the one before it
    model, _, _ = open_model(tmp_path / "run")
    (step,) = of_kind(tmp_path / "run", records.TrainingStep)
    ids = torch.cat(batches)
    assert ids.shape == (8, 16)
    with torch.no_grad():
        out = model(ids)
        expected = independent_cross_entropy(out.logits, ids)
        assert model.entropy_regularizer is not None
        penalty = 1e-2 * float(model.entropy_regularizer(out.entropies))
    assert step.cross_entropy == pytest.approx(expected, rel=1e-5)
    assert step.entropy_penalty == pytest.approx(penalty, rel=1e-4)
    assert len({tuple(row) for row in ids.tolist()}) == 8


def test_decay_spares_everything_but_matrices(tmp_path: Path, corpus: str):
    for architecture in ("EReg(SM(t)+ScFFN)", "SM+LN+G", "EReg(SM(t)+ScFuFFN)", "SM+SNorm(QKVO+FFN)", "SM+WNorm(FFN)"):
        recipe = tiny(corpus, architecture=architecture, bias="all", evaluate_every=0)
        _, regularised = split_training_name(architecture)
        model = EntropiForCausalLM(build.model_config(recipe, 300))
        recorder = RunRecorder(
            tmp_path / "records.jsonl", ProgressLine("", 1), log_every=1, entropy_every=1, tokens_per_step=1
        )
        trainer = EntropiTrainer(model=model, args=build.training_arguments(recipe, tmp_path), recorder=recorder)
        groups = trainer.create_optimizer().param_groups
        names = {id(p): name for name, p in model.named_parameters()}
        decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] > 0}
        spared = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] == 0}
        assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
        assert decayed | spared == set(names.values())
        assert not decayed & spared
        matrices = ("weight", "parametrizations.weight.original", "parametrizations.weight.original1")
        assert all(name.partition(".")[2].endswith(matrices) and "norm." not in name for name in decayed)
        last = {name.rpartition(".")[2] for name in spared}
        expected = {"bias", "weight"} | ({"alpha", "beta"} if "Sc" in architecture else set())
        expected |= {"original0"} if "WNorm" in architecture else set()  # a row's length is a gain
        assert last == expected | ({"parameter", "threshold"} if regularised else set())
        assert all("norm" in name for name in spared if name.endswith(".weight"))


def test_only_matrices_shrink_without_gradients(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    """The same in deeds: with gradients of zero, AdamW does nothing but decay."""
    original = EntropiTrainer.training_step

    def training_step(trainer: EntropiTrainer, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = original(trainer, model, *args, **kwargs)
        for p in model.parameters():
            assert p.grad is not None
            p.grad.zero_()
        return loss

    monkeypatch.setattr(EntropiTrainer, "training_step", training_step)
    common = {**REGULARISED, "warmup": 0.0, "bias": "qk", "gradient_clip": 0.0, "schedule": "constant"}
    train(tiny(corpus, steps=1, **common), tmp_path / "one")
    train(tiny(corpus, steps=3, **common), tmp_path / "three")
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    for name, value in one.items():
        matrix = name.endswith("weight") and "norm" not in name
        factor = (1 - 1e-2 * 0.1) ** 2 if matrix else 1.0
        assert torch.allclose(three[name], value * factor, rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_gradients_are_clipped(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, clip: float):
    used: list[float] = []
    original = NonFiniteGuard.on_pre_optimizer_step

    def before_update(guard: NonFiniteGuard, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        used.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)))
        original(guard, *args, model=model, **kwargs)

    monkeypatch.setattr(NonFiniteGuard, "on_pre_optimizer_step", before_update)
    train(tiny(corpus, steps=3, gradient_clip=clip, gradient_accumulation=2), tmp_path / "run")
    recorded = [r.grad_norm for r in of_kind(tmp_path / "run", records.TrainingStep)]
    assert min(recorded) > 0.1  # as it was before clipping
    assert used == pytest.approx([clip] * 3 if clip else recorded, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_schedules(tmp_path: Path, corpus: str, schedule: str, expected: list[float], floor: float):
    if schedule == "constant" and floor:
        with pytest.raises(UserError, match="learning_rate_floor is for schedules that fall"):
            tiny(corpus, schedule=schedule, learning_rate_floor=floor)
        return
    settings = {"warmup": 1 / 3, "schedule": schedule, "learning_rate": 0.5, "learning_rate_floor": floor}
    train(tiny(corpus, steps=6, **settings), tmp_path / "run")
    found = [r.learning_rate for r in of_kind(tmp_path / "run", records.TrainingStep)]
    above = [0.5 * rate for rate in expected]
    falling = [floor + (rate - floor * rate / 0.5) for rate in above[2:]]  # the part above the floor shrinks
    assert found == pytest.approx(above[:2] + falling, abs=1e-9)


def test_muon_turns_matrices_of_the_layers_and_nothing_else(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
):
    """Their first update is orthogonal, of AdamW's size; embeddings and gains are updated as AdamW does."""
    weights_at: list[dict[str, Tensor]] = []
    original = EntropiTrainer.training_step

    def training_step(trainer: EntropiTrainer, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        weights_at.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return original(trainer, model, *args, **kwargs)

    monkeypatch.setattr(EntropiTrainer, "training_step", training_step)
    common: dict[str, Any] = {"steps": 2, "warmup": 0.0, "weight_decay": 0.0, "schedule": "constant", "hidden_size": 32}
    train(tiny(corpus, optimizer="muon", **common), tmp_path / "muon")
    train(tiny(corpus, **common), tmp_path / "adamw")
    muon, adamw = (
        {name: after[name] - before[name] for name in before} for before, after in (weights_at[:2], weights_at[2:])
    )
    of_layers = {name for name in muon if ".blocks." in name and name.endswith("weight") and muon[name].dim() == 2}
    assert {name.rsplit(".", 2)[1] for name in of_layers} == {"query", "key", "value", "output", "fused"}
    for name, update in muon.items():
        if name in of_layers:
            singular = torch.linalg.svdvals(update / (1e-2 * 0.2 * math.sqrt(max(update.shape))))
            assert singular.median() > 0.7, name  # Newton-Schulz brings nearly all to about 1
            assert singular.max() < 1.3, name
        else:
            assert torch.allclose(update, adamw[name], rtol=1e-5, atol=1e-9), name


def test_muon_resumes_as_if_nothing_had_happened(tmp_path: Path, corpus: str):
    recipe = tiny(corpus, optimizer="muon", architecture="SM+LN+G", schedule="cosine", keep_checkpoints=2)
    train(recipe, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    rewind(tmp_path / "again", to=5)
    train(recipe, tmp_path / "again")
    assert of_kind(tmp_path / "again", records.RunStarted)[-1].resumed_at == 5
    assert_same_run(tmp_path / "again", tmp_path / "run")


def test_a_mean_penalty_feels_neither_batch_nor_length_nor_accumulation(corpus: str):
    """The published sum grows with all three but accumulation; the mean, and the penalty by heads, with none."""
    torch.manual_seed(0)
    one = torch.rand(2, 1, 2, 16)
    batch, long = one.repeat(1, 6, 1, 1), one.repeat(1, 1, 1, 3)
    threshold = torch.full((2, 2), 0.2)

    def penalty(entropies: Tensor, **options: Any) -> float:
        # In units of the maximum entropy, which grows with the length by itself.
        return float(entropy_penalty(entropies * math.log(entropies.shape[-1]), threshold, margin=0.1, **options)) / (
            math.log(entropies.shape[-1]) ** 2
        )

    assert penalty(batch, reduction="sum") == pytest.approx(6 * penalty(one, reduction="sum"))
    assert penalty(long, reduction="sum") == pytest.approx(3 * penalty(one, reduction="sum"))
    for options in ({"reduction": "mean"}, {"granularity": "head"}):
        assert penalty(one, **options) > 0
        assert penalty(batch, **options) == pytest.approx(penalty(one, **options))
        assert penalty(long, **options) == pytest.approx(penalty(one, **options))


def test_an_update_s_penalty_is_that_of_its_sequences(tmp_path: Path, corpus: str):
    """Eight sequences in one, two or eight micro-batches: the mean is the same, the sum that of a micro-batch."""
    found = {}
    for reduction in ("mean", "sum"):
        for parts in (1, 2, 8):
            recipe = tiny(
                corpus,
                **REGULARISED | {"entropy_reduction": reduction},
                steps=1,
                batch_size=8 // parts,
                gradient_accumulation=parts,
            )
            train(recipe, tmp_path / f"{reduction}{parts}")
            (step,) = of_kind(tmp_path / f"{reduction}{parts}", records.TrainingStep)
            found[reduction, parts] = step.entropy_penalty
    assert found["mean", 2] == pytest.approx(found["mean", 1], rel=1e-4)
    assert found["mean", 8] == pytest.approx(found["mean", 1], rel=1e-4)
    assert found["sum", 1] == pytest.approx(found["mean", 1] * 8 * 16, rel=1e-4)
    assert found["sum", 8] == pytest.approx(found["mean", 1] * 16, rel=1e-4)


def test_a_tokenizer_that_changed_is_refused(tmp_path: Path, corpus: str):
    path = tmp_path / "tokenizer.json"
    prepare(corpus, 300, 16).tokenizer.save(str(path))
    recipe = tiny(corpus, tokenizer=str(path), steps=4, save_every=2)
    train(recipe, tmp_path / "run")
    rewind(tmp_path / "run", to=2)
    prepare(corpus, 290, 16).tokenizer.save(str(path))
    with pytest.raises(UserError, match="the tokenizer has changed since"):
        train(recipe, tmp_path / "run")
    prepare(corpus, 300, 16).tokenizer.save(str(path))
    train(recipe, tmp_path / "run")
