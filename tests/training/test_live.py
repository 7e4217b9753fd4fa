"""A training that is shown while it runs: a few numbers and one picture, through the Trainer's own trackers."""

from __future__ import annotations

import io
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from entropi import record_files, records
from entropi.cli import main
from entropi.entropy.diagnosis import diagnose
from entropi.errors import UserError
from entropi.records import EntropySnapshot, Evaluation, TrainingStep
from entropi.training.build import training_arguments
from entropi.training.live import Live
from entropi.training.recipe import Recipe

SIZE = ["--layers", "2", "--heads", "2", "--hidden-size", "16", "--context-length", "16", "--batch-size", "4"]
PACE = ["--steps", "6", "--log-every", "2", "--entropy-every", "3", "--evaluate-every", "3", "--vocab-size", "300"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.py").write_text("".join(f"def f{i}(x):\n    return x + {i * number}\n" for i in range(20)))
    return folder


def missing(package: str) -> bool:
    return find_spec(package) is None


def trained(folder: Path, corpus: Path, tracker: str) -> list[records.Record]:
    """The records of a small run that reports to `tracker`."""
    assert main(["train", str(folder), "--report-to", tracker, "--corpus", str(corpus), *SIZE, *PACE]) == 0
    return record_files.read(folder / record_files.RECORDS_FILE)


def of_kind(found: list[Any], kind: type) -> list[Any]:
    return [record for record in found if isinstance(record, kind)]


@pytest.mark.slow
@pytest.mark.skipif(missing("tensorboard"), reason="tensorboard is not installed: pip install 'entropi[live]'")
def test_tensorboard_shows_what_the_records_say(tmp_path: Path, corpus: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = trained(tmp_path / "run", corpus, "tensorboard")
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    shown.Reload()

    def series(name: str) -> dict[int, float]:
        return {event.step: event.value for event in shown.Scalars(name)}

    steps, snapshots = of_kind(found, TrainingStep), of_kind(found, EntropySnapshot)
    assert series("train/cross_entropy") == pytest.approx({r.step: r.cross_entropy for r in steps}, rel=1e-6)
    assert series("train/entropy_penalty") == pytest.approx({r.step: r.entropy_penalty for r in steps}, rel=1e-6)
    assert series("heads/mean_entropy") == pytest.approx({r.step: float(np.mean(r.entropy)) for r in snapshots})
    assert series("heads/overloaded").keys() == series("heads/collapsed").keys() == {1, 3, 6}
    during = of_kind(found, Evaluation)[0]
    assert series("eval/perplexity")[during.step] == pytest.approx(during.perplexity, rel=1e-6)
    pictures = shown.Images("heads/entropy")
    assert [picture.step for picture in pictures] == [1, 3, 6]
    for picture in pictures:
        assert np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))).var() > 100
    assert len(shown.Tags()["scalars"]) < 20  # whatever the number of heads
    assert shown.Tags()["images"] == ["heads/entropy"]


@pytest.mark.slow
@pytest.mark.skipif(missing("trackio"), reason="trackio is not installed")
def test_trackio_stays_on_this_machine(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trained(tmp_path / "run", corpus, "trackio")
    assert list((tmp_path / "trackio").rglob("*.db"))
    assert list((tmp_path / "trackio").rglob("*.png"))


@pytest.mark.slow
@pytest.mark.skipif(missing("wandb"), reason="wandb is not installed")
def test_wandb_offline(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trained(tmp_path / "run", corpus, "wandb")
    assert len(list(tmp_path.rglob("heads/entropy*.png"))) == 3


@pytest.mark.slow
def test_the_progress_line_tells_of_loss_speed_and_heads(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = trained(tmp_path / "run", corpus, "none")
    loss = of_kind(found, TrainingStep)[-2].cross_entropy  # the last step's losses are recorded after its line
    shares = diagnose(torch.tensor(of_kind(found, EntropySnapshot)[-1].entropy)).quartile_shares
    (line,) = re.findall(r"training .*: 6/6,.*", capfd.readouterr().err)
    assert re.search(r"  loss \d+\.\d{3}  [\d,]+ tokens/s  ", line)
    assert f"heads overloaded {shares[3]:.0%}, collapsed {shares[0]:.0%}" in line
    assert f"loss {loss:.3f}" in line


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(tracker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entropi.training.live.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{tracker} is not installed: pip install"):
        Live(tracker, lambda entropy: np.zeros((1, 1, 3), dtype=np.uint8))


def test_nothing_is_deployed_by_default(tmp_path: Path) -> None:
    """Trackio's callback would otherwise put a copy of the run on a public page of its own accord."""
    for live in (None, object.__new__(Live)):
        if live is not None:
            object.__setattr__(live, "tracker", "trackio")
        arguments = training_arguments(Recipe(), tmp_path / "run", live)
        assert arguments.report_to == ([] if live is None else ["trackio"])
        assert getattr(arguments, "trackio_space_id", None) is None
        assert getattr(arguments, "trackio_static_space_id", False) is False
        assert arguments.push_to_hub is False


def test_the_picture_is_that_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command hands the training a function that draws; what it gets back are pixels."""
    taken: list[Any] = []
    monkeypatch.setattr("entropi.training.live.find_spec", lambda name: name)
    monkeypatch.setattr(
        "entropi.training.run.train", lambda recipe, run, live, **options: taken.append(live) or tmp_path
    )
    (tmp_path / record_files.RECORDS_FILE).touch()
    assert main(["train", str(tmp_path), "--report-to", "wandb"]) == 0
    (live,) = taken
    assert live.tracker == "wandb"
    picture = live.draw([[0.0, 2.0], [math.nan, 3.0]])
    assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
    assert picture.var() > 100
