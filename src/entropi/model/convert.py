"""Other families' configurations and weights as this family's. What each family needs is a file of `families`.

Such a file, named by transformers' `model_type`, has three names:

    NAME                            what the family is called
    options(given)                  from its configuration to the options of an `EntropiConfig`
    tensors(config, given, weights) from its weights to ours, name by name

`options` reads every field of the family's configuration: by using it, by `ignore` where logits do not depend on it, or
by `refuse` where this family has no such thing. Nothing here imports torch or transformers, which `entropi cost` does
without.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from entropi.errors import UserError
from entropi.model import families

if TYPE_CHECKING:
    from torch import Tensor

    from entropi.model.configuration import EntropiConfig

_REQUIRED = object()
_UNGATED = {"relu": "R"} | dict.fromkeys(("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python"), "G")
_GATED = {"silu": "SwiGLU", "swish": "SwiGLU"} | {name: "GeGLU" for name, part in _UNGATED.items() if part == "G"}


class Family(Protocol):
    """A module of `families`."""

    NAME: str

    def options(self, given: Given, /) -> dict[str, Any]: ...

    def tensors(self, config: EntropiConfig, given: Given, weights: Weights, /) -> Iterator[tuple[str, Tensor]]: ...


class Given:
    """Another family's configuration, from its `config.json` or as transformers has it.

    `known` are the names of the fields that were read, ignored or refused; `notes` say what a user should know.
    """

    def __init__(self, family: str, values: Mapping[str, Any]) -> None:
        self.family, self._values = family, values
        self.known: set[str] = set()
        self.notes: list[str] = []
        self._lacking: list[str] = []

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a field, or transformers' default of it where there is none.

        Raises:
            KeyError: a field that has no default is missing.
        """
        self.known.add(name)
        value = self._values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise KeyError(name)
            return default
        return value

    def has(self, name: str) -> bool:
        """Whether a field is there, if only as null."""
        return name in self._values

    def ignore(self, *names: str) -> None:
        """Logits do not depend on these fields."""
        self.known |= set(names)

    def refuse(self, what: str, when: bool) -> None:
        """Remember that the model uses something that this family does not have."""
        if when:
            self._lacking.append(what)

    def check(self) -> None:
        """Raise `UserError` that names everything refused."""
        if self._lacking:
            raise UserError(f"this {self.family} uses {' and '.join(self._lacking)}, which entropi models do not have")


class Weights:
    """Another family's weights, each taken once and then no longer held.

    Args:
        held: by name; emptied.
        copied: give copies, since somebody else goes on using the weights.
    """

    def __init__(self, held: MutableMapping[str, Tensor], *, copied: bool = False) -> None:
        self._held, self._copied = held, copied

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __call__(self, name: str) -> Tensor:
        """One of them, contiguous.

        Raises:
            UserError: it is missing.
        """
        if name not in self._held:
            raise UserError(f"the checkpoint lacks the tensor {name}")
        weight = self._held.pop(name)
        return weight.clone() if self._copied else weight

    def linear(self, source: str, target: str, *, transposed: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Weight and, where there is one, bias of a layer."""
        weight = self(f"{source}.weight")
        yield f"{target}.weight", weight.T.contiguous() if transposed else weight
        if f"{source}.bias" in self:
            yield f"{target}.bias", self(f"{source}.bias")

    def drop(self, name: str) -> None:
        """Leave out a tensor that another one stands for."""
        self._held.pop(name, None)

    def left(self) -> list[str]:
        """Names that nobody took."""
        return sorted(self._held)


def known_families() -> list[str]:
    """`model_type`s that can be converted."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def family_of(model_type: object) -> Family:
    """The module of a family.

    Raises:
        UserError: none is known; lists the known ones.
    """
    if model_type not in (known := known_families()):
        raise UserError(
            f"models of type {model_type!r} cannot be converted; those of {', '.join(known)} can, entropi's own need "
            "no conversion"
        )
    family: Any = import_module(f"{families.__name__}.{model_type}")
    return family


def options_of(values: Mapping[str, Any]) -> tuple[dict[str, Any], Given]:
    """Options of an `EntropiConfig` from another family's configuration, and what was read of it.

    Raises:
        UserError: another family, or options that entropi models do not have.
        KeyError: a field without a default is missing.
    """
    family = family_of(values.get("model_type"))
    given = Given(family.NAME, values)
    given.refuse("quantised weights", bool(values.get("quantization_config")))
    options = family.options(given)
    given.ignore("use_cache")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        options[name] = given(name, None)
    given.check()
    return options, given


def renamed(config: EntropiConfig, given: Given, model_type: str, weights: Weights) -> dict[str, Tensor]:
    """All weights under this family's names.

    Raises:
        UserError: a tensor is missing, or there is one more than the model has.
    """
    ours = dict(family_of(model_type).tensors(config, given, weights))
    if config.tie_word_embeddings:
        ours["lm_head.weight"] = ours["model.token_embedding.weight"]
    if left := weights.left():
        raise UserError(f"the checkpoint has the tensor {left[0]}, which a {given.family} of its configuration has not")
    return ours


# --- What several families share --------------------------------------------------------------------------------------


def activation_part(name: str, *, gated: bool = False) -> str:
    """The part of an architecture's name that stands for one of transformers' activations.

    Raises:
        UserError: there is no such part.
    """
    table = _GATED if gated else _UNGATED
    if name not in table:
        known = "silu and gelu" if gated else "relu and gelu"
        raise UserError(f"the activation {name!r} has no secure form; known are {known}")
    return table[name]


def cut_to_window(given: Given, positions: int, window: int | None) -> int:
    """As many positions as a sliding window lets every token see: so far the model is exactly one without it."""
    if window is None or window >= positions:
        return positions
    given.notes.append(f"its context is cut from {positions:,} tokens to the {window:,} of its sliding window")
    return int(window)


def rope_parameters(given: Given, base: float = 10000.0) -> dict[str, Any]:
    """The fields on rotary positions, in transformers' new form or in the older one."""
    found = dict(given("rope_parameters", None) or given("rope_scaling", None) or {})
    given.ignore("rope_scaling")
    found.setdefault("rope_theta", given("rope_theta", base))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def rotary_frequencies(given: Given, rope: Mapping[str, Any], columns: int) -> list[float]:
    """Angles a position of every pair of turning columns; refuses scalings that depend on the text's length."""
    base, kind = float(rope["rope_theta"]), rope["rope_type"]
    plain = [base ** (-j / columns) for j in range(0, columns, 2)]
    if kind == "default":
        return plain
    if kind == "linear":
        return [frequency / rope["factor"] for frequency in plain]
    if kind == "llama3":
        return [_llama3(frequency, rope) for frequency in plain]
    given.refuse(f"the rotary scaling {kind!r}", True)
    return plain


def _llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    """Llama 3.1: low frequencies are divided by `factor`, high ones stay, and those between go over linearly."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)  # within the first context
    share = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * ((1 - share) / rope["factor"] + share)


def rotary_options(given: Given, head_dim: int, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Options for one set of frequencies in all layers."""
    fraction = float(rope.get("partial_rotary_factor", 1.0))
    options: dict[str, Any] = {
        "position_embedding": "rotary",
        "rotary_fraction": fraction,
        "rotary_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] != "default":
        options["rotary_frequencies"] = [rotary_frequencies(given, rope, round(head_dim * fraction))]
    return options
