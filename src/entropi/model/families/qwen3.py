"""Qwen3: Llama with norms of queries and keys, and heads of their own width."""

from __future__ import annotations

from typing import Any

from entropi.model.convert import Given
from entropi.model.families import llama, qwen2

NAME = "Qwen3"
tensors = llama.tensors


def options(given: Given) -> dict[str, Any]:
    found = llama.common(given, head_dim=128) | llama.rotary(given, head_dim=128)
    found |= {"query_key_norm": True, "bias": "attention" if given("attention_bias", False) else "none"}
    return qwen2.windowed(given, found)
