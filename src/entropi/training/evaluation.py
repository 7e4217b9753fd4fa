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
from entropi.training.distributed import all_reduce_sum, rank, world_size

PATTERN_SEQUENCES = 8
MAX_STRETCHES = 64  # of positions: enough for a line in a figure


@dataclass(frozen=True)
class HeldOut:
    """What a model does on held-out text."""

    cross_entropy: float  # nats per token
    tokens: int  # predicted
    heads: dict[int, Tensor]  # by layer that has attention (heads,), nats, mean over all sequences and rows
    layers: int | None = None  # of the model, those without attention included; None where that is not known

    @property
    def entropy(self) -> Tensor:
        """`(L, H)` of a model whose layers all have as many heads."""
        return torch.stack(list(self.heads.values()))

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy); infinite where that overflows."""
        return math.inf if self.cross_entropy > 700 else math.exp(self.cross_entropy)


@torch.no_grad()
def evaluate_blocks(
    model: nn.Module,
    blocks: Blocks | np.ndarray,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    *,
    entropies: bool = True,
) -> HeldOut:
    """Evaluate on `blocks` `(N, T)`; every token after the first of a block is predicted.

    `model` is ours or any causal LM; with `entropies`, one that `record_entropy` takes, and without them its own
    attention is left alone. Float32 whatever the training precision, so that figures of different runs can be compared.
    `progress` is called with the number of blocks done. The processes of a run share the batches out, and all get the
    result of all.

    Raises:
        ValueError: entropies of a model without attention, or of one whose attention cannot be recorded.
    """
    was_training = model.training
    model.eval()
    ours = getattr(model.config, "model_type", None) == "entropi"  # whose output holds the entropies
    starts = list(range(0, len(blocks), batch_size))
    # Every process runs as many batches as the others, since a sharded model is put together by all of them.
    rounds = math.ceil(len(starts) / world_size())
    loss_sum, tokens, sums = 0.0, 0, dict[int, Tensor]()
    for turn in range(rounds):
        number = turn * world_size() + rank()
        start = starts[number % len(starts)]
        ids = _ids(model, blocks[start : start + batch_size])
        with _own_forward(model), record_entropy(model) if entropies and not ours else nullcontext() as recorded:
            out = model(ids, use_cache=False)
        counts = float(number < len(starts))  # 0 for a batch that another process has already
        losses = nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
        )
        loss_sum += counts * float(losses)
        tokens += int(counts) * ids.shape[0] * (ids.shape[1] - 1)
        heads, layers = dict[int, Tensor](), None
        if recorded is not None:
            heads = {layer: mean.double() * len(ids) for layer, mean in recorded.by_layer().items()}
            layers = recorded.num_layers
        elif entropies:
            heads = dict(enumerate(e.double().mean(dim=-1).sum(dim=0) for e in out.entropies))
            layers = len(heads)
        sums = {layer: sums.get(layer, 0.0) + counts * values for layer, values in heads.items()}
        if progress is not None:
            progress(min((turn + 1) * world_size() * batch_size, len(blocks)))
    model.train(was_training)
    flat = torch.cat([torch.tensor([loss_sum, tokens], dtype=torch.float64, device=ids.device), *sums.values()])
    summed = all_reduce_sum(flat).cpu()
    means = (summed[2:] / len(blocks)).split([len(values) for values in sums.values()])
    return HeldOut(
        cross_entropy=float(summed[0] / summed[1]),
        tokens=int(summed[1]),
        heads=dict(zip(sums.keys(), means)),
        layers=layers,
    )


def diagnose_heldout(result: HeldOut, context_length: int, source: str = "") -> records.DiagnosisRecord:
    """The diagnosis of an evaluation on the text that `source` describes.

    Raises:
        UserError: entropies that are not finite: the model has diverged.
    """
    numbers = list(result.heads)
    everywhere = numbers == list(range(result.layers or 0))
    try:
        found = diagnose(list(result.heads.values()), context_length, None if everywhere else numbers)
    except ValueError as error:
        raise UserError(str(error)) from None
    return records.DiagnosisRecord(
        entropy=found.entropy,
        layers=found.layers,
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
    """With the class's own forward, not compiled: mixed-precision training replaces it by one under autocast."""
    replaced = model.__dict__.pop("forward", None)
    try:
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled anew for another precision and shape
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

    Raises:
        ValueError: a model without attention, or one whose attention cannot be recorded.
    """
    was_training = model.training
    model.eval()
    looks, entropy = dict[int, Tensor](), dict[int, Tensor]()  # by layer: (4, heads), and (T,) means over heads
    for done, block in enumerate(blocks, start=1):
        with _own_forward(model), record_entropy(model, keep_rows=True, keep_patterns=True) as recorded:
            model(_ids(model, block[None]), use_cache=False)
        patterns, rows = recorded.patterns, recorded.rows
        for layer in recorded.layers:
            pattern = torch.stack(patterns[layer][0])[:, 0].cpu()
            looks[layer] = looks.get(layer, 0.0) + pattern / len(blocks)
            means = rows[layer][0].double().mean(dim=(0, 1)).cpu()
            entropy[layer] = entropy.get(layer, 0.0) + means / len(blocks)
        if progress is not None:
            progress(done)
    model.train(was_training)
    distance, on_first, on_previous, on_itself = (
        [looks[layer][measure].tolist() for layer in sorted(looks)] for measure in range(4)
    )
    length = blocks.shape[1]
    edges = [round(i * length / min(length, MAX_STRETCHES)) for i in range(min(length, MAX_STRETCHES) + 1)]
    return records.AttentionPattern(
        sequences=len(blocks),
        context_length=length,
        layers=sorted(looks),
        distance=distance,
        on_first=on_first,
        on_previous=on_previous,
        on_itself=on_itself,
        positions=edges[:-1],
        entropy_by_position=[
            [float(entropy[layer][a:b].mean()) for a, b in itertools.pairwise(edges)] for layer in sorted(looks)
        ],
    )
