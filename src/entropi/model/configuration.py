"""What an entropi model is made of: the paper's architecture names, parsed once, and the sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from entropi.errors import UserError


@dataclass(frozen=True)
class Parts:
    """The choices an architecture name stands for (Table 1 and section 4 of the paper)."""

    temperature: bool  # learnable softmax temperature per head and query position, "SM(t)"
    norm: Literal["layernorm", "none"]
    activation: Literal["gelu", "relu", "identity"]
    ffn: Literal["plain", "scaled", "fused"]  # "ScFFN" and "ScFuFFN" are scaled as in Eq. 8

    @property
    def softmax_only(self) -> bool:
        """Softmax is the only nonlinear operation in the layers."""
        return self.norm == "none" and self.activation == "identity"


_BODIES = {
    "+LN+G": Parts(False, "layernorm", "gelu", "plain"),
    "+LN+R": Parts(False, "layernorm", "relu", "plain"),
    "+LN": Parts(False, "layernorm", "identity", "plain"),
    "+G": Parts(False, "none", "gelu", "plain"),
    "+R": Parts(False, "none", "relu", "plain"),
    "": Parts(False, "none", "identity", "plain"),
    "+ScFFN": Parts(False, "none", "identity", "scaled"),
    "+ScFuFFN": Parts(False, "none", "identity", "fused"),
}
ARCHITECTURES: dict[str, Parts] = {
    f"{softmax}{body}": Parts(softmax == "SM(t)", parts.norm, parts.activation, parts.ffn)
    for softmax in ("SM", "SM(t)")
    for body, parts in _BODIES.items()
}


def parse_architecture(name: str) -> Parts:
    """The parts of an architecture name.

    Raises:
        UserError: unknown name; lists the legal ones.
    """
    try:
        return ARCHITECTURES[name.replace(" ", "")]
    except KeyError:
        raise UserError(f"unknown architecture {name!r}; legal are {', '.join(ARCHITECTURES)}") from None


def split_training_name(name: str) -> tuple[str, bool]:
    """("SM(t)+ScFuFFN", True) from "EReg(SM(t)+ScFuFFN)": the architecture, and whether entropy is regularised."""
    bare = name.replace(" ", "")
    match = re.fullmatch(r"EReg\((.*)\)", bare)
    architecture = match.group(1) if match else bare
    parse_architecture(architecture)
    return architecture, match is not None


@strict
class EntropiConfig(PreTrainedConfig):
    """Configuration of an `EntropiForCausalLM`; the defaults are GPT-2 small's sizes.

    Args:
        architecture: one of `ARCHITECTURES`, in the paper's notation.
        intermediate_size: width between the two FFN matrices, 4 * hidden_size by default; unused when fused.
        bias: which linear layers have one: "qk" (query and key, as in the authors' training code), "all" (GPT-2)
            or "none".
        final_norm: LayerNorm before the LM head; the authors keep it in their LayerNorm-free models too, and
            do not count it.
        initializer_range: standard deviation of initial weights; by default 0.02 * sqrt(768 / hidden_size), the
            usual 0.02 at GPT-2's width: without LayerNorm a fixed 0.02 starves narrow models.
        temperature_init: initial t of SM(t). The paper's 1e-2 (1e-1 on Languini), read literally with 1/t,
            multiplies the logits by 100 (10); 1 starts at the plain softmax.
        entropy_regularizer: options of `entropi.EntropyRegularizer` plus `weight` (lambda), or None. The
            thresholds are parameters of the model, so that they are trained, sharded and saved with it; they do
            not take part in inference.
    """

    model_type = "entropi"
    keys_to_ignore_at_inference = ["past_key_values", "entropies"]  # noqa: RUF012

    architecture: str = "SM+LN+G"
    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    bias: str = "qk"
    final_norm: bool = True
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float | None = None
    temperature_init: float = 1.0
    entropy_regularizer: dict[str, Any] | None = None
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        problems = []
        self.architecture = self.architecture.replace(" ", "")
        if self.architecture not in ARCHITECTURES:
            problems.append(f"unknown architecture {self.architecture!r}; legal are {', '.join(ARCHITECTURES)}")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_position_embeddings < 2:
            problems.append(f"max_position_embeddings must be at least 2, got {self.max_position_embeddings}")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.bias not in ("all", "qk", "none"):
            problems.append(f"bias must be 'all', 'qk' or 'none', got {self.bias!r}")
        if self.temperature_init <= 0:
            problems.append(f"temperature_init must be positive, got {self.temperature_init}")
        if problems:
            raise UserError("; ".join(problems))
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.initializer_range is None:
            self.initializer_range = 0.02 * (768 / self.hidden_size) ** 0.5
        super().__post_init__(**kwargs)

    @property
    def parts(self) -> Parts:
        """The parsed architecture."""
        return ARCHITECTURES[self.architecture]

    @property
    def head_dim(self) -> int:
        """d_k, the width of one head."""
        return self.hidden_size // self.num_attention_heads
