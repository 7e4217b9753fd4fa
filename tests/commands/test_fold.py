"""`entropi fold`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import TINY, Done, assert_refused

pytestmark = pytest.mark.usefixtures("surroundings")


def test_fold_writes_what_the_server_reads(entropi: Callable[..., Done], trained: Path, tmp_path: Path):
    done = entropi("fold", trained, tmp_path / "folded")
    assert (done.status, done.err) == (0, "")
    assert sorted(path.name for path in (tmp_path / "folded").iterdir()) == [
        "folded.json",
        "folded.safetensors",
        "tokenizer.json",
    ]
    description = json.loads((tmp_path / "folded" / "folded.json").read_text())
    assert (description["architecture"], description["layers"]) == ("SM(t)+ScFuFFN", 2)


def test_commands_that_need_the_model_itself_say_what_a_folded_one_is(
    entropi: Callable[..., Done], trained: Path, tmp_path: Path
):
    folded = tmp_path / "folded"
    assert entropi("fold", trained, folded).status == 0
    for words in (["cost", "--architecture", folded], ["evaluate", folded], ["diagnose", folded]):
        assert_refused(entropi(*words), f"{folded} holds a folded model, which can only be served: name what it was")


def test_fold_says_what_remains(entropi: Callable[..., Done], corpus: Path, tmp_path: Path):
    words = ["--corpus", corpus, *TINY, "--steps", "1", "--architecture", "SM+LN+G"]
    assert entropi("train", tmp_path / "run", *words).status == 0
    done = entropi("fold", tmp_path / "run", tmp_path / "out")
    assert done.status == 0
    assert "gains, biases and scalings folded away; norms and activations remain" in done.out


def test_a_softmax_that_would_be_ignored_is_refused(entropi: Callable[..., Done], trained: Path, tmp_path: Path):
    """A model with a softmax of its own is served with that one, whatever is asked for."""
    pytest.importorskip("spu")
    folded = tmp_path / "folded"
    assert entropi("fold", trained, folded).status == 0
    description = json.loads((folded / "folded.json").read_text()) | {"softmax": "power-3"}
    (folded / "folded.json").write_text(json.dumps(description))
    done = entropi("serve", folded, "--listen", "127.0.0.1:0", "--softmax", "power-2")
    assert done.status == 2
    assert "--softmax power-2 would be ignored: the model is trained with a softmax of its own, power-3" in done.err
