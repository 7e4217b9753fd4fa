"""The Triton kernel against the definition: on a GPU where there is one, else on the CPU through the interpreter."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entropi.entropy.attention import available_implementations, entropy_attention
from exactness import assert_as_exact, everything, make, squared

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(queries, keys, width, **options):
    tensors, grad_output, grad_entropy = make(queries, keys, width, batch=1, heads=2, **options)
    return [x.to(DEVICE) for x in tensors], grad_output.to(DEVICE), grad_entropy.to(DEVICE)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("length", "width"), [(1, 32), (2, 64), (63, 48), (65, 100), (111, 32)])
def test_awkward_shapes(length, width, is_causal):
    assert_as_exact("triton", *on_device(length, length, width), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("iterations", [1, 5, 8, -1, "polynomial-2/keys"])
@pytest.mark.parametrize(("length", "width"), [(1, 32), (63, 48), (65, 100)])
def test_awkward_shapes_with_the_secure_softmax(length, width, iterations, is_causal):
    assert_as_exact("triton", *on_device(length, length, width), is_causal=is_causal, **squared(iterations))


@pytest.mark.parametrize("iterations", [None, 3, -2, "polynomial-1/keys"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 90), (5, 70), (7, 4), (40, 33)])
def test_queries_and_keys_of_different_length(queries, keys, iterations):
    assert_as_exact("triton", *on_device(queries, keys, 32), **squared(iterations))


def sinks_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(DEVICE) * 2


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"),
    [(1, 70, 32, 8), (63, 63, 100, 36), (40, 33, 16, 48), (20, 20, 192, 128)],
)
def test_values_of_another_width(queries, keys, width, value_width, is_causal):
    for iterations in (None, 5, -1) if is_causal and queries == 40 else (None,):
        arguments = on_device(queries, keys, width, value_width=value_width)
        assert_as_exact("triton", *arguments, is_causal=is_causal, **squared(iterations))


@pytest.mark.parametrize(("softcap", "with_sinks"), [(1.5, False), (50.0, True), (None, True)])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"), [(1, 70, 32, 32), (63, 63, 48, 48), (33, 40, 100, 36), (9, 4, 16, 16)]
)
def test_sinks_and_softcap(queries, keys, width, value_width, with_sinks, softcap):
    options = dict(is_causal=queries != 33, softcap=softcap, sinks=sinks_of(2) if with_sinks else None)
    assert_as_exact("triton", *on_device(queries, keys, width, value_width=value_width), **options)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("sink_shape", [(2,), (1, 1, 50)])
def test_sinks_and_softcap_of_masked_rows(additive, sink_shape):
    """Rows that see nothing but their sinks, of which one is none."""
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(1, 1, 50, 70, generator=generator) > 0.4
    visible[..., [5, 17], :] = False
    mask = torch.randn(50, 70, generator=generator).masked_fill(~visible, -math.inf) if additive else visible
    sinks = sinks_of(*sink_shape)
    sinks[..., 0] = -math.inf
    options = dict(attn_mask=mask.to(DEVICE), is_causal=False, softcap=2.0, sinks=sinks)
    assert_as_exact("triton", *on_device(50, 70, 32), **options)


def test_sinks_softcap_and_values_of_another_width_in_half_precision():
    arguments = on_device(65, 65, 64, dtype=torch.float16, value_width=24)
    assert_as_exact("triton", *arguments, dtype=torch.float16, softcap=3.0, sinks=sinks_of(1, 2, 65))


def test_a_sink_that_is_not_a_number_is_not_hidden():
    tensors, *_ = on_device(40, 40, 32)
    sinks = torch.tensor([0.0, math.nan], device=DEVICE)
    output, entropy = entropy_attention(*tensors, sinks=sinks, implementation="triton")
    assert output[:, 1].isnan().all()
    assert entropy[:, 1].isnan().all()
    assert torch.isfinite(output[:, 0]).all()


@pytest.mark.parametrize("iterations", [None, 5, -1, "polynomial-1/keys"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain(dtype, iterations):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as if their bits were integers")
    assert_as_exact("triton", *on_device(65, 65, 64, dtype=dtype), dtype=dtype, **squared(iterations))


@pytest.mark.parametrize("iterations", [None, 1, -1, "polynomial-1/keys"])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 50, 70), (1, 1, 1, 70), (50, 70)])
def test_masks_broadcast_and_rows_may_see_nothing(shape, additive, iterations):
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(shape, generator=generator) > 0.4
    if shape[-2] > 1:
        visible[..., 17, :] = False
    mask = visible
    if additive:
        mask = torch.randn(shape, generator=generator).masked_fill(~visible, -math.inf)
    for is_causal in (True, False) if iterations is None else (True,):
        options = dict(attn_mask=mask.to(DEVICE), is_causal=is_causal, **squared(iterations))
        assert_as_exact("triton", *on_device(50, 70, 32), **options)


@pytest.mark.parametrize("iterations", [None, 4, 12, -1])
def test_large_logits_keep_the_entropy(iterations):
    (query, key, value), *rest = on_device(70, 70, 32)
    tensors = [query * 30, key + 5, value]
    assert_as_exact("triton", tensors, *rest, slack=1e-5, **squared(iterations))


@pytest.mark.parametrize("iterations", [None, 3])
@pytest.mark.parametrize(("queries", "keys", "masked"), [(128, 128, False), (128, 256, True)])
def test_even_lengths_are_not_checked(queries, keys, masked, iterations):
    mask = torch.rand(queries, keys, generator=torch.Generator().manual_seed(3)).to(DEVICE) > 0.4 if masked else None
    arguments = on_device(queries, keys, 16)
    for is_causal in (True, False):
        assert_as_exact("triton", *arguments, is_causal=is_causal, attn_mask=mask, **squared(iterations))


@pytest.mark.parametrize(
    "options",
    [{}, {"softmax": "power-3"}, {"softcap": 1.5}, {"sinks": True}, {"mask": True}, {"temperature": True}],
)
@pytest.mark.parametrize("scale", [0.7, -0.2, 0.0, 1e-6, 2])
def test_scales_are_those_of_the_definition(scale, options):
    """Whether the kernel applies them or, outside its range, something else does."""
    options = dict(options)
    if options.pop("mask", False):
        options["attn_mask"] = torch.randn(40, 50, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    if options.get("sinks"):
        options["sinks"] = sinks_of(2)
    if options.get("temperature"):
        options["temperature"] = torch.tensor([[0.5], [3.0]], device=DEVICE).expand(2, 40)
    assert_as_exact("triton", *on_device(40, 50, 16), scale=scale, **options)


def test_strided_inputs():
    tensors, *rest = on_device(40, 40, 32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for a, b in zip(
        everything("triton", strided, *rest, torch.float32), everything("triton", tensors, *rest, torch.float32)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("iterations", [None, 5, -1])
def test_not_a_number_is_not_hidden(iterations):
    (query, key, value), *_ = on_device(40, 40, 32)
    query[0, 0, 20, 3] = math.nan
    output, entropy = entropy_attention(query, key, value, implementation="triton", **squared(iterations))
    assert output[0, 0, 20].isnan().all()
    assert entropy[0, 0, 20].isnan()
    assert torch.isfinite(output[0, 1]).all()


def test_asking_for_it_where_it_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 1, 2, 16)
    assert "CUDA" in available_implementations(query)["triton"]
    with pytest.raises(ValueError, match="'triton' cannot run here: it is for CUDA"):
        entropy_attention(query, query, query, implementation="triton")


# On a GPU only. Every kernel of every kind has to be compiled, which takes most of the time: one tuning choice each.


@pytest.fixture
def untuned(monkeypatch):
    from entropi.entropy import triton_kernel

    first = {
        kernel: {kind: of_kind[:1] for kind, of_kind in kinds.items()}
        for kernel, kinds in triton_kernel.CHOICES.items()
    }
    monkeypatch.setattr(triton_kernel, "CHOICES", first)
    monkeypatch.setattr(triton_kernel, "_CHOSEN", {})


on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("dtype", "length", "width", "options"),
    [
        (torch.bfloat16, 300, 64, {}),
        (torch.bfloat16, 300, 64, {"is_causal": False}),
        (torch.bfloat16, 512, 64, {}),
        (torch.bfloat16, 300, 128, {}),
        (torch.bfloat16, 65, 100, {}),
        (torch.float16, 300, 64, {}),
        (torch.float32, 300, 64, {}),
        (torch.bfloat16, 300, 64, squared(5)),
        (torch.bfloat16, 512, 128, squared(5)),
        (torch.float32, 300, 64, squared(5)),
        (torch.bfloat16, 300, 64, squared(-1)),
        (torch.float32, 300, 64, squared(-1)),
        (torch.bfloat16, 300, 64, squared("polynomial-1/keys")),
    ],
)
def test_kernels_on_a_gpu(untuned, dtype, length, width, options):
    assert_as_exact("triton", *on_device(length, length, width, dtype=dtype), dtype=dtype, **options)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("dtype", "length", "width", "value_width", "softcap", "with_sinks"),
    [
        (torch.bfloat16, 300, 192, 128, None, False),
        (torch.bfloat16, 300, 64, 64, None, True),
        (torch.bfloat16, 300, 256, 256, 50.0, False),
        (torch.float32, 65, 100, 36, 20.0, True),
    ],
)
def test_kernels_of_real_models_on_a_gpu(untuned, dtype, length, width, value_width, softcap, with_sinks):
    options = dict(dtype=dtype, softcap=softcap, sinks=sinks_of(1, 2, length) if with_sinks else None)
    assert_as_exact("triton", *on_device(length, length, width, dtype=dtype, value_width=value_width), **options)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_masks_on_a_gpu(untuned, kind):
    visible = torch.rand(200, 300, generator=torch.Generator().manual_seed(3)) > 0.4
    visible[17] = False
    mask = visible if kind == "boolean" else torch.zeros(200, 300).masked_fill(~visible, -math.inf)
    arguments = on_device(200, 300, 64, dtype=torch.bfloat16)
    assert_as_exact("triton", *arguments, dtype=torch.bfloat16, attn_mask=mask.to(DEVICE))


@pytest.mark.gpu
@on_gpu
def test_the_tuner_takes_one_of_its_choices():
    from entropi.entropy import triton_kernel

    arguments = on_device(1024, 1024, 64, dtype=torch.bfloat16)
    assert_as_exact("triton", *arguments, dtype=torch.bfloat16)
    taken = {key[0]: choice for key, choice in triton_kernel._CHOSEN.items()}
    for name, choice in taken.items():
        blocks = (choice.kwargs["ROWS"], choice.kwargs["KEYS"], choice.num_warps, choice.num_stages)
        assert blocks in triton_kernel.CHOICES[name]["64"]


@pytest.mark.gpu
@on_gpu
def test_compiled_without_graph_breaks_on_a_gpu(untuned):
    (query, key, value), *_ = on_device(128, 128, 64, dtype=torch.bfloat16)

    def loss(q, k, v):
        output, entropy = entropy_attention(q, k, v, implementation="triton")
        return output.float().square().mean() + entropy.mean()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        gradients.append(torch.autograd.grad(function(*inputs), inputs))
    for eager, compiled in zip(*gradients):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.slow
def test_the_gpu_script_runs_dry():
    """What waits for a GPU must not turn out to be broken when there is one."""
    script = Path(__file__).parents[2] / "benchmarks" / "on_gpu.py"
    done = subprocess.run([sys.executable, script, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    assert "collected" in found["tests"]["outcome"]
    row = found["attention T=32 D=16"]
    assert all(row[kind][key] > 0 for kind in ("sdpa", "exact", "secure t=5") for key in ("milliseconds", "single"))
    assert all(found["training step"][kind]["milliseconds"] > 0 for kind in ("gpt2", "entropi"))
    assert {row["kernel"] for row in found["sweep"]} == {"forward", "backward query", "backward key"}
    assert all(row["milliseconds"] > 0 for row in found["sweep"])


# Compiled for GPUs that need not be there, in another process: Triton decides at import that it interprets.


def compiled(tmp_path, **options):
    arguments = [text for name, values in options.items() for text in (f"--{name}", *map(str, values))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).parents[2] / "benchmarks" / "compiled_kernels.py"
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_fit_for(rows):
    for row in rows:
        assert row["fits"], row
        assert row["products"] == ("none" if row["dtype"] == "fp32" else {90: "wgmma", 80: "mma"}[row["arch"]]), row


@pytest.mark.slow
def test_no_tuning_choice_of_usual_heads_spills_registers(tmp_path):
    rows = compiled(tmp_path, arch=[90, 80], dtype=["bf16"], width=[64, 128], iterations=[0])
    assert len({(row["kernel"], row["arch"], row["width"]) for row in rows}) == 12  # three kernels, for each of four
    assert {(row["arch"], row["width"]) for row in rows} == {(90, 64), (90, 128), (80, 64), (80, 128)}
    assert_fit_for(rows)
    # The fastest on an H100; an sm_80 has two others to choose from.
    fitted = {"kernel": "backward query", "width": 64, "arch": 80, "choice": [64, 128, 4, 3]}
    assert [row for row in rows if row["spilled_bytes"] and {key: row[key] for key in fitted} != fitted] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "iterations", "widths"),
    [("bf16", 5, [128, 100]), ("bf16", -1, [64, 128]), ("fp16", 0, [64, 100]), ("fp32", 0, [128])],
)
def test_every_precision_and_an_odd_width_compile(tmp_path, dtype, iterations, widths):
    rows = compiled(tmp_path, dtype=[dtype], width=widths, iterations=[iterations], first=[1])
    assert len(rows) == 6 * len(widths)  # three kernels, two architectures
    assert_fit_for(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (192, 128)])
def test_sinks_softcap_and_values_of_another_width_compile(tmp_path, width, value_width):
    options = {"width": [width], "value-width": [value_width], "softcap": [50.0], "sinks": []}
    rows = compiled(tmp_path, dtype=["bf16"], iterations=[0], first=[1], **options)
    assert len(rows) == 6  # three kernels, two architectures
    assert_fit_for(rows)
