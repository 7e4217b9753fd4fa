"""What decides a model's cost, read without torch or transformers: an architecture and its sizes.

`EntropiConfig` has the same attributes; a `Shape` also comes from the `config.json` of other families.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropi.activations import folded_name
from entropi.errors import UserError
from entropi.model.architectures import Parts, parse_architecture
from entropi.softmax import SoftmaxForm, from_former, parse_of_model

FOLDED_FORMAT = 3
FAMILIES = ("entropi", "gpt2", "gpt_neox", "llama")


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
    intermediate_size: int = 0  # 0: 4 * hidden_size
    max_position_embeddings: int = 1024
    position_embedding: str = "learned"
    rotary_fraction: float = 1.0
    rotary_base: float = 10000.0
    parallel_residual: bool = False
    bias: str = "qk"
    final_norm: bool = True
    softmax: str = "exact"
    temperature_granularity: str = "position"
    log_length_scaling: bool = False
    leaky_slope_learned: str = "fixed"
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        problems = []
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "max_position_embeddings"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                problems.append(f"{name} must be 1 to {1 << 20}, got {getattr(self, name)}")
        for name in ("num_key_value_heads", "intermediate_size"):
            if not 0 <= getattr(self, name) <= 1 << 20:
                problems.append(f"{name} must be at most {1 << 20}, got {getattr(self, name)}")
        if self.num_hidden_layers > 256:
            problems.append(f"num_hidden_layers must be at most 256, got {self.num_hidden_layers}")
        if not problems:
            if self.hidden_size % self.num_attention_heads:
                problems.append(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
            if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
                problems.append(
                    f"{self.num_attention_heads} heads are no multiple of {self.num_key_value_heads} key-value heads"
                )
        try:
            parse_of_model(self.softmax)
        except UserError as error:
            problems.append(str(error))
        parse_architecture(self.architecture)
        if problems:
            raise UserError("; ".join(problems))
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
    def rotary_dimensions(self) -> int:
        """Columns of every head that turn with the position; 0 with learned positions."""
        head = self.hidden_size // self.num_attention_heads
        return round(head * self.rotary_fraction) if self.position_embedding == "rotary" else 0


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
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size if activation != "identity" else 0,
        "vocab_size": config.vocab_size,
        "positions": config.max_position_embeddings,
        "position_embedding": config.position_embedding,
        "rotary_dimensions": config.rotary_dimensions,
        "rotary_base": config.rotary_base,
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
        "end_of_text": config.eos_token_id if isinstance(config.eos_token_id, int) else None,
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
        and config.softmax_form.of_distance,
    )


def read_shape(path: Path) -> Shape:
    """The shape of a model from its `config.json`, or of the folder that holds it.

    Raises:
        UserError: no such file, not JSON, another family, or an option that private inference does not have.
    """
    file = next((p for p in (path / "config.json", path / "model" / "config.json") if p.is_file()), path)
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{path} holds no config.json: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    family = config.get("model_type") if isinstance(config, dict) else None
    readers = {"entropi": _entropi, "gpt2": _gpt2, "gpt_neox": _gpt_neox, "llama": _llama}
    if family not in readers:
        raise UserError(f"{file} is of the family {family!r}; known are {', '.join(FAMILIES)}")
    try:
        return readers[family](config)
    except KeyError as error:
        raise UserError(f"{file} lacks {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} has a value of the wrong kind: {error}") from None


def _entropi(config: dict[str, Any]) -> Shape:
    config = from_former(config)  # of older models
    known = {name: config[name] for name in Shape.__dataclass_fields__ if config.get(name) is not None}
    return Shape(**known)


def _gpt2(config: dict[str, Any]) -> Shape:
    return Shape(
        architecture=f"SM+LN{_activation(config.get('activation_function', 'gelu_new'))}",
        vocab_size=config["vocab_size"],
        hidden_size=config["n_embd"],
        num_hidden_layers=config["n_layer"],
        num_attention_heads=config["n_head"],
        intermediate_size=config.get("n_inner") or 0,
        max_position_embeddings=config.get("n_positions", 1024),
        bias="all",
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=config.get("tie_word_embeddings", True),
    )


def _gpt_neox(config: dict[str, Any]) -> Shape:
    return Shape(
        architecture=f"SM+LN{_activation(config.get('hidden_act', 'gelu'))}",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        position_embedding="rotary",
        rotary_fraction=config.get("rotary_pct", 0.25),
        rotary_base=float(config.get("rotary_emb_base", 10000.0)),
        parallel_residual=config.get("use_parallel_residual", True),
        bias="all",
        layer_norm_epsilon=config.get("layer_norm_eps", 1e-5),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


def _llama(config: dict[str, Any]) -> Shape:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    if config.get("head_dim") not in (None, width // heads):
        raise UserError(f"head_dim {config['head_dim']} is not hidden_size / heads, which private inference needs")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {config['hidden_act']!r} is not Llama's silu")
    return Shape(
        architecture="SM+RMS+SwiGLU",
        vocab_size=config["vocab_size"],
        hidden_size=width,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or 0,
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        position_embedding="rotary",
        rotary_base=float(config.get("rope_theta") or 10000.0),
        bias="qk" if config.get("attention_bias") else "none",
        layer_norm_epsilon=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )


def _activation(name: str) -> str:
    if name == "relu":
        return "+R"
    if name.startswith("gelu"):
        return "+G"
    raise UserError(f"the activation {name!r} has no secure form; known are relu and gelu")
