"""The most entropy that attention can have. Imports no torch, as pages need it too."""

from __future__ import annotations

import math


def causal_maximum(context_length: int) -> float:
    """The largest mean row entropy under a causal mask, (1/T) sum_i log i, in nats; below E_max = log T."""
    return math.lgamma(context_length + 1) / context_length
