"""What an exchange of masked numbers costs, where products were prepared: counted, and its computing measured.

Between exchanges the engine runs, which `tracing` follows. An exchange is ours (`preparation.online`): 8 bytes a masked
number, one message each way or one to the server, and linear algebra modulo 2^64 in numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from entropi.private.compute import attention, functions
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import SERVER
from entropi.private.preparation import winners
from entropi.private.preparation.comparisons import by_window, groups_of, kept_by, numbers_by, signs_of
from entropi.private.preparation.cutting import Comparison, Product, Step, cut
from entropi.private.preparation.material import Material, Need, need_of, of_all_tokens, of_comparisons, of_truncations
from entropi.private.preparation.products import OF_SERVER, masking, packed_size
from entropi.private.preparation.ring import WORD, Ring, uniform, words_for
from entropi.private.preparation.signs import opened_in_steps

# Names of counted things. Of a number that goes both ways each party sends its own part.
TO_SERVER, BOTH_WAYS = "masked numbers to the server", "masked numbers both ways"
MESSAGES, _EXCHANGES = "messages of masked numbers", "exchanges of masked numbers"
_ENTRIES, _BY_MATRIX = "entries of matrices beside masked numbers", "products of masked numbers and entries"
_OF_OPENED = "products inside opened matrices"
SIGNS = "bits of truncated numbers"
BITS = "bits of compared numbers"

BOTH_AT_ONCE = (BOTH_WAYS, SIGNS, BITS)  # of which either party sends half, at the same time

# Bytes, messages and rounds, which follow from how it is sent. Seconds are measured.
SENT: dict[str, tuple[float, float, float]] = {
    TO_SERVER: (8, 0, 0),
    BOTH_WAYS: (16, 0, 0),
    MESSAGES: (0, 1, 0),
    _EXCHANGES: (0, 0, 1),
    _ENTRIES: (0, 0, 0),
    _BY_MATRIX: (0, 0, 0),
    _OF_OPENED: (0, 0, 0),
    SIGNS: (0.25, 0, 0),
    BITS: (0.25, 0, 0),
}


def count(step: Step, of_server: Collection[str], opened: int, fraction_bits: int) -> Counter[str]:
    """What the products and comparisons of a step exchange and compute, which do not wait for each other.

    Args:
        of_server: names of the server's weights.
        opened: tokens whose keys and values were opened in earlier passes.
    """
    counted: Counter[str] = Counter({_EXCHANGES: 1})
    for product in step.products:
        first, second = product.shapes[0], product.shapes[-1]
        who = masking(product, set(of_server))
        if who == "server":
            counted[TO_SERVER] += _size(first)
            counted[_ENTRIES] += _size(second)
            counted[_BY_MATRIX] += _size(first) * second[1]
            continue
        counted[BOTH_WAYS] += _size(first)
        if product.kind in ("scores", "mix"):
            rows = first[1] if product.kind == "scores" else product.result_shape[1]
            counted[_OF_OPENED] += first[0] * rows * second[1] * second[2]
            counted[BOTH_WAYS] += second[0] * (second[1] - opened) * second[2]
        else:
            counted[BOTH_WAYS] += _size(second) if who == "pair" else 0
    counted[MESSAGES] = 2 if counted[BOTH_WAYS] or step.comparisons else 1
    if step.comparisons:
        _count_comparisons(step.comparisons, fraction_bits, counted)
    return counted


def _count_comparisons(comparisons: Sequence[Comparison], fraction_bits: int, counted: Counter[str]) -> None:
    """Signs in several exchanges, the first of which is counted already, and what follows from them in one or two."""
    exchanges = 0
    for which, places in by_window(comparisons, fraction_bits).items():
        words = words_for(sum(signs_of(comparisons[place]) for place in places))
        for bits in opened_in_steps(which.digit_bits):
            counted[BITS] += words * WORD * bits
            exchanges += 1
    if groups := groups_of(comparisons):
        counted[BITS] += words_for(groups) * WORD * winners.opened()
        exchanges += 1
    kept, numbers = (sum(map(counting, comparisons)) for counting in (kept_by, numbers_by))
    counted[BOTH_WAYS] += kept
    counted[BITS] += -(-(kept + numbers) // 8) * 8
    counted[_EXCHANGES] += exchanges
    counted[MESSAGES] += 2 * exchanges


def count_truncation(numbers: int) -> Counter[str]:
    """What truncating so many numbers at once exchanges: a bit each way, in whole bytes."""
    return Counter({_EXCHANGES: 1, MESSAGES: 2, SIGNS: -(-numbers // 8) * 8})


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


# --- Measuring --------------------------------------------------------------------------------------------------------

_FRACTION_BITS = 18
_REPEATS = 7  # of which the fastest counts: nothing but other work makes one slower


class _Echo:
    """An engine without another party, which answers at once with nothing but zeros, and runs nothing."""

    rank = SERVER

    def __init__(self) -> None:
        self._shares: dict[str, Any] = {}

    def hold(self, name: str, numbers: Ring) -> None:
        from entropi.private.compute.shares import share_of

        self._shares[name] = share_of(numbers)

    set_numbers = hold

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.numbers(name).shape)

    def numbers(self, name: str) -> Ring:
        from entropi.private.compute.shares import numbers_of

        return numbers_of(self._shares[name], self.rank)

    def send(self, content: bytes) -> None:
        pass

    def receive(self, size: int) -> bytes:
        return bytes(size)


def readings() -> Iterator[tuple[Counter[str], float]]:
    """What is counted of exchanges of several kinds and sizes, and the seconds that they take here.

    Of a product, and then of the truncation of its result.
    """
    for rows, inner, columns in ((1, 768, 2304), (1, 768, 9216), (16, 768, 2304), (128, 768, 768), (1, 3072, 768)):
        yield from _timed("times_matrix", functions.times_matrix, (rows, inner), (inner, columns), (rows, columns))
    for heads, rows, width in ((12, 1, 64), (12, 32, 64), (12, 96, 64)):
        keys = max(rows, 128)
        pairs = packed_size(keys) - packed_size(keys - rows)
        query, packed, of_keys = (heads, rows, width), (heads, pairs), (heads, keys, width)
        yield from _timed("scores", attention.scores, query, of_keys, packed)
        yield from _timed("mix", partial(attention.mix, rows=rows), packed, of_keys, query)
    for size in (1_000, 30_000, 300_000):
        yield from _timed("square", functions.square, (size,), None, (size,))
        yield from _timed("times", functions.times, (size,), (size,), (size,))
    for rows, width in ((1, 768), (128, 768)):
        yield from _timed("scale_rows", functions.scale_rows, (rows, width), (rows,), (rows, width))
        yield from _timed("sums_of_squares", functions.sums_of_squares, (rows, width), None, (rows,))
    for size in (1_000, 30_000, 300_000):
        yield _timed_comparison(functions.relu, size)
        yield _timed_comparison(partial(functions.reciprocal_of_wide, bits=8, prepared=True), size // 50)


def _timed(
    kind: str,
    function: Callable[..., Any],
    first: tuple[int, ...],
    second: tuple[int, ...] | None,
    result: tuple[int, ...],
) -> Iterator[tuple[Counter[str], float]]:
    """One product, as `PreparedPasses` computes it for one party, and its truncation."""
    from entropi.private.preparation.online import PreparedPasses

    names = ("x",) if second is None else ("x", "y")
    by_matrix = kind in OF_SERVER
    product = Product(kind, names, (first,) if second is None else (first, second), "z", result)
    matrix = {"y": np.ones(second, np.int32)} if by_matrix and second is not None else {}
    keys = second[1] if kind in ("scores", "mix") and second is not None else first[0]
    fastest = [np.inf, np.inf]
    for _ in range(_REPEATS):
        engine: Any = _Echo()
        engine.hold("x", uniform(first))
        if second is not None:
            engine.hold("y", uniform(second))
        passes = PreparedPasses(engine, _material(product, keys), _FRACTION_BITS, matrix)
        costs = passes.run(Stage("", 0, function, names, ("z",)), 0, keys)
        fastest = [min(one, cost.seconds) for one, cost in zip(fastest, costs, strict=True)]
    yield count(Step((product,), (), ()), matrix, 0, _FRACTION_BITS), float(fastest[0])
    yield count_truncation(_size(result)), float(fastest[1])


def _timed_comparison(function: Callable[..., Any], size: int) -> tuple[Counter[str], float]:
    """The comparisons of a function of so many numbers."""
    from entropi.private.preparation.online import PreparedPasses

    stage = Stage("", 0, function, ("x",), ("z",))
    (step,) = (step for step in cut(stage, {"x": (size,)}) if step.comparisons)
    (comparison,), fastest = step.comparisons, np.inf
    for _ in range(_REPEATS):
        engine: Any = _Echo()
        engine.hold(comparison.operand, uniform(comparison.shape))
        passes = PreparedPasses(engine, _held(of_comparisons(step.comparisons, _FRACTION_BITS)), _FRACTION_BITS, {})
        fastest = min(fastest, passes.cross(stage, step, 0, 1).seconds)
    return count(step, (), 0, _FRACTION_BITS), float(fastest)


def _material(product: Product, keys: int) -> Material:
    """The server's, of which a pass over the last tokens of `keys` takes what it needs."""
    need = need_of(of_all_tokens(product, keys), 0, {"y"} if product.kind in OF_SERVER else set())
    return _held([need, of_truncations(_size(product.result_shape))])


def _held(needs: Sequence[Need]) -> Material:
    return Material(needs, {name: uniform(shape) for one in needs for name, shape in one.kept(SERVER).items()})
