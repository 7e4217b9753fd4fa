"""Everything that waits for a GPU, in one run of less than eight minutes: tests, times, memory.

    python benchmarks/on_gpu.py [--minutes 8] [--dry-run]

Needs a checkout and Python packages (torch with CUDA, its Triton; pytest for the tests, transformers for the training
step), no installation. In order, as time allows: the tests marked `gpu`; forward and backward of `entropy_attention` in
bfloat16, causal, with the exact and the secure softmax, against scaled_dot_product_attention's flash kernel without
entropy; one training step of GPT-2 small's shape with the entropy regulariser against the same step without. A part
that fails says so and the rest goes on. Ends with one table and a last line of JSON; status 1 if a part failed.
`--dry-run` does the same at toy sizes on a CPU, so that the script itself can be tested.
"""

from __future__ import annotations

import argparse
import json
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
    device = "cpu" if dry else "cuda"
    tokens, total = (2 * length, 2 * width) if dry else (TOKENS, WIDTH)
    shape = (max(1, tokens // length), total // width, length, width)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad, grad_entropy = torch.randn_like(inputs[0]), torch.randn(shape[:3], device=device)

    def sdpa() -> None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            output = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        torch.autograd.grad(output, inputs, grad)

    def ours(iterations: int | None) -> Callable[[], None]:
        def run() -> None:
            results = entropy_attention(*inputs, exp_iterations=iterations)
            torch.autograd.grad(list(results), inputs, [grad, grad_entropy])

        return run

    # Two products forward, five backward, half of each under the causal mask.
    flops = 7 * shape[0] * shape[1] * length * length * width
    row: dict[str, Any] = {"length": length, "width": width, "shape": shape}
    for name, run in {"sdpa": sdpa, "exact": ours(None), "secure t=5": ours(5)}.items():
        median = statistics.median(milliseconds(run, not dry, 3 if dry else 15))
        row[name] = {"milliseconds": median, "tflops": flops / median / 1e9}
        if not dry:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            row[name]["megabytes"] = (torch.cuda.max_memory_allocated() - before) / 2**20
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


def table(parts: dict[str, Any]) -> list[str]:
    lines = []
    for name, part in parts.items():
        if "error" in part:
            lines.append(f"{name}: FAILED, {part['error'].strip().splitlines()[-1]}")
        elif "sdpa" in part:
            floor = part["sdpa"]["milliseconds"]
            cells = (
                f"{kind} {part[kind]['milliseconds']:.2f} ms ({part[kind]['milliseconds'] / floor:.2f}x, "
                f"{part[kind]['tflops']:.0f} TFLOP/s, {part[kind].get('megabytes', 0):.0f} MB)"
                for kind in ("sdpa", "exact", "secure t=5")
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
    options = parser.parse_args()
    dry, deadline = options.dry_run, time.monotonic() + 60 * options.minutes
    if not dry and not torch.cuda.is_available():
        print("no CUDA device: --dry-run checks the script without one", file=sys.stderr)
        return 2
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
    device = "CPU, dry run" if dry else torch.cuda.get_device_name()
    print(
        f"{device}, torch {torch.__version__}; B x T = {TOKENS}, H x D = {WIDTH}, bfloat16, causal, forward + backward"
    )
    print("\n".join(table(parts)))
    print(json.dumps({"device": device, "torch": torch.__version__, **parts}))
    return int(any("error" in part for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
