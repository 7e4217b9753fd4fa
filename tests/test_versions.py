"""What has to work on every Python from 3.10 to 3.13 without any extra: `make versions` runs this file on each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import entropi as package
from command_line import Done
from entropi.entropy.attention import entropy_attention

pytestmark = pytest.mark.usefixtures("surroundings")


def test_train_and_diagnose(
    entropi: Callable[..., Done], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # where pictures go
    done = entropi("diagnose", trained, "--json")
    assert done.status == 0, done.err
    assert "Traceback" not in done.err  # where only the progress is
    assert len(json.loads(done.out)["entropy"]) == 2
    assert (trained / "model" / "config.json").is_file()


def test_entropy_of_attention_against_its_definition():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 63, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    output, entropy = entropy_attention(query, key, value)

    logits = query @ key.mT / math.sqrt(16)
    weights = logits.masked_fill(torch.ones(63, 63, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    torch.testing.assert_close(output, weights @ value)
    torch.testing.assert_close(entropy, torch.special.entr(weights).sum(-1))


def test_record_a_model_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32)).eval()
    tokens = torch.arange(32)[None]
    with torch.no_grad(), package.record_entropy(model) as recorded:
        model(tokens)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(model(tokens, output_attentions=True).attentions)  # (layers, 1, heads, T, T)
    expected = torch.special.entr(weights).sum(-1).mean(dim=(1, 3))
    torch.testing.assert_close(torch.as_tensor(recorded.mean()), expected, check_dtype=False)
    assert package.diagnose(recorded.mean(), context_length=32).verdict


def test_a_softmax_only_model_folds(entropi: Callable[..., Done], trained: Path, tmp_path: Path):
    done = entropi("fold", trained, tmp_path / "folded")
    assert done.status == 0, done.err
