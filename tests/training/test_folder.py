"""Folders that cannot be used for a run, and runs that may not be continued."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from entropi.data.prepare import prepare
from entropi.errors import UserError
from entropi.training.recipe import Recipe
from entropi.training.run import train
from training_runs import (
    checkpoints,
    formula_text,
    rewind,
    tiny,
)

pytestmark = pytest.mark.usefixtures("surroundings")


def test_folder_of_another_recipe_names_the_differences(finished: tuple[Recipe, Path]):
    recipe, folder = finished
    with pytest.raises(UserError) as caught:
        train(dataclasses.replace(recipe, layers=1, learning_rate=0.5), folder)
    assert str(caught.value).endswith(
        "differs in layers (2 there, 1 here), learning_rate (0.01 there, 0.5 here); choose another folder"
    )


def test_folder_that_is_not_a_run_folder(tmp_path: Path, corpus: str):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear mother")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "letters", tmp_path / "file"):
        with pytest.raises(UserError, match="is not a run folder"):
            train(tiny(corpus), folder)
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["mother.txt"]


def test_folder_below_a_file(tmp_path: Path, corpus: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file: choose another"):
        train(tiny(corpus), tmp_path / "file" / "deeper" / "run")


def test_folder_that_cannot_be_created(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", "run")

    prepare(corpus, 300, 16)  # fill the cache, which has folders of its own to make
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot create the run folder .*Permission denied"):
        train(tiny(corpus), tmp_path / "run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="a superuser can write everywhere")
def test_folder_without_permission_to_write(tmp_path: Path, corpus: str):
    (tmp_path / "mine").mkdir(mode=0o555)
    for folder in (tmp_path / "mine", tmp_path / "mine" / "run"):
        with pytest.raises(UserError, match="cannot write to"):
            train(tiny(corpus), folder)


def test_nothing_is_written_for_a_recipe_that_cannot_be_trained(tmp_path: Path, corpus: str):
    """A wrong corpus must not occupy the folder: the right one would be "another recipe" there."""
    for recipe, message in (
        (tiny(str(tmp_path / "nowhere")), "there is no file or folder"),
        (tiny(corpus, batch_size=9999), "training sequences of 16 tokens, one update needs 9999"),
        (tiny(corpus, architecture="SM+X"), "unknown architecture 'SM\\+X': 'X' is unknown; legal are SM, "),
        (tiny(corpus, context_length=50_000), "one block needs 50000"),
    ):
        with pytest.raises(UserError, match=message):
            train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_float16_needs_a_gpu(tmp_path: Path, corpus: str):
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        train(tiny(corpus, precision="fp16"), tmp_path / "run")


def test_a_second_process_is_refused(tmp_path: Path, corpus: str):
    """It would remove the checkpoint that the first is writing."""
    fcntl = pytest.importorskip("fcntl")
    recipe, folder = tiny(corpus, steps=1), tmp_path / "run"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another process is training in"):
            train(recipe, folder)
    finally:
        os.close(handle)
    train(recipe, folder)


def test_a_corpus_that_changed_is_refused(tmp_path: Path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(formula_text(number, 60))
    recipe, folder = tiny(str(texts), steps=4, save_every=2), tmp_path / "run"
    train(recipe, folder)
    rewind(folder, to=2)
    (texts / "more.txt").write_text(formula_text(9, 60))
    with pytest.raises(UserError, match="has changed since"):
        train(recipe, folder)
    assert checkpoints(folder) == ["checkpoint-2"]
