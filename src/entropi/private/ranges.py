"""Fixed point overflows silently and loses what is small: find in plaintext, before a secure run, where values lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
from jax import Array

from entropi.errors import UserError
from entropi.private.messages import Settings
from entropi.private.program import PAIR_FRACTION_BITS, PAIR_LARGEST, Description, Stage, run_plain

MOST_FRACTION_BITS = 20  # beyond, products lose range and nothing measurable is won
LEAST_FRACTION_BITS = 12
# Below so many units of the last digit a mean square makes its root wrong by more than 0.2 %.
_MEAN_SQUARE_BITS = 8
# An operation whose typical value has fewer bits than this is mostly rounding.
_TYPICAL_BITS = 5


@dataclass(frozen=True)
class Ranges:
    """What a model's values reach on some text. Keys read "layer 3 scores" or "head".

    `largest`: largest magnitude of any product or sum; not finite even in float32 counts as infinite.
    `smallest_mean_square`: of the rows that norms divide by the root of it.
    `smallest_typical`: smallest root mean square of an operation's results, over sequences.
    """

    largest: dict[str, float] = field(default_factory=dict)
    smallest_mean_square: dict[str, float] = field(default_factory=dict)
    smallest_typical: dict[str, float] = field(default_factory=dict)


def measure_ranges(
    model: Description, weights: Mapping[str, np.ndarray], sequences: list[list[int]], exp_iterations: int
) -> Ranges:
    """Ranges of all values on `sequences` of token ids."""
    ranges = Ranges()

    def watch(stage: Stage, operands: tuple[Array, ...], value: Array) -> None:
        name = f"layer {stage.layer} {stage.name}" if stage.layer >= 0 else stage.name
        magnitude = np.abs(value).max()
        if stage.name == "norm":  # sums its operand's squares
            squares = np.square(np.asarray(operands[0], np.float64))
            magnitude = max(magnitude, squares.sum(axis=-1).max())
            kind = model.final_norm if stage.layer < 0 else model.norm
            mean = np.var(operands[0], axis=-1) if kind == "layer" else squares.mean(axis=-1)
            _keep(ranges.smallest_mean_square, name, float(mean.min()) + model.norm_epsilon, min)
        if stage.name == "normalise":  # multiplies by up to the root of the keys before it divides by it
            magnitude = magnitude * np.sqrt(len(sequence))
        _keep(ranges.largest, name, float(magnitude) if np.isfinite(magnitude) else np.inf, max)
        if stage.name not in ("exp", "max"):  # far keys weigh nothing, and the largest is 0
            _keep(ranges.smallest_typical, name, float(np.sqrt(np.mean(np.square(value)))), min)

    for sequence in sequences:
        run_plain(model, weights, sequence, 1, exp_iterations, watch=watch)
    return ranges


def _keep(found: dict[str, float], name: str, value: float, which: Callable[[float, float], float]) -> None:
    found[name] = which(found.get(name, value), value)


def calibration_text(model: Description, weights: Mapping[str, np.ndarray]) -> list[list[int]]:
    """Random tokens over all positions, and those whose embeddings hold the largest values."""
    random = np.random.default_rng(0)
    by_size = np.argsort(-np.abs(weights["embedding"]).max(axis=1))
    return [
        random.integers(0, model.vocab_size, model.positions).tolist(),
        np.resize(by_size, model.positions).tolist(),
    ]


def largest_product(settings: Settings) -> float:
    """Magnitude below which every product must stay.

    It carries twice the fraction bits until it is truncated, and needs a sign and one bit to spare.
    """
    return 2.0 ** (settings.ring_bits - 2 * settings.fraction_bits - 2)


def problems(ranges: Ranges, settings: Settings) -> list[str]:
    """What of these ranges the settings cannot hold, with the numbers; empty if everything fits."""
    found = []
    bits, limit = settings.fraction_bits, largest_product(settings)
    name, value = max(ranges.largest.items(), key=lambda item: item[1])
    if not value < limit:
        found.append(
            f"fixed point would overflow: {name} reaches {value:.3g}, and products in a ring of {settings.ring_bits} "
            f"bits with {bits} fraction bits must stay below {limit:.3g}"
        )
    for what, smallest, spare in (
        ("the mean square of a row", ranges.smallest_mean_square, _MEAN_SQUARE_BITS),
        ("the typical value", ranges.smallest_typical, _TYPICAL_BITS),
    ):
        if smallest:
            name, value = min(smallest.items(), key=lambda item: item[1])
            if not value >= 2.0 ** (spare - bits):
                found.append(
                    f"fixed point would lose what is small: {what} in {name} is {value:.3g}, and with {bits} fraction "
                    f"bits it must be at least {2.0 ** (spare - bits):.3g}"
                )
    return found


def can_pair(weights: Mapping[str, np.ndarray], settings: Settings) -> bool:
    """Whether two tokens can share a row of the private table's product, `program.pair_products`."""
    return settings.fraction_bits <= PAIR_FRACTION_BITS and bool(np.abs(weights["embedding"]).max() < PAIR_LARGEST)


def settle(weights: Mapping[str, np.ndarray], settings: Settings) -> Settings:
    """The settings with what these weights allow to save."""
    return msgspec.structs.replace(settings, paired=settings.embedding == "private" and can_pair(weights, settings))


def check_ranges(
    model: Description,
    weights: Mapping[str, np.ndarray],
    settings: Settings,
    sequences: list[list[int]] | None = None,
) -> tuple[str, float]:
    """The operation with the largest values and that value, once it is known that everything fits.

    Without `sequences` of calibration text, `calibration_text` is used.

    Raises:
        UserError: values that the ring could not hold or the fraction bits not resolve, with the numbers and the
            fraction bits that would fit.
    """
    if sequences is None:
        sequences = calibration_text(model, weights)
    ranges = measure_ranges(model, weights, sequences, settings.exp_iterations)
    found = problems(ranges, settings)
    if settings.paired and not can_pair(weights, settings):
        found.append(
            f"two tokens do not fit one row: the table reaches {np.abs(weights['embedding']).max():.3g} with "
            f"{settings.fraction_bits} fraction bits, and must stay below {PAIR_LARGEST:g} with {PAIR_FRACTION_BITS}"
        )
    if found:
        fitting = fitting_fraction_bits(ranges, settings)
        advice = "no number of fraction bits would do" if fitting is None else f"{fitting} fraction bits would fit"
        raise UserError("; ".join([*found, advice]))
    return max(ranges.largest.items(), key=lambda item: item[1])


def fitting_fraction_bits(ranges: Ranges, settings: Settings) -> int | None:
    """The most fraction bits, 12 to 20, with which these ranges fit the ring; None if there are none."""
    for bits in range(MOST_FRACTION_BITS, LEAST_FRACTION_BITS - 1, -1):
        changed = Settings(ring_bits=settings.ring_bits, fraction_bits=bits)
        if not problems(ranges, changed):
            return bits
    return None
