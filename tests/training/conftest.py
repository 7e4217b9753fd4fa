"""What the tests of training runs share: surroundings in which sums have one order, a corpus, and a run that ended."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from entropi.cache import default_cache_dir
from entropi.training.recipe import Recipe
from entropi.training.run import train
from training_runs import formula_text, tiny


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of their own, and one thread, for the tests of a file and the processes that they start.

    Sums are then made in one order, so that a resumed run can be compared with an uninterrupted one digit by digit.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache")
    # Compiled kernels are named by their source and the machine, so that no file of tests has to make them anew.
    compiled = default_cache_dir() / "native"
    compiled.mkdir(mode=0o700, parents=True, exist_ok=True)
    (cache / "native").symlink_to(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTROPI_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"), prepend=os.pathsep)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty batches of four sequences of 16 tokens: runs of a few steps pass over it more than once."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        (folder / f"{number}.py").write_text(formula_text(number, 24), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[Recipe, Path]:
    """A tiny run that has ended, and its recipe."""
    recipe = tiny(corpus, log_every=4, keep_checkpoints=3)
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe, folder)
    return recipe, folder


@pytest.fixture
def again(tmp_path: Path, finished: tuple[Recipe, Path]) -> tuple[Recipe, Path]:
    """A copy of the finished run, to be damaged."""
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "again"))
