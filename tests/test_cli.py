"""The command line: help that suffices, one line and status 2 for every mistake; and which room may import which."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from entropi import cli, record_files, records
from entropi.cli import COMMANDS, main
from entropi.console import ProgressLine
from entropi.training.loading import open_model
from entropi.training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "entropi"
TINY = (
    *("--vocab-size", "300", "--context-length", "16", "--layers", "2", "--heads", "2", "--hidden-size", "16"),
    *("--steps", "3", "--batch-size", "4", "--precision", "fp32", "--log-every", "1"),
)


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def surroundings(surroundings: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        yield


@pytest.fixture
def entropi(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs a command in this process."""

    def call(*words: Any) -> Done:
        capfd.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capfd.readouterr())

    return call


def spawn(*words: Any, code: str | None = None) -> Done:
    """The same in a process of its own; `code` may prepare something first."""
    start = ["-c", f"{code}\nimport sys\nfrom entropi.cli import main\nsys.exit(main(sys.argv[1:]))"]
    done = subprocess.run(
        [sys.executable, *(start if code is not None else ["-m", "entropi"]), *map(str, words)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def assert_refused(done: Done, *parts: str) -> None:
    """One line on standard error, status 2, nothing on standard output."""
    assert done.status == 2, done
    assert done.out == ""
    assert re.fullmatch(r"entropi: [^\n]+\n", done.err), done.err
    for part in parts:
        assert part in done.err, done.err


def text_folder(folder: Path) -> Path:
    folder.mkdir()
    for number in range(12):
        lines = (f"def f{number}_{i}(self, value): return value + {i * number % 7}\n" for i in range(30))
        (folder / f"{number}.py").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", str(folder), "--corpus", str(corpus), *TINY]) == 0
    return folder


@pytest.fixture
def model(tmp_path: Path, trained: Path) -> Path:
    """A copy of the trained run folder, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


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


def test_a_prepared_corpus_is_trained_and_measured_on(entropi: Callable[..., Done], tmp_path: Path, corpus: Path):
    done = entropi("train", tmp_path / "run", "--corpus", corpus, *TINY, "--prepare-only")
    assert done.status == 0, done
    place = done.out.rpartition(" in ")[2].strip()
    assert not (tmp_path / "run").exists()
    trained = entropi("train", tmp_path / "run", "--corpus", place, *TINY)
    assert trained.status == 0, trained
    measured = entropi("evaluate", tmp_path / "run", "--corpus", place)
    assert trained.out.split(";")[0].removeprefix("held-out perplexity ")[:4] in measured.out


# --- Help -------------------------------------------------------------------------------------------------------------


def options_of(name: str) -> set[str]:
    """What the signature of a command says it takes."""
    import dataclasses
    import inspect

    found = set(inspect.signature(COMMANDS[name]).parameters)
    if name == "train":
        found = found - {"recipe"} | {"config"} | {field.name for field in dataclasses.fields(Recipe)}
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(entropi: Callable[..., Done], name: str):
    done = entropi(name, "--help")
    assert (done.status, done.err) == (0, "")
    listed = re.findall(
        r"^  (?:-h, )?(--)?([\w-]+)(?: [A-Z{\[][^ ]*)?(?: \[\w+ \.\.\.\])?(?:  +|\n +)(\S.*)$", done.out, re.M
    )
    explained = {word.replace("-", "_"): text for _, word, text in listed}
    assert options_of(name) <= explained.keys()
    for option in options_of(name):
        assert re.match(r"[\w\"(.]", explained[option]), option
        assert not explained[option].startswith("(type"), option
    assert "_" not in "".join(re.findall(r"--\S+", done.out))
    assert "<class" not in done.out


def test_help_of_the_whole(entropi: Callable[..., Done]):
    done = entropi("--help")
    assert done.status == 0
    for name, function in COMMANDS.items():
        assert function.__doc__
        assert re.search(rf"^    {name} +\S", done.out, re.M)


def test_version(entropi: Callable[..., Done]):
    assert entropi("--version").out == f"entropi {cli.__version__}\n"


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_no_command():
    assert_refused(spawn(), "a command is missing: one of demo, train, evaluate")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["invalid choice: 'trian'", "'train'"]),
        (["train"], ["RUN is missing (see entropi train --help)"]),
        (["fold", "model"], ["OUTPUT is missing (see entropi fold --help)"]),
        (["report"], ["RUNS is missing"]),
        (["ask"], ["PROMPT is missing"]),
        (["train", "run", "--stpes", "3"], ["unrecognized arguments: --stpes 3"]),
        (["train", "run", "--conf", "x"], ["unrecognized arguments: --conf x"]),  # no guessing of abbreviations
        (["train", "run", "--steps", "many"], ["steps: expected int, got many"]),
        (["train", "run", "--steps", "1.5"], ["steps: expected int, got 1.5"]),
        (["train", "run", "--steps"], ["--steps: expected one argument"]),
        (["train", "run", "--learning-rate", "fast"], ["learning_rate: expected float, got fast"]),
        (["train", "run", "--bias", "some"], ["bias: expected one of 'qk', 'all', 'none', got some"]),
        (["train", "run", "--steps", "0", "--layers", "-1"], ["steps is 0", "layers is -1"]),
        (["train", "run", "--hidden-size", "10"], ["hidden_size is 10, not a multiple of heads, 4"]),
        (["train", "run", "--architecture", "SM+BN"], ["unknown architecture 'SM+BN'", "SM(t)+ScFuFFN", "SM+LN+G"]),
        (["train", "run", "--config", "none.yaml"], ["cannot read the recipe none.yaml: No such file"]),
        (["train", "run", "--config"], ["--config: expected one argument"]),
        (["evaluate", "run", "--exp-iterations", "few"], ["exp_iterations: expected int, got few"]),
        (["evaluate", "run", "--packing", "tight"], ["packing: expected one of 'stream', 'document', got tight"]),
        (["evaluate", "nowhere"], ["there is no model at nowhere"]),
        (["evaluate", "nowhere", "--json", "3"], ["unrecognized arguments: 3"]),
        (["diagnose", "nowhere"], ["there is no model at nowhere"]),
        (["fold", "nowhere", "output"], ["there is no model at nowhere"]),
        (["report", "nowhere"], ["nowhere is not a run folder"]),
        (["cost", "--seq-len", "0"], ["seq_len is 0"]),
        (["cost", "--seq-len", "-5"], ["seq_len is -5"]),
        (["cost", "--layers", "0"], ["num_hidden_layers must be 1 to 1048576, got 0"]),
        (["cost", "--heads", "5"], ["hidden_size 768 is no multiple of 5 heads"]),
        (["cost", "--network", "fast"], ["'fast' is no network: write lan, wan, or a rate and a round trip"]),
        (["cost", "--budget", "2"], ["'2' is no budget: write bytes such as 2GB"]),
        (["cost", "--architecture", "./none/config.json"], ["none/config.json holds no config.json: No such file"]),
        (["cost", "--compare", "SM", "LSTM"], ["unknown architecture 'LSTM'"]),
        (["cost", "--calibration", "nowhere.json"], ["nowhere.json: No such file"]),
        (["cost", "--exp-iterations", "9"], ["exp_iterations is 9, 1 to 8 are possible"]),
        (["cost", "--exp-iterations", "0"], ["exp_iterations is 0, 1 to 8 are possible"]),
        (["cost", "--compare", "SM", "SM+R", "--budget", "2GB"], ["--compare and --budget exclude each other"]),
        (["cost", "--budget", "2GB", "--layers", "3"], ["--layers would be ignored: --budget searches"]),
        (["cost", "--budget", "2GB", "--picture", "x.png"], ["--picture has nothing to draw with --budget"]),
        (["cost", "--record"], ["--record needs --architecture with one run folder"]),
        (
            ["cost", "--architecture", "LSTM"],
            ["unknown architecture 'LSTM': it begins with 'LSTM' ", "legal are SM or SM(t); "],
        ),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line(
    entropi: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], parts: list[str]
):
    monkeypatch.chdir(tmp_path)
    assert_refused(entropi(*words), *parts)
    assert list(tmp_path.iterdir()) == []


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
        ("config.json", edited(model_type="gpt2"), "is of type 'gpt2'; only entropi models"),
        ("config.json", edited(architecture="SM+X"), "unknown architecture 'SM+X': 'X' is unknown; legal are SM or "),
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
    if command == "evaluate" and "gpt2" in part:
        part = "is damaged: lm_head.weight is missing"  # it evaluates a GPT-2 too, but this is none
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


def test_batch_size_zero(entropi: Callable[..., Done], trained: Path):
    assert_refused(entropi("evaluate", trained, "--batch-size", "0"), "batch_size is 0, at least 1 is needed")
    assert_refused(entropi("evaluate", trained, "--exp-iterations", "17"), "exp_iterations must be 1 to 8")


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


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cli.COMMANDS, "cost", lambda **kwargs: 1 / 0)
    monkeypatch.setattr(cli, "_arguments", lambda *args: {})
    with pytest.raises(ZeroDivisionError):
        main(["cost"])


def test_a_reader_that_leaves_is_no_error():
    """As in `entropi cost | head -0`."""
    words = [sys.executable, "-m", "entropi", "cost"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


# --- What commands print and write ------------------------------------------------------------------------------------


def test_train_evaluate_and_diagnose_agree(entropi: Callable[..., Done], trained: Path, corpus: Path, tmp_path: Path):
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
    assert diagnosis["attention"]["layers"] == [0, 1]
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = entropi("diagnose", trained, "--corpus", corpus, "--html", tmp_path / "page.html")
    assert diagnosis["verdict"] in done.out
    assert "On average a head looks" in done.out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"the perplexity is <strong>{recorded.perplexity:,.2f}</strong>" in page
    assert "Learned entropy thresholds" in page  # what the run folder holds is shown as well
    assert (trained / "entropy.png").stat().st_size > 5000
    assert re.search(r"^layer +0 +1$", done.err, re.M)  # the table
    assert "measured on held-out text of texts, " in done.out
    assert "Loading weights" not in done.err


def test_the_corpus_of_a_run_that_has_gone(entropi: Callable[..., Done], model: Path, corpus: Path, tmp_path: Path):
    config = model / "config.yaml"
    config.write_text(config.read_text().replace(str(corpus), str(tmp_path / "gone")))
    for command in ("evaluate", "diagnose"):
        assert_refused(entropi(command, model), "gone", "(this is the corpus of the run; --corpus takes another)")
        assert entropi(command, model, "--corpus", corpus).status == 0


def test_progress_bars_of_transformers_come_back():
    """Opening a model silences them for as long as it takes, not for the rest of somebody's notebook."""
    from transformers.utils import logging as transformers_logging

    from entropi.errors import UserError

    before = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    with pytest.raises(UserError):
        open_model(ROOT / "nowhere")
    assert (transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()) == before


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


def test_fold_says_what_remains(entropi: Callable[..., Done], corpus: Path, tmp_path: Path):
    words = ["--corpus", corpus, *TINY, "--steps", "1", "--architecture", "SM+LN+G"]
    assert entropi("train", tmp_path / "run", *words).status == 0
    done = entropi("fold", tmp_path / "run", tmp_path / "out")
    assert done.status == 0
    assert "gains, biases and scalings folded away; norms and activations remain" in done.out


# Tables 2, 3 and 5 of the paper: nonlinear operations as (count, rows, columns), FLOPs in units of 1e8.
COSTS = [
    ("SM+LN+G", 12, 128, {"softmax": (144, 128, 128), "layernorm": (24, 128, 768), "gelu": (12, 128, 3072)}, 145, 77),
    ("SM+LN+R", 12, 128, {"softmax": (144, 128, 128), "layernorm": (24, 128, 768), "relu": (12, 128, 3072)}, 145, 77),
    ("SM+ScFuFFN", 12, 128, {"softmax": (144, 128, 128)}, 18, 77),
    ("EReg(SM(t)+ScFuFFN)", 12, 128, {"softmax": (144, 128, 128)}, 18, 77),
    ("SM+LN+G", 12, 256, {"softmax": (144, 256, 256), "layernorm": (24, 256, 768), "gelu": (12, 256, 3072)}, 290, 163),
    ("SM+ScFuFFN", 12, 256, {"softmax": (144, 256, 256)}, 36, 163),
    ("SM+LN+G", 18, 128, {"softmax": (216, 128, 128), "layernorm": (36, 128, 768), "gelu": (18, 128, 3072)}, 217, 116),
    ("SM+ScFuFFN", 18, 128, {"softmax": (216, 128, 128)}, 27, 116),
    ("SM+LN+G", 12, 512, {"softmax": (144, 512, 512), "layernorm": (24, 512, 768), "gelu": (12, 512, 3072)}, 580, 362),
    ("SM+ScFuFFN", 12, 512, {"softmax": (144, 512, 512)}, 73, 362),  # 7.25, in the paper 7.3
]


@pytest.mark.parametrize(("architecture", "layers", "length", "nonlinear", "ffn", "attention"), COSTS)
def test_cost_gives_the_numbers_of_the_paper(
    entropi: Callable[..., Done],
    architecture: str,
    layers: int,
    length: int,
    nonlinear: dict[str, tuple[int, int, int]],
    ffn: int,
    attention: int,
):
    words = ["cost", "--architecture", architecture, "--layers", layers, "--seq-len", length]
    found = json.loads(entropi(*words, "--json").out)
    counts = found["counts"]
    assert {n["operation"]: (n["count"], *n["shape"]) for n in counts["nonlinear"]} == nonlinear
    assert counts["ffn_flops"] / 1e8 == pytest.approx(ffn, abs=0.6)
    assert counts["attention_flops"] / 1e8 == pytest.approx(attention, abs=1.0)
    done = entropi(*words)
    assert done.err == ""
    for name, (count, rows, columns) in nonlinear.items():
        assert re.search(rf"{name} +{count} x R\^\({rows} x {columns}\)", done.out)


def test_gpt2_small_has_its_parameters(entropi: Callable[..., Done]):
    found = json.loads(entropi("cost", "--architecture", "SM+LN+G", "--bias", "all", "--seq-len", 1024, "--json").out)
    assert found["counts"]["parameters"] == 124_439_808


def test_report_is_written(entropi: Callable[..., Done], model: Path, tmp_path: Path):
    done = entropi("report", model)
    assert (done.status, done.out, done.err) == (0, f"report in {model / 'report.html'}\n", "")
    assert "</html>" in (model / "report.html").read_text(encoding="utf-8")
    assert entropi("report", model, model, "--output", tmp_path / "two.html").status == 0
    assert (tmp_path / "two.html").exists()


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
        "differs in steps (3 there, 4 here), seed (0 there, 5 here); choose another folder",
    )


# --- Progress ---------------------------------------------------------------------------------------------------------


def progress(console: Console, monkeypatch: pytest.MonkeyPatch, seconds: float) -> str:
    """What a work of 300 units, `seconds` each, leaves on a console."""
    clock = [0.0]
    monkeypatch.setattr("entropi.console.time.monotonic", lambda: clock[0])
    with ProgressLine("training [x]", 300, console=console) as line:
        for done in range(1, 301):
            clock[0] += seconds
            line.update(done, f"loss {done}.5 [y] :smile:")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_progress_in_a_log_file(monkeypatch: pytest.MonkeyPatch):
    console = Console(file=io.StringIO(), emoji=False, soft_wrap=True)
    monkeypatch.setattr("entropi.console.PLAIN_INTERVAL_S", 9.99)
    lines = progress(console, monkeypatch, 0.1).splitlines()
    assert len(lines) == 3  # one in ten seconds
    assert lines[0] == "training [x]: 100/300, 10 s, 20 s left  loss 100.5 [y] :smile:"
    assert lines[-1] == "training [x]: 300/300, 30 s  loss 300.5 [y] :smile:"
    console = Console(file=io.StringIO(), emoji=False, soft_wrap=True)
    assert len(progress(console, monkeypatch, 0.0001).splitlines()) == 1  # the last one always


@pytest.mark.parametrize("width", [80, 160])
def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int):
    """On a narrow one the status gives way, not the counts."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, emoji=False, color_system=None)
    shown = progress(console, monkeypatch, 0.1)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n").strip().splitlines()[-1]
    assert "training [x]" in last
    assert "300/300" in last
    assert "loss 300.5 [y]" in last


# --- Asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a server's answer in place of the private computation."""
    pytest.importorskip("spu")
    pytest.importorskip("jax")
    from entropi.private import client

    def put(pieces: list[str], new_text: str) -> None:
        def ask(server: str, prompt: str, max_new_tokens: int, watcher: Any, **options: Any) -> Any:
            watcher.begin(len(pieces))
            stages = []
            for index, piece in enumerate(pieces):
                stages.append(
                    records.StageTraffic(
                        name="exp",
                        layer=0,
                        token=index,
                        seconds=0.1,
                        sent_bytes=500_000,
                        received_bytes=500_000,
                        sent_messages=1,
                        received_messages=1,
                    )
                )
                watcher.stage(index + 1, stages[-1])
                watcher.text(piece)
            record = records.PrivateRun(
                protocol="cheetah",
                trust="semi-honest",
                server=server,
                prompt=prompt,
                prompt_tokens=[1],
                new_tokens=[2] * len(pieces),
                new_text=new_text,
                stages=stages,
                setup_seconds=0.0,
                setup_bytes=0,
                reveal_bytes=0,
                seconds=1.0,
                ring_bits=64,
                fraction_bits=18,
                exp_iterations=8,
            )
            return client.Answer(record, [np.zeros(4), np.ones(4)])

        monkeypatch.setattr(client, "ask", ask)

    return put


class Terminal:
    """Standard output, as far as anybody can tell a terminal."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["a", " b", "\nc"], "a b\nc"),
        (["[bold]", ":smile:"], "[bold]:smile:"),  # no markup
        (["x", ""], "x\ufffd"),  # half of a character at the end is never shown as a piece
        ([""], ""),
    ],
)
def test_ask_prints_the_answer_once(
    entropi: Callable[..., Done],
    answering: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    pieces: list[str],
    text: str,
):
    answering(pieces, text)
    if terminal:
        monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    done = entropi("ask", "hello")
    assert done.out == text + "\n"
    assert f"{len(pieces)} tokens in 1.0 s, {len(pieces)}.0 MB both directions" in done.err


def test_ask_leaves_record_and_logits(entropi: Callable[..., Done], answering: Callable[..., None], tmp_path: Path):
    answering(["a", "b"], "ab")
    done = entropi("ask", "hello", "--json", "--record", tmp_path, "--logits", tmp_path / "logits")
    (recorded,) = record_files.read(tmp_path / "records.jsonl")
    assert json.loads(done.out) == json.loads(record_files.encode(recorded))
    assert done.out.count("\n") == 1
    assert np.load(tmp_path / "logits").shape == (2, 4)  # under the name that was given


@pytest.mark.parametrize("prompt", ["--max-new-tokens", "-x", "null", "3", "[1]", "{a: 1}", "a: b", "", " x ", "--"])
def test_a_prompt_is_text_whatever_it_looks_like(
    entropi: Callable[..., Done], answering: Callable[..., None], tmp_path: Path, prompt: str
):
    answering(["a"], "a")
    assert entropi("ask", "--record", tmp_path, "--", prompt).status == 0
    (recorded,) = record_files.read(tmp_path / "records.jsonl")
    assert isinstance(recorded, records.PrivateRun)
    assert recorded.prompt == prompt


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second in the locale "C"
def test_a_prompt_that_is_no_text(
    entropi: Callable[..., Done], answering: Callable[..., None], monkeypatch: pytest.MonkeyPatch, errors: str
):
    answering(["a"], "a")
    latin = "caf\xe9".encode("latin-1")
    assert_refused(entropi("ask", os.fsdecode(latin)), "the prompt is not UTF-8 text")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(latin), "utf-8", errors))
    assert_refused(entropi("ask", "-"), "standard input is not UTF-8 text")


# --- Interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_control_c_ends_a_training_that_can_be_continued(tmp_path: Path, corpus: Path):
    folder = tmp_path / "run"
    words = ["train", folder, "--corpus", corpus, *TINY, "--steps", "400", "--save-every", "5"]
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
    assert steps == list(range(1, 401))


def test_a_run_alone_is_continued_with_its_own_settings(
    entropi: Callable[..., Done], model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Settings need not be typed again; those that are typed and differ are refused by name."""
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


def test_interrupted_elsewhere(entropi: Callable[..., Done], monkeypatch: pytest.MonkeyPatch):
    def interrupted(**kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "cost", interrupted)
    monkeypatch.setattr(cli, "_arguments", lambda *args: {})
    done = entropi("cost")
    assert (done.status, done.out, done.err) == (130, "", "entropi: interrupted\n")


# --- What is not installed, and what is not imported ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("matplotlib", ["diagnose", "model"], "report"),
        ("matplotlib", ["report", "run"], "report"),
        ("jinja2", ["report", "run"], "report"),
        ("jax", ["ask", "hello"], "private"),
        ("aiohttp", ["ask", "hello"], "private"),
        ("jax", ["serve", "model"], "private"),
        ("jax", ["demo"], "private"),
        ("matplotlib", ["demo"], "report"),
    ],
)
def test_a_missing_extra_is_named(missing: str, words: list[str], extra: str):
    if extra == "private" or words == ["demo"]:
        pytest.importorskip("spu")
    done = spawn(*words, code=f"import sys; sys.modules['{missing}'] = None")
    assert_refused(done, f"{missing} is not installed: pip install 'entropi[{extra}]'")


@pytest.mark.parametrize("words", [["ask", "hello"], ["demo"]], ids=" ".join)
def test_a_missing_engine_is_named(words: list[str]):
    """The engine runs in a process of its own, so that it is missed is asked of what is installed."""
    pytest.importorskip("jax")
    code = """
from importlib import metadata
version = metadata.version
def without_spu(name):
    if name == "spu":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = without_spu
"""
    assert_refused(spawn(*words, code=code), "spu is not installed: pip install 'entropi[private]'")


def test_an_extra_that_does_not_load(entropi: Callable[..., Done], monkeypatch: pytest.MonkeyPatch):
    code = """
import sys, importlib.abc
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "matplotlib":
            raise ImportError("libpng.so:\\n cannot open")
sys.meta_path.insert(0, Broken())
"""
    assert_refused(spawn("report", "run", code=code), "libpng.so: cannot open", "entropi[report]")


HEAVY = ("torch", "jax", "transformers", "spu", "matplotlib", "accelerate", "aiohttp", "scipy")


def loaded_by(code: str) -> set[str]:
    """Which heavy packages a fresh Python has loaded after `code`."""
    report = f"import sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_light():
    assert loaded_by("import entropi; dir(entropi); entropi.UserError, entropi.__version__") == set()


def test_the_parser_is_light():
    """It is built for every command, so whatever it loads, they all wait for."""
    assert loaded_by("from entropi.cli import build_parser; build_parser()") == set()


@pytest.mark.parametrize("module", ["entropi.records", "entropi.console", "entropi.training.recipe"])
def test_light_modules(module: str):
    assert loaded_by(f"import {module}") == set()


def test_the_client_loads_no_torch():
    pytest.importorskip("spu")
    assert not loaded_by("import entropi.private.client") & {"torch", "transformers", "spu"}
    words = "['ask', 'hello', '--server', '127.0.0.1:1']"
    loaded = loaded_by(f"from entropi.cli import main\nassert main({words}) == 2\nprint()")
    assert not loaded & {"torch", "transformers", "matplotlib"}


def test_the_report_loads_no_torch(trained: Path, tmp_path: Path):
    words = ["report", str(trained), "--output", str(tmp_path / "r.html")]
    loaded = loaded_by(f"from entropi.cli import main\nassert main({words!r}) == 0\nprint()")
    assert not loaded & {"torch", "transformers", "jax"}


def test_training_loads_no_jax():
    assert not loaded_by("import entropi.training.run") & {"jax", "spu", "matplotlib", "aiohttp"}


# --- Rooms ------------------------------------------------------------------------------------------------------------

COMMON = {"cache", "downloads", "errors", "console", "machine", "record_files", "records", "temporary"}
ROOMS: dict[str, set[str]] = {
    "entropy": set(),
    "model": {"entropy"},
    "data": set(),
    "training": {"model", "data", "entropy", "costs"},
    "costs": {"model", "private"},
    "private": set(),
    "report": set(),
}
FOREIGN: dict[str, set[str]] = {  # packages that only these may import
    "torch": {"entropy", "model", "training", "demo"},
    "transformers": {"entropy", "model", "training"},
    "jax": {"private", "costs"},
    "spu": {"private"},
    "aiohttp": {"private"},
    "cryptography": {"private"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "jsonargparse": {"cli"},
}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    package = ("entropi", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_file_has_a_room():
    named = {*ROOMS, *COMMON, "cli", "commands", "costing", "demo", "__init__", "__main__"}
    assert {room_of(path) for path in FILES} == named


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    room = room_of(path)
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] != "entropi":
            assert room in FOREIGN.get(parts[0], {room}), f"{room} imports {parts[0]}"
        elif room in ROOMS:
            target = parts[1]
            assert target in {room, *COMMON, *ROOMS[room]}, f"{room} imports {target}"
        elif room in COMMON:
            assert parts[1] in COMMON, f"{room} imports {parts[1]}"


def test_the_direction_test_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "report").mkdir()
    path = tmp_path / "report" / "page.py"
    path.write_text(
        "from .. import model\nfrom . import figures\nimport torch.nn as nn\ndef f():\n  from entropi.d import x"
    )
    assert imports_of(path) == {"entropi.model", "entropi.report.figures", "torch.nn", "entropi.d.x"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_3_10_can_read_it(path: Path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_every_file_that_is_not_python_is_packaged():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    packaged = {
        path for pattern in project["tool"]["setuptools"]["package-data"]["entropi"] for path in PACKAGE.glob(pattern)
    }
    others = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}}
    assert others == packaged


def test_the_command_is_installed_under_its_name():
    try:
        scripts = metadata.entry_points(group="console_scripts", name="entropi")
    except metadata.PackageNotFoundError:
        pytest.skip("not installed")
    if not scripts:
        pytest.skip("not installed")
    assert {script.value for script in scripts} == {"entropi.cli:main"}
