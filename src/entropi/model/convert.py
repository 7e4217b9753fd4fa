"""Other families' weights under this family's names: GPT-2 and GPT-NeoX (Pythia)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from entropi.errors import UserError
from entropi.model.configuration import EntropiConfig

Weights = dict[str, Tensor]


def from_gpt2(theirs: Any, weights: Weights) -> tuple[EntropiConfig, Weights]:
    """Configuration and weights of a `GPT2LMHeadModel`, from its own.

    Raises:
        UserError: options this family does not have.
    """
    _refuse(
        "GPT-2",
        {
            "attention scales other than 1/sqrt(d_k)": theirs.scale_attn_by_inverse_layer_idx
            or not theirs.scale_attn_weights,
            "cross-attention": theirs.add_cross_attention,
        },
    )
    config = EntropiConfig(
        architecture="SM+LN+G",
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.n_embd,
        num_hidden_layers=theirs.n_layer,
        num_attention_heads=theirs.n_head,
        intermediate_size=theirs.n_inner,
        max_position_embeddings=theirs.n_positions,
        bias="all",
        activation_function=theirs.activation_function,
        layer_norm_epsilon=theirs.layer_norm_epsilon,
        initializer_range=theirs.initializer_range,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        tie_word_embeddings=theirs.tie_word_embeddings,
    )
    ours = {
        "model.token_embedding.weight": weights["transformer.wte.weight"],
        "model.position_embedding.weight": weights["transformer.wpe.weight"],
        "lm_head.weight": weights["lm_head.weight"],
        **_layer("model.final_norm", weights, "transformer.ln_f"),
    }
    for i in range(config.num_hidden_layers):
        source, target = f"transformer.h.{i}", f"model.blocks.{i}"
        # GPT-2's Conv1D holds the transpose of a Linear's weight.
        joint = weights[f"{source}.attn.c_attn.weight"].T.chunk(3), weights[f"{source}.attn.c_attn.bias"].chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), *joint):
            ours[f"{target}.attention.{name}.weight"] = weight
            ours[f"{target}.attention.{name}.bias"] = bias
        ours |= _layer(f"{target}.attention.output", weights, f"{source}.attn.c_proj", transposed=True)
        ours |= _layer(f"{target}.feed_forward.up", weights, f"{source}.mlp.c_fc", transposed=True)
        ours |= _layer(f"{target}.feed_forward.down", weights, f"{source}.mlp.c_proj", transposed=True)
        ours |= _layer(f"{target}.attention_norm", weights, f"{source}.ln_1")
        ours |= _layer(f"{target}.feed_forward.norm", weights, f"{source}.ln_2")
    return config, ours


def from_gpt_neox(theirs: Any, weights: Weights) -> tuple[EntropiConfig, Weights]:
    """Configuration and weights of a `GPTNeoXForCausalLM`, from its own.

    Raises:
        UserError: options this family does not have.
    """
    rope = theirs.rope_parameters
    _refuse(
        "GPT-NeoX",
        {
            f"the rotary scaling {rope['rope_type']!r}": rope["rope_type"] != "default",
            "attention without biases": not theirs.attention_bias,
        },
    )
    config = EntropiConfig(
        architecture="SM+LN+G",
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        num_hidden_layers=theirs.num_hidden_layers,
        num_attention_heads=theirs.num_attention_heads,
        intermediate_size=theirs.intermediate_size,
        max_position_embeddings=theirs.max_position_embeddings,
        position_embedding="rotary",
        rotary_fraction=rope.get("partial_rotary_factor", 1.0),
        rotary_base=rope["rope_theta"],
        parallel_residual=theirs.use_parallel_residual,
        bias="all",
        activation_function=theirs.hidden_act,
        layer_norm_epsilon=theirs.layer_norm_eps,
        initializer_range=theirs.initializer_range,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        tie_word_embeddings=theirs.tie_word_embeddings,
    )
    ours = {
        "model.token_embedding.weight": weights["gpt_neox.embed_in.weight"],
        "lm_head.weight": weights["lm_head.weight"],
        **_layer("model.final_norm", weights, "gpt_neox.final_layer_norm"),
    }
    heads, width = config.num_attention_heads, config.hidden_size
    for i in range(config.num_hidden_layers):
        source, target = f"gpt_neox.layers.{i}", f"model.blocks.{i}"
        # Rows of the joint matrix run through head, then query, key and value, then the head's width.
        joint = weights[f"{source}.attention.query_key_value.weight"].view(heads, 3, -1, width)
        bias = weights[f"{source}.attention.query_key_value.bias"].view(heads, 3, -1)
        for part, name in enumerate(("query", "key", "value")):
            ours[f"{target}.attention.{name}.weight"] = joint[:, part].reshape(width, width)
            ours[f"{target}.attention.{name}.bias"] = bias[:, part].reshape(width)
        ours |= _layer(f"{target}.attention.output", weights, f"{source}.attention.dense")
        ours |= _layer(f"{target}.feed_forward.up", weights, f"{source}.mlp.dense_h_to_4h")
        ours |= _layer(f"{target}.feed_forward.down", weights, f"{source}.mlp.dense_4h_to_h")
        ours |= _layer(f"{target}.attention_norm", weights, f"{source}.input_layernorm")
        ours |= _layer(f"{target}.feed_forward.norm", weights, f"{source}.post_attention_layernorm")
    return config, ours


def _layer(target: str, weights: Weights, source: str, transposed: bool = False) -> Weights:
    """Weight and bias of one layer under another name."""
    weight = weights[f"{source}.weight"]
    return {f"{target}.weight": weight.T if transposed else weight, f"{target}.bias": weights[f"{source}.bias"]}


def _refuse(family: str, lacking: dict[str, bool]) -> None:
    """Raise an error that names every option which is set and which entropi models do not have."""
    if found := [what for what, present in lacking.items() if present]:
        raise UserError(f"this {family} uses {' and '.join(found)}, which entropi models do not have")
