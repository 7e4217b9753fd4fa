"""Everything that decides a training run, as one flat record: signature, command line and YAML are the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from entropi.errors import UserError

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. The defaults train a small softmax-only model on a laptop's CPU in a few minutes.

    Args:
        architecture: one of the paper's names, such as SM+LN+G, SM+LN+R, SM+ScFuFFN, SM(t)+ScFuFFN; wrapped as
            EReg(...) it is trained with the entropy regulariser
        corpus: "stdlib" (the source code of this Python's standard library) or a text file or folder
        vocab_size: entries of the byte-level BPE tokenizer trained on the corpus
        context_length: tokens a sequence, T
        layers: number of layers, L
        heads: attention heads a layer, H
        hidden_size: width of the model, d
        bias: linear layers with a bias: "qk" (the paper's code), "all" or "none"
        steps: optimizer updates
        batch_size: sequences a device and micro-batch
        gradient_accumulation: micro-batches an update
        learning_rate: peak learning rate of AdamW
        weight_decay: on matrices; never on biases, gains, scales, temperatures and thresholds
        warmup: share of the steps over which the learning rate rises
        schedule: how the learning rate falls after warm-up
        gradient_clip: largest gradient norm
        precision: arithmetic of matrix products; "auto" measures whether bfloat16 is faster here
        seed: of initial weights and data order
        entropy_weight: lambda, the weight of the entropy penalty (used with EReg)
        entropy_margin: gamma, tolerated deviation as a share of the maximum entropy
        entropy_granularity: penalise every query row ("query", the published listing) or the mean of each head
        entropy_maximum: log T for every row ("context", the paper) or log(i+1) for row i ("causal")
        entropy_reduction: over rows: the listing's "sum", or "mean", which does not depend on the batch
        threshold_init: initial theta of every head
        temperature_init: initial softmax temperature t of SM(t)
        nonfinite: what a non-finite gradient does: "stop" the run, or "skip" the update (at most 10 in a row)
        log_every: steps between loss records
        entropy_every: steps between entropy records
        evaluate_every: steps between evaluations on held-out text (0: at the end only)
        evaluation_blocks: held-out sequences used by those evaluations (the last one uses all of them)
        save_every: steps between checkpoints (0: at the end only)
        keep_checkpoints: how many to keep
    """

    architecture: str = "EReg(SM(t)+ScFuFFN)"
    corpus: str = "stdlib"
    vocab_size: int = 2048
    context_length: int = 128
    layers: int = 4
    heads: int = 4
    hidden_size: int = 128
    bias: Literal["qk", "all", "none"] = "qk"
    steps: int = 600
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    gradient_clip: float = 1.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = 0
    entropy_weight: float = 1e-5
    entropy_margin: float = 0.2
    entropy_granularity: Literal["query", "head"] = "query"
    entropy_maximum: Literal["context", "causal"] = "context"
    entropy_reduction: Literal["sum", "mean"] = "sum"
    threshold_init: float = 0.5
    temperature_init: float = 1.0
    nonfinite: Literal["stop", "skip"] = "stop"
    log_every: int = 10
    entropy_every: int = 20
    evaluate_every: int = 200
    evaluation_blocks: int = 64
    save_every: int = 100
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        problems = []
        for name in ("context_length", "layers", "heads", "hidden_size", "steps", "batch_size"):
            if getattr(self, name) < (2 if name == "context_length" else 1):
                problems.append(f"{name} is {getattr(self, name)}")
        for name in ("gradient_accumulation", "log_every", "entropy_every", "evaluation_blocks", "keep_checkpoints"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, at least 1 is needed")
        for name in ("evaluate_every", "save_every", "weight_decay", "entropy_weight", "gradient_clip"):
            if not getattr(self, name) >= 0:
                problems.append(f"{name} is {getattr(self, name)}, it cannot be negative")
        if not self.learning_rate > 0:
            problems.append(f"learning_rate is {self.learning_rate}, it must be positive")
        if not 0 <= self.warmup < 1:
            problems.append(f"warmup is {self.warmup}, a share of the steps in [0, 1) is needed")
        if not 0 <= self.entropy_margin < 1:
            problems.append(f"entropy_margin is {self.entropy_margin}, a share in [0, 1) is needed")
        if problems:
            raise UserError("; ".join(problems))


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False), encoding="utf-8")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML.

    Raises:
        UserError: not readable, not a recipe, or with unknown or ill-typed settings.
    """
    try:
        settings: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read the recipe {path}: {reason}") from None
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    if not isinstance(settings, dict) or not set(settings) <= set(fields):
        unknown = sorted(set(settings) - set(fields)) if isinstance(settings, dict) else []
        raise UserError(f"{path} is not a training recipe" + (f": unknown {', '.join(unknown)}" if unknown else ""))
    for name, value in settings.items():
        wanted = type(fields[name].default)
        if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
            raise UserError(f"{path}: {name} is {value!r}, expected {wanted.__name__}")
    return Recipe(**settings)


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """Names of settings that differ; a precision of "auto" agrees with whatever it was resolved to."""
    differing = []
    for field in dataclasses.fields(Recipe):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if a != b and not (field.name == "precision" and "auto" in (a, b)):
            differing.append(f"{field.name} ({b!r} there, {a!r} here)")
    return differing
