"""Recorded entropies against those of the attention weights that eager attention returns."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

import entropi
from entropi.entropy.patterns import attention_pattern

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
WINDOWED = dict(num_key_value_heads=2, head_dim=8, sliding_window=5)
CACHED = {
    **CONFIGS,
    "mistral": MistralConfig(**COMMON, **WINDOWED),
    "gemma2": Gemma2Config(**COMMON, **WINDOWED, attn_implementation="eager"),  # a soft cap, which SDPA lacks
    "gpt_oss": GptOssConfig(  # sinks, which SDPA lacks
        **COMMON, **WINDOWED, num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_type": "default"},
        attn_implementation="eager",
    ),
}  # fmt: skip


def make(kind, implementation=None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CACHED[kind], attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def eager_entropies(model, ids, mask, **options):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, attention_mask=mask, output_attentions=True, use_cache=False, **options).attentions
    return [entropy_of(w) for w in weights]


def entropy_of(weights):
    """Of weights `(..., S)`; what a row lacks to 1 is the weight of a sink."""
    w = weights.double()
    sink = (1 - w.sum(-1)).clamp(min=0)
    return torch.special.entr(w).sum(-1) + torch.where(sink > 1e-6, torch.special.entr(sink), 0)


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


@pytest.mark.parametrize("kind", CONFIGS)
def test_models_train_under_autocast(kind):
    """With rotary positions their queries and keys are float32 there, their values bfloat16."""
    entropi.register_attention()
    model, plain = make(kind, "entropi"), make(kind)
    ids = torch.randint(1, 71, (2, 19), generator=torch.Generator().manual_seed(1))
    losses = []
    for each in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(each(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        if theirs.grad is not None:
            assert ours.grad is not None, name
            assert (ours.grad - theirs.grad).norm() <= 0.1 * theirs.grad.norm() + 1e-3, name


STATIC = {"cache_implementation": "static"}
CACHES = {
    "dynamic": ({}, [7] + [1] * 8),
    "static": (STATIC, [7] + [1] * 8),
    "dynamic, prefill in chunks": ({"prefill_chunk_size": 3}, [3, 3] + [1] * 9),
    "static, prefill in chunks": (STATIC | {"prefill_chunk_size": 3}, [3, 3] + [1] * 9),
}


@pytest.mark.parametrize("kind", CACHED)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_cache(kind, cache, padded):
    """The text is unchanged, and every token's entropies are those of one pass over all of it.

    A static cache has keys for tokens to come, and no mask hides them where causality does.
    """
    model = make(kind)
    extra, passes = CACHES[cache]
    prompt, mask = torch.randint(1, 71, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    options = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, **extra)
    plain = model.generate(prompt, **options)
    with entropi.record_entropy(model, keep_rows=True) as recorded:
        assert torch.equal(model.generate(prompt, **options), plain)
    assert [r.shape[-1] for r in recorded.rows[0]] == passes
    mask = torch.nn.functional.pad(mask, (0, 8), value=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for layer, expected in enumerate(eager_entropies(model, plain[:, :-1], mask, position_ids=positions)):
        rows = torch.cat(recorded.rows[layer], dim=-1).double().transpose(1, 2)
        expected = expected.transpose(1, 2)[mask.bool()]
        torch.testing.assert_close(rows[mask.bool()], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(recorded.mean()[layer].double(), expected.mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_models_load_with_a_static_cache_and_the_implementation(kind):
    """Without a recorder, as one who trains with it has it."""
    plain = make(kind)
    entropi.register_attention()
    model = make(kind, "entropi")
    prompt = torch.randint(1, 71, (2, 7))
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(prompt, **options, **STATIC), plain.generate(prompt, **options))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_patterns_with_a_static_cache(kind):
    """Keys for tokens to come are no distance."""
    model = make(kind)
    prompt = torch.randint(1, 71, (2, 7), generator=torch.Generator().manual_seed(3))
    options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None)
    found = []
    for extra in ({}, STATIC):
        with entropi.record_entropy(model, keep_patterns=True) as recorded:
            model.generate(prompt, **options, **extra)
        found.append(recorded.patterns)
    for dynamic, static in zip(found[0][0], found[1][0]):
        torch.testing.assert_close(tuple(static), tuple(dynamic), atol=1e-5, rtol=1e-5)
    assert len(found[1][0]) == 9


def test_generation_with_a_quantised_cache():
    """Its keys are those that the model then attends to, so the reference is eager attention over the same."""
    model = make("llama")
    cache = dict(cache_implementation="quantized", cache_config={"backend": "fp8"})
    options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None, return_dict_in_generate=True, **cache)
    prompt = torch.randint(1, 71, (2, 7), generator=torch.Generator().manual_seed(3))
    try:
        plain = model.generate(prompt, **options)
    except (ImportError, ValueError, KeyError) as error:
        pytest.skip(f"transformers has no such cache: {error}")
    with entropi.record_entropy(model) as recorded:
        assert torch.equal(model.generate(prompt, **options).sequences, plain.sequences)
    model.set_attn_implementation("eager")
    steps = model.generate(prompt, **options, output_attentions=True).attentions
    for layer in range(3):
        rows = torch.cat([entropy_of(step[layer]) for step in steps], dim=-1)
        torch.testing.assert_close(recorded.mean()[layer].double(), rows.mean(dim=(0, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("proposer", ["prompt", "assistant"])
def test_proposed_tokens_are_rows_too(proposer):
    """In assisted generation the model runs on proposals; those that it accepts have the rows of the text."""
    model = make("llama")
    how = dict(prompt_lookup_num_tokens=3) if proposer == "prompt" else dict(assistant_model=make("llama"))
    prompt = torch.randint(1, 71, (1, 7), generator=torch.Generator().manual_seed(3))
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None)
    plain = model.generate(prompt, **options)
    with entropi.record_entropy(model, keep_rows=True) as recorded:
        assert torch.equal(model.generate(prompt, **how, **options), plain)
    passes = [r.shape[-1] for r in recorded.rows[0]]
    assert max(passes[1:]) > 1
    expected = eager_entropies(model, plain[:, :-1], None)[0][0]
    done = 0
    for rows in recorded.rows[0]:
        torch.testing.assert_close(rows[0, :, 0].double(), expected[:, done], atol=1e-5, rtol=1e-5)
        same = [torch.allclose(r.double(), e, atol=1e-5) for r, e in zip(rows[0].T, expected[:, done:].T)]
        done += same.index(False) if False in same else len(same)
    assert done == expected.shape[-1]


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


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_entropi_models_with_checkpoints_record_too():
    config = entropi.EntropiConfig(
        architecture="SM+ScFuFFN", vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = entropi.EntropiForCausalLM(config).train()
    ids = torch.arange(20)[None]
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with entropi.record_entropy(model, keep_rows=True, gradients=True) as recorded:
            out = model(ids, labels=ids, use_cache=False)
        (out.loss + recorded.mean().sum()).backward()
        assert [len(rows) for rows in recorded.rows.values()] == [1, 1]
        gradients.append(model.model.blocks[0].attention.query.weight.grad)
    torch.testing.assert_close(*gradients)


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


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3"])  # plain, grouped queries, sliding windows
def test_patterns_equal_those_of_eager_attention_weights(kind, monkeypatch):
    monkeypatch.setattr("entropi.entropy.patterns.BLOCK_ROWS", 8)  # blocks that do not divide the length
    model = make(kind)
    ids = torch.randint(1, 71, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), entropi.record_entropy(model, keep_patterns=True) as recorded:
        model(ids, use_cache=False)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True, use_cache=False).attentions
    back = torch.arange(19)[:, None] - torch.arange(19)
    for layer, w in enumerate(weights):
        w = w.double()[:, :, 2:]
        expected = [
            (w * back[2:]).sum(-1).mean(-1),
            w[..., 0].mean(-1),
            (w * (back[2:] == 1)).sum(-1).mean(-1),
            (w * (back[2:] == 0)).sum(-1).mean(-1),
        ]
        (found,) = recorded.patterns[layer]
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_patterns_of_our_own_models():
    """With temperatures by position and the softmax kernel of private inference; and of a uniform head."""
    torch.manual_seed(0)
    config = entropi.EntropiConfig(
        architecture="SM(t)+ScFuFFN", vocab_size=71, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, softmax="power-5",
    )  # fmt: skip
    model = entropi.EntropiForCausalLM(config).eval()
    attention = model.model.blocks[0].attention
    torch.nn.init.uniform_(attention.temperature.parameter, 0.2, 3.0)
    ids = torch.randint(1, 71, (1, 12))
    shown = []
    hook = attention.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    with torch.no_grad(), entropi.record_entropy(model, keep_patterns=True) as recorded:
        model(ids)
    hook.remove()
    q, k = (p(shown[0]).view(1, 12, 2, 8).transpose(1, 2) for p in (attention.query, attention.key))
    logits = q @ k.transpose(-1, -2) / 8**0.5 / attention.temperature.values()[None, :, :, None]
    logits = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    x = logits - logits.amax(-1, keepdim=True)
    weights = (1 + x / 32).clamp(min=0.1) ** 32 * x.isfinite()
    weights = (weights / weights.sum(-1, keepdim=True)).detach()[:, :, 2:]
    torch.testing.assert_close(
        recorded.patterns[0][0].first_weight, weights[..., 0].mean(-1).double(), atol=1e-5, rtol=0
    )

    even = attention_pattern(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))
    assert even.distance.item() == pytest.approx((1 + 1.5 + 2) / 3)
    assert even.first_weight.item() == even.self_weight.item() == pytest.approx((1 / 3 + 1 / 4 + 1 / 5) / 3)
    assert attention_pattern(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 5, 4)).distance.item() == pytest.approx(2.0)
    assert attention_pattern(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)).self_weight.item() == 1.0
