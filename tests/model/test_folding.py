"""Folded models against the models they came from, by an interpreter of the folded form that shares no code with it."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.functional import gelu

from entropi.errors import UserError
from entropi.model.architectures import ARCHITECTURES
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.folding import fold

SIZES = dict(vocab_size=43, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=20)
VARIANTS = {
    "final norm gone": dict(final_norm=False),
    "all biases": dict(bias="all"),
    "no biases": dict(bias="none"),
    "grouped queries": dict(num_key_value_heads=2, bias="all"),
    "rotary": dict(position_embedding="rotary", rotary_fraction=1 / 3, rotary_base=500.0),
    "parallel": dict(parallel_residual=True, bias="all"),
    "kernel": dict(softmax="power-3"),
    "polynomial": dict(softmax="polynomial-1"),
    "polynomial, grouped queries": dict(softmax="polynomial-2", num_key_value_heads=2),
    "log-length": dict(log_length_scaling=True),
    "log-length, polynomial": dict(log_length_scaling=True, softmax="polynomial-1"),
    "wide and untied": dict(intermediate_size=40, tie_word_embeddings=False),
    "heads of their own width": dict(head_width=10, num_key_value_heads=2, bias="attention"),
    "norms of queries and keys": dict(query_key_norm=True, num_key_value_heads=2, bias="qkv"),
    "norms of queries and keys, polynomial": dict(query_key_norm=True, softmax="polynomial-1"),
    "scaled embeddings": dict(embedding_scale=5.0),
    "rotary frequencies by layer": dict(
        position_embedding="rotary",
        rotary_frequencies=[[1.0, 0.3, 0.01], [0.7, 0.2, 0.0]],
        rotary_layers=[1, 0, 1],
        query_key_norm=True,
    ),
}


def trained(architecture, seed=0, **options):
    """A float64 model all of whose parameters are disturbed, as training would."""
    torch.manual_seed(seed)
    model = EntropiForCausalLM(EntropiConfig(architecture=architecture, **{**SIZES, **options})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def interpret(description, weights, ids):
    """Logits `(T, V)` of a folded model in NumPy, float64, written from the description of the format alone."""
    d = description
    heads, groups = d["heads"], d["key_value_heads"]
    width = d["head_width"]
    own, shared = heads * width, groups * width
    length = len(ids)

    def norm(x, kind):
        if kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        return x if kind == "none" else x / np.sqrt((x * x).mean(-1, keepdims=True) + d["norm_epsilon"])

    def split(x):
        return x.reshape(length, -1, width).transpose(1, 0, 2)

    def turn(x, layer):
        r = d["rotary_dimensions"]
        if not r:
            return x
        frequencies = d["rotary_base"] ** (-np.arange(0, r, 2) / r)
        if d["rotary_frequencies"]:
            frequencies = np.array(d["rotary_frequencies"][d["rotary_layers"][layer]])
        angle = np.arange(length)[:, None] * frequencies
        a, b, rest = x[..., : r // 2], x[..., r // 2 : r], x[..., r:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest], -1)

    def activation(x):
        match d["activation"]:
            case "relu":
                return np.maximum(x, 0)
            case "gelu":
                return gelu(torch.from_numpy(x), approximate="tanh").numpy()
            case "square":
                return x**2
            case "bilinear":
                m = d["intermediate_size"]
                return x[:, :m] * x[:, m:]
            case "swiglu":
                m = d["intermediate_size"]
                return x[:, :m] / (1 + np.exp(-x[:, :m])) * x[:, m:]
            case "geglu":
                m = d["intermediate_size"]
                return gelu(torch.from_numpy(x[:, :m]), approximate="tanh").numpy() * x[:, m:]

    def by_rms_of_the_first(plain, gained):
        return gained / np.sqrt((plain * plain).mean(-1, keepdims=True) + d["norm_epsilon"])

    def branch(x):
        return by_rms_of_the_first(*np.split(x, 2, axis=1)) if d["branch_norm"] else x

    x = weights["embedding"][ids]
    if d["position_embedding"] == "learned":
        x = x + weights["positions"][:length]
    for layer in range(d["layers"]):
        w = {name.split(".", 1)[1]: value for name, value in weights.items() if name.startswith(f"{layer}.")}
        n = norm(x, d["norm"])
        joint = n @ w["qkv"] + w["qkv_bias"]
        if d["query_key_norm"]:
            q, plain_q, k, v, plain_k = np.split(joint, np.cumsum([own, own, shared, shared]), axis=1)
            q = by_rms_of_the_first(split(plain_q), split(q))
            k = by_rms_of_the_first(split(plain_k), split(k))
        else:
            q, k, v = np.split(joint, [own, own + shared], axis=1)
            q, k = split(q), split(k)
        q, k, v = turn(q, layer), turn(k, layer), split(v)
        k, v = np.repeat(k, heads // groups, axis=0), np.repeat(v, heads // groups, axis=0)
        if d["temperature"]:
            q = q * w["inverse_temperature"][:, :length, None]
        if d["log_length"]:
            q = q * np.log(np.arange(1, length + 1))[:, None] / np.log(d["positions"])
        s = q @ k.transpose(0, 2, 1)
        future = np.triu(np.ones((length, length), bool), 1)
        weights_of, _, divisor = d["softmax"].partition("/")
        kind, _, iterations = weights_of.partition("-")
        n_steps = 2 ** int(iterations or 0)
        if kind == "polynomial":
            a = (s + w["offset"][:, :length, None]) ** n_steps
            a[:, future] = 0
        s[:, future] = -np.inf
        s = s - s.max(-1, keepdims=True)
        if kind == "exact":
            a = np.exp(s)
        elif kind == "power":
            a = np.where(np.isfinite(s), (1 + np.maximum(s, -0.9 * n_steps) / n_steps) ** n_steps, 0.0)
        if divisor:
            seen = np.arange(1, length + 1)[:, None] if divisor == "keys" else int(divisor)
            a = a / seen * max(1, d["positions"] ** 0.5 / 4)
        else:
            a = a / a.sum(-1, keepdims=True)
        attended = branch((a @ v).transpose(1, 0, 2).reshape(length, -1) @ w["output"] + w["output_bias"])
        if not d["parallel_residual"]:
            x = x + attended
            n = norm(x, d["norm"])
        new = x
        if layer in d["explicit_ffn"]:
            linear = n @ w["ffn"] + w["ffn_bias"]
            new = linear if d["norm"] == "none" else x + linear
        if d["activation"] != "identity":
            new = new + branch(activation(n @ w["up"] + w["up_bias"]) @ w["down"] + w["down_bias"])
        x = new + attended if d["parallel_residual"] else new
    if d["centre"]:
        x = x @ weights["centre"]
    return norm(x, d["final_norm"]) @ weights["head"] + weights["head_bias"]


def check(model, **options):
    folded = fold(model, **options)
    ids = torch.randint(0, SIZES["vocab_size"], (1, 18), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = model(ids).logits[0].numpy()
    ours = interpret(json.loads(json.dumps(folded.description)), folded.weights, ids[0].numpy())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())
    return folded


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_folds_exactly(architecture):
    folded = check(trained(architecture), worst_condition=1e5)
    assert folded.description["architecture"] == architecture
    if ARCHITECTURES[architecture].softmax_only:
        # Attention is all that is left: no matrix but its own, the embeddings and the head.
        assert folded.description["explicit_ffn"] == []
        assert {name.split(".")[-1] for name in folded.weights} <= {
            *("embedding", "positions", "qkv", "qkv_bias", "output", "output_bias", "inverse_temperature"),
            *("offset", "centre", "head", "head_bias"),
        }


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM+RMS+Bilinear", "SM+LeakyR", "SM(t)+ScFuFFN"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_folds_exactly(architecture, variant):
    check(trained(architecture, **VARIANTS[variant]))


@pytest.mark.parametrize("architecture", ["Pow+LN+G", "Pow(t)+RMS+LeakyR", "Pow(t)+ScFuFFN"])
@pytest.mark.parametrize(
    "options",
    [
        dict(bias="all", num_key_value_heads=2),
        dict(softmax="polynomial-2/keys", max_position_embeddings=100),  # the public factor is not 1
        dict(softmax="polynomial-1/50", max_position_embeddings=100),
        dict(temperature_granularity="head", position_embedding="rotary", bias="qkv"),
        dict(log_length_scaling=True, query_key_norm=True),
        dict(parallel_residual=True, bias="all", final_norm=True),
    ],
    ids=str,
)
def test_powers_over_a_public_number_fold_exactly(architecture, options):
    """The bias of values stays where it is: rows of weights do not sum to 1."""
    folded = check(trained(architecture, **options))
    assert folded.description["temperature"] == ("(t)" in architecture and "temperature_granularity" not in options)


@pytest.mark.parametrize("architecture", ["SM+RMS+GeGLU", "SM+RMS+G", "SM(t)+RMS+Square"])
@pytest.mark.parametrize("parallel", [False, True])
def test_norms_of_branches_fold_exactly(architecture, parallel):
    check(trained(architecture, branch_norm=True, parallel_residual=parallel, bias="all", head_width=8))


@pytest.mark.parametrize("architecture", ["SM+LeakyR", "SM+ScFFN", "SM+LN", "SM(t)+RMS+LeakyR"])
@pytest.mark.parametrize("parallel", [False, True])
def test_explicit_matrices_are_exact_too(architecture, parallel):
    model = trained(architecture, num_hidden_layers=5, parallel_residual=parallel, bias="all", leaky_slope=0.9)
    limit = 3.0
    folded = check(model, worst_condition=limit)
    assert folded.description["explicit_ffn"]
    assert max(folded.conditions) <= limit


@pytest.mark.parametrize("learned", ["fixed", "layer", "global"])
def test_leaky_slopes(learned):
    model = trained("SM+LeakyR", leaky_slope=0.2, leaky_slope_learned=learned)
    folded = check(model)
    assert folded.description["activation"] == "relu"


@pytest.mark.parametrize("granularity", ["position", "head"])
@pytest.mark.parametrize("parametrization", ["literal", "exp"])
def test_temperatures(granularity, parametrization):
    options = dict(temperature_granularity=granularity, temperature_parametrization=parametrization)
    folded = check(trained("SM(t)+ScFuFFN", **options))
    assert folded.description["temperature"] == (granularity == "position")


@pytest.mark.parametrize("kernel", [{}, {"softmax": "polynomial-1"}], ids=["softmax", "polynomial"])
def test_temperatures_that_training_took_below_their_bound_act_as_the_bound(kernel):
    model = trained("SM(t)+ScFuFFN", **kernel)
    with torch.no_grad():
        for block in model.model.blocks:
            block.attention.temperature.parameter[:, ::2] = torch.tensor([[0.0], [-0.5], [-7.0], [0.5]])
    check(model)


@pytest.mark.parametrize("granularity", ["position", "head"])
def test_scaling_by_length_is_public_or_part_of_the_temperatures(granularity):
    folded = check(trained("SM(t)+ScFuFFN", temperature_granularity=granularity, log_length_scaling=True))
    assert folded.description["log_length"] == (granularity == "head")


def test_gains_of_spectral_norms_vanish():
    check(trained("SM(t)+SNorm(QKVO+FFN)+ScFuFFN", spectral_gain=True))


@pytest.mark.parametrize("granularity", ["position", "head"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_temperatures_of_the_polynomial_become_offsets_and_weights_have_one_size(granularity, size):
    """Whatever the logits' size, which differs by head as heads' matrices do."""
    model = trained("SM(t)+ScFuFFN", softmax="polynomial-1", temperature_granularity=granularity)
    with torch.no_grad():
        for block in model.model.blocks:
            block.attention.query.weight *= size
            block.attention.query.weight[:6] *= 7
    folded = check(model)
    assert not model.training
    assert not folded.description["temperature"]
    assert not any(name.endswith("inverse_temperature") for name in folded.weights)
    tokens = torch.randint(0, SIZES["vocab_size"], (20,), generator=torch.Generator().manual_seed(1)).numpy()
    w = folded.weights
    state = w["embedding"][tokens] + w["positions"]
    query, key, _ = np.split(state @ w["0.qkv"] + w["0.qkv_bias"], 3, axis=1)
    for head in range(4):
        columns = slice(6 * head, 6 * head + 6)
        weights = (query[:, columns] @ key[:, columns].T + w["0.offset"][head][:, None]) ** 2
        means = np.tril(weights).sum(axis=1)[1:] / np.arange(2, 21)
        assert 0.3 < np.exp(np.log(means).mean()) / 16 < 3


def test_balancing_takes_the_root_of_the_condition_number():
    """The basis that one product of all matrices ends in, against the balanced ones."""
    model = trained("SM+ScFuFFN", num_hidden_layers=6)
    product = np.eye(24)
    for block in model.model.blocks:
        ffn = block.feed_forward
        alpha, beta, fused = (x.detach().numpy() for x in (ffn.alpha, ffn.beta, ffn.fused.weight.T))
        product = product @ (beta * np.eye(24) + fused / alpha)
    folded = check(model, worst_condition=1e4)
    assert folded.description["explicit_ffn"] == []
    assert folded.conditions[0] == pytest.approx(np.linalg.cond(product) ** 0.5, rel=1e-6)
    assert folded.conditions[-1] == pytest.approx(folded.conditions[0], rel=1e-6)


def test_layer_norm_leaves_root_mean_square_without_gain():
    folded = check(trained("SM+LN+G"))
    assert folded.description["norm"] == folded.description["final_norm"] == "rms"
    assert not folded.description["centre"]
    np.testing.assert_allclose(folded.weights["0.output"].mean(axis=1), 0, atol=1e-12)


def test_normalised_weights_are_folded_as_they_are_in_double_precision():
    """A float32 model: the quotient of a spectral norm is taken in float64, not rounded first."""
    model = trained("SM+SNorm(QKVO+FFN)").float()
    wide = EntropiForCausalLM(model.config).double()
    wide.load_state_dict(model.state_dict())
    np.testing.assert_allclose(fold(model).weights["1.qkv"], fold(wide.eval()).weights["1.qkv"], rtol=1e-12, atol=1e-14)


def test_saved_form_needs_no_torch(tmp_path):
    folded = fold(trained("SM(t)+ScFuFFN"))
    folded.save(tmp_path)
    description = json.loads((tmp_path / "folded.json").read_text())
    weights = load_file(tmp_path / "folded.safetensors")
    assert description == folded.description
    assert weights.keys() == folded.weights.keys()
    assert all(weight.dtype == np.float32 for weight in weights.values())


def test_broken_weights_are_refused():
    model = trained("SM+ScFuFFN")
    with torch.no_grad():
        model.model.blocks[1].attention.key.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"not finite, first in model\.blocks\.1\.attention\.key"):
        fold(model)


def test_a_singular_feed_forward_network_stays_explicit():
    model = trained("SM+ScFuFFN")
    with torch.no_grad():
        ffn = model.model.blocks[1].feed_forward
        ffn.beta.fill_(0.0)
        ffn.fused.weight[:, 0] = 0.0
    assert check(model).description["explicit_ffn"] == [1]
