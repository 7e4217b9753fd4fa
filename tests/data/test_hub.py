"""Models and data sets by their names on the hub: the commands, downloading from a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from command_line import SOURCES, Done
from data.test_corpora import HELD, TEXTS, as_the_course_does, codeparrot_at
from entropi.data.corpus import Corpus, Document
from entropi.data.tokenizer import END_OF_TEXT, train_tokenizer
from entropi.downloads import name_of, on_disk
from entropi.errors import UserError
from hub_server import Hub, serving

datasets = pytest.importorskip("datasets")
TOKENIZER = "huggingface-course/code-search-net-tokenizer"
HANGING = 300  # seconds after which something hangs


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    return train_tokenizer(Corpus("c", [Document(str(n), t) for n, t in enumerate(TEXTS)], [], "h"), 400)


@pytest.fixture
def hub(tmp_path: Path, learnt: Tokenizer) -> Iterator[Hub]:
    """CodeParrot's three repositories and a tiny GPT-2."""
    root = tmp_path / "hub"
    codeparrot_at(root / "datasets", learnt)
    (root / "models" / TOKENIZER).parent.mkdir(parents=True)
    (root / "datasets" / TOKENIZER).rename(root / "models" / TOKENIZER)
    config = GPT2Config(
        vocab_size=learnt.get_vocab_size(), n_positions=64, n_embd=24, n_layer=3, n_head=2, eos_token_id=0
    )
    gpt2 = root / "models/somebody/tiny-gpt2"
    GPT2LMHeadModel(config).save_pretrained(gpt2)
    PreTrainedTokenizerFast(tokenizer_object=learnt, eos_token=END_OF_TEXT).save_pretrained(gpt2)
    (gpt2 / "pytorch_model.bin").write_bytes(b"pickled")
    (gpt2 / "onnx").mkdir()
    (gpt2 / "onnx/config.json").write_text("{}")
    with serving(root) as server:
        yield server


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """That of processes which know the hub: `HF_ENDPOINT` is read when `huggingface_hub` is imported."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "ENTROPI_CACHE": str(tmp_path / "cache")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return kept | variables | {"PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def python(environment: dict[str, str], tmp_path: Path) -> Callable[..., Done]:
    """Runs Python in a process of its own."""

    def run(*words: str) -> Done:
        done = subprocess.run(
            [sys.executable, *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANGING,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


# Forks a process for every command, which spares the seconds that importing torch and transformers takes.
FORKS = """
import json, os, sys, traceback
import entropi.training.loading
from entropi.cli import main

for line in sys.stdin:
    words, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 70
        try:
            for number, file in enumerate([os.devnull, *files]):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            status = main(words)
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


@pytest.fixture
def entropi(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Done]]:
    """Runs a command that needs torch in a process of its own."""
    files = [tmp_path / "said-on-output", tmp_path / "said-on-errors"]
    forking = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert forking.stdin is not None
    assert forking.stdout is not None

    def run(*words: str) -> Done:
        hanging = threading.Timer(HANGING, forking.kill)
        hanging.start()
        forking.stdin.write(json.dumps([words, *map(str, files)]) + "\n")
        forking.stdin.flush()
        status = int(forking.stdout.readline())
        hanging.cancel()
        return Done(status, *(file.read_text(encoding="utf-8") for file in files))

    yield run
    forking.stdin.close()
    assert forking.wait(HANGING) == 0
    forking.stdout.close()


BLOCKS = f"""
import json
from entropi.data.prepare import prepare
packed = prepare("codeparrot", 0, 16, tokenizer={TOKENIZER!r}, per_document=True).packed
print(json.dumps([packed.train[:].tolist(), packed.heldout[:].tolist()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [0, 2])
def test_codeparrot_is_that_of_the_course(hub, python, learnt, breaks):
    hub.break_after, hub.breaks = 200, breaks
    done = python("-c", BLOCKS)
    assert done.status == 0, done.err
    assert hub.breaks == 0
    train, heldout = json.loads(done.out)
    assert train == as_the_course_does(TEXTS, learnt, 16)
    assert heldout == as_the_course_does(HELD, learnt, 16)


@pytest.mark.slow
def test_a_run_knows_the_commit_it_was_begun_with(hub, entropi, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"{{corpus: codeparrot, tokenizer: {TOKENIZER}, packing: document, context_length: 16, layers: 1, heads: 2, "
        "hidden_size: 16, batch_size: 2, steps: 2}"
    )
    command = ["train", "run", "--config", "recipe.yaml"]
    done = entropi(*command)
    assert done.status == 0, done.err
    shutil.rmtree(tmp_path / "run/model")  # as if killed before it was written
    changed = hub.root / "datasets/huggingface-course/codeparrot-ds-valid/validation-00001-of-00002.parquet"
    datasets.Dataset.from_dict({"content": HELD[:2]}).to_parquet(changed)
    again = entropi(*command)
    assert again.status == 2
    assert "corpus" in again.err.splitlines()[-1], again.err


@pytest.mark.slow
def test_a_model_by_name(hub, entropi, tmp_path):
    (tmp_path / "text").mkdir()
    for number, text in enumerate([*TEXTS, *HELD]):
        (tmp_path / f"text/{number}.py").write_text(text)
    done = entropi("diagnose", "hf://somebody/tiny-gpt2", "--corpus", "text", "--html", "page.html", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert np.shape(found["entropy"]) == (3, 2)
    assert found["model"] == "GPT2LMHeadModel"
    assert (tmp_path / "tiny-gpt2-entropy.png").stat().st_size > 0
    assert "tiny-gpt2" in (tmp_path / "page.html").read_text()
    assert not any("pytorch_model.bin" in line or "onnx" in line for line in hub.log if "/resolve/" in line)

    commit = next(line.rpartition("/")[2] for line in hub.log if "/api/models/somebody/tiny-gpt2/revision" in line)
    hub.log.clear()
    done = entropi("evaluate", f"hf://somebody/tiny-gpt2@{commit}", "--corpus", "text", "--json")
    assert json.loads(done.out)["perplexity"] > 1, done.err
    assert not any("model.safetensors" in line for line in hub.log if line.startswith("GET"))  # it lies in the cache
    done = entropi("evaluate", "somebody/tiny-gpt2", "--corpus", "text", "--json")
    assert json.loads(done.out)["perplexity"] > 1, done.err


@pytest.mark.slow
def test_the_cost_of_a_model_by_name(hub, python):
    pytest.importorskip("spu")
    done = python("-m", "entropi", "cost", "--architecture", "hf://somebody/tiny-gpt2", "--seq-len", "8", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["prediction"]["layers"] == 3
    assert not any("safetensors" in line for line in hub.log)


@pytest.mark.slow
def test_a_gguf_file_by_name(hub, python, tmp_path):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("spu")
    writer = gguf.GGUFWriter(tmp_path / "hub/models/somebody/tiny-gpt2/tiny.gguf", "llama")
    writer.add_context_length(16)
    writer.add_block_count(2)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    done = python(
        "-m", "entropi", "cost", "--architecture", "hf://somebody/tiny-gpt2/tiny.gguf", "--seq-len", "8", "--json"
    )
    assert done.status == 0, done.err
    assert json.loads(done.out)["prediction"]["layers"] == 2
    fetched = [line for line in hub.log if "/resolve/" in line]
    assert fetched
    assert all("tiny.gguf" in line for line in fetched)


MISSING = {
    ("diagnose", "hf://somebody/else"): "the hub has no model somebody/else",
    ("evaluate", "hf://somebody/tiny-gpt2@v2"): "somebody/tiny-gpt2 has no revision v2",
    ("evaluate", "somebody/else"): "there is no folder somebody/else, and as a name on the hub: the hub has no",
    ("convert", "hf://somebody/tiny-gpt2/weights.gguf", "out"): "somebody/tiny-gpt2 has no file weights.gguf",
    ("diagnose", f"hf://{TOKENIZER}"): "holds no model: config.json is missing",
    ("train", "run", "--corpus", "codeparrot", "--tokenizer", "nobody/none"): "cannot read the tokenizer",
}


@pytest.mark.slow
def test_what_the_hub_does_not_have(entropi):
    for words, message in MISSING.items():
        done = entropi(*words)
        assert done.status == 2, (words, done.err)
        assert "Traceback" not in done.err, words
        assert message in done.err.splitlines()[-1], words


@pytest.mark.parametrize("name", ["hf://", "hf://gpt2", "hf://a/b/c", "hf://a/b@", "hf://../x y"])
def test_what_is_no_name(name):
    with pytest.raises(UserError, match="hf://OWNER/NAME"):
        on_disk(name)


def test_paths_are_no_names(tmp_path, monkeypatch):
    """Whether or not they exist: nobody is asked, unless a word can be nothing but a name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/mine", "./runs/mine", "./a/b", "a/b/c", "mine", str(tmp_path / "a"), "a/model.gguf", "~/a"):
        assert on_disk(path) == Path(path)
    assert name_of("hf://openai-community/gpt2@main") == "gpt2"
    assert name_of(str(tmp_path / "run")) == "run"
    assert name_of("hf://a/b/c.Q4_1.gguf@main") == name_of("x/c.Q4_1.gguf") == "c.Q4_1"


@pytest.mark.parametrize("name", ["hf://nobody/nothing", "hf://nobody/nothing/weights.gguf"])
def test_a_hub_that_is_not_reached_is_told_from_one_that_lacks_a_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"^the hub cannot be reached, and nobody/nothing is not in its cache: \S"):
        on_disk(name)
