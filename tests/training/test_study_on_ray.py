"""Studies on a Ray cluster: two nodes on this machine, one of which is lost while it trains."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from entropi import __version__, record_files, records
from entropi.cli import main
from entropi.training.run_folder import lock_run
from training_runs import of_kind, tiny

STEPS = 800

pytestmark = pytest.mark.usefixtures("surroundings")


def write(path: Path, corpus: str, **changes: Any) -> Path:
    """A study of one row and two seeds."""
    recipe = tiny(corpus, seed=0, **changes)
    settings = {key: getattr(recipe, key) for key in ("corpus", "vocab_size", "context_length", "layers", "heads")}
    settings |= {key: getattr(recipe, key) for key in ("hidden_size", "steps", "batch_size", "log_every", "save_every")}
    settings |= {"evaluate_every": 0}
    path.write_text(yaml.safe_dump({"recipe": settings | {"seed": [0, 1]}, "rows": ["SM"]}), encoding="utf-8")
    return path


# --- What is refused --------------------------------------------------------------------------------------------------


def test_the_extra_is_named_where_ray_is_missing(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "entropi.training.ray_cluster", raising=False)
    assert main(["study", str(write(tmp_path / "grid.yaml", corpus)), "--ray", "auto"]) == 2
    assert "pip install 'entropi[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cpus-per-run", "2"], "are for --ray"),
        (["--gpus-per-run", "1"], "are for --ray"),
        (["--ray", "auto", "--cpus-per-run", "0"], "cpus-per-run is 0"),
        (["--ray", "auto", "--gpus-per-run", "1.5"], "gpus-per-run is 1.5"),
        (["--ray", "auto", "--run", "0"], "use one of the two"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, corpus: str, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(write(tmp_path / "grid.yaml", corpus)), *words]) == 2
    assert told in capsys.readouterr().err


def test_an_address_that_answers_nothing(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    file = write(tmp_path / "grid.yaml", corpus)
    with socket.socket() as free:  # a port that nobody listens at
        free.bind(("127.0.0.1", 0))
        assert main(["study", str(file), "--ray", f"127.0.0.1:{free.getsockname()[1]}"]) == 2
    assert "no Ray cluster answers at 127.0.0.1:" in capsys.readouterr().err
    assert main(["study", str(file), "--ray", "head"]) == 2
    assert "HOST:PORT of the head" in capsys.readouterr().err


def test_nodes_that_cannot_train_say_why(tmp_path: Path) -> None:
    """What a task answers, called as Ray calls it."""
    train_here = pytest.importorskip("entropi.training.ray_cluster", exc_type=ImportError).train_here
    rest = [str(tmp_path / name) for name in ("marker", "run", "run.yaml", "run.log")]
    status, problem = train_here(__version__, str(tmp_path), *rest)
    assert status == 2
    assert f"does not see {tmp_path}: give --folder on a disk that all nodes share" in problem
    assert "and this is 0.0: install the same" in train_here("0.0", str(tmp_path), *rest)[1]
    assert not list(tmp_path.iterdir())


# --- A cluster --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head and another node on this machine, a core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    room = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # pytest's are too long for the sockets in it
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # others' memory is no reason to end a run here
        cluster = Cluster(initialize_head=True, head_node_args=room)
        try:
            cluster.add_node(**room)
            yield cluster
        finally:
            cluster.shutdown()


@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_survives_the_loss_of_a_node(
    tmp_path: Path, corpus: str, cluster: Any
) -> None:
    file, folder = write(tmp_path / "grid.yaml", corpus, steps=STEPS, save_every=20), tmp_path / "runs"
    words = [sys.executable, "-m", "entropi", "study", str(file), "--folder", str(folder), "--ray", cluster.address]
    places = [folder / "SM" / f"seed-{seed}" for seed in (0, 1)]

    first = subprocess.Popen(words, stderr=subprocess.PIPE)
    wait_until(lambda: all(map(last_checkpoint, places)), first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 130
    for place in places:  # its tasks have ended, the step in progress saved
        with lock_run(place):
            assert of_kind(place, records.TrainingStep)[-1].step == last_checkpoint(place) < STEPS
        assert "interrupted; step" in place.with_name(place.name + ".log").read_text(encoding="utf-8")
    assert not list(folder.glob(".*"))

    second = subprocess.Popen(words, stderr=subprocess.PIPE)
    wait_until(lambda: all(goes_on(place) for place in places), second)
    cluster.remove_node(cluster.list_all_nodes()[1], allow_graceful=False)
    _, told = second.communicate(timeout=300)
    assert second.returncode == 0, told.decode()

    starts = [[start.resumed_at for start in of_kind(place, records.RunStarted)] for place in places]
    assert sorted(map(len, starts)) == [2, 3]  # one was on the node that was lost
    for place, resumed in zip(places, starts):
        assert resumed == sorted(set(resumed))
        assert [step.step for step in of_kind(place, records.TrainingStep)] == list(range(1, STEPS + 1))
        assert len(of_kind(place, records.Evaluation)) == 1
    found = record_files.read(folder / record_files.STUDY_FILE)
    assert [(run.seed, run.diverged) for run in found if isinstance(run, records.StudyRun)] == [(0, False), (1, False)]


def last_checkpoint(place: Path) -> int:
    """The step of the newest committed checkpoint, or 0."""
    committed = (place / "checkpoints").glob("*/seal.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in committed), default=0)


def goes_on(place: Path) -> bool:
    """Whether a run was resumed and has a checkpoint since."""
    return 0 < of_kind(place, records.RunStarted)[-1].resumed_at < last_checkpoint(place)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else b""
        assert time.monotonic() < deadline
        time.sleep(0.01)
