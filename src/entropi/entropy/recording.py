"""Layer x head entropies of any Hugging Face model, without ever holding its attention weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from entropi.entropy.interface import attention_modules, implementations, in_place, register_attention
from entropi.entropy.recorded import Attention, placed
from entropi.entropy.recorder import EntropyRecorder, observe

__all__ = ["Attention", "EntropyRecorder", "observe", "record_entropy", "register_attention"]


@contextmanager
def record_entropy(
    model: Any,
    layers: Iterable[int] | None = None,
    *,
    keep_rows: bool = False,
    gradients: bool = False,
    keep_patterns: bool = False,
) -> Iterator[EntropyRecorder]:
    """Record the attention entropies of `model` while it runs under fused attention, in whichever thread.

    Every row (query position) that is not padding counts once, however it is computed: in one pass, with a cache, in
    chunks; tokens that assisted generation proposes and rejects are rows too. Gradient checkpoints record once.

    Args:
        model: any transformers model whose attention goes through transformers' attention interface (GPT-2, GPT-NeoX,
            Llama, Qwen3, Gemma, gpt-oss, BERT, BART, T5, ...), or an `EntropiForCausalLM`. Its implementation is
            switched for the duration of the block, in which what was compiled runs uncompiled.
        layers: only these, by the model's own numbers; all by default.
        keep_rows: keep every row's entropy as well, in `rows`: `(B, H, T)` nats a layer and forward pass, padding
            included; grows with what the model is run on.
        gradients: let gradients flow through what is recorded, also where the model checkpoints its activations, as
            transformers lets it; its checkpoints are then not reentrant. For checkpoints of one's own, `backward` has
            to run within the block.
        keep_patterns: keep where every head looked as well (`attention_pattern`); costs the attention once more.

    Yields:
        The recorder: `mean()` is `(layers, heads)` nats (Eq. 5-7 of 2501.03489); `by_layer()` and `rows` say more.

    Raises:
        ValueError: a model without softmax attention, or whose attention cannot be taken by another's, or needs what
            `entropy_attention` lacks (dropout).
    """
    inner = _unwrapped(model)
    attending, own = attention_modules(inner)
    if not attending and own:
        kinds = ", ".join(sorted({type(module).__name__ for module in own}))
        raise ValueError(
            f"{type(inner).__name__} cannot be recorded: {kinds} computes attention itself, not through transformers' "
            "attention interface"
        )
    if not attending:
        raise ValueError(f"{type(inner).__name__} has no softmax attention to record")
    names = implementations(inner, attending)
    recorder = EntropyRecorder(placed(inner, attending), own, layers, keep_rows, gradients, keep_patterns)
    models = [m for m in inner.modules() if m is inner or hasattr(m, "get_correct_attn_implementation")]
    with in_place(inner, names, gradients), recorder.attached(models):
        yield recorder


def _unwrapped(model: Any) -> nn.Module:
    """The model within what torch wraps models in to compile or to distribute them."""
    while True:
        wrapped = getattr(model, "_orig_mod", None)
        if wrapped is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            wrapped = model.module
        if wrapped is None:
            if not isinstance(model, nn.Module):
                raise ValueError(f"record_entropy takes a model, got {type(model).__name__}")
            return model
        model = wrapped
