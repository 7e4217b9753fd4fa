"""What waits for a GPU, in one run of some minutes: times, memory, tests, tuning choices.

    python benchmarks/on_gpu.py [--minutes 6] [--parts attention tests training sweep] [--tests-minutes 1.5] [--dry-run]

Needs a checkout and Python packages (torch with CUDA, its Triton; pytest for the tests, transformers for the training
step), no installation. The kernels are compiled by all cores at once, then the parts follow in the order given, as time
allows. Each prints what it has found as soon as it has, as text and as a line of JSON, so that a run that is cut off
loses only what it had not begun. A part that fails says so and the rest goes on; status 1 if one failed.

`attention`: forward and backward of `entropy_attention` in bfloat16, causal, with the exact softmax and the secure one,
against scaled_dot_product_attention's flash kernel without entropy. Milliseconds are those of calls back to back, as in
a training step; "single" those of one call from an idle device, Python included; "host" what Python needs to enqueue a
call. `tests`: those marked `gpu`. `training`: one training step of GPT-2 small's shape with the entropy regulariser
against the same step without. `sweep`: which tuning choices are fastest, one kernel after the other, the other kernels
left as they are; `CHOICES` of the kernels' module is where the answer belongs.

`--dry-run` does all of it at toy sizes on a CPU, so that the script itself can be tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from entropi.entropy.attention import entropy_attention  # noqa: E402

Choice = tuple[int, int, int, int]  # ROWS, KEYS, warps, stages

PARTS = ("attention", "tests", "training", "sweep")
KINDS: dict[str, dict[str, Any]] = {"exact": {}, "secure t=5": {"softmax": "power-5"}}
TOKENS, WIDTH = 16384, 2048  # batch x length and heads x head width, whatever the two are: the same work per T
SWEEP_LENGTH = 4096

# Worth a try on a Hopper, by kernel. Left out is what a first sweep at width 64 showed to be far behind: eight warps
# for 64 rows, and four warps for blocks of 128 x 128.
CANDIDATES: dict[str, tuple[Choice, ...]] = {
    "backward key": (
        (64, 64, 4, 3), (64, 128, 8, 2), (32, 64, 4, 3), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 4, 2),
        (32, 64, 8, 3), (128, 64, 4, 2), (32, 128, 4, 3), (32, 128, 8, 2), (128, 128, 8, 2), (64, 64, 8, 2),
        (32, 64, 4, 2), (64, 32, 4, 3),
    ),
    "forward": (
        (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 64, 8, 4), (128, 64, 8, 2), (64, 64, 4, 2),
        (128, 128, 8, 3), (64, 128, 4, 2), (128, 64, 4, 3), (64, 32, 4, 3), (128, 32, 8, 3), (64, 32, 4, 2),
    ),
    "backward query": (
        (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 3),
        (128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 4, 2), (64, 128, 8, 2), (128, 32, 8, 2), (128, 128, 8, 2),
    ),
}  # fmt: skip
SWEEP = [  # the most telling first: at width 64, only the keys' kernel has not been swept
    ("backward key", 64), ("backward key", 128), ("forward", 128), ("backward query", 128),
    ("backward query", 64), ("forward", 64),
]  # fmt: skip


def report(name: str, found: Any) -> None:
    print(json.dumps({name: found}), flush=True)


def timed(run: Callable[[], object], cuda: bool, calls: int) -> dict[str, float]:
    """Milliseconds of a call, back to back, on the device's own clock; of a single one; of the host alone."""
    for _ in range(3):
        run()
    if not cuda:
        started = time.perf_counter()
        run()
        elapsed = (time.perf_counter() - started) * 1e3
        return {"milliseconds": elapsed, "single": elapsed, "host": elapsed}
    repeats = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        host = (time.perf_counter() - started) / calls * 1e3
        end.record()
        torch.cuda.synchronize()
        repeats.append((start.elapsed_time(end) / calls, host))
    singles = []
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        singles.append((time.perf_counter() - started) * 1e3)
    return {
        "milliseconds": statistics.median(repeat[0] for repeat in repeats),
        "single": statistics.median(singles),
        "host": statistics.median(repeat[1] for repeat in repeats),
    }


def make_inputs(shape: tuple[int, ...], dry: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    dtype = torch.float16 if dry else torch.bfloat16  # the interpreter cannot multiply bfloat16
    return [torch.randn(shape, device="cpu" if dry else "cuda", dtype=dtype).requires_grad_() for _ in range(3)]


@contextmanager
def single_choices(index: int = 0, **replaced: Choice) -> Iterator[None]:
    """One tuning choice for every kernel, the index-th or last, or the one given for it: nothing is tuned."""
    from entropi.entropy import triton_kernel

    before, chosen = triton_kernel.CHOICES, dict(triton_kernel._CHOSEN)
    triton_kernel.CHOICES = {
        kernel: {
            kind: (replaced.get(kernel.replace(" ", "_")) or choices[min(index, len(choices) - 1)],)
            for kind, choices in kinds.items()
        }
        for kernel, kinds in before.items()
    }
    triton_kernel._CHOSEN.clear()
    try:
        yield
    finally:
        triton_kernel.CHOICES = before
        triton_kernel._CHOSEN.clear()
        triton_kernel._CHOSEN.update(chosen)


def compile_choice(task: tuple[int, dict[str, Any], int, dict[str, Choice], bool]) -> str:
    """Compile the kernels of a width and kind with one tuning choice each into Triton's cache; why it cannot be."""
    width, options, index, replaced, dry = task
    from entropi.entropy import triton_kernel

    launch = triton_kernel._launch

    def compile_only(name: str, kernel: Any, key: Any, count: int, *arguments: Any, **constants: Any) -> None:
        wider = max(constants["PADDED"], constants["PADDED_E"])
        (choice,) = triton_kernel.choices(name, wider, arguments[0].dtype == torch.float32)
        kernel.fn.warmup(*arguments, grid=(1,), **constants, **choice.all_kwargs(), **triton_kernel.LAUNCH)

    try:
        triton_kernel._launch = launch if dry else compile_only
        with single_choices(index, **replaced):
            inputs = make_inputs((2, 2, 32 if dry else 256, width), dry)
            results = entropy_attention(*inputs, implementation="triton", **options)
            torch.autograd.grad(results, inputs, [torch.ones_like(result) for result in results])
        return ""
    except Exception as error:  # what the compiler will not do
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        triton_kernel._launch = launch


def attention(length: int, width: int, dry: bool) -> dict[str, Any]:
    """Forward and backward at one size: times, TFLOP/s, megabytes beyond inputs and gradients."""
    tokens, total = (2 * length, 2 * width) if dry else (TOKENS, WIDTH)
    shape = (max(1, tokens // length), total // width, length, width)
    inputs = make_inputs(shape, dry)
    grad, grad_entropy = torch.randn_like(inputs[0]), torch.randn(shape[:3], device=inputs[0].device)

    def flash() -> tuple[torch.Tensor, ...]:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            return (torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True),)

    forwards: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {"sdpa": flash}
    for kind, options in KINDS.items():
        forwards[kind] = lambda options=options: entropy_attention(*inputs, **options)  # type: ignore[misc]

    # Two products forward, five backward, half of each under the causal mask.
    flops = 7 * shape[0] * shape[1] * length * length * width
    row: dict[str, Any] = {"length": length, "width": width, "shape": shape}
    for name, forward in forwards.items():
        incoming = [grad] if name == "sdpa" else [grad, grad_entropy]

        def both(forward: Any = forward, incoming: Any = incoming) -> object:
            return torch.autograd.grad(forward(), inputs, incoming)

        calls = 1 if dry else 20
        row[name] = timed(both, not dry, calls)
        with torch.no_grad():
            row[name]["forward"] = timed(forward, not dry, calls)
        row[name]["tflops"] = flops / row[name]["milliseconds"] / 1e9
        if not dry:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both()
            row[name]["megabytes"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    print(attention_line(row))
    return row


def attention_line(row: dict[str, Any]) -> str:
    floor = row["sdpa"]
    cells = []
    for name in ("sdpa", *KINDS):
        one = row[name]
        ratios = [one[key] / floor[key] for key in ("milliseconds", "single")]
        cells.append(
            f"{name} {one['milliseconds']:.3f} ms ({ratios[0]:.2f}x; forward "
            f"{one['forward']['milliseconds'] / floor['forward']['milliseconds']:.2f}x; single {one['single']:.3f} ms, "
            f"{ratios[1]:.2f}x; host {one['host']:.3f} ms; {one['tflops']:.0f} TFLOP/s, "
            f"{one.get('megabytes', 0):.0f} MB)"
        )
    return f"T={row['length']} D={row['width']}: {'  '.join(cells)}"


def tests(dry: bool, seconds: float) -> dict[str, Any]:
    """The tests that need a GPU; a dry run only finds them."""
    file = ROOT / "tests" / "entropy" / "test_triton.py"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", str(file), "--durations=5"]
    command += ["--collect-only"] if dry else []
    if not dry and importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        command += ["-n", str(max(1, (os.cpu_count() or 2) - 2))]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate()
            raise RuntimeError(f"no end after {seconds:.0f} s\n{output[-2000:]}") from None
    if process.returncode:
        raise RuntimeError(output[-4000:])
    print(output[-1500:])
    return {"outcome": output.strip().splitlines()[-1]}


def training(dry: bool) -> dict[str, Any]:
    """A training step with and without entropy, one after the other: milliseconds and peak megabytes."""
    from training_step import make_step

    device, batch, length = ("cpu", 2, 32) if dry else ("cuda", 8, 1024)
    small = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 64} if dry else {}
    found: dict[str, Any] = {"batch": batch, "length": length}
    for name in ("gpt2", "entropi"):
        step = make_step(name, batch, length, device, small)
        found[name] = timed(step, not dry, 8)
        if not dry:
            torch.cuda.reset_peak_memory_stats()
            step()
            found[name]["megabytes"] = torch.cuda.max_memory_allocated() / 2**20
        del step
        if not dry:
            torch.cuda.empty_cache()
    plain, ours = found["gpt2"], found["entropi"]
    print(
        f"training step: without {plain['milliseconds']:.1f} ms, {plain.get('megabytes', 0):.0f} MB; with regulariser "
        f"{ours['milliseconds']:.1f} ms, {ours.get('megabytes', 0):.0f} MB; "
        f"ratio {ours['milliseconds'] / plain['milliseconds']:.3f}"
    )
    return found


def try_choice(kernel: str, choice: Choice, width: int, dry: bool) -> tuple[float | None, str]:
    """Milliseconds of the pass that a kernel is part of under one tuning choice, or why it cannot run."""
    length = 32 if dry else SWEEP_LENGTH
    sizes = (1, 1) if dry else (TOKENS // length, WIDTH // width)
    try:
        with single_choices(**{kernel.replace(" ", "_"): choice}):
            inputs = make_inputs((*sizes, length, width), dry)

            def forward() -> tuple[torch.Tensor, ...]:
                return entropy_attention(*inputs, implementation="triton")

            results = forward()
            incoming = [torch.ones_like(result) for result in results]
            if kernel == "forward":
                with torch.no_grad():
                    return timed(forward, not dry, 10)["milliseconds"], ""
            run = lambda: torch.autograd.grad(results, inputs, incoming, retain_graph=True)  # noqa: E731
            return timed(run, not dry, 10)["milliseconds"], ""
    except Exception as error:  # too much shared memory, for example
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def sweep(pool: Any, dry: bool, deadline: float) -> list[dict[str, Any]]:
    """Every candidate, kernel by kernel: compiled side by side, then timed in turn."""
    plan = [(kernel, 16) for kernel in CANDIDATES] if dry else SWEEP
    compiling = {}
    if pool is not None:
        for kernel, width in plan:
            for choice in CANDIDATES[kernel]:
                task = (width, {}, 0, {kernel.replace(" ", "_"): choice}, dry)
                compiling[kernel, width, choice] = pool.apply_async(compile_choice, (task,))
    found = []
    for kernel, width in plan:
        latest = min(deadline - 10, time.monotonic() + 60)
        rows: list[dict[str, Any]] = []
        for choice in CANDIDATES[kernel][:2] if dry else CANDIDATES[kernel]:
            median, reason = None, ""
            if compiling:
                try:
                    reason = compiling[kernel, width, choice].get(max(0.0, latest - time.monotonic()))
                except multiprocessing.TimeoutError:
                    reason = "not compiled in time"
            if not reason:
                median, reason = try_choice(kernel, choice, width, dry)
            row = {"kernel": kernel, "width": width, "choice": choice, "milliseconds": median, "reason": reason}
            rows.append(row)
            report("sweep of one", row)
        ran = sorted((row for row in rows if row["milliseconds"]), key=lambda row: row["milliseconds"])
        best = "  ".join(f"{row['choice']} {row['milliseconds']:.3f} ms" for row in ran[:4])
        print(f"D={width} {kernel:14} {len(ran)} of {len(rows)} ran; {best}", flush=True)
        found += rows
        if time.monotonic() > deadline - 15 and not dry:
            break
    return found


def compile_all(pool: Any, sizes: list[tuple[int, int]], deadline: float) -> dict[str, Any]:
    """All tuning choices of the kernels that `attention` and `training` use; what is not done in time comes later."""
    tasks = [
        (width, options, index, {}, False)
        for width in dict.fromkeys(width for _, width in sizes)
        for options in KINDS.values()
        for index in range(3)
    ]
    started = time.monotonic()
    pending = [pool.apply_async(compile_choice, (task,)) for task in tasks]
    reasons = []
    for result in pending:
        try:
            reasons.append(result.get(max(0.0, deadline - time.monotonic())))
        except multiprocessing.TimeoutError:
            reasons.append("not in time")
    return {"seconds": time.monotonic() - started, "reasons": sorted(set(filter(None, reasons)))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="of the whole run")
    parser.add_argument("--tests-minutes", type=float, default=1.5, help="of the tests, at most")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do, in this order")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args()
    if options.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
    dry = options.dry_run
    deadline = time.monotonic() + 60 * (60.0 if dry else options.minutes)
    if not dry and not torch.cuda.is_available():
        print("no CUDA device: --dry-run checks the script without one", file=sys.stderr)
        return 2

    device = "CPU, dry run" if dry else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; B x T = {TOKENS}, H x D = {WIDTH}, bfloat16, causal")
    report("machine", {"device": device, "torch": torch.__version__, "command": sys.argv[1:]})
    sizes = [(32, 16)] if dry else [(t, d) for d in (64, 128) for t in (1024, 2048, 4096, 8192)]
    pool = None if dry else multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2))
    plan: list[tuple[str, Callable[[], Any]]] = []
    if pool is not None and {"attention", "training"} & set(options.parts):
        plan.append(("compile", lambda: compile_all(pool, sizes, min(deadline, time.monotonic() + 90))))
    for part in options.parts:
        if part == "attention":
            plan += [(f"attention T={t} D={d}", lambda t=t, d=d: attention(t, d, dry)) for t, d in sizes]  # type: ignore[misc]
        elif part == "tests":
            limit = 60 * (60.0 if dry else options.tests_minutes)
            plan.append(("tests", lambda limit=limit: tests(dry, min(limit, deadline - time.monotonic()))))  # type: ignore[misc]
        elif part == "training":
            plan.append(("training step", lambda: training(dry)))
        else:
            plan.append(("sweep", lambda: sweep(pool, dry, deadline)))

    failed = False
    for name, do in plan:
        started = time.monotonic()
        if deadline - started < 15 and not dry:
            report(name, {"skipped": "no time left"})
            continue
        try:
            report(name, do())
        except Exception as error:  # whatever it is, the other parts are worth having
            failed = True
            report(name, {"error": f"{type(error).__name__}: {error}"})
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if pool is not None:
        pool.terminate()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
