"""Architecture names in the paper's notation, parsed into the choices they stand for. Imports nothing heavy.

    SM | SM(t)   softmax, with learnable temperatures       + LN | RMS             norm before attention and FFN
    Pow | Pow(t)   powers of logits over the number of keys or a constant, in the softmax's place
    + WNorm(..) | SNorm(..)   norm on weights, instead      + G | R | LeakyR | Square | Bilinear   FFN activation
                                                            + ScFFN | ScFuFFN      scaled linear FFN (Eq. 8)

Parts are in this order, all but the first optional. Pow, RMS, Square and Bilinear are not the paper's; LeakyR is that
of the authors' "ReLU's Revival" (2410.09637). Pow+ScFuFFN and Pow(t)+ScFuFFN are nothing but products: without a norm
in the layers, architectures of powers have none before the head either, unless they are told to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from entropi.activations import ACTIVATIONS, known_activation
from entropi.errors import UserError
from entropi.softmax import OVER_KEYS, parse_of_model

# What WNorm and SNorm may be applied to (Table 5 of the paper): linear layers by their names in the model.
WEIGHT_NORM_TARGETS: dict[str, frozenset[str]] = {
    "QK": frozenset({"query", "key"}),
    "FFN": frozenset({"ffn"}),
    "QK+FFN": frozenset({"query", "key", "ffn"}),
    "QKV+FFN": frozenset({"query", "key", "value", "ffn"}),
    "QKVO+FFN": frozenset({"query", "key", "value", "output", "ffn"}),
}


@dataclass(frozen=True)
class Parts:
    """The choices an architecture name stands for (Table 1 and section 4 of the paper)."""

    powers: bool = False  # powers of logits over a public number in the softmax's place, "Pow"
    temperature: bool = False  # learnable softmax temperature, "SM(t)"
    norm: Literal["layernorm", "rmsnorm", "none"] = "none"
    weight_norm: Literal["weight", "spectral", "none"] = "none"
    weight_norm_target: str = ""  # a key of WEIGHT_NORM_TARGETS, "" without weight norm
    activation: str = "identity"  # or the name of one of ACTIVATIONS
    ffn: Literal["plain", "scaled", "fused"] = "plain"  # "ScFFN" and "ScFuFFN" are scaled as in Eq. 8

    @property
    def gated(self) -> bool:
        """The feed-forward network multiplies two halves of what its first matrix computes."""
        known = known_activation(self.activation)
        return known is not None and known.gated

    @property
    def softmax_only(self) -> bool:
        """Softmax, or what stands in its place, is the only nonlinear operation in the layers."""
        return self.norm == "none" and self.activation == "identity"

    def normalises(self, linear: str) -> bool:
        """Whether the weight of "query", "key", "value", "output" or "ffn" is normalised."""
        return linear in WEIGHT_NORM_TARGETS.get(self.weight_norm_target, frozenset())


_NORMS = {"LN": Parts(norm="layernorm"), "RMS": Parts(norm="rmsnorm")}
_HEADS = ("SM", "SM(t)", "Pow", "Pow(t)")
_SCALED = {"ScFFN": Parts(ffn="scaled"), "ScFuFFN": Parts(ffn="fused")}


def legal_names() -> str:
    """What an architecture's name may be, in words."""
    networks = ", ".join(f"+{name}" for name in (*ACTIVATIONS, *_SCALED))
    return (
        f"{_either(_HEADS)}; then at most one of +LN, +RMS, +WNorm(TARGET), +SNorm(TARGET), where TARGET is "
        f"{', '.join(WEIGHT_NORM_TARGETS)}; then at most one of {networks} "
        "(+ScFFN and +ScFuFFN without +LN or +RMS), for example SM+LN+G, SM+SNorm(QK+FFN), SM(t)+ScFuFFN"
    )


def parse_architecture(name: str) -> Parts:
    """The parts of an architecture name; spaces do not matter.

    Raises:
        UserError: not a legal name; says what is wrong with it and lists the legal ones.
    """
    bare = name.replace(" ", "")
    head, *rest = re.split(r"\+(?![^()]*\))", bare)  # pluses within parentheses belong to a target
    problems = []
    if head not in _HEADS:
        problems.append(f"it begins with {head!r} instead of {_either(_HEADS)}")
    parts = Parts(powers=head.startswith("Pow"), temperature=head.endswith("(t)"))
    seen: list[str] = []
    for word in rest:
        weight_norm = re.fullmatch(r"([WS])Norm\((.*)\)", word)
        if word in _NORMS or weight_norm:
            kind, chosen = "norm", parts.norm != "none" or parts.weight_norm != "none"
        elif word in ACTIVATIONS or word in _SCALED:
            kind, chosen = "feed-forward network", parts.activation != "identity" or parts.ffn != "plain"
        else:
            problems.append(f"{word!r} is unknown")
            continue
        if chosen:
            problems.append(f"+{word} is a second {kind}")
        elif kind == "norm" and "feed-forward network" in seen:
            problems.append(f"+{word} comes after the feed-forward network")
        elif weight_norm and weight_norm.group(2) not in WEIGHT_NORM_TARGETS:
            problems.append(f"{weight_norm.group(2)!r} is no target of {weight_norm.group(1)}Norm")
        elif weight_norm:
            norm: Literal["weight", "spectral"] = "weight" if weight_norm.group(1) == "W" else "spectral"
            parts = replace(parts, weight_norm=norm, weight_norm_target=weight_norm.group(2))
        elif kind == "norm":
            parts = replace(parts, norm=_NORMS[word].norm)
        else:
            if parts.norm != "none" and word in _SCALED:
                problems.append(f"+{word} is for models without a norm of the residual stream")
            if word in ACTIVATIONS:
                parts = replace(parts, activation=ACTIVATIONS[word].name)
            else:
                parts = replace(parts, ffn=_SCALED[word].ffn)
        seen.append(kind)
    if problems:
        raise UserError(f"unknown architecture {name!r}: {', '.join(problems)}; legal are {legal_names()}")
    return parts


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _has_powers(architecture: str) -> bool:
    """By the beginning of a name, for training too, whose rest need not be legal: that is another's to refuse."""
    return architecture.replace(" ", "").removeprefix("EReg(").startswith("Pow")


def with_defaults(architecture: str, softmax: str, final_norm: bool | None) -> tuple[str, bool]:
    """Softmax and final norm of an architecture by name, where "exact" and None stand for its own.

    Of powers these are squares of logits, and no final norm where the layers have none; otherwise the exact softmax and
    a norm. A name that is not legal is another function's to refuse.
    """
    powers, norms = _has_powers(architecture), {"LN", "RMS"} & set(re.split(r"[+)]", architecture.replace(" ", "")))
    own = str(OVER_KEYS) if powers and softmax == "exact" else softmax
    return own, bool(norms or not powers) if final_norm is None else final_norm


def softmax_problem(architecture: str, softmax: str) -> str | None:
    """What is wrong with a softmax, by itself or in this architecture, or None."""
    try:
        form = parse_of_model(softmax)
    except UserError as error:
        return str(error)
    powers = _has_powers(architecture)
    if powers == form.public_divisor:
        return None
    if powers:
        return (
            f"{architecture} has powers of logits over a public number: softmax must be polynomial-1/keys to "
            f"polynomial-8/keys, or with a number such as 128 in the place of keys, got {softmax!r}"
        )
    return f"softmax {softmax} is for architectures that begin with Pow, such as Pow(t)+ScFuFFN, not {architecture}"


PAPER_ARCHITECTURES = (
    "SM+LN+G",
    "SM+LN+R",
    "SM+LN",
    "SM+G",
    "SM+R",
    "SM",
    *(f"SM+{norm}({target})" for norm in ("WNorm", "SNorm") for target in WEIGHT_NORM_TARGETS),
    "SM+ScFFN",
    "SM+ScFuFFN",
    "SM(t)+ScFuFFN",
)
FURTHER_ARCHITECTURES = (
    "SM+LeakyR",
    "SM+RMS+G",
    "SM+RMS+R",
    "SM+RMS",
    "SM+Square",
    "SM+LN+Square",
    "SM+RMS+Bilinear",
    "SM+Bilinear",
    "SM+RMS+SwiGLU",
    "SM+RMS+GeGLU",
    "SM(t)+LN+G",
    "SM(t)+RMS+LeakyR",
    "SM(t)+ScFFN",
    "SM(t)+SNorm(QKVO+FFN)+ScFuFFN",
    "SM(t)+WNorm(QKV+FFN)+ScFFN",
    "SM+SNorm(FFN)+R",
    "Pow+ScFuFFN",
    "Pow(t)+ScFuFFN",
    "Pow(t)+LN+G",
)
# The named ones and some combinations: what tests and tables go through. Every name that parses is legal.
ARCHITECTURES: dict[str, Parts] = {
    name: parse_architecture(name) for name in (*PAPER_ARCHITECTURES, *FURTHER_ARCHITECTURES)
}


def split_training_name(name: str) -> tuple[str, bool]:
    """("SM(t)+ScFuFFN", True) from "EReg(SM(t)+ScFuFFN)": the architecture, and whether entropy is regularised.

    Raises:
        UserError: as `parse_architecture`.
    """
    bare = name.replace(" ", "")
    match = re.fullmatch(r"EReg\((.*)\)", bare)
    architecture = match.group(1) if match else bare
    parse_architecture(architecture)
    return architecture, match is not None
