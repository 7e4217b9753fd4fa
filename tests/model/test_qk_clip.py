"""QK-clip: what it measures are the model's logits, and after it they reach the limit and no more."""

import math

import pytest
import torch

from entropi.errors import UserError
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.qk_clip import check_clippable, clip_query_and_key, largest_logits
from entropi.training.recipe import Recipe
from entropi.training.run import train

SIZES = dict(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=150)
KINDS = {
    "plain": dict(architecture="SM+LN+G"),
    "temperatures, lengths": dict(architecture="SM(t)+ScFuFFN", log_length_scaling=True),
    "weight norm, rotary": dict(architecture="SM+WNorm(QK+FFN)", position_embedding="rotary"),
    "grouped": dict(architecture="SM+RMS+R", num_key_value_heads=2),
}


def make(options):
    torch.manual_seed(0)
    model = EntropiForCausalLM(EntropiConfig(**SIZES, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.query" in name or "attention.key" in name:
                parameter.add_(0.4 * torch.randn_like(parameter))
    for block in model.model.blocks:
        block.attention.measure_logits = True
    return model.train()


def measured(model, ids):
    for block in model.model.blocks:
        block.attention.largest_logits = None
    model(ids)
    return [block.attention.largest_logits for block in model.model.blocks]


def test_the_largest_logit_of_every_head():
    query, key = torch.randn(2, 4, 150, 6), torch.randn(2, 2, 150, 6)
    temperature = torch.rand(1, 4, 150) + 0.5
    logits = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) / math.sqrt(6) / temperature[..., None]
    expected = logits.tril().abs().amax(dim=(0, 2, 3))
    torch.testing.assert_close(largest_logits(query, key, temperature), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_heads_reach_the_limit_and_others_stay(kind):
    model = make(KINDS[kind])
    ids = torch.randint(0, 61, (2, 140), generator=torch.Generator().manual_seed(1))
    before = measured(model, ids)[0]
    limit = float(before.sort().values[1:3].mean())  # between the second and the third of four heads
    attention = model.model.blocks[0].attention
    clip_query_and_key(attention.query, attention.key, before, limit)
    after = measured(model, ids)[0]
    assert (before > limit).sum() == 2
    torch.testing.assert_close(after, before.clamp(max=limit), rtol=1e-4, atol=0)


def test_a_norm_of_the_whole_matrix_is_refused():
    with pytest.raises(UserError, match="normalises as one matrix"):
        check_clippable(EntropiConfig(architecture="SM+SNorm(QK+FFN)", **SIZES))
    check_clippable(EntropiConfig(architecture="SM+SNorm(FFN)", **SIZES))


@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_training_with_a_limit_keeps_to_it(tmp_path, limit):
    corpus = tmp_path / "corpus.py"
    corpus.write_text("\n".join(f"def f{i}(x):\n    return x * {i}\n" for i in range(3000)), encoding="utf-8")
    recipe = Recipe(
        architecture="SM+LN+G", corpus=str(corpus), vocab_size=300, context_length=16, layers=2, heads=2,
        hidden_size=16, steps=20, batch_size=4, learning_rate=1e-2, precision="fp32", evaluate_every=0, qk_clip=limit,
    )  # fmt: skip
    model = EntropiForCausalLM.from_pretrained(train(recipe, tmp_path / "run")).train()
    for block in model.model.blocks:
        block.attention.measure_logits = True
    largest = torch.stack(measured(model, torch.arange(64).reshape(4, 16)))
    assert (largest.max() < 0.45) == bool(limit)


def test_training_refuses_what_cannot_be_clipped(tmp_path):
    recipe = Recipe(architecture="SM+SNorm(QK+FFN)", qk_clip=1.0)
    with pytest.raises(UserError, match="normalises as one matrix"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
