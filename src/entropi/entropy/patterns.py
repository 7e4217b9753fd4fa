"""Where attention heads look: how far back, and how much at the first token, the previous one and themselves.

Attention is probed with indicator values, a block of query rows at a time: whatever the operation does, this sees it,
and a layer's T x S weights are never held, let alone all layers'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from entropi.entropy import sinks as attention_sinks
from entropi.entropy.attention import entropy_attention
from entropi.softmax import EXACT, SoftmaxForm, parse_of_attention

BLOCK_ROWS = 64  # rows that are asked at a time; values get as many columns
FIRST_ROW = 2  # the first row in which first token, previous token and itself are three


class Pattern(NamedTuple):
    """Of every head, `(B, H)` means over the query rows from the third on (over all, where there are fewer).

    Weights are those of the whole row: with a sink those of the keys sum to less than 1, otherwise to 1, whatever they
    are divided by.
    """

    distance: Tensor  # tokens back, sum over keys of a_ij (i - j): what goes to a sink goes no way
    first_weight: Tensor  # weight on the first token
    previous_weight: Tensor  # on the token before the row's own
    self_weight: Tensor  # on the row's own token


@torch.no_grad()
def attention_pattern(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    enable_gqa: bool = False,
    softmax: SoftmaxForm | str = EXACT,
) -> Pattern:
    """Where the heads look, of `query (B, H, T, D)` and `key (B, H or G, S, D)`; arguments as for `entropy_attention`.

    The queries are the last T of S positions, as with a cache. Padding is not told from text: give sequences without.
    """
    wide = torch.promote_types(query.dtype, torch.float32)  # positions have no room in bfloat16
    query, key = query.to(wide), key.to(wide)
    length, total = query.shape[2], key.shape[2]
    offset = total - length
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        attn_mask = attn_mask.expand(*attn_mask.shape[:2], length, total)
    if temperature is not None:
        temperature = temperature.expand(*temperature.shape[:-1], length)
    if sinks is not None:
        sinks = attention_sinks.per_row(sinks, query)
    skipped = max(FIRST_ROW - offset, 0) if length > FIRST_ROW - offset else 0
    sums = torch.zeros(4, *query.shape[:2], dtype=torch.float64, device=query.device)
    seeing = -offset if is_causal else 0  # the first row that may see a key
    for start in range(max(skipped, seeing), length, BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, length))
        keys = rows.stop + offset if is_causal else total
        first = rows.start + offset  # the position of the block's first row
        values = _values(keys, first, rows.stop + offset, query)
        seen, _ = entropy_attention(
            query[:, :, rows],
            key[:, :, :keys],
            values.expand(*key.shape[:2], *values.shape),
            is_causal=is_causal,
            scale=scale,
            temperature=None if temperature is None else temperature[..., rows],
            softcap=softcap,
            attn_mask=None if attn_mask is None else attn_mask[:, :, rows, :keys],
            sinks=None if sinks is None else sinks[..., rows],
            enable_gqa=enable_gqa,
            softmax=parse_of_attention(softmax).over_sum,
            implementation="blockwise",
        )
        at = torch.arange(rows.stop - rows.start, device=query.device)  # of each row in its block
        back = seen[..., 1] * at - seen[..., 0]
        found = (back, seen[..., 2], seen[..., at, at + 3], seen[..., at, at + 4])
        sums += torch.stack([x.sum(dim=-1, dtype=torch.float64) for x in found])
    return Pattern(*(sums / (length - skipped)))


def _values(keys: int, first: int, stop: int, like: Tensor) -> Tensor:
    """Values `(keys, 4 + rows)` whose attention output is what is asked of the rows at positions `first` to `stop`.

    Columns: the key's position from `first`; 1; whether it is the first token; whether it is at first - 1, first, ...,
    so that the row at place n of the block finds the weight on its previous token in column 3 + n, on itself in 4 + n.
    """
    position = torch.arange(keys, device=like.device)
    near = torch.arange(first - 1, stop, device=like.device)
    columns = [position[:, None] - first, torch.ones_like(position)[:, None], (position == 0)[:, None]]
    return torch.cat([*(c.to(like.dtype) for c in columns), (position[:, None] == near).to(like.dtype)], dim=1)
