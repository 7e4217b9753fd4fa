"""Tiny models of other families with random weights, and folders of them with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY, POSITIONS = 61, 40
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=POSITIONS,
)
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = dict(vocab_size=VOCABULARY, n_embd=24, n_layer=3, n_head=4, n_positions=POSITIONS)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
# What each family can be that changes its logits: (class of the configuration, its fields).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2Config", GPT2),
    "GPT-2, other scales": (
        "GPT2Config",
        GPT2 | dict(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, tie_word_embeddings=False),
    ),
    "GPT-2 with ReLU": ("GPT2Config", GPT2 | dict(activation_function="relu", n_inner=30)),
    "GPT-NeoX": ("GPTNeoXConfig", SIZES | dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=1 / 3))),
    "GPT-NeoX, one after the other, scaled": (
        "GPTNeoXConfig",
        SIZES
        | dict(
            hidden_act="gelu_new",
            use_parallel_residual=False,
            attention_bias=False,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="linear", factor=2.0, partial_rotary_factor=1.0),
        ),
    ),
    "Llama": ("LlamaConfig", GROUPED),
    "Llama with biases, wide heads, tied": (
        "LlamaConfig",
        GROUPED | dict(attention_bias=True, mlp_bias=True, head_dim=10, tie_word_embeddings=True),
    ),
    "Llama 3.1": ("LlamaConfig", GROUPED | dict(rope_parameters=LLAMA3)),
    "Llama, linear scaling": (
        "LlamaConfig",
        GROUPED | dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0)),
    ),
    "Llama with GeGLU": ("LlamaConfig", GROUPED | dict(hidden_act="gelu")),
    "Mistral": ("MistralConfig", GROUPED | dict(sliding_window=None)),
    "Mistral with a window": ("MistralConfig", GROUPED | dict(sliding_window=24)),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Qwen2 with a window": (
        "Qwen2Config",
        GROUPED | dict(use_sliding_window=True, sliding_window=24, max_window_layers=2),
    ),
    "Qwen3": ("Qwen3Config", GROUPED | dict(head_dim=10)),
    "Qwen3 with biases": ("Qwen3Config", GROUPED | dict(head_dim=6, attention_bias=True, tie_word_embeddings=True)),
    "Gemma": ("GemmaConfig", GROUPED | dict(head_dim=10)),
    "Gemma 2": (
        "Gemma2Config",
        GROUPED
        | dict(
            head_dim=10,
            query_pre_attn_scalar=7,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            sliding_window=24,
        ),
    ),
    "Gemma 3": (
        "Gemma3TextConfig",
        GROUPED
        | dict(
            head_dim=10,
            query_pre_attn_scalar=7,
            sliding_window=24,
            sliding_window_pattern=2,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
    ),
}


def configuration(name: str, **changes: Any) -> Any:
    """The configuration of one of `CASES`."""
    kind, fields = CASES[name]
    return getattr(transformers, kind)(bos_token_id=1, eos_token_id=2, **(fields | changes))


def random_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """A model all of whose parameters are disturbed, so that none is at its start."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Single letters, with a chat template."""
    letters = [chr(ord(" ") + i) for i in range(VOCABULARY - 3)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The folder of a model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
