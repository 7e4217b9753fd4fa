"""Before anything imports Triton, which decides at import whether its kernels are interpreted; and shared helpers."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from entropi.training.recipe import Recipe

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a worker a core; more threads would wait for each other

pytest.register_assert_rewrite("serving", "training_runs")


# Files with many cases of a second each, as Triton's kernels are interpreted there: of each parametrised test in them
# the first case and then every n-th is fast; the others are slow, which `make test` runs and `make check` does not.
EVERY_NTH_IS_FAST = {"test_triton.py": 4}


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    counts: Counter[tuple[Path, str]] = Counter()
    for item in items:
        every = EVERY_NTH_IS_FAST.get(item.path.name, 1)
        test = item.path, getattr(item, "originalname", item.name)
        if counts[test] % every:
            item.add_marker("slow")
        counts[test] += 1


@pytest.fixture(scope="session")
def smollm2():
    """A pretrained language model and its tokenizer."""
    from pretrained import smollm2

    return smollm2()


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of their own, and one thread, for the tests of a file and the processes that they start.

    Sums are then made in one order, so that a resumed run can be compared with an uninterrupted one digit by digit.
    """
    from entropi.cache import default_cache_dir

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
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "src"), prepend=os.pathsep)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty batches of four sequences of 16 tokens: runs of a few steps pass over it more than once."""
    from training_runs import formula_text

    folder = tmp_path_factory.mktemp("corpus")
    for number in range(12):
        (folder / f"{number}.py").write_text(formula_text(number, 24), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[Recipe, Path]:
    """A tiny run that has ended, and its recipe."""
    from entropi.training.run import train
    from training_runs import tiny

    recipe = tiny(corpus, log_every=4, keep_checkpoints=3)
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(recipe, folder)
    return recipe, folder


@pytest.fixture
def again(tmp_path: Path, finished: tuple[Recipe, Path]) -> tuple[Recipe, Path]:
    """A copy of the finished run, to be damaged."""
    return finished[0], Path(shutil.copytree(finished[1], tmp_path / "again"))
