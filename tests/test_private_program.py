"""The private program in plaintext: folding is exact, stages compute the model, secure functions hold their claims."""

import json

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
import msgspec  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from entropi.errors import UserError  # noqa: E402
from entropi.model.configuration import ARCHITECTURES, EntropiConfig  # noqa: E402
from entropi.model.decoder import EntropiForCausalLM  # noqa: E402
from entropi.model.folding import fold  # noqa: E402
from entropi.private.functions import exp_kernel, segment_max  # noqa: E402
from entropi.private.messages import Settings  # noqa: E402
from entropi.private.program import Description, run_plain  # noqa: E402
from entropi.private.ranges import check_ranges, largest_values  # noqa: E402

SIZES = dict(vocab_size=53, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=24)
SOFTMAX_ONLY = [name for name, parts in ARCHITECTURES.items() if parts.softmax_only]


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.experimental.enable_x64():
        yield


def trained_like(architecture, bias="qk", final_norm=True, seed=0):
    """Random weights everywhere, biases, scales and temperatures included, in double precision."""
    torch.manual_seed(seed)
    config = EntropiConfig(architecture=architecture, bias=bias, final_norm=final_norm, **SIZES)
    model = EntropiForCausalLM(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            if name.endswith(("alpha", "beta", "temperature")):
                parameter.add_(0.5 * torch.rand_like(parameter))
    return model


def describe(folded):
    return msgspec.convert(folded.description, Description)


@pytest.mark.parametrize("architecture", SOFTMAX_ONLY)
@pytest.mark.parametrize(("bias", "final_norm"), [("qk", True), ("all", True), ("none", False)])
def test_folded_logits_are_the_models(architecture, bias, final_norm):
    model = trained_like(architecture, bias, final_norm)
    folded = fold(model, worst_condition=1e9)
    assert folded.description["explicit_ffn"] == []
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    generated, logits = run_plain(describe(folded), folded.weights, prompt, 4, 0, exact_exp=True)
    with torch.no_grad():
        for step, got in enumerate(logits):
            expected = model(torch.tensor([prompt + generated[:step]])).logits[0, -1].numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_ill_conditioned_feed_forwards_stay_explicit_and_the_logits_stay_exact():
    model = trained_like("SM+ScFuFFN")
    with torch.no_grad():
        fused = model.model.blocks[1].feed_forward
        fused.fused.weight.copy_(torch.diag(torch.logspace(0, 4, 24)))
    folded = fold(model)
    assert folded.description["explicit_ffn"] == [1]
    assert max(folded.conditions) <= 100
    _, logits = run_plain(describe(folded), folded.weights, [1, 2, 3], 1, 0, exact_exp=True)
    with torch.no_grad():
        expected = model(torch.tensor([[1, 2, 3]])).logits[0, -1].numpy()
    np.testing.assert_allclose(logits[0], expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_constant_temperatures_fold_away():
    model = trained_like("SM(t)+ScFuFFN")
    with torch.no_grad():
        for block in model.model.blocks:
            block.attention.temperature.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0])[:, None].expand(4, 24))
    folded = fold(model)
    assert not folded.description["temperature"]
    _, logits = run_plain(describe(folded), folded.weights, [5, 6, 7], 1, 0, exact_exp=True)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits[0, -1].numpy()
    np.testing.assert_allclose(logits[0], expected, rtol=1e-9, atol=1e-12)


def test_saved_form_needs_no_torch_and_has_the_described_shapes(tmp_path):
    folded = fold(trained_like("SM(t)+ScFuFFN"))
    folded.save(tmp_path)
    description = msgspec.json.decode((tmp_path / "folded.json").read_bytes(), type=Description)
    arrays = load_file(tmp_path / "folded.safetensors")
    assert {name: w.shape for name, w in arrays.items()} == description.weight_shapes()


@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM+R"])
def test_models_with_other_nonlinearities_are_refused(architecture):
    with pytest.raises(UserError, match="softmax-only"):
        fold(EntropiForCausalLM(EntropiConfig(architecture=architecture, **SIZES)))


def test_weights_that_are_not_finite_are_refused():
    model = trained_like("SM+ScFuFFN")
    with torch.no_grad():
        model.model.blocks[2].attention.key.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"blocks\.2\.attention\.key"):
        fold(model)


@pytest.mark.parametrize(
    "change",
    [
        {"heads": 5}, {"hidden_size": 0}, {"layers": 10**6}, {"vocab_size": 2**30}, {"explicit_ffn": [7]},
        {"norm_epsilon": 0.0}, {"format": 2}, {"extra": 1}, {"layers": "3"}, {"architecture": "x" * 1000},
    ],
)  # fmt: skip
def test_descriptions_are_validated(change):
    good = fold(trained_like("SM+ScFuFFN")).description
    assert msgspec.json.decode(json.dumps(good), type=Description).layers == 3
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(json.dumps({**good, **change}), type=Description)


@pytest.mark.parametrize("lengths", [[1], [1, 2, 3, 4, 5], [7, 1, 16, 3], list(range(1, 34)), [5, 5, 5]])
def test_segment_max(lengths):
    values = np.random.default_rng(0).normal(size=(3, sum(lengths)))
    ends = np.cumsum(lengths)
    expected = np.stack([values[:, e - n : e].max(axis=1) for e, n in zip(ends, lengths)], axis=1)
    np.testing.assert_array_equal(segment_max(jnp.asarray(values), np.array(lengths)), expected)


@pytest.mark.parametrize("iterations", [4, 5, 8])
def test_exp_kernel_error_is_the_documented_one(iterations):
    x = np.linspace(-0.2 * 2**iterations, 0, 500)
    relative = np.abs(np.asarray(exp_kernel(jnp.asarray(x), iterations)) / np.exp(x) - 1)
    assert (relative <= 1.2 * x**2 / 2 ** (iterations + 1) + 1e-9).all()  # 1.2: higher terms, at most x = -2^t / 5
    far = exp_kernel(jnp.asarray([-1e3, -1e6]), iterations)
    assert (np.asarray(far) < 0.11 ** (2**iterations) + 1e-300).all()


def folded_with(**factors):
    """Description and float32 weights of a random model, some of them multiplied."""
    folded = fold(trained_like("SM(t)+ScFuFFN"))
    weights = {name: w.astype(np.float32) for name, w in folded.weights.items()}
    for name, factor in factors.items():
        weights[name.replace("_", ".")] *= factor
    return describe(folded), weights


def test_check_ranges_names_the_largest_value_and_it_is_the_programs():
    description, weights = folded_with()
    tokens = [[1, 2, 3, 4], [50, 49]]
    largest = largest_values(description, weights, tokens, 8)
    expected = max(np.abs(run_plain(description, weights, t, 1, 8)[1][0]).max() for t in tokens)
    assert largest["head"] == pytest.approx(expected, rel=1e-6)
    assert {"embedding", "layer 0 scores", "layer 2 exp", "centre", "norm"} < largest.keys()
    name, value = check_ranges(description, weights, Settings(), tokens)
    assert largest[name] == value == max(largest.values())


@pytest.mark.parametrize(("fraction_bits", "limit"), [(18, 2.0**26), (22, 2.0**18), (12, 2.0**38)])
def test_check_ranges_refuses_what_the_ring_cannot_hold_with_the_numbers(fraction_bits, limit):
    settings = Settings(fraction_bits=fraction_bits)
    description, weights = folded_with()
    size = largest_values(description, weights, [[1, 2, 3]], 8)["head"]
    for factor in (0.5, 2.0):
        weights["head"], weights["head_bias"] = (
            w * np.float32(factor * limit / size) for w in (folded_with()[1][n] for n in ("head", "head_bias"))
        )
        if factor < 1:
            assert check_ranges(description, weights, settings, [[1, 2, 3]])[0] == "head"
        else:
            match = rf"head reaches {2 * limit:.3g}, .*ring of 64 bits with {fraction_bits} .* below {limit:.3g}"
            with pytest.raises(UserError, match=match.replace("+", r"\+")):
                check_ranges(description, weights, settings, [[1, 2, 3]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("factor", [1e30, np.inf])
def test_check_ranges_refuses_values_that_are_not_finite(factor):
    with pytest.raises(UserError, match="overflow"):
        check_ranges(*folded_with(**{"0_qkv": factor}), Settings())


def test_check_ranges_looks_at_rare_tokens_with_large_embeddings():
    description, weights = folded_with()
    sampled = np.random.default_rng(0).integers(0, description.vocab_size, description.positions)
    rare = next(token for token in range(description.vocab_size) if token not in sampled)
    weights["embedding"][rare] *= 1e7
    with pytest.raises(UserError, match="overflow"):
        check_ranges(description, weights, Settings())
