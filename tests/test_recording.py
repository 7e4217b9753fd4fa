"""Recorded entropies against those of the attention weights that eager attention returns."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

import entropi

COMMON = dict(
    vocab_size=71, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
    intermediate_size=48, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=71, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "llama": LlamaConfig(**COMMON, num_key_value_heads=2),
    "qwen3": Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8),
    "gemma3": Gemma3TextConfig(**COMMON, num_key_value_heads=2, head_dim=8, sliding_window=5),
}


def make(kind, implementation="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def eager_entropies(model, ids, mask):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    return [torch.special.entr(w.double()).sum(-1) for w in weights]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_means_equal_those_of_eager_attention_weights(kind, padding):
    model = make(kind)
    ids = torch.randint(1, 71, (3, 19), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :6] = 0
    elif padding == "right":
        mask[1, -4:] = 0
    before = model.config._attn_implementation
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        fused = model(ids, attention_mask=mask, use_cache=False).logits
        model(ids[2:], attention_mask=mask[2:], use_cache=False)  # a second pass: means run over all rows
    assert model.config._attn_implementation == before
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(fused[mask.bool()], plain[mask.bool()], atol=2e-4, rtol=1e-3)
    entropies = eager_entropies(model, ids, mask)
    valid = torch.cat([mask.bool(), mask[2:].bool()])
    expected = [torch.cat([e, e[2:]]).transpose(1, 2)[valid].mean(0) for e in entropies]
    torch.testing.assert_close(recorded.mean().double(), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert recorded.layers == [0, 1, 2]


def test_rows_chosen_layers_and_gradients():
    model = make("llama")
    ids = torch.randint(1, 71, (2, 11))
    with entropi.record_entropy(model, layers=[1], keep_rows=True, gradients=True) as recorded:
        model(ids, use_cache=False)
    assert list(recorded.rows) == [1]
    assert recorded.rows[1][0].shape == (2, 4, 11)
    recorded.mean().sum().backward()
    gradient = model.model.layers[1].self_attn.q_proj.weight.grad
    assert gradient.abs().max() > 0
    assert model.model.layers[2].self_attn.q_proj.weight.grad is None


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_generation_with_a_cache_is_unchanged(kind):
    model = make(kind)
    prompt = torch.randint(1, 71, (1, 7))
    options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    plain = model.generate(prompt, **options)
    with entropi.record_entropy(model, keep_rows=True) as recorded:
        assert torch.equal(model.generate(prompt, **options), plain)
    assert [r.shape[-1] for r in recorded.rows[0]] == [7] + [1] * 8


def test_models_load_with_the_implementation(tmp_path):
    model = make("gpt_neox")
    model.save_pretrained(tmp_path)
    entropi.register_attention()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="entropi").eval()
    ids = torch.randint(1, 71, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


def test_entropi_models_record_too():
    config = entropi.EntropiConfig(
        architecture="SM(t)+ScFuFFN",
        vocab_size=71,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    model = entropi.EntropiForCausalLM(config).eval()
    ids = torch.randint(0, 71, (2, 13))
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        out = model(ids)
    torch.testing.assert_close(recorded.mean(), torch.stack([e.mean(dim=(0, 2)) for e in out.entropies]))


def test_what_the_operation_lacks_is_refused():
    model = make("gpt2").train()  # attention dropout 0.1
    with entropi.record_entropy(model), pytest.raises(ValueError, match="dropout"):
        model(torch.ones(1, 5, dtype=torch.long))
    assert model.config._attn_implementation == "sdpa"


def test_an_empty_recording_says_so():
    with entropi.record_entropy(make("gpt2")) as recorded:
        pass
    with pytest.raises(RuntimeError, match="inside the `with` block"):
        recorded.mean()


def test_a_compiled_model_is_recorded_too():
    config = entropi.EntropiConfig(
        architecture="SM+ScFuFFN", vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = entropi.EntropiForCausalLM(config).eval()
    ids = torch.arange(20)[None]
    compiled = torch.compile(model, backend="eager")
    compiled(ids, use_cache=False)
    with entropi.record_entropy(model) as recorder:
        out = compiled(ids, use_cache=False)
    expected = torch.stack([e.mean(dim=(0, 2)) for e in out.entropies])
    torch.testing.assert_close(recorder.mean(), expected)
