"""Which keys the queries of one forward pass see: causality, padding, packed documents, and what a cache holds.

It is decided once for all layers. Without padding there is no mask at all, and the T x S one exists only where there is
no way around it: for packed rows, for compiled passes over preallocated keys, and where the caller brings one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.masking_utils import find_packed_sequence_indices

from entropi.entropy.padding import MASKED_BELOW


class Visibility(NamedTuple):
    """What `entropy_attention` needs to know beside queries, keys and values; S counts the cached keys too."""

    mask: Tensor | None  # broadcasts against (B, H, T, S), boolean (True = visible) or additive
    is_causal: bool  # the queries are the last T of the S tokens, and see nothing after themselves
    keys: int | None  # S where a cache returns more keys than that; None: all it returns
    counted: Tensor | None  # (B or 1, 1, T), False for rows of padding; None: all are text


def visibility(
    shape: tuple[int, int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    documents: Tensor | None,
    cache: Cache | None,
    past: int | Tensor,
) -> Visibility:
    """What T tokens see after `past` cached ones (see `cached_tokens`).

    Args:
        shape: B, H and T.
        attention_mask: `(B, S)`, 0 where a token is padding; or `(B or 1, H or 1, T, S)`, boolean (True = visible) or
            additive, which is used as it is. S may be all that a preallocated cache can hold.
        documents: `(B or 1, T)`, the number of each token's document (`packed_documents`).

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    length = shape[2]
    allocated = None if cache is None or not cache.layers else getattr(cache.layers[0], "max_cache_len", None)
    if isinstance(past, Tensor):  # compiled: how many keys there are is not known
        return _preallocated(attention_mask, past, shape, allocated)
    seen = past + length
    if allocated is not None and seen > allocated:
        raise ValueError(f"the cache is made for {allocated} tokens and would have to hold {seen}")
    _check_mask(attention_mask, shape, {seen} | ({allocated} if allocated else set()))
    if attention_mask is None:
        if documents is None:
            return Visibility(None, True, seen, None)
        return Visibility((documents[:, :, None] == documents[:, None, :])[:, None], True, seen, None)
    attention_mask = attention_mask.to(device)[..., :seen]
    if attention_mask.dim() == 4:
        mask = _as_given(attention_mask)
        own = mask.expand(-1, -1, length, -1).diagonal(past, dim1=-2, dim2=-1)
        own = own if own.dtype == torch.bool else own > MASKED_BELOW
        return Visibility(mask, False, seen, own.any(dim=1, keepdim=True))  # a token sees itself, unless it is padding
    if not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return Visibility(None, True, seen, None)
    mask = attention_mask.bool()[:, None, None, :]
    return Visibility(mask, True, seen, mask[:, 0, :, past:])


def _preallocated(
    attention_mask: Tensor | None, past: Tensor, shape: tuple[int, int, int], allocated: int | None
) -> Visibility:
    """In a compiled pass: all the keys of the cache, and a mask over those that are not written yet."""
    if allocated is None:
        raise ValueError("this cache cannot be compiled: make it with StaticCache")
    sizes = {attention_mask.shape[-1]} if attention_mask is not None and attention_mask.dim() == 2 else {allocated}
    _check_mask(attention_mask, shape, sizes)
    if attention_mask is not None and attention_mask.dim() == 4:
        return Visibility(_as_given(attention_mask), False, None, None)
    rows = past + torch.arange(shape[2], device=past.device)
    mask = (torch.arange(allocated, device=past.device) <= rows[:, None])[None, None]
    if attention_mask is not None:
        mask = mask & whole_length(attention_mask, allocated).bool()[:, None, None, :]
    return Visibility(mask, False, None, None)


def whole_length(attention_mask: Tensor, allocated: int) -> Tensor:
    """An attention mask `(B, S)` of the text so far, as one of all the `allocated` keys."""
    return pad(attention_mask, (0, allocated - attention_mask.shape[1]))


def _check_mask(attention_mask: Tensor | None, shape: tuple[int, int, int], sizes: set[int]) -> None:
    if attention_mask is None:
        return
    batch, heads, length = shape
    found, columns = tuple(attention_mask.shape), " or ".join(map(str, sorted(sizes)))
    legal: tuple[set[int], ...] = ({1, batch}, sizes)
    if len(found) == 4:
        legal = ({1, batch}, {1, heads}, {1, length}, sizes)
    if len(found) != len(legal) or any(size not in allowed for size, allowed in zip(found, legal)):
        raise ValueError(
            f"attention_mask {found} does not fit: ({batch}, {columns}) is needed, cached tokens included, or "
            f"({batch} or 1, {heads} or 1, {length}, {columns})"
        )
    if len(found) == 4 and attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise ValueError(
            f"a 4-D attention_mask is boolean (True = visible) or added to the logits, not {attention_mask.dtype}"
        )


def _as_given(mask: Tensor) -> Tensor:
    """A 4-D mask as `entropy_attention` reads it, converted once for all layers.

    What stands for minus infinity in float16 is a logit elsewhere.
    """
    if mask.dtype not in (torch.float16, torch.bfloat16):
        return mask
    return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, -torch.inf)


def packed_documents(position_ids: Tensor | None, attention_mask: Tensor | None, cache: Any) -> Tensor | None:
    """The number of each token's document, `(B or 1, T)`, or None where every row is one text.

    As in transformers: in a row without attention mask and cache, a position that does not follow the one before it
    begins a document. Compiled code cannot look, and takes every row whose positions are given for packed.
    """
    if position_ids is None or attention_mask is not None or cache is not None:
        return None
    return find_packed_sequence_indices(position_ids)


def cached_tokens(cache: Cache | None) -> int | Tensor:
    """How many tokens a cache holds: a number, or a tensor in compiled passes over preallocated keys."""
    past: Any = 0 if cache is None else cache.get_seq_length()
    return past if isinstance(past, int) or torch.compiler.is_compiling() else int(past)


def check_cache(cache: Any, layers: int, shape: tuple[int, int, int]) -> None:
    """Refuse a cache that does not keep all keys of every layer; `shape` is batch, key heads and their width.

    Raises:
        ValueError: naming what the cache is made for and what this model needs.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"past_key_values must be a transformers Cache of a decoder such as DynamicCache(), got "
            f"{type(cache).__name__}"
        )
    if not all(isinstance(layer, CacheLayerMixin) and not getattr(layer, "is_sliding", 0) for layer in cache.layers):
        raise ValueError(
            "the cache does not keep all keys and values of every layer, and this model attends to the whole text: "
            "make it for this model"
        )
    if cache.layers and cache.layer_class_to_replicate is None and len(cache.layers) != layers:
        raise ValueError(f"the cache has {len(cache.layers)} layers, the model {layers}: make it for this model")
    keys = getattr(cache.layers[0], "keys", None) if cache.layers else None
    if isinstance(keys, Tensor) and keys.dim() == 4:
        found = (keys.shape[0], keys.shape[1], keys.shape[3])
        if found != shape:
            raise ValueError(
                "batch, key heads and width of the cached keys are {} x {} x {}, of the new ones {} x {} x {}".format(
                    *found, *shape
                )
            )


def check_positions(position_ids: Tensor | None, batch: int, length: int, past: int | Tensor, most: int) -> None:
    """Refuse positions of another shape than `(B or 1, T)`, and those that a model of `most` positions does not have.

    Where looking at them would have to wait for a device, they are looked at only if there are more tokens than
    positions, as there may be in rows that are padded or packed.

    Raises:
        ValueError: saying what is needed.
    """
    if position_ids is None:
        if isinstance(past, int) and past + length > most:
            raise ValueError(f"{past + length} tokens do not fit the {most} positions of this model")
        return
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(f"position_ids {tuple(position_ids.shape)} do not fit: ({batch} or 1, {length}) is needed")
    if torch.compiler.is_compiling() or isinstance(past, Tensor) or position_ids.numel() == 0:
        return
    if position_ids.device.type == "cpu" or past + length > most:
        least, largest = (int(x) for x in position_ids.aminmax())
        if least < 0 or largest >= most:
            raise ValueError(
                f"position_ids from {least} to {largest} do not fit the {most} positions of this model, which are 0 to "
                f"{most - 1}"
            )
