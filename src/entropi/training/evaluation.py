"""Held-out cross-entropy, perplexity and head entropies of a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from entropi import records
from entropi.data.shards import Blocks
from entropi.entropy.diagnosis import diagnose
from entropi.entropy.recording import record_entropy
from entropi.errors import UserError
from entropi.training.distributed import processes, rank, total

PATTERN_SEQUENCES = 8
MAX_STRETCHES = 64  # of positions: enough for a line in a figure


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
    model: nn.Module, blocks: Blocks | np.ndarray, batch_size: int = 32, progress: Callable[[int], None] | None = None
) -> HeldOut:
    """Evaluate on `blocks` `(N, T)`; every token after the first of a block is predicted.

    `model` is ours or any causal LM that `record_entropy` takes. Float32 whatever the training precision, so that
    figures of different runs can be compared. `progress` is called with the number of blocks done. The processes of
    a run share the batches out, and all get the result of all.
    """
    was_training = model.training
    model.eval()
    ours = getattr(model.config, "model_type", None) == "entropi"  # whose output holds the entropies
    starts = list(range(0, len(blocks), batch_size))
    # Every process runs as many batches as the others, since a sharded model is put together by all of them.
    rounds = math.ceil(len(starts) / processes())
    loss_sum, tokens, entropy = 0.0, 0, torch.zeros(())
    for turn in range(rounds):
        number = turn * processes() + rank()
        start = starts[number % len(starts)]
        ids = _ids(model, blocks[start : start + batch_size])
        with _own_forward(model), nullcontext() if ours else record_entropy(model) as recorded:
            out = model(ids, use_cache=False)
        counts = float(number < len(starts))  # 0 for a batch that another process has already
        losses = nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
        )
        loss_sum += counts * float(losses)
        tokens += int(counts) * ids.shape[0] * (ids.shape[1] - 1)
        if recorded is None:
            heads = torch.stack([e.double().mean(dim=-1).sum(dim=0) for e in out.entropies])
        else:
            heads = recorded.mean().double() * len(ids)
        entropy = entropy.to(heads.device) + counts * heads
        if progress is not None:
            progress(min((turn + 1) * processes() * batch_size, len(blocks)))
    model.train(was_training)
    sums = total(torch.cat([entropy.new_tensor([loss_sum, tokens], dtype=torch.float64), entropy.flatten()])).cpu()
    return HeldOut(
        cross_entropy=float(sums[0] / sums[1]),
        tokens=int(sums[1]),
        entropy=sums[2:].reshape(entropy.shape) / len(blocks),
    )


def diagnose_heldout(result: HeldOut, context_length: int, source: str = "") -> records.DiagnosisRecord:
    """The diagnosis of an evaluation on the text that `source` describes.

    Raises:
        UserError: entropies that are not finite: the model has diverged.
    """
    try:
        found = diagnose(result.entropy, context_length)
    except ValueError as error:
        raise UserError(str(error)) from None
    return records.DiagnosisRecord(
        entropy=found.entropy,
        context_length=context_length,
        max_observed=found.max_observed,
        max_possible=found.max_possible,
        quartile_shares=list(found.quartile_shares),
        overloaded=found.overloaded,
        collapsed=found.collapsed,
        verdict=found.verdict,
        source=source,
    )


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """With the class's own forward: mixed-precision training replaces the instance's by one under autocast."""
    replaced = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            model.__dict__["forward"] = replaced


def _ids(model: nn.Module, blocks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(blocks, dtype=np.int64)).to(next(model.parameters()).device)


@torch.no_grad()
def observe_patterns(
    model: nn.Module, blocks: Blocks | np.ndarray, progress: Callable[[int], None] | None = None
) -> records.AttentionPattern:
    """Where the heads of `model` look on `blocks` `(N, T)`, one at a time, and their entropy by position.

    `model` is ours or any causal LM that `record_entropy` takes. T x T weights are held for no layer.
    """
    forward = type(model).forward
    was_training = model.training
    model.eval()
    sums, entropy = torch.zeros(0), torch.zeros(0)
    for done, block in enumerate(blocks, start=1):
        with record_entropy(model, keep_rows=True, keep_patterns=True) as recorded:
            forward(model, _ids(model, block[None]), use_cache=False)
        patterns = torch.stack([torch.stack(recorded.patterns[i][0])[:, 0] for i in recorded.layers]).cpu()  # (L, 4, H)
        rows = torch.stack([recorded.rows[layer][0].double().mean(dim=(0, 1)) for layer in recorded.layers]).cpu()
        sums, entropy = (patterns, rows) if done == 1 else (sums + patterns, entropy + rows)
        if progress is not None:
            progress(done)
    model.train(was_training)
    distance, on_first, on_previous, on_itself = (sums / len(blocks)).unbind(dim=1)
    length = blocks.shape[1]
    edges = [round(i * length / min(length, MAX_STRETCHES)) for i in range(min(length, MAX_STRETCHES) + 1)]
    stretches = [(entropy[:, a:b] / len(blocks)).mean(dim=1) for a, b in itertools.pairwise(edges)]
    return records.AttentionPattern(
        sequences=len(blocks),
        context_length=length,
        distance=distance.tolist(),
        on_first=on_first.tolist(),
        on_previous=on_previous.tolist(),
        on_itself=on_itself.tolist(),
        positions=edges[:-1],
        entropy_by_position=torch.stack(stretches, dim=1).tolist(),
    )
