"""Fixed-point overflow is silent: find in plaintext, before any secure run, how large values become."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jax import Array

from entropi.errors import UserError
from entropi.private.messages import Settings
from entropi.private.program import Description, Stage, run_plain


def largest_values(
    model: Description, weights: Mapping[str, np.ndarray], sequences: list[list[int]], exp_iterations: int
) -> dict[str, float]:
    """Largest magnitude that any product or sum of each operation reaches on `sequences` of token ids.

    Keys read "layer 3 scores" or "head". For the centred state it is the sum of squares, which the next
    operation forms. What is not finite even in float32 counts as infinite.
    """
    largest: dict[str, float] = {}

    def watch(stage: Stage, value: Array) -> None:
        name = f"layer {stage.layer} {stage.name}" if stage.layer >= 0 else stage.name
        magnitude = float(np.square(value).sum(axis=-1).max() if stage.name == "centre" else np.abs(value).max())
        largest[name] = max(largest.get(name, 0.0), magnitude if np.isfinite(magnitude) else np.inf)

    for sequence in sequences:
        run_plain(model, weights, sequence, 1, exp_iterations, watch=watch)
    return largest


def check_ranges(
    model: Description,
    weights: Mapping[str, np.ndarray],
    settings: Settings,
    sequences: list[list[int]] | None = None,
) -> tuple[str, float]:
    """The operation with the largest values and that value, once it is known to fit.

    Without `sequences` of calibration text, random tokens over all positions are used, and those whose embeddings
    hold the largest values.

    Raises:
        UserError: a value that the ring could not hold, with the numbers.
    """
    if sequences is None:
        random = np.random.default_rng(0)
        by_size = np.argsort(-np.abs(weights["embedding"]).max(axis=1))
        sequences = [
            random.integers(0, model.vocab_size, model.positions).tolist(),
            np.resize(by_size, model.positions).tolist(),
        ]
    largest = largest_values(model, weights, sequences, settings.exp_iterations)
    name, value = max(largest.items(), key=lambda item: item[1])
    # A product carries twice the fraction bits until it is truncated, and needs a sign and one bit to spare.
    limit = 2.0 ** (settings.ring_bits - 2 * settings.fraction_bits - 2)
    if not value < limit:
        raise UserError(
            f"fixed point would overflow: {name} reaches {value:.3g}, and products in a ring of {settings.ring_bits} "
            f"bits with {settings.fraction_bits} fraction bits must stay below {limit:.3g}"
        )
    return name, value
