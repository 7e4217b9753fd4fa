"""`entropi diagnose` and `evaluate` of models that are not ours: folders as transformers writes them, with their own
tokenizers."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from entropi import records
from entropi.cli import main
from entropi.data.corpus import load_texts
from entropi.report.page import write_diagnosis
from entropi.training.evaluation import diagnose_heldout, evaluate_blocks, observe_patterns

VOCABULARY = 300
CONFIGS: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=48),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
    ),
    # Attention in layers 1 and 3, none at all, and attention with sinks.
    "jamba": JambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
        max_position_embeddings=24,
    ),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2),
    "gpt_oss": GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=24,
    ),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        lines = [f"def f{i}(x):\n    return x + {(i * number) % 17}\n" for i in range(40)]
        (folder / f"{number}.py").write_text("".join(lines))
    return folder


def saved(kind: str, folder: Path, corpus: Path) -> Path:
    """A model with random weights, and a byte-level tokenizer; Llama's begins every text with a token of its own."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([path.read_text() for path in corpus.iterdir()], trainer)
    if kind == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("models") / request.param, corpus)


@pytest.fixture
def entropi(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)  # where pictures go
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: Any) -> tuple[int, str, str]:
        capfd.readouterr()  # what transformers said when it saved the model
        status = main([*map(str, words)])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def diagnose(entropi: Callable[..., tuple[int, str, str]], corpus: Path) -> Callable[..., tuple[int, str, str]]:
    return lambda *words: entropi("diagnose", *words, "--corpus", corpus)


def blocks_of(model: Path, corpus: Path, length: int) -> np.ndarray:
    """All text in the model's own tokens, made with transformers' tokenizer rather than with ours."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    begins = model.name == "llama"
    ids: list[int] = []
    for document in load_texts(str(corpus)):
        ids += [*tokenizer(document.text, add_special_tokens=False).input_ids, 1 if begins else 0]
    length -= begins
    blocks = np.array(ids[: len(ids) // length * length]).reshape(-1, length)
    return np.insert(blocks, 0, 1, axis=1) if begins else blocks


def test_entropies_are_those_of_eager_attention(
    model: Path, corpus: Path, diagnose: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, out, err = diagnose(
        model, "--json", "--sequences", 5, "--heatmap", tmp_path / "map.svg", "--html", tmp_path / "page.html"
    )
    assert status == 0, err
    found = json.loads(out)
    length = {"gpt2": 48, "llama": 40}[model.name]
    ids = torch.from_numpy(blocks_of(model, corpus, length)[:5])
    reference = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    with torch.no_grad():
        result = reference(ids, output_attentions=True, use_cache=False, labels=ids)
    entropies = [torch.special.entr(w.double()).sum(-1).mean((0, 2)) for w in result.attentions]
    assert np.array(found["entropy"]) == pytest.approx(torch.stack(entropies).numpy(), rel=1e-4, abs=1e-6)
    assert found["max_possible"] == pytest.approx(math.log(length))
    assert found["source"] == f"{corpus.name}, 5 of {len(blocks_of(model, corpus, length))} sequences"
    assert found["layers"] == list(range(len(entropies)))
    assert found["attention"]["sequences"] == 5
    assert found["perplexity"] == pytest.approx(math.exp(float(result.loss)), rel=1e-4)
    assert (tmp_path / "map.svg").read_text().startswith("<?xml")
    page = (tmp_path / "page.html").read_text()
    assert f"the perplexity is <strong>{math.exp(float(result.loss)):,.2f}</strong>" in page
    assert type(reference).__name__ in page
    assert "On average a head looks" in page


def test_a_table_and_a_verdict_in_the_terminal(
    model: Path, diagnose: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, out, err = diagnose(model, "--sequences", 2, "--context-length", 16)
    assert status == 0
    assert re.search(r"^layer +0 +1 +2 +3$", err, re.M)
    assert all(len(line) <= 80 for line in err.splitlines())
    assert "of the heads" in out
    assert "On average a head looks" in out
    assert Path(f"{model.name}-entropy.png").read_bytes()[:4] == b"\x89PNG"
    assert not (model / "entropy.png").exists()


def test_patterns_hold_for_a_whole_model(model: Path, corpus: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    blocks = blocks_of(model, corpus, 32)[:3]
    found = observe_patterns(loaded, blocks)
    loaded.set_attn_implementation("eager")
    with torch.no_grad():
        weights = loaded(torch.from_numpy(blocks), output_attentions=True, use_cache=False).attentions
    first = torch.stack([w[:, :, 2:, 0].double().mean((0, 2)) for w in weights])
    assert np.array(found.on_first) == pytest.approx(first.numpy(), abs=1e-5)
    rows = torch.stack([torch.special.entr(w.double()).sum(-1).mean((0, 1)) for w in weights])
    assert found.positions == list(range(32))
    assert np.array(found.entropy_by_position) == pytest.approx(rows.numpy(), abs=1e-5)


def test_layers_have_the_model_s_own_numbers(
    corpus: Path, diagnose: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = saved("jamba", tmp_path / "jamba", corpus)
    page = tmp_path / "page.html"
    status, out, err = diagnose(folder, "--sequences", 2, "--html", page)
    assert status == 0, err
    assert re.search(r"^ +1 .*\n +3 ", err, re.M)
    assert "in layers 1 and 3, both that have attention" in out
    assert [int(n) for n in re.findall(r'<tr><th scope="row">(\d+)</th><td data-layer', page.read_text())] == [1, 3]
    found = json.loads(diagnose(folder, "--sequences", 2, "--json")[1])
    assert found["layers"] == found["attention"]["layers"] == [1, 3]
    assert {layer for layer, _ in found["overloaded"]} == {1, 3}


def test_layers_that_differ_in_their_number_of_heads(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["gpt2"])
    model = GPT2LMHeadModel(config).eval()
    fewer = copy.deepcopy(config)
    fewer.n_head = 2
    fewer._attn_implementation = config._attn_implementation
    torch.manual_seed(0)
    model.transformer.h[1].attn = GPT2Attention(fewer, layer_idx=1).eval()
    blocks = np.random.default_rng(0).integers(0, VOCABULARY, (3, 24))
    result, pattern = evaluate_blocks(model, blocks, 2), observe_patterns(model, blocks)
    found = diagnose_heldout(result, 24)
    model.set_attn_implementation("eager")
    for layer in model.transformer.h:
        layer.attn.config._attn_implementation = "eager"
    with torch.no_grad():
        weights = model(torch.from_numpy(blocks), output_attentions=True, use_cache=False).attentions
    assert [len(row) for row in found.entropy] == [len(row) for row in pattern.on_first] == [4, 2, 4]
    for row, first, w in zip(found.entropy, pattern.on_first, weights):
        assert row == pytest.approx(torch.special.entr(w.double()).sum(-1).mean((0, 2)).tolist(), rel=1e-4)
        assert first == pytest.approx(w[:, :, 2:, 0].double().mean((0, 2)).tolist(), abs=1e-5)
    evaluation = records.Evaluation(step=0, cross_entropy=1.0, perplexity=math.e, tokens=1, entropy=found.entropy)
    (tmp_path / "model").mkdir()
    page = write_diagnosis(tmp_path / "model", [evaluation, found, pattern], tmp_path / "page.html").read_text()
    assert page.count("data-head=") == 10


@pytest.mark.parametrize("kind", ["mamba", "gpt_oss"])
def test_perplexity_needs_no_recorder(
    kind: str, corpus: Path, entropi: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = saved(kind, tmp_path / kind, corpus)
    words = (folder, "--corpus", corpus, "--context-length", 24, "--sequences", 3)
    status, out, err = entropi("evaluate", *words, "--json")
    assert status == 0, err
    ids = torch.from_numpy(blocks_of(folder, corpus, 24)[:3])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(folder).eval()(ids, labels=ids, use_cache=False).loss
    assert json.loads(out)["cross_entropy"] == pytest.approx(float(loss), rel=1e-5)
    assert json.loads(out)["tokens"] == 3 * 23


def test_a_model_without_attention_has_nothing_to_diagnose(
    corpus: Path, diagnose: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, out, err = diagnose(saved("mamba", tmp_path / "mamba", corpus), "--context-length", 24)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "MambaForCausalLM cannot be diagnosed: " in err
    assert "has no softmax attention" in err


def test_a_forward_pass_that_fails_is_one_line(
    model: Path, corpus: Path, entropi: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    kind = type(AutoModelForCausalLM.from_pretrained(model))
    monkeypatch.setattr(kind, "forward", fail)
    for command, done in (("evaluate", "evaluated"), ("diagnose", "diagnosed")):
        status, out, err = entropi(command, model, "--corpus", corpus)
        assert (status, out) == (2, "")
        assert err == f"entropi: {kind.__name__} cannot be {done}: no kernel for this\n"


def test_all_of_a_plain_text_is_used(
    model: Path, corpus: Path, entropi: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    text = "".join(path.read_text() for path in sorted(corpus.iterdir())[:8])
    (tmp_path / "mine.txt").write_text(text)
    status, out, _ = entropi("evaluate", model, "--corpus", "mine.txt", "--context-length", 16, "--json")
    found = json.loads(out)
    count = len(blocks_of(model, tmp_path / "mine.txt", 16))
    assert count > 32
    assert (status, found["corpus"], found["text"]) == (0, "mine.txt", f"mine.txt, {count:,} sequences")
    assert (found["tokens"], found["context_length"]) == (count * 15, 16)
    out = entropi("diagnose", model, "--corpus", "mine.txt", "--context-length", 16)[1]
    assert f"measured on mine.txt, 32 of {count:,} sequences of 16 tokens" in out
    (tmp_path / "short.txt").write_text("x = 1")
    status, _, err = entropi("evaluate", model, "--corpus", "short.txt")
    assert status == 2
    assert "short.txt is shorter than one block of" in err
    assert "--context-length" in err


def test_a_tokenizer_may_have_more_entries_than_the_model(
    corpus: Path, entropi: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """One special token more is common; what decides is whether a text uses it."""
    folder = saved("gpt2", tmp_path / "gpt2", corpus)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    extra = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(extra)
    model.save_pretrained(folder)
    (tmp_path / "plain.txt").write_text("return x + 1\n" * 40)
    (tmp_path / "using.txt").write_text("return x + 1\n" * 40 + "<extra>\n" + "return x\n" * 40)
    for command in ("evaluate", "diagnose"):
        status, _, err = entropi(command, folder, "--corpus", "plain.txt")
        assert status == 0, err
        status, out, err = entropi(command, folder, "--corpus", "using.txt")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"using.txt has the token '<extra>', number {extra}, for which the model in" in err


def edited(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words", "part"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), [], "holds no tokenizer: tokenizer.json is missing"),
        (lambda f: (f / "model.safetensors").unlink(), [], "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"{}"), [], "cannot be opened"),
        (lambda f: edited(f, "config.json", lambda c: c.update(n_layer=5)), [], "is missing"),
        (lambda f: edited(f, "config.json", lambda c: c.update(model_type="no-such")), [], "no-such"),
        (lambda f: edited(f, "tokenizer_config.json", lambda c: c.pop("eos_token")), [], "no token that ends a text"),
        (lambda f: None, ["--softmax", "power-5"], "softmax is for models of entropi"),
        (lambda f: None, ["--context-length", "49"], "context_length is 49, the model takes 48"),
        (lambda f: None, ["--context-length", "2"], "context_length is 2, at least 3"),
        (lambda f: None, ["--sequences", "0"], "sequences is 0, at least 1"),
        (lambda f: None, ["--html", "/nowhere/page.html"], "there is no folder /nowhere"),
    ],
)
def test_mistakes_are_one_line(
    damage: Callable[[Path], Any],
    words: list[str],
    part: str,
    corpus: Path,
    diagnose: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    folder = saved("gpt2", tmp_path / "gpt2", corpus)
    damage(folder)
    status, out, err = diagnose(folder, *words)
    assert (status, out) == (2, "")
    assert part in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.png"))


def test_code_of_a_folder_does_not_run(
    corpus: Path, diagnose: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = saved("gpt2", tmp_path / "gpt2", corpus)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    classes = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    edited(folder, "config.json", lambda c: c.update(auto_map=classes, model_type="evil"))
    status, _, err = diagnose(folder)
    assert status == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused(
    corpus: Path, diagnose: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = saved("gpt2", tmp_path / "gpt2", corpus)
    torch.save({}, folder / "pytorch_model.bin")
    shutil.move(folder / "model.safetensors", tmp_path)
    status, _, err = diagnose(folder)
    assert status == 2
    assert "model.safetensors" in err


def test_a_model_that_cannot_be_recorded_is_named_once() -> None:
    from types import SimpleNamespace

    from entropi.errors import UserError
    from entropi.training.loading import failures_in_one_line

    opened: Any = SimpleNamespace(ours=False, model=torch.nn.Identity())
    with pytest.raises(UserError) as caught, failures_in_one_line(opened, "diagnosed"):
        raise ValueError("Identity cannot be recorded: it computes attention itself")
    assert str(caught.value) == "Identity cannot be diagnosed: it computes attention itself"
