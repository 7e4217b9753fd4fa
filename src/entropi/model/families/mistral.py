"""Mistral: Llama with a sliding window in some versions, within which it is exact."""

from __future__ import annotations

from typing import Any

from entropi.model.convert import Given, cut_to_window
from entropi.model.families import llama

NAME = "Mistral"
tensors = llama.tensors


def options(given: Given) -> dict[str, Any]:
    found = llama.common(given) | llama.rotary(given) | {"bias": "none"}
    # An absent field means 4096; null means that there is no window, which `given` cannot tell apart.
    window = given("sliding_window", None if given.has("sliding_window") else 4096)
    found["max_position_embeddings"] = cut_to_window(given, found["max_position_embeddings"], window)
    return found
