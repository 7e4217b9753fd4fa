"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from entropi.model.convert import Given, cut_to_window
from entropi.model.families import llama

NAME = "Qwen2"
tensors = llama.tensors


def options(given: Given) -> dict[str, Any]:
    return windowed(given, llama.common(given) | llama.rotary(given) | {"bias": "qkv"})


def windowed(given: Given, found: dict[str, Any]) -> dict[str, Any]:
    """With the context cut to the sliding window, where some layers have one."""
    window, layers = given("sliding_window", 4096), found["num_hidden_layers"]
    sliding = layers - given("max_window_layers", 28)
    if (types := given("layer_types", None)) is not None:
        sliding = types.count("sliding_attention")
    if given("use_sliding_window", False) and sliding > 0:
        found["max_position_embeddings"] = cut_to_window(given, found["max_position_embeddings"], window)
    return found
