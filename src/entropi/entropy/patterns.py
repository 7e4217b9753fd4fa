"""Where attention heads look: how far back, and how much at the first token, the previous one and themselves.

Computed for a block of query rows at a time, so that a layer's T x S weights are never held, let alone all layers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from entropi.entropy.attention import entropy_attention

BLOCK_ROWS = 128
FIRST_ROW = 2  # the first row in which first token, previous token and itself are three


class Pattern(NamedTuple):
    """Of every head, `(B, H)` means over the query rows from the third on (over all, where there are fewer)."""

    distance: Tensor  # tokens back, sum_j a_ij (i - j)
    on_first: Tensor  # weight on the first token
    on_previous: Tensor
    on_itself: Tensor


@torch.no_grad()
def attention_pattern(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    temperature: Tensor | None = None,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
    exp_iterations: int | None = None,
) -> Pattern:
    """Where the heads look, of `query (B, H, T, D)` and `key (B, H or G, S, D)`; arguments as for `entropy_attention`.

    The queries are the last T of S positions, as with a cache. Padding is not told from text: give sequences without.
    """
    settings: dict[str, Any] = dict(
        scale=query.shape[-1] ** -0.5 if scale is None else scale, enable_gqa=enable_gqa, exp_iterations=exp_iterations
    )
    sums = torch.zeros(4, *query.shape[:2], dtype=torch.float64, device=query.device)
    counted = 0
    offset = key.shape[2] - query.shape[2]
    skipped = max(FIRST_ROW - offset, 0) if query.shape[2] > FIRST_ROW - offset else 0
    for rows, weights in _weights(query, key, is_causal, temperature, attn_mask, settings):
        position = torch.arange(rows.start + offset, rows.stop + offset, device=query.device)
        back = position[:, None] - torch.arange(weights.shape[-1], device=query.device)
        taken = slice(max(skipped - rows.start, 0), None)
        weights, back = weights[:, :, taken], back[taken]
        found = (weights * back, weights[..., :1], weights * (back == 1), weights * (back == 0))
        sums += torch.stack([x.sum(dim=(-1, -2), dtype=torch.float64) for x in found])
        counted += weights.shape[2]
    return Pattern(*(sums / counted))


def _weights(
    query: Tensor,
    key: Tensor,
    is_causal: bool,
    temperature: Tensor | None,
    attn_mask: Tensor | None,
    settings: dict[str, Any],
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of query rows with their attention weights `(B, H, rows, keys they can see)`.

    They are the output of attention whose values are the unit vectors: whatever the operation does, this sees it.
    Values are as wide as keys, so the narrower of the two is filled up with zeros.
    """
    length, total = query.shape[2], key.shape[2]
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        attn_mask = attn_mask.expand(*attn_mask.shape[:2], length, total)
    if temperature is not None:
        temperature = temperature.expand(*temperature.shape[:-1], length)
    for start in range(0, length, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, length))
        keys = rows.stop + total - length if is_causal else total
        width = max(keys, query.shape[-1])
        units = torch.eye(keys, width, dtype=query.dtype, device=query.device)
        filling = (0, width - query.shape[-1])
        weights, _ = entropy_attention(
            pad(query[:, :, rows], filling),
            pad(key[:, :, :keys], filling),
            units.expand(*key.shape[:2], keys, width),
            is_causal=is_causal,
            temperature=None if temperature is None else temperature[..., rows],
            attn_mask=None if attn_mask is None else attn_mask[:, :, rows, :keys],
            implementation="blockwise",
            **settings,
        )
        yield rows, weights[..., :keys]
