"""Models, texts and places that several commands refuse in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import TINY, Done, assert_refused
from entropi.cli import main
from entropi.training.loading import open_model

pytestmark = pytest.mark.usefixtures("surroundings")


def test_a_file_instead_of_a_folder(entropi: Callable[..., Done], tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    assert_refused(entropi("evaluate", file), "there is no model at", "a folder is needed")
    assert_refused(entropi("report", file), "is not a run folder")
    assert_refused(entropi("train", file, *TINY), "is not a run folder")
    assert_refused(entropi("fold", file, tmp_path / "out"), "there is no model at")


def test_an_empty_folder(entropi: Callable[..., Done], tmp_path: Path):
    assert_refused(entropi("evaluate", tmp_path), "holds no model: config.json is missing")
    assert_refused(entropi("report", tmp_path), "is not a run folder")


def test_an_unfinished_run(entropi: Callable[..., Done], model: Path):
    shutil.rmtree(model / "model")
    assert_refused(entropi("evaluate", model), "holds no model: its training has not finished")


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00garbage{")


@pytest.mark.parametrize(
    ("name", "damage", "part"),
    [
        ("config.json", garbage, "is damaged: config.json cannot be read"),
        ("config.json", lambda path: path.write_text("[]"), "is damaged: config.json cannot be read"),
        ("config.json", edited(model_type="gpt2"), "is damaged: lm_head.weight is missing"),
        (
            "config.json",
            edited(architecture="SM+X"),
            "unknown architecture 'SM+X': 'X' is unknown; legal are SM, SM(t), Pow or ",
        ),
        ("config.json", edited(num_hidden_layers=3), "does not fit its config.json"),
        ("config.json", edited(num_hidden_layers=1), "does not fit its config.json"),
        ("config.json", edited(hidden_size=32), "does not fit its config.json"),
        ("config.json", edited(hidden_size="wide"), "is damaged: "),
        ("config.json", edited(num_hidden_layers=10**8), "is damaged: "),
        ("config.json", edited(vocab_size=10**12), "is damaged: "),
        ("config.json", lambda path: path.write_text("[" * 100_000), "is damaged: config.json cannot be read"),
        ("model.safetensors", truncated, "is damaged: "),
        ("model.safetensors", garbage, "is damaged: "),
        ("model.safetensors", Path.unlink, "is damaged: model.safetensors is missing"),
        ("tokenizer.json", Path.unlink, "is damaged: tokenizer.json is missing"),
        ("tokenizer.json", garbage, "is damaged: tokenizer.json cannot be read"),
        ("tokenizer.json", truncated, "is damaged: tokenizer.json cannot be read"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "is damaged: tokenizer.json cannot be read"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "fold", "serve"])
def test_damaged_models(
    entropi: Callable[..., Done],
    model: Path,
    corpus: Path,
    tmp_path: Path,
    command: str,
    name: str,
    damage: Callable[[Path], None],
    part: str,
):
    damage(model / "model" / name)
    words = {"evaluate": ["--corpus", corpus], "fold": [tmp_path / "out"], "serve": ["--listen", "127.0.0.1:0"]}
    if command == "serve":
        pytest.importorskip("spu")
    assert_refused(entropi(command, model, *words[command]), part)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt2", {"n_layer": 10**8, "n_embd": 48, "n_head": 2, "vocab_size": 300}),
        ("llama", {"num_hidden_layers": 10**8, "hidden_size": 48, "num_attention_heads": 2, "vocab_size": 300}),
        ("llama", {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 0, "vocab_size": 300}),
        ("entropi", {"num_hidden_layers": 10**8}),
    ],
)
def test_configurations_that_nothing_could_build(
    entropi: Callable[..., Done], corpus: Path, tmp_path: Path, family: str, sizes: dict[str, int]
):
    """One line at once, whatever the file says: nothing is built that would take until the memory ends."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": family, "intermediate_size": 64, "max_position_embeddings": 64, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(b"\0")
    commands = [["evaluate", folder, "--corpus", corpus], ["fold", folder, tmp_path / "out"]]
    pytest.importorskip("jax")
    for words in [*commands, ["cost", "--architecture", folder]]:
        started = time.monotonic()
        done = entropi(*words)
        assert_refused(done)
        assert time.monotonic() - started < 60


def test_a_tokenizer_of_another_model(entropi: Callable[..., Done], model: Path, corpus: Path, tmp_path: Path):
    larger = tmp_path / "larger"
    assert main(["train", str(larger), "--corpus", str(corpus), *TINY, "--vocab-size", "350", "--steps", "1"]) == 0
    shutil.copy(larger / "model" / "tokenizer.json", model / "model" / "tokenizer.json")
    tokenizer = open_model(model)[1]
    assert tokenizer.get_vocab_size() > 300
    for command in ("evaluate", "diagnose"):
        done = entropi(command, model, "--corpus", corpus)
        assert_refused(done, "held-out text of texts has the token '", "has no embedding: it has 300")
    number = int(re.findall(r"number (\d+)", done.err)[0])
    assert repr(tokenizer.id_to_token(number)) in done.err


def test_corpora_that_cannot_be_used(entropi: Callable[..., Done], trained: Path, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary").write_bytes(b"\x00\xff" * 100)
    (tmp_path / "short.txt").write_text("just a few words")
    (tmp_path / "folder").mkdir()
    for name, part in (
        ("empty.txt", "is empty"),
        ("binary", "is not UTF-8 text"),
        ("short.txt", "one block"),
        ("folder", "has no files with text"),
        ("nowhere", "there is no file or folder"),
    ):
        assert_refused(entropi("evaluate", trained, "--corpus", tmp_path / name), part)
        assert_refused(entropi("diagnose", trained, "--corpus", tmp_path / name), part)
        done = entropi("train", tmp_path / "run", "--corpus", tmp_path / name, *TINY)
        said = done.err.removeprefix("training the tokenizer on 15 characters of short.txt\n")
        assert_refused(Done(done.status, done.out, said), part)
        assert not (tmp_path / "run").exists()


def test_names_that_are_no_text(
    trained: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: Any,
):
    """File systems allow names that are not UTF-8; they are printed as they are, and JSON has question marks."""
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"na\xefve")
    shutil.copytree(corpus, odd)
    shutil.copytree(trained / "model", f"{odd}-model")
    assert main(["evaluate", str(trained), "--corpus", odd]) == 0
    assert "held-out text of na?ve, " in capfdbinary.readouterr().out.decode()
    for command in ("evaluate", "diagnose"):
        assert main([command, str(trained), "--corpus", odd, "--json"]) == 0
        assert json.loads(capfdbinary.readouterr().out)["corpus"] == "na?ve"
    for words in (["cost", "--architecture", odd[:3]], ["cost", "--network", odd], ["evaluate", odd[:3]]):
        assert main(words) == 2
        assert capfdbinary.readouterr().err.count(b"\n") == 1
    pytest.importorskip("jax")
    assert main(["cost", "--architecture", f"./{odd}-model", "--seq-len", "8"]) == 0
    assert capfdbinary.readouterr().out.startswith(b"./na\xefve-model: ")


def test_places_that_cannot_be_written(entropi: Callable[..., Done], trained: Path, corpus: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert_refused(
        entropi("diagnose", trained, "--corpus", corpus, "--heatmap", tmp_path / "no" / "x.png"), "there is no folder"
    )
    assert_refused(entropi("fold", trained, tmp_path / "file"), "file: ")
    assert_refused(entropi("fold", trained, tmp_path / "file" / "below"), "file")
    assert_refused(entropi("report", trained, "--output", tmp_path / "file" / "r.html"), "cannot write the report")
    pytest.importorskip("spu")
    assert_refused(entropi("ask", "x", "--logits", tmp_path / "no" / "x.npy"), "there is no folder")
    assert_refused(entropi("ask", "x", "--record", tmp_path / "no"), "there is no run folder")


@pytest.mark.parametrize("command", ["serve", "fold", "convert"])
def test_a_model_of_an_unknown_family_is_told_the_known_ones(
    entropi: Callable[..., Done], tmp_path: Path, command: str
):
    if command == "serve":
        pytest.importorskip("spu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    words = ["--listen", "127.0.0.1:0"] if command == "serve" else [tmp_path / "out"]
    assert_refused(
        entropi(command, tmp_path, *words),
        "models of type 'bert' cannot be converted; those of gemma, gemma2, gemma3_text, gpt2, gpt_neox, llama,",
    )
    assert not (tmp_path / "out").exists()


def test_serve_says_that_any_architecture_will_do(entropi: Callable[..., Done]):
    shown = entropi("serve", "--help").out
    assert "softmax-only" not in shown
    assert "of any architecture" in " ".join(shown.split())
