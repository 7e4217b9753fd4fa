"""The entropy operation, its regulariser and its diagnosis against definitions in double precision."""

import math

import numpy as np
import pytest
import torch

from entropi.entropy import attention, secure_softmax
from entropi.entropy.attention import entropy_attention
from entropi.entropy.diagnosis import diagnose
from entropi.entropy.patterns import attention_pattern
from entropi.entropy.regularizer import EntropyRegularizer, entropy_distance_penalty, entropy_penalty
from entropi.softmax import SoftmaxForm
from exactness import squared


def make_qkv(batch=2, heads=3, queries=17, keys=None, width=8, dtype=torch.float64, seed=0, value_width=None):
    generator = torch.Generator().manual_seed(seed)
    keys = keys or queries
    shapes = [(batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, value_width or width)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def definition(query, key, value, visible, temperature=None, iterations=None, softcap=None, sinks=None):
    """Loops over rows: no shared code with the package, and -inf nowhere. Sinks are `(B, H, T)`."""
    batch, heads, queries, width = query.shape
    output = query.new_zeros(batch, heads, queries, value.shape[3])
    entropy = torch.zeros(batch, heads, queries, dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = visible[i].nonzero().flatten()
                if len(seen) == 0:
                    continue
                t = 1.0 if temperature is None else temperature[h, i]
                logits = (key[b, h, seen] @ query[b, h, i]) / (t * math.sqrt(width))
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[b, h, i, None]])
                p = shares = torch.softmax(logits, dim=0)
                if iterations is not None:
                    form = SoftmaxForm.parse(iterations) if isinstance(iterations, str) else None
                    t = -form.iterations if form else iterations
                    n = 2 ** abs(t)
                    x = (logits - logits.max()).clamp(min=-0.9 * n) if t > 0 else logits
                    weights = (1 + x / n) ** n
                    p = shares = weights / weights.sum()
                    if form:
                        shares = weights / (len(seen) if form.divisor == "keys" else form.divisor)
                output[b, h, i] = shares[: len(seen)] @ value[b, h, seen]
                entropy[b, h, i] = -(p * p.log()).sum()
    return output, entropy


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (2, 2), (17, 17), (5, 12), (1, 9), (7, 4)])
def test_output_and_entropy_are_the_definition(implementation, queries, keys):
    query, key, value = make_qkv(queries=queries, keys=keys)
    output, entropy = entropy_attention(query, key, value, implementation=implementation)
    expected = definition(query, key, value, causal(queries, keys))
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(entropy, expected[1])


def assert_same_values_and_gradients(function, other, tensors):
    """Values and gradients of two functions; the loss uses output and entropy, so both paths of dS are exercised."""
    results = []
    for f in (function, other):
        output, entropy = f(*tensors)
        weights = torch.arange(1, entropy.shape[-1] + 1, device=entropy.device)
        loss = (output.sin() * 1.3).sum() + (entropy.square() * weights).sum()
        results.append([output, entropy, *torch.autograd.grad(loss, tensors)])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize(
    "iterations", [1, 2, 5, 8, 16, -1, -2, -5, -8, "polynomial-1/keys", "polynomial-3/keys", "polynomial-1/9"]
)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (17, 17), (5, 12), (7, 4)])
def test_secure_softmax_and_its_gradients_are_the_definition(implementation, iterations, queries, keys):
    """Logits spread far enough for clipped ones at t = 1 and 2, as the next test makes sure."""
    tensors = make_qkv(queries=queries, keys=keys, batch=1, heads=2)
    temperature = torch.linspace(0.15, 0.45, 2 * queries, dtype=torch.float64).reshape(2, -1).requires_grad_()
    options = dict(implementation=implementation, **squared(iterations))
    assert_same_values_and_gradients(
        lambda q, k, v, t: entropy_attention(q, k, v, temperature=t, **options),
        lambda q, k, v, t: definition(q, k, v, causal(queries, keys), t, iterations),
        [*tensors, temperature],
    )


def test_some_weights_of_the_test_above_are_clipped_and_some_not():
    """Else it would not show that clipped logits have no gradient but weigh 0.1^(2^t)."""
    query, key, _ = make_qkv(batch=1, heads=2)
    x = query @ key.transpose(-1, -2) / math.sqrt(8) / 0.45  # the largest temperature above
    x = (x - x.amax(-1, keepdim=True))[:, :, -1]
    for iterations in (1, 2):
        assert 0 < (x < -0.9 * 2**iterations).double().mean() < 1
    assert secure_softmax.log_weights(x, SoftmaxForm("power", 1)).exp().min().item() == pytest.approx(0.01)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_of_equal_largest_logits_the_first_has_the_gradient_through_the_maximum(implementation):
    query = torch.tensor([[[[2.0]]]], dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[[[0.5], [1.0], [1.0]]]], dtype=torch.float64, requires_grad=True)
    value = torch.tensor([[[[1.0], [5.0], [5.0]]]], dtype=torch.float64)
    output, _ = entropy_attention(
        query, key, value, is_causal=False, scale=1.0, softmax="power-3", implementation=implementation
    )
    (got,) = torch.autograd.grad(output.sum(), key)
    x, n = -1.0, 8.0  # below the maximum; k'(x) = k(x) / (1 + x / n)
    k = (1 + x / n) ** n
    total = k + 2
    mean = (k + 10) / total
    slope = 2.0 * torch.tensor([k * (1 - mean) / (1 + x / n), 5 - mean, 5 - mean], dtype=torch.float64) / total
    slope[1] -= slope.sum()
    torch.testing.assert_close(got.flatten(), slope)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("sink_shape", [None, (3,), (3, 1), (2, 1, 1), (2, 3, -1)])
@pytest.mark.parametrize(
    ("queries", "keys", "value_width"), [(1, 1, 3), (17, 17, 12), (1, 12, 5), (5, 12, 8), (7, 4, 5)]
)
def test_sinks_softcap_and_values_of_another_width(implementation, softcap, sink_shape, queries, keys, value_width):
    tensors = make_qkv(queries=queries, keys=keys, value_width=value_width)
    temperature = torch.linspace(0.3, 1.4, 3 * queries, dtype=torch.float64).reshape(3, -1).requires_grad_()
    sinks = None
    if sink_shape is not None:
        shape = [queries if n == -1 else n for n in sink_shape]
        sinks = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()

    def ours(q, k, v, t, *s):
        options = dict(temperature=t, softcap=softcap, sinks=s[0] if s else None, implementation=implementation)
        return entropy_attention(q, k, v, **options)

    def theirs(q, k, v, t, *s):
        rows = None
        if s:
            rows = (s[0][:, None] if s[0].dim() == 1 else s[0]).expand(2, 3, queries)
        return definition(q, k, v, causal(queries, keys), t, softcap=softcap, sinks=rows)

    assert_same_values_and_gradients(ours, theirs, [*tensors, temperature, *([] if sinks is None else [sinks])])


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_nothing_but_their_sink(implementation, additive):
    """Hidden by the mask (2), by being earlier than every key (0 to 2 of 9), or both; one sink is none."""
    query, key, value = make_qkv(queries=9, keys=6)
    visible = causal(9, 6)
    visible[5] = False
    sinks = torch.tensor([0.3, -math.inf, 60.0], dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(9, 6, dtype=torch.float64).masked_fill(~visible, -math.inf) if additive else visible
    output, entropy = entropy_attention(query, key, value, attn_mask=mask, sinks=sinks, implementation=implementation)
    finite = sinks.detach().clamp(min=-1e4)  # a weight of exactly 0 has no entropy in a definition without -inf
    expected = definition(query, key, value, visible, sinks=finite[:, None].expand(2, 3, 9))
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(entropy[:, ::2], expected[1][:, ::2])
    without = entropy_attention(query, key, value, attn_mask=mask, implementation=implementation)[1]
    torch.testing.assert_close(entropy[:, 1], without[:, 1])
    assert output[:, :, [0, 1, 2, 5]].abs().max() == 0
    assert entropy[:, :, [0, 1, 2, 5]].abs().max() == 0
    grads = torch.autograd.grad(output.sin().sum() + entropy.square().sum(), (query, key, value, sinks))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert grads[3][0] != 0
    assert grads[3][1] == 0


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "auto"])
@pytest.mark.parametrize("queries", [1, 7])
def test_sinks_are_those_of_gpt_oss_in_transformers(implementation, queries):
    """Their weights are the output over values that pick keys out, values of another width than keys."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    query, key, _ = (x.detach() for x in make_qkv(heads=4, queries=queries, keys=7))
    key, value = key[:, :2], torch.eye(7, dtype=torch.float64).expand(2, 2, 7, 7)
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = 2, torch.linspace(-1, 3, 4, dtype=torch.float64)
    mask = torch.zeros(2, 1, queries, 7, dtype=torch.float64).masked_fill(~causal(queries, 7), -math.inf)
    mask[0, ..., :2] = -math.inf  # padding on the left
    expected, weights = eager_attention_forward(module, query, key, value, mask, scaling=8**-0.5)
    options = dict(attn_mask=mask, sinks=module.sinks, enable_gqa=True, implementation=implementation)
    output, entropy = entropy_attention(query, key, value, is_causal=False, **options)
    torch.testing.assert_close(output.transpose(1, 2), expected)
    weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(entropy, torch.special.entr(weights.clamp(min=0)).sum(-1), atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "auto"])
@pytest.mark.parametrize("queries", [1, 7])
def test_the_softcap_is_that_of_gemma_2_in_transformers(implementation, queries):
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    query, key, value = (x.detach() for x in make_qkv(heads=4, queries=queries, keys=7))
    key, value = key[:, :2], value[:, :2]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    mask = torch.zeros(queries, 7, dtype=torch.float64).masked_fill(~causal(queries, 7), -math.inf)
    expected, weights = eager_attention_forward(module, query, key, value, mask, scaling=1.1, softcap=2.0)
    options = dict(scale=1.1, softcap=2.0, enable_gqa=True, implementation=implementation)
    output, entropy = entropy_attention(query, key, value, **options)
    torch.testing.assert_close(output.transpose(1, 2), expected, atol=1e-6, rtol=1e-6)  # their softmax is float32
    torch.testing.assert_close(entropy, torch.special.entr(weights).sum(-1), atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("iterations", [8, 10, 12, 14, 16])
def test_secure_softmax_approaches_the_exact_one(iterations):
    """exp(x) / k(x) = exp(x^2 / 2^(t+1) + O(x^3 / 4^t)): the weights' errors are of that size, the entropies' too."""
    query, key, value = (x.detach() for x in make_qkv(queries=64, width=16))
    logits = query @ key.transpose(-1, -2) / 4
    x = (logits - logits.amax(-1, keepdim=True)).flatten()
    pairs = torch.stack([torch.zeros_like(x), x], -1)
    ratio = 1 - secure_softmax.log_weights(pairs, SoftmaxForm("power", iterations))[:, 1].sub(x).exp()
    first_order = x.square() / 2 ** (iterations + 1)
    torch.testing.assert_close(ratio, first_order, rtol=0.1, atol=1e-12)
    exact = entropy_attention(query, key, value, is_causal=False)
    close = entropy_attention(query, key, value, is_causal=False, **squared(iterations))
    bound = float(first_order.max())
    assert 1e-3 * bound < (close[1] - exact[1]).abs().max() < 8 * bound  # dH = sum_j p_j x_j^2 (log p_j + H) / 2^(t+1)
    assert (close[0] - exact[0]).abs().max() < 2 * bound * value.abs().max()


@pytest.mark.parametrize("iterations", [1, 4, 5, 8, 16])
def test_secure_softmax_is_what_the_secure_engine_computes(iterations):
    """The two rooms may not import each other: here they meet, and must agree on the formula and the clip."""
    functions = pytest.importorskip("entropi.private.compute.functions")
    x = np.concatenate([np.linspace(-12, 0, 100), -(2.0**iterations) * np.array([0.89, 0.91, 1.5])]).astype(np.float32)
    expected = np.asarray(functions.exp_of_nonpositive(x, iterations), dtype=np.float64)
    row = torch.from_numpy(np.sort(x)).double()  # the largest is 0
    got = secure_softmax.log_weights(row, SoftmaxForm("power", iterations)).exp().numpy()
    # Its arithmetic is float32: a base of at least 0.1 is rounded by 6e-7 of itself, which 2^t multiplies.
    np.testing.assert_allclose(got, np.sort(expected), rtol=2.0**iterations * 6e-7 + 3e-7, atol=1e-37)


@pytest.mark.parametrize(
    "wrong",
    [
        "power",
        "power-0",
        "power-17",
        "polynomial-9",
        "exact-1",
        "exact/keys",
        "power-2/keys",
        "power-2/9",
        "cubic-2",
        "",
        5,
        None,
    ],
)
def test_an_impossible_softmax_is_refused(wrong):
    query, key, value = make_qkv()
    legal = "softmax must be exact, power-1 to power-16 or polynomial-1 to polynomial-8 with or without /keys or"
    with pytest.raises(ValueError, match=legal):
        entropy_attention(query, key, value, softmax=wrong)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_temperature_of_the_polynomial_is_an_offset(implementation):
    """(1 + s / (2^t T))^(2^t) is proportional to (2^t T + s)^(2^t): what folding rests on."""
    query, key, value = (x.detach() for x in make_qkv(queries=6))
    temperature = torch.rand(3, 6, dtype=torch.float64) + 0.3
    options = dict(softmax="polynomial-1", implementation=implementation)
    output, _ = entropy_attention(query, key, value, temperature=temperature, **options)
    weights = (2 * temperature[..., None] + query @ key.transpose(-1, -2) / math.sqrt(8)).square() * causal(6, 6)
    torch.testing.assert_close(output, weights / weights.sum(-1, keepdim=True) @ value)


def test_a_weight_of_exactly_zero_is_no_danger():
    """1 + s / 2 = 0: the logarithm of the weight is not finite, weights, entropy and gradients are."""
    query = torch.tensor([[[[-2.0], [-2.0]]]], dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[[[1.0], [0.5]]]], dtype=torch.float64, requires_grad=True)
    value = torch.tensor([[[[3.0], [5.0]]]], dtype=torch.float64, requires_grad=True)
    for implementation in ("reference", "blockwise"):
        options = dict(scale=1.0, softmax="polynomial-1", implementation=implementation)
        output, entropy = entropy_attention(query, key, value, **options)
        torch.testing.assert_close(output.flatten(), torch.tensor([3.0, 5.0], dtype=torch.float64))
        torch.testing.assert_close(entropy.flatten(), torch.zeros(2, dtype=torch.float64))
        grads = torch.autograd.grad(output.sum() + entropy.square().sum(), (query, key, value))
        assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("iterations", [None, 2, 7, -1, "polynomial-1/keys"])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 111, 300])
def test_blockwise_gradients_equal_the_reference(length, iterations):
    """T above and below the block size."""
    temperature = (torch.rand(3, length, dtype=torch.float64) + 0.5).requires_grad_()

    def run(implementation):
        options = dict(implementation=implementation, **squared(iterations))
        return lambda q, k, v, t: entropy_attention(q, k, v, temperature=t, **options)

    assert_same_values_and_gradients(
        run("blockwise"), run("reference"), [*make_qkv(queries=length, width=5), temperature]
    )


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("iterations", [None, 1, 4, -1, -3, "polynomial-2/keys", "polynomial-2/9"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_double_precision_gradcheck(is_causal, iterations, implementation):
    query, key, value = make_qkv(batch=1, heads=2, queries=5, keys=6, width=3)
    temperature = torch.tensor([[0.7], [1.9]], dtype=torch.float64, requires_grad=True)

    def both(q, k, v, t):
        options = dict(is_causal=is_causal, **squared(iterations), implementation=implementation)
        return entropy_attention(q, k, v, temperature=t, **options)

    assert torch.autograd.gradcheck(both, (query, key, value, temperature))


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_double_precision_gradcheck_with_sinks_and_softcap(is_causal, implementation):
    tensors = make_qkv(batch=1, heads=2, queries=5, keys=6, width=3, value_width=2)
    sinks = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    mask = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask[3] = -math.inf

    def both(q, k, v, s):
        options = dict(is_causal=is_causal, softcap=0.9, attn_mask=mask, implementation=implementation)
        return entropy_attention(q, k, v, sinks=s, **options)

    assert torch.autograd.gradcheck(both, (*tensors, sinks))


@pytest.mark.parametrize("iterations", [None, 1, 8, -1, "polynomial-1/keys", "polynomial-1/9"])
@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_nothing_are_zero_and_have_finite_gradients(implementation, additive, iterations):
    query, key, value = make_qkv(queries=6)
    visible = causal(6, 6)
    visible[2] = False
    visible[4, 1:] = False
    mask = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~visible, -math.inf) if additive else visible
    options = dict(implementation=implementation, **squared(iterations))
    output, entropy = entropy_attention(query, key, value, attn_mask=mask, is_causal=False, **options)
    expected = definition(query, key, value, visible, iterations=iterations)
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(entropy, expected[1])
    assert output[:, :, 2].abs().max() == 0
    assert entropy[:, :, [2, 4]].abs().max() == 0
    (output.sum() + entropy.square().sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


@pytest.mark.parametrize("mask_shape", [None, (7,), (2, 1, 1, 7), (2, 4, 1, 7)])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("implementation", ["reference", "blockwise", "auto"])
@pytest.mark.parametrize("iterations", [None, 4, -1])
def test_grouped_queries_share_keys(iterations, implementation, queries, mask_shape):
    query, key, value = make_qkv(queries=queries, keys=7, heads=4, dtype=torch.float32)
    shared = [x[:, ::2] for x in (key, value)]
    repeated = [x.repeat_interleave(2, dim=1) for x in shared]
    temperature = torch.arange(1.0, 5.0)[:, None]
    mask = None if mask_shape is None else torch.rand(mask_shape, generator=torch.Generator().manual_seed(1)) > 0.3
    options = dict(temperature=temperature, attn_mask=mask, implementation=implementation, **squared(iterations))
    results = []
    for keys_and_values, grouped in ((shared, True), (repeated, False)):
        output, entropy = entropy_attention(query, *keys_and_values, enable_gqa=grouped, **options)
        loss = output.square().sum() + entropy.sum()
        results.append([output, entropy, *torch.autograd.grad(loss, (query, key, value), retain_graph=True)])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("length", [2, 63, 111, 300])
def test_blockwise_gradients_equal_the_reference_with_sinks_and_softcap(length, with_sinks, softcap):
    """Per-row masks that are added, as the blocks have to cut them."""
    tensors = make_qkv(queries=length, width=5, value_width=9)
    mask = torch.randn(1, 3, length, length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask[..., length // 2, :] = -math.inf
    sinks = [torch.tensor([0.5, -3.0, 2.0], dtype=torch.float64, requires_grad=True)] if with_sinks else []

    def run(implementation):
        def f(q, k, v, *s):
            options = dict(attn_mask=mask, softcap=softcap, implementation=implementation)
            return entropy_attention(q, k, v, sinks=s[0] if s else None, **options)

        return f

    assert_same_values_and_gradients(run("blockwise"), run("reference"), [*tensors, *sinks])


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("implementation", ["reference", "blockwise", "auto"])
@pytest.mark.parametrize("sink_shape", [(4,), (2, 4, 1)])
def test_grouped_queries_have_their_own_sinks(implementation, queries, sink_shape):
    query, key, value = make_qkv(queries=queries, keys=7, heads=4, dtype=torch.float32, value_width=5)
    sinks = torch.randn(sink_shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    shared = [x[:, ::2] for x in (key, value)]
    repeated = [x.repeat_interleave(2, dim=1) for x in shared]
    results = []
    for keys_and_values, grouped in ((shared, True), (repeated, False)):
        options = dict(enable_gqa=grouped, implementation=implementation, softcap=1.5)
        output, entropy = entropy_attention(query, *keys_and_values, sinks=sinks, **options)
        loss = output.square().sum() + entropy.sum()
        inputs = (query, key, value, sinks)
        results.append([output, entropy, *torch.autograd.grad(loss, inputs, retain_graph=True)])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_of_sinks_come_in_their_own_dtype(implementation, dtype):
    query, key, value = (x.detach().to(dtype) for x in make_qkv())
    sinks = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    output, entropy = entropy_attention(query, key, value, sinks=sinks, implementation=implementation)
    assert output.dtype == dtype
    assert entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (entropy.sum() + output.sum()).backward()
    assert sinks.grad.dtype == torch.bfloat16
    assert sinks.grad.abs().min() > 0


@pytest.mark.parametrize("iterations", [None, 1, 8, 16, -1])
@pytest.mark.parametrize("sharpness", [1.0, 30.0, 1000.0])
def test_float32_entropy_survives_large_logits(sharpness, iterations):
    """The entropy of shifted logits: no cancellation against logits of any size (error bounded by float32 logits)."""
    query, key, value = make_qkv(queries=64, width=16, dtype=torch.float32)
    offset = torch.ones_like(key)  # a common shift of all logits leaves the entropy unchanged
    args = [query.detach() * sharpness, key.detach() + offset, value.detach()]
    options = dict(**squared(iterations))
    exact = entropy_attention(*[x.double() for x in args], implementation="reference", **options)[1]
    plain = entropy_attention(*args, implementation="reference", **options)[1]
    fast = entropy_attention(*args, implementation="blockwise", **options)[1]
    assert fast.min() >= 0
    assert (fast - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5


def test_bfloat16_entropy_is_float32_and_no_worse_than_a_plain_bfloat16_version():
    query, key, value = (x.detach() for x in make_qkv(queries=111, width=48, dtype=torch.float32))
    exact = entropy_attention(query.double(), key.double(), value.double(), implementation="reference")
    low = [x.bfloat16() for x in (query, key, value)]
    plain = entropy_attention(*low, implementation="reference")
    fast = entropy_attention(*low, implementation="blockwise")
    assert fast[0].dtype == torch.bfloat16
    assert fast[1].dtype == torch.float32
    for p, f, e in zip(plain, fast, exact):
        assert (f.double() - e).abs().max() <= 2 * (p.double() - e).abs().max()


def test_temperature_limits():
    query, key, value = make_qkv(queries=9)
    flat = entropy_attention(query, key, value, temperature=torch.tensor(1e9, dtype=torch.float64))[1]
    torch.testing.assert_close(flat, torch.arange(1, 10, dtype=torch.float64).log().expand(2, 3, 9))
    sharp = entropy_attention(query, key, value, temperature=torch.tensor(1e-6, dtype=torch.float64))[1]
    assert sharp.max() < 1e-6


def test_shapes_that_do_not_fit_are_named():
    query, key, value = make_qkv()
    with pytest.raises(ValueError, match=r"\(2, 3, 17, 8\)"):
        entropy_attention(query, key[..., :4], value)
    with pytest.raises(ValueError, match="enable_gqa"):
        entropy_attention(query, key[:, :1], value[:, :1])
    with pytest.raises(ValueError, match="got 'fused'"):
        entropy_attention(query, key, value, implementation="fused")


@pytest.mark.parametrize("wrong", [0, 0.0, -1.0, math.nan, math.inf])
def test_a_softcap_that_is_not_positive_is_refused(wrong):
    with pytest.raises(ValueError, match="softcap must be None or a positive number, got"):
        entropy_attention(*make_qkv(), softcap=wrong)


@pytest.mark.parametrize("softmax", ["power-4", "polynomial-4"])
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sinks": torch.zeros(3)}])
def test_sinks_and_softcap_belong_to_the_exact_softmax(options, softmax):
    with pytest.raises(ValueError, match=f"softcap and sinks belong to the exact softmax, {softmax} replaces it"):
        entropy_attention(*make_qkv(), softmax=softmax, **options)


@pytest.mark.parametrize("implementation", ["auto", "reference", "blockwise"])
def test_sinks_and_masks_that_do_not_fit_are_refused(implementation):
    """A mask over more keys than there are would silently be cut, integers would be added."""
    tensors = [x.detach().float() for x in make_qkv()]
    options = dict(implementation=implementation)
    for shape in ((2,), (17,), (3, 4), (4, 3, 17), (1, 2, 3, 17)):
        with pytest.raises(ValueError, match=r"sinks are \(H,\) or broadcast against \(B, H, T\) = \(2, 3, 17\), got"):
            entropy_attention(*tensors, sinks=torch.zeros(shape), **options)
    with pytest.raises(ValueError, match="sinks are on meta, queries on cpu"):
        entropy_attention(*tensors, sinks=torch.zeros(3, device="meta"), **options)
    for shape in ((17, 18), (16,), (4, 1, 1, 17), (1, 1, 1, 17, 17)):
        with pytest.raises(ValueError, match=r"attn_mask \(.*\) does not broadcast against .* = \(2, 3, 17, 17\)"):
            entropy_attention(*tensors, attn_mask=torch.zeros(shape), **options)
    with pytest.raises(ValueError, match=r"attn_mask must be boolean .* got torch.int64"):
        entropy_attention(*tensors, attn_mask=torch.ones(17, 17, dtype=torch.long), **options)
    with pytest.raises(ValueError, match="attn_mask is on meta, queries are on cpu"):
        entropy_attention(*tensors, attn_mask=torch.zeros(17, 17, device="meta"), **options)


@pytest.mark.parametrize("implementation", ["auto", "reference", "blockwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_temperature_spoils_its_own_rows_alone(implementation, dtype):
    query, key, value = (x.detach().to(dtype) for x in make_qkv())
    plain = entropy_attention(query, key, value, implementation=implementation)
    temperature = torch.ones(3, 17, dtype=dtype)
    temperature[0, 3], temperature[1, 3] = math.nan, 0.0
    output, entropy = entropy_attention(query, key, value, temperature=temperature, implementation=implementation)
    assert output[:, :2, 3].isnan().all()
    assert entropy[:, :2, 3].isnan().all()
    others = temperature == 1.0
    torch.testing.assert_close(output[:, others], plain[0][:, others])
    torch.testing.assert_close(entropy[:, others], plain[1][:, others])
    reversed_order = entropy_attention(query, key, value, temperature=-temperature.abs(), implementation=implementation)
    expected = entropy_attention(-query, key, value, implementation=implementation)
    torch.testing.assert_close(reversed_order[0][:, others], expected[0][:, others])


@pytest.mark.parametrize("implementation", ["auto", "reference", "blockwise"])
@pytest.mark.parametrize("odd", range(3))
def test_dtypes_and_devices_that_do_not_fit_are_refused(implementation, odd):
    """Compiled code that reads float32 as bfloat16 reads, and writes, beyond the end of a tensor."""
    for change, message in ((torch.bfloat16, "different dtypes: .*bfloat16"), ("meta", "different devices: .*meta")):
        mixed = [x.detach().float() for x in make_qkv()]
        mixed[odd] = mixed[odd].to(change)
        with pytest.raises(ValueError, match=message):
            entropy_attention(*mixed, implementation=implementation)


def test_the_definition_gives_shapes_alone():
    """On the meta device, which knows no autocast."""
    query, key, value = (x.detach().to("meta") for x in make_qkv())
    output, entropy = entropy_attention(query, key, value, implementation="reference")
    assert (output.shape, entropy.shape) == (query.shape, query.shape[:3])


@pytest.mark.parametrize("implementation", ["auto", "reference", "blockwise"])
def test_under_autocast_the_three_are_taken_in_its_dtype(implementation):
    """Rotary positions leave queries and keys in float32 there, beside values in bfloat16."""
    query, key, value = (x.detach().float().requires_grad_() for x in make_qkv(queries=33, width=16))
    low = [x.detach().bfloat16() for x in (query, key, value)]
    expected = entropy_attention(*low, implementation=implementation)
    with torch.autocast("cpu", torch.bfloat16):
        output, entropy = entropy_attention(query, key, value.bfloat16(), implementation=implementation)
        double = entropy_attention(*[x.double() for x in (query, key, value)], implementation=implementation)
    assert output.dtype == torch.bfloat16
    assert double[0].dtype == double[1].dtype == torch.float64
    for found, wanted in zip((output, entropy), expected):
        torch.testing.assert_close(found, wanted)
    (output.sum() + entropy.sum()).backward()
    for x in (query, key, value):
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert bool(torch.isfinite(x.grad).all())


# The regulariser against a scalar double-precision evaluation of Algorithm 1, written as loops.


def penalty_by_loops(entropies, theta, margin, granularity, max_entropy, reduction, targets=None):
    """With `targets` like `entropies`, their values are aimed at in place of theta E_max."""
    layers, batch, heads, length = entropies.shape
    limit = [math.log(length) if max_entropy == "context" else math.log(i + 1) for i in range(length)]
    total = 0.0
    for layer in range(layers):
        layer_total = 0.0
        for head in range(heads):
            if granularity == "head":
                rows = [((slice(None), head), sum(limit) / length)]
            else:
                rows = [((b, head, i), limit[i]) for b in range(batch) for i in range(length)]
            penalties = []
            for place, top in rows:
                aim = float(theta[layer, head]) * top if targets is None else float(targets[layer][place].mean())
                deviation = float(entropies[layer][place].mean()) - aim
                penalties.append(deviation**2 if abs(deviation) > margin * top else 0.0)
            layer_total += sum(penalties) / (len(penalties) if reduction == "mean" else 1)
        total += layer_total / heads
    return total / layers


@pytest.mark.parametrize("granularity", ["query", "head"])
@pytest.mark.parametrize("max_entropy", ["context", "causal"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regularizer_is_algorithm_1(granularity, max_entropy, reduction, dtype):
    generator = torch.Generator().manual_seed(1)
    limits = torch.arange(1, 12, dtype=torch.float64).log()
    entropies = torch.rand(3, 2, 4, 11, generator=generator, dtype=torch.float64) * limits
    module = EntropyRegularizer(3, 4, 0.15, granularity, max_entropy, reduction).to(dtype)
    with torch.no_grad():
        module.threshold.uniform_(0.1, 0.9, generator=generator)
    got = module([e.to(dtype) for e in entropies])
    expected = penalty_by_loops(entropies, module.threshold.detach(), 0.15, granularity, max_entropy, reduction)
    assert expected > 0
    assert float(got.detach()) == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("granularity", ["query", "head"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_penalty_around_another_models_entropies(granularity, reduction):
    generator = torch.Generator().manual_seed(2)
    limits = torch.arange(1, 12, dtype=torch.float64).log()
    ours, theirs = torch.rand(2, 3, 2, 4, 11, generator=generator, dtype=torch.float64) * limits
    ours.requires_grad_()
    theirs.requires_grad_()
    options = dict(margin=0.02, granularity=granularity, max_entropy="causal", reduction=reduction)
    got = entropy_distance_penalty(list(ours), list(theirs), **options)
    expected = penalty_by_loops(ours.detach(), None, targets=theirs.detach(), **options)
    assert expected > 0
    assert float(got.detach()) == pytest.approx(expected, rel=1e-9)
    got.backward()
    assert ours.grad.abs().max() > 0
    assert theirs.grad is None
    with pytest.raises(ValueError, match="differ in shape"):
        entropy_distance_penalty(list(ours), list(theirs[:, :1]))
    with pytest.raises(ValueError, match="granularity"):
        entropy_distance_penalty(list(ours), list(theirs), granularity="rows")


@pytest.mark.parametrize("granularity", ["query", "head"])
def test_regularizer_gradient_is_zero_within_the_margin_only(granularity):
    entropies = torch.full((1, 2, 2, 8), 0.5 * math.log(8), dtype=torch.float64)
    entropies[:, :, 1] = 0.9 * math.log(8)  # head 0 sits on its threshold, head 1 is overloaded
    entropies.requires_grad_()
    threshold = torch.full((1, 2), 0.5, dtype=torch.float64, requires_grad=True)
    entropy_penalty(entropies, threshold, granularity=granularity).backward()
    assert entropies.grad[:, :, 0].abs().max() == 0
    assert threshold.grad[0, 0] == 0
    assert (entropies.grad[:, :, 1] > 0).all()
    assert threshold.grad[0, 1] < 0


@pytest.mark.parametrize(
    "wrong", [{"granularity": "rows"}, {"max_entropy": "log"}, {"reduction": "max"}, {"margin": 1.5}]
)
def test_regularizer_refuses_unknown_options(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EntropyRegularizer(1, 1, **wrong)


def test_regularizer_refuses_another_models_entropies():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        EntropyRegularizer(2, 3)(torch.zeros(2, 1, 4, 5))


# Diagnosis.


def test_diagnosis_counts_quarters_of_the_largest_entropy():
    found = diagnose(torch.tensor([[3.8, 3.0], [2.0, 0.5]]), context_length=128)
    assert found.max_observed == pytest.approx(3.8)
    assert found.max_possible == pytest.approx(math.log(128))
    assert found.max_causal == pytest.approx(sum(math.log(i + 1) for i in range(128)) / 128)
    assert found.quartile_shares == (0.25, 0.0, 0.25, 0.5)
    assert found.overloaded == [(0, 0), (0, 1)]
    assert found.collapsed == [(1, 1)]
    assert "overload: 50%" in found.verdict
    assert "collapse: 25%" in found.verdict
    assert "layer 1" in found.verdict
    assert "1 of 4 heads attend almost evenly (from 90% of what a causal mask allows)" in found.verdict


@pytest.mark.parametrize(
    ("entropy", "causal", "said"),
    [
        (3.8, True, "4 of 4 heads attend almost evenly (from 90% of what a causal mask allows)"),
        (1.94, True, "M, the largest entropy, is 50% of what a causal mask allows: no head attends almost evenly"),
        (3.8, False, "M, the largest entropy, is 78% of log T: no head attends almost evenly"),
        (4.8, True, "4 of 4 heads attend almost evenly (from 90% of log T)"),  # more than a causal mask allows
    ],
)
def test_heads_that_are_alike_attend_evenly_only_near_the_largest_possible_entropy(entropy, causal, said):
    found = diagnose(torch.full((2, 2), entropy), context_length=128, causal=causal)
    assert found.quartile_shares[3] == 1.0  # the paper's count is the same
    assert said in found.verdict
    assert found.verdict.startswith("Entropic overload") == ("no head" not in said)


def test_diagnosis_of_a_well_behaved_model():
    values = torch.full((4, 5), 2.0)
    values[0, 0] = 3.2
    assert diagnose(values).verdict.startswith("Well-behaved")


def test_diagnosis_of_total_collapse_is_not_fooled_by_quarters():
    found = diagnose(torch.full((2, 2), 1e-3), context_length=128)
    assert found.quartile_shares[0] == 1.0
    assert "collapse: 100%" in found.verdict


def test_diagnosis_refuses_what_is_not_a_finite_matrix():
    with pytest.raises(ValueError, match="layer 1, head 0"):
        diagnose(torch.tensor([[1.0, 1.0], [math.nan, 1.0]]))
    with pytest.raises(ValueError, match="matrix"):
        diagnose(torch.ones(3))
    for wrong in (torch.tensor(1.0), torch.ones(0, 2), torch.ones(2, 0), [], [torch.ones(2, 2)]):
        with pytest.raises(ValueError, match="matrix"):
            diagnose(wrong)


def test_diagnosis_calls_layers_by_the_model_s_numbers():
    found = diagnose(torch.tensor([[4.0, 3.0], [4.0, 0.5]]), layers=[1, 3])
    assert found.layers == [1, 3]
    assert found.overloaded == [(1, 0), (1, 1), (3, 0)]
    assert found.collapsed == [(3, 1)]
    assert "top quarter of M, in layers 1 and 3, both that have attention;" in found.verdict
    assert "bottom quarter, in layer 3;" in found.verdict
    rows = torch.ones(9, 2)
    assert "in every layer;" in diagnose(rows).verdict
    assert "in every layer that has attention;" in diagnose(rows, layers=range(0, 18, 2)).verdict
    assert "in layers 2, 5 and 8, all that have attention;" in diagnose(rows[:3], layers=[2, 5, 8]).verdict
    assert "in layer 7, the only one that has attention;" in diagnose(rows[:1], layers=[7]).verdict
    with pytest.raises(ValueError, match="layer 3, head 1 is not finite"):
        diagnose(torch.tensor([[1.0, 1.0], [1.0, math.inf]]), layers=[1, 3])
    for wrong in ([1], [1, 2, 3], [3, 1], [1, 1], [-1, 1]):
        with pytest.raises(ValueError, match="layers must be 2 ascending numbers"):
            diagnose(torch.ones(2, 2), layers=wrong)


def test_diagnosis_of_layers_with_different_numbers_of_heads():
    found = diagnose([torch.tensor([4.0, 0.5, 2.5]), torch.tensor([4.0])], context_length=64)
    assert found.entropy == [[4.0, 0.5, 2.5], [4.0]]
    assert found.quartile_shares == (0.25, 0.0, 0.25, 0.5)  # of four heads
    assert found.overloaded == [(0, 0), (1, 0)]
    assert found.collapsed == [(0, 1)]
    assert "in every layer" in found.verdict


def test_a_softmax_is_given_as_a_form_or_its_text():
    query, key, value = make_qkv()
    as_text = entropy_attention(query, key, value, softmax="power-3")
    for a, b in zip(entropy_attention(query, key, value, softmax=SoftmaxForm("power", 3)), as_text):
        assert torch.equal(a, b)
    pattern = attention_pattern(query, key, softmax=SoftmaxForm("power", 3))
    assert torch.equal(pattern.distance, attention_pattern(query, key, softmax="power-3").distance)


def test_auto_passes_over_implementations_that_do_not_compute_a_softmax(monkeypatch):
    """A new form comes without compiled kernels first."""
    lesser = [each._replace(computes=frozenset({"exact"})) for each in attention.IMPLEMENTATIONS[:2]]
    monkeypatch.setattr(attention, "IMPLEMENTATIONS", (*lesser, *attention.IMPLEMENTATIONS[2:]))
    query, key, value = (x.detach().float() for x in make_qkv())
    output, _ = entropy_attention(query, key, value, softmax="power-3")
    expected, _ = entropy_attention(query, key, value, softmax="power-3", implementation="blockwise")
    assert torch.equal(output, expected)
    with pytest.raises(ValueError, match="'native' cannot run here: it does not compute the softmax power-3"):
        entropy_attention(query, key, value, softmax="power-3", implementation="native")
