"""The model family against GPT-2, against itself with a cache, and against what its names promise."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from entropi.errors import UserError
from entropi.model.architectures import ARCHITECTURES, split_training_name
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM

SMALL = dict(vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=40)


def make_model(architecture="SM+LN+G", seed=0, spread=True, **options):
    """A small model; with `spread`, every parameter is disturbed as training would, so that none is at its start."""
    torch.manual_seed(seed)
    model = EntropiForCausalLM(EntropiConfig(architecture=architecture, **{**SMALL, **options}))
    if spread:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith(("embedding.weight", "lm_head.weight")):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(batch=2, length=17, seed=1):
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def test_gpt2_weights_give_gpt2_logits():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=48, n_layer=4, n_head=4, n_positions=64)
    gpt2 = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in gpt2.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and gains off their initial 0 and 1
    ours = EntropiForCausalLM.from_gpt2(gpt2)
    ids = torch.randint(0, 97, (3, 64))
    with torch.no_grad():
        difference = (ours(ids).logits - gpt2(ids).logits).abs().max()
    assert difference < 1e-4
    assert ours.lm_head.weight.data_ptr() == ours.model.token_embedding.weight.data_ptr()


def test_gpt2_entropies_are_those_of_its_attention_weights():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64, attn_implementation="eager")
    gpt2 = GPT2LMHeadModel(config).eval()
    ours = EntropiForCausalLM.from_gpt2(gpt2)
    ids = torch.randint(0, 97, (2, 33))
    with torch.no_grad():
        weights = gpt2(ids, output_attentions=True).attentions
        entropies = ours(ids).entropies
    for theirs, got in zip(weights, entropies):
        torch.testing.assert_close(got, torch.special.entr(theirs).sum(-1), atol=2e-6, rtol=1e-5)


def test_gpt2_options_we_lack_are_refused():
    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="scales"):
        EntropiForCausalLM.from_gpt2(GPT2LMHeadModel(config))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_and_returns_entropies(architecture):
    model = make_model(architecture).train()
    ids = tokens()
    out = model(ids, labels=ids)
    assert [tuple(e.shape) for e in out.entropies] == [(2, 4, 17)] * 3
    assert out.loss.requires_grad
    out.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM(t)+ScFuFFN"])
def test_the_future_is_invisible(architecture):
    model = make_model(architecture)
    ids = tokens()
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % SMALL["vocab_size"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :9], model(changed).logits[:, :9])


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM+LN+R", "SM+ScFuFFN", "SM(t)+ScFuFFN"])
def test_generation_with_cache_equals_without_and_ignores_left_padding(architecture):
    model = make_model(architecture)
    prompt = tokens(1, 6)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(prompt)
    plain = model.generate(prompt, attention_mask=mask, use_cache=False, **options)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(plain, cached)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    padded_mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), mask], dim=1)
    assert torch.equal(model.generate(padded, attention_mask=padded_mask, **options)[:, 3:], plain)


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM(t)+ScFuFFN"])
def test_saved_and_loaded_models_agree(architecture, tmp_path):
    regularizer = {"weight": 1e-3, "granularity": "head"}
    model = make_model(architecture, entropy_regularizer=regularizer)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.entropy_regularizer.threshold, model.entropy_regularizer.threshold)
    assert loaded.config.parts == model.config.parts


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM(t)+ScFuFFN"])
def test_gradient_checkpointing_changes_nothing(architecture):
    model = make_model(architecture, entropy_regularizer={"weight": 1e-2}).train()
    ids = tokens()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=lambda m, name=name: f"{name}: {m}")


def test_regularizer_reaches_thresholds_and_temperatures_and_is_silent_in_evaluation():
    model = make_model("SM(t)+ScFuFFN", entropy_regularizer={"weight": 1.0, "margin": 0.0}).train()
    ids = tokens()
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.loss, out.cross_entropy + out.entropy_penalty)
    gradients = torch.autograd.grad(
        out.entropy_penalty,
        [model.entropy_regularizer.threshold, *(b.attention.temperature.parameter for b in model.model.blocks)],
    )
    assert (gradients[0] != 0).all()
    for gradient in gradients[1:]:
        assert (gradient[:, 1:17] != 0).all()
        # Row 0 sees one key: its entropy is 0 whatever the temperature, up to the rounding of its one logit.
        assert gradient[:, 0].abs().max() < 1e-6 * gradient.abs().max()
        assert (gradient[:, 17:] == 0).all()
    silent = model.eval()(ids, labels=ids)
    assert silent.entropy_penalty is None
    assert torch.equal(silent.loss, silent.cross_entropy)


def test_losses_of_micro_batches_add_up():
    """Two micro-batches with the update's token count give the loss of the whole batch, penalty included."""
    options = dict(entropy_regularizer={"weight": 0.1, "reduction": "mean"})
    model = make_model("SM(t)+ScFuFFN", **options).train()
    ids = tokens(batch=4)
    items = torch.tensor(4 * 16)
    whole = model(ids, labels=ids, num_items_in_batch=items)
    parts = [model(half, labels=half, num_items_in_batch=items) for half in ids.chunk(2)]
    for name in ("cross_entropy", "entropy_penalty", "loss"):
        torch.testing.assert_close(sum(getattr(p, name) for p in parts), getattr(whole, name))
    torch.testing.assert_close(whole.loss, model(ids, labels=ids).loss)


def test_too_many_positions_are_refused():
    with pytest.raises(ValueError, match="41 tokens do not fit the 40 positions"):
        make_model()(tokens(length=41))


def test_all_problems_of_a_configuration_are_named_at_once():
    with pytest.raises(UserError) as raised:
        EntropiConfig(architecture="SM+LN+Q", hidden_size=10, num_attention_heads=3, bias="some")
    message = str(raised.value)
    assert "SM(t)+ScFuFFN" in message
    assert "multiple of num_attention_heads" in message
    assert "bias" in message


def test_training_names():
    assert split_training_name("EReg(SM(t) + ScFuFFN)") == ("SM(t)+ScFuFFN", True)
    assert split_training_name("SM+LN+G") == ("SM+LN+G", False)
    with pytest.raises(UserError, match="legal are"):
        split_training_name("EReg(SM(t)")
