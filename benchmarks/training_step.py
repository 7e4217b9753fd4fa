"""One training step of GPT-2 small's shape with the entropy regulariser against the same step without any entropy.

    python benchmarks/training_step.py [--length 512] [--batch 2] [--rounds 5]

The plain step is transformers' GPT2LMHeadModel under SDPA without dropout; ours has taken over its weights and adds
entropies and the regulariser (Algorithm 1). Same tokens, bfloat16 autocast, AdamW; interleaved within every round. Peak
memory is that of a process of its own for each. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from entropi.entropy.regularizer import EntropyRegularizer
from entropi.machine import processor
from entropi.model.decoder import EntropiForCausalLM
from entropy_attention import peak_memory


def make_step(
    name: str, batch: int, length: int, device: str = "cpu", sizes: dict[str, int] | None = None
) -> Callable[[], None]:
    """One optimizer step of "gpt2" or "entropi"; `sizes` other than GPT-2 small's are GPT2Config's arguments."""
    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_positions=length, use_cache=False, **no_dropout, **(sizes or {}))
    model: torch.nn.Module = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    if name == "entropi":
        ours = EntropiForCausalLM.from_transformers(model)
        ours.entropy_regularizer, ours.entropy_weight = EntropyRegularizer(config.n_layer, config.n_head), 1e-5
        model = ours
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, config.vocab_size, (batch, length), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        step = make_step(options.child, options.batch, options.length)
        step()
        step()
        print(peak_memory())
        return
    steps = {name: make_step(name, options.batch, options.length) for name in ("gpt2", "entropi")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - started)
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratios = [ours / plain for plain, ours in zip(times["gpt2"], times["entropi"])]
    del steps
    shape = ["--batch", str(options.batch), "--length", str(options.length)]
    memory = {}
    for name in seconds:
        command = [sys.executable, __file__, "--child", name, *shape]
        memory[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{processor()}, {torch.get_num_threads()} threads; B={options.batch} T={options.length}, bfloat16 autocast")
    print(f"without entropy {seconds['gpt2']:.2f} s, with regulariser {seconds['entropi']:.2f} s", end=", ")
    print(f"ratio round by round, median {statistics.median(ratios):.3f}")
    print(
        f"peak memory {memory['gpt2']:.0f} MB and {memory['entropi']:.0f} MB: {memory['entropi'] / memory['gpt2']:.3f}"
    )
    print(json.dumps({"seconds": times, "ratio": statistics.median(ratios), "peak_megabytes": memory}))


if __name__ == "__main__":
    main()
