"""How much memory a party's process may take, by default what its model and the length of its session need."""

from __future__ import annotations

import math
import os

from entropi.private.compute.description import Description
from entropi.private.wire.link_frames import DEFAULT_UNREAD

MEMORY_ROOM = 2.0  # times the prediction: a session that honest parties need must not fail for it


def memory_for(model: Description, tokens: int, memory_gb: float | None) -> int | None:
    """Bytes that a party's process may write to: the limit asked for, or else what a session needs, twice.

    The prediction was fitted to `VmData` of both parties of small models; the limit counts the same. It has a part of
    its own (Python, JAX, SPU, tables of oblivious transfer), one for every core's threads, one for the weights and
    their shares, one for the encoded entries of the largest matrix product, and one for the largest tensor of which
    every number takes part in comparisons or polynomials.

    Args:
        tokens: prompt and answer together.
        memory_gb: in 10^9 bytes; None for the prediction, 0 for no limit.
    """
    if memory_gb is not None:
        return int(memory_gb * 1e9) or None
    sizes = [math.prod(shape) for shape in model.weight_shapes().values()]
    wide = max(model.intermediate_size, 3 * model.hidden_size)
    values = tokens * max(model.heads * tokens, wide) + model.vocab_size
    needed = 2e9 + 5e7 * (os.cpu_count() or 1) + 32 * sum(sizes) + 400 * max(sizes) + 8e3 * values
    return int(MEMORY_ROOM * needed)


def unread_for(memory_bytes: int | None) -> int:
    """Bytes that a party may leave unread, of its memory limit."""
    return DEFAULT_UNREAD if memory_bytes is None else memory_bytes // 4
