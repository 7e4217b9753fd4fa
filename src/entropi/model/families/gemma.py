"""Gemma: Llama with GeGLU, scaled embeddings, gains of norms counted from 1, and heads of their own width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from entropi.model.convert import Given, Weights
from entropi.model.families import llama

if TYPE_CHECKING:
    from torch import Tensor

    from entropi.model.configuration import EntropiConfig

NAME = "Gemma"


def options(given: Given) -> dict[str, Any]:
    found = common(given, "hidden_act") | llama.rotary(given, head_dim=256)
    if found["activation_function"] == "gelu":  # of the official releases, by which the tanh form is meant
        found["activation_function"] = "gelu_pytorch_tanh"
    return found


def common(given: Given, activation: str) -> dict[str, Any]:
    """What all generations have."""
    given.refuse("attention to later tokens", bool(given("use_bidirectional_attention", False)))
    found = llama.common(given, activation, "gelu_pytorch_tanh", head_dim=256, tied=True)
    found["embedding_scale"] = found["hidden_size"] ** 0.5
    found["bias"] = "attention" if given("attention_bias", False) else "none"
    return found


def tensors(
    config: EntropiConfig, given: Given, weights: Weights, query_scale: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    return llama.tensors(config, given, weights, gain=1.0, query_scale=query_scale)
