"""How much memory a party's process may take, by default what its model and the length of its session need."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from entropi.private.compute import lookahead
from entropi.private.compute.description import Description
from entropi.private.compute.functions import CIPHERTEXT, POLYNOMIALS, rows_at_a_time
from entropi.private.wire.link_frames import DEFAULT_UNREAD

MEMORY_ROOM = 2.0  # times the prediction: a session that honest parties need must not fail for it


def memory_for(
    model: Description,
    tokens: int,
    memory_gb: float | None,
    material: int = 0,
    *,
    prepares: bool = False,
    draft_tokens: int = 0,
    prompts: Sequence[int] = (),
) -> int | None:
    """Bytes that a party's process may write to: the limit asked for, or else what a session needs, twice.

    Args:
        tokens: prompt and answer together.
        memory_gb: in 10^9 bytes; None for the prediction, 0 for no limit.
        material: bytes of what was prepared for the session.
        prepares: it prepares for another one.
        draft_tokens: most drafts of a pass, after each of which logits are computed too.
        prompts: tokens of each prompt and its answer, where several share the passes.
    """
    if memory_gb is not None:
        return int(memory_gb * 1e9) or None
    needed = needed_memory(model, tokens, prepares=prepares, draft_tokens=draft_tokens, prompts=prompts)
    return int(MEMORY_ROOM * (needed + 2 * material))


def needed_memory(
    model: Description,
    tokens: int,
    *,
    prepares: bool = False,
    draft_tokens: int = 0,
    prompts: Sequence[int] = (),
) -> int:
    """Bytes that a party of a session with so many tokens, prompt and answer together, is predicted to write to.

    It lies above `VmData`, which the limit counts, of both parties of ten shapes (benchmarks/results/party_memory.md).
    It has a part of its own (Python, JAX, SPU, tables of oblivious transfer), one for every core's threads, one for the
    weights, their shares and encodings, one for the polynomials of the largest matrix product, and one for the largest
    tensor of which every number takes part in comparisons or polynomials.
    """
    shapes = model.weight_shapes()
    weights = sum(math.prod(shape) for shape in shapes.values())
    # Multiplications of the largest product; larger ones are computed in pieces (`times_matrix`, `times_table`).
    # The head has one row, but where it is prepared for all.
    rows, once = min(tokens, 128), ("embedding", "positions", *(() if prepares else ("head",)))
    multiplied = shapes | lookahead.shapes(model) if prepares else shapes
    matrices = [shape for name, shape in multiplied.items() if name not in once and len(shape) == 2]
    largest = max(rows_at_a_time(rows, *shape) * math.prod(shape) for shape in matrices)
    read = max(1 + draft_tokens, len(prompts))
    if read > 1:
        largest = max(largest, rows_at_a_time(read, *shapes["head"]) * math.prod(shapes["head"]))
    table = min(rows * math.prod(shapes["embedding"]), POLYNOMIALS * CIPHERTEXT)
    wide = max(model.intermediate_size, 3 * max(model.hidden_size, model.query_size))
    values = tokens * max(model.heads * max(prompts, default=tokens), wide) + read * model.vocab_size
    own = 2e9 + 5e7 * (os.cpu_count() or 1)
    return int(own + 150 * weights + 30 * max(largest, table) + 8e3 * values)


def unread_for(memory_bytes: int | None) -> int:
    """Bytes that a party may leave unread, of its memory limit."""
    return DEFAULT_UNREAD if memory_bytes is None else memory_bytes // 4
