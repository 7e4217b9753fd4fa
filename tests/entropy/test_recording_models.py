"""Recording of models that are not plain decoders, or not alone: every figure against eager attention's weights."""

import copy
import functools
import inspect
import subprocess
import sys
import threading
import warnings

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import entropi
from entropi.entropy.interface import attention_forward, attention_modules

WIDTH = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
TOKENS = dict(vocab_size=71, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = LlamaConfig(**WIDTH, **TOKENS, num_hidden_layers=3, num_key_value_heads=2, max_position_embeddings=64)
PARTS = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
BART = transformers.BartConfig(
    **PARTS, **TOKENS, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, forced_eos_token_id=None,
    decoder_start_token_id=1,
)  # fmt: skip
T5 = transformers.T5Config(
    **TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
)
JAMBA = transformers.JambaConfig(
    **WIDTH, **TOKENS, num_hidden_layers=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
    mamba_dt_rank=4, mamba_d_state=4, num_experts=2, num_experts_per_tok=1, use_mamba_kernels=False,
)  # fmt: skip


def build(config, make=AutoModelForCausalLM, **options):
    torch.manual_seed(0)
    model = make.from_config(copy.deepcopy(config), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(batch=3, length=14, seed=1):
    return torch.randint(3, 71, (batch, length), generator=torch.Generator().manual_seed(seed))


def eager(model, **inputs):
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True)


def means(weights, valid=None):
    """`(L, H)` nats of eager weights, over the rows `(B, T)` that are valid."""
    rows = [torch.special.entr(w.double()).sum(-1).transpose(1, 2) for w in weights]
    return torch.stack([(r.flatten(0, 1) if valid is None else r[valid]).mean(0) for r in rows])


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


# --- Gradient checkpointing -------------------------------------------------------------------------------------------


def gradients(model, inside, recorded_with):
    """Of loss + 100 * entropy, with backward in the block or after it; and how many rows were kept."""
    ids = tokens(2, 11)
    with entropi.record_entropy(model, **recorded_with) as recorded:
        loss = model(ids, labels=ids, use_cache=False).loss
        if recorded_with.get("gradients"):
            loss = loss + 100 * recorded.mean().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    kept = [len(rows) for rows in recorded.rows.values()]
    return {name: p.grad for name, p in model.named_parameters()}, kept


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "entropi"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_gradients_are_those_without_checkpoints(implementation, reentrant, inside, with_gradients):
    options = dict(keep_rows=True, gradients=with_gradients)
    model = build(LLAMA, attn_implementation=implementation).train()
    expected, kept = gradients(copy.deepcopy(model), inside, options)
    assert kept == [1, 1, 1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    found, kept = gradients(model, inside, options)
    assert kept == [1, 1, 1]  # what is computed again is not recorded again
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions
    assert model.config._attn_implementation == implementation
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_entropies_have_gradients_at_all():
    model = build(LLAMA).train()
    without, _ = gradients(copy.deepcopy(model), True, dict(gradients=False))
    with_them, _ = gradients(model, True, dict(gradients=True))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert (with_them[name] - without[name]).norm() > 0.1 * with_them[name].norm()


def test_reentrant_checkpoints_of_ones_own_are_refused():
    model = build(LLAMA).train()
    ids = tokens(2, 11)
    for layer in model.model.layers:
        layer.forward = functools.partial(reentrant, layer.forward)
    with entropi.record_entropy(model, gradients=True), pytest.raises(ValueError, match="use_reentrant=True"):
        model(ids, use_cache=False)


def reentrant(forward, hidden, **kwargs):
    return checkpoint(functools.partial(forward, **kwargs), hidden, use_reentrant=True)


def test_a_learned_position_bias_gets_its_gradient():
    model = build(T5, AutoModelForSeq2SeqLM)
    ids, answers = tokens(), tokens(length=9, seed=2)
    plain = copy.deepcopy(model)
    plain(input_ids=ids, labels=answers, use_cache=False).loss.backward()
    with entropi.record_entropy(model):
        model(input_ids=ids, labels=answers, use_cache=False).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


# --- Padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("additive", [False, True])
def test_masks_made_by_the_user(side, additive):
    """Of four dimensions: a row whose own key is hidden is padding."""
    model = build(LLAMA)
    ids, mask = tokens(), torch.ones(3, 14, dtype=torch.long)
    mask[0, : 5 if side == "left" else None] = 0 if side == "left" else 1
    if side == "right":
        mask[1, -4:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    made = torch.ones(14, 14).tril().bool() & mask[:, None, None, :].bool()
    if additive:
        made = torch.zeros(made.shape).masked_fill(~made, torch.finfo(torch.float32).min)
    expected = means(eager(model, input_ids=ids, attention_mask=mask, position_ids=positions).attentions, mask.bool())
    inputs = dict(input_ids=ids, attention_mask=made, position_ids=positions, use_cache=False)
    with torch.no_grad():
        plain = model(**inputs).logits
        with entropi.record_entropy(model) as recorded:
            logits = model(**inputs).logits
    close(recorded.mean(), expected)
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)  # those of padding too


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_encoders(side):
    config = transformers.BertConfig(**WIDTH, **TOKENS, num_hidden_layers=2, max_position_embeddings=64)
    model = build(config, AutoModel)
    ids, mask = tokens(), torch.ones(3, 14, dtype=torch.long)
    mask[0, : 5 if side == "left" else 0] = 0
    mask[1, 14 if side == "left" else 10 :] = 0
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        model(ids, mask)  # by position, as well as by name
    close(recorded.mean(), means(eager(model, input_ids=ids, attention_mask=mask).attentions, mask.bool()))
    assert recorded.num_layers == 2


def test_a_mask_that_tells_no_padding_is_refused():
    """Additive masks over a cache, and rows that are fewer than keys: causality says which key is a row's own."""
    model = build(LLAMA)
    ids = tokens(1, 14)
    with torch.no_grad(), entropi.record_entropy(model, keep_rows=True) as recorded:
        cache = model(ids[:, :10]).past_key_values
        made = torch.zeros(1, 1, 4, 14).masked_fill(~torch.ones(4, 14).tril(10).bool(), -torch.inf)
        model(ids[:, 10:], attention_mask=made, past_key_values=cache, position_ids=torch.arange(10, 14)[None])
    close(recorded.mean(), means(eager(model, input_ids=ids).attentions))


# --- Several attentions, layers without one, layers used again --------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [BART, T5], ids=["bart", "t5"])
def test_encoder_decoder_and_cross_attention_are_told_apart(config, padded):
    model = build(config, AutoModelForSeq2SeqLM)
    ids, answers = tokens(), tokens(length=9, seed=2)
    mask, answer_mask = torch.ones_like(ids), torch.ones_like(answers)
    if padded:
        mask[0, -5:], answer_mask[2, -3:] = 0, 0
    inputs = dict(input_ids=ids, attention_mask=mask, decoder_input_ids=answers, decoder_attention_mask=answer_mask)
    out = eager(model, **inputs)
    with torch.no_grad(), entropi.record_entropy(model, keep_rows=True) as recorded:
        logits = model(**inputs, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)  # those of padding too
    cross = "encoder_attn" if config is BART else "EncDecAttention"
    own = "decoder.self_attn" if config is BART else "decoder.SelfAttention"
    close(recorded.mean("encoder"), means(out.encoder_attentions, mask.bool()))
    close(recorded.mean(own), means(out.decoder_attentions, answer_mask.bool()))
    close(recorded.mean(cross), means(out.cross_attentions, answer_mask.bool()))
    assert recorded.attention(cross).layers == [0, 1]
    assert recorded.attention(cross).rows[1][0].shape == (3, 4, 9)
    assert list(recorded.by_layer("encoder")) == [0, 1]
    names = list(recorded.attentions)
    assert len(names) == 3
    close(recorded.mean(names[0]), means(out.encoder_attentions, mask.bool()))
    for ask in (recorded.mean, recorded.by_layer, lambda: recorded.layers, lambda: recorded.rows):
        with pytest.raises(ValueError, match="several attentions") as error:
            ask()
        assert all(name in str(error.value) for name in names)
    with pytest.raises(ValueError, match="names 2 of"):
        recorded.mean("decoder")
    with pytest.raises(ValueError, match="names none of"):
        recorded.mean("tower")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("config", [BART, T5], ids=["bart", "t5"])
def test_generation_of_encoder_decoders(config, cache):
    model = build(config, AutoModelForSeq2SeqLM)
    ids, mask = tokens(), torch.ones(3, 14, dtype=torch.long)
    mask[0, :5] = 0
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation=cache)
    text = model.generate(ids, attention_mask=mask, **options)
    with entropi.record_entropy(model) as recorded:
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), text)
    out = eager(model, input_ids=ids, attention_mask=mask, decoder_input_ids=text[:, :-1])
    close(recorded.mean("encoder"), means(out.encoder_attentions, mask.bool()))
    parts = ["decoder.self_attn", "encoder_attn"] if config is BART else ["decoder.SelfAttention", "EncDecAttention"]
    close(recorded.mean(parts[0]), means(out.decoder_attentions))
    close(recorded.mean(parts[1]), means(out.cross_attentions))


def test_layers_have_the_models_own_numbers():
    model = build(JAMBA)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = means(eager(model, input_ids=ids, attention_mask=mask).attentions, mask.bool())
    with torch.no_grad(), entropi.record_entropy(model, keep_rows=True) as recorded:
        model(ids, attention_mask=mask, use_cache=False)
    assert recorded.layers == [1, 3]
    assert recorded.num_layers == 4
    assert list(recorded.rows) == [1, 3]
    close(recorded.mean(), expected)
    close(recorded.by_layer()[3], expected[1])
    with torch.no_grad(), entropi.record_entropy(model, layers=[3]) as recorded:
        model(ids, attention_mask=mask, use_cache=False)
    assert recorded.layers == [3]
    with torch.no_grad(), entropi.record_entropy(model, layers=[2]) as recorded:
        model(ids)
    with pytest.raises(RuntimeError, match="none of the layers asked for"):
        recorded.mean()


def test_a_layer_that_is_used_several_times_is_several_layers():
    config = transformers.AlbertConfig(
        **WIDTH, **TOKENS, embedding_size=16, num_hidden_layers=4, num_hidden_groups=2, max_position_embeddings=64
    )
    model = build(config, AutoModel)
    ids = tokens()
    expected = means(eager(model, input_ids=ids).attentions)
    for layers in (None, [1, 2]):
        with torch.no_grad(), entropi.record_entropy(model, layers) as recorded:
            model(ids)
            model(ids)  # a second pass is of the same layers
        assert recorded.layers == (layers or [0, 1, 2, 3])
        close(recorded.mean(), expected if layers is None else expected[1:3])
    assert recorded.num_layers == 4


def test_layers_that_differ_in_heads():
    model = build(LLAMA)
    odd = copy.deepcopy(LLAMA)
    odd.num_attention_heads, odd.num_key_value_heads, odd.head_dim = 2, 2, 8
    torch.manual_seed(1)
    model.model.layers[1].self_attn = LlamaAttention(odd, 1).eval()
    ids = tokens()
    weights = eager(model, input_ids=ids).attentions
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        model(ids, use_cache=False)
    found = recorded.by_layer()
    assert [len(entropy) for entropy in found.values()] == [4, 2, 4]
    for layer, w in enumerate(weights):
        close(found[layer], means([w])[0])
    with pytest.raises(ValueError, match=r"differ in heads, layer 0 has 4 and layer 1 has 2: by_layer\(\)"):
        recorded.mean()


def multimodal():
    vision = transformers.CLIPVisionConfig(**WIDTH, num_hidden_layers=2, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=LLAMA, image_token_index=70, vision_feature_layer=-1
    )
    return build(config, transformers.AutoModelForImageTextToText)


def test_towers_of_multimodal_models_are_told_apart():
    model = multimodal()
    ids = tokens(2, 14).clamp(max=69)
    ids[:, 2:6] = 70
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    pixels = torch.randn(2, 3, 16, 16)
    inputs = dict(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = tower(pixels, output_attentions=True).attentions
    expected = means(eager(model, **inputs).attentions, mask.bool())
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        model(**inputs)
    close(recorded.mean("language_model"), expected)
    close(recorded.mean("vision_tower"), means(seen))
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        model(input_ids=tokens(2, 14).clamp(max=69))  # text alone: one attention runs
    assert recorded.mean().shape == (3, 4)


def test_settings_of_sub_configurations_are_restored():
    model = multimodal()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa", "": "sdpa"})
    configs = [model.config, model.config.text_config, model.config.vision_config]
    before = [config._attn_implementation for config in configs]
    assert before == ["sdpa", "eager", "sdpa"]
    functions = dict(transformers.AttentionInterface._global_mapping)
    masks = dict(transformers.AttentionMaskInterface._global_mapping)
    with entropi.record_entropy(model), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), entropi.record_entropy(model):
        raise ZeroDivisionError
    assert [config._attn_implementation for config in configs] == before
    assert functions == dict(transformers.AttentionInterface._global_mapping)
    assert masks == dict(transformers.AttentionMaskInterface._global_mapping)
    for module in model.modules():
        assert not any("entropi" in name for name in vars(module))
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_models_without_attention():
    model = build(transformers.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4))
    refused(model, "MambaForCausalLM has no softmax attention to record$")


def refused(model, line):
    with pytest.raises(ValueError, match="^" + line) as error, entropi.record_entropy(model):
        pass
    assert "\n" not in str(error.value)


def test_attention_that_cannot_be_taken_over():
    """A family that computes it itself, and one for which transformers supports its own attention only."""
    falcon = transformers.FalconConfig(**TOKENS, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    refused(build(falcon), "FalconForCausalLM cannot be recorded: FalconAttention computes attention itself")
    switch = transformers.SwitchTransformersConfig(
        **TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=2
    )
    refused(build(switch, AutoModelForSeq2SeqLM), "SwitchTransformersStack cannot be recorded: transformers supports")
    refused({}, "record_entropy takes a model, got dict")


def test_attention_beside_the_interface_is_named():
    """A part of a model that attends on its own does not vanish: the answer has to be asked for by name."""
    model = build(LLAMA)
    model.model.norm = torch.nn.Sequential(model.model.norm, Beside())
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        model(tokens(), use_cache=False)
    with pytest.raises(ValueError, match=r"not recorded, as they compute it themselves: model\.norm\.\*$"):
        recorded.mean()
    assert recorded.mean("self_attn").shape == (3, 4)


class Beside(torch.nn.Module):
    """An attention that no interface knows of."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


Beside.__name__ = "AttentionBeside"


def test_an_attention_module_that_does_not_attend_by_the_interface_is_refused():
    model = build(LLAMA)
    inner = model.model.layers[1].self_attn
    inner.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with entropi.record_entropy(model), pytest.raises(ValueError, match="without transformers' attention interface"):
        model(tokens(), use_cache=False)


@pytest.mark.parametrize("name", ["indices", "sinks"])
def test_arguments_that_are_not_understood_are_refused_by_name(name):
    """Of families whose eager attention takes them; ignored, they would give other entropies without a word."""
    module = build(LLAMA, attn_implementation="entropi").model.layers[0].self_attn
    family = inspect.unwrap(type(module).forward).__globals__
    own = family["eager_attention_forward"]
    q = torch.randn(1, 4, 5, 8)
    if name == "sinks":
        family["eager_attention_forward"] = lambda module, query, key, value, attention_mask, sinks=None: None
    try:
        with pytest.raises(ValueError, match=f"LlamaAttention needs {name}"):
            attention_forward(module, q, q, q, None, **{name: torch.zeros(4)})
    finally:
        family["eager_attention_forward"] = own
    assert attention_forward(module, q, q, q, None, use_cache=False, **{name: None})[0].shape == (1, 5, 4, 8)


def test_a_causal_mask_left_out_for_attention_that_is_not_causal_is_refused():
    """transformers leaves it out for SDPA, which then sees tokens to come where eager attention does not."""
    model = build(LLAMA)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with entropi.record_entropy(model), pytest.raises(ValueError, match="one thing under SDPA and another under eager"):
        model(tokens(), use_cache=False)
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        mask = torch.ones(3, 14, dtype=torch.long)
        mask[0, :3] = 0  # with padding there is a mask
        model(tokens(), attention_mask=mask, use_cache=False)
    close(recorded.mean(), means(eager(model, input_ids=tokens(), attention_mask=mask).attentions, mask.bool()))


# --- Several recorders, threads, replicas -----------------------------------------------------------------------------


def test_two_recorders_over_one_model_and_over_two():
    first, second = build(LLAMA), build(JAMBA)
    ids = tokens()
    expected = means(eager(first, input_ids=ids).attentions)
    with torch.no_grad(), entropi.record_entropy(first) as outer:
        with entropi.record_entropy(first) as inner, entropi.record_entropy(second) as other:
            first(ids, use_cache=False)
            second(ids, use_cache=False)
        second(ids, use_cache=False)  # recorded no more
        first(ids[:1], use_cache=False)
    close(inner.mean(), expected)
    close(other.mean(), means(eager(second, input_ids=ids).attentions))
    close(outer.mean(), means([torch.cat([w, w[:1]]) for w in eager(first, input_ids=ids).attentions]))


def test_recorders_that_end_in_the_order_they_began():
    model = build(LLAMA, attn_implementation="eager")
    ids = tokens()
    first, second = entropi.record_entropy(model), entropi.record_entropy(model)
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        model(ids, use_cache=False)
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "eager"
    close(two.mean(), means(eager(model, input_ids=ids).attentions))
    with pytest.raises(RuntimeError, match="no attention was recorded"):
        one.mean()


def test_other_threads_are_recorded_and_other_models_are_not():
    """As with a streamer, for which a model generates in a thread of its own."""
    model, bystander = build(LLAMA), build(LLAMA)
    ids = tokens()
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(ids))
    text = model.generate(ids, **options)
    with entropi.record_entropy(model) as recorded:
        threads = [threading.Thread(target=each.generate, args=(ids,), kwargs=options) for each in (model, bystander)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    close(recorded.mean(), means(eager(model, input_ids=text[:, :-1]).attentions))


def test_replicas_for_data_parallelism_are_recorded():
    """Each is another object, in another thread; `nn.DataParallel` itself needs GPUs."""
    model = build(LLAMA)
    ids = tokens(4)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad(), entropi.record_entropy(torch.nn.DataParallel(model)) as recorded:
        replicas = [replica_of(model) for _ in range(2)]
        runs = [
            threading.Thread(target=torch.no_grad()(replica), kwargs=dict(input_ids=i, attention_mask=m))
            for replica, i, m in zip(replicas, ids.chunk(2), mask.chunk(2))
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
    close(recorded.mean(), means(eager(model, input_ids=ids, attention_mask=mask).attentions, mask.bool()))


def replica_of(model):
    """As `torch.nn.parallel.replicate` makes them, on one device."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in made.items():
        for name, child in module._modules.items():
            setattr(copied, name, None if child is None else made[child])
        for name, parameter in module._parameters.items():
            object.__setattr__(copied, name, None if parameter is None else parameter.detach())
    return made[model]


def test_a_copy_made_while_recording_is_recorded_until_the_end():
    model = build(LLAMA)
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        copied = copy.deepcopy(model)
        copied(tokens(), use_cache=False)
    expected = means(eager(model, input_ids=tokens()).attentions)
    with torch.no_grad():
        copied(tokens(seed=5), use_cache=False)
    close(recorded.mean(), expected)


def test_wrapped_models():
    model = build(LLAMA)
    expected = means(eager(model, input_ids=tokens()).attentions)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), entropi.record_entropy(compiled) as recorded:
        compiled(tokens(), use_cache=False)
    close(recorded.mean(), expected)
    assert list(recorded.attentions) == ["model.layers.*.self_attn"]
    with torch.no_grad(), entropi.record_entropy(model.model) as recorded:
        model(tokens(), use_cache=False)
    close(recorded.mean(), expected)


def test_a_compiled_static_decoder_is_recorded():
    model = build(LLAMA)
    ids = tokens(1)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, cache_implementation="static")
    text = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="eager")
    with entropi.record_entropy(model) as recorded:
        assert torch.equal(model.generate(ids, **options), text)
    close(recorded.mean(), means(eager(build(LLAMA), input_ids=text[:, :-1]).attentions))


# --- The name alone ---------------------------------------------------------------------------------------------------

LOAD = """
import torch
model = AutoModelForCausalLM.from_config(LlamaConfig(
    vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
), attn_implementation="entropi").eval()
ids = torch.arange(12)[None]
ours = model(ids).logits
model.set_attn_implementation("eager")
assert torch.allclose(ours, model(ids).logits, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["entropi first", "transformers first"])
def test_importing_the_package_makes_the_implementation_known(order):
    lines = ["import entropi", "from transformers import AutoModelForCausalLM, LlamaConfig"]
    if order == "transformers first":
        lines = [lines[1], "AutoModelForCausalLM", "import transformers.modeling_utils", lines[0]]
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", "\n".join(lines) + LOAD], check=True)


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = (
        "import sys, entropi; print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers'}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_modules_that_attend():
    """Those whose own code asks the interface, not what holds them; and those with an attention of their own."""
    attending, own = attention_modules(multimodal())
    assert {type(module).__name__ for module in attending} == {"CLIPAttention", "LlamaAttention"}
    assert not own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.SiglipVisionConfig(**WIDTH, num_hidden_layers=1, image_size=16, patch_size=8)
    attending, own = attention_modules(build(config, AutoModel))
    assert {type(module).__name__ for module in attending} == {"SiglipAttention"}
    assert list(own.values()) == ["head.attention"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_two_recordings_of_one_checkpointed_model_in_either_order():
    model = build(LLAMA).train()
    model.gradient_checkpointing_enable(dict(use_reentrant=True))
    ids = torch.randint(3, 50, (2, 9))
    found = []
    for wanting in ((False, True), (True, False)):
        model.zero_grad()
        with (
            entropi.record_entropy(model, gradients=wanting[0]) as first,
            entropi.record_entropy(model, gradients=wanting[1]) as second,
        ):
            model(ids, use_cache=False)
            (first if wanting[0] else second).mean().sum().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


def test_a_recorded_model_can_be_saved_and_its_copy_too(tmp_path):
    model = build(LLAMA)
    with entropi.record_entropy(model):
        copied = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
    torch.save(copied, tmp_path / "copy.pt")
    ids = torch.randint(3, 50, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        for name in ("model.pt", "copy.pt"):
            loaded = torch.load(tmp_path / name, weights_only=False)
            assert torch.equal(loaded(ids).logits, expected)


def test_layers_that_are_not_there_and_rows_that_are_not_text():
    model = build(LLAMA)
    with (
        pytest.raises(ValueError, match="layers takes several numbers"),
        entropi.record_entropy(model, 1),
    ):
        pass
    with torch.no_grad(), entropi.record_entropy(model) as recorded:
        ids = torch.randint(3, 50, (1, 4))
        model(ids, attention_mask=torch.zeros_like(ids), use_cache=False)
    with pytest.raises(ValueError, match="no row was recorded that is not padding"):
        recorded.mean()
