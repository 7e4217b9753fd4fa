"""Attention with entropy against attention without: time of forward plus backward, interleaved, and peak memory.

    python benchmarks/entropy_attention.py [--lengths 512 1024 2048] [--memory 1024 2048 4096 8192] [--cache 512 4096]

Contenders: `sdpa` is torch's scaled_dot_product_attention without entropy, the floor; `materialised` holds the T x T
matrix and computes the entropy head by head, as the paper's released code does; the rest are ours, `secure` the native
kernel with the exponential of private inference at t = 5. Prints progress, medians and ratios to the floor; then those
of the forward pass of one token against a cache of keys, as in generation, with as many heads of keys as of queries and
with a quarter; then the peak memory of each contender in a process of its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from entropi.entropy.attention import available_implementations, entropy_attention
from entropi.machine import processor

BATCH, HEADS, WIDTH = 4, 12, 64
Contender = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True), None


def materialised(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length = query.shape[2]
    logits = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    entropy = [-torch.nansum(w * torch.log(w + 1e-9), dim=-1) for w in weights.unbind(dim=1)]
    return weights.to(value.dtype) @ value, torch.stack(entropy, dim=1)


def ours(name: str, softmax: str = "exact") -> Contender:
    options: Any = {"implementation": name, "softmax": softmax}
    return lambda query, key, value: entropy_attention(query, key, value, **options)


CONTENDERS: dict[str, Contender] = {
    "sdpa": sdpa,
    "materialised": materialised,
    "reference": ours("reference"),
    "blockwise": ours("blockwise"),
    "native": ours("native"),
    "secure": ours("native", "power-5"),
}


def make(length: int, dtype: torch.dtype, batch: int = BATCH) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    shape = (batch, HEADS, length, WIDTH)
    return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)], torch.randn(shape).to(dtype)


def step(contender: Contender, inputs: list[torch.Tensor], grad: torch.Tensor) -> None:
    """Forward and backward, through the entropy too where there is one."""
    output, entropy = contender(*inputs)
    if entropy is None:
        torch.autograd.grad(output, inputs, grad)
    else:
        torch.autograd.grad([output, entropy], inputs, [grad, torch.ones_like(entropy)])


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each contender, in turn within every round, after a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if number:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(names: list[str], length: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of each contender."""
    inputs, grad = make(length, dtype)
    return in_turn({name: partial(step, CONTENDERS[name], inputs, grad) for name in names}, rounds)


def one_token(heads: int, key_heads: int, width: int, keys: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median milliseconds of the forward pass of one query a head."""
    torch.manual_seed(0)
    query = torch.randn(1, heads, 1, width).to(dtype)
    key, value = (torch.randn(1, key_heads, keys, width).to(dtype) for _ in range(2))
    options: Any = {"enable_gqa": heads != key_heads}
    plain = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, **options)
    ours = {
        name: partial(entropy_attention, query, key, value, implementation=name, **options)
        for name in ("blockwise", "native")
    }
    with torch.no_grad():
        return in_turn({"sdpa": plain, **ours}, 10 * rounds)


def extra_memory(name: str, length: int) -> float:
    """Megabytes that one step adds to the peak of a fresh process; nan where it does not fit."""
    command = [sys.executable, __file__, "--child", name, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else float("nan")


def child(name: str, length: int) -> None:
    inputs, grad = make(length, torch.float32, batch=1)
    small, small_grad = make(128, torch.float32, batch=1)
    step(CONTENDERS[name], small, small_grad)
    before = peak_memory()
    step(CONTENDERS[name], inputs, grad)
    print(peak_memory() - before)


def peak_memory() -> float:
    """Most megabytes this process has held. Not getrusage's figure: a child inherits that from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 1024, 2048])
    parser.add_argument("--memory", type=int, nargs="*", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--cache", type=int, nargs="*", default=[512, 4096], help="keys that one token sees")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], int(options.child[1]))

    able = available_implementations(torch.zeros(1, 1, 1, 1))
    able["secure"] = able["native"]
    names = [name for name in CONTENDERS if able.get(name) is None]
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}; B={BATCH} H={HEADS} D={WIDTH}")
    result: dict[str, object] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for length in options.lengths:
            medians = compare(names, length, dtype, options.rounds if length <= 1024 else max(3, options.rounds // 2))
            text = "  ".join(f"{name} {ms:.1f} ms ({ms / medians['sdpa']:.2f}x)" for name, ms in medians.items())
            print(f"{str(dtype).removeprefix('torch.'):8} T={length:5}  {text}", flush=True)
            rows.append({"dtype": str(dtype), "length": length, "milliseconds": medians})
    tokens = []
    for dtype in (torch.float32, torch.bfloat16):
        for keys in options.cache:
            for shape in ((HEADS, HEADS, WIDTH), (32, 8, 128)):
                medians = one_token(*shape, keys, dtype, options.rounds)
                text = "  ".join(f"{name} {ms:.2f} ms ({ms / medians['sdpa']:.2f}x)" for name, ms in medians.items())
                heads = f"{shape[0]} heads over {shape[1]}, D={shape[2]}"
                print(f"{str(dtype).removeprefix('torch.'):8} one token, S={keys:5}, {heads}  {text}", flush=True)
                tokens.append({"dtype": str(dtype), "keys": keys, "heads": shape, "milliseconds": medians})
    memory = []
    for length in options.memory:
        # Materialised contenders need gigabytes from here on; their growth is known by then.
        chosen = [name for name in names if length <= 4096 or name not in ("materialised", "reference")]
        megabytes = {name: extra_memory(name, length) for name in chosen}
        text = "  ".join(f"{name} {mb:.0f} MB" for name, mb in megabytes.items())
        print(f"extra memory, B=1, float32, T={length:5}  {text}", flush=True)
        memory.append({"length": length, "megabytes": megabytes})
    print(json.dumps(result | {"time": rows, "tokens": tokens, "memory": memory}))


if __name__ == "__main__":
    main()
