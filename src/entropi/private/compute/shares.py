"""One party's share of a value: what is in SPU's form of it, and made anew."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from spu import libspu

_ADDITIVE = "cheetah.AShr<FM64>"  # numbers whose sum over both parties is the value, modulo 2^64
_PRIVATE = "Priv2k<FM64,"  # and the rank of the party that knows the value; the other one holds anything
_WORDS, _BITS = "cheetah.BShr<FM64,64>", "cheetah.BShr<FM64,1>"  # words and bits whose sum modulo two is the value


def numbers_of(share: Any, rank: int) -> NDArray[np.uint64]:
    """What party `rank` holds of a value: the sum of both parties' numbers is the value, modulo 2^64.

    Of words whose bits are shared one by one it is their sum modulo two.

    Raises:
        ValueError: a share of another form, or not all of it.
    """
    meta = libspu.ValueMeta()
    meta.ParseFromString(share.meta)
    shape, storage = tuple(meta.shape.dims), meta.storage_type
    if storage.startswith(_PRIVATE) and storage != f"{_PRIVATE}{rank}>":
        return np.zeros(shape, np.uint64)
    if storage not in (_ADDITIVE, _WORDS) and not storage.startswith(_PRIVATE):
        raise ValueError(f"a share is stored as {storage}")

    content = np.empty(int(np.prod(shape, dtype=np.int64)), "<u8")
    room, filled = content.view(np.uint8), 0
    for part in share.share_chunks:
        chunk = libspu.ValueChunk()
        chunk.ParseFromString(part)
        piece = np.frombuffer(chunk.content, np.uint8)
        room[chunk.chunk_offset : chunk.chunk_offset + len(piece)] = piece
        filled += len(piece)
    if filled != len(room):
        raise ValueError(f"a share of {len(room)} bytes came with {filled}")
    return content.astype(np.uint64, copy=False).reshape(shape)


def share_of(numbers: NDArray[np.uint64]) -> Any:
    """A share of fixed-point numbers, secret from both parties, whose part is `numbers`."""
    return _share(numbers, libspu.DataType.DT_F32, _ADDITIVE)


def share_of_words(words: NDArray[np.uint64]) -> Any:
    """A share of words, whose bits are secret one by one."""
    return _share(words, libspu.DataType.DT_I64, _WORDS)


def share_of_bits(bits: NDArray[np.uint64]) -> Any:
    """A share of bits, one a number, by which the engine chooses."""
    return _share(bits, libspu.DataType.DT_I1, _BITS)


def _share(numbers: NDArray[np.uint64], kind: Any, storage: str) -> Any:
    meta = libspu.ValueMeta()
    meta.data_type, meta.visibility = kind, libspu.Visibility.VIS_SECRET
    meta.shape, meta.storage_type = list(numbers.shape), storage

    chunk = libspu.ValueChunk()
    chunk.content = np.ascontiguousarray(numbers, "<u8").tobytes()
    chunk.total_bytes, chunk.chunk_offset = len(chunk.content), 0
    share = libspu.Share()
    share.meta, share.share_chunks = meta.SerializeToString(), [chunk.SerializeToString()]
    return share
