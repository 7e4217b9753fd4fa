"""The model family against GPT-2, against itself with a cache, and against what its names promise."""

import math
import re

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from entropi.errors import UserError
from entropi.model.architectures import (
    ARCHITECTURES,
    WEIGHT_NORM_TARGETS,
    parse_architecture,
    split_training_name,
)
from entropi.model.configuration import SMALLEST_TEMPERATURE, EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.linear import iterate_spectral_norms

SMALL = dict(vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=40)
# Architectures and options that together go through every line of the model.
VARIANTS = {
    "LN": dict(architecture="SM+LN+G"),
    "fused": dict(architecture="SM(t)+ScFuFFN"),
    "kernel": dict(architecture="SM(t)+ScFuFFN", softmax="power-3"),
    "powers": dict(architecture="Pow(t)+ScFuFFN", num_key_value_heads=2),
    "rotary, grouped": dict(architecture="SM+RMS+Bilinear", position_embedding="rotary", num_key_value_heads=2),
    "parallel": dict(
        architecture="SM+LN+R", parallel_residual=True, position_embedding="rotary", rotary_fraction=1 / 3
    ),
    "leaky by layer": dict(architecture="SM+LeakyR", leaky_slope_learned="layer"),
    "leaky in common": dict(architecture="SM+LN+LeakyR", leaky_slope_learned="global"),
    "weight norm": dict(architecture="SM+WNorm(QKVO+FFN)"),
    "spectral norm": dict(architecture="SM+SNorm(QKVO+FFN)+ScFFN"),
    "gain of spectral norms": dict(architecture="SM+SNorm(QKVO+FFN)+R", spectral_gain=True, bias="all"),
    "log-length": dict(architecture="SM(t)+ScFuFFN", log_length_scaling=True, num_key_value_heads=2),
    "norms and widths of heads": dict(
        architecture="SM+RMS+SwiGLU",
        position_embedding="rotary",
        num_key_value_heads=2,
        query_key_norm=True,
        head_width=10,
        bias="qkv",
    ),
    "norms of branches": dict(
        architecture="SM+RMS+GeGLU",
        position_embedding="rotary",
        rotary_frequencies=[[1.0, 0.1, 0.01], [0.3, 0.2, 0.0]],
        rotary_layers=[0, 1, 0],
        branch_norm=True,
        embedding_scale=4.9,
    ),
    "temperature by head": dict(
        architecture="SM(t)+ScFuFFN", temperature_granularity="head", temperature_parametrization="exp"
    ),
}


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


variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def tokens(batch=2, length=17, seed=1):
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def test_gpt2_entropies_are_those_of_its_attention_weights():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=64, attn_implementation="eager")
    gpt2 = GPT2LMHeadModel(config).eval()
    ours = EntropiForCausalLM.from_transformers(gpt2)
    ids = torch.randint(0, 97, (2, 33))
    with torch.no_grad():
        weights = gpt2(ids, output_attentions=True).attentions
        entropies = ours(ids).entropies
    for theirs, got in zip(weights, entropies):
        torch.testing.assert_close(got, torch.special.entr(theirs).sum(-1), atol=2e-6, rtol=1e-5)


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


@variants
def test_the_future_is_invisible(options):
    model = make_model(**options)
    ids = tokens()
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % SMALL["vocab_size"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :9], model(changed).logits[:, :9])


@variants
def test_generation_with_cache_equals_without_and_ignores_left_padding(options):
    model = make_model(**options)
    prompt = tokens(1, 6)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(prompt)
    plain = model.generate(prompt, attention_mask=mask, use_cache=False, **options)
    cached = model.generate(prompt, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(plain, cached)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    padded_mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), mask], dim=1)
    assert torch.equal(model.generate(padded, attention_mask=padded_mask, **options)[:, 3:], plain)


@variants
def test_saved_and_loaded_models_agree(options, tmp_path):
    regularizer = {"weight": 1e-3, "granularity": "head"}
    model = make_model(**options, entropy_regularizer=regularizer)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens()
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(ours, theirs), name
    # Equal up to rounding: a product with a spectral norm's vectors depends on where in memory they lie.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.entropy_regularizer.threshold, model.entropy_regularizer.threshold)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


@variants
def test_gradient_checkpointing_changes_nothing(options):
    model = make_model(**options, entropy_regularizer={"weight": 1e-2}).train()
    ids = tokens()
    iterate_spectral_norms(model, 200)  # until they have settled: every step then sees the same weights

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@variants
def test_compiled_in_one_graph(options):
    """`torch.compile` finds nothing it would have to leave to Python, and changes nothing."""
    torch._dynamo.reset()
    model = make_model(**options, entropy_regularizer={"weight": 1e-2})
    ids = tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, got = (f(ids, labels=ids, use_cache=False) for f in (model, compiled))
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(torch.stack(got.entropies), torch.stack(expected.entropies))
    model.train()
    model(ids)
    reference = make_model(**options, entropy_regularizer={"weight": 1e-2}).train()
    reference.load_state_dict(model.state_dict())
    for f in (compiled, reference):
        f(ids, labels=ids).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_grouped_queries_are_shared_keys_and_values():
    grouped = make_model("SM+LN+G", num_key_value_heads=2, bias="all")
    full = make_model("SM+LN+G", bias="all")
    weights = grouped.state_dict()
    for name, value in weights.items():
        if ".key." in name or ".value." in name:
            heads = value.view(2, 6, *value.shape[1:]).repeat_interleave(2, dim=0)
            weights[name] = heads.reshape(24, *value.shape[1:])
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens()).logits, full(tokens()).logits)


def test_rotary_positions_are_relative():
    """The same tokens further on have the same logits; learned positions would change them."""
    model = make_model("SM+ScFuFFN", position_embedding="rotary")
    ids = tokens(1)
    here, there = (model(ids, position_ids=torch.arange(17)[None] + shift).logits for shift in (0, 20))
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    assert not any("position" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("architecture", ["SM+LN+R", "SM(t)+ScFFN"])
def test_rotary_models_train_under_autocast(architecture):
    model = make_model(architecture, position_embedding="rotary").train()
    expected = model(tokens(), labels=tokens()).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_a_kernel_of_many_iterations_is_the_exact_softmax():
    exact, close, far = (make_model("SM(t)+ScFuFFN", softmax=form) for form in ("exact", "power-8", "power-2"))
    expected = exact(tokens()).logits
    error, coarse = ((model(tokens()).logits - expected).abs().max() for model in (close, far))
    assert error < 0.03 * coarse  # it falls as 2^-t


def test_the_kernel_can_be_changed_after_training():
    model, other = make_model("SM(t)+ScFuFFN"), make_model("SM(t)+ScFuFFN", softmax="power-3")
    model.set_softmax("power-3")
    torch.testing.assert_close(model(tokens()).logits, other(tokens()).logits)
    assert model.config.softmax == "power-3"
    with pytest.raises(
        UserError,
        match="softmax must be exact, power-1 to power-8 or polynomial-1 to polynomial-8 with or without /keys or a",
    ):
        model.set_softmax("power-9")
    assert model.config.softmax == "power-3"
    with pytest.raises(UserError, match="polynomial-1 stands for no other softmax"):
        model.set_softmax("polynomial-1")
    squares = make_model("SM(t)+ScFuFFN", softmax="polynomial-1")
    squares.set_softmax("polynomial-1")
    for other_form in ("exact", "polynomial-2"):
        with pytest.raises(UserError, match=r"polynomial-\d stands for no other softmax"):
            squares.set_softmax(other_form)
    assert (model.config.softmax, squares.config.softmax) == ("power-3", "polynomial-1")


def test_powers_over_the_number_of_keys_go_with_the_name():
    plain, normed = EntropiConfig(architecture="Pow(t)+ScFuFFN"), EntropiConfig(architecture="Pow+RMS+G")
    assert (plain.softmax, plain.final_norm) == ("polynomial-1/keys", False)
    assert (normed.softmax, normed.final_norm) == ("polynomial-1/keys", True)
    asked = EntropiConfig(architecture="Pow+ScFuFFN", softmax="polynomial-3/keys", final_norm=True)
    again = EntropiConfig.from_dict(asked.to_diff_dict())
    assert (again.softmax, again.final_norm) == ("polynomial-3/keys", True)
    for softmax in ("polynomial-1", "power-2"):
        legal = "softmax must be polynomial-1/keys to polynomial-8/keys, or with a number such as 128 in the place of"
        with pytest.raises(UserError, match=f"{legal} keys, got '{softmax}'"):
            EntropiConfig(architecture="Pow+ScFuFFN", softmax=softmax)
    with pytest.raises(UserError, match="softmax polynomial-1/keys is for architectures that begin with Pow"):
        EntropiConfig(architecture="SM+ScFuFFN", softmax="polynomial-1/keys")
    with pytest.raises(UserError, match="polynomial-1 stands for no other softmax"):
        make_model("Pow+ScFuFFN").set_softmax("polynomial-1")


@pytest.mark.parametrize(("slope", "same_as"), [(0.0, "SM+R"), (1.0, "SM")])
def test_leaky_slopes_from_relu_to_the_identity(slope, same_as):
    leaky = make_model("SM+LeakyR", leaky_slope=slope)
    torch.testing.assert_close(leaky(tokens()).logits, make_model(same_as)(tokens()).logits)


@pytest.mark.parametrize(("learned", "number"), [("fixed", 0), ("layer", 3), ("global", 1)])
def test_leaky_slopes_are_learned_where_asked(learned, number):
    model = make_model("SM+LeakyR", leaky_slope_learned=learned, leaky_slope=0.25, spread=False).train()
    slopes = [p for name, p in model.named_parameters() if name.endswith("leaky_slope")]
    assert [p.item() for p in slopes] == [0.25] * number
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad != 0 for p in slopes)


@pytest.mark.parametrize("kind", ["W", "S"])
@pytest.mark.parametrize("target", WEIGHT_NORM_TARGETS)
def test_weight_norms_are_on_their_targets_and_normalise(kind, target):
    model = make_model(f"SM+{kind}Norm({target})", spread=False)
    normalised = set()
    for name, module in model.model.blocks[0].named_modules():
        if parametrize.is_parametrized(module):
            normalised.add(name.split(".")[-1])
            original = module.parametrizations.weight
            if kind == "W":
                torch.testing.assert_close(module.weight.norm(dim=1, keepdim=True), original.original0)
            else:
                largest = torch.linalg.matrix_norm(original.original, 2)
                torch.testing.assert_close(module.weight, original.original / largest, rtol=0.1, atol=0)
    letters = {"Q": {"query"}, "K": {"key"}, "V": {"value"}, "O": {"output"}}
    expected = {"up", "down"} if "FFN" in target else set()
    for letter in target.replace("FFN", ""):
        expected |= letters.get(letter, set())
    assert normalised == expected


def test_spectral_norms_follow_their_weights_and_reach_one():
    """One power iteration a training step; none in evaluation, nor where checkpointing reads a weight again."""
    model = make_model("SM+SNorm(FFN)")
    up = model.model.blocks[0].feed_forward.up
    before = up.weight.clone()
    model(tokens())
    assert torch.equal(up.weight, before)
    model.train()
    for _ in range(60):
        model(tokens(1, 2))
    assert torch.linalg.matrix_norm(up.weight, 2).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("parametrization", ["literal", "exp"])
@pytest.mark.parametrize("granularity", ["position", "head"])
def test_temperatures_start_where_asked_and_are_trained(granularity, parametrization):
    options = dict(temperature_granularity=granularity, temperature_parametrization=parametrization)
    model = make_model("SM(t)+ScFuFFN", temperature_init=2.0, spread=False, **options)
    temperature = model.model.blocks[0].attention.temperature
    torch.testing.assert_close(temperature.values(), torch.full((4, 40 if granularity == "position" else 1), 2.0))
    with torch.no_grad():
        temperature.parameter.fill_(-1.0)
    assert temperature.values().min() > 0


@pytest.mark.parametrize("parametrization", ["literal", "exp"])
@pytest.mark.parametrize("asked", [0.0, -3.0, -math.inf])
def test_temperatures_have_a_lower_bound(asked, parametrization):
    """A model whose temperatures crossed it is the model at the bound, its gradients finite."""
    model = make_model("SM(t)+ScFuFFN", temperature_parametrization=parametrization)
    parameters = [block.attention.temperature.parameter for block in model.model.blocks]
    bound = SMALLEST_TEMPERATURE if parametrization == "literal" else math.log(SMALLEST_TEMPERATURE)
    found = []
    for value in (asked if parametrization == "literal" else asked * 100 - 7, bound):
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(value)
        found.append(model(tokens()).logits)
        gradients = torch.autograd.grad(found[-1].sum(), parameters)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert torch.equal(*found)


def test_temperatures_within_their_range_are_the_parameters_themselves():
    temperature = make_model("SM(t)+ScFuFFN").model.blocks[0].attention.temperature
    with torch.no_grad():
        temperature.parameter.copy_(torch.logspace(math.log10(1.1 * SMALLEST_TEMPERATURE), 2, 160).view(4, 40))
    assert torch.equal(temperature.values(), temperature.parameter)
    incoming = torch.randn(4, 40)
    temperature.values().backward(incoming)
    assert torch.equal(temperature.parameter.grad, incoming)


def test_a_step_across_the_bound_is_taken_back_and_none_leads_further():
    temperature = make_model("SM(t)+ScFuFFN", temperature_init=0.01).model.blocks[0].attention.temperature
    temperature.reset()
    optimizer = torch.optim.SGD(temperature.parameters(), lr=1.0)

    def step(gradient):
        optimizer.zero_grad()
        temperature.values().backward(torch.full((4, 40), gradient))
        optimizer.step()
        return temperature.parameter[0, 0].item(), temperature.values()[0, 0].item()

    assert step(0.05) == (pytest.approx(-0.04), pytest.approx(SMALLEST_TEMPERATURE))
    assert step(0.05) == (pytest.approx(-0.04), pytest.approx(SMALLEST_TEMPERATURE))
    assert step(-0.08) == (pytest.approx(0.04), pytest.approx(0.04))


def test_the_number_of_parameters_counts_normalised_weights_once():
    plain, weight, spectral = (make_model(f"SM{norm}") for norm in ("", "+WNorm(QKVO+FFN)", "+SNorm(QKVO+FFN)"))
    assert plain.inference_parameters() == weight.inference_parameters() == spectral.inference_parameters()


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
    with pytest.raises(UserError, match=r"temperature_init must be at least 0.001, got 0.0001"):
        EntropiConfig(temperature_init=1e-4)
    with pytest.raises(UserError) as raised:
        EntropiConfig(
            architecture="SM+LN+Q",
            hidden_size=10,
            num_attention_heads=3,
            num_key_value_heads=2,
            bias="some",
            softmax="power-40",
            leaky_slope=2.0,
            position_embedding="rotary",
            rotary_fraction=0.4,
            temperature_init=0.0,
        )
    message = str(raised.value)
    for part in (
        "'Q' is unknown; legal are SM, SM(t), Pow or Pow(t); then at most one of +LN",
        "hidden_size 10 is not a multiple of num_attention_heads 3",
        "num_attention_heads 3 is not a multiple of num_key_value_heads 2",
        "bias must be 'qk', 'qkv', 'attention', 'ffn', 'all' or 'none', got 'some'",
        "softmax must be exact, power-1 to power-8",
        "leaky_slope must be between 0",
        "rotary_fraction 0.4 of 3 columns a head is 1.2",
        "temperature_init must be positive",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("SM+LN+RMS", "+RMS is a second norm"),
        ("SM+WNorm(FFN)+LN", "+LN is a second norm"),
        ("SM+G+R", "+R is a second feed-forward network"),
        ("SM+G+LN", "+LN comes after the feed-forward network"),
        ("SM+LN+ScFuFFN", "+ScFuFFN is for models without a norm"),
        ("SM+SNorm(V)", "'V' is no target of SNorm"),
        ("LN+SM", "it begins with 'LN'"),
        ("SM(t)+", "'' is unknown"),
        ("", "it begins with ''"),
        ("SM+SNorm(V)+G+R", "'V' is no target of SNorm, +R is a second"),
    ],
)
def test_illegal_architectures(name, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        parse_architecture(name)


def test_training_names():
    assert split_training_name("EReg(SM(t) + ScFuFFN)") == ("SM(t)+ScFuFFN", True)
    assert split_training_name("SM+LN+G") == ("SM+LN+G", False)
    with pytest.raises(UserError, match="legal are"):
        split_training_name("EReg(SM(t)")


def test_log_length_scaling_sharpens_a_row_with_the_keys_it_sees():
    """Logits of row n times g log(n) / log(P): against attention written out."""
    model = make_model("SM", log_length_scaling=True, num_hidden_layers=1)
    attention = model.model.blocks[0].attention
    assert attention.length_scale is not None
    seen = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        entropies = model(tokens(1, 40)).entropies[0]
    hook.remove()
    q, k = (part(seen[0]).view(1, 40, 4, 6).transpose(1, 2).double() for part in (attention.query, attention.key))
    factor = attention.length_scale.gain.double()[:, None] * torch.arange(1, 41).double().log() / math.log(40)
    logits = q @ k.transpose(-1, -2) / 6**0.5 * factor[..., None]
    weights = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(entropies.double(), torch.special.entr(weights).sum(-1), atol=1e-5, rtol=0)


def test_embedding_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = make_model("SM+LN+G", embedding_dropout=0.5)
    dropped = []
    model.model.blocks[0].register_forward_pre_hook(lambda module, args: dropped.append((args[0] == 0).float().mean()))
    model(tokens())
    model.train()(tokens())
    assert dropped[0] == 0
    assert 0.4 < dropped[1] < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(embedding_dropout=1.0), "embedding_dropout must be in"),
        (dict(initializer_range=0.0), "initializer_range must be positive"),
        (dict(spectral_gain=True), r"spectral_gain is for architectures with \+SNorm"),
    ],
)
def test_impossible_options_of_training_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        EntropiConfig(**options)
