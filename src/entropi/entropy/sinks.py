"""Attention sinks: an extra logit in every row that belongs to no key, as gpt-oss learns one for each head (`s_aux`).

A row's softmax is then over S + 1 logits, its last weight attends to nothing. With L and H of all S + 1, and as the
sink's value is zero, everything the keys' gradients need stays as it is; the sink's own is the general
dS = p (dP - rowsum(g_O O) - g_H (log p + H)) at dP = 0. See `attention.py` for the notation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropi.entropy.secure_softmax import HIDDEN


def per_row(sinks: Tensor, query: Tensor) -> Tensor:
    """The sinks `(H,)`, or what broadcasts against `(B, H, T)`, as a logit of every row, at least float32.

    A sink of -inf is none: its logit is a hidden one. Raises ValueError where shapes or devices do not fit.
    """
    rows, given = query.shape[:3], sinks.unsqueeze(-1) if sinks.dim() == 1 else sinks
    if sinks.device != query.device:
        raise ValueError(f"sinks are on {sinks.device}, queries on {query.device}")
    if given.dim() > 3 or any(n not in (1, m) for n, m in zip(reversed(given.shape), reversed(rows))):
        raise ValueError(f"sinks are (H,) or broadcast against (B, H, T) = {tuple(rows)}, got {tuple(sinks.shape)}")
    wide = torch.promote_types(query.dtype, torch.float32)
    return given.to(wide).clamp(min=HIDDEN).expand(rows)


def gradient(
    sinks: Tensor, lse: Tensor, output: Tensor, entropy: Tensor, grad_output: Tensor, grad_entropy: Tensor
) -> Tensor:
    """Gradient of the sinks of all rows `(B, H, T)`; `lse` is L, sinks included, in nats."""
    log_p = (sinks - lse).clamp(max=0.0)  # 0 where L is a stand-in, in rows that see neither key nor sink
    row_sum = (grad_output.to(lse.dtype) * output.to(lse.dtype)).sum(dim=-1)
    return -log_p.exp() * (row_sum + grad_entropy * (log_p + entropy))
