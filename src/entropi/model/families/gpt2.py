"""GPT-2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from entropi.model.convert import Given, Weights, activation_part

if TYPE_CHECKING:
    from torch import Tensor

    from entropi.model.configuration import EntropiConfig

NAME = "GPT-2"


def options(given: Given) -> dict[str, Any]:
    given.refuse("cross-attention", bool(given("add_cross_attention", False)))
    given.ignore("attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn")
    given.ignore(*(f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")))
    given.ignore("scale_attn_weights", "scale_attn_by_inverse_layer_idx")  # `tensors` reads them
    function = given("activation_function", "gelu_new")
    return {
        "architecture": f"SM+LN+{activation_part(function)}",
        "activation_function": function,
        "vocab_size": given("vocab_size"),
        "hidden_size": given("n_embd"),
        "num_hidden_layers": given("n_layer"),
        "num_attention_heads": given("n_head"),
        "intermediate_size": given("n_inner", 4 * given("n_embd")),
        "max_position_embeddings": given("n_positions", 1024),
        "bias": "all",
        "layer_norm_epsilon": given("layer_norm_epsilon", 1e-5),
        "initializer_range": given("initializer_range", 0.02),
        "tie_word_embeddings": given("tie_word_embeddings", True),
    }


def tensors(config: EntropiConfig, given: Given, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    yield "model.token_embedding.weight", weights("transformer.wte.weight")
    yield "model.position_embedding.weight", weights("transformer.wpe.weight")
    if config.tie_word_embeddings:
        weights.drop("lm_head.weight")
    else:
        yield from weights.linear("lm_head", "lm_head")
    yield from weights.linear("transformer.ln_f", "model.final_norm")

    for i in range(config.num_hidden_layers):
        source, target = f"transformer.h.{i}", f"model.blocks.{i}"
        # Logits that are not divided by the root of the head's width, or by the layer's number too.
        scale = 1.0 if given("scale_attn_weights", True) else config.head_dim**0.5
        scale /= i + 1 if given("scale_attn_by_inverse_layer_idx", False) else 1
        # GPT-2's Conv1D holds the transpose of a Linear's weight.
        for kind in ("weight", "bias"):
            joint = weights(f"{source}.attn.c_attn.{kind}")
            for name, part in zip(("query", "key", "value"), joint.T.chunk(3) if kind == "weight" else joint.chunk(3)):
                part = part * scale if name == "query" and scale != 1 else part
                yield f"{target}.attention.{name}.{kind}", part.contiguous()
        yield from weights.linear(f"{source}.attn.c_proj", f"{target}.attention.output", transposed=True)
        yield from weights.linear(f"{source}.mlp.c_fc", f"{target}.feed_forward.up", transposed=True)
        yield from weights.linear(f"{source}.mlp.c_proj", f"{target}.feed_forward.down", transposed=True)
        yield from weights.linear(f"{source}.ln_1", f"{target}.attention_norm")
        yield from weights.linear(f"{source}.ln_2", f"{target}.feed_forward.norm")
