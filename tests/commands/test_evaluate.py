"""`entropi evaluate` and `diagnose` of models that were trained here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import Done, assert_refused
from entropi import record_files, records
from entropi.errors import UserError
from entropi.training.loading import open_model

pytestmark = pytest.mark.usefixtures("surroundings")


ROOT = Path(__file__).parents[2]


def test_evaluate_cuts_as_the_run_was_trained(entropi: Callable[..., Done], model: Path, tmp_path: Path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.py").write_text(f"def f{number}(x):\n    return x\n" * (3 + number))

    def tokens(*options: str) -> int:
        return int(json.loads(entropi("evaluate", model, "--corpus", texts, "--json", *options).out)["tokens"])

    stream, documents = tokens(), tokens("--packing", "document")
    assert 0 < documents < stream  # the rest of every document is dropped
    config = model / "config.yaml"
    config.write_text(config.read_text().replace("packing: stream", "packing: document"))
    assert tokens() == documents
    assert tokens("--packing", "stream") == stream


def test_batch_size_zero(entropi: Callable[..., Done], trained: Path):
    assert_refused(entropi("evaluate", trained, "--batch-size", "0"), "batch_size is 0, at least 1 is needed")
    assert_refused(entropi("evaluate", trained, "--softmax", "power-17"), "softmax must be exact, power-1 to power-8")


def test_train_evaluate_and_diagnose_agree(
    entropi: Callable[..., Done], trained: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    recorded = [r for r in record_files.read(trained / "records.jsonl") if isinstance(r, records.Evaluation)][-1]
    done = entropi("evaluate", trained, "--corpus", corpus, "--json")
    found = json.loads(done.out)
    assert done.status == 0
    assert found["perplexity"] == pytest.approx(recorded.perplexity, rel=1e-6)
    assert found["tokens"] == recorded.tokens
    done = entropi("evaluate", trained / "model", "--corpus", corpus, "--batch-size", "5")
    assert f"perplexity {recorded.perplexity:.3f}, " in done.out
    assert done.out.count("\n") == 1

    done = entropi("evaluate", trained)  # on the text it was trained on, held-out part
    assert f"perplexity {recorded.perplexity:.3f}, " in done.out
    assert "; held-out text of texts, " in done.out

    done = entropi("diagnose", trained, "--json", "--heatmap", tmp_path / "map.png")
    diagnosis = json.loads(done.out)
    assert np.array(diagnosis["entropy"]) == pytest.approx(np.array(recorded.entropy), rel=1e-6)
    assert (diagnosis["corpus"], diagnosis["layers"]) == (str(corpus), [0, 1])
    where = diagnosis["attention"]
    assert where["layers"] == [0, 1]
    for name in ("distance", "on_first", "on_previous", "on_itself"):
        assert np.shape(where[name]) == (2, 2), name
    assert np.shape(where["entropy_by_position"]) == (2, len(where["positions"]))
    for name in ("cross_entropy", "perplexity", "tokens"):
        assert diagnosis[name] == pytest.approx(getattr(recorded, name), rel=1e-6), name
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = entropi("diagnose", trained, "--corpus", corpus, "--html", tmp_path / "page.html")
    assert diagnosis["verdict"] in done.out
    assert "On average a head looks" in done.out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"the perplexity is <strong>{recorded.perplexity:,.2f}</strong>" in page
    assert "Learned entropy thresholds" in page  # what the run folder holds is shown as well
    assert (tmp_path / "tiny-entropy.png").stat().st_size > 5000  # in the working folder, not in the run's
    assert not (trained / "entropy.png").exists()
    assert re.search(r"^layer +0 +1$", done.err, re.M)  # the table
    assert "measured on held-out text of texts, " in done.out
    assert "Loading weights" not in done.err


def test_the_corpus_of_a_run_that_has_gone(
    entropi: Callable[..., Done], model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = model / "config.yaml"
    config.write_text(config.read_text().replace(str(corpus), str(tmp_path / "gone")))
    for command in ("evaluate", "diagnose"):
        assert_refused(entropi(command, model), "gone", "(this is the corpus of the run; --corpus takes another)")
        assert entropi(command, model, "--corpus", corpus).status == 0


def test_progress_bars_of_transformers_come_back():
    """Opening a model silences them for as long as it takes, not for the rest of somebody's notebook."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    with pytest.raises(UserError):
        open_model(ROOT / "nowhere")
    assert (transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()) == before


def in_private(corpus: Path) -> tuple[Any, ...]:
    return ("--corpus", corpus, "--sequences", "3", "--context-length", "12", "--json")


def test_evaluate_in_private(entropi: Callable[..., Done], trained: Path, corpus: Path):
    """The float half is what `evaluate` measures."""
    pytest.importorskip("spu")
    plain = json.loads(entropi("evaluate", trained, *in_private(corpus)).out)
    done = entropi("evaluate", trained, "--private", *in_private(corpus))
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert (found["protocol"], found["positions"]) == ("ref2k", 36)
    assert found["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    assert found["private_perplexity"] == pytest.approx(found["perplexity"] * (1 + found["change"]))
    assert 0 < abs(found["change"]) < 0.005
    assert 0.9 < found["same_token"] <= 1
    assert 0 < found["largest_error"] < 0.05


@pytest.mark.slow
def test_evaluate_in_private_behind_a_prefix(entropi: Callable[..., Done], trained: Path, corpus: Path, tmp_path: Path):
    """A prefix is what the model reads first."""
    pytest.importorskip("spu")
    options = in_private(corpus)
    plain = json.loads(entropi("evaluate", trained, *options).out)
    public = tmp_path / "prefix.txt"
    public.write_text("def ")
    done = entropi("evaluate", trained, "--private", *options, "--prefix-file", public)
    assert done.status == 0, done.err
    behind = json.loads(done.out)
    assert behind["perplexity"] != pytest.approx(plain["perplexity"], rel=1e-3)
    assert abs(behind["change"]) < 0.005
    public.write_text("def function(x):\n" * 9)
    done = entropi("evaluate", trained, "--private", *options, "--prefix-file", public)
    assert (done.status, done.out) == (2, "")
    assert "do not fit the model's 16 positions" in done.err


def test_private_evaluation_refuses_a_softmax_that_would_be_ignored(
    entropi: Callable[..., Done], model: Path, corpus: Path
):
    """Only an exact softmax has something stand for it; and the length is by default at most what the model takes."""
    pytest.importorskip("spu")
    config = model / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"softmax": "power-2"}))
    options = ("--private", "--corpus", corpus, "--positions", "20", "--json")
    refused = entropi("evaluate", model, *options, "--softmax", "power-3")
    assert (refused.status, refused.out) == (2, "")
    assert "--softmax power-3 would be ignored: the model is trained with a softmax of its own, power-2" in refused.err
    done = entropi("evaluate", model, *options)
    assert done.status == 0, done.err
    assert json.loads(done.out)["positions"] == 32  # two sequences of 16 tokens


def test_the_whole_text_for_a_model_that_was_not_trained_on_it(
    entropi: Callable[..., Done], trained: Path, corpus: Path
):
    def text(*options: str) -> tuple[str, int]:
        found = json.loads(entropi("evaluate", trained / "model", "--corpus", corpus, "--json", *options).out)
        return found["text"].partition(",")[0], found["tokens"]

    (part, few), (all_of_it, many) = text(), text("--whole")
    assert (part, all_of_it) == (f"held-out text of {corpus.name}", corpus.name)
    assert many > 5 * few


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--whole"], "--whole needs --corpus with another text: the run was trained on its own"),
        (["--whole", "--corpus", "stdlib"], "--whole needs --corpus with a text file or a folder of texts, not stdlib"),
        (["--positions", "5"], "--positions would be ignored without --private"),
        (["--private", "--positions", "0"], "--positions is 0, at least 1 is needed"),
        (["--private", "--positions", "5", "--sequences", "2"], "--positions and --sequences exclude each other"),
        (["--private", "--softmax", "exact"], "--softmax must be quartic or power-1 to power-8"),
        (["--private", "--prefix-file", "/nowhere"], "/nowhere"),
        (["--private", "--calibration-text", "/nowhere"], "cannot read the calibration text /nowhere"),
        (["--calibration-text", "/nowhere"], "--calibration-text would be ignored without --private"),
        (["--private", "--context-length", "9999"], "context_length is 9999, the model takes"),
    ],
)
def test_what_private_evaluation_refuses(entropi: Callable[..., Done], trained: Path, words: list[str], says: str):
    pytest.importorskip("spu")
    assert_refused(entropi("evaluate", trained, *words), says)
