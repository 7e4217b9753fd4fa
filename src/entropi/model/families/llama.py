"""Llama 1 to 3.2, SmolLM2 and whatever else is saved as one; and what the families that come from it share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from entropi.model.convert import Given, Weights, activation_part, rope_parameters, rotary_options

if TYPE_CHECKING:
    from torch import Tensor

    from entropi.model.configuration import EntropiConfig

NAME = "Llama"
_BIAS = {(False, False): "none", (True, False): "attention", (False, True): "ffn", (True, True): "all"}


def options(given: Given) -> dict[str, Any]:
    given.ignore("pretraining_tp")
    bias = _BIAS[bool(given("attention_bias", False)), bool(given("mlp_bias", False))]
    return common(given) | rotary(given) | {"bias": bias}


def common(
    given: Given, activation: str = "hidden_act", usual: str = "silu", head_dim: int | None = None, tied: bool = False
) -> dict[str, Any]:
    """Options that all families of this kind have; the arguments are the defaults in which they differ."""
    given.ignore("attention_dropout")
    function = given(activation, usual)
    return {
        "architecture": f"SM+RMS+{activation_part(function, gated=True)}",
        "activation_function": "gelu_pytorch_tanh" if function in ("silu", "swish") else function,
        "vocab_size": given("vocab_size"),
        "hidden_size": given("hidden_size"),
        "num_hidden_layers": given("num_hidden_layers"),
        "num_attention_heads": given("num_attention_heads"),
        "num_key_value_heads": given("num_key_value_heads", given("num_attention_heads")),
        "head_width": head_width(given, head_dim),
        "intermediate_size": given("intermediate_size"),
        "max_position_embeddings": given("max_position_embeddings"),
        "layer_norm_epsilon": given("rms_norm_eps", 1e-6),
        "initializer_range": given("initializer_range", 0.02),
        "tie_word_embeddings": given("tie_word_embeddings", tied),
    }


def head_width(given: Given, usual: int | None = None) -> int:
    """Width of a head, 0 where it is what the width of the model makes it."""
    width, heads = given("hidden_size"), given("num_attention_heads")
    found = int(given("head_dim", usual) or width // heads)
    return 0 if found * heads == width else found


def rotary(given: Given, head_dim: int | None = None) -> dict[str, Any]:
    """Options of rotary positions that are the same in all layers."""
    width = head_width(given, head_dim) or given("hidden_size") // given("num_attention_heads")
    return rotary_options(given, width, rope_parameters(given))


def tensors(
    config: EntropiConfig, given: Given, weights: Weights, *, gain: float = 0.0, query_scale: float = 1.0
) -> Iterator[tuple[str, Tensor]]:
    """All weights, of the families that come from Llama too.

    Args:
        gain: what is added to the weights of norms (1 for Gemma).
        query_scale: what queries are multiplied by, in models that divide the logits by another root than the one of
            the head's width.
    """

    def norm(source: str, target: str, scale: float = 1.0) -> tuple[str, Tensor]:
        weight = weights(f"{source}.weight")
        return f"{target}.weight", (weight + gain) * scale if gain or scale != 1 else weight

    yield "model.token_embedding.weight", weights("model.embed_tokens.weight")
    if config.tie_word_embeddings:
        weights.drop("lm_head.weight")
    else:
        yield from weights.linear("lm_head", "lm_head")
    yield norm("model.norm", "model.final_norm")

    for i in range(config.num_hidden_layers):
        source, target = f"model.layers.{i}", f"model.blocks.{i}"
        on_norm = query_scale if config.query_key_norm else 1.0
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            scale = query_scale / on_norm if ours == "query" else 1.0
            for name, weight in weights.linear(f"{source}.self_attn.{theirs}_proj", f"{target}.attention.{ours}"):
                yield name, weight * scale if scale != 1 else weight
        if config.query_key_norm:
            yield norm(f"{source}.self_attn.q_norm", f"{target}.attention.query_norm", on_norm)
            yield norm(f"{source}.self_attn.k_norm", f"{target}.attention.key_norm")

        yield from gate_and_up(weights, f"{source}.mlp", f"{target}.feed_forward.up")
        yield from weights.linear(f"{source}.mlp.down_proj", f"{target}.feed_forward.down")
        yield norm(f"{source}.input_layernorm", f"{target}.attention_norm")
        if config.branch_norm:
            yield norm(f"{source}.post_attention_layernorm", f"{target}.branch_norm")
            yield norm(f"{source}.pre_feedforward_layernorm", f"{target}.feed_forward.norm")
            yield norm(f"{source}.post_feedforward_layernorm", f"{target}.feed_forward.branch_norm")
        else:
            yield norm(f"{source}.post_attention_layernorm", f"{target}.feed_forward.norm")


def gate_and_up(weights: Weights, source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    """The two matrices of a gated network as one, the gate first."""
    import torch

    pairs = zip(weights.linear(f"{source}.gate_proj", target), weights.linear(f"{source}.up_proj", target), strict=True)
    for (name, gate), (_, up) in pairs:
        yield name, torch.cat([gate, up])
