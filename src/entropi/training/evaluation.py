"""Held-out cross-entropy, perplexity and head entropies of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeldOut:
    """What a model does on held-out text."""

    cross_entropy: float  # nats per token
    tokens: int  # predicted
    entropy: Tensor  # (L, H), nats, mean over all sequences and rows

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy); infinite where that overflows."""
        return math.inf if self.cross_entropy > 700 else math.exp(self.cross_entropy)


@torch.no_grad()
def evaluate_blocks(
    model: nn.Module, blocks: np.ndarray, batch_size: int = 32, progress: Callable[[int], None] | None = None
) -> HeldOut:
    """Evaluate on `blocks` `(N, T)`; every token after the first of a block is predicted.

    Float32 whatever the training precision, so that figures of different runs can be compared. `progress` is
    called with the number of blocks done.
    """
    # The class's own forward: mixed-precision training replaces the instance's by one under autocast.
    forward = type(model).forward
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, tokens, entropy = 0.0, 0, torch.zeros(0)
    for start in range(0, len(blocks), batch_size):
        ids = torch.from_numpy(np.asarray(blocks[start : start + batch_size], dtype=np.int64)).to(device)
        out = forward(model, ids, use_cache=False)
        losses = nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
        )
        total += float(losses)
        tokens += ids.shape[0] * (ids.shape[1] - 1)
        heads = torch.stack([e.double().mean(dim=-1).sum(dim=0) for e in out.entropies]).cpu()
        entropy = heads if start == 0 else entropy + heads
        if progress is not None:
            progress(min(start + batch_size, len(blocks)))
    model.train(was_training)
    return HeldOut(cross_entropy=total / tokens, tokens=tokens, entropy=entropy / len(blocks))
