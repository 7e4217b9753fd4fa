"""Every family of text models that transformers can build, tiny; what recording makes of each.

`python tests/families.py` prints the results, with `--write` it writes docs/families.md; names of families restrict it.

A family is *right* if the mean entropies of every layer and head are those of eager attention's weights and the model's
outputs are unchanged, without padding, with padding left and right and in generation with a cache; or *refused* in one
line; anything else is *wrong*.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import inspect
import re
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

import entropi

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
SEED, BATCH, LENGTH, VOCABULARY, FIRST_TOKEN = 0, 3, 14, 120, 40  # tokens below FIRST_TOKEN may be special
NEW_TOKENS = 3
SECTIONS = {
    "causal": "Causal language models",
    "seq2seq": "Encoder-decoders",
    "multimodal": "Multimodal models, on text alone",
    "text": "Encoders and models without a head",
}

# --- Tiny configurations -------------------------------------------------------------------------------------------

HIDDEN, HEADS, HEAD_DIM, LAYERS = 32, 4, 8, 2
RULES: dict[str, Any] = {}  # field of a configuration: its tiny value


def _rule(value: Any, fields: str) -> None:
    RULES.update(dict.fromkeys(fields.split(), value))


_rule(VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size")
_rule(VOCABULARY, "entity_vocab_size t2u_vocab_size char_vocab_size decoder_vocab_size text_vocab_size")
_rule(64, "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base")
_rule(HIDDEN, "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim word_embed_proj_dim embedding_dim")
_rule(HIDDEN, "input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim entity_emb_size")
_rule(HIDDEN, "backbone_hidden_size projection_dim lru_width hidden_size_global text_hidden_size condition_dim")
_rule(HIDDEN, "audio_hidden_size d_latents decoder_hidden_size proj_dim output_dim")
_rule(HIDDEN, "text_embed_dim vision_embed_dim projector_hidden_size out_hidden_size moe_hidden_size")
_rule(HIDDEN, "cross_hidden_size upsample_initial_channel")
_rule(HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads")
_rule(HEADS, "num_encoder_attention_heads num_decoder_attention_heads attention_heads")
_rule(HEADS, "num_self_attention_heads num_cross_attention_heads t2u_encoder_attention_heads")
_rule(HEADS, "t2u_decoder_attention_heads speech_encoder_attention_heads linear_num_heads linear_num_value_heads")
_rule(HEADS, "mamba_num_heads n_mamba_heads mamba_n_heads num_local_attention_heads cross_num_attention_heads")
_rule(2, "swa_num_attention_heads")  # layers that differ in heads
_rule(1, "swa_num_key_value_heads")
_rule(2, "num_key_value_heads num_kv_heads linear_num_key_heads num_global_key_value_heads")
_rule(2, "cross_num_key_value_heads")
_rule(HEAD_DIM, "head_dim dim_head d_kv d_head swa_head_dim kv_channels attention_head_size global_head_dim")
_rule(HEAD_DIM, "cross_head_dim")
_rule(HEAD_DIM, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim mamba_d_head mamba_headdim")
_rule(LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers")
_rule(LAYERS, "num_decoder_layers t2u_encoder_layers t2u_decoder_layers speech_encoder_layers num_blocks depth")
_rule(LAYERS, "num_self_attends_per_block num_layers_per_stack")
_rule(1, "num_sparse_encoder_layers num_sparse_decoder_layers num_nextn_predict_layers num_mtp_layers num_codebooks")
_rule(48, "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim n_inner d_ff dff dim_ff hidden_dim d_inner")
_rule(48, "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size")
_rule(48, "shared_intermediate_size moe_shared_expert_intermediate_size feed_forward_size intermediate_size_mlp")
_rule(48, "dense_intermediate_size prefix_dense_intermediate_size shared_experts_intermediate_size prompt_mid_dim")
_rule(48, "t2u_encoder_ffn_dim t2u_decoder_ffn_dim speech_encoder_intermediate_size router_hidden_size mlp_dim")
_rule(64, "max_position_embeddings n_positions n_ctx max_seq_len max_encoder_position_embeddings context_length")
_rule(64, "max_decoder_position_embeddings max_target_positions max_source_positions t2u_max_position_embeddings")
_rule(4, "num_experts n_routed_experts num_local_experts moe_num_experts")
_rule(2, "num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token")
_rule(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group zero_expert_num")
_rule(1, "first_k_dense_replace moe_layer_start_index num_dense_layers")
_rule(16, "kv_lora_rank o_lora_rank hc_lowrank embedding_rank gated_norm_rank")
_rule(12, "q_lora_rank")
_rule(4, "qk_rope_head_dim rotary_dim swa_rope_head_dim")
_rule(8, "qk_nope_head_dim")
_rule(6, "v_head_dim")  # not that of queries and keys
_rule(5, "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size keep_window_size")
_rule(5, "local_attention_window_len")
_rule(6, "local_attention")  # of which each side is half
_rule(2.0, "attn_logit_softcapping")  # a cap that the small logits of tiny models reach
_rule(4, "floor_scale log_scaling_n_floor original_max_position_embeddings")
_rule(4, "index_topk indexer_budget index_block_size")
_rule(2, "index_topk_blocks compress_ratio indexer_compress_ratio")
_rule(8, "index_head_dim indexer_head_dim")
_rule(2, "index_n_heads indexer_n_heads")
_rule(8, "mamba_d_state state_size ssm_state_size")
_rule(16, "mamba_d_ssm time_step_rank mamba_dt_rank hidden_size_per_layer_input laurel_rank adapter_rank")
_rule(1, "mamba_n_groups n_groups mamba_ngroups")
_rule(8, "mamba_chunk_size chunk_size block_size global_block_size canvas_length")
_rule(3, "local_radius")
_rule(HEADS, "q_groups k_groups v_groups intermediate_groups output_groups")
_rule(16, "image_size num_landmarks segment_means_seq_len intra_bottleneck_size true_hidden_size num_centroids")
_rule(8, "patch_size")

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Fields that lay out kinds of layers; a pattern shows only in a few of them.
LAYOUT = {
    *("layer_types", "layers_block_type", "mlp_layer_types", "attn_layer_indices", "attn_layer_period"),
    *("sliding_window_pattern", "no_rope_layers", "full_attn_idxs", "local_layer_ids", "layer_group_size"),
    *("global_attn_every_n_layers", "max_window_layers"),
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS_ROPE = ROPE | {"mrope_section": [2, 1, 1]}  # of half a head's width, for time, height and width
# What the rules do not do: arguments by a configuration's model type; a dictionary for one within it adds to its own.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align": dict(vision_config=dict(depth_coefficient=0.1, width_coefficient=0.1)),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "blt_local_encoder": dict(hidden_size_global=HIDDEN),
    "bridgetower": dict(hidden_size=64, text_config=dict(hidden_size=64), vision_config=dict(hidden_size=64)),
    "bros": dict(hidden_size=64),
    "chameleon": dict(vocabulary_map={"<image>": 5}),
    "clap_audio_model": dict(patch_embeds_hidden_size=16, num_attention_heads=(2, 2, 2, 2), depths=(1, 1, 1, 1)),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={"sliding_attention": SECTIONS_ROPE, "full_attention": SECTIONS_ROPE},
    ),
    "cosmos3_edge_text": dict(rope_parameters=SECTIONS_ROPE),
    "dac": dict(encoder_hidden_size=4),
    "dbrx": dict(
        attn_config=dict(rope_theta=10000.0, kv_n_heads=2, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"] * 2),
    "dots1": dict(max_window_layers=2),
    "dots3_note_text": dict(
        swa_num_attention_heads=2,
        swa_num_key_value_heads=2,
        swa_q_lora_rank=12,
        swa_kv_lora_rank=16,
        swa_head_dim=12,
        swa_qk_nope_head_dim=8,
        swa_v_head_dim=6,
    ),
    "ernie4_5_vl_moe_text": dict(
        moe_intermediate_size=[48, 24], head_dim=16, rope_parameters=ROPE | {"mrope_section": [3, 3, 2]}
    ),
    "esmc": dict(num_key_value_heads=HEADS),
    "evolla": dict(
        protein_encoder_config=dict(
            num_hidden_layers=1, hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=48
        ),
        resampler_depth=1,
        resampler_heads=2,
        resampler_dim_head=8,
    ),
    "florence_vision": dict(
        depths=(1, 1, 1, 1), embed_dim=(16, 16, 16, 32), num_heads=(2, 2, 2, 4), num_groups=(2, 2, 2, 4)
    ),
    "fun_asr_nano": dict(adaptor_config=dict(intermediate_size=HIDDEN // 4)),
    "gemma3n_text": dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2),
    "gemma4_assistant": dict(text_config=dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)),
    "glm4v_moe_text": dict(rope_parameters=SECTIONS_ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}),
    "glm5_next_text": dict(index_kpool=2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granite4_vision": dict(
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[0],
        downsample_rate="1/2",
        vision_config=dict(hidden_size=64),
    ),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "hunyuan_vl_text": dict(rope_parameters=ROPE | {"mrope_section": [1, 1, 1, 1]}),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4),
    "led": dict(attention_window=4),
    "laguna": dict(layer_types=["full_attention", "sliding_attention"] * 2, num_attention_heads_per_layer=[4, 2, 8, 2]),
    "layoutlmv3": dict(coordinate_size=5, shape_size=6),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "lilt": dict(hidden_size=48),
    "mamba2": dict(num_heads=8),
    "mellum": dict(layer_types=["full_attention", "sliding_attention"] * 2),
    "mimi": dict(upsample_groups=2, num_filters=4, codebook_dim=16, vector_quantization_hidden_dimension=16),
    "molmo2": dict(adapter_config=dict(vision_feature_layer=[1, 0])),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"] * 2),
    "muse_spark_audio": dict(hidden_sizes=(16, 16), patch_sizes=(4, 4), depths=(1, 1)),
    "nemo_speechlm": dict(text_config=dict(hybrid_override_pattern="M*E*", num_hidden_layers=4)),
    "nemotron3_5_transcribe": dict(text_config=dict(hybrid_override_pattern="M*E*", num_hidden_layers=4)),
    "neomme": dict(hidden_size=64, head_dim=16),
    "qwen4_exp_text": dict(indexer_kv_heads=1),
    "recurrent_gemma": dict(num_hidden_layers=4),
    "resnet": dict(hidden_sizes=(16, 16, 16, 16), depths=(1, 1, 1, 1)),
    "reformer": dict(axial_pos_embds=False),
    "step3p7_text": dict(layer_types=["full_attention", "sliding_attention"] * 2),
    "tvp": dict(visual_prompt_size=4, max_img_size=16, num_frames=2),
    "unlimited_ocr_text": dict(num_key_value_heads=HEADS),
    "vibevoice_acoustic_tokenizer": dict(depths=(1, 1, 1, 1, 1, 1, 1), num_filters=2),
    "vibevoice_acoustic_tokenizer_encoder": dict(depths=(1, 1, 1, 1, 1, 1, 1), num_filters=2),
    "vits": dict(
        upsample_initial_channel=32,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        num_attention_heads=2,
        flow_size=16,
        spectrogram_bins=17,
        posterior_encoder_num_wavenet_layers=1,
        prior_encoder_num_wavenet_layers=1,
    ),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["mamba", "hybrid"] * 2),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1, layer_types=["hybrid", "hybrid_sliding"] * 2),
}
for _name in ("chameleon_vqgan", "janus_vqgan"):
    EXCEPTIONS[_name] = dict(base_channels=HIDDEN, channel_multiplier=(1, 1), num_res_blocks=1, latent_channels=HIDDEN)
for _name in ("glm4v", "glm_ocr", "glm_image", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "paddleocr_vl"):
    EXCEPTIONS[f"{_name}_text"] = dict(rope_parameters=SECTIONS_ROPE)
for _name in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"):
    EXCEPTIONS[_name] = EXCEPTIONS.get(_name, {}) | dict(max_window_layers=2)


def tiny_arguments(kind: type) -> dict[str, Any]:
    """Arguments of configuration class `kind` that make it tiny, and those of the configurations within it."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    special = copy.deepcopy(EXCEPTIONS.get(kind.model_type, {}))
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        default = None if field.default is dataclasses.MISSING else field.default
        if name == "use_sliding_window":
            arguments[name] = True
        if isinstance(default, bool) or not (default is None or isinstance(default, (int, float))):
            continue
        if (default == 0 and name not in TOKENS) or (default is None and name == "attn_logit_softcapping"):  # off
            continue
        if name in RULES and re.search(r"(?<!\[)\b(int|float)\b", str(field.type)):
            arguments[name] = RULES[name]
        elif name in TOKENS:
            arguments[name] = TOKENS[name]
        elif re.search("_token_(id|index)$", name) and isinstance(default, int):
            arguments[name] = 3 + sum(1 for n in arguments if re.search("_token_(id|index)$", n))
    if "qk_rope_head_dim" in fields:  # latent attention: as many keys as queries
        for name, value in (("num_key_value_heads", HEADS), ("head_dim", RULES["qk_rope_head_dim"])):
            if name in arguments:
                arguments[name] = value
    if LAYOUT & set(fields):
        arguments |= {name: 2 * LAYERS for name in DEPTHS if name in arguments}
    for name, specification in getattr(kind, "sub_configs_defaults", {}).items():
        sub = specification.config_class
        if not (isinstance(sub, type) and issubclass(sub, transformers.PreTrainedConfig)):
            sub = CONFIG_MAPPING[specification.model_type]
        extra = special.pop(name, {})
        if not specification.optional or name in ("text_config", "decoder_config") or extra:
            arguments[name] = sub(**{**copy.deepcopy(specification.init_kwargs), **tiny_arguments(sub), **extra})
    arguments |= special
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if name in fields and name not in arguments:
            arguments |= kinds_of_layers(kind, name, arguments)
    return arguments


def kinds_of_layers(kind: type, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A layout with every kind of layer that the full model has, if the tiny one's own lacks some."""
    with contextlib.suppress(Exception):
        full, tiny = (list(getattr(kind(**a), name) or ()) for a in ({}, arguments))
        if set(full) - set(tiny):
            kinds = list(dict.fromkeys(full))
            layout = kinds + tiny[: max(0, len(tiny) - len(kinds))]
            field = next(n for n in DEPTHS if n in arguments)
            return {name: layout, field: len(layout)}
    return {}


# --- Families ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of transformers and the class to build, in the section of the table that it belongs to."""

    name: str
    section: str
    class_name: str

    def build(self, **options: Any) -> nn.Module:
        """The tiny model, its random weights disturbed, so that gains, sinks and temperatures are not at their start.

        Raises:
            Exception: whatever transformers raises for what it cannot build.
        """
        kind = CONFIG_MAPPING[self.name]
        model_class = getattr(transformers, self.class_name)
        if model_class.config_class in kind.sub_configs.values():  # it is a part of the model type
            kind = model_class.config_class
        config = kind(**tiny_arguments(kind))
        if self.section == "causal" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
            config.is_decoder = True
        torch.manual_seed(SEED)
        model = model_class._from_config(config, **options).eval().float()
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return model


def families() -> tuple[list[Family], list[str]]:
    """All families with text as their input, and the names of those without."""
    names = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "multimodal": {
            **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        },
        "text": {**modeling_auto.MODEL_MAPPING_NAMES, **modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES},
    }
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    found: list[Family] = []
    without: list[str] = []
    seen: set[str] = set()
    for section, mapping in names.items():
        here = set()
        for name, class_name in mapping.items():
            known = name in seen and not (section == "seq2seq" or (section == "text" and name in masked))
            if known:
                continue
            if isinstance(class_name, tuple):
                class_name = class_name[0]
            here.add(name)
            if section == "text" and not reads_text(class_name):
                without.append(name)
            else:
                found.append(Family(name, section, class_name))
        seen |= here
    return found, without


def reads_text(class_name: str) -> bool:
    """Whether a model's first input is tokens, as far as its class says."""
    model_class = getattr(transformers, class_name, None)
    try:
        return model_class.main_input_name == "input_ids" and takes_tokens(model_class)
    except (AttributeError, ImportError):  # a stand-in for a class that needs another package: building says which
        return True


def takes_tokens(model_class: type[nn.Module]) -> bool:
    """Whether a model can be called with tokens."""
    return "input_ids" in inspect.signature(model_class.forward).parameters


# --- The reference: eager attention's weights ------------------------------------------------------------------------


@dataclasses.dataclass
class Attention:
    """One layer's weights `(B, H, T, S)` by eager attention.

    `path` is that of the module and `name` what recorders call the attention, with * for the layer; `part` is self,
    encoder, decoder or cross.
    """

    path: str
    name: str
    layer: int
    part: str
    weights: Tensor
    sinks: Tensor | None = None  # that the weights which eager attention computes are without
    order: int = 0  # among the softmaxes of all of its layers in a pass, of which there are
    total: int = 1

    @property
    def entropies(self) -> Tensor:
        """`(B, H, T)` nats, of the whole distribution: what the weights lack of one is a sink's."""
        weights = self.weights.double()
        rest = 1 - weights.sum(-1)
        rest = torch.where(rest < 1e-6, 0, rest)
        return torch.special.entr(weights).sum(-1) + torch.special.entr(rest)


PARTS = {
    "attentions": "self",
    "encoder_attentions": "encoder",
    "decoder_attentions": "decoder",
    "cross_attentions": "cross",
}


@dataclasses.dataclass
class Seen:
    """Attention weights `(B, H, T, S)` and where they were computed.

    `path` is that of the module and `layer` the number of the outermost layer that runs, which tells the layers apart
    that share a module.
    """

    path: str
    layer: int
    weights: Tensor
    logits: Tensor | None = None

    @property
    def name(self) -> str:
        """As recorders call the attention: its path with * for the layer."""
        return ".".join("*" if part.isdigit() else part for part in self.path.split("."))

    def with_sinks(self, sinks: Tensor) -> Tensor:
        """The weights as they are with sinks that the module applies to its output afterwards."""
        assert self.logits is not None
        return self.weights * (self.logits.logsumexp(-1) - sinks.view(1, -1, 1)).sigmoid()[..., None]


class Captured(TorchFunctionMode):
    """Keeps the weights of every softmax and fused attention, and which module returned which tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.softmaxes: list[Seen] = []
        self.fused: list[Seen] = []
        self._returned: dict[int, tuple[tuple[str, int], Tensor]] = {}
        self._stack: list[str] = [""]
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: self._stack.append(name)))
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            for each in output:
                if isinstance(each, Tensor) and each.ndim >= 4:
                    self._returned.setdefault(id(each), (self._where(), each))  # the innermost module comes first
        self._stack.pop()

    def _where(self) -> tuple[str, int]:
        numbers = (part for name in self._stack for part in name.split(".") if part.isdigit())
        return self._stack[-1], int(next(numbers, -1))

    def where(self, weights: Tensor) -> tuple[str, int]:
        """Which module returned a tensor first."""
        return self._returned[id(weights)][0] if id(weights) in self._returned else ("", -1)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "softmax" and isinstance(result, Tensor) and result.ndim == 4:
            self.softmaxes.append(Seen(*self._where(), result.detach(), args[0].detach()))
        elif name == "scaled_dot_product_attention":
            self.fused.append(Seen(*self._where(), fused_weights(*args, **kwargs)))
        return result

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for hook in self._hooks:
            hook.remove()


def fused_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's scaled_dot_product_attention documents as its weights, `(B, H, T, S)`."""
    query, key = query.double(), key.double()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1).nan_to_num(0.0)


def is_distribution(weights: Any) -> bool:
    """Whether these are attention weights: layers of other kinds return other things in their place."""
    if not (isinstance(weights, Tensor) and weights.ndim == 4 and weights.is_floating_point()):
        return False
    return weights.min().item() >= 0 and weights.sum(-1).max().item() < 1 + 1e-4


def reference(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[list[Attention], list[Seen], Any]:
    """Weights that eager attention returns; all that it computed; and the output."""
    captured = Captured(model)
    with torch.no_grad(), captured:
        torch.manual_seed(SEED)
        output = model(**inputs, output_attentions=True)
    found = []
    for field, part in PARTS.items():
        for weights in getattr(output, field, None) or ():
            if is_distribution(weights):
                found.append((Seen(*captured.where(weights), weights), part))
    parts: dict[str, set[str]] = {}
    for seen, part in found:
        parts.setdefault(seen.name, set()).add(part)
    # Where one attention is two fields, over its own keys and the encoder's, both are shares of one distribution.
    merged = {name for name, several in parts.items() if len(several) > 1}
    found = [(seen, part) for seen, part in found if seen.name not in merged]
    found += [(seen, "decoder") for seen in captured.softmaxes if seen.name in merged]
    attentions = numbered(found)
    for each in attentions:
        sinks = getattr(model.get_submodule(each.path), "sinks", None)
        if isinstance(sinks, Tensor) and each.weights.sum(-1).min().item() > 1 - 1e-4:
            same = [s for s in captured.softmaxes if s.path == each.path and s.weights.shape == each.weights.shape]
            each.sinks, each.weights = sinks, same[0].with_sinks(sinks)
    return attentions, captured.softmaxes, output


def ordered(attentions: list[Attention], seen: list[Seen]) -> list[Attention]:
    """Attentions that know which of the softmaxes that were seen is theirs; a module may compute several."""
    found, taken = [], set()
    for each in attentions:
        same = [s for s in seen if s.name == each.name]
        for order, s in enumerate(same):
            weights = s.weights if each.sinks is None else s.with_sinks(each.sinks)
            share = weights[..., : each.weights.shape[-1]]  # the last key may be a sink
            if (s.path, order) not in taken and share.shape == each.weights.shape and torch.equal(share, each.weights):
                taken.add((s.path, order))
                found.append(dataclasses.replace(each, order=order, total=len(same)))
                break
    return found


def not_returned(seen: list[Seen], names: set[str]) -> list[Attention]:
    """Captured weights as those of self attentions, of the attentions named."""
    return numbered([(each, "self") for each in seen if each.name in names])


def numbered(found: list[tuple[Seen, str]]) -> list[Attention]:
    """Layers by the model's own numbers, or in the order of their use where one is used several times."""
    attentions = [Attention(seen.path, seen.name, seen.layer, part, seen.weights) for seen, part in found]
    for name in {each.name for each in attentions}:
        same = [each for each in attentions if each.name == name]
        if len({each.layer for each in same}) < len(same):
            for order, each in enumerate(same):
                each.layer = order
    return attentions


# --- Comparison ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What became of a family: right, refused, wrong or not built; and why."""

    family: Family
    outcome: str
    reason: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


class Wrong(Exception):
    """Recording gave something else than eager attention."""


class Refused(Exception):
    """Recording says that it cannot be done."""


class Unbuildable(Exception):
    """transformers cannot make or run the tiny model."""


Means = dict[tuple[str, int], Tensor]  # `(H,)` nats by the attention's name and the layer


def recorded_means(recorder: Any) -> Means:
    """All that was recorded."""
    return {
        (name, layer): mean.double()
        for name, attention in recorder.attentions.items()
        for layer, mean in attention.by_layer().items()
    }


def make_inputs(model: nn.Module, padding: str | None) -> dict[str, Tensor]:
    """Tokens for a forward pass, a row of the batch padded left or right, or in the encoder alone.

    A decoder's text has another length than its encoder's, and another row of it is padded.
    """
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(SEED + 1)

    def text(length: int, padded: int, side: str | None) -> tuple[Tensor, Tensor]:
        ids = torch.randint(FIRST_TOKEN, VOCABULARY, (BATCH, length), generator=generator)
        mask = torch.ones_like(ids)
        if side == "left":
            mask[padded, :5] = 0
        elif side == "right":
            mask[padded, -4:] = 0
        return ids.masked_fill(mask == 0, pad_token(model)), mask

    ids, mask = text(LENGTH, 0, "left" if padding == "encoder" else padding)
    inputs = {"input_ids": ids}
    if padding is not None:
        inputs["attention_mask"] = mask
    if model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"], mask = text(LENGTH - 3, 1, None if padding == "encoder" else padding)
        if padding not in (None, "encoder") and "decoder_attention_mask" in parameters:
            inputs["decoder_attention_mask"] = mask
    if "bbox" in parameters:  # where the tokens stand on a page
        inputs["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def pad_token(model: nn.Module) -> int:
    token = getattr(model.config.get_text_config(), "pad_token_id", None)
    return token if isinstance(token, int) else 0


def valid_rows(inputs: dict[str, Tensor], part: str, rows: int) -> Tensor:
    """`(B, T)`: which rows of a part's attention are not padding."""
    mask = inputs.get("decoder_attention_mask" if part in ("decoder", "cross") else "attention_mask")
    if mask is None or mask.shape[1] != rows:
        return torch.ones(BATCH, rows, dtype=torch.bool)
    return mask.bool()


def main_output(output: Any) -> Tensor:
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    return next(v for v in output.values() if isinstance(v, Tensor) and v.is_floating_point())


def one_line(error: BaseException) -> str:
    """An error's message in one short line; of transformers' checks what they say, of lacking packages their name."""
    message = " ".join(str(error).split())
    if isinstance(error, ImportError) and (package := re.search(r"requires the (\S+) library", message)):
        return f"needs {package[1]}"
    message = re.sub(r"^(Class validation error for validator '\w+': )", "", message)
    named = type(error).__name__.startswith("Strict") or not message
    return (message if named else f"{type(error).__name__}: {message}")[:160]


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[None]:
    """Tells refusals (one line of a ValueError of ours) from crashes."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        if len(message) > 200 or "\n" in message or not raised_by_us(error):
            raise Wrong(f"crashes: {one_line(error)}") from error
        raise Refused(message) from error
    except Exception as error:
        raise Wrong(f"crashes: {one_line(error)}") from error


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[Any]:
    """`record_entropy`, which must leave the model as it was."""
    before = implementations(model)
    with recorded(model), entropi.record_entropy(model) as recorder:
        yield recorder
    if implementations(model) != before:
        raise Wrong("the attention implementations are not those of before")


def implementations(model: nn.Module) -> list[Any]:
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [getattr(config, "_attn_implementation", None) for config in configs.values()]


def raised_by_us(error: BaseException) -> bool:
    """Whether the innermost frame is the package's, not transformers' or torch's."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and Path(entropi.__file__).parent in Path(frames[-1][0].f_code.co_filename).parents


# Parts of models that run without the mask of tokens: to them nothing is padding.
UNMASKED = ("model.patcher.",)  # of BLT


def expected_means(attentions: list[Attention], inputs: dict[str, Tensor]) -> Means:
    rows: dict[tuple[str, int], list[Tensor]] = {}
    for each in attentions:
        entropies = each.entropies.transpose(1, 2)  # (B, T, H)
        if entropies.shape[0] != BATCH:
            raise Unbuildable(f"no reference: weights of shape {tuple(each.weights.shape)}")
        valid = valid_rows(inputs, each.part, entropies.shape[1])
        if each.name.startswith(UNMASKED):
            valid = torch.ones_like(valid)
        if entropies.shape[1] not in {mask.shape[1] for name, mask in inputs.items() if name.endswith("mask")}:
            # Rows of patches, not of tokens: those that see nothing, which have no attention, are even under eager.
            valid &= (each.weights != each.weights[..., :1]).any(dim=(1, 3))
        rows.setdefault((each.name, each.layer), []).append(entropies[valid])
    return {key: torch.cat(each).mean(0) for key, each in rows.items()}


def compare_means(found: Means, expected: Means, where: str) -> None:
    if set(found) != set(expected):
        raise Wrong(f"{where}: {labels(found)} recorded instead of {labels(expected)}")
    for (name, layer), theirs in expected.items():
        ours = found[name, layer]
        if ours.shape != theirs.shape:
            raise Wrong(f"{where}: {ours.shape[0]} heads instead of {theirs.shape[0]} in layer {layer} of {name}")
        error = (ours - theirs).abs().max().item()
        if not torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5):
            raise Wrong(f"{where}: entropies of layer {layer} of {name} differ by {error:.2g} nats")


def labels(means: Means) -> str:
    names: dict[str, list[int]] = {}
    for name, layer in means:
        names.setdefault(name, []).append(layer)
    return "; ".join(f"{name} {','.join(map(str, sorted(layers)))}" for name, layers in names.items()) or "none"


NOT_EAGER = "eager's output is not the default's"


def compare_passes(model: nn.Module, eager: nn.Module, notes: list[str]) -> list[Attention]:
    """Forward passes; the reference of one without padding, if all is right."""
    first: list[Attention] = []
    before = torch.empty(0)
    two = "decoder_input_ids" in make_inputs(model, None)
    for padding in (None, "left", "right", "encoder") if two else (None, "left", "right"):
        where = f"{padding or 'no'} padding"
        inputs = make_inputs(model, padding)
        try:
            attentions, softmaxes, output = reference(eager, inputs)
            torch.manual_seed(SEED)
            captured = Captured(model)
            with torch.no_grad(), captured:
                own = main_output(model(**inputs))
        except Exception as error:
            failure = f"{where}: {one_line(error)}"
            if padding is None:
                raise Unbuildable(failure) from error
            notes.append(f"fails by itself, {failure}")
            continue
        theirs = main_output(output)
        valid = valid_rows(inputs, "decoder" if "decoder_input_ids" in inputs else "self", own.shape[1])
        valid = valid if own.ndim == 3 else torch.ones(own.shape, dtype=torch.bool)
        if not torch.isfinite(own[valid]).all():
            raise Unbuildable(f"{where}: the model's own output is not finite")
        scale = own[valid].abs().max().clamp(min=1).item()
        torch.manual_seed(SEED)
        with recording(model) as recorder, torch.no_grad():
            ours = main_output(model(**inputs))
        with recorded(model):
            found = recorded_means(recorder)
        apart, differs = ((own - o)[valid].abs().max().item() / scale for o in (theirs, ours))
        if not apart < 1e-4:
            if not captured.fused or "decoder_input_ids" in inputs:
                raise Unbuildable(f"{where}: eager's output is not the default's, and there are no weights of its own")
            notes.append(f"{where}: {NOT_EAGER}, whose own weights were compared with")
            attentions = not_returned(captured.fused, {seen.name for seen in captured.fused})
        missing = {name for name, _ in found} - {each.name for each in attentions}
        if missing and (more := not_returned(softmaxes, missing)):
            notes.append(f"{where}: weights not returned but captured")
            attentions += more
        if not attentions:
            raise Wrong(f"no attention to compare with, yet not refused: {labels(found)} recorded")
        if not differs < 1e-4:
            raise Wrong(f"{where}: outputs differ by {differs:.2g} of the largest")
        compare_means(found, expected_means(attentions, inputs), where)
        if padding is None:
            first, before = ordered(attentions, softmaxes), own
    inputs = make_inputs(model, None)
    torch.manual_seed(SEED)
    with torch.no_grad():
        after = main_output(model(**inputs))
    if not torch.equal(after, before):
        raise Wrong("the model is not what it was before recording")
    return first


def compare_generation(model: nn.Module, eager: nn.Module, layers: list[Attention], notes: list[str]) -> None:
    """The text, and the entropies of all its rows; `layers` are the attentions of a forward pass."""
    if not model.can_generate():
        notes.append("does not generate")
        return
    alike = not any(note.startswith(f"left padding: {NOT_EAGER}") for note in notes)
    inputs = make_inputs(model, "left" if alike else None)
    prompt = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    for implementation in (None, "static"):
        where = "generation" if implementation is None else f"generation with a {implementation} cache"
        options: dict[str, Any] = dict(do_sample=False, num_beams=1, use_cache=True)
        options |= dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        if model.config.is_encoder_decoder:
            options["decoder_start_token_id"] = TOKENS["decoder_start_token_id"]
        if implementation is not None:
            options["cache_implementation"] = implementation
        try:
            torch.manual_seed(SEED)
            plain = model.generate(**prompt, **options)
            if not isinstance(plain, Tensor):
                notes.append(f"{where} is no sequence of tokens one after the other: not compared")
                return  # with another cache neither, and the model's own loop would be compiled for it
            captured = Captured(eager)
            torch.manual_seed(SEED)
            with captured:
                output = eager.generate(**prompt, **options)
        except Exception as error:
            notes.append(f"{where} fails by itself: {one_line(error)}")
            continue
        torch.manual_seed(SEED)
        with recording(model) as recorder:
            ours = model.generate(**prompt, **options)
        if not torch.equal(ours, plain):
            raise Wrong(f"{where}: the text differs")
        if not torch.equal(output, plain):
            notes.append(f"{where}: eager's text is not the default's, no entropies compared")
            continue
        with recorded(model):
            found = recorded_means(recorder)
        expected = generated_means(captured.softmaxes, prompt, layers)
        if expected is None:
            notes.append(f"{where}: its weights could not be captured")
        else:
            compare_means(found, expected, where)


def generated_means(seen: list[Seen], prompt: dict[str, Tensor], layers: list[Attention]) -> Means | None:
    """Means over all rows of a generation; None if it ran other attentions than a forward pass."""
    rows: dict[tuple[str, int], list[Tensor]] = {}
    for each in layers:
        steps = [s for s in seen if s.name == each.name]
        if not steps or len(steps) % each.total:
            return None
        for step in steps[each.order :: each.total]:  # every pass runs the layers in the same order
            weights = step.weights if each.sinks is None else step.with_sinks(each.sinks)
            entropies = dataclasses.replace(each, weights=weights).entropies.transpose(1, 2)
            if entropies.shape[0] != BATCH:
                return None
            valid = valid_rows({} if each.part in ("decoder", "cross") else prompt, each.part, entropies.shape[1])
            rows.setdefault((each.name, each.layer), []).append(entropies[valid])
    return {key: torch.cat(each).mean(0) for key, each in rows.items()} or None


def text_part(model: nn.Module) -> str | None:
    """The path of a model within `model` that runs on text alone; None if there is none, "" if it does so itself."""
    parts = [
        (not m.can_generate(), path.count("."), path)  # language models before other parts, outer before inner ones
        for path, m in model.named_modules()
        if path and isinstance(m, transformers.PreTrainedModel)
    ]
    for path in ["", *(path for *_, path in sorted(parts))]:
        part = model.get_submodule(path)
        if not takes_tokens(type(part)):
            continue
        with contextlib.suppress(Exception), torch.no_grad():
            main_output(part(**make_inputs(part, None)))
            return path
    return None


def examine(family: Family) -> Result:
    """Build a family and compare."""
    notes: list[str] = []
    try:
        try:
            model = family.build()
            eager = family.build(attn_implementation="eager")
        except Exception as error:
            raise Unbuildable(one_line(error)) from error
        path = text_part(model)
        if path:
            notes.append(f"its {path}")
            model, eager = model.get_submodule(path), eager.get_submodule(path)
        layers = compare_passes(model, eager, notes)
        compare_generation(model, eager, layers, notes)
    except Unbuildable as error:
        return Result(family, "not built", str(error), notes)
    except Refused as error:
        return Result(family, "refused", str(error), notes)
    except Wrong as error:
        return Result(family, "wrong", str(error), notes)
    return Result(family, "right", "", notes)


# --- The table -------------------------------------------------------------------------------------------------------

OUTCOMES = {"right": "right", "refused": "refused", "wrong": "WRONG", "not built": "cannot be built or run on text"}


def table(results: list[Result], without: list[str]) -> str:
    """docs/families.md."""
    counts = {outcome: sum(r.outcome == outcome for r in results) for outcome in OUTCOMES}
    lines = [
        "# Families of models whose attention entropies can be recorded",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}. Written by"
        " `python tests/families.py --write`; a slow test compares it with what it finds.",
        "",
        "Every family that transformers can build from a tiny configuration and run on text is compared with eager"
        " attention's weights: the mean entropies of every layer and head to 1e-5 nats, and the model's output, without"
        " padding, padded left and right; then the text and the entropies of a generation, with a growing and with a"
        " static cache. *Right* is a family that agrees in all of it but what its row names, *refused* one that"
        " `record_entropy` declines in one line.",
        "",
        *(f"- {counts[outcome]} {words}" for outcome, words in OUTCOMES.items() if counts[outcome]),
        f"- {len(without)} have no text as their first input (at the end)",
    ]
    for section, title in SECTIONS.items():
        here = [r for r in results if r.family.section == section]
        right = sum(r.outcome == "right" for r in here)
        lines += ["", f"## {title}", "", f"{right} of {len(here)} right.", "", "| family | result | |", "|---|---|---|"]
        lines += [row(r) for r in sorted(here, key=lambda r: r.family.name)]
    lines += ["", "## Without text as their first input", "", ", ".join(sorted(without)) + "."]
    return "\n".join(lines) + "\n"


def row(result: Result) -> str:
    reason = "; ".join([*([result.reason] if result.reason else []), *result.notes])
    return f"| {result.family.name} | {OUTCOMES[result.outcome]} | {reason.replace('|', '/')} |"


def rows(text: str) -> dict[tuple[str, str], str]:
    """The rows of a table by section and family, and the list at its end; rows for lacking packages left out."""
    found, section = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith("| family") and "| needs " not in line:
            found[section, line.split(" | ")[0][2:]] = line
        elif section.startswith("Without"):
            found[section, ""] = found.get((section, ""), "") + line
    return found


# --- The command -----------------------------------------------------------------------------------------------------


def sweep(chosen: list[Family], report: Any = None) -> list[Result]:
    """Examine families one after another, without transformers' warnings."""
    results = []
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for family in chosen:
                results.append(examine(family))
                if report is not None:
                    report(results[-1])
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/families.md")
    parser.add_argument("--section", choices=SECTIONS)
    parser.add_argument("names", nargs="*", help="only these families")
    options = parser.parse_args()
    if options.write and (options.names or options.section):
        parser.error("--write takes all families")
    found, without = families()
    chosen = [
        family
        for family in found
        if (not options.names or family.name in options.names)
        and (not options.section or family.section == options.section)
    ]
    started = time.perf_counter()

    def report(result: Result) -> None:
        nonlocal started
        now = time.perf_counter()
        words = [f"{result.family.section} {result.family.name}: {result.outcome}", result.reason, *result.notes]
        print("; ".join(word for word in words if word), f"({now - started:.1f} s)", flush=True)
        started = now

    results = sweep(chosen, report)
    print(", ".join(f"{sum(r.outcome == outcome for r in results)} {outcome}" for outcome in OUTCOMES))
    if options.write:
        TABLE.write_text(table(results, without))


if __name__ == "__main__":
    main()
