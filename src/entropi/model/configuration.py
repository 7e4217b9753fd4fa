"""What an entropi model is made of: an architecture name and the sizes."""

from __future__ import annotations

import math
import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from entropi.errors import UserError
from entropi.model.architectures import Parts, parse_architecture, softmax_problem, with_defaults
from entropi.model.shape import BIASES
from entropi.softmax import SoftmaxForm, from_former

_CHOICES = {
    "bias": tuple(BIASES),
    "position_embedding": ("learned", "rotary"),
    "temperature_granularity": ("position", "head"),
    "temperature_parametrization": ("literal", "exp"),
    "leaky_slope_learned": ("fixed", "layer", "global"),
    "initialization": ("depth_scaled", "plain"),
}
# Temperatures act as this one from here downwards. Attention divides by them: at 0 there is no softmax, and beyond it
# heads would attend to what they attended to least. The smallest that the paper starts from, 0.01, is well above.
SMALLEST_TEMPERATURE = 1e-3
MOST_LAYERS, MOST_WIDTH = 256, 1 << 20  # of what a folded model may have


@strict
class EntropiConfig(PreTrainedConfig):
    """Configuration of an `EntropiForCausalLM`; the defaults are GPT-2 small's sizes.

    Args:
        architecture: what is kept and what is added, in the paper's notation; see `entropi.model.architectures`.
        num_key_value_heads: grouped queries, fewer heads for keys and values; num_attention_heads by default.
        head_width: width of a head; 0 for hidden_size / num_attention_heads.
        intermediate_size: width between the two FFN matrices, 4 * hidden_size by default; unused when fused.
        position_embedding: "learned" (GPT-2), or "rotary": the first `rotary_fraction` of every head's width turns
            with the position at frequencies `rotary_base` ** (-2 j / width) (GPT-NeoX, Llama).
        rotary_frequencies: angles a position of every pair of turning columns, in place of those powers of
            `rotary_base` (scaled positions of Llama 3); several sets where layers differ (Gemma 3).
        rotary_layers: which of these sets each layer takes, the first by default.
        query_key_norm: RMSNorm of every head's query and key before they turn, with gains common to the heads (Qwen3).
        branch_norm: RMSNorm of what attention and FFN add to the residual stream (Gemma 2).
        embedding_scale: what token embeddings are multiplied by, but not a head tied to them (Gemma).
        parallel_residual: attention and FFN read the same state and both are added to it (GPT-NeoX).
        bias: which linear layers have one: "qk" (query and key, as in the authors' training code), "qkv" (Qwen2),
            "attention", "ffn", "all" (GPT-2) or "none".
        final_norm: the norm before the LM head, LayerNorm in models without a norm; the authors keep it in their
            LayerNorm-free models too, and do not count it. By default there is one, but not in architectures of powers
            (Pow) without a norm.
        activation_function: which GELU stands for "G" and in "GeGLU": "gelu_new" (GPT-2's tanh form) or "gelu".
        leaky_slope: negative slope of "LeakyR", where it starts if it is learned.
        leaky_slope_learned: "fixed", or learned one a "layer" or one for all layers ("global").
        initializer_range: standard deviation of initial weights; by default 0.02 * sqrt(768 / hidden_size), the
            usual 0.02 at GPT-2's width: without LayerNorm a fixed 0.02 starves narrow models.
        initialization: "depth_scaled" divides it by sqrt(2 L) for the matrices that write to the residual stream
            (GPT-2); "plain" does not (the authors' released code).
        embedding_dropout: share of the embeddings' numbers that training sets to 0 (0.1 in the authors' code).
        log_length_scaling: logits of a row that sees n keys are multiplied by g log(n) / log(P), P the model's
            positions and g learned by head from 1 (2501.19399): long rows stay as sharp as short ones. Free in private.
        spectral_gain: SNorm with a learned gain for every matrix, from 1: sigma-reparametrisation (2303.06296).
        softmax: "exact"; "power-t", (1 + x / 2^t)^(2^t) as private inference evaluates it: a model trained with it
            answers in private exactly as in the open, and a small t is cheap; or "polynomial-t", that power of the
            logit itself, not of its distance to the row's largest: nothing is compared, which takes most of the rounds
            out of a private softmax; "polynomial-t/keys" divides these by the number of keys that a row sees, which
            is public, and not by their sum, "polynomial-t/128" by 128 in every row, so that short rows are no larger
            than others: what architectures of powers (Pow) have, polynomial-1/keys by default, and no others. t is 1
            to 8. See `entropi.softmax`.
        temperature_init: initial t of SM(t). The paper's 1e-2 (1e-1 on Languini), read literally with 1/t,
            multiplies the logits by 100 (10); 1 starts at the plain softmax.
        temperature_granularity: a temperature per head and query "position" (the paper), or one per "head", which
            folds into the query matrix and costs nothing in private.
        temperature_parametrization: the parameter is t itself ("literal", the paper), or log t ("exp"), which can
            neither reach 0 nor change sign.
        entropy_regularizer: options of `entropi.EntropyRegularizer` plus `weight` (lambda), or None. The
            thresholds are parameters of the model, so that they are trained, sharded and saved with it; they do
            not take part in inference.

    Raises:
        UserError: impossible values; names all of them and what would be legal.
    """

    model_type = "entropi"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "entropies"]  # noqa: RUF012

    architecture: str = "SM+LN+G"
    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_width: int = 0
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    position_embedding: str = "learned"
    rotary_fraction: float = 1.0
    rotary_base: float = 10000.0
    rotary_frequencies: list[list[float]] | None = None
    rotary_layers: list[int] | None = None
    query_key_norm: bool = False
    branch_norm: bool = False
    embedding_scale: float = 1.0
    parallel_residual: bool = False
    bias: str = "qk"
    final_norm: bool | None = None
    activation_function: str = "gelu_new"
    leaky_slope: float = 0.01
    leaky_slope_learned: str = "fixed"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float | None = None
    initialization: str = "depth_scaled"
    spectral_gain: bool = False
    embedding_dropout: float = 0.0
    log_length_scaling: bool = False
    softmax: str = "exact"
    temperature_init: float = 1.0
    temperature_granularity: str = "position"
    temperature_parametrization: str = "literal"
    entropy_regularizer: dict[str, Any] | None = None
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.architecture = self.architecture.replace(" ", "")
        # Files of older models have two other settings for it.
        kwargs = from_former(kwargs if self.softmax == "exact" else {**kwargs, "softmax": self.softmax})
        softmax = kwargs.pop("softmax", "exact")
        self.softmax, self.final_norm = with_defaults(self.architecture, softmax, self.final_norm)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if problems := self.problems():
            raise UserError("; ".join(problems))
        if self.initializer_range is None:
            self.initializer_range = 0.02 * (768 / self.hidden_size) ** 0.5
        super().__post_init__(**kwargs)

    def problems(self) -> list[str]:
        """Everything that is wrong with the values."""
        problems = []
        try:
            parse_architecture(self.architecture)
        except UserError as error:
            problems.append(str(error))
        if problem := softmax_problem(self.architecture, self.softmax):
            problems.append(problem)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                problems.append(f"{name} must be {_either(choices)}, got {getattr(self, name)!r}")
        if self.activation_function not in ACT2FN:
            problems.append(f"activation_function {self.activation_function!r} is none that transformers has")
        if self.spectral_gain and "SNorm" not in self.architecture:
            problems.append(f"spectral_gain is for architectures with +SNorm(..), not {self.architecture}")

        return [
            *problems,
            *self._problems_of_sizes(),
            *self._problems_of_numbers(),
            *self._problems_of_rotation(),
            *self._problems_of_branch_norm(),
        ]

    def _problems_of_sizes(self) -> list[str]:
        problems = []
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        least = dict.fromkeys((*sizes, "intermediate_size"), 1) | {"max_position_embeddings": 2, "head_width": 0}
        for name, smallest in least.items():
            # A file may say anything, and building so many layers would take until the memory ends.
            most = MOST_LAYERS if name == "num_hidden_layers" else MOST_WIDTH
            if getattr(self, name) < smallest:
                problems.append(f"{name} must be at least {smallest}, got {getattr(self, name)}")
            elif getattr(self, name) > most:
                problems.append(f"{name} must be at most {most}, got {getattr(self, name)}")

        multiples = [("num_attention_heads", "num_key_value_heads")]
        if not self.head_width:  # otherwise heads have a width of their own
            multiples.insert(0, ("hidden_size", "num_attention_heads"))
        for name, part in multiples:
            whole, parts = getattr(self, name), getattr(self, part)
            if parts > 0 and whole % parts:
                problems.append(f"{name} {whole} is not a multiple of {part} {parts}")
        return problems

    def _problems_of_numbers(self) -> list[str]:
        problems = []
        for name in ("temperature_init", "layer_norm_epsilon", "rotary_base", "embedding_scale"):
            if not 0 < getattr(self, name) < math.inf:
                problems.append(f"{name} must be positive and finite, got {getattr(self, name)}")
        if 0 < self.temperature_init < SMALLEST_TEMPERATURE:
            problems.append(f"temperature_init must be at least {SMALLEST_TEMPERATURE}, got {self.temperature_init}")
        if self.initializer_range is not None and not self.initializer_range > 0:
            problems.append(f"initializer_range must be positive, got {self.initializer_range}")
        if not 0 <= self.embedding_dropout < 1:
            problems.append(f"embedding_dropout must be in [0, 1), got {self.embedding_dropout}")
        if not 0 <= self.leaky_slope <= 1:
            problems.append(f"leaky_slope must be between 0 (ReLU) and 1 (the identity), got {self.leaky_slope}")
        return problems

    def _problems_of_rotation(self) -> list[str]:
        if not 0 < self.rotary_fraction <= 1:
            return [f"rotary_fraction must be in (0, 1], got {self.rotary_fraction}"]
        if self.position_embedding != "rotary" or self.num_attention_heads < 1:
            return []
        turning = self.head_dim * self.rotary_fraction
        if round(turning) % 2 or abs(turning - round(turning)) > 1e-6 or round(turning) < 2:
            return [
                f"rotary_fraction {self.rotary_fraction} of {self.head_dim} columns a head is {turning:g}, "
                "an even number is needed"
            ]
        if self.rotary_frequencies is None and self.rotary_layers is None:
            return []
        return self._problems_of_frequencies()

    def _problems_of_frequencies(self) -> list[str]:
        sets, layers, count = self.rotary_frequencies or [], self.rotary_layers, self.rotary_dimensions // 2
        problems = []
        if not sets or any(len(one) != count or not all(0 <= f < math.inf for f in one) for one in sets):
            problems.append(f"rotary_frequencies must be sets of {count} numbers that are not negative")
        if layers is not None and (len(layers) != self.num_hidden_layers or not set(layers) <= set(range(len(sets)))):
            problems.append(
                f"rotary_layers must name one of {len(sets)} sets for each of {self.num_hidden_layers} layers"
            )
        if layers is None and len(sets) > 1:
            problems.append("rotary_layers must say which set of rotary_frequencies each layer takes")
        return problems

    def _problems_of_branch_norm(self) -> list[str]:
        if not self.branch_norm or re.search(r"\+RMS\+(?!LeakyR)", self.architecture):
            return []
        return [f"branch_norm is for architectures with +RMS and an activation, not {self.architecture}"]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy the package's source beside every saved model that was loaded so."""

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
        """d_k, the width of one head."""
        return self.head_width or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dimensions(self) -> int:
        """Columns of every head that turn with the position; 0 with learned positions."""
        return round(self.head_dim * self.rotary_fraction) if self.position_embedding == "rotary" else 0


def _either(choices: tuple[str, ...]) -> str:
    """'a', 'b' or 'c'."""
    *first, last = (repr(choice) for choice in choices)
    return f"{', '.join(first)} or {last}"
