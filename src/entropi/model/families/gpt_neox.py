"""GPT-NeoX and Pythia: rotary positions in a part of each head, parallel residuals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from entropi.model.convert import Given, Weights, activation_part, rope_parameters, rotary_options

if TYPE_CHECKING:
    from torch import Tensor

    from entropi.model.configuration import EntropiConfig

NAME = "GPT-NeoX"


def options(given: Given) -> dict[str, Any]:
    given.ignore("attention_dropout", "hidden_dropout", "classifier_dropout", "is_decoder")
    function = given("hidden_act", "gelu")
    rope = rope_parameters(given, given("rotary_emb_base", 10000.0))
    rope.setdefault("partial_rotary_factor", given("rotary_pct", 0.25))
    return {
        "architecture": f"SM+LN+{activation_part(function)}",
        "activation_function": function,
        "vocab_size": given("vocab_size"),
        "hidden_size": given("hidden_size"),
        "num_hidden_layers": given("num_hidden_layers"),
        "num_attention_heads": given("num_attention_heads"),
        "intermediate_size": given("intermediate_size"),
        "max_position_embeddings": given("max_position_embeddings"),
        **rotary_options(given, given("hidden_size") // given("num_attention_heads"), rope),
        "parallel_residual": given("use_parallel_residual", True),
        "bias": "all" if given("attention_bias", True) else "ffn",
        "layer_norm_epsilon": given("layer_norm_eps", 1e-5),
        "initializer_range": given("initializer_range", 0.02),
        "tie_word_embeddings": given("tie_word_embeddings", False),
    }


def tensors(config: EntropiConfig, given: Given, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    yield "model.token_embedding.weight", weights("gpt_neox.embed_in.weight")
    if config.tie_word_embeddings:
        weights.drop("lm_head.weight")
    else:
        yield from weights.linear("lm_head", "lm_head")
    yield from weights.linear("gpt_neox.final_layer_norm", "model.final_norm")

    heads, width = config.num_attention_heads, config.hidden_size
    for i in range(config.num_hidden_layers):
        source, target = f"gpt_neox.layers.{i}", f"model.blocks.{i}"
        for _, joint in weights.linear(f"{source}.attention.query_key_value", ""):
            # Rows of the joint matrix run through head, then query, key and value, then the head's width.
            parts = joint.view(heads, 3, -1, *joint.shape[1:]).unbind(1)
            kind = "weight" if joint.dim() > 1 else "bias"
            for name, part in zip(("query", "key", "value"), parts):
                yield f"{target}.attention.{name}.{kind}", part.reshape(width, *joint.shape[1:])
        yield from weights.linear(f"{source}.attention.dense", f"{target}.attention.output")
        yield from weights.linear(f"{source}.mlp.dense_h_to_4h", f"{target}.feed_forward.up")
        yield from weights.linear(f"{source}.mlp.dense_4h_to_h", f"{target}.feed_forward.down")
        yield from weights.linear(f"{source}.input_layernorm", f"{target}.attention_norm")
        yield from weights.linear(f"{source}.post_attention_layernorm", f"{target}.feed_forward.norm")
