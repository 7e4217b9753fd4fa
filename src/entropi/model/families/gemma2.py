"""Gemma 2 without its soft caps: Gemma with norms of branches and a scale of the logits of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from entropi.model.convert import Given, Weights, cut_to_window
from entropi.model.families import gemma, llama

if TYPE_CHECKING:
    from torch import Tensor

    from entropi.model.configuration import EntropiConfig

NAME = "Gemma 2"


def options(given: Given) -> dict[str, Any]:
    found = branched(given, caps=(50.0, 30.0)) | llama.rotary(given, head_dim=256)
    layers = found["num_hidden_layers"]
    types = given("layer_types", None) or ["sliding_attention", "full_attention"] * layers
    return windowed(given, found, types[:layers])


def branched(given: Given, caps: tuple[float | None, float | None]) -> dict[str, Any]:
    """What the second and third generation share; `caps` are the defaults of their soft caps."""
    attention, final = (
        value if given.has(name) else cap
        for name, cap in zip(("attn_logit_softcapping", "final_logit_softcapping"), caps)
        for value in [given(name, None)]
    )
    given.refuse("a soft cap of attention's logits", attention is not None)
    given.refuse("a soft cap of the final logits", final is not None)
    given.ignore("query_pre_attn_scalar")  # `tensors` reads it
    return gemma.common(given, "hidden_activation") | {"branch_norm": True}


def windowed(given: Given, found: dict[str, Any], types: list[str]) -> dict[str, Any]:
    """With the context cut to the sliding window, where a layer has one."""
    window = given("sliding_window", None if given.has("sliding_window") else 4096)
    if "sliding_attention" in types:
        found["max_position_embeddings"] = cut_to_window(given, found["max_position_embeddings"], window)
    return found


def tensors(config: EntropiConfig, given: Given, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    scale = (config.head_dim / given("query_pre_attn_scalar", 256)) ** 0.5
    return gemma.tensors(config, given, weights, query_scale=scale)
