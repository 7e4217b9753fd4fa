"""What decides a model's cost, read without torch or transformers: an architecture and its sizes.

`EntropiConfig` has the same attributes; a `Shape` also comes from the `config.json` of other families.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropi.activations import folded_name
from entropi.errors import UserError
from entropi.model.architectures import Parts, parse_architecture, softmax_problem, with_defaults
from entropi.model.convert import options_of
from entropi.model.gguf import configuration_of, is_gguf
from entropi.softmax import SoftmaxForm, from_former

DESCRIPTION_FILE = "folded.json"  # of a folded model

FOLDED_FORMAT = 3
# Which linear layers have a bias, by the value of the option `bias`; "ffn" are those of the feed-forward network.
BIASES: dict[str, frozenset[str]] = {
    "qk": frozenset({"query", "key"}),
    "qkv": frozenset({"query", "key", "value"}),
    "attention": frozenset({"query", "key", "value", "output"}),
    "ffn": frozenset({"ffn"}),
    "all": frozenset({"query", "key", "value", "output", "ffn"}),
    "none": frozenset(),
}


@dataclass(frozen=True)
class Shape:
    """The fields of `EntropiConfig` that a cost depends on, with its defaults: GPT-2 small.

    Raises:
        UserError: impossible values; names all of them.
    """

    architecture: str = "SM+LN+G"
    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 0  # 0: as many as heads
    head_width: int = 0  # 0: hidden_size / num_attention_heads
    intermediate_size: int = 0  # 0: 4 * hidden_size
    max_position_embeddings: int = 1024
    position_embedding: str = "learned"
    rotary_fraction: float = 1.0
    rotary_base: float = 10000.0
    rotary_frequencies: list[list[float]] | None = None
    rotary_layers: list[int] | None = None
    query_key_norm: bool = False
    branch_norm: bool = False
    parallel_residual: bool = False
    bias: str = "qk"
    final_norm: bool | None = None  # None: as the architecture has it, see `with_defaults`
    softmax: str = "exact"
    temperature_granularity: str = "position"
    log_length_scaling: bool = False
    leaky_slope_learned: str = "fixed"
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | list[int] | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        problems = []
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "max_position_embeddings"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                problems.append(f"{name} must be 1 to {1 << 20}, got {getattr(self, name)}")
        for name in ("num_key_value_heads", "intermediate_size", "head_width"):
            if not 0 <= getattr(self, name) <= 1 << 20:
                problems.append(f"{name} must be at most {1 << 20}, got {getattr(self, name)}")
        if self.num_hidden_layers > 256:
            problems.append(f"num_hidden_layers must be at most 256, got {self.num_hidden_layers}")
        if not problems:
            if not self.head_width and self.hidden_size % self.num_attention_heads:
                problems.append(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
            if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
                problems.append(
                    f"{self.num_attention_heads} heads are no multiple of {self.num_key_value_heads} key-value heads"
                )
        softmax, final_norm = with_defaults(self.architecture, self.softmax, self.final_norm)
        if problem := softmax_problem(self.architecture, softmax):
            problems.append(problem)
        parse_architecture(self.architecture)
        if problems:
            raise UserError("; ".join(problems))
        object.__setattr__(self, "softmax", softmax)
        object.__setattr__(self, "final_norm", final_norm)
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        object.__setattr__(self, "intermediate_size", self.intermediate_size or 4 * self.hidden_size)

    @property
    def parts(self) -> Parts:
        """The parsed architecture."""
        return parse_architecture(self.architecture)

    @property
    def softmax_form(self) -> SoftmaxForm:
        """The parsed softmax."""
        return SoftmaxForm.parse(self.softmax)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.head_width or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dimensions(self) -> int:
        """Columns of every head that turn with the position; 0 with learned positions."""
        return round(self.head_dim * self.rotary_fraction) if self.position_embedding == "rotary" else 0


def describe(config: Any, *, explicit_ffn: list[int], temperature: bool) -> dict[str, Any]:
    """What folding leaves of a `Shape` or `EntropiConfig`: the description of `folded.json`.

    `explicit_ffn` are the layers whose linear map stays a matrix, `temperature` whether temperatures that differ
    between positions remain.
    """
    parts = config.parts
    # LayerNorm's centring folds into what writes to the stream, where a final norm makes the mean superfluous.
    norms = {"none": "none", "rmsnorm": "rms", "layernorm": "rms" if config.final_norm else "layer"}
    activation = folded_name(parts.activation)
    return {
        "format": FOLDED_FORMAT,
        "architecture": config.architecture,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_width": config.head_dim,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size if activation != "identity" else 0,
        "vocab_size": config.vocab_size,
        "positions": config.max_position_embeddings,
        "position_embedding": config.position_embedding,
        "rotary_dimensions": config.rotary_dimensions,
        "rotary_base": config.rotary_base,
        "rotary_frequencies": config.rotary_frequencies or [],
        "rotary_layers": (config.rotary_layers or [0] * config.num_hidden_layers) if config.rotary_frequencies else [],
        "query_key_norm": config.query_key_norm,
        "branch_norm": config.branch_norm,
        "temperature": temperature,
        "log_length": config.log_length_scaling and not temperature,
        "softmax": config.softmax,
        "norm": norms[parts.norm],
        "norm_epsilon": config.layer_norm_epsilon,
        "parallel_residual": config.parallel_residual,
        "activation": activation,
        "explicit_ffn": explicit_ffn,
        "final_norm": "rms" if config.final_norm else "none",
        "centre": config.final_norm and parts.norm == "none",
        "end_of_text": config.eos_token_id,
    }


def expected_description(config: Any) -> dict[str, Any]:
    """What folding will leave of a trained model, before there is one.

    Temperatures by position are taken to differ, and linear networks without a norm to fold in every layer; behind a
    norm the linear map of an identity or a leaky ReLU stays.
    """
    parts = config.parts
    linear = parts.norm != "none" and parts.activation in ("identity", "leaky_relu")
    return describe(
        config,
        explicit_ffn=list(range(config.num_hidden_layers)) if linear else [],
        temperature=parts.temperature
        and config.temperature_granularity == "position"
        and not config.softmax_form.has_offsets,
    )


def read_shape(path: Path) -> Shape:
    """The shape of a model from its `config.json`, from the folder that holds it, or from a GGUF file.

    Raises:
        UserError: no such file, not JSON, another family, or an option that private inference does not have.
    """
    if not path.exists():
        raise UserError(f"there is no file or folder {path}")
    if is_gguf(path):
        return shape_of(configuration_of(path))
    file = next((p for p in (path / "config.json", path / "model" / "config.json") if p.is_file()), path)
    if file == path:
        refuse_folded(path)
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{path} holds no config.json: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} holds no configuration of a model")
    try:
        return shape_of(config)
    except KeyError as error:
        raise UserError(f"{file} lacks {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} has a value of the wrong kind: {error}") from None


def refuse_folded(folder: Path) -> None:
    """Raise `UserError` for what `entropi fold` wrote: it can be served, and does not say all of what it was before."""
    if (folder / DESCRIPTION_FILE).is_file():
        raise UserError(f"{folder} holds a folded model, which can only be served: name what it was folded from")


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape of a configuration of this family or of another.

    Raises:
        UserError: an unknown family, or an option that private inference does not have.
        KeyError: a field that has no default is missing.
    """
    if config.get("model_type") == "entropi":
        config = from_former(config)  # of older models
    else:
        config, _ = options_of(config)
    return Shape(**{name: config[name] for name in Shape.__dataclass_fields__ if config.get(name) is not None})
