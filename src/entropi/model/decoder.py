"""The decoder-only model family as a transformers model."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from entropi.entropy.regularizer import EntropyRegularizer
from entropi.errors import UserError
from entropi.model import card, convert
from entropi.model.attention import EntropiAttention, LengthScale, Temperature, rotary_sets
from entropi.model.configuration import EntropiConfig
from entropi.model.feedforward import FusedFeedForward, ScaledFeedForward, make_feed_forward
from entropi.model.linear import initial_deviation, iterate_spectral_norms, make_embedding, make_linear, redraw
from entropi.model.normalization import make_branch_norm, make_final_norm, make_norm
from entropi.model.visibility import (
    Visibility,
    cached_tokens,
    check_cache,
    check_positions,
    packed_documents,
    visibility,
    whole_length,
)
from entropi.softmax import SoftmaxForm, parse_of_model

# transformers 5.24 renamed this field of every output, and what `generate` passes: from `past_key_values` to `cache`.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


@dataclass
class EntropiOutput(ModelOutput):
    """Hidden states, or logits and losses, with the row entropies of every layer."""

    # The first four in transformers' order, for those who take them as a tuple (return_dict=False).
    loss: Tensor | None = None  # cross-entropy plus, while training, the entropy penalty
    logits: Tensor | None = None  # (B, T, V)
    last_hidden_state: Tensor | None = None  # (B, T, d)
    if CACHE == "cache":  # as the installed transformers calls it
        cache: Cache | None = None
    else:
        past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    entropies: tuple[Tensor, ...] | None = None  # L tensors (B, H, T), nats
    cross_entropy: Tensor | None = None  # nats per token
    entropy_penalty: Tensor | None = None  # lambda * L_entropy (Algorithm 1)


class EntropiBlock(GradientCheckpointingLayer):
    """Pre-norm block: attention, then a feed-forward network that holds its own residual connection."""

    def __init__(self, config: EntropiConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = EntropiAttention(config, layer_index)
        self.branch_norm = make_branch_norm(config)  # of attention; the feed-forward network has its own
        self.feed_forward = make_feed_forward(config, make_norm(config))
        self.parallel = config.parallel_residual

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        visible: Visibility,
        cache: Cache | None,
        common_slope: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        attended, entropy = self.attention(self.attention_norm(hidden), position_ids, rotation, visible, cache)
        attended = self.branch_norm(attended)
        if self.parallel:
            return attended + self.feed_forward(hidden, common_slope), entropy
        return self.feed_forward(hidden + attended, common_slope), entropy


class EntropiPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the family."""

    config: EntropiConfig
    config_class = EntropiConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EntropiBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Draw what transformers did not load; a new model's weights are drawn when its matrices are made."""
        if isinstance(module, nn.Linear | nn.Embedding | parametrize.ParametrizationList):
            redraw(module, initial_deviation(self.config))
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.weight.fill_(1.0)
            if isinstance(module, nn.LayerNorm):
                module.bias.zero_()
        elif isinstance(module, EntropyRegularizer):
            module.threshold.fill_(module.threshold_init)
        elif isinstance(module, Temperature | LengthScale):
            module.reset()
        if isinstance(module, FusedFeedForward | ScaledFeedForward):
            module.alpha.fill_(1.0)
            module.beta.fill_(1.0)
        if isinstance(slope := getattr(module, "leaky_slope", None), nn.Parameter):
            slope.fill_(self.config.leaky_slope)


class EntropiModel(EntropiPreTrainedModel):
    """Token and position embeddings, the blocks, the final norm."""

    def __init__(self, config: EntropiConfig) -> None:
        super().__init__(config)
        self.token_embedding = make_embedding(config, config.vocab_size)
        self.position_embedding: nn.Embedding | None = None  # rotary positions have none
        if config.position_embedding == "learned":
            self.position_embedding = make_embedding(config, config.max_position_embeddings)
        self.blocks = nn.ModuleList(EntropiBlock(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = make_final_norm(config)
        self.leaky_slope: nn.Parameter | None = None  # common to all layers, where the configuration says so
        if config.parts.activation == "leaky_relu" and config.leaky_slope_learned == "global":
            self.leaky_slope = nn.Parameter(torch.tensor(config.leaky_slope))
        self.gradient_checkpointing = False
        self.post_init()

    def train(self, mode: bool = True) -> EntropiModel:
        super().train(mode)
        iterate_spectral_norms(self, 0)  # keep torch's own iterations off
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.token_embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> EntropiOutput:
        """`input_ids` `(B, T)` -> last hidden state `(B, T, d)` and L row entropies `(B, H, T)`.

        `attention_mask` is `(B, S)`, 0 where a token, cached ones included, is padding, or a 4-D mask that is used as
        it is: boolean (True = visible) or additive. Without a mask and a cache, `position_ids` that start again within
        a row begin a new document, which sees nothing of those before it. Unless `use_cache` says otherwise, a cache is
        made in evaluation and not in training; rows of several documents have none. `past_key_values` and `cache` are
        two names of one argument, and the output's field has the one that the installed transformers uses.

        Raises:
            ValueError: inputs that do not fit each other or the model, in one line.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "attention weights are never held: the output has their entropies, and "
                "entropi.record_entropy(model, keep_patterns=True) says where the heads look"
            )

        if inputs_embeds is None:
            inputs_embeds = self.token_embedding(input_ids)
            if self.config.embedding_scale != 1.0:  # rounded to the weights' dtype, as Gemma does
                inputs_embeds = inputs_embeds * inputs_embeds.new_tensor(self.config.embedding_scale)

        batch, length = inputs_embeds.shape[:2]
        cache = _one_of(past_key_values, cache)
        if cache is not None:
            shape = batch, self.config.num_key_value_heads or 0, self.config.head_dim
            check_cache(cache, len(self.blocks), shape)
        past = cached_tokens(cache)
        check_positions(position_ids, batch, length, past, self.config.max_position_embeddings)
        documents = packed_documents(position_ids, attention_mask, cache)
        cache = self._cache(cache, use_cache, documents)

        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device)[None] + past
        rows = batch, self.config.num_attention_heads, length
        visible = visibility(rows, inputs_embeds.device, attention_mask, documents, cache, past)

        hidden = inputs_embeds
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(position_ids)
        hidden = functional.dropout(hidden, self.config.embedding_dropout, self.training)

        rotations: list[tuple[Tensor, Tensor]] = []
        if self.position_embedding is None:
            rotations = rotary_sets(self.config, position_ids, hidden.dtype)
        sets = self.config.rotary_layers or [0] * len(self.blocks)
        if self.training and self.config.parts.weight_norm == "spectral":
            iterate_spectral_norms(self)

        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        entropies, hidden_states = [], []
        for block, which in zip(self.blocks, sets):
            rotation = rotations[which] if rotations else None
            hidden_states.append(hidden)
            hidden, entropy = block(hidden, position_ids, rotation, visible, cache, self.leaky_slope)
            entropies.append(entropy)

        hidden = self.final_norm(hidden)
        return EntropiOutput(
            last_hidden_state=hidden,
            hidden_states=(*hidden_states, hidden) if with_states else None,
            entropies=tuple(entropies),
            **{CACHE: cache},
        )

    def _cache(self, given: Cache | None, use_cache: bool | None, documents: Tensor | None) -> Cache | None:
        """The cache to fill: the one given, or a new one where it is wanted."""
        cache = given
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            if documents is None or torch.compiler.is_compiling():
                cache = DynamicCache(config=self.config)
            elif use_cache:
                raise ValueError(
                    "position_ids that start again make rows of several documents, and what follows a cached row would "
                    "see all of them: pass use_cache=False, or an attention_mask if the row is one text"
                )
        if cache is not None and self.training and self.gradient_checkpointing:
            raise ValueError("gradient checkpointing would fill the cache twice: pass use_cache=False, and no cache")
        return cache


class EntropiForCausalLM(EntropiPreTrainedModel, GenerationMixin):
    """A decoder with a language-modelling head tied to the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.token_embedding.weight"}  # noqa: RUF012
    # Tells the Trainer that `num_items_in_batch` is understood: losses are exact under gradient accumulation.
    accepts_loss_kwargs = True

    def __init__(self, config: EntropiConfig) -> None:
        super().__init__(config)
        self.model = EntropiModel(config)
        self.lm_head = make_linear(config, "head", config.hidden_size, config.vocab_size, bias=False)
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

    @can_return_tuple
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
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> EntropiOutput:
        """Logits `(B, T, V)`, row entropies and, with `labels` `(B, T)` (shifted inside), the loss.

        In training mode the loss is cross-entropy + lambda * L_entropy (Algorithm 1); in evaluation it is the
        cross-entropy alone. With `num_items_in_batch`, the target tokens of all micro-batches of one update, both
        terms are scaled so that the micro-batches' losses add up to the update's. Without `return_logits` the output
        has none, for those who want the loss alone.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )

        logits = self.lm_head(_positions_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = cross_entropy = penalty = None
        if labels is not None:
            if labels.shape != logits.shape[:-1]:
                raise ValueError(
                    f"labels {tuple(labels.shape)} do not fit logits of {tuple(logits.shape[:-1])} tokens: they are "
                    "shifted inside and need them all, with logits_to_keep at 0"
                )
            cross_entropy = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
            loss = cross_entropy.clone()  # the Trainer of several processes scales a loss in place
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
            logits=logits if return_logits else None,
            hidden_states=outputs.hidden_states,
            entropies=outputs.entropies,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        """Refuse transformers' continuous batching (`generate_batch`).

        Raises:
            ValueError: always; its paged cache is read by attention functions that return no entropies.
        """
        raise ValueError("continuous batching (generate_batch) has no entropies: use generate with a padded batch")

    @staticmethod
    def create_masks_for_generate(
        config: EntropiConfig,
        *,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """What `generate` hands on with a preallocated cache: the mask of padding at a length that stays the same.

        A compiled forward pass is then compiled once. transformers' own would hold T x S numbers.
        """
        given = _one_of(past_key_values, cache)
        if attention_mask is None or given is None:
            return None
        return whole_length(attention_mask, given.layers[0].max_cache_len)

    def inference_parameters(self) -> int:
        """Number of parameters that inference needs.

        That is without the regulariser's thresholds, and with a normalised weight counted once, as the matrix it is.
        """
        spared = ("parametrizations.weight.original0", "parametrizations.weight.1.gain")
        return sum(
            p.numel()
            for name, p in self.named_parameters()
            if not name.startswith("entropy_regularizer.") and not name.endswith(spared)
        )

    def set_softmax(self, softmax: SoftmaxForm | str) -> None:
        """Evaluate with this form of the softmax from now on, whatever the model was trained with.

        Raises:
            UserError: an impossible form, or one that stands for no other, as a polynomial of the logits.
        """
        form, own = parse_of_model(str(softmax)), self.config.softmax_form
        if form != own and not (form.of_distance and own.of_distance):
            trained = own if form.of_distance else form
            raise UserError(f"{trained} stands for no other softmax: a model is trained and evaluated with it")
        self.config.softmax = str(form)
        for module in self.modules():
            if isinstance(module, EntropiAttention):
                module.softmax = form

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, and a model card, and what lets other programs load the model."""
        self.config.auto_map = dict(card.AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            card.write_card(Path(save_directory), card.model_card(self.config, self.inference_parameters()))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: transformers would copy the package's source beside every saved model that was loaded so."""

    @classmethod
    def from_transformers(cls, source: PreTrainedModel) -> EntropiForCausalLM:
        """A model with copies of another family's weights: the same logits, plus row entropies.

        The families are those of `entropi.model.families`. Precision and mode are those of `source`.

        Raises:
            UserError: another family, or options and weights that this family does not have.
        """
        values = source.config.to_dict()
        model, _ = cls.from_weights(values, convert.Weights(source.state_dict(), copied=True))
        model.generation_config = copy.deepcopy(source.generation_config)
        return model.to(source.dtype).train(source.training)

    @classmethod
    def from_weights(cls, values: Mapping[str, Any], weights: convert.Weights) -> tuple[EntropiForCausalLM, list[str]]:
        """A model of another family's configuration and weights, which are taken over without a copy; and remarks.

        Raises:
            UserError: as `from_transformers`.
        """
        options, given = convert.options_of(values)
        config = EntropiConfig(**options)
        with torch.device("meta"):
            model = cls(config)
        ours = convert.renamed(config, given, values["model_type"], weights)
        for name, expected in model.state_dict().items():
            if name in ours and ours[name].shape != expected.shape:
                found, wanted = tuple(ours[name].shape), tuple(expected.shape)
                raise UserError(
                    f"the checkpoint's weights do not fit its configuration: {name} is {found}, not {wanted}"
                )
        missing, unexpected = model.load_state_dict(ours, strict=False, assign=True)
        if wrong := missing or unexpected:
            raise UserError(f"the checkpoint's weights do not fit its configuration: {wrong[0]} is missing or too much")
        model.tie_weights()
        return model, given.notes


def _one_of(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache given by either of its two names."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument: give one of them")
    return cache if past_key_values is None else past_key_values


def _positions_to_keep(hidden: Tensor, which: int | Tensor) -> Tensor:
    """The states `(B, n, d)` whose logits are wanted.

    `which` is transformers' `logits_to_keep`: the last n of them, all if 0; positions `(n,)`, or `(B, n)` of each row;
    or booleans `(B, T)`, for `(n, d)` states in all.
    """
    if isinstance(which, int):
        return hidden[:, -which:] if which else hidden
    if which.dim() < 2:
        return hidden[:, which]
    return hidden[which] if which.dtype == torch.bool else hidden.take_along_dim(which[..., None], dim=1)


# transformers finds the family by these; registering is the one thing this package does when it is imported.
AutoConfig.register(EntropiConfig.model_type, EntropiConfig, exist_ok=True)
AutoModelForCausalLM.register(EntropiConfig, EntropiForCausalLM, exist_ok=True)
