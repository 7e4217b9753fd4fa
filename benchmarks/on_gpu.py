"""Everything that waits for a GPU, in one run of less than eight minutes: tests, times, memory.

    python benchmarks/on_gpu.py [--minutes 8] [--dry-run]
    python benchmarks/on_gpu.py --sweep [--minutes 8] [--dry-run]

Needs a checkout and Python packages (torch with CUDA, its Triton; pytest for the tests, transformers for the training
step), no installation. In order, as time allows: the tests marked `gpu`; forward and backward of `entropy_attention` in
bfloat16, causal, with the exact softmax (its gradients in two passes and in one) and the secure one, against
scaled_dot_product_attention's flash kernel without entropy; one training step of GPT-2 small's shape with the entropy
regulariser against the same step without. A part that fails says so and the rest goes on. Ends with one table and a
last line of JSON; status 1 if a part failed.

`--sweep` asks instead which tuning choices are fastest: blocks, warps and stages of each kernel, the other kernels left
as they are, compiled by all cores at once and then timed one after the other. `CHOICES` of the kernel's module is where
the answer belongs. `--dry-run` does either at toy sizes on a CPU, so that the script itself can be tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from entropi.entropy.attention import entropy_attention  # noqa: E402

KERNELS = ("forward", "backward query", "backward key", "backward both")
KINDS = ("sdpa", "exact", "one pass", "secure t=5")
TOKENS, WIDTH = 16384, 2048  # batch x length and heads x head width, whatever the two are: the same work per T


def milliseconds(run: Callable[[], object], cuda: bool, rounds: int) -> list[float]:
    """Times of so many calls after a warm-up, on the device's own clock where there is one."""
    for _ in range(2 if not cuda else 5):
        run()
    times = []
    for _ in range(rounds):
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            run()
            times.append((time.perf_counter() - started) * 1e3)
    return times


def tests(dry: bool, seconds: float) -> dict[str, Any]:
    """The tests that need a GPU; a dry run only finds them."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", str(ROOT / "tests" / "test_triton.py")]
    command += ["--collect-only"] if dry else []
    if not dry and importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        command += ["-n", str(max(1, (os.cpu_count() or 2) - 2))]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    return {"outcome": done.stdout.strip().splitlines()[-1]}


def attention(length: int, width: int, dry: bool) -> dict[str, Any]:
    """Forward and backward at one size: median milliseconds, TFLOP/s, megabytes beyond inputs and gradients."""
    from entropi.entropy import triton_kernel

    device = "cpu" if dry else "cuda"
    tokens, total = (2 * length, 2 * width) if dry else (TOKENS, WIDTH)
    shape = (max(1, tokens // length), total // width, length, width)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad, grad_entropy = torch.randn_like(inputs[0]), torch.randn(shape[:3], device=device)

    def flash() -> tuple[torch.Tensor]:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return (torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True),)

    forwards: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
        "sdpa": flash,
        "exact": lambda: entropy_attention(*inputs),
        "one pass": lambda: entropy_attention(*inputs),
        "secure t=5": lambda: entropy_attention(*inputs, exp_iterations=5),
    }

    def both_ways(name: str) -> Callable[[], object]:
        incoming = [grad] if name == "sdpa" else [grad, grad_entropy]
        return lambda: torch.autograd.grad(forwards[name](), inputs, incoming)

    # Two products forward, five backward, half of each under the causal mask.
    flops = 7 * shape[0] * shape[1] * length * length * width
    row: dict[str, Any] = {"length": length, "width": width, "shape": shape}
    for name, forward_alone in forwards.items():
        triton_kernel.ONE_PASS = name == "one pass"
        run = both_ways(name)
        median = statistics.median(milliseconds(run, not dry, 3 if dry else 15))
        with torch.no_grad():
            forward = statistics.median(milliseconds(forward_alone, not dry, 3 if dry else 15))
        row[name] = {"milliseconds": median, "forward": forward, "tflops": flops / median / 1e9}
        if not dry:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            row[name]["megabytes"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    triton_kernel.ONE_PASS = False
    return row


def training(dry: bool) -> dict[str, Any]:
    """A training step with and without entropy, one after the other: median milliseconds and peak megabytes."""
    from training_step import make_step

    device, batch, length = ("cpu", 2, 32) if dry else ("cuda", 8, 1024)
    small = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 64} if dry else {}
    found: dict[str, Any] = {"batch": batch, "length": length}
    for name in ("gpt2", "entropi"):
        step = make_step(name, batch, length, device, small)
        times = milliseconds(step, not dry, 3 if dry else 12)
        found[name] = {"milliseconds": statistics.median(times)}
        if not dry:
            torch.cuda.reset_peak_memory_stats()
            step()
            found[name]["megabytes"] = torch.cuda.max_memory_allocated() / 2**20
        del step
        if not dry:
            torch.cuda.empty_cache()
    return found


def candidates(kernel: str) -> list[tuple[int, int, int, int]]:
    """Tuning choices worth a try on a Hopper: (ROWS, KEYS, warps, stages)."""
    if kernel in ("backward key", "backward both"):
        blocks = [(32, 64), (64, 64), (32, 128), (64, 128), (128, 64)]
    else:
        blocks = [(64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)]
    return [(*block, warps, stages) for block in blocks for warps, stages in itertools.product((4, 8), (2, 3, 4))]


def try_choice(
    task: tuple[str, tuple[int, int, int, int], int, int, tuple[int, int], bool, int],
) -> tuple[float | None, str]:
    """Median milliseconds of the pass that a kernel is part of under one tuning choice, or why it cannot run."""
    kernel, (rows, keys, warps, stages), length, width, sizes, dry, rounds = task
    import triton

    from entropi.entropy import triton_kernel

    tuned = {
        "forward": triton_kernel._forward_kernel,
        "backward query": triton_kernel._backward_query_kernel,
    }.get(kernel, triton_kernel._backward_key_kernel)
    before = tuned.configs
    triton_kernel.ONE_PASS = kernel == "backward both"
    tuned.configs = [triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)]
    try:
        torch.manual_seed(0)
        device = "cpu" if dry else "cuda"
        dtype = torch.float16 if dry else torch.bfloat16  # the interpreter cannot multiply bfloat16
        inputs = [torch.randn(*sizes, length, width, device=device, dtype=dtype).requires_grad_() for _ in range(3)]

        def forward() -> tuple[torch.Tensor, ...]:
            return entropy_attention(*inputs, implementation="triton")

        results = forward()
        incoming = [torch.ones_like(result) for result in results]
        if kernel == "forward":
            with torch.no_grad():
                return statistics.median(milliseconds(forward, not dry, rounds)), ""
        run = lambda: torch.autograd.grad(results, inputs, incoming, retain_graph=True)  # noqa: E731
        return statistics.median(milliseconds(run, not dry, rounds)), ""
    except Exception as error:  # too much shared memory, or what the compiler will not do
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        tuned.configs, triton_kernel.ONE_PASS = before, False


def sweep(dry: bool, deadline: float) -> list[dict[str, Any]]:
    """Every candidate of every kernel at widths 64 and 128, T = 4,096: compiled side by side, then timed in turn."""
    length, widths, rounds = (32, [16], 1) if dry else (4096, [64, 128], 10)
    tasks = []
    for width in widths:
        sizes = (1, 1) if dry else (TOKENS // length, WIDTH // width)
        for kernel in KERNELS:
            chosen = candidates(kernel)[:2] if dry else candidates(kernel)
            tasks += [(kernel, choice, length, width, sizes, dry, rounds) for choice in chosen]
    if not dry:  # what a process has compiled, the others find in Triton's cache
        with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
            small = [(kernel, choice, length, width, (1, 1), dry, 1) for kernel, choice, length, width, *_ in tasks]
            pending = [pool.apply_async(try_choice, (task,)) for task in small]
            for result in pending:
                result.wait(max(0.0, deadline - 90 - time.monotonic()))
            pool.terminate()
    found = []
    for task in tasks:
        if time.monotonic() > deadline - 20 and not dry:
            print("no time left for the rest", file=sys.stderr)
            break
        median, reason = try_choice(task)
        found.append({"kernel": task[0], "width": task[3], "choice": task[1], "milliseconds": median, "reason": reason})
    for width, kernel in itertools.product(widths, KERNELS):
        ran = [row for row in found if (row["width"], row["kernel"]) == (width, kernel) and row["milliseconds"]]
        ran.sort(key=lambda row: row["milliseconds"])
        best = "  ".join(f"{row['choice']} {row['milliseconds']:.3f} ms" for row in ran[:4])
        print(f"D={width} {kernel:14} {len(ran)} ran; {best}")
    return found


def table(parts: dict[str, Any]) -> list[str]:
    lines = []
    for name, part in parts.items():
        if "error" in part:
            lines.append(f"{name}: FAILED, {part['error'].strip().splitlines()[-1]}")
        elif "sdpa" in part:
            floor = part["sdpa"]["milliseconds"]
            cells = (
                f"{kind} {part[kind]['milliseconds']:.2f} ms ({part[kind]['milliseconds'] / floor:.2f}x, "
                f"forward {part[kind]['forward'] / part['sdpa']['forward']:.2f}x, "
                f"{part[kind]['tflops']:.0f} TFLOP/s, {part[kind].get('megabytes', 0):.0f} MB)"
                for kind in KINDS
            )
            lines.append(f"{name}: {'  '.join(cells)}")
        elif "gpt2" in part:
            plain, ours = part["gpt2"], part["entropi"]
            lines.append(
                f"{name}: without {plain['milliseconds']:.1f} ms, {plain.get('megabytes', 0):.0f} MB; with regulariser "
                f"{ours['milliseconds']:.1f} ms, {ours.get('megabytes', 0):.0f} MB; "
                f"ratio {ours['milliseconds'] / plain['milliseconds']:.3f}"
            )
        else:
            lines.append(f"{name}: {part.get('outcome') or part.get('skipped')}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--sweep", action="store_true", help="time tuning choices instead")
    options = parser.parse_args()
    if options.sweep and options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    dry, deadline = options.dry_run, time.monotonic() + 60 * options.minutes
    if not dry and not torch.cuda.is_available():
        print("no CUDA device: --dry-run checks the script without one", file=sys.stderr)
        return 2
    device = "CPU, dry run" if dry else torch.cuda.get_device_name()
    if options.sweep:
        print(f"{device}, torch {torch.__version__}; milliseconds of the forward or the whole backward pass")
        found = sweep(dry, deadline)
        print(json.dumps({"device": device, "torch": torch.__version__, "sweep": found}))
        return 0
    sizes = [(32, 16)] if dry else [(t, d) for d in (64, 128) for t in (1024, 2048, 4096, 8192)]
    plan: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": lambda: tests(dry, max(30.0, (deadline - time.monotonic()) / 2)),
        **{f"attention T={t} D={d}": lambda t=t, d=d: attention(t, d, dry) for t, d in sizes},  # type: ignore[misc]
        "training step": lambda: training(dry),
    }
    parts: dict[str, Any] = {}
    for name, part in plan.items():
        started = time.monotonic()
        if deadline - started < 30 and not dry:
            parts[name] = {"skipped": "no time left"}
            continue
        try:
            parts[name] = part()
        except Exception as error:  # whatever it is, the other parts are worth having
            parts[name] = {"error": f"{type(error).__name__}: {error}"}
            print(parts[name]["error"], file=sys.stderr)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(
        f"{device}, torch {torch.__version__}; B x T = {TOKENS}, H x D = {WIDTH}, bfloat16, causal, forward + backward"
    )
    print("\n".join(table(parts)))
    print(json.dumps({"device": device, "torch": torch.__version__, **parts}))
    return int(any("error" in part for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
