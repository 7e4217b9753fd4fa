"""Before anything imports Triton, which decides at import whether its kernels are interpreted; and shared fixtures."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core, and what it starts: more threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

pytest.register_assert_rewrite("command_line", "serving", "training_runs")  # before they are imported

from command_line import SOURCES, TINY, Done, text_folder  # noqa: E402

# Files with many cases of a second each, as Triton's kernels are interpreted there: of each parametrised test in them
# the first case and then every seventh is fast; the others are slow, which `make test` runs and `make check` does not.
EVERY_SEVENTH_IS_FAST = {"entropy/test_triton.py"}
# The same, for tests of more than twelve cases only. Seven divides the number of no parameter's values there: all of up
# to twelve values are in some fast case. That of architectures is larger.
EVERY_SEVENTH_OF_MANY_IS_FAST = {
    "commands/test_models.py",
    "costs/test_operations.py",
    "entropy/test_entropy.py",
    "entropy/test_native.py",
    "entropy/test_recording.py",
    "model/test_generation.py",
    "model/test_initialization.py",
    "model/test_model.py",
    "private/compute/test_models_in_private.py",
    "private/preparation/test_cutting.py",
    "private/preparation/test_passes.py",
}
# Files that take minutes, the longest first. Workers begin with them, so that none is left with one at the end.
LONGEST = (
    "private/sessions/test_conversation.py",
    "private/sessions/test_preparing.py",
    "private/sessions/test_two_party.py",
    "entropy/test_triton.py",
    "private/admission/test_floods.py",
    "private/sessions/test_deploy.py",
    "entropy/test_families.py",
    "private/compute/test_functions.py",
    "test_tutorial.py",
    "costs/test_prediction.py",
    "private/preparation/test_two_parties.py",
    "costs/test_preparation.py",
    "private/admission/test_operations.py",
    "training/test_distributed.py",
    "training/test_lm_eval.py",
    "test_packaging.py",
    "private/sessions/test_siege.py",
    "private/test_pretrained.py",
    "training/test_study.py",
    "model/test_model.py",
    "private/compute/test_program.py",
    "private/wire/test_messages_fuzz.py",
    "training/test_train_on_gpu.py",
    "data/test_hub.py",
    "training/test_resume.py",
    "training/test_reliability.py",
    "training/test_updates.py",
    "training/test_results.py",
    "training/test_nonfinite.py",
    "model/test_convert.py",
    "costs/test_calibration.py",
    "report/test_report.py",
    "private/compute/test_models_in_private.py",
    "private/preparation/test_cutting.py",
    "private/preparation/test_passes.py",
    "commands/test_train.py",
    "model/test_generation.py",
    "test_cli.py",
    "commands/test_models.py",
    "entropy/test_native.py",
)
TESTS = Path(__file__).parent
ROOT = TESTS.parent
PLACES = {"build", "dist", "runs"}  # for what is made there, see .gitignore
FILES_BEFORE = pytest.StashKey[set[str]]()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def test_of(item: pytest.Item) -> tuple[str, str]:
        return os.path.relpath(item.path, TESTS), getattr(item, "originalname", item.name)

    cases, seen = Counter(map(test_of, items)), Counter[tuple[str, str]]()
    for item in items:
        test = test_of(item)
        many = test[0] in EVERY_SEVENTH_OF_MANY_IS_FAST and cases[test] > 12
        if seen[test] % 7 and (many or test[0] in EVERY_SEVENTH_IS_FAST):
            item.add_marker("slow")
        seen[test] += 1
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(test_of(item)[0], len(places)))  # which keeps the order within files


def names_in_root() -> set[str]:
    """Of everything in the repository's folder but what is hidden or has its place there."""
    return {name for name in os.listdir(ROOT) if not name.startswith(".")} - PLACES


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FILES_BEFORE] = names_in_root()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that leaves something behind in the repository's folder: tests write to folders of their own."""
    left = names_in_root() - session.config.stash[FILES_BEFORE]
    if left and not hasattr(session.config, "workerinput"):  # the process that started the workers says it once
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left := names_in_root() - config.stash[FILES_BEFORE]:
        terminalreporter.write_line(f"FAILED: left behind in {ROOT}: {', '.join(sorted(left))}", red=True)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all workers see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def smollm2_folder(shared_folder: Path, smollm2_file: Path) -> Path:
    """A folder with a pretrained language model and its tokenizer, for all workers: nothing may be written there."""
    from pretrained import smollm2_folder

    return smollm2_folder(shared_folder)


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path):
    """A pretrained language model and its tokenizer."""
    from pretrained import smollm2

    return smollm2(smollm2_folder)


@pytest.fixture(scope="session")
def smollm2_file() -> Iterator[Path]:
    """The GGUF file of that model, of which this process looks for fields and tensors once.

    That takes seconds for so many tokens, and transformers does it anew for every part of a model.
    """
    from pretrained import weights_file

    gguf, file = pytest.importorskip("gguf"), weights_file()
    anew, once = gguf.GGUFReader, functools.lru_cache(maxsize=1)(gguf.GGUFReader)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", lambda path: once(path) if Path(path) == file else anew(path))
        yield file


# --- The command line -------------------------------------------------------------------------------------------------


@contextmanager
def own_surroundings(cache: Path) -> Iterator[None]:
    """A cache, a width of the terminal and threads that do not depend on who runs the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENTROPI_CACHE", str(cache))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(SOURCES), prepend=os.pathsep)
        patch.setenv("COLUMNS", "100")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def command_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def surroundings(command_cache: Path) -> Iterator[None]:
    with own_surroundings(command_cache):
        yield


@pytest.fixture
def entropi(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs a command in this process."""
    from entropi.cli import main

    def call(*words: Any) -> Done:
        capfd.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve short programs."""
    return text_folder(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, command_cache: Path, corpus: Path) -> Path:
    """The run folder of a tiny model, for all tests together: nothing may be written there."""
    from entropi.cli import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with own_surroundings(command_cache):
        assert main(["train", str(folder), "--corpus", str(corpus), *TINY]) == 0
    return folder
