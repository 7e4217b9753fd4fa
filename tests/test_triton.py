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
from exactness import assert_as_exact, everything, kernel, make

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
@pytest.mark.parametrize("iterations", [1, 5, 8, -1])
@pytest.mark.parametrize(("length", "width"), [(1, 32), (63, 48), (65, 100)])
def test_awkward_shapes_with_the_secure_softmax(length, width, iterations, is_causal):
    assert_as_exact("triton", *on_device(length, length, width), is_causal=is_causal, **kernel(iterations))


@pytest.mark.parametrize("iterations", [None, 3, -2])
@pytest.mark.parametrize(("queries", "keys"), [(1, 90), (5, 70), (7, 4), (40, 33)])
def test_queries_and_keys_of_different_length(queries, keys, iterations):
    assert_as_exact("triton", *on_device(queries, keys, 32), **kernel(iterations))


def sinks_of(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(DEVICE) * 2


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"),
    [(1, 70, 32, 8), (63, 63, 100, 36), (40, 33, 16, 48), (20, 20, 192, 128)],
)
def test_values_of_another_width(monkeypatch, passes, queries, keys, width, value_width, is_causal):
    from entropi.entropy import triton_kernel

    monkeypatch.setattr(triton_kernel, "ONE_PASS", passes == 1)
    for iterations in (None, 5, -1) if is_causal and queries == 40 else (None,):
        arguments = on_device(queries, keys, width, value_width=value_width)
        assert_as_exact("triton", *arguments, is_causal=is_causal, **kernel(iterations))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(1.5, False), (50.0, True), (None, True)])
@pytest.mark.parametrize(
    ("queries", "keys", "width", "value_width"), [(1, 70, 32, 32), (63, 63, 48, 48), (33, 40, 100, 36), (9, 4, 16, 16)]
)
def test_sinks_and_softcap(monkeypatch, passes, queries, keys, width, value_width, with_sinks, softcap):
    from entropi.entropy import triton_kernel

    monkeypatch.setattr(triton_kernel, "ONE_PASS", passes == 1)
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


@pytest.mark.parametrize("iterations", [None, 5, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain(dtype, iterations):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as if their bits were integers")
    assert_as_exact("triton", *on_device(65, 65, 64, dtype=dtype), dtype=dtype, **kernel(iterations))


@pytest.mark.parametrize("iterations", [None, 1, -1])
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
        options = dict(attn_mask=mask.to(DEVICE), is_causal=is_causal, **kernel(iterations))
        assert_as_exact("triton", *on_device(50, 70, 32), **options)


@pytest.mark.parametrize("iterations", [None, 4, 12, -1])
def test_large_logits_keep_the_entropy(iterations):
    (query, key, value), *rest = on_device(70, 70, 32)
    tensors = [query * 30, key + 5, value]
    assert_as_exact("triton", tensors, *rest, slack=1e-5, **kernel(iterations))


@pytest.fixture
def one_pass(monkeypatch):
    from entropi.entropy import triton_kernel

    monkeypatch.setattr(triton_kernel, "ONE_PASS", True)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("iterations", [None, -1, 3])
@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(1, 1, 32), (63, 63, 48), (65, 65, 100), (5, 70, 32), (40, 33, 64)]
)
def test_the_backward_in_one_pass(one_pass, queries, keys, width, iterations, is_causal):
    """t = 3 has to go through two passes, whatever is asked for."""
    assert_as_exact("triton", *on_device(queries, keys, width), is_causal=is_causal, **kernel(iterations))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_backward_in_one_pass_of_masked_and_sharp_rows(one_pass, dtype):
    mask = torch.rand(50, 70, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[17] = False
    (query, key, value), *rest = on_device(50, 70, 32, dtype=dtype)
    assert_as_exact("triton", [query, key, value], *rest, dtype=dtype, attn_mask=mask.to(DEVICE))
    # Beside logits of -170, those of keys that do not exist, 0, have infinite probabilities.
    assert_as_exact("triton", [query - 10, key + 3, value], *rest, dtype=dtype, is_causal=False, slack=1e-5)


def test_deterministic_algorithms_take_two_passes(one_pass, monkeypatch):
    from entropi.entropy import triton_kernel

    monkeypatch.setattr(triton_kernel, "_row_sum_kernel", None)
    torch.use_deterministic_algorithms(True)
    try:
        assert_as_exact("triton", *on_device(20, 20, 32))
    finally:
        torch.use_deterministic_algorithms(False)


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
    output, entropy = entropy_attention(query, key, value, implementation="triton", **kernel(iterations))
    assert output[0, 0, 20].isnan().all()
    assert entropy[0, 0, 20].isnan()
    assert torch.isfinite(output[0, 1]).all()


def test_asking_for_it_where_it_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 1, 2, 16)
    assert "CUDA" in available_implementations(query)["triton"]
    with pytest.raises(ValueError, match="'triton' cannot run here: it is for CUDA"):
        entropy_attention(query, query, query, implementation="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("iterations", [None, 5, -1])
@pytest.mark.parametrize(
    ("dtype", "length", "width", "is_causal"),
    [
        (torch.bfloat16, 300, 64, True),
        (torch.bfloat16, 300, 64, False),
        (torch.bfloat16, 300, 128, True),
        (torch.bfloat16, 2048, 64, True),
        (torch.bfloat16, 65, 100, True),
        (torch.float16, 300, 64, True),
        (torch.float32, 300, 64, True),
    ],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_tuned_kernels_on_a_gpu(monkeypatch, passes, dtype, length, width, is_causal, iterations):
    from entropi.entropy import triton_kernel

    monkeypatch.setattr(triton_kernel, "ONE_PASS", passes == 1)
    options = dict(dtype=dtype, is_causal=is_causal, **kernel(iterations))
    assert_as_exact("triton", *on_device(length, length, width, dtype=dtype), **options)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("length", "width", "value_width", "softcap", "with_sinks"),
    [(300, 192, 128, None, False), (300, 64, 64, None, True), (300, 256, 256, 50.0, False), (65, 100, 36, 20.0, True)],
)
@pytest.mark.parametrize("passes", [1, 2])
def test_tuned_kernels_of_real_models_on_a_gpu(
    monkeypatch, passes, length, width, value_width, softcap, with_sinks, dtype
):
    from entropi.entropy import triton_kernel

    monkeypatch.setattr(triton_kernel, "ONE_PASS", passes == 1)
    options = dict(dtype=dtype, softcap=softcap, sinks=sinks_of(1, 2, length) if with_sinks else None)
    assert_as_exact("triton", *on_device(length, length, width, dtype=dtype, value_width=value_width), **options)


@pytest.mark.slow
def test_the_gpu_script_runs_dry():
    """What waits for a GPU must not turn out to be broken when there is one."""
    script = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"
    done = subprocess.run([sys.executable, script, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout.splitlines()[-1])
    assert "collected" in parts["tests"]["outcome"]
    row = parts["attention T=32 D=16"]
    assert all(row[kind]["milliseconds"] > 0 for kind in ("sdpa", "exact", "one pass", "secure t=5"))
    assert all(parts["training step"][kind]["milliseconds"] > 0 for kind in ("gpt2", "entropi"))


@pytest.mark.slow
def test_the_sweep_of_tuning_choices_runs_dry():
    script = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"
    done = subprocess.run([sys.executable, script, "--sweep", "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["sweep"]
    assert {row["kernel"] for row in rows} == {"forward", "backward query", "backward key", "backward both"}
    assert all(row["milliseconds"] > 0 for row in rows)


# Compiled for GPUs that need not be there, in another process: Triton decides at import that it interprets.


def compiled(tmp_path, **options):
    arguments = [text for name, values in options.items() for text in (f"--{name}", *map(str, values))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).parents[1] / "benchmarks" / "compiled_kernels.py"
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_fit_for(rows):
    for row in rows:
        assert row["fits"], row
        assert row["products"] == ("none" if row["dtype"] == "fp32" else {90: "wgmma", 80: "mma"}[row["arch"]]), row


def test_kernels_compile_for_hopper(tmp_path):
    rows = compiled(tmp_path, arch=[90], dtype=["bf16"], width=[64], iterations=[0], first=[1])
    assert [row["kernel"] for row in rows] == ["forward", "backward query", "backward key", "backward both"]
    assert_fit_for(rows)
    assert all(row["spilled_bytes"] == 0 for row in rows)


@pytest.mark.slow
def test_no_tuning_choice_of_usual_heads_spills_registers(tmp_path):
    rows = compiled(tmp_path, arch=[90, 80], dtype=["bf16"], width=[64, 128], iterations=[0])
    assert {(row["arch"], row["width"]) for row in rows} == {(90, 64), (90, 128), (80, 64), (80, 128)}
    assert_fit_for(rows)
    # Both gradients in one kernel were fitted to sm_90.
    assert [r for r in rows if r["spilled_bytes"] and (r["arch"], r["kernel"]) != (80, "backward both")] == []


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "iterations"), [("bf16", 5), ("bf16", -1), ("fp16", 0), ("fp32", 0)])
def test_every_precision_and_an_odd_width_compile(tmp_path, dtype, iterations):
    rows = compiled(tmp_path, dtype=[dtype], width=[64, 128, 100], iterations=[iterations], first=[1])
    assert len(rows) == (18 if iterations > 0 else 24)  # three or four kernels, three widths, two architectures
    assert_fit_for(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (192, 128)])
def test_sinks_softcap_and_values_of_another_width_compile(tmp_path, width, value_width):
    options = {"width": [width], "value-width": [value_width], "softcap": [50.0], "sinks": []}
    rows = compiled(tmp_path, dtype=["bf16"], iterations=[0], first=[1], **options)
    assert len(rows) == 8  # four kernels, two architectures
    assert_fit_for(rows)
