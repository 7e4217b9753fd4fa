"""entropi: language models that need few nonlinear operations, designed, trained, understood and run in private.

Public names are imported when they are first used, so that a client without torch, or training without JAX, can
import the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from entropi.entropy.announcing import announce

if TYPE_CHECKING:
    from entropi.costs.report import cost
    from entropi.entropy.attention import entropy_attention
    from entropi.entropy.diagnosis import Diagnosis, diagnose
    from entropi.entropy.recording import record_entropy, register_attention
    from entropi.entropy.regularizer import EntropyRegularizer
    from entropi.errors import UserError
    from entropi.model.configuration import EntropiConfig
    from entropi.model.decoder import EntropiForCausalLM
    from entropi.model.folding import fold
    from entropi.softmax import SoftmaxForm

__version__ = "0.1.0"
__all__ = [
    "Diagnosis",
    "EntropiConfig",
    "EntropiForCausalLM",
    "EntropyRegularizer",
    "SoftmaxForm",
    "UserError",
    "cost",
    "diagnose",
    "entropy_attention",
    "fold",
    "record_entropy",
    "register_attention",
]

_HOMES = {
    "Diagnosis": ("entropi.entropy.diagnosis", "Diagnosis"),
    "EntropiConfig": ("entropi.model.configuration", "EntropiConfig"),
    "EntropiForCausalLM": ("entropi.model.decoder", "EntropiForCausalLM"),
    "EntropyRegularizer": ("entropi.entropy.regularizer", "EntropyRegularizer"),
    "SoftmaxForm": ("entropi.softmax", "SoftmaxForm"),
    "UserError": ("entropi.errors", "UserError"),
    "cost": ("entropi.costs.report", "cost"),
    "diagnose": ("entropi.entropy.diagnosis", "diagnose"),
    "entropy_attention": ("entropi.entropy.attention", "entropy_attention"),
    "fold": ("entropi.model.folding", "fold"),
    "record_entropy": ("entropi.entropy.recording", "record_entropy"),
    "register_attention": ("entropi.entropy.recording", "register_attention"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'entropi' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


announce()  # so that transformers takes attn_implementation="entropi"
