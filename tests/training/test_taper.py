"""Tapering as a run: the schedule of its gates, its loss, records, going on, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from checkpoints import configuration, random_model
from checkpoints import tokenizer as letters
from entropi import records
from entropi.errors import UserError
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.tapering import target_of
from entropi.training.build import model_config
from entropi.training.environment import bf16_is_fast
from entropi.training.loading import open_model
from entropi.training.recipe import Recipe
from entropi.training.run import train
from entropi.training.taper import Student, TaperSchedule, gate
from training_runs import assert_equal_weights, assert_same_run, of_kind, rewind, tiny, weights

pytestmark = pytest.mark.usefixtures("surroundings")


# --- The schedule -----------------------------------------------------------------------------------------------------


def test_a_gate_is_half_a_cosine():
    assert [gate(p) for p in (-1.0, 0.0, 1.0, 3.0)] == [1.0, 1.0, 0.0, 0.0]
    assert gate(0.5) == pytest.approx(0.5)
    assert gate(1 / 3) == pytest.approx(0.75)


def test_stages_follow_each_other():
    schedule = TaperSchedule(["activation", "norm"], layers=2, start=0.2, end=0.8, order="together")
    gates = {time: schedule.gates(time) for time in (0.0, 0.2, 0.35, 0.5, 0.6, 0.8, 1.0)}
    assert gates[0.0] == gates[0.2] == {"activation": [1.0, 1.0], "norm": [1.0, 1.0]}
    assert gates[0.35]["activation"] == pytest.approx([0.5, 0.5])
    assert gates[0.5] == {"activation": [0.0, 0.0], "norm": [1.0, 1.0]}
    assert gates[0.6]["norm"] == pytest.approx([0.75, 0.75])
    assert gates[0.8] == gates[1.0] == {"activation": [0.0, 0.0], "norm": [0.0, 0.0]}
    told = [schedule.stage(time) for time in (0.0, 0.2, 0.3, 0.5, 0.7, 0.8, 1.0)]
    assert told == ["before", "before", "activation", "norm", "norm", "after", "after"]


def test_layers_one_by_one():
    """The first half of the norms' time is one layer's, the second the other's; the final norm has one gate."""
    options: dict[str, Any] = dict(layers=2, start=0.0, end=1.0)
    upwards = TaperSchedule(["norm"], order="upwards", **options)
    assert [upwards.gates(time)["norm"] for time in (0.25, 0.5, 0.75)] == [
        [pytest.approx(0.5), 1.0],
        [0.0, 1.0],
        [0.0, pytest.approx(0.5)],
    ]
    assert TaperSchedule(["norm"], order="downwards", **options).gates(0.5) == {"norm": [1.0, 0.0]}
    assert TaperSchedule(["final_norm"], order="upwards", **options).gates(0.5) == {"final_norm": [pytest.approx(0.5)]}


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_by_its_formula():
    """Of two micro-batches, whose losses add up to the update's."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8
    )
    teacher = EntropiForCausalLM(EntropiConfig(architecture="SM+LN+G", initializer_range=0.5, **sizes)).eval()
    recipe = Recipe(
        taper_cross_entropy=0.5,
        taper_divergence=2.0,
        taper_hidden=3.0,
        entropy_weight=0.7,
        entropy_margin=0.01,
        entropy_reduction="mean",
    )
    student = Student(teacher, target_of(teacher.config, "SM+LN"), recipe).train()
    student.set_gates({"activation": [0.0, 0.5]})
    ids = torch.randint(40, (4, 8))
    total = sum(student(part, labels=part, num_items_in_batch=torch.tensor(28)).loss for part in (ids[:2], ids[2:]))

    student.eval()
    with torch.no_grad():
        ours, theirs = (model(ids, output_hidden_states=True) for model in (student, teacher))
    p, q = (functional.log_softmax(out.logits[:, :-1].double(), dim=-1) for out in (theirs, ours))
    cross_entropy = -q.gather(2, ids[:, 1:, None]).mean()
    divergence = (p.exp() * (p - q)).sum(dim=-1).mean()
    pairs = list(zip(ours.hidden_states, theirs.hidden_states))[1:]
    hidden = sum((((a - b) ** 2).sum(-1) / (b**2).sum(-1)).mean() for a, b in pairs) / len(pairs)
    penalty = 0.0
    for a, b in zip(ours.entropies, theirs.entropies):
        squares = [d * d if abs(d) > 0.01 * math.log(8) else 0.0 for d in (a - b).flatten().tolist()]
        penalty += sum(squares) / len(squares) / 2
    assert penalty > 0
    expected = 0.5 * cross_entropy + 2.0 * divergence + 3.0 * hidden + 0.7 * penalty
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(
        torch.stack([one.distance for one in student.observed]).mean(dim=0),
        torch.stack([(a - b).abs().mean(dim=(0, 2)) for a, b in zip(ours.entropies, theirs.entropies)]),
        atol=1e-6,
    )


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    recipe = tiny(corpus, architecture="SM+LN+G", steps=4, evaluate_every=0, save_every=0)
    train(recipe, folder)
    return folder


def tapering(corpus: str, teacher: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "architecture": "SM(t)+ScFuFFN",
        "softmax": "polynomial-1",
        "final_norm": False,
        "taper_from": str(teacher),
        "steps": 8,
        "save_every": 4,
        "taper_start": 0.125,
        "taper_end": 0.875,
        "learning_rate": 1e-3,
        "entropy_weight": 1e-3,
    }
    # Sizes are the teacher's.
    plain = {name: Recipe.__dataclass_fields__[name].default for name in ("layers", "heads", "hidden_size")}
    return tiny(corpus, **(plain | settings | changes))


@pytest.fixture(scope="module")
def tapered(tmp_path_factory: pytest.TempPathFactory, corpus: str, teacher: Path) -> tuple[Recipe, Path]:
    recipe = tapering(corpus, teacher)
    folder = tmp_path_factory.mktemp("runs") / "tapered"
    train(recipe, folder)
    return recipe, folder


def test_a_tapered_run_is_a_plain_model_with_records(tapered: tuple[Recipe, Path], teacher: Path):
    _, folder = tapered
    model, tokenizer, _ = open_model(folder)
    config = model.config
    assert (config.architecture, config.softmax, config.final_norm) == ("SM(t)+ScFuFFN", "polynomial-1", False)
    assert tokenizer.to_str() == open_model(teacher)[1].to_str()
    (started,) = of_kind(folder, records.RunStarted)
    assert (started.layers, started.teacher) == (2, str(teacher))
    assert started.parameters == model.inference_parameters()

    found = {r.step: r for r in of_kind(folder, records.TaperSnapshot)}
    assert list(found) == [r.step for r in of_kind(folder, records.EntropySnapshot)] == [1, 3, 6, 8]
    assert [r.stage for r in found.values()] == ["before", "activation", "softmax", "after"]
    assert set(found[1].gates) == {"activation", "norm", "softmax", "final_norm"}
    assert found[1].gates["norm"] == [1.0, 1.0]
    assert all(gates == [0.0] * len(gates) for gates in found[8].gates.values())
    assert found[1].divergence == pytest.approx(0.0, abs=1e-6)
    assert max(map(max, found[1].distance)) == pytest.approx(0.0, abs=1e-5)
    assert found[8].divergence > 0
    assert found[8].hidden is not None
    assert found[8].hidden > 0
    assert min(map(max, found[8].distance)) > 0
    last = of_kind(folder, records.Evaluation)[-1]
    assert math.isfinite(last.perplexity)


def test_a_tapering_goes_on_as_if_nothing_had_happened(tapered: tuple[Recipe, Path], tmp_path: Path):
    recipe, whole = tapered
    folder = Path(shutil.copytree(whole, tmp_path / "again"))
    rewind(folder, to=4)
    checkpoint = folder / "checkpoints" / "checkpoint-4" / "model.safetensors"
    assert checkpoint.stat().st_size < 2 * (whole / "model" / "model.safetensors").stat().st_size  # no teacher in it
    train(recipe, folder)
    assert_same_run(folder, whole)
    assert_equal_weights(weights(folder), weights(whole))
    mine, other = (of_kind(place, records.TaperSnapshot) for place in (folder, whole))
    assert [r.gates for r in mine] == [r.gates for r in other]
    assert mine[-1].divergence == pytest.approx(other[-1].divergence, rel=1e-5)
    assert [r.resumed_at for r in of_kind(folder, records.RunStarted)] == [0, 4]
    rewind(folder)  # interrupted in the last evaluation: what remains is to merge
    train(recipe, folder)
    assert_equal_weights(weights(folder), weights(whole))


def test_a_run_of_another_teacher_does_not_go_on(tapered: tuple[Recipe, Path], teacher: Path, tmp_path: Path):
    moved = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    recipe, folder = dataclasses.replace(tapered[0], taper_from=str(moved)), tmp_path / "again"
    shutil.copytree(tapered[1], folder)
    rewind(folder, to=4)
    text = (folder / "config.yaml").read_text(encoding="utf-8").replace(str(teacher), str(moved))
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    file = moved / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.final_norm.bias"] += 1e-6
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"the teacher {moved} has changed since {folder} was begun"):
        train(recipe, folder)


def test_a_converted_model_is_tapered(tmp_path: Path):
    """Llama's: RMSNorm and SwiGLU; norms leave, the activation becomes a product."""
    source = tmp_path / "llama"
    random_model(configuration("Llama")).save_pretrained(source)
    letters().save_pretrained(source)
    (tmp_path / "text.txt").write_text("THE CAT SAT ON THE MAT. " * 400, encoding="utf-8")
    recipe = tapering(
        str(tmp_path / "text.txt"),
        source,
        architecture="SM+Bilinear",
        softmax="exact",
        final_norm=True,
        steps=3,
        save_every=0,
        evaluate_every=0,
        learning_rate=1e-5,
    )
    model, _, folder = open_model(train(recipe, tmp_path / "run").parent)
    assert (model.config.architecture, model.config.position_embedding) == ("SM+Bilinear", "rotary")
    assert (
        "chat_template" in (folder / "tokenizer_config.json").read_text() or (folder / "chat_template.jinja").exists()
    )


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "layers is 3, the teacher has 2"),
        ({"hidden_size": 32, "heads": 8}, "heads is 8, the teacher has 2; hidden_size is 32, the teacher has 16"),
        ({"architecture": "EReg(SM+ScFuFFN)"}, "leave EReg"),
        ({"context_length": 32}, "context_length is 32, the teacher takes 16 tokens: --context-length 16 at most"),
        ({"tokenizer": "x", "temperature_init": 2.0}, "tokenizer is for models that begin anew: .*; temperature_init"),
        ({"architecture": "SM+RMS+G"}, "the teacher has no RMSNorm"),
        ({"architecture": "SM+XX"}, "unknown architecture"),
        ({"taper_from": "nowhere"}, "there is no model at nowhere"),
        ({"bias": "none"}, "bias 'none' has no place for the biases of"),
    ],
)
def test_what_cannot_be_tapered_is_refused(corpus: str, teacher: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        model_config(tapering(corpus, teacher, **changes), 0)


def test_arithmetic_is_measured_at_the_teacher_s_width(corpus: str, teacher: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[tuple[int, ...]] = []
    ones = torch.ones
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: made.append(shape) or ones(*shape, **options))
    bf16_is_fast(tapering(corpus, teacher))
    assert set(made) == {(64, 16), (16, 64)}


def test_several_processes_and_shards_are_refused(
    corpus: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tapering(corpus, teacher)
    with pytest.raises(UserError, match="tapered in one process"):
        train(recipe, tmp_path / "run", shard=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="tapered in one process"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taper_start": 0.8}, "taper_start and taper_end are 0.8 and 0.8"),
        ({"taper_end": 1.5}, "taper_start and taper_end are 0.1 and 1.5"),
        ({"taper_stages": "norm, norm, softmax"}, "taper_stages is 'norm, norm, softmax', activation, norm, .* needed"),
        ({"taper_hidden": -1.0}, "taper_hidden is -1.0, it cannot be negative"),
        ({"taper_layers": "sideways"}, "expected one of together, upwards, downwards"),
        ({"taper_from": "x", "compile": True}, "compile .* leave"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Recipe(**changes)
