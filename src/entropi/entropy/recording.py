"""Layer x head entropies of any Hugging Face causal LM, without ever holding its attention weights.

`entropy_attention` is registered with transformers under the name "entropi"; a recorder collects what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from entropi.entropy.attention import entropy_attention
from entropi.entropy.patterns import Pattern, attention_pattern

NAME = "entropi"  # of the attention implementation
_active: ContextVar[EntropyRecorder | None] = ContextVar("entropi_recorder", default=None)


class EntropyRecorder:
    """Mean entropy of every head over everything the model was run on since recording began.

    `rows[layer]` holds the entropies themselves, `(B, H, T)` nats a forward pass, and `patterns[layer]` where the
    heads looked, where they were asked for.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[int] | None, keep_rows: bool, gradients: bool, keep_patterns: bool
    ) -> None:
        self._modules = {id(module) for module in model.modules()}
        self._layers = None if layers is None else set(layers)
        self._keep_rows, self._gradients = keep_rows, gradients
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}
        self._keep_patterns = keep_patterns
        self.rows: dict[int, list[Tensor]] = {}
        self.patterns: dict[int, list[Pattern]] = {}

    def take(
        self, module: nn.Module, entropy: Tensor, valid: Tensor | None, pattern: Callable[[], Pattern] | None
    ) -> None:
        """Add `(B, H, T)` entropies of one layer; `valid` `(B, 1, T)` marks the rows that are not padding."""
        layer = getattr(module, "layer_idx", None)
        if id(module) not in self._modules or layer is None or (self._layers is not None and layer not in self._layers):
            return
        if not self._gradients:
            entropy = entropy.detach()
        weights = torch.ones_like(entropy[:, :1]) if valid is None else valid.to(entropy.dtype)
        total, count = (entropy * weights).sum(dim=(0, 2)), weights.expand_as(entropy[:, :1]).sum()
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
        self._counts[layer] = self._counts[layer] + count if layer in self._counts else count
        if self._keep_rows:
            self.rows.setdefault(layer, []).append(entropy)
        if self._keep_patterns and pattern is not None:
            self.patterns.setdefault(layer, []).append(pattern())

    @property
    def layers(self) -> list[int]:
        """The layers seen, in the order of `mean`'s rows."""
        return sorted(self._sums)

    def mean(self) -> Tensor:
        """`(layers, heads)` nats, the mean over all rows that are not padding (Eq. 5-7 of 2501.03489).

        Raises:
            RuntimeError: nothing was recorded.
        """
        if not self._sums:
            raise RuntimeError("no attention was recorded: run the model inside the `with` block")
        return torch.stack([self._sums[layer] / self._counts[layer] for layer in self.layers])


@contextmanager
def record_entropy(
    model: Any,
    layers: Iterable[int] | None = None,
    *,
    keep_rows: bool = False,
    gradients: bool = False,
    keep_patterns: bool = False,
) -> Iterator[EntropyRecorder]:
    """Record the attention entropies of `model` while it runs under fused attention.

    Args:
        model: any transformers model that takes attention implementations (GPT-2, GPT-NeoX, Llama, Qwen3, Gemma 3,
            ...), or an `EntropiForCausalLM`. Its implementation is switched for the duration of the block, in
            which what was compiled runs uncompiled.
        layers: only these; all by default.
        keep_rows: keep every row's entropy as well; grows with what the model is run on.
        gradients: let gradients flow through what is recorded.
        keep_patterns: keep where every head looked as well (`attention_pattern`); costs the attention once more.

    Raises:
        ValueError: a model that does not take attention implementations, or whose attention needs what
            `entropy_attention` lacks (dropout, soft-capping, sinks).
    """
    recorder = EntropyRecorder(model, layers, keep_rows, gradients, keep_patterns)
    native = model.config.model_type == "entropi"
    before = None if native else model.config._attn_implementation
    if not native:
        register_attention()
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(f"{type(model).__name__} does not let its attention implementation be chosen")
    token = _active.set(recorder)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield recorder
    finally:
        _active.reset(token)
        if not native:
            model.set_attn_implementation(before)


def observe(
    module: nn.Module, entropy: Tensor, valid: Tensor | None = None, pattern: Callable[[], Pattern] | None = None
) -> None:
    """Show the entropies of a layer to the active recorder, if there is one; `pattern` is called if it wants it."""
    if torch.compiler.is_compiling():
        return  # `record_entropy` runs compiled models uncompiled
    recorder = _active.get()
    if recorder is not None:
        recorder.take(module, entropy, valid, pattern)


def register_attention() -> None:
    """Make `attn_implementation="entropi"` known to transformers, with the mask function it needs.

    Without the mask function of the same name, transformers would pass no mask and causality would be lost.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `(B, H, T, D)` in, `(B, T, H, D)` out; entropies go to the recorder."""
    lacking = [name for name in ("softcap", "position_bias", "s_aux") if kwargs.get(name) is not None]
    if dropout:
        lacking.append("attention dropout (use model.eval(), or set it to 0)")
    if lacking:
        raise ValueError(f"{type(module).__name__} needs {', '.join(lacking)}, which entropy_attention does not have")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    settings: dict[str, Any] = dict(
        is_causal=causal, scale=scaling, attn_mask=attention_mask, enable_gqa=key.shape[1] != query.shape[1]
    )
    output, entropy = entropy_attention(query, key, value, **settings)
    valid = None
    if attention_mask is not None and attention_mask.dtype == torch.bool and is_causal:
        # A causal token sees itself, unless it is padding.
        valid = attention_mask.diagonal(key.shape[2] - query.shape[2], dim1=-2, dim2=-1)[:, :1]
        if valid.shape[-1] != query.shape[2]:
            valid = None
    observe(module, entropy, valid, lambda: attention_pattern(query, key, **settings))
    return output.transpose(1, 2).contiguous(), None
