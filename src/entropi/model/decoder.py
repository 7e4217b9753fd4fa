"""The decoder-only model family as a transformers model, and its takeover of GPT-2 weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GPT2LMHeadModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from entropi.entropy.regularizer import EntropyRegularizer
from entropi.model.attention import EntropiAttention
from entropi.model.configuration import EntropiConfig
from entropi.model.feedforward import FusedFeedForward, ScaledFeedForward, make_feed_forward
from entropi.model.normalization import make_norm


@dataclass
class EntropiOutput(ModelOutput):
    """Hidden states, or logits and losses, with the row entropies of every layer."""

    loss: Tensor | None = None  # cross-entropy plus, while training, the entropy penalty
    cross_entropy: Tensor | None = None  # nats per token
    entropy_penalty: Tensor | None = None  # lambda * L_entropy (Algorithm 1)
    logits: Tensor | None = None  # (B, T, V)
    last_hidden_state: Tensor | None = None  # (B, T, d)
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    entropies: tuple[Tensor, ...] | None = None  # L tensors (B, H, T), nats


class EntropiBlock(GradientCheckpointingLayer):
    """Pre-norm block: attention, then a feed-forward network that holds its own residual connection."""

    def __init__(self, config: EntropiConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = EntropiAttention(config, layer_index)
        self.feed_forward = make_feed_forward(config, make_norm(config))

    def forward(
        self, hidden: Tensor, position_ids: Tensor, attn_mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        attended, entropy = self.attention(self.attention_norm(hidden), position_ids, attn_mask, cache)
        return self.feed_forward(hidden + attended), entropy


class EntropiPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the family."""

    config: EntropiConfig
    config_class = EntropiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EntropiBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        std: Any = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, EntropyRegularizer):
            module.threshold.fill_(module.threshold_init)
        if isinstance(module, EntropiAttention) and module.temperature is not None:
            module.temperature.fill_(self.config.temperature_init)
        if isinstance(module, FusedFeedForward | ScaledFeedForward):
            module.alpha.fill_(1.0)
            module.beta.fill_(1.0)
        if isinstance(module, EntropiBlock):
            # GPT-2: what enters the residual stream is scaled down with depth.
            residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
            ffn: Any = module.feed_forward
            module.attention.output.weight.normal_(0.0, residual_std)
            (ffn.fused if isinstance(ffn, FusedFeedForward) else ffn.down).weight.normal_(0.0, residual_std)


class EntropiModel(EntropiPreTrainedModel):
    """Token and position embeddings, the blocks, the final norm."""

    def __init__(self, config: EntropiConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(EntropiBlock(config, i) for i in range(config.num_hidden_layers))
        self.final_norm: nn.Module = nn.Identity()
        if config.final_norm:
            self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.token_embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> EntropiOutput:
        """`input_ids` `(B, T)` -> last hidden state `(B, T, d)` and L row entropies `(B, H, T)`.

        `attention_mask` `(B, S)` is 0 where a token, cached ones included, is padding.
        """
        if inputs_embeds is None:
            inputs_embeds = self.token_embedding(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length = inputs_embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past + length > self.config.max_position_embeddings:
            raise ValueError(
                f"{past + length} tokens do not fit the {self.config.max_position_embeddings} positions of this model"
            )
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device)[None]
        attn_mask = None
        if attention_mask is not None and (torch.compiler.is_compiling() or not bool(attention_mask.all())):
            attn_mask = attention_mask.bool()[:, None, None, :]

        hidden = inputs_embeds + self.position_embedding(position_ids)
        entropies, hidden_states = [], []
        for block in self.blocks:
            hidden_states.append(hidden)
            hidden, entropy = block(hidden, position_ids, attn_mask, past_key_values)
            entropies.append(entropy)
        hidden = self.final_norm(hidden)
        return EntropiOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, hidden) if output_hidden_states else None,
            entropies=tuple(entropies),
        )


class EntropiForCausalLM(EntropiPreTrainedModel, GenerationMixin):
    """A decoder with a language-modelling head tied to the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.token_embedding.weight"}  # noqa: RUF012
    # Tells the Trainer that `num_items_in_batch` is understood: losses are exact under gradient accumulation.
    accepts_loss_kwargs = True

    def __init__(self, config: EntropiConfig) -> None:
        super().__init__(config)
        self.model = EntropiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.entropy_regularizer: EntropyRegularizer | None = None
        self.entropy_weight = 0.0
        if config.entropy_regularizer is not None:
            options = dict(config.entropy_regularizer)
            self.entropy_weight = float(options.pop("weight"))
            self.entropy_regularizer = EntropyRegularizer(
                config.num_hidden_layers, config.num_attention_heads, **options
            )
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> EntropiOutput:
        """Logits `(B, T, V)`, row entropies and, with `labels` `(B, T)` (shifted inside), the loss.

        In training mode the loss is cross-entropy + lambda * L_entropy (Algorithm 1); in evaluation it is the
        cross-entropy alone. With `num_items_in_batch`, the target tokens of all micro-batches of one update, both
        terms are scaled so that the micro-batches' losses add up to the update's.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = cross_entropy = penalty = None
        if labels is not None:
            loss = cross_entropy = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
            if self.entropy_regularizer is not None and self.training:
                share: Tensor | float = 1.0
                if num_items_in_batch is not None:
                    share = (labels[:, 1:] != -100).sum() / num_items_in_batch
                penalty = self.entropy_weight * share * self.entropy_regularizer(outputs.entropies)
                loss = cross_entropy + penalty
        return EntropiOutput(
            loss=loss,
            cross_entropy=cross_entropy,
            entropy_penalty=penalty,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            entropies=outputs.entropies,
        )

    def inference_parameters(self) -> int:
        """Number of parameters, without the regulariser's thresholds, which take no part in inference."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith("entropy_regularizer."))

    @classmethod
    def from_gpt2(cls, gpt2: GPT2LMHeadModel) -> EntropiForCausalLM:
        """An `SM+LN+G` model with copies of a GPT-2's weights: the same logits, plus row entropies.

        Raises:
            ValueError: options of `GPT2Config` that this family does not have.
        """
        theirs = gpt2.config
        problems = []
        if theirs.scale_attn_by_inverse_layer_idx or not theirs.scale_attn_weights:
            problems.append("attention scales other than 1/sqrt(d_k)")
        if theirs.add_cross_attention:
            problems.append("cross-attention")
        if problems:
            raise ValueError(f"this GPT-2 uses {' and '.join(problems)}, which entropi models do not have")
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
        model = cls(config)
        model.load_state_dict(_from_gpt2_weights(gpt2.state_dict(), config), strict=True)
        return model.to(gpt2.dtype).train(gpt2.training)


def _from_gpt2_weights(theirs: dict[str, Tensor], config: EntropiConfig) -> dict[str, Tensor]:
    """GPT-2's names and layouts to ours; its `Conv1D` holds the transpose of a Linear's weight."""
    ours = {
        "model.token_embedding.weight": theirs["transformer.wte.weight"],
        "model.position_embedding.weight": theirs["transformer.wpe.weight"],
        "model.final_norm.weight": theirs["transformer.ln_f.weight"],
        "model.final_norm.bias": theirs["transformer.ln_f.bias"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    for i in range(config.num_hidden_layers):
        source, target = f"transformer.h.{i}.", f"model.blocks.{i}."
        joint = theirs[source + "attn.c_attn.weight"].T.chunk(3), theirs[source + "attn.c_attn.bias"].chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), *joint):
            ours[f"{target}attention.{name}.weight"] = weight
            ours[f"{target}attention.{name}.bias"] = bias
        linears = {
            "attn.c_proj": "attention.output",
            "mlp.c_fc": "feed_forward.up",
            "mlp.c_proj": "feed_forward.down",
        }
        for theirs_name, ours_name in linears.items():
            ours[f"{target}{ours_name}.weight"] = theirs[f"{source}{theirs_name}.weight"].T
            ours[f"{target}{ours_name}.bias"] = theirs[f"{source}{theirs_name}.bias"]
        for theirs_name, ours_name in {"ln_1": "attention_norm", "ln_2": "feed_forward.norm"}.items():
            for part in ("weight", "bias"):
                ours[f"{target}{ours_name}.{part}"] = theirs[f"{source}{theirs_name}.{part}"]
    return ours


# transformers finds the family by these; registering is the one thing this package does when it is imported.
AutoConfig.register(EntropiConfig.model_type, EntropiConfig, exist_ok=True)
AutoModelForCausalLM.register(EntropiConfig, EntropiForCausalLM, exist_ok=True)
