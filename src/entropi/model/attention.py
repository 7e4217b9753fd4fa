"""Causal multi-head self-attention that returns its row entropies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from entropi.entropy.attention import entropy_attention
from entropi.entropy.patterns import attention_pattern
from entropi.entropy.recording import observe
from entropi.model.configuration import SMALLEST_TEMPERATURE, EntropiConfig
from entropi.model.linear import make_linear
from entropi.model.normalization import make_head_norm
from entropi.model.qk_clip import largest_logits
from entropi.model.shape import BIASES
from entropi.model.visibility import Visibility


class _Bounded(torch.autograd.Function):
    """max(x, lowest), whose gradient below the bound is passed on where it leads back up, and 0 where it leads away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lowest: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.lowest = lowest
        return x.clamp(min=lowest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad.masked_fill((x < ctx.lowest) & (grad > 0), 0.0), None


class Temperature(nn.Module):
    """Learnable softmax temperature t of SM(t) (Eq. 9): per head and query position, or per head.

    It is never below `SMALLEST_TEMPERATURE`, wherever training or a file took the parameter.
    """

    def __init__(self, config: EntropiConfig) -> None:
        super().__init__()
        positions = config.max_position_embeddings if config.temperature_granularity == "position" else 1
        self.exponential = config.temperature_parametrization == "exp"
        self.init = config.temperature_init
        self.lowest = math.log(SMALLEST_TEMPERATURE) if self.exponential else SMALLEST_TEMPERATURE
        self.parameter = nn.Parameter(torch.empty(config.num_attention_heads, positions))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Set every temperature to its initial value."""
        self.parameter.fill_(self.init)
        if self.exponential:
            self.parameter.log_()

    def values(self) -> Tensor:
        """t, `(H, positions)` or `(H, 1)`."""
        bounded: Tensor = _Bounded.apply(self.parameter, self.lowest)
        return bounded.exp() if self.exponential else bounded

    def forward(self, position_ids: Tensor) -> Tensor:
        """t of the rows at `position_ids` `(B or 1, T)`, `(B or 1, H, T)`."""
        values = self.values()
        if values.shape[1] == 1:
            return values[None]
        return values[:, position_ids].transpose(0, 1)


class LengthScale(nn.Module):
    """Factor g log(n) / log(P) on the logits of a row that sees n keys, g by head (log-length scaling, 2501.19399)."""

    def __init__(self, config: EntropiConfig) -> None:
        super().__init__()
        self.positions = config.max_position_embeddings
        self.gain = nn.Parameter(torch.empty(config.num_attention_heads))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """A row that sees as many keys as the model has positions starts as without the factor."""
        self.gain.fill_(1.0)

    def forward(self, position_ids: Tensor) -> Tensor:
        """Factors `(B or 1, H, T)` of the rows at `position_ids` `(B or 1, T)`, which see themselves and all before."""
        wide = torch.promote_types(self.gain.dtype, torch.float32)
        lengths = (position_ids + 1).to(wide).log() / math.log(self.positions)
        return self.gain[None, :, None] * lengths[:, None]


class EntropiAttention(nn.Module):
    """Query, key, value and output projections around `entropy_attention`."""

    def __init__(self, config: EntropiConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        width, own = config.hidden_size, config.num_attention_heads * config.head_dim
        shared, biased = config.num_key_value_heads * config.head_dim, BIASES[config.bias]
        self.layer_idx = layer_idx  # the name transformers uses
        self.head_dim = config.head_dim
        self.softmax = config.softmax_form
        self.query = make_linear(config, "query", width, own, bias="query" in biased)
        self.key = make_linear(config, "key", width, shared, bias="key" in biased)
        self.value = make_linear(config, "value", width, shared, bias="value" in biased)
        self.output = make_linear(config, "output", own, width, bias="output" in biased, writes_to_stream=True)
        self.query_norm = make_head_norm(config)
        self.key_norm = make_head_norm(config)
        self.temperature = Temperature(config) if config.parts.temperature else None
        self.length_scale = LengthScale(config) if config.log_length_scaling else None
        self.measure_logits = False  # for QK-clip, see `qk_clip`
        self.largest_logits: Tensor | None = None  # of every head since the last clip, `(H,)`

    def forward(
        self,
        hidden: Tensor,
        position_ids: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        visible: Visibility,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """`(B, T, d)` -> output `(B, T, d)`, row entropies `(B, H, T)` in nats.

        `rotation` holds cosines and sines `(B or 1, 1, T, r)` of rotary positions.
        """
        batch, length, _ = hidden.shape
        query, key = self.queries(hidden, position_ids, rotation), self.keys(hidden, rotation)
        value = self.heads(self.value, hidden)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            key, value = key[:, :, : visible.keys], value[:, :, : visible.keys]
        settings: dict[str, Any] = dict(
            temperature=None if self.temperature is None else self.temperature(position_ids),
            is_causal=visible.is_causal,
            attn_mask=visible.mask,
            enable_gqa=key.shape[1] != query.shape[1],
            softmax=self.softmax,
        )
        if self.measure_logits and self.training:
            largest = largest_logits(query, key, settings["temperature"])
            self.largest_logits = largest if self.largest_logits is None else largest.maximum(self.largest_logits)
        heads, entropy = self.attend(query, key, value, settings)
        observe(self, entropy, visible.counted, lambda: attention_pattern(query, key, **settings))
        return self.output(heads.transpose(1, 2).reshape(batch, length, -1)), entropy

    def attend(self, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Heads `(B, H, T, k)` and row entropies `(B, H, T)`; `settings` are those of `entropy_attention`."""
        return entropy_attention(query, key, value, **settings)

    def queries(self, hidden: Tensor, position_ids: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """`(B, T, d)` -> queries `(B, H, T, k)`, turned by position and scaled by length where the model does that."""
        query = turned(self.query_norm(self.heads(self.query, hidden)), rotation)
        if self.length_scale is None:
            return query
        return (query * self.length_scale(position_ids)[..., None]).to(query.dtype)

    def keys(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """`(B, T, d)` -> keys `(B, G, T, k)`, turned by position where the model does that."""
        return turned(self.key_norm(self.heads(self.key, hidden)), rotation)

    def heads(self, projection: nn.Module, hidden: Tensor) -> Tensor:
        """`(B, T, d)` -> queries, keys or values `(B, heads, T, k)`."""
        return projection(hidden).view(*hidden.shape[:2], -1, self.head_dim).transpose(1, 2)


def rotary_sets(config: EntropiConfig, position_ids: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """`rotary_cos_sin` for each of the model's sets of frequencies, of which most models have one."""
    wide, device = torch.promote_types(dtype, torch.float32), position_ids.device
    if config.rotary_frequencies is not None:
        sets = [torch.tensor(one, dtype=wide, device=device) for one in config.rotary_frequencies]
    else:
        exponents = torch.arange(0, config.rotary_dimensions, 2, device=device, dtype=wide) / config.rotary_dimensions
        sets = [config.rotary_base**-exponents]
    return [rotary_cos_sin(position_ids, frequencies, dtype) for frequencies in sets]


def rotary_cos_sin(position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(B or 1, 1, T, 2 n)` of `position_ids` `(B or 1, T)` for n frequencies, in float32 or wider.

    Pair j of columns (j, j + n) turns by position * frequency j, as in GPT-NeoX and Llama.
    """
    angles = position_ids[:, None, :, None].to(frequencies.dtype) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(heads: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """`(B, H, T, k)` turned by position, where there is a rotation."""
    return heads if rotation is None else rotate(heads, *rotation)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the first columns of `(B, H, T, k)`, as many as `cosine` has; in the dtype of `heads`."""
    turning, rest = heads[..., : cosine.shape[-1]], heads[..., cosine.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned.to(heads.dtype), rest], dim=-1)  # under autocast the angles are wider
