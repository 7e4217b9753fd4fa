"""Fixed-point overflow and underflow analysis: what a model's values reach in plaintext, before a secure run.

Fixed point overflows silently, and what is smaller than its last digit becomes 0. `measure_ranges` and
`sweep_vocabulary` find the largest and smallest values; `select_fraction_bits` chooses the fraction bits from them, or
refuses them with the numbers. The ring is always that of 64 bits, see `Settings`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from jax import Array

from entropi.errors import UserError
from entropi.private.compute.description import LEAST_PAIR_FRACTION_BITS, MEAN_WEIGHT_BITS, MIDDLE_WEIGHT, Description
from entropi.private.compute.embedding import pair_limit
from entropi.private.compute.functions import LEAST_ROOT, largest_root
from entropi.private.compute.program import Stage, cached_tokens, run_plain
from entropi.private.compute.settings import MOST_SHIFT, Settings
from entropi.private.compute.windows import narrow

# What we choose from. `Settings` takes 12 and 13 too, with which logits of a trained model were wrong by 0.07 and 0.03.
LEAST_FRACTION_BITS, MOST_FRACTION_BITS = 14, 22
PREFERRED_FRACTION_BITS = 18  # logits wrong by 0.0015, less than by the kernel; the fewest that let tokens be paired
HEADROOM = 4.0  # times the calibration text's largest value should fit where the choice is ours
# Below so many units of the last digit a mean square makes its root wrong by more than 0.2 %.
_MEAN_SQUARE_BITS = 8
# An operation whose typical value has fewer bits than this is mostly rounding.
_TYPICAL_BITS = 5
# Text that a sweep or a session meets beyond the calibration text is taken to reach four times its values.
SQUARE_HEADROOM = HEADROOM**2
# Where a norm's smallest row has a mean square below the first, rows are moved up until it reaches the second.
_FAINT, _CLEAR = 2.0**-6, 2.0**-3
CALIBRATION_LENGTH = 512  # tokens of a sequence of calibration text
SWEEP_LENGTH = 128  # tokens a sequence, where every token of the vocabulary is looked at once
# Bounds the look at every token; GPT-2 small's 50,257 need 1.2e13: nine minutes of two cores with other work.
MAX_SWEEP_OPERATIONS = 2e13


@dataclass(frozen=True)
class Ranges:
    """What a model's values reach on some text. Keys read "layer 3 scores" or "head".

    `largest`: largest magnitude of any product or sum; not finite even in float32 counts as infinite.
    `smallest_mean_square`, `largest_mean_square`: of the rows that norms divide by the root of it, before any shift.
    `faintest_mean_square`: the smallest of unusual text, which need not be exact.
    `largest_square_sum`: of such a row, as it is summed.
    `largest_compared`: largest magnitude of what activations and softmaxes compare.
    `smallest_typical`: smallest root mean square of an operation's results, over sequences.
    `largest_mean_weight`, `low_mean_weight`: of a row by a polynomial softmax; the largest, and that below which one
    in a hundred lies.
    `layers`: of the model.
    """

    largest: dict[str, float] = field(default_factory=dict)
    smallest_mean_square: dict[str, float] = field(default_factory=dict)
    largest_mean_square: dict[str, float] = field(default_factory=dict)
    smallest_typical: dict[str, float] = field(default_factory=dict)
    largest_mean_weight: dict[str, float] = field(default_factory=dict)
    low_mean_weight: dict[str, float] = field(default_factory=dict)
    faintest_mean_square: dict[str, float] = field(default_factory=dict)
    largest_square_sum: dict[str, float] = field(default_factory=dict)
    largest_compared: dict[str, float] = field(default_factory=dict)
    layers: int = 0


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
    ranges, past = Ranges(layers=model.layers), cached_tokens(weights)

    def watch(stage: Stage, operands: tuple[Array, ...], value: Array) -> None:
        name = f"layer {stage.layer} {stage.name}" if stage.layer >= 0 else stage.name
        magnitude = np.abs(value).max()
        if stage.name == "norm":  # sums its first operand's squares
            if stage.inputs[0] != "state":
                name += " of queries and keys" if stage.outputs[0] == "q" else " of a branch"
            squares = np.square(np.asarray(operands[0], np.float64))
            _keep(ranges.largest_square_sum, name, _finite(squares.sum(axis=-1).max()), max)
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
        if stage.name in ("activation", "max"):  # of logits the difference of two is compared
            reach = np.abs(operands[0]).max() * (2.0 if stage.name == "max" else 1.0)
            _keep(ranges.largest_compared, name, _finite(reach), max)
        _keep(ranges.largest, name, _finite(magnitude), max)
        if stage.name not in ("exp", "max"):  # far keys weigh nothing, and the largest is 0
            _keep(ranges.smallest_typical, name, float(np.sqrt(np.mean(np.square(value, dtype=np.float64)))), min)

    for sequence in sequences:
        run_plain(model, weights, sequence, 1, exact_softmax_as, every_row=every_row, watch=watch)
    return ranges


def _finite(value: float) -> float:
    """`value`, infinite where it is not finite."""
    return float(value) if np.isfinite(value) else np.inf


def _keep(found: dict[str, float], name: str, value: float, which: Callable[[float, float], float]) -> None:
    found[name] = which(found.get(name, value), value)


def calibration_text(model: Description, weights: Mapping[str, np.ndarray]) -> list[list[int]]:
    """Random tokens, and those whose embeddings hold the largest values, for models whose own text is not at hand.

    512 of each at most, but over all positions that have learned embeddings.
    """
    random = np.random.default_rng(0)
    length = model.positions - cached_tokens(weights)
    if model.position_embedding != "learned":
        length = min(length, CALIBRATION_LENGTH)
    return [random.integers(0, model.vocab_size, length).tolist(), largest_embeddings(weights, length)]


def largest_embeddings(weights: Mapping[str, np.ndarray], length: int) -> list[int]:
    """So many tokens whose embeddings hold the largest values."""
    return np.resize(np.argsort(-np.abs(weights["embedding"]).max(axis=1), kind="stable"), length).tolist()


@dataclass(frozen=True)
class Sweep:
    """What the values of single tokens reach.

    `ranges` over `tokens` of the vocabulary, all unless that would take too long, then those with the largest
    embeddings. `worst` is the sequence that reaches furthest.
    """

    ranges: Ranges
    tokens: int
    worst: list[int]


def sweep_vocabulary(
    model: Description,
    weights: Mapping[str, np.ndarray],
    settings: Settings,
    watch: Callable[[int, int], None] = lambda tokens, of: None,
) -> Sweep:
    """Ranges over sequences in which every token of the vocabulary occurs once, in random order.

    A calibration text holds as many tokens as the model has positions; a model of 2,048 tokens and 256 positions could
    overflow at any of the other 1,800, and nothing would tell. `watch` is called with how many tokens are done.
    """
    per_token = 2.0 * sum(np.size(weight) for name, weight in weights.items() if name not in ("embedding", "positions"))
    tokens = int(min(model.vocab_size, max(MAX_SWEEP_OPERATIONS // per_token, SWEEP_LENGTH)))
    by_size = np.argsort(-np.abs(weights["embedding"]).max(axis=1), kind="stable")[:tokens]
    order = np.random.default_rng(1).permutation(by_size)
    length = min(model.positions - cached_tokens(weights), SWEEP_LENGTH)
    order = np.resize(order, -(-tokens // length) * length)  # whole sequences, so that all share compiled code

    ranges, worst, furthest = Ranges(layers=model.layers), list[int](), -1.0
    for start in range(0, len(order), length):
        sequence = order[start : start + length].tolist()
        found = measure_ranges(model, weights, [sequence], settings.exact_softmax_as, every_row=True)
        reach = max([*found.largest.values(), *found.largest_square_sum.values()])
        if reach > furthest:
            worst, furthest = sequence, reach
        ranges = with_largest(ranges, found)
        watch(min(start + length, tokens), tokens)
    return Sweep(ranges, tokens, worst)


def with_largest(ranges: Ranges, other: Ranges) -> Ranges:
    """`ranges`, and what `other` reaches beyond them; what is small stays a matter of typical text."""
    merged: dict[str, Any] = {}
    for name in ("largest", "largest_mean_square", "largest_mean_weight", "largest_square_sum", "largest_compared"):
        merged[name] = dict(getattr(ranges, name))
        for place, value in getattr(other, name).items():
            _keep(merged[name], place, value, max)
    faintest = merged["faintest_mean_square"] = dict(ranges.faintest_mean_square)
    for small in (other.smallest_mean_square, other.faintest_mean_square):
        for place, value in small.items():
            _keep(faintest, place, value, min)
    return replace(ranges, **merged)


def largest_product(settings: Settings) -> float:
    """Magnitude below which every product must stay.

    It carries twice the fraction bits until it is truncated, and needs a sign and one bit to spare.
    """
    return 2.0 ** (settings.ring_bits - 2 * settings.fraction_bits - 2)


def largest_mean_square(settings: Settings) -> float:
    """Mean square of a row below which its inverse root, a small number, is right to 0.2 %.

    The root of larger ones has too few digits with fewer than 18 fraction bits, and with more it is soon 0: see
    `functions.inverse_root`.
    """
    bits = settings.fraction_bits
    return min(largest_root(bits), 4.0 ** (bits - 9))


def resolved_mean_square(settings: Settings, shift: int = 0) -> float:
    """Mean square of a row from which on its norm is right to 0.2 %, if the norm's rows move by `shift` places.

    A shift up gives a mean square more digits, not the row itself.
    """
    bits = settings.fraction_bits
    return max(_least_under_root(bits) / 4.0**shift, 4.0 ** (_MEAN_SQUARE_BITS - bits - min(shift, 0)))


def _least_under_root(bits: int) -> float:
    """The smallest mean square, as it is computed, that has digits enough and is in the range of the root."""
    return max(LEAST_ROOT, 2.0 ** (_MEAN_SQUARE_BITS - bits))


def norm_shifts(ranges: Ranges, settings: Settings) -> tuple[int, ...]:
    """The shifts of `Settings` that bring the rows of these ranges to where norms are right, as far as possible.

    None where all are, with room for four times the largest values.
    """
    found = [0] * (ranges.layers + 1)
    for name, high in ranges.largest_mean_square.items():
        if (layer := _layer_of_norm(name)) is not None:
            low = min(places.get(name, high) for places in (ranges.smallest_mean_square, ranges.faintest_mean_square))
            total = ranges.largest_square_sum.get(name, high)
            found[layer] = _shift(low, ranges.smallest_mean_square.get(name, low), high, total, settings)
    return tuple(found) if any(found) else ()


def _shift(faintest: float, smallest: float, largest: float, total: float, settings: Settings) -> int:
    """Of one norm, from the extremes of its rows' mean squares and the largest sum of squares."""
    if not (faintest > 0 and math.isfinite(total)):
        return 0

    def room(headroom: float) -> int:
        spare = min(largest_mean_square(settings) / largest, largest_product(settings) / total) / headroom
        return math.floor(math.log2(spare) / 2)

    shift = min(math.ceil(math.log2(_CLEAR / faintest) / 2) if faintest < _FAINT else 0, room(SQUARE_HEADROOM))
    needed = math.ceil(math.log2(_least_under_root(settings.fraction_bits) / smallest) / 2)
    if shift < needed:  # without room to spare, what just holds
        shift = min(needed, room(1.001))
    return max(-MOST_SHIFT, min(shift, MOST_SHIFT))


def _layer_of_norm(name: str) -> int | None:
    """The layer whose norms of the residual state `Ranges` calls by this name, -1 for the final one."""
    match = re.fullmatch(r"(?:layer (\d+) )?norm", name)
    return None if match is None else int(match[1] or -1)


def _shift_of(name: str, settings: Settings) -> int:
    layer = _layer_of_norm(name)
    return settings.norm_shifts[layer] if settings.norm_shifts and layer is not None else 0


def problems(ranges: Ranges, settings: Settings, headroom: float = 1.0) -> list[str]:
    """What of these ranges the settings cannot hold, with the numbers; empty if everything fits.

    `headroom` times the largest result has to fit.
    """
    found = []
    bits, limit = settings.fraction_bits, largest_product(settings)
    sums = {
        f"a sum of squares in {name}": value * 4.0 ** _shift_of(name, settings)
        for name, value in ranges.largest_square_sum.items()
    }
    name, value = max((ranges.largest | sums).items(), key=lambda item: item[1])
    if not value * headroom < limit:
        danger = "could overflow on other text" if value < limit else "would overflow"
        found.append(
            f"fixed point {danger}: {name} reaches {value:.3g}, and products in a ring of {settings.ring_bits} "
            f"bits with {bits} fraction bits must stay below {limit:.3g}"
        )

    if ranges.largest_compared:
        name, value = max(ranges.largest_compared.items(), key=lambda item: item[1])
        if not value * headroom < (most := narrow(bits).limit(bits)):
            found.append(
                f"comparisons would not hold: {name} compares numbers up to {value:.3g}, and in prepared sessions they "
                f"must stay below {most:.3g} with {bits} fraction bits"
            )

    if settings.logit_bits is not None and not ranges.largest.get("head", 0.0) * 2.0**settings.logit_bits < limit:
        found.append(
            f"fixed point would overflow: logits reach {ranges.largest['head']:.3g}, and rounding them to "
            f"{settings.logit_bits} binary places needs 2^{settings.logit_bits} times that below {limit:.3g}"
        )

    if ranges.largest_mean_square:
        most, (name, value) = _tightest(
            ranges.largest_mean_square, lambda name: largest_mean_square(settings) / 4.0 ** _shift_of(name, settings)
        )
        if not value < most:
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

    for what, smallest, least_of in (
        (
            "the mean square of a row",
            ranges.smallest_mean_square,
            lambda name: resolved_mean_square(settings, _shift_of(name, settings)),
        ),
        ("the typical value", ranges.smallest_typical, lambda name: 2.0 ** (_TYPICAL_BITS - bits)),
    ):
        if smallest:
            least, (name, value) = _tightest(smallest, least_of, above=True)
            if not value >= least:
                found.append(
                    f"fixed point would lose what is small: {what} in {name} is {value:.3g}, and with {bits} fraction "
                    f"bits it must be at least {least:.3g}"
                )
    return found


def _tightest(
    values: Mapping[str, float], limit: Callable[[str], float], *, above: bool = False
) -> tuple[float, tuple[str, float]]:
    """The entry that is nearest to its limit, which it must stay below, or `above`, and that limit before it."""
    which = min if above else max
    name, value = which(values.items(), key=lambda item: item[1] / limit(item[0]))
    return limit(name), (name, value)


def safe_fraction_bits(ranges: Ranges, settings: Settings, headroom: float = 1.0) -> int | None:
    """The fraction bits nearest to 18 with which these ranges fit the ring; None if there are none.

    Overflow forbids all above some number, rounding all below another: what is safe is one run of numbers.
    """
    safe = [
        bits
        for bits in range(LEAST_FRACTION_BITS, MOST_FRACTION_BITS + 1)
        if not problems(ranges, _fitted(ranges, settings, bits), headroom)
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
    ranges = measure_ranges(model, weights, sequences, settings.exact_softmax_as, every_row=True)
    if sweep is not None:
        ranges = with_largest(ranges, sweep.ranges)

    if choose:
        settings, why = _choose(ranges, settings)
    else:
        settings = _fitted(ranges, settings, settings.fraction_bits)
        if found := problems(ranges, settings):
            fitting = safe_fraction_bits(ranges, settings)
            advice = "no number of fraction bits would do" if fitting is None else f"{fitting} fraction bits would fit"
            raise UserError("; ".join([*found, advice]))
        why = "as given"

    settings = msgspec.structs.replace(
        settings,
        largest_logit=ranges.largest["head"] or None,
        blank_logit=None if model.final_norm == "none" else float(weights["head_bias"].max()),
    )
    name, value = max(ranges.largest.items(), key=lambda item: item[1])
    lines = [
        f"{settings.fraction_bits} fraction bits, {why}; the calibration text's largest value is {value:.3g} in "
        f"{name}, and {largest_product(settings):.3g} would be too large"
    ]
    if sweep is not None:
        lines.append(f"{sweep.tokens:,} of {model.vocab_size:,} tokens were looked at")
    if settings.norm_shifts:
        least, most = min(settings.norm_shifts), max(settings.norm_shifts)
        lines.append(f"rows are multiplied by 2^{least} to 2^{most} before norms, so that their squares fit")
    lines += _of_unusual_text(ranges, settings)

    settings = msgspec.structs.replace(settings, paired=settings.embedding == "private" and can_pair(weights, settings))
    if settings.embedding == "private" and not settings.paired:
        reach, limit = np.abs(weights["embedding"]).max(), pair_limit(settings.fraction_bits)
        lines.append(
            f"tokens are looked up one by one: pairs need {LEAST_PAIR_FRACTION_BITS} fraction bits or more"
            if settings.fraction_bits < LEAST_PAIR_FRACTION_BITS
            else f"tokens are looked up one by one: the table reaches {reach:.3g}, and pairs need it below {limit:.3g}"
        )
    return settings, lines


def _of_unusual_text(ranges: Ranges, settings: Settings) -> list[str]:
    """A line that says where norms of unusual text are not exact, if they are not."""
    if not ranges.faintest_mean_square:
        return []

    def least(name: str) -> float:
        return resolved_mean_square(settings, _shift_of(name, settings))

    needed, (name, value) = _tightest(ranges.faintest_mean_square, least, above=True)
    if value >= needed:
        return []
    return [
        f"with unusual tokens a row in {name} has a mean square of {value:.3g}, and its norm is exact from "
        f"{needed:.3g} on: answers to unusual text may be less so"
    ]


def _choose(ranges: Ranges, settings: Settings) -> tuple[Settings, str]:
    """The settings with the fraction bits of our choice, and why these."""
    for headroom in (HEADROOM, 1.0):
        bits = safe_fraction_bits(ranges, settings, headroom)
        if bits == PREFERRED_FRACTION_BITS:
            return _fitted(ranges, settings, bits), "the usual"
        if bits is not None:
            against = problems(ranges, _fitted(ranges, settings, PREFERRED_FRACTION_BITS), headroom)
            return _fitted(
                ranges, settings, bits
            ), f"the nearest to {PREFERRED_FRACTION_BITS}, because {'; '.join(against)}"
    ends = LEAST_FRACTION_BITS, MOST_FRACTION_BITS
    found = dict.fromkeys(problem for bits in ends for problem in problems(ranges, _fitted(ranges, settings, bits)))
    raise UserError("; ".join([*found, f"no number of fraction bits, {ends[0]} to {ends[1]}, would do"]))


def _fitted(ranges: Ranges, settings: Settings, bits: int) -> Settings:
    """The settings with these fraction bits, and what follows from ranges and fraction bits."""
    settings = msgspec.structs.replace(settings, fraction_bits=bits, paired=False)
    return msgspec.structs.replace(settings, norm_shifts=norm_shifts(ranges, settings))
