"""Entropies of every head of Hugging Face models: `record_entropy` against what transformers offers for it.

    python benchmarks/recording.py [--models gpt2 pythia-160m qwen3-0.6b] [--lengths 512 2048] [--rounds 5]

Models of the published shapes without the head over the vocabulary, random weights, one text, forward passes under
`no_grad`. Contenders: `plain` is the model under SDPA without any entropy, the floor; `recorded` the same inside
`record_entropy`; `output_attentions` asks transformers for all attention weights, for which it falls back to its eager
attention, and takes their entropies. In turn within every round; the largest difference between the two tables of
entropies is printed, and the peak memory of each contender in a process of its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GPT2Config, GPTNeoXConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config
from transformers.models.auto import AutoModel

import entropi
from entropi.machine import machine
from entropy_attention import in_turn, peak_memory

MODELS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "gpt2": lambda length: GPT2Config(n_positions=length),
    "pythia-160m": lambda length: GPTNeoXConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=50304,
        max_position_embeddings=length,
    ),
    "qwen3-0.6b": lambda length: Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
        max_position_embeddings=length,
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(name: str, length: int, dtype: str) -> tuple[PreTrainedModel, torch.Tensor]:
    torch.manual_seed(0)
    config = MODELS[name](length)
    model: Any = AutoModel.from_config(config, dtype=DTYPES[dtype]).eval()
    return model, torch.randint(0, config.vocab_size, (1, length))


def plain(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model.set_attn_implementation("sdpa")
    model(ids, use_cache=False)


def recorded(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with entropi.record_entropy(model) as entropies:
        model(ids, use_cache=False)
    return entropies.mean()


def output_attentions(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    model.set_attn_implementation("eager")
    attentions = model(ids, use_cache=False, output_attentions=True).attentions
    return torch.stack([-torch.xlogy(p.float(), p.float()).sum(dim=-1).mean(dim=(0, 2)) for p in attentions])


CONTENDERS: dict[str, Callable[[PreTrainedModel, torch.Tensor], Any]] = {
    "plain": plain,
    "recorded": recorded,
    "output_attentions": output_attentions,
}


def keep(contender: str, model: PreTrainedModel, ids: torch.Tensor, kept: dict[str, Any]) -> None:
    """Run a contender and put what it found under its name."""
    kept[contender] = CONTENDERS[contender](model, ids)


def extra_memory(contender: str, name: str, length: int, dtype: str) -> float:
    """Megabytes that a forward pass adds to the peak of a fresh process."""
    command = [sys.executable, __file__, "--child", contender, name, str(length), dtype]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def child(contender: str, name: str, length: int, dtype: str) -> None:
    model, ids = make(name, length, dtype)
    with torch.no_grad():
        CONTENDERS[contender](model, ids[:, :16])
        before = peak_memory()
        CONTENDERS[contender](model, ids)
    print(peak_memory() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        contender, name, length, dtype = options.child
        return child(contender, name, int(length), dtype)

    print(f"{machine()}, torch {torch.__version__}; one text, forward, ratios to the plain model")
    rows = []
    for name in options.models:
        for dtype in options.dtypes:
            for length in options.lengths:
                model, ids = make(name, length, dtype)
                entropies: dict[str, Any] = {}
                with torch.no_grad():
                    runs = {contender: partial(keep, contender, model, ids, entropies) for contender in CONTENDERS}
                    seconds = {contender: ms / 1e3 for contender, ms in in_turn(runs, options.rounds).items()}
                del model, runs
                megabytes = {contender: extra_memory(contender, name, length, dtype) for contender in CONTENDERS}
                apart = float((entropies["recorded"] - entropies["output_attentions"]).abs().max())
                text = "  ".join(
                    f"{contender} {seconds[contender]:.3f} s ({seconds[contender] / seconds['plain']:.2f}x) "
                    f"{megabytes[contender]:.0f} MB"
                    for contender in CONTENDERS
                )
                print(f"{name:11} {dtype:8} T={length:5}  {text}  apart {apart:.1e} nats", flush=True)
                row = {"model": name, "dtype": dtype, "length": length, "seconds": seconds, "megabytes": megabytes}
                rows.append(row | {"apart": apart})
    print(json.dumps({"machine": machine(), "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
