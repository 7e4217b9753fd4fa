"""Fixed-point overflow and underflow analysis: what a model's values reach in plaintext, before a secure run.

Fixed point overflows silently, and what is smaller than its last digit becomes 0. `measure_ranges` and
`sweep_vocabulary` find the largest and smallest values; `select_fraction_bits` chooses the fraction bits from them, or
refuses them with the numbers. The ring is always that of 64 bits, see `Settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
from jax import Array

from entropi.errors import UserError
from entropi.private.compute.description import LEAST_PAIR_FRACTION_BITS, MEAN_WEIGHT_BITS, MIDDLE_WEIGHT, Description
from entropi.private.compute.embedding import pair_limit
from entropi.private.compute.program import Stage, cached_tokens, run_plain
from entropi.private.compute.settings import Settings

# What we choose from. `Settings` takes 12 and 13 too, with which logits of a trained model were wrong by 0.07 and 0.03.
LEAST_FRACTION_BITS, MOST_FRACTION_BITS = 14, 22
PREFERRED_FRACTION_BITS = 18  # logits wrong by 0.0015, less than by the kernel; the fewest that let tokens be paired
HEADROOM = 4.0  # times the calibration text's largest value should fit where the choice is ours
# Below so many units of the last digit a mean square makes its root wrong by more than 0.2 %.
_MEAN_SQUARE_BITS = 8
# An operation whose typical value has fewer bits than this is mostly rounding.
_TYPICAL_BITS = 5
SWEEP_LENGTH = 128  # tokens a sequence, where every token of the vocabulary is looked at once
# Bounds the look at every token; GPT-2 small's 50,257 need 1.2e13: nine minutes of two cores with other work.
MAX_SWEEP_OPERATIONS = 2e13


@dataclass(frozen=True)
class Ranges:
    """What a model's values reach on some text. Keys read "layer 3 scores" or "head".

    `largest`: largest magnitude of any product or sum; not finite even in float32 counts as infinite.
    `smallest_mean_square`, `largest_mean_square`: of the rows that norms divide by the root of it.
    `smallest_typical`: smallest root mean square of an operation's results, over sequences.
    `largest_mean_weight`, `low_mean_weight`: of a row by a polynomial softmax; the largest, and that below which one
    in a hundred lies.
    """

    largest: dict[str, float] = field(default_factory=dict)
    smallest_mean_square: dict[str, float] = field(default_factory=dict)
    largest_mean_square: dict[str, float] = field(default_factory=dict)
    smallest_typical: dict[str, float] = field(default_factory=dict)
    largest_mean_weight: dict[str, float] = field(default_factory=dict)
    low_mean_weight: dict[str, float] = field(default_factory=dict)


def measure_ranges(
    model: Description,
    weights: Mapping[str, np.ndarray],
    sequences: list[list[int]],
    exact_softmax_as: str,
    *,
    every_row: bool = False,
) -> Ranges:
    """Ranges of all values on `sequences` of token ids; with `every_row` of the logits after every token.

    Sequences follow a public prefix whose keys and values stand beside the weights.
    """
    ranges, past = Ranges(), cached_tokens(weights)

    def watch(stage: Stage, operands: tuple[Array, ...], value: Array) -> None:
        name = f"layer {stage.layer} {stage.name}" if stage.layer >= 0 else stage.name
        magnitude = np.abs(value).max()
        if stage.name == "norm":  # sums its first operand's squares
            squares = np.square(np.asarray(operands[0], np.float64))
            magnitude = max(magnitude, squares.sum(axis=-1).max())
            kind = model.final_norm if stage.layer < 0 else model.norm
            centred = kind == "layer" and stage.inputs[0] == "state"
            mean = np.var(operands[0], axis=-1) if centred else squares.mean(axis=-1)
            _keep(ranges.smallest_mean_square, name, float(mean.min()) + model.norm_epsilon, min)
            _keep(ranges.largest_mean_square, name, float(mean.max()) + model.norm_epsilon, max)
        if stage.name == "normalise" and not model.softmax_form.of_distance:
            rows, keys = operands[1].shape[-1], past + len(sequence)
            means = np.asarray(operands[1]) / np.arange(keys - rows + 1, keys + 1)
            _keep(ranges.largest_mean_weight, name, float(means.max()), max)
            _keep(ranges.low_mean_weight, name, float(np.quantile(means, 0.01)), min)
        if stage.name == "normalise":  # multiplies by up to the root of the keys before it divides by it
            magnitude = magnitude * np.sqrt(past + len(sequence))
        _keep(ranges.largest, name, float(magnitude) if np.isfinite(magnitude) else np.inf, max)
        if stage.name not in ("exp", "max"):  # far keys weigh nothing, and the largest is 0
            _keep(ranges.smallest_typical, name, float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))), min)

    for sequence in sequences:
        run_plain(model, weights, sequence, 1, exact_softmax_as, every_row=every_row, watch=watch)
    return ranges


def _keep(found: dict[str, float], name: str, value: float, which: Callable[[float, float], float]) -> None:
    found[name] = which(found.get(name, value), value)


def calibration_text(model: Description, weights: Mapping[str, np.ndarray]) -> list[list[int]]:
    """Random tokens over all positions, and those whose embeddings hold the largest values."""
    random = np.random.default_rng(0)
    by_size = np.argsort(-np.abs(weights["embedding"]).max(axis=1))
    length = model.positions - cached_tokens(weights)
    return [random.integers(0, model.vocab_size, length).tolist(), np.resize(by_size, length).tolist()]


@dataclass(frozen=True)
class Sweep:
    """What the values of single tokens reach.

    `ranges` over `tokens` of the vocabulary, all unless that would take too long, then those with the largest
    embeddings. `worst` is the sequence that reaches furthest, `faint` how many sequences have a row whose mean square
    the given fraction bits do not resolve.
    """

    ranges: Ranges
    tokens: int
    worst: list[int]
    faint: int


def sweep_vocabulary(model: Description, weights: Mapping[str, np.ndarray], settings: Settings) -> Sweep:
    """Ranges over sequences in which every token of the vocabulary occurs once, in random order.

    A calibration text holds as many tokens as the model has positions; a model of 2,048 tokens and 256 positions could
    overflow at any of the other 1,800, and nothing would tell.
    """
    per_token = 2.0 * sum(np.size(weight) for name, weight in weights.items() if name not in ("embedding", "positions"))
    tokens = int(min(model.vocab_size, max(MAX_SWEEP_OPERATIONS // per_token, SWEEP_LENGTH)))
    by_size = np.argsort(-np.abs(weights["embedding"]).max(axis=1), kind="stable")[:tokens]
    order = np.random.default_rng(1).permutation(by_size)
    length = min(model.positions - cached_tokens(weights), SWEEP_LENGTH)
    order = np.resize(order, -(-tokens // length) * length)  # whole sequences, so that all share compiled code

    ranges, worst, furthest, faint = Ranges(), list[int](), -1.0, 0
    for start in range(0, len(order), length):
        sequence = order[start : start + length].tolist()
        found = measure_ranges(model, weights, [sequence], settings.exact_softmax_as, every_row=True)
        reach = max(found.largest.values())
        if reach > furthest:
            worst, furthest = sequence, reach
        least = min(found.smallest_mean_square.values(), default=1.0)
        faint += bool(least < 2.0 ** (_MEAN_SQUARE_BITS - settings.fraction_bits))
        for kept, fresh in (
            (ranges.largest, found.largest),
            (ranges.largest_mean_square, found.largest_mean_square),
            (ranges.largest_mean_weight, found.largest_mean_weight),
        ):
            for name, value in fresh.items():
                _keep(kept, name, value, max)
    return Sweep(ranges, tokens, worst, faint)


def with_largest(ranges: Ranges, other: Ranges) -> Ranges:
    """`ranges`, and what `other` reaches beyond them; what is small stays a matter of typical text."""
    merged = {}
    for name in ("largest", "largest_mean_square", "largest_mean_weight"):
        merged[name] = dict(getattr(ranges, name))
        for place, value in getattr(other, name).items():
            _keep(merged[name], place, value, max)
    return replace(ranges, **merged)


def largest_product(settings: Settings) -> float:
    """Magnitude below which every product must stay.

    It carries twice the fraction bits until it is truncated, and needs a sign and one bit to spare.
    """
    return 2.0 ** (settings.ring_bits - 2 * settings.fraction_bits - 2)


def largest_mean_square(settings: Settings) -> float:
    """Mean square of a row below which its inverse root, a small number, is right to 0.2 %.

    The engine's root of larger ones is simply 0, from twice this on with even fraction bits and from this on with odd.
    """
    bits = settings.fraction_bits
    return 2.0 ** min(bits // 2 * 2 - 2, 2 * (bits - 9))


def problems(ranges: Ranges, settings: Settings, headroom: float = 1.0) -> list[str]:
    """What of these ranges the settings cannot hold, with the numbers; empty if everything fits.

    `headroom` times the largest result has to fit.
    """
    found = []
    bits, limit = settings.fraction_bits, largest_product(settings)
    name, value = max(ranges.largest.items(), key=lambda item: item[1])
    if not value * headroom < limit:
        danger = "could overflow on other text" if value < limit else "would overflow"
        found.append(
            f"fixed point {danger}: {name} reaches {value:.3g}, and products in a ring of {settings.ring_bits} "
            f"bits with {bits} fraction bits must stay below {limit:.3g}"
        )

    if settings.logit_bits is not None and not ranges.largest.get("head", 0.0) * 2.0**settings.logit_bits < limit:
        found.append(
            f"fixed point would overflow: logits reach {ranges.largest['head']:.3g}, and rounding them to "
            f"{settings.logit_bits} binary places needs 2^{settings.logit_bits} times that below {limit:.3g}"
        )

    if ranges.largest_mean_square:
        name, value = max(ranges.largest_mean_square.items(), key=lambda item: item[1])
        if not value < (most := largest_mean_square(settings)):
            found.append(
                f"fixed point would lose what is small: the mean square of a row in {name} is {value:.3g}, and its "
                f"inverse root needs it below {most:.3g} with {bits} fraction bits"
            )

    if ranges.largest_mean_weight:
        least, most = MIDDLE_WEIGHT * 2.0**-MEAN_WEIGHT_BITS, MIDDLE_WEIGHT * 2.0**MEAN_WEIGHT_BITS
        for measured, which in ((ranges.largest_mean_weight, max), (ranges.low_mean_weight, min)):
            name, value = which(measured.items(), key=lambda item: item[1])
            if not least <= value <= most:
                found.append(
                    f"the softmax's sums could not be divided by: the mean weight of a row in {name} is {value:.3g}, "
                    f"and must lie between {least:g} and {most:g}"
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


def safe_fraction_bits(ranges: Ranges, settings: Settings, headroom: float = 1.0) -> int | None:
    """The fraction bits nearest to 18 with which these ranges fit the ring; None if there are none.

    Overflow forbids all above some number, rounding all below another: what is safe is one run of numbers.
    """
    safe = [
        bits
        for bits in range(LEAST_FRACTION_BITS, MOST_FRACTION_BITS + 1)
        if not problems(ranges, _with_bits(settings, bits), headroom)
    ]
    return min(safe, key=lambda bits: abs(bits - PREFERRED_FRACTION_BITS), default=None)


def can_pair(weights: Mapping[str, np.ndarray], settings: Settings) -> bool:
    """Whether two tokens can share a row of the private table's product, `program.pair_products`."""
    bits = settings.fraction_bits
    return bits >= LEAST_PAIR_FRACTION_BITS and bool(np.abs(weights["embedding"]).max() < pair_limit(bits))


def select_fraction_bits(
    model: Description,
    weights: Mapping[str, np.ndarray],
    settings: Settings,
    sequences: list[list[int]] | None = None,
    *,
    choose: bool = False,
    sweep: Sweep | None = None,
) -> tuple[Settings, list[str]]:
    """The settings that sessions with this model can rely on, and lines that say why these.

    Fraction bits: those of `settings` are checked; with `choose` they are ours to choose, 18 if these hold the values
    of the calibration text with room for four times the largest, or else the nearest that do; if none leave that room,
    the nearest that hold the values. Tokens are paired where the private table allows it with these bits.

    Without `sequences` of calibration text, `calibration_text` is used. What a `sweep` of the vocabulary reaches has to
    fit too.

    Raises:
        UserError: values that the ring could not hold or the fraction bits not resolve, with the numbers and the
            fraction bits that would fit.
    """
    if sequences is None:
        sequences = calibration_text(model, weights)
    ranges = measure_ranges(model, weights, sequences, settings.exact_softmax_as)
    if sweep is not None:
        ranges = with_largest(ranges, sweep.ranges)

    if choose:
        settings, why = _choose(ranges, settings)
    else:
        if found := problems(ranges, settings):
            fitting = safe_fraction_bits(ranges, settings)
            advice = "no number of fraction bits would do" if fitting is None else f"{fitting} fraction bits would fit"
            raise UserError("; ".join([*found, advice]))
        why = "as given"

    name, value = max(ranges.largest.items(), key=lambda item: item[1])
    lines = [
        f"{settings.fraction_bits} fraction bits, {why}; the calibration text's largest value is {value:.3g} in "
        f"{name}, and {largest_product(settings):.3g} would be too large"
    ]
    if sweep is not None:
        lines.append(f"{sweep.tokens:,} of {model.vocab_size:,} tokens were looked at")
    if sweep is not None and sweep.faint:
        lines.append(
            f"in {sweep.faint} sequences of these a row is too small for its norm to be exact: answers to unusual text "
            "may be less so"
        )

    settings = msgspec.structs.replace(settings, paired=settings.embedding == "private" and can_pair(weights, settings))
    if settings.embedding == "private" and not settings.paired:
        reach, limit = np.abs(weights["embedding"]).max(), pair_limit(settings.fraction_bits)
        lines.append(
            f"tokens are looked up one by one: pairs need {LEAST_PAIR_FRACTION_BITS} fraction bits or more"
            if settings.fraction_bits < LEAST_PAIR_FRACTION_BITS
            else f"tokens are looked up one by one: the table reaches {reach:.3g}, and pairs need it below {limit:.3g}"
        )
    return settings, lines


def _choose(ranges: Ranges, settings: Settings) -> tuple[Settings, str]:
    """The settings with the fraction bits of our choice, and why these."""
    for headroom in (HEADROOM, 1.0):
        bits = safe_fraction_bits(ranges, settings, headroom)
        if bits == PREFERRED_FRACTION_BITS:
            return _with_bits(settings, bits), "the usual"
        if bits is not None:
            against = problems(ranges, _with_bits(settings, PREFERRED_FRACTION_BITS), headroom)
            return _with_bits(settings, bits), f"the nearest to {PREFERRED_FRACTION_BITS}, because {'; '.join(against)}"
    ends = LEAST_FRACTION_BITS, MOST_FRACTION_BITS
    found = dict.fromkeys(problem for bits in ends for problem in problems(ranges, _with_bits(settings, bits)))
    raise UserError("; ".join([*found, f"no number of fraction bits, {ends[0]} to {ends[1]}, would do"]))


def _with_bits(settings: Settings, bits: int) -> Settings:
    return msgspec.structs.replace(settings, fraction_bits=bits, paired=False)
