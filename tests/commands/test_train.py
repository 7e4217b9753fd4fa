"""`entropi train`: recipes, files of recipes, and going on."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from command_line import TINY, Done, assert_refused, spawn
from entropi import record_files, records
from entropi.errors import UserError
from entropi.training.recipe import Recipe, load_recipe

pytestmark = pytest.mark.usefixtures("surroundings")

ROOT = Path(__file__).parents[2]


def test_a_prepared_corpus_is_trained_and_measured_on(entropi: Callable[..., Done], tmp_path: Path, corpus: Path):
    done = entropi("train", tmp_path / "run", "--corpus", corpus, *TINY, "--prepare-only")
    assert done.status == 0, done
    place = done.out.rpartition(" in ")[2].strip()
    assert not (tmp_path / "run").exists()
    trained = entropi("train", tmp_path / "run", "--corpus", place, *TINY)
    assert trained.status == 0, trained
    measured = entropi("evaluate", tmp_path / "run", "--corpus", place)
    assert trained.out.split(";")[0].removeprefix("held-out perplexity ")[:4] in measured.out


def test_recipe_file_and_options_that_override_it(entropi: Callable[..., Done], corpus: Path, tmp_path: Path):
    shipped = ROOT / "configs" / "laptop.yaml"
    words = ["--corpus", corpus, *TINY, "--steps", "2", "--log-every", "1"]
    assert entropi("train", tmp_path / "run", "--config", shipped, *words, f"--config={shipped}").status == 0
    used, shipped_recipe = load_recipe(tmp_path / "run" / "config.yaml"), load_recipe(shipped)
    assert (used.steps, used.corpus, used.layers, used.log_every) == (2, str(corpus), 2, 1)
    assert (used.save_every, used.entropy_every) == (shipped_recipe.save_every, shipped_recipe.entropy_every)
    assert used.evaluate_every == shipped_recipe.evaluate_every == 500 != Recipe().evaluate_every
    # What a run wrote down is itself a recipe.
    again = entropi("train", tmp_path / "run", "--config", tmp_path / "run" / "config.yaml")
    assert again.status == 0
    assert "nothing to do" in again.err


def test_nothing_but_products_is_trained_folded_and_the_same_in_private(
    entropi: Callable[..., Done], tmp_path: Path, corpus: Path
):
    pytest.importorskip("jax")
    from entropi.model.folding import fold
    from entropi.private.compute.description import Description
    from entropi.private.compute.program import forward, run_plain
    from entropi.training.loading import open_model

    words = ["--architecture", "Pow(t)+ScFuFFN", "--optimizer", "muon", "--steps", "30"]
    done = entropi("train", tmp_path / "run", "--corpus", corpus, *TINY, *words)
    assert done.status == 0, done
    recipe = load_recipe(tmp_path / "run" / "config.yaml")
    assert (recipe.softmax, recipe.final_norm) == ("polynomial-1/keys", False)
    model, *_ = open_model(tmp_path / "run")
    folded = fold(model.eval())
    description = msgspec.convert(folded.description, Description)
    stages = {stage.name for stage in forward(description, 3, 0, "power-3", embedding="public")}
    assert stages == {"embedding", "qkv", "temperature", "scores", "power", "values", "average", "output", "head"}
    prompt = list(range(10))
    (_, (logits,)) = run_plain(description, folded.weights, prompt, 1, "power-3")
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].float().numpy()
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def test_recipe_file_with_mistakes_tells_all(entropi: Callable[..., Done], tmp_path: Path):
    (tmp_path / "r.yaml").write_text("stepz: 3\nlayers: two\nwarmup: 7\n")
    assert_refused(
        entropi("train", tmp_path / "run", "--config", tmp_path / "r.yaml"),
        "r.yaml: unknown setting stepz; layers is 'two', expected int; warmup is 7.0",
    )


def test_help_shows_the_defaults_of_the_recipe_file(entropi: Callable[..., Done]):
    done = entropi("train", "--config", ROOT / "configs" / "laptop.yaml", "--help")
    assert re.search(r"--evaluate-every .*?default:\s+500\)", done.out, re.S)


def test_another_recipe_is_refused_with_its_differences(entropi: Callable[..., Done], trained: Path, corpus: Path):
    assert_refused(
        entropi("train", trained, "--corpus", corpus, *TINY, "--seed", "5", "--steps", "4"),
        "differs in steps (3 there, 4 here), seed (0 there, 5 here); choose another folder: a run cannot be given more",
    )


@pytest.mark.slow
def test_control_c_ends_a_training_that_can_be_continued(tmp_path: Path, corpus: Path):
    folder = tmp_path / "run"
    words = ["train", folder, "--corpus", corpus, *TINY, "--steps", "120", "--save-every", "5"]
    # Started in the background of a script, this test would hand on a Ctrl-C that is ignored.
    process = subprocess.Popen(
        [sys.executable, "-m", "entropi", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 600
    while not list(folder.glob("checkpoints/*/seal.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in errors
    said = re.fullmatch(
        rf"entropi: interrupted; step (\d+) is saved; the same command or `entropi train {folder}` continues the run",
        errors.splitlines()[-1],
    )
    assert said is not None, errors
    assert not (folder / "model").exists()
    done = spawn("train", folder)
    assert done.status == 0, done.err
    starts = [r for r in record_files.read(folder / "records.jsonl") if isinstance(r, records.RunStarted)]
    assert starts[-1].resumed_at == int(said[1])
    steps = [r.step for r in record_files.read(folder / "records.jsonl") if isinstance(r, records.TrainingStep)]
    assert steps == list(range(1, 121))


def test_a_run_alone_is_continued_with_its_own_settings(entropi: Callable[..., Done], model: Path):
    """What was chosen for a run need not be typed again; what is typed and differs is refused by name."""
    shutil.rmtree(model / "model")
    done = entropi("train", model)
    assert done.status == 0, done.err
    assert f"resuming {model} after step 3 of 3" in done.err
    assert (model / "model").is_dir()
    assert entropi("train", model, "--steps", "3", "--layers", "2").status == 0
    assert_refused(
        entropi("train", model, "--layers", "3", "--learning-rate", "0.5", "--steps", "3"),
        "holds a run of another recipe, which differs in layers (2 there, 3 here), learning_rate (0.001 there, 0.5 her",
    )
    (model / "config.yaml").write_text("layers: [")
    assert_refused(entropi("train", model), "cannot read the recipe")


def test_the_run_alone_continues_it(entropi: Callable[..., Done], corpus: Path, tmp_path: Path):
    """What was chosen for a run need not be typed again, and what is typed otherwise is refused."""
    run = tmp_path / "run"
    assert entropi("train", run, "--corpus", corpus, *TINY, "--save-every", "1").status == 0
    before = (run / "config.yaml").read_bytes()
    again = entropi("train", run)
    assert again.status == 0, again.err
    assert "nothing to do" in again.err
    assert (run / "config.yaml").read_bytes() == before
    assert_refused(entropi("train", run, "--seed", "5"), "differs in seed (0 there, 5 here)")
    assert "default: 3)" in " ".join(entropi("train", "--config", run / "config.yaml", "--help").out.split())
    (run / "config.yaml").write_text("stepz: 3\n")
    assert_refused(entropi("train", run), "unknown setting stepz")


def test_a_new_run_by_name_alone_says_that_it_is_one(
    entropi: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A mistyped name, or a run that was interrupted before it was recorded, must not look like a continued one."""

    def stop(*_: object, **__: object) -> Path:
        raise UserError("stopped")

    monkeypatch.setattr("entropi.training.run.train", stop)
    new = f"there is no run in {tmp_path / 'run'}: this is a new one, with the default settings"
    assert new in entropi("train", tmp_path / "run").err
    assert "there is no run" not in entropi("train", tmp_path / "run", "--steps", "5").err
