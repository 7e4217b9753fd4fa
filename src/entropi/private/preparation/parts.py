"""The material of a session in parts, as it is prepared, kept and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from entropi.private.compute.description import Description
from entropi.private.compute.settings import Settings
from entropi.private.preparation.dealing import counts_of
from entropi.private.preparation.material import Need, needs
from entropi.private.preparation.ring import Ring


def parts_for(model: Description, settings: Settings, tokens: int, passes: int) -> list[Need]:
    """What a session takes, see `needs`; of a pool what is multiplied at a time is a part.

    A part is what is lost when preparing is interrupted.
    """
    return [part for need in needs(model, settings, tokens, passes) for part in _split(need)]


def _split(need: Need) -> list[Need]:
    if not need.pooled:
        return [need]
    return [
        replace(
            need,
            shapes=((size, *need.shapes[0][1:]), (size, *need.shapes[1][1:])),
            result=(size, *need.result[1:]),
        )
        for size in counts_of(need)
    ]


def kept_bytes(parts: Sequence[Need], rank: Literal[0, 1]) -> int:
    """Bytes that a party keeps: its masks, and its share of their products."""
    return 8 * sum(int(np.prod(shape, dtype=np.int64)) for part in parts for shape in part.kept(rank).values())


def together(parts: Sequence[Mapping[str, Ring]]) -> dict[str, Ring]:
    """Arrays of parts in their order, those of one pool behind each other."""
    found: dict[str, list[Ring]] = {}
    for part in parts:
        for name, array in part.items():
            found.setdefault(name, []).append(array)
    return {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in found.items()}
