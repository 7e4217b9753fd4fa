"""`entropi taper`: from a run folder to another, and what is said of wrong input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Done, assert_refused
from entropi.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("surroundings")
RUN = ("--context-length", "16", "--steps", "2", "--batch-size", "4", "--precision", "fp32")


def test_a_run_is_tapered_and_continued(entropi: Callable[..., Done], trained: Path, corpus: Path, tmp_path: Path):
    words = ("--corpus", corpus, *RUN)
    target = ("--to", "SM(t) + ScFuFFN", "--softmax", "polynomial-1", "--no-final-norm")
    done = entropi("taper", trained, tmp_path / "run", *target, *words, "--taper-end", "0.5")
    assert done.status == 0, done
    assert done.out.startswith("held-out perplexity")
    recipe = load_recipe(tmp_path / "run" / "config.yaml")
    assert (recipe.taper_from, recipe.final_norm, recipe.taper_end) == (str(trained), False, 0.5)
    again = entropi("taper", trained, tmp_path / "run")
    assert (again.status, "nothing to do" in again.err) == (0, True)
    measured = entropi("evaluate", tmp_path / "run")
    assert measured.status == 0, measured
    assert_refused(
        entropi("taper", trained, tmp_path / "run", "--to", "SM(t)+ScFFN"), "differs in architecture", "choose another"
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--to", "SM+LN+G"], ["cannot be tapered to SM+LN+G: the teacher has no LayerNorm", "does not become gelu"]),
        (["--to", "SM(t)+ScFuFFN"], ["nothing leaves SM(t)+ScFuFFN"]),
        (["--to", "SM(t)+XX"], ["unknown architecture 'SM(t)+XX'"]),
        ([], ["--to is missing"]),
        (["--to", "SM(t)", "--layers", "5"], ["layers is 5, the teacher has 2"]),
        (["--to", "SM(t)+ScFuFFN", "--softmax", "power-9"], ["softmax must be exact"]),
        (["--to", "SM(t)", "--taper-stages", "norm"], ["taper_stages is 'norm'"]),
        (["--to", "SM(t)", "--compile", "true"], ["compile is not for tapering"]),
        (["--to", "SM(t)", "--taper-layers", "none"], ["taper_layers: expected one of"]),
    ],
)
def test_wrong_input(entropi: Callable[..., Done], trained: Path, tmp_path: Path, words: list[Any], parts: list[str]):
    assert_refused(entropi("taper", trained, tmp_path / "run", *words, *RUN), *parts)
    assert not (tmp_path / "run").exists()


def test_no_model(entropi: Callable[..., Done], tmp_path: Path):
    assert_refused(entropi("taper", tmp_path / "none", tmp_path / "run", "--to", "SM"), "there is no model at")
    assert_refused(entropi("taper", tmp_path / "none"), "RUN is missing (see entropi taper --help)")
