"""The recipe that decides everything: read, written, compared, refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from entropi.errors import UserError
from entropi.model.architectures import split_training_name
from entropi.training.recipe import Recipe, differences, load_recipe, save_recipe
from training_runs import ROOT


def test_recipe_round_trip(tmp_path: Path):
    recipe = Recipe(
        architecture="EReg(SM(t)+ScFuFFN)",
        corpus="größe: # 1 'a' \"b\"",
        learning_rate=1e-5,
        entropy_weight=3e-20,
        seed=5,
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert "größe" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_recipe_of_a_few_settings_has_defaults_for_the_rest(tmp_path: Path):
    path = write(tmp_path / "r.yaml", "# mine\nsteps: 5\nlearning_rate: 1e-3\nwarmup: 0\nbias: all\n")
    assert load_recipe(path) == Recipe(steps=5, learning_rate=1e-3, warmup=0.0, bias="all")
    assert isinstance(load_recipe(path).learning_rate, float)  # YAML alone reads 1e-3 as text


def test_recipe_tells_all_problems_at_once(tmp_path: Path):
    path = write(
        tmp_path / "r.yaml",
        "stepz: 5\n3: x\nlayers: two\nheads: 1.5\nbias: some\nseed: true\nlearning_rate: fast\ncorpus: 3\n"
        "warmup: 2\nbatch_size: 0\ngradient_clip: -1\nentropy_weight: .nan\nvocab_size: 5\nsave_every: null\n",
    )
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.removeprefix(f"{path}: ").split("; ") == [
        "unknown setting 3",
        "unknown setting stepz",
        "layers is 'two', expected int",
        "heads is 1.5, expected int",
        "bias is 'some', expected one of qk, all, none",
        "seed is True, expected int",
        "learning_rate is 'fast', expected float",
        "corpus is 3, expected str",
        "save_every is None, expected int",
        "vocab_size is 5, at least 257 is needed",
        "batch_size is 0, at least 1 is needed",
        "entropy_weight is nan, a finite number is needed",
        "gradient_clip is -1.0, it cannot be negative",
        "warmup is 2.0, a share of the steps in [0, 1) is needed",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, at least 1 is needed"),
        ({"context_length": 1}, "context_length is 1, at least 2 is needed"),
        ({"save_every": -1, "log_every": 0}, "log_every is 0, at least 1 .*; save_every is -1, at least 0 is needed"),
        ({"hidden_size": 10, "heads": 4}, "hidden_size is 10, not a multiple of heads, 4"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, it must be positive"),
        ({"learning_rate": math.inf}, "learning_rate is inf, a finite number is needed"),
        ({"temperature_init": 0.0}, "temperature_init is 0.0, it must be positive"),
        ({"entropy_margin": 1.0}, "entropy_margin is 1.0, a share in"),
        ({"seed": 2**32}, "seed is 4294967296, it must be below 2\\^32"),
        ({"bias": "some", "steps": "3"}, "bias is 'some', expected one of .*; steps is '3', expected int"),
        ({"steps": True}, "steps is True, expected int"),
        ({"softmax": "power-9"}, "softmax must be exact, power-1 to power-8 or .*, got 'power-9'"),
        (
            {"softmax": "polynomial"},
            "softmax must be exact, .* or polynomial-1 to polynomial-8 with or without /keys or a .*, got 'polynomial'",
        ),
        ({"softmax": 2}, "softmax is 2, expected str"),
        ({"architecture": "EReg(Pow+ScFuFFN)", "softmax": "power-2"}, "must be polynomial-1/keys to .*, got 'power-2'"),
        ({"final_norm": "no"}, "final_norm is 'no', expected bool"),
    ],
)
def test_impossible_recipes_from_python(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize("text", ["", "# nothing\n", "steps\n", "- steps\n", "3\n"])
def test_yaml_that_is_no_recipe(tmp_path: Path, text: str):
    with pytest.raises(UserError, match="is not a training recipe"):
        load_recipe(write(tmp_path / "r.yaml", text))


def test_files_that_are_no_yaml(tmp_path: Path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    write(tmp_path / "broken.yaml", "steps: [1\nlayers: 3\n")
    for name in ("binary.yaml", "broken.yaml", "missing.yaml", "."):
        with pytest.raises(UserError, match="cannot read the recipe") as caught:
            load_recipe(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_yaml_runs_no_code(tmp_path: Path):
    with pytest.raises(UserError):
        load_recipe(write(tmp_path / "r.yaml", "corpus: !!python/object/apply:os.system ['true']\n"))


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.yaml"
    save_recipe(Recipe(steps=1), path)
    monkeypatch.setattr(yaml, "safe_dump", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_recipe(Recipe(steps=2), path)
    assert load_recipe(path).steps == 1


def test_differences():
    assert differences(Recipe(), Recipe()) == []
    assert differences(Recipe(precision="auto"), Recipe(precision="bf16")) == []
    assert differences(Recipe(precision="fp32"), Recipe(precision="bf16")) == ["precision ('bf16' there, 'fp32' here)"]
    assert differences(Recipe(steps=1), Recipe(steps=2)) == ["steps (2 there, 1 here)"]


@pytest.mark.parametrize(
    ("lines", "softmax"),
    [
        ("exp_iterations: 0\npolynomial: false\n", "exact"),
        ("exp_iterations: 2\n", "power-2"),
        ("exp_iterations: 1\npolynomial: true\n", "polynomial-1"),
    ],
)
def test_recipes_with_two_settings_for_the_softmax_are_read(tmp_path: Path, lines: str, softmax: str):
    """As runs wrote them until 27 November 2026; what is written now has one."""
    path = write(tmp_path / "r.yaml", f"steps: 7\n{lines}")
    recipe = load_recipe(path)
    assert (recipe.steps, recipe.softmax) == (7, softmax)
    save_recipe(recipe, path)
    assert yaml.safe_load(path.read_text())["softmax"] == softmax
    assert load_recipe(path) == recipe


def test_recipes_of_the_gallery_are_read():
    """They are old run folders."""
    paths = sorted((ROOT / "docs" / "gallery" / "records").glob("*/config.yaml"))
    assert {load_recipe(path).softmax for path in paths if "exp_iterations" in path.read_text()} == {"exact"}


def test_older_settings_that_mean_nothing_are_told_with_the_rest(tmp_path: Path):
    with pytest.raises(UserError, match=r"polynomial needs exp_iterations; .*; unknown setting colour; steps is 0"):
        load_recipe(write(tmp_path / "r.yaml", "polynomial: true\ncolour: 3\nsteps: 0\n"))
    with pytest.raises(UserError, match="softmax has taken the place of exp_iterations: leave exp_iterations out"):
        load_recipe(write(tmp_path / "r.yaml", "softmax: power-2\nexp_iterations: 2\n"))


SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_parse(path: Path):
    recipe = load_recipe(path)
    split_training_name(recipe.architecture)
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= {f.name for f in dataclasses.fields(Recipe)}


def test_recipes_are_shipped():
    names = {path.stem for path in SHIPPED}
    assert {"laptop", "one_gpu", "several_gpus", "languini_12_layers_512_tokens"} <= names
    assert {
        f"codeparrot_{layers}_layers_{length}_tokens" for layers, length in ((12, 128), (12, 256), (18, 128))
    } <= names


@pytest.mark.parametrize("name", ["codeparrot_12_layers_128_tokens", "codeparrot_12_layers_256_tokens"])
def test_codeparrot_recipe_is_the_paper_s(name: str):
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    assert (recipe.corpus, recipe.packing) == ("codeparrot", "document")
    assert recipe.batch_size * recipe.gradient_accumulation == 512
    assert (recipe.optimizer, recipe.learning_rate, recipe.weight_decay) == ("adamw", 1e-3, 0.1)
    assert (recipe.warmup, recipe.schedule, recipe.gradient_clip) == (0.05, "linear", 1.0)
    assert (recipe.entropy_weight, recipe.entropy_margin, recipe.entropy_reduction) == (1e-5, 0.2, "sum")
    assert (recipe.hidden_size, recipe.heads, recipe.bias, recipe.adam_beta2) == (768, 12, "qk", 0.999)


def test_every_setting_is_explained():
    from docstring_parser import parse

    explained = {p.arg_name: p.description for p in parse(Recipe.__doc__ or "").params}
    assert list(explained) == [f.name for f in dataclasses.fields(Recipe)]
    assert all(explained.values())
