"""QK-clip (2507.20534): a head whose attention logits grew beyond a limit gets smaller query and key weights.

It acts on weights between updates, so it costs nothing at inference. Logits are measured as attention computes them,
with temperatures and scaling by length; the largest of a head is brought to the limit by a factor whose square root
the query's and the key's weights each take. Queries that share a key take what their group's key may not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from entropi.errors import UserError
from entropi.model.configuration import EntropiConfig

_BLOCK_ROWS = 128  # of queries at a time: a layer's T x T logits are never held


def check_clippable(config: EntropiConfig) -> None:
    """Raise `UserError` where weights of one head cannot be scaled."""
    if config.parts.weight_norm == "spectral" and config.parts.normalises("query"):
        raise UserError(
            f"qk_clip scales the weights of single heads, which {config.architecture} normalises as one matrix"
        )


@torch.no_grad()
def largest_logits(query: Tensor, key: Tensor, temperature: Tensor | None) -> Tensor:
    """The largest magnitude of any causal logit of every head, `(H,)`, at least float32.

    Args:
        query, key: `(B, H, T, D)` and `(B, G, T, D)`, G a divisor of H.
        temperature: divides the logits of a row, `(B or 1, H, T or 1)`.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    query = query * width**-0.5
    if temperature is not None:
        query = query / temperature.unsqueeze(-1)
    query = query.to(key.dtype).reshape(batch, groups, heads // groups, length, width)
    largest = query.new_zeros(heads, dtype=torch.promote_types(query.dtype, torch.float32))
    for start in range(0, length, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, length)
        logits = query[:, :, :, start:stop] @ key[:, :, None, :stop].transpose(-1, -2)
        future = torch.arange(stop, device=key.device) > torch.arange(start, stop, device=key.device)[:, None]
        logits = logits.abs().masked_fill(future, 0.0).amax(dim=(0, 3, 4)).reshape(heads)
        largest = torch.maximum(largest, logits.to(largest.dtype))
    return largest


@torch.no_grad()
def clip_query_and_key(query: nn.Linear, key: nn.Linear, largest: Tensor, limit: float) -> None:
    """Scale the projections' weights so that logits which reached `largest` `(H,)` reach `limit` at most."""
    factor = (limit / largest.clamp(min=limit)).to(query.weight.dtype)  # 1 within the limit
    groups = len(factor) * key.out_features // query.out_features
    of_key = factor.view(groups, -1).amax(dim=1).sqrt()  # the member of a group that needs it least
    _scale_rows(query, factor / of_key.repeat_interleave(len(factor) // groups))
    _scale_rows(key, of_key)


def _scale_rows(linear: nn.Linear, by_head: Tensor) -> None:
    rows = by_head.repeat_interleave(linear.out_features // len(by_head))
    # Of a weight-normalised matrix the rows' lengths are a parameter of their own.
    layer: Any = linear
    weight = layer.parametrizations.weight.original0 if parametrize.is_parametrized(layer) else layer.weight
    weight.mul_(rows[:, None])
    if linear.bias is not None:
        linear.bias.mul_(rows)
