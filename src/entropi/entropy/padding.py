"""Which rows of a recorded attention are padding, told from the masks that its models were called with."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Additive masks hide from -65504 in float16, from -1e4 by an old habit; no position bias reaches so far.
MASKED_BELOW = -1.0e3


class Mask(NamedTuple):
    """What a model was called with."""

    kind: str  # "none", "tokens" for a 2-D mask, "other" for one made already
    given: Tensor | None  # (B, S), or (B, 1 or H, T, S) for one made already
    queries: int | None  # T
    past: int | None  # tokens before these, in a preallocated cache
    cached: bool


@dataclass
class Frame:
    """A model, or a model within one, that is running in this thread."""

    mask: Mask
    gradients: bool  # whether they were on when it was called
    uses: dict[int, int] = field(default_factory=dict)  # of every attention module, by identity
    order: dict[str, int] = field(default_factory=dict)  # how many modules and uses of an attention have run
    valid: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # rows found by self-attention, by (B, T)


def valid_rows(
    frames: list[Frame], mask: Tensor | None, queries: Tensor, keys: Tensor, is_causal: bool
) -> Tensor | None:
    """Which rows `(B, 1, T)` of an attention under `mask` are not padding; None if all count.

    `frames` are the models that are running, innermost last. The mask of tokens that they were called with says it.
    Where it was another or its shape does not fit, a row of self-attention is padding if its own key is hidden from it,
    any other if it sees nothing.

    Raises:
        ValueError: a mask that does not tell padding from text.
    """
    batch, length, total = queries.shape[0], queries.shape[2], keys.shape[2]
    inner = frames[-1] if frames else None
    frame = next((f for f in reversed(frames) if f.mask.kind != "other"), None)
    if frame is not None and (found := _rows_of(frame.mask, batch, length)) is not None:
        return found
    if mask is None or (frame is not None and frame.mask.kind == "none" and frame.mask.queries == length):
        return None  # tokens without a mask: what hides keys from them is no padding
    made = inner is not None and inner.mask.kind == "other" and inner.mask.queries == length
    if inner is not None and made and inner.mask.given is not None:
        mask, total = inner.mask.given, inner.mask.given.shape[-1]  # what models hide besides is not padding
        is_causal = is_causal or inner.mask.cached
    if length == total or is_causal:
        valid = _rows_that_see_themselves(mask, batch, length, total)
        if valid is not None:
            if inner is not None:
                inner.valid[batch, length] = valid
            return valid
    if inner is not None and (batch, length) in inner.valid:
        return inner.valid[batch, length]  # cross-attention has the rows of the self-attention before it
    if made:
        raise ValueError("this attention mask does not tell padding from text: give the model a 2-D mask of tokens")
    # Rows of something else than tokens, as patches or latents: those that see nothing fill up a batch.
    return _visible(mask).any(dim=-1).any(dim=1, keepdim=True).expand(batch, 1, length)


def _rows_that_see_themselves(mask: Tensor, batch: int, length: int, total: int) -> Tensor | None:
    """Rows `(B, 1, T)` of self-attention whose own key is visible; None where a row's own key is not among the keys."""
    visible = _visible(mask)
    visible = visible.expand(*visible.shape[:2], length, total)

    # With keys preallocated for what comes, the last row's own key is the last one that it sees.
    seen = visible[:, :, -1].flatten(0, 1).any(dim=0).nonzero()
    offset = total - length if length == total or not len(seen) else int(seen[-1]) + 1 - length
    if offset < 0:
        return None
    own = visible.diagonal(offset, dim1=-2, dim2=-1)[..., :length].any(dim=1, keepdim=True)
    return own.reshape(own.shape[0], 1, length).expand(batch, 1, length)


def _visible(mask: Tensor) -> Tensor:
    """Which keys a mask shows, boolean, of four dimensions."""
    visible = mask if mask.dtype == torch.bool else mask > MASKED_BELOW
    return visible.reshape((1,) * (4 - visible.dim()) + visible.shape)


def _rows_of(mask: Mask, batch: int, length: int) -> Tensor | None:
    """Which rows `(B, 1, T)` a mask of tokens says are not padding; None where it does not speak of them."""
    tokens = mask.given
    if (
        tokens is None
        or tokens.dim() != 2
        or tokens.shape[0] != batch
        or (mask.queries is not None and mask.queries != length)
    ):
        return None
    total = tokens.shape[1]
    if total < length or (total > length and not mask.cached):
        return None
    past = mask.past if mask.past is not None and mask.past + length <= total else total - length
    return tokens[:, None, past : past + length] != 0


def mask_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mask:
    """What a model was called with."""
    try:
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
    except TypeError:  # which the model will say itself
        given = {}
    given = {**given.pop("kwargs", {}), **given}
    mask = given.get("attention_mask")
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "hidden_states")
    inputs = next((given[name] for name in names if isinstance(given.get(name), Tensor)), None)
    queries = None if inputs is None or inputs.dim() < 2 else inputs.shape[1]
    caches = ("past_key_values", "cache_params", "cache")  # the last for every model from transformers 5.24 on
    cache = next((given[name] for name in caches if given.get(name) is not None), None)
    past = None
    if cache is not None and getattr(cache, "is_compileable", False):
        with suppress(ValueError):  # of a cache without attention layers
            past = int(cache.get_seq_length())
    if isinstance(mask, dict):  # of masks by kind of layer: each of them tells padding
        masks = [each for each in mask.values() if isinstance(each, Tensor)]
        mask = max(masks, key=Tensor.dim, default=None)
    if any(given.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds", "encoder_outputs")):
        return Mask("other", None, queries, past, cache is not None)  # its mask is the encoder's, not the decoder's
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return Mask("tokens", mask, queries, past, cache is not None)
    made = mask if isinstance(mask, Tensor) and mask.dim() == 4 else None
    return Mask("none" if mask is None else "other", made, queries, past, cache is not None)
