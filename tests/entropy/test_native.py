"""The compiled CPU kernel against the definition in double precision: no worse than twice plain float32."""

import math
import subprocess
import sys

import pytest
import torch

from entropi.entropy import native
from entropi.entropy.attention import available_implementations, entropy_attention
from exactness import assert_as_exact, everything, make, squared

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"cannot run: {native.unavailable_reason()}"
)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("width", [8, 32, 48, 64, 100, 256])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 111, 300])
def test_awkward_shapes(length, width, is_causal):
    assert_as_exact("native", *make(length, length, width), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("iterations", [1, 5, 6, 16, -1, -3, "polynomial-2/keys"])
@pytest.mark.parametrize(("length", "width"), [(1, 8), (2, 32), (63, 48), (65, 100), (111, 256), (300, 64)])
def test_awkward_shapes_with_the_secure_softmax(length, width, iterations, is_causal):
    assert_as_exact("native", *make(length, length, width), is_causal=is_causal, **squared(iterations))


def sinks_of(heads, seed=5):
    return torch.randn(heads, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"),
    [(1, 1, 8, 3), (63, 63, 100, 36), (111, 111, 36, 100), (1, 200, 192, 128), (130, 170, 24, 64), (70, 50, 16, 48)],
)
@pytest.mark.parametrize("iterations", [None, 5, -1])
def test_values_of_another_width(queries, keys, width, value_width, iterations, is_causal):
    arguments = make(queries, keys, width, value_width=value_width)
    assert_as_exact("native", *arguments, is_causal=is_causal, **squared(iterations))


@pytest.mark.parametrize("softcap", [None, 1.5, 50.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"),
    [
        (1, 1, 8, 8),
        (2, 2, 32, 32),
        (63, 63, 48, 48),
        (111, 111, 100, 36),
        (300, 300, 64, 64),
        (1, 200, 64, 64),
        (9, 4, 8, 8),
    ],
)
def test_sinks_and_softcap(queries, keys, width, value_width, with_sinks, softcap):
    for is_causal in (True, False):
        options = dict(is_causal=is_causal, softcap=softcap, sinks=sinks_of(3) if with_sinks else None)
        assert_as_exact("native", *make(queries, keys, width, value_width=value_width), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(65, 65), (300, 300), (1, 200)])
def test_sinks_softcap_and_values_of_another_width_in_half_precision(products, dtype, queries, keys):
    """Sinks of rows: the error of a sum over rows would be one of few numbers, and compared by chance."""
    sinks = torch.randn(2, 3, queries, generator=torch.Generator().manual_seed(5))
    arguments = make(queries, keys, 40, dtype, value_width=72)
    assert_as_exact("native", *arguments, dtype=dtype, softcap=3.0, sinks=sinks)


def test_sinks_and_softcap_of_masked_rows_in_pieces():
    """Rows that see nothing but their sinks, sinks of rows, and more threads than heads."""
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(1, 1, 330, 300, generator=generator) > 0.3
    visible[:, :, [0, 3, 77]] = False
    added = torch.randn(330, 300, generator=generator).masked_fill(~visible, -math.inf)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for mask in (visible, added):
            for sinks in (sinks_of(1), torch.randn(1, 1, 330, generator=generator)):
                arguments = make(330, 300, 48, batch=1, heads=1, value_width=16)
                assert_as_exact("native", *arguments, attn_mask=mask, softcap=2.0, sinks=sinks)
    finally:
        torch.set_num_threads(threads)


def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_all():
    tensors, *rest = make(140, 140, 16)
    with_one = everything("native", tensors, *rest, torch.float32, sinks=torch.full((3,), -math.inf))
    without = everything("native", tensors, *rest, torch.float32)
    for got, expected in zip(with_one, without):
        assert torch.equal(got, expected)
    assert with_one[5].abs().max() == 0
    large = everything("native", tensors, *rest, torch.float32, sinks=torch.full((3,), 300.0))
    for got in large[:5]:
        assert got.abs().max() == 0


@pytest.mark.parametrize("iterations", [None, 5, -1])
def test_a_thousand_rows(iterations):
    assert_as_exact("native", *make(1000, 1000, 64, batch=1, heads=2), **squared(iterations))


@pytest.mark.parametrize("iterations", [None, 3, -1, "polynomial-1/keys", "polynomial-1/90"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 200), (5, 130), (7, 4), (200, 129), (49, 400)])
def test_queries_and_keys_of_different_length(queries, keys, iterations):
    assert_as_exact("native", *make(queries, keys, 32), **squared(iterations))


@pytest.mark.parametrize("iterations", [None, 5, -1, "polynomial-1/keys", "polynomial-1/90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [65, 300])
def test_half_precision_is_no_worse_than_plain(dtype, length, iterations):
    assert_as_exact("native", *make(length, length, 64, dtype), dtype=dtype, **squared(iterations))


@pytest.fixture(params=["of this processor", "tiles"])
def products(request, monkeypatch):
    """bfloat16 products by this processor's instructions, and by AMX's tiles carried out in software."""
    if request.param == "tiles":
        monkeypatch.setattr(native, "_load", lambda: native._build("-DTILES_IN_SOFTWARE"))
        assert not isinstance(native._load(), str)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("iterations", [None, 5, -1])
@pytest.mark.parametrize(
    ("queries", "keys", "width"),
    [(1, 1, 8), (2, 2, 32), (63, 63, 48), (65, 65, 100), (111, 111, 256), (300, 300, 64), (1, 200, 40), (200, 129, 33)],
)
def test_bfloat16_products(products, queries, keys, width, iterations, is_causal):
    # A scale that queries lose nothing by: else another key may have the largest logit, where gradients go for t > 0.
    options = dict(is_causal=is_causal, scale=0.125, **squared(iterations))
    assert_as_exact("native", *make(queries, keys, width, torch.bfloat16), torch.bfloat16, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [128, 300])
def test_rows_are_read_where_they_lie(products, length, dtype):
    """Whole blocks are not copied: heads side by side, rows an odd number apart, rows that are all the same."""
    tensors, grad_output, grad_entropy = make(length, length, 64, dtype)
    for layout in ("heads side by side", "odd", "repeated"):
        if layout == "odd":
            strided = [torch.nn.functional.pad(x, (0, 1))[..., :64] for x in tensors]
        elif layout == "repeated":
            strided = [tensors[0], *(x[:, :, :1].expand(-1, -1, length, -1) for x in tensors[1:])]
        else:
            strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        results = []
        for inputs in (strided, [x.contiguous() for x in strided]):
            inputs = [x.detach().requires_grad_() for x in inputs]
            both = entropy_attention(*inputs, implementation="native")
            incoming = [grad_output.to(dtype), grad_entropy]
            results.append([*both, *torch.autograd.grad(both, inputs, incoming)])
        for got, expected in zip(*results):
            assert torch.equal(got, expected), layout


@pytest.mark.parametrize("iterations", [None, 2, -1])
def test_bfloat16_products_of_masked_rows_in_pieces(products, iterations):
    """Rows that see nothing, and more threads than heads."""
    visible = torch.rand(1, 1, 330, 300, generator=torch.Generator().manual_seed(3)) > 0.3
    visible[:, :, [0, 3, 77]] = False
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        arguments = make(330, 300, 48, torch.bfloat16, batch=1, heads=1)
        assert_as_exact("native", *arguments, torch.bfloat16, attn_mask=visible, scale=0.125, **squared(iterations))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("iterations", [None, 8])
def test_bfloat16_products_let_what_is_not_a_number_through(products, iterations):
    (query, key, value), *_ = make(150, 150, 16, torch.bfloat16)
    query[0, 0, 70, 3] = math.nan
    output, entropy = entropy_attention(query, key, value, implementation="native", **squared(iterations))
    assert output[0, 0, 70].isnan().all()
    assert entropy[0, 0, 70].isnan()
    assert torch.isfinite(output[0, 1]).all()


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 150, 170), (2, 1, 1, 170), (1, 3, 150, 170), (150, 170), (170,)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_masks_broadcast(shape, additive, is_causal):
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(shape, generator=generator) > 0.4
    mask = visible
    if additive:
        mask = torch.randn(shape, generator=generator).masked_fill(~visible, -math.inf)
    for iterations in (None, 2, -1, "polynomial-1/keys", "polynomial-1/90"):
        options = dict(attn_mask=mask, is_causal=is_causal, **squared(iterations))
        assert_as_exact("native", *make(150, 170, 24), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_masks_that_have_to_be_converted(dtype):
    """What they are converted to has to outlive the kernel, which only knows where it lies."""
    tensors, *rest = make(60, 70, 24)
    mask = torch.randn(2, 3, 60, 70, generator=torch.Generator().manual_seed(4)).to(dtype)
    found, expected = (
        everything("native", tensors, *rest, torch.float32, attn_mask=m, is_causal=False) for m in (mask, mask.float())
    )
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("iterations", [None, 1, 8, -1, "polynomial-1/keys", "polynomial-1/90"])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_that_see_nothing(additive, iterations):
    visible = torch.ones(140, 140, dtype=torch.bool)
    visible[[0, 3, 77]] = False
    mask = torch.zeros(140, 140).masked_fill(~visible, -math.inf) if additive else visible
    tensors, grad_output, grad_entropy = make(140, 140, 16)
    options = dict(attn_mask=mask, is_causal=False, **squared(iterations))
    assert_as_exact("native", tensors, grad_output, grad_entropy, **options)
    output, entropy = entropy_attention(*tensors, **options, implementation="native")
    assert output[:, :, [0, 3, 77]].abs().max() == 0
    assert entropy[:, :, [0, 3, 77]].abs().max() == 0


@pytest.mark.parametrize("iterations", [None, 4, 8, 12, -1])
def test_large_logits_keep_the_entropy(iterations):
    (query, key, value), *rest = make(200, 200, 32)
    tensors = [query * 30, key + 5, value]
    assert_as_exact("native", tensors, *rest, slack=1e-5, **squared(iterations))


def test_large_logits_keep_the_entropy_under_a_softcap_and_with_sinks():
    (query, key, value), *rest = make(200, 200, 32)
    for sinks in (sinks_of(3), sinks_of(3) + 50, None):
        options = dict(softcap=50.0, sinks=sinks)
        assert_as_exact("native", [query * 30, key + 5, value], *rest, slack=1e-5, **options)
        assert_as_exact("native", [query * 30, key + 5, value], *rest, slack=1e-5, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masks_of_another_dtype(dtype):
    """They are converted, and what they become has to live as long as the kernel runs."""
    mask = torch.randn(2, 3, 150, 170, generator=torch.Generator().manual_seed(3)).to(dtype)
    arguments = make(150, 170, 24)
    got = everything("native", *arguments, torch.float32, attn_mask=mask)
    for a, b in zip(got, everything("native", *arguments, torch.float32, attn_mask=mask.float())):
        assert torch.equal(a, b)


def test_grouped_queries_and_strided_inputs():
    tensors, grad_output, grad_entropy = make(70, 70, 16, heads=4)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    assert strided[0].stride() != tensors[0].stride()
    for got, expected in zip(
        everything("native", strided, grad_output, grad_entropy, torch.float32),
        everything("native", tensors, grad_output, grad_entropy, torch.float32),
    ):
        assert torch.equal(got, expected)
    query, key, value = tensors
    shared = entropy_attention(query, key[:, :2], value[:, :2], enable_gqa=True, implementation="native")
    repeated = [x[:, :2].repeat_interleave(2, dim=1) for x in (key, value)]
    assert torch.equal(shared[0], entropy_attention(query, *repeated, implementation="native")[0])


@pytest.mark.parametrize("iterations", [None, 4])
def test_temperature_has_gradients(iterations):
    (query, key, value), grad_output, grad_entropy = make(40, 40, 16)
    results = []
    for implementation in ("reference", "native"):
        temperature = (torch.arange(120.0).reshape(3, 40) / 120 + 0.5).requires_grad_()
        options = dict(temperature=temperature, implementation=implementation, **squared(iterations))
        output, entropy = entropy_attention(query, key, value, **options)
        results.append(torch.autograd.grad([output, entropy], temperature, [grad_output, grad_entropy])[0])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("iterations", [None, 5])
def test_results_do_not_depend_on_the_number_of_threads(iterations):
    arguments = make(600, 600, 32, batch=1, heads=2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(everything("native", *arguments, torch.float32, **squared(iterations)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("iterations", [None, 1, 5])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (65, 700), (400, 257)])
def test_more_threads_than_heads_share_the_backward_pass(queries, keys, iterations):
    """As exact as one thread, with key blocks that no piece or an odd number of pieces has."""
    mask = torch.rand(queries, keys, generator=torch.Generator().manual_seed(3)) > 0.3
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for options in ({}, {"attn_mask": mask, "is_causal": False}):
            arguments = make(queries, keys, 40, batch=1, heads=1)
            assert_as_exact("native", *arguments, **squared(iterations), **options)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("iterations", [None, 5, 8, -1])
def test_not_a_number_is_not_hidden(iterations):
    (query, key, value), *_ = make(150, 150, 16)
    query[0, 0, 70, 3] = math.nan
    output, entropy = entropy_attention(query, key, value, implementation="native", **squared(iterations))
    assert output[0, 0, 70].isnan().all()
    assert entropy[0, 0, 70].isnan()
    assert torch.isfinite(output[0, 1]).all()


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": torch.zeros(3)}, {"softmax": "power-5"}])
def test_not_a_number_is_not_hidden_by_a_mask(additive, options):
    (query, key, value), *_ = make(150, 150, 16)
    query[0, 0, 70, 3] = math.nan
    mask = torch.zeros(150, 150) if additive else torch.ones(150, 150, dtype=torch.bool)
    for implementation in ("native", "blockwise", "reference"):
        output, entropy = entropy_attention(query, key, value, attn_mask=mask, implementation=implementation, **options)
        assert output[0, 0, 70].isnan().all()
        assert entropy[0, 0, 70].isnan()
        assert torch.isfinite(output[0, 1]).all()


def test_a_sink_that_is_not_a_number_is_not_hidden():
    tensors, *_ = make(150, 150, 16)
    for implementation in ("native", "blockwise", "reference"):
        sinks = torch.tensor([0.0, math.nan, 0.0])
        output, entropy = entropy_attention(*tensors, sinks=sinks, implementation=implementation)
        assert output[:, 1].isnan().all()
        assert entropy[:, 1].isnan().all()
        assert torch.isfinite(output[:, ::2]).all()


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 20.0, "sinks": True}, {"softmax": "power-5"}, {"softmax": "polynomial-1/keys"}]
)
def test_compiled_without_graph_breaks(options):
    (query, key, value), grad_output, grad_entropy = make(70, 70, 16, value_width=12)
    mask = torch.rand(2, 1, 1, 70, generator=torch.Generator().manual_seed(1)) > 0.1
    options = dict(options)
    sinks = [sinks_of(3)] if options.pop("sinks", False) else []

    def loss(q, k, v, s=None):
        output, entropy = entropy_attention(q, k, v, sinks=s, attn_mask=mask, **options)
        return (output * grad_output).sum() + (entropy * grad_entropy).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (query, key, value, *sinks)]
        results.append(torch.autograd.grad(function(*inputs), inputs))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # opcheck looks there
def test_the_operator_is_registered_correctly():
    (query, key, value), *_ = make(20, 20, 8)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(native.operator, (*inputs, None, None, None, True, 0, 0, None))
    torch.library.opcheck(native.operator, (*inputs, None, None, None, True, 5, 0, None))
    seen = torch.arange(1.0, 21.0)[None, None]
    torch.library.opcheck(native.operator, (*inputs, None, None, seen, True, 0, 1, None))
    inputs[2] = torch.randn(2, 3, 20, 12, requires_grad=True)
    sinks = torch.randn(3, 1, requires_grad=True).expand(2, 3, 20)
    torch.library.opcheck(native.operator, (*inputs, None, sinks, None, True, 0, 0, 20.0))


@pytest.mark.slow
@pytest.mark.parametrize("softmax", ["exact", "power-5"])
def test_memory_is_linear_in_length(softmax):
    """At 16,384 rows the T x T matrix of one head alone would be a gigabyte."""
    program = """
import torch
from entropi.entropy.attention import entropy_attention
q = torch.randn(1, 1, 16384, 32, requires_grad=True)
options = dict(implementation="native", softmax=%r)
entropy_attention(q[:, :, :64], q[:, :, :64], q[:, :, :64], **options)
def peak():  # not getrusage's figure: a child inherits that from its parent
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) // 1024
before = peak()
output, entropy = entropy_attention(q, q, q, **options)
(output.sum() + entropy.sum()).backward()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program % softmax], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 200


def test_dispatch_can_be_inspected(monkeypatch):
    query = torch.zeros(1, 1, 2, 4)
    able = available_implementations(query)
    assert [name for name, reason in able.items() if reason is None][-3:] == ["native", "blockwise", "reference"]
    double = query.double()
    assert "float64" in available_implementations(double)["native"]
    with pytest.raises(ValueError, match=r"'native' cannot run here: .*float64"):
        entropy_attention(double, double, double, implementation="native")


def test_without_a_compiler_blockwise_takes_over(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: "no C++ compiler was found")
    tensors, *_ = make(9, 9, 4)
    output, _ = entropy_attention(*tensors)
    torch.testing.assert_close(output, entropy_attention(*tensors, implementation="reference")[0])
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        entropy_attention(*tensors, implementation="native")
