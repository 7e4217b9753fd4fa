"""The text models of Gemma 3: Gemma 2 without soft caps, with norms of queries and keys, rotary positions by layer."""

from __future__ import annotations

from typing import Any

from entropi.model.convert import Given, rope_parameters, rotary_frequencies
from entropi.model.families import gemma2

NAME = "Gemma 3"
tensors = gemma2.tensors
GLOBAL, LOCAL = "full_attention", "sliding_attention"


def options(given: Given) -> dict[str, Any]:
    found = gemma2.branched(given, caps=(None, None)) | {"query_key_norm": True}
    layers, width = found["num_hidden_layers"], given("head_dim", 256)
    period = given("sliding_window_pattern", 6)
    types = given("layer_types", None) or [LOCAL if (i + 1) % period else GLOBAL for i in range(layers)]

    ropes = _ropes(given)
    used = [kind for kind in (GLOBAL, LOCAL) if kind in types]
    found |= {
        "position_embedding": "rotary",
        "rotary_base": float(ropes[used[0]]["rope_theta"]),
        "rotary_frequencies": [rotary_frequencies(given, ropes[kind], width) for kind in used],
        "rotary_layers": [used.index(kind) for kind in types],
    }
    return gemma2.windowed(given, found, types)


def _ropes(given: Given) -> dict[str, dict[str, Any]]:
    """Rotary parameters of the two kinds of layers, in transformers' new form or in the older one."""
    nested = given("rope_parameters", None)
    local = given("rope_local_base_freq", 1e4)
    if not isinstance(nested, dict) or not {GLOBAL, LOCAL} & set(nested):
        return {GLOBAL: rope_parameters(given, 1e6), LOCAL: {"rope_type": "default", "rope_theta": local}}
    return {
        kind: {"rope_type": "default", "rope_theta": theta} | (nested.get(kind) or {})
        for kind, theta in ((GLOBAL, 1e6), (LOCAL, local))
    }
