"""Everything that decides a training run, as one flat record: signature, command line and YAML are the same."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from entropi.data.tokenizer import MIN_VOCAB_SIZE
from entropi.errors import UserError
from entropi.model.architectures import softmax_problem, with_defaults
from entropi.softmax import FORMER, from_former

CONFIG_FILE = "config.yaml"
TAPER_STAGES = ("activation", "norm", "softmax", "final_norm")  # what may leave a trained model, one after the other
_MAY_BE_ZERO = (
    "evaluate_every",
    "save_every",
    "seed",
    "key_value_heads",
    "intermediate_size",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. The defaults train a small softmax-only model on a laptop's CPU in a few minutes.

    Args:
        architecture: in the paper's notation, such as SM+LN+G, SM+SNorm(FFN), SM(t)+ScFuFFN; wrapped as EReg(...) it
            is trained with the entropy regulariser
        corpus: "stdlib" (the source code of this Python's standard library), "site-packages" (that of the packages
            installed beside entropi), "debian-docs" (English prose of installed Debian packages), "codeparrot" or
            "pg19" (from the Hugging Face hub), a text file, or a folder of texts, of Parquet or Arrow files, or of
            tokenised books
        tokenizer: a tokenizer.json, its folder, or a name on the hub; by default one is learnt from the corpus
        vocab_size: entries of the byte-level BPE tokenizer learnt from the corpus
        packing: cut sequences from one "stream" of all texts, or from each "document" (the paper's CodeParrot)
        context_length: tokens a sequence, T
        layers: number of layers, L
        heads: attention heads a layer, H
        hidden_size: width of the model, d
        intermediate_size: width between the two feed-forward matrices (0: 4 * hidden_size)
        key_value_heads: heads of keys and values, fewer than heads for grouped queries (0: as many as heads)
        position_embedding: "learned" positions or "rotary" ones
        final_norm: a norm before the language-model head; the paper keeps it in models that have no other. By default
            there is one, but not in architectures of powers (Pow) without a norm
        softmax: "exact"; "power-1" to "power-8", the (1 + x/2^t)^(2^t) of private inference, cheap at t of 1 to 3; or
            "polynomial-1" to "polynomial-8", that power of the logits themselves, without maximum and clip: fewest
            bytes and rounds of a softmax; architectures of powers (Pow) have "polynomial-1/keys", their default, to
            "polynomial-8/keys", divided by the number of keys and not by their sum, or by one number in all rows:
            "polynomial-1/128", best the context length
        activation_function: which GELU "G" is: "gelu_new" (GPT-2's tanh form) or "gelu" (the authors' erf form)
        leaky_slope: negative slope of LeakyR
        leaky_slope_learned: "fixed", or learned by "layer" or for all layers ("global")
        bias: linear layers with a bias: "qk" (the paper's code), "all" or "none"
        initializer_range: standard deviation of initial weights (0: 0.02 * sqrt(768 / hidden_size))
        initialization: "depth_scaled" divides it by sqrt(2 * layers) for matrices that write to the residual stream, as
            GPT-2 does; "plain" does not, as the authors' code
        spectral_gain: a learned gain for every matrix that SNorm normalises (sigma-reparametrisation)
        log_length_scaling: logits of a row that sees n keys times g log(n) / log(T), g learned by head
        embedding_dropout: share of the embeddings' numbers set to 0 while training (0.1 in the authors' code)
        steps: optimizer updates
        batch_size: sequences a micro-batch, of one process
        gradient_accumulation: micro-batches an update; several processes share them out, so that a recipe is the same
            training with any number of them
        optimizer: "adamw", or "muon" for the matrices in the layers and AdamW for the rest
        adam_beta2: decay of AdamW's mean of squares
        learning_rate: peak learning rate
        learning_rate_floor: where a linear or cosine schedule ends
        weight_decay: on matrices; never on biases, gains, scales, temperatures and thresholds
        warmup: share of the steps over which the learning rate rises
        schedule: how the learning rate falls after warm-up
        gradient_clip: largest gradient norm
        qk_clip: largest attention logit: where a head exceeds it, an update is followed by scaling its query and key
            weights down (0: never)
        precision: arithmetic of matrix products; "auto" measures whether bfloat16 is faster here
        compile: compile the layers, the loss and the regulariser with torch.compile, which takes up to a minute at the
            start and needs a C++ compiler, on GPUs Triton
        seed: of initial weights and data order
        entropy_weight: lambda, the weight of the entropy penalty (used with EReg, and where a model is tapered)
        entropy_margin: gamma, tolerated deviation as a share of the maximum entropy
        entropy_granularity: penalise every query row ("query", the published listing) or the mean of each head
        entropy_maximum: log T for every row ("context", the paper) or log(i+1) for row i ("causal")
        entropy_reduction: over rows: the listing's "sum", or "mean", which does not depend on the batch
        threshold_init: initial theta of every head
        temperature_init: initial softmax temperature t of SM(t)
        temperature_granularity: one temperature per head and query "position" (the paper) or per "head"
        temperature_parametrization: learn t itself ("literal", the paper) or log t ("exp"), which keeps t positive
        nonfinite: what a non-finite gradient does: "stop" the run, "skip" the update (at most 10 in a row), or go back
            to the last checkpoint and on at half the learning rate ("rollback", at most 3 times)
        collapse: what collapsed attention does, looked for at every entropy record: nothing ("ignore"), "stop" or
            "rollback"
        collapse_below: a layer has collapsed whose mean entropy is below this share of what a causal mask allows
        log_every: steps between loss records
        entropy_every: steps between entropy records
        evaluate_every: steps between evaluations on held-out text (0: at the end only)
        evaluation_blocks: held-out sequences used by those evaluations (the last one uses all of them)
        save_every: steps between checkpoints (0: at the end only); an interrupt saves as well
        keep_checkpoints: how many to keep
        taper_from: the model to taper, its teacher: a run folder, a saved model, or a checkpoint of another family. Not
            empty, the run starts from a copy of it and takes away what `architecture`, `softmax` and `final_norm` have
            not; the model's sizes, positions and vocabulary are then the teacher's
        taper_stages: in which order operations leave: activation, norm, softmax, final_norm, with commas; those that
            stay are passed over
        taper_layers: layers leave an operation "together", or one by one: "upwards" from the first one,
            "downwards" from the last
        taper_start: share of the steps before the first stage
        taper_end: share of the steps after which nothing is left to leave; the stages share what is between, equally
        taper_cross_entropy: weight of the cross-entropy
        taper_divergence: weight of the Kullback-Leibler divergence of the model's next tokens from the teacher's
        taper_hidden: weight of the distance of hidden states from the teacher's, relative mean squares. The distance of
            entropies from the teacher's has entropy_weight, and the other options of EReg
    """

    architecture: str = "EReg(SM(t)+ScFuFFN)"
    corpus: str = "stdlib"
    tokenizer: str = ""
    vocab_size: int = 2048
    packing: Literal["stream", "document"] = "stream"
    context_length: int = 128
    layers: int = 4
    heads: int = 4
    hidden_size: int = 128
    intermediate_size: int = 0
    key_value_heads: int = 0
    position_embedding: Literal["learned", "rotary"] = "learned"
    final_norm: bool | None = None
    softmax: str = "exact"
    activation_function: Literal["gelu_new", "gelu"] = "gelu_new"
    leaky_slope: float = 0.01
    leaky_slope_learned: Literal["fixed", "layer", "global"] = "fixed"
    bias: Literal["qk", "all", "none"] = "qk"
    initializer_range: float = 0.0
    initialization: Literal["depth_scaled", "plain"] = "depth_scaled"
    spectral_gain: bool = False
    log_length_scaling: bool = False
    embedding_dropout: float = 0.0
    steps: int = 600
    batch_size: int = 32
    gradient_accumulation: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    adam_beta2: float = 0.999
    learning_rate: float = 1e-3
    learning_rate_floor: float = 0.0
    weight_decay: float = 0.1
    warmup: float = 0.05
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    gradient_clip: float = 1.0
    qk_clip: float = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    seed: int = 0
    entropy_weight: float = 1e-5
    entropy_margin: float = 0.2
    entropy_granularity: Literal["query", "head"] = "query"
    entropy_maximum: Literal["context", "causal"] = "context"
    entropy_reduction: Literal["sum", "mean"] = "sum"
    threshold_init: float = 0.5
    temperature_init: float = 1.0
    temperature_granularity: Literal["position", "head"] = "position"
    temperature_parametrization: Literal["literal", "exp"] = "literal"
    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    collapse: Literal["ignore", "stop", "rollback"] = "ignore"
    collapse_below: float = 0.05
    log_every: int = 10
    entropy_every: int = 20
    evaluate_every: int = 200
    evaluation_blocks: int = 64
    save_every: int = 100
    keep_checkpoints: int = 2
    taper_from: str = ""
    taper_stages: str = ", ".join(TAPER_STAGES)
    taper_layers: Literal["together", "upwards", "downwards"] = "together"
    taper_start: float = 0.1
    taper_end: float = 0.8
    taper_cross_entropy: float = 1.0
    taper_divergence: float = 1.0
    taper_hidden: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.architecture, str) and isinstance(self.softmax, str):
            softmax, final_norm = with_defaults(self.architecture, self.softmax, self.final_norm)
            object.__setattr__(self, "softmax", softmax)
            object.__setattr__(self, "final_norm", final_norm)
        if problems := _type_problems(dataclasses.asdict(self)) or self._range_problems():
            raise UserError("; ".join(problems))

    def _range_problems(self) -> list[str]:
        """What is wrong with values that have the right types."""
        problems = []
        least = {"context_length": 2, "vocab_size": MIN_VOCAB_SIZE}
        least |= dict.fromkeys(_MAY_BE_ZERO, 0)
        for name, wanted in get_type_hints(Recipe).items():
            value = getattr(self, name)
            if wanted is int and value < least.get(name, 1):
                problems.append(f"{name} is {value}, at least {least.get(name, 1)} is needed")
            if wanted is float and not math.isfinite(value):
                problems.append(f"{name} is {value}, a finite number is needed")
        if self.seed >= 2**32:
            problems.append(f"seed is {self.seed}, it must be below 2^32")
        if self.heads > 0 and self.hidden_size % self.heads:
            problems.append(f"hidden_size is {self.hidden_size}, not a multiple of heads, {self.heads}")
        for name in ("weight_decay", "entropy_weight", "gradient_clip", "initializer_range", "qk_clip"):
            if getattr(self, name) < 0:
                problems.append(f"{name} is {getattr(self, name)}, it cannot be negative")
        for name in ("learning_rate", "temperature_init"):
            if getattr(self, name) <= 0:
                problems.append(f"{name} is {getattr(self, name)}, it must be positive")
        if not 0 <= self.learning_rate_floor < self.learning_rate:
            problems.append(
                f"learning_rate_floor is {self.learning_rate_floor}, it must be below learning_rate, "
                f"{self.learning_rate}, and not negative"
            )
        if self.learning_rate_floor > 0 and self.schedule == "constant":
            problems.append("learning_rate_floor is for schedules that fall: linear and cosine")
        if problem := softmax_problem(self.architecture, self.softmax):
            problems.append(problem)
        if not 0 <= self.adam_beta2 < 1:
            problems.append(f"adam_beta2 is {self.adam_beta2}, a number in [0, 1) is needed")
        if not 0 <= self.embedding_dropout < 1:
            problems.append(f"embedding_dropout is {self.embedding_dropout}, a share in [0, 1) is needed")
        if not 0 <= self.warmup < 1:
            problems.append(f"warmup is {self.warmup}, a share of the steps in [0, 1) is needed")
        if not 0 < self.collapse_below < 1:
            problems.append(f"collapse_below is {self.collapse_below}, a share in (0, 1) is needed")
        if not 0 <= self.entropy_margin < 1:
            problems.append(f"entropy_margin is {self.entropy_margin}, a share in [0, 1) is needed")
        return problems + self._taper_problems()

    def _taper_problems(self) -> list[str]:
        problems = []
        if sorted(self.stages_of_taper) != sorted(TAPER_STAGES):
            problems.append(
                f"taper_stages is {self.taper_stages!r}, {', '.join(TAPER_STAGES)} are needed, in any order"
            )
        if not 0 <= self.taper_start < self.taper_end <= 1:
            problems.append(
                f"taper_start and taper_end are {self.taper_start} and {self.taper_end}, two shares of the steps are "
                "needed, the first the smaller one"
            )
        for name in ("taper_cross_entropy", "taper_divergence", "taper_hidden"):
            if getattr(self, name) < 0:
                problems.append(f"{name} is {getattr(self, name)}, it cannot be negative")
        if self.taper_from and self.compile:
            problems.append("compile is not for tapering, whose gates change at every step: leave it out")
        return problems

    @property
    def stages_of_taper(self) -> list[str]:
        """Names in `taper_stages`."""
        return [name.strip() for name in self.taper_stages.split(",")]


def _type_problems(settings: dict[str, Any]) -> list[str]:
    """Which values do not have the type of their setting."""
    problems = []
    types = get_type_hints(Recipe)
    for name, value in settings.items():
        wanted = types[name]
        if wanted == (bool | None):
            if value is None:
                continue
            wanted = bool
        if choices := get_args(wanted):
            if value not in choices:
                problems.append(f"{name} is {value!r}, expected one of {', '.join(choices)}")
        elif isinstance(value, bool) != (wanted is bool) or not isinstance(
            value, (int, float) if wanted is float else wanted
        ):
            problems.append(f"{name} is {value!r}, expected {wanted.__name__}")
    return problems


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True), "utf-8")
    os.replace(partial, path)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML; settings it does not name have their defaults.

    Raises:
        UserError: not readable, not a recipe, or with unknown, ill-typed or impossible settings: all are named.
    """
    try:
        settings: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a training recipe: lines such as 'steps: 600' are expected")
    return make_recipe(settings, str(path))


def recipe_of_run(folder: Path) -> Recipe | None:
    """The recipe of the run in `folder`, or None where none has begun; raises `UserError` as `load_recipe`."""
    path = folder / CONFIG_FILE
    return load_recipe(path) if path.is_file() else None


def make_recipe(settings: dict[str, Any], source: str) -> Recipe:
    """A recipe from settings as YAML gives them; raises `UserError` as `load_recipe`, naming `source`."""
    types, problems = get_type_hints(Recipe), []
    try:
        settings = from_former(settings)
    except UserError as error:  # the rest is told without them
        problems.append(str(error))
        settings = {name: value for name, value in settings.items() if name not in FORMER}
    problems += [f"unknown setting {name}" for name in sorted(str(name) for name in settings if name not in types)]
    known = {name: _as_float(value, types[name]) for name, value in settings.items() if name in types}
    ill_typed = {name: problem for name in known for problem in _type_problems({name: known[name]})}
    problems += ill_typed.values()
    try:
        recipe = Recipe(**{name: value for name, value in known.items() if name not in ill_typed})
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError(f"{source}: {'; '.join(problems)}")
    return recipe


def _as_float(value: Any, wanted: Any) -> Any:
    """`value` as a float where one is `wanted`: YAML takes 1e-3, without a point, for text."""
    if wanted is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """Names of settings that differ; a precision of "auto" agrees with whatever it was resolved to."""
    differing = []
    for field in dataclasses.fields(Recipe):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if a != b and not (field.name == "precision" and "auto" in (a, b)):
            differing.append(f"{field.name} ({b!r} there, {a!r} here)")
    return differing
