"""Causal multi-head self-attention that returns its row entropies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from entropi.entropy.attention import entropy_attention
from entropi.entropy.recording import observe
from entropi.model.configuration import EntropiConfig


class EntropiAttention(nn.Module):
    """Query, key, value and output projections around `entropy_attention`."""

    def __init__(self, config: EntropiConfig, layer_idx: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_idx = layer_idx  # the name transformers uses
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.query = nn.Linear(width, width, bias=config.bias != "none")
        self.key = nn.Linear(width, width, bias=config.bias != "none")
        self.value = nn.Linear(width, width, bias=config.bias == "all")
        self.output = nn.Linear(width, width, bias=config.bias == "all")
        self.temperature: nn.Parameter | None = None  # t of Eq. 9, (H, positions)
        if config.parts.temperature:
            self.temperature = nn.Parameter(
                torch.full((self.heads, config.max_position_embeddings), config.temperature_init)
            )

    def forward(
        self, hidden: Tensor, position_ids: Tensor, attn_mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """`(B, T, d)` -> output `(B, T, d)`, row entropies `(B, H, T)` in nats."""
        batch, length, _ = hidden.shape
        query, key, value = (
            projection(hidden).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        temperature = None
        if self.temperature is not None:
            temperature = self.temperature[:, position_ids].transpose(0, 1)  # (B or 1, H, T)
        heads, entropy = entropy_attention(query, key, value, temperature=temperature, attn_mask=attn_mask)
        observe(self, entropy, None if attn_mask is None else attn_mask[:, 0, :, -length:])
        return self.output(heads.transpose(1, 2).reshape(batch, length, -1)), entropy
