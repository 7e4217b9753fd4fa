"""In which number formats a model trains: float32, bfloat16 and float16, the same seeds and batches side by side.

    python benchmarks/number_formats.py [--rows SM SM+LN+R] [--formats fp32 bf16 fp16] [--seeds 0 1 2] [--steps 600]

A plain loop over an entropi model of the size of configs/studies/twelve-layers.yaml: AdamW, warm-up and linear decay,
gradients clipped, and for float16 a loss scale that halves when a gradient overflows and doubles after 2,000 updates. A
run has diverged when a loss is not finite, or a gradient is not: in float16, where the scale answers the first
overflows, ten updates in a row.

A processor without float16 arithmetic multiplies such matrices two hundred times slower than others. Here their factors
are float16 numbers, their products are summed in float32 and the sums are rounded to float16, which is what a GPU's
tensor cores do but for the order of the sums. On a GPU the products are its own. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from entropi.console import ProgressLine, make_console
from entropi.machine import machine
from entropi.model.decoder import EntropiForCausalLM
from entropi.training.build import model_config, prepare_corpus
from entropi.training.callbacks import MOST_SKIPPED_IN_A_ROW
from entropi.training.evaluation import evaluate_blocks
from entropi.training.recipe import Recipe
from entropi.training.study import load_study
from entropi.training.trainer import EntropiTrainer

STUDY = Path(__file__).parents[1] / "configs" / "studies" / "twelve-layers.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WideSums(TorchDispatchMode):
    """Products of float16 matrices with sums in float32, rounded once."""

    PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.PRODUCTS and args[-1].dtype == torch.float16:
            wide = [x.float() if isinstance(x, Tensor) else x for x in args]
            return function(*wide, **(kwargs or {})).half()
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `loss` is the last finite one, `perplexity` that on held-out text, NaN after a divergence."""

    row: str
    format: str
    seed: int
    step: int
    diverged: bool
    loss: float
    perplexity: float
    smallest_scale: float


def train(recipe: Recipe, prepared: Any, row: str, format_: str, seed: int, line: ProgressLine) -> Outcome:
    """One run; the same seed gives the same first weights and the same batches in every format."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    model = EntropiForCausalLM(model_config(recipe, prepared.tokenizer.get_vocab_size())).to(device).train()
    decayed = set(EntropiTrainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name in decayed], "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.adam_beta2))
    warm = max(round(recipe.warmup * recipe.steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (recipe.steps - step) / max(recipe.steps - warm, 1))
    )
    scaler = torch.amp.GradScaler(device, enabled=format_ == "fp16")
    autocast = torch.autocast(device, DTYPES[format_], enabled=format_ != "fp32")
    emulated = WideSums() if (format_, device) == ("fp16", "cpu") else contextlib.nullcontext()
    order = np.random.default_rng(seed).permutation(len(prepared.packed.train))
    skipped, last, smallest, step, diverged = 0, math.nan, scaler.get_scale(), 0, False
    while step < recipe.steps and not diverged:
        chosen = order[(np.arange(recipe.batch_size) + step * recipe.batch_size) % len(order)]
        ids = torch.from_numpy(np.stack([prepared.packed.train[int(i)] for i in chosen]).astype(np.int64)).to(device)
        optimizer.zero_grad(set_to_none=True)
        with emulated:
            with autocast:
                loss = model(ids, labels=ids).loss
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        step += 1
        skipped = 0 if bool(torch.isfinite(norm)) else skipped + 1
        patience = MOST_SKIPPED_IN_A_ROW if format_ == "fp16" else 1
        diverged = not math.isfinite(loss.item()) or skipped >= patience
        if not diverged:
            last = loss.item()
            if not skipped:
                nn.utils.clip_grads_with_norm_(model.parameters(), recipe.gradient_clip, norm)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            smallest = min(smallest, scaler.get_scale())
        line.update(step, f"{row}, {format_}, seed {seed}, loss {last:.3f}")
    perplexity = math.nan if diverged else evaluate_blocks(model, prepared.packed.heldout).perplexity
    return Outcome(row, format_, seed, step, diverged, last, perplexity, smallest if format_ == "fp16" else 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", nargs="+", default=["SM", "SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)", "SM+LN+R"])
    parser.add_argument("--formats", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    recipes = {planned.row: planned.recipe for planned in load_study(STUDY).runs}
    if unknown := [row for row in options.rows if row not in recipes]:
        parser.error(f"--rows: {unknown[0]!r} is no row of {STUDY.name}, which has {'; '.join(recipes)}")
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, at least 1 is needed")
    console, found = make_console(), []
    for row in options.rows:
        recipe = replace(recipes[row], steps=options.steps)
        prepared = prepare_corpus(recipe, console)
        for seed in options.seeds:
            for format_ in options.formats:
                with ProgressLine("training", options.steps, console=console) as line:
                    outcome = train(recipe, prepared, row, format_, seed, line)
                found.append(outcome)
                ended = f"NaN at step {outcome.step}" if outcome.diverged else f"perplexity {outcome.perplexity:.2f}"
                scale = f", smallest loss scale {outcome.smallest_scale:g}" if format_ == "fp16" else ""
                print(f"{row:24} {format_} seed {seed}: {ended}{scale}", flush=True)
    print(json.dumps({"machine": machine(), "steps": options.steps, "runs": [vars(one) for one in found]}))


if __name__ == "__main__":
    main()
