"""Tokens per second of `entropi train`, everything on, against a plain loop in the manner of nanoGPT.

    python benchmarks/training_speed.py [--layers 6 --heads 6 --hidden-size 384] [--batch-size 12] [--precision bf16]

Ours is the command's own code: data loader, Trainer, gradient guard, records of losses and of all heads' entropies,
and the entropy regulariser. The plain loop trains a GPT-2 of the same shape, written below, with AdamW and
scaled_dot_product_attention, reading a loss every ten steps. Both see blocks of the same corpus in random order, under
the same autocast. They take turns of a few steps in one process: ours stands still while the plain loop runs.
Evaluations and checkpoints are left out, as the plain loop has none. `ratio` is ours over plain, tokens per second of
each turn, the median over turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from entropi.training import run
from entropi.training.environment import describe_environment
from entropi.training.recipe import Recipe
from entropi.training.trainer import BlockDataset, EntropiTrainer


class PlainBlock(nn.Module):
    """Pre-norm attention and GELU network of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        parts = self.query_key_value(self.first_norm(hidden)).split(width, dim=2)
        query, key, value = (x.view(batch, length, self.heads, -1).transpose(1, 2) for x in parts)
        heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.output(heads.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(functional.gelu(self.up(self.second_norm(hidden)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 with learned positions and a head tied to the embedding."""

    def __init__(self, vocabulary: int, length: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the next tokens of `ids` `(B, T)`."""
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits = functional.linear(self.norm(hidden), self.tokens.weight)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class PlainLoop:
    """The loop around it: a batch, forward, backward, clip, step."""

    def __init__(self, recipe: Recipe, vocabulary: int, blocks: Any, device: str) -> None:
        self.recipe, self.blocks, self.device = recipe, blocks, device
        shape = (recipe.context_length, recipe.layers, recipe.heads, recipe.hidden_size)
        self.model = PlainGPT(vocabulary, *shape).to(device)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=device == "cuda")
        self.generator = np.random.default_rng(0)
        self.step = 0

    def run(self, steps: int) -> None:
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.recipe.precision == "bf16")
        for _ in range(steps):
            chosen = self.generator.integers(len(self.blocks), size=self.recipe.batch_size)
            ids = torch.from_numpy(np.stack([self.blocks[index] for index in chosen.tolist()]).astype(np.int64))
            if self.device == "cuda":
                ids = ids.pin_memory().to("cuda", non_blocking=True)
            with autocast:
                loss = self.model(ids)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            if self.step % 10 == 0 and not np.isfinite(loss.item()):
                raise ArithmeticError(f"the plain loop diverged at step {self.step}")


class TakeTurns(TrainerCallback):
    """Times so many steps of the Trainer, then lets the plain loop do as many, and times those."""

    def __init__(self, trainer: EntropiTrainer, recipe: Recipe, turn: int, device: str) -> None:
        assert isinstance(trainer.train_dataset, BlockDataset)
        vocabulary = trainer.model.config.vocab_size
        self.plain = PlainLoop(recipe, vocabulary, trainer.train_dataset.blocks, device)
        self.turn, self.device = turn, device
        self.seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        self.profile: cProfile.Profile | None = None
        self.began = 0.0

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.turn:
            return
        ended = self.now()
        if self.profile is not None:
            self.profile.disable()
        self.plain.run(self.turn)
        plain = self.now() - ended
        if state.global_step > self.turn:  # the first turn of each warms up
            self.seconds["ours"].append(ended - self.began)
            self.seconds["plain"].append(plain)
            print(f"turn {len(self.seconds['ours'])}: {ended - self.began:.2f} s, plain {plain:.2f} s", file=sys.stderr)
        if self.profile is not None and state.global_step < state.max_steps:
            self.profile.enable()
        self.began = self.now()


class Trained(Exception):
    """All turns have been taken."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="EReg(SM+LN+G)", help="of ours; the plain model is always SM+LN+G")
    parser.add_argument("--corpus", default="stdlib")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--turn", type=int, default=10, help="steps of one turn")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print where ours spends its time, by Python function")
    options = parser.parse_args()
    recipe = Recipe(
        architecture=options.architecture,
        corpus=options.corpus,
        vocab_size=options.vocab_size,
        context_length=options.length,
        layers=options.layers,
        heads=options.heads,
        hidden_size=options.hidden_size,
        bias="all",  # as GPT-2 has them
        batch_size=options.batch_size,
        precision=options.precision,
        steps=options.turn * (options.turns + 1),
        evaluate_every=0,
        save_every=0,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    turns: list[TakeTurns] = []

    class Interleaved(EntropiTrainer):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            turns.append(TakeTurns(self, recipe, options.turn, device))
            if options.profile:
                turns[0].profile = cProfile.Profile()
            self.add_callback(turns[0])
            super().train(*args, **kwargs)
            raise Trained  # what follows, the evaluation on held-out text, is not measured

    run.EntropiTrainer = Interleaved  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Trained):
        run.train(recipe, Path(folder) / "run")
    found = turns[0]
    if found.profile is not None:
        found.profile.disable()
        pstats.Stats(found.profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)
    tokens = options.turn * options.batch_size * options.length
    speed = {name: tokens / statistics.median(seconds) for name, seconds in found.seconds.items()}
    ratios = [plain / ours for ours, plain in zip(found.seconds["ours"], found.seconds["plain"])]
    for name, value in speed.items():
        print(f"{name:5} {value:10,.0f} tokens/s")
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), above 1: ours is faster")
    environment = describe_environment()
    result = {
        "benchmark": "training_speed",
        "recipe": {name: getattr(recipe, name) for name in ("architecture", "layers", "heads", "hidden_size")}
        | {name: getattr(recipe, name) for name in ("vocab_size", "context_length", "batch_size", "precision")},
        "tokens_per_second": speed,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        **{name: environment[name] for name in ("processor", "threads", "gpu", "versions", "commit")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
