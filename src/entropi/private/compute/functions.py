"""Nonlinear functions as the secure engine evaluates them cheaply: pure JAX, public shapes and indices.

Every function states the range it holds on, its error and its price: bytes per element under CHEETAH, both directions,
ring of 64 bits, 18 fraction bits, operands of many thousand elements. Gathers by public index, additions and products
with public whole numbers are free; a product with another public number costs 3 (its truncation), two secret numbers
168. Homomorphic products travel in ciphertexts of 8,192 numbers, which is the floor of anything smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

Function = TypeVar("Function", bound=Callable[..., Any])
# Bilinear functions of secret values, and functions that compare them with public ones, for which random numbers can be
# prepared before these values are known: see `preparation.cutting`.
BILINEAR: dict[str, Callable[..., Any]] = {}
COMPARING: dict[str, Callable[..., Any]] = {}


def bilinear(function: Function, **options: Any) -> Function:
    """`function`, as one operation in every trace, found there by its name: products of its two operands, or of one.

    It is linear in each operand, and moves nothing else: the rest of the product is local on shares.
    """
    result: Function = jax.jit(function, **options)
    BILINEAR[function.__name__] = result
    return result


def comparing(function: Function, **options: Any) -> Function:
    """`function`, as one operation in every trace, found there by its name: what `preparation.comparisons` computes."""
    result: Function = jax.jit(function, **options)
    COMPARING[function.__name__] = result
    return result


CIPHERTEXT = 8192  # numbers in one ciphertext
_SENT_BYTES, _ANSWER_BYTES = 175_000, 262_000  # of a matrix product's ciphertexts, measured
_PRODUCT_BYTES = 165  # of one number times another, without the truncation
_PRIVATE_PRODUCT_BYTES = 106  # of a shared number times one that one party knows
POLYNOMIALS = 30_000  # that one product may hold at the server, 6 GB
_FEW = 3700  # numbers whose products, made of prepared ones, cost less than a ciphertext each way


def product_bytes(rows: int, inner: int, columns: int) -> int:
    """Estimated bytes of a product of two secret matrices, `(rows, inner)` times `(inner, columns)`.

    Either party encrypts its share of the smaller operand and gets the results back, in full ciphertexts.
    """
    sent = min(-(-rows * inner // CIPHERTEXT), -(-inner * columns // CIPHERTEXT))
    return 2 * (sent * _SENT_BYTES + -(-rows * columns // CIPHERTEXT) * _ANSWER_BYTES)


@bilinear
def times_matrix(x: Array, matrix: Array) -> Array:
    """`(n, d)` times the server's `(d, m)`, in pieces of rows that fit its memory.

    The engine keeps a polynomial of 200 KB for every 8,192 multiplications, all at once: 22 GB for 512 rows of a width
    of 768 and queries, keys and values, and 44 GB for 64 rows of a head with 49,152 entries.
    """
    rows = x.shape[0]
    most = rows_at_a_time(rows, *matrix.shape)
    if rows <= most:
        return x @ matrix
    return jnp.concatenate([x[start : start + most] @ matrix for start in range(0, rows, most)])


def rows_at_a_time(rows: int, inner: int, columns: int) -> int:
    """How many rows `times_matrix` multiplies at a time: 128 fill ciphertexts, so that pieces cost no byte more.

    As many may take twice the memory that is meant. Of larger matrices the pieces are smaller: powers of two, for
    others fill ciphertexts badly.
    """
    fitting = POLYNOMIALS * CIPHERTEXT // (inner * columns)
    if fitting >= 64:
        return min(rows, max(128, fitting // 128 * 128))
    return min(rows, 1 << max(fitting.bit_length() - 1, 0))


@bilinear
def times_table(chosen: Array, table: Array) -> Array:
    """One-hot rows `(n, V)` times the server's `(V, d)`, cut to fit its memory in the way that sends least.

    What fits is limited as in `times_matrix`, and every piece of the table sends answers of its own. Fewer rows at a
    time leave room for larger pieces, until their answers no longer fill ciphertexts.
    """
    rows, (entries, width) = chosen.shape[0], table.shape
    block, size = table_blocks(rows, entries, width)
    parts = [
        sum(
            chosen[start : start + block, first : first + size] @ table[first : first + size]
            for first in range(0, entries, size)
        )
        for start in range(0, rows, block)
    ]
    return jnp.concatenate(parts)


def table_blocks(rows: int, entries: int, width: int) -> tuple[int, int]:
    """How many rows, and how many of the table's, `times_table` multiplies at a time."""

    def pieces(block: int) -> int:
        return -(-block * entries * width // (POLYNOMIALS * CIPHERTEXT))

    def price(block: int) -> int:
        return -(-rows // block) * pieces(block) * product_bytes(block, -(-entries // pieces(block)), width)

    block = min((-(-rows >> halvings) for halvings in range(rows.bit_length())), key=price)
    return block, -(-entries // pieces(block))


# SPU's exponential with one squaring is (1 + x / 2)^2, and the only way to its multiplication of a number with itself,
# whose ciphertexts cross once instead of twice. `square` is a primitive so that one program means x * x everywhere and
# lowers to that exponential for SPU, whose platform calls itself "interpreter".
_square = Primitive("square")
_square.def_impl(lambda x: x * x)
_square.def_abstract_eval(lambda x: ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_square, mlir.lower_fun(lambda x: x * x, multiple_results=False))
mlir.register_lowering(
    _square, mlir.lower_fun(lambda x: jnp.exp((x + x) - 2.0), multiple_results=False), platform="interpreter"
)


@bilinear
def square(x: Array) -> Array:
    """x^2 for |x| < 2^12, error 2^-16 (1 + |x|); 110 bytes where x * x costs 168. Few numbers: x * x, 240 bytes.

    The engine has to be configured for one squaring an exponential (`fxp_exp_iters` = 1).
    """
    result: Array = x * x if x.size < _FEW else _square.bind(x)
    return result


def in_full_ciphertexts(function: Callable[[Array], Array], x: Array) -> Array:
    """`function` elementwise, in two parts where that saves a ciphertext.

    The engine halves what it squares, and either half fills whole ciphertexts; up to one ciphertext beyond an even
    number of them is cheaper by itself.
    """
    flat = x.reshape(-1)
    rest = flat.size % (2 * CIPHERTEXT)
    if not 0 < rest <= CIPHERTEXT or rest == flat.size:
        return function(x)
    parts = [function(flat[:-rest]), function(flat[-rest:])]
    return jnp.concatenate(parts).reshape(x.shape)


@bilinear
def times(x: Array, y: Array) -> Array:
    """x y, number by number; 168 bytes."""
    return x * y


@comparing
def relu(x: Array) -> Array:
    """max(x, 0), exact; 98 bytes. Prepared for |x| < 2^18, and what is below 2^-14 may be 0: see `windows.narrow`."""
    return jnp.maximum(x, 0.0)


@comparing
def by_edges(x: Array, edges: Array, below: Array, above: Array) -> Array:
    """Sum over public edges `(e, ...)` of `below` `(t, e, ...)` where x is below one, elsewhere `above`: `(t, ...)`.

    All but x are public, and broadcast against it. 82 bytes an edge, and 8 for every table. Prepared for |x| < 2^14.
    """
    return jnp.where(x[None] < edges, below, above).sum(axis=1)


@comparing
def by_edges_of_any(x: Array, edges: Array, below: Array, above: Array) -> Array:
    """`by_edges`, prepared for whatever x can be multiplied."""
    return jnp.where(x[None] < edges, below, above).sum(axis=1)


@comparing
def largest(x: Array) -> Array:
    """Largest of every row of `(..., n)`, n at most `GROUP`: `(...)`.

    Prepared for differences below 2^18, and then one of those that are within 2^-13 of the largest.
    """
    return x.max(axis=-1)


GROUP = 6  # numbers of which a prepared comparison finds the largest at once


def segment_max(packed: Array, lengths: np.ndarray, *, prepared: bool = False) -> Array:
    """Largest element of every segment of `packed` `(..., sum(lengths))`, `(..., len(lengths))`.

    A tournament of all segments at once. Of many elements two meet at a time: about one comparison (98 bytes) an
    element, ceil(log2(longest)) times 21 rounds. Of few, whose bytes are little beside what rounds take, several meet
    at a time, all against all, as `_best_arity` weighs it: 83 rounds instead of 147 for 128 elements. Segments of
    different length cost what they hold, where a padded rectangle would cost twice for a causal triangle.

    Where comparisons are `prepared` `GROUP` meet at a time, all against all, whatever is computed beside them: a longer
    segment then never takes less of anything, and what is prepared for one is enough for all shorter ones.
    """
    lengths = np.asarray(lengths)
    arity = GROUP if prepared else _best_arity(lengths, int(np.prod(packed.shape[:-1])))
    while lengths.max() > 1:
        if prepared:
            packed = _largest_prepared(packed, _filled_group_sizes(lengths, arity))
        elif arity == 2:
            packed = _largest_of_pairs(packed, _group_sizes(lengths, arity))
        else:
            packed = _largest_of_groups(packed, _group_sizes(lengths, arity))
        lengths = -(-lengths // arity)
    return packed


# What a round is worth in bytes: what a line of 1 Gbit/s carries in 0.2 ms.
_ROUND_BYTES = 25_000
_COMPARE_BYTES, _COMPARE_ROUNDS, _SELECT_BYTES, _SELECT_ROUNDS = 82, 19, 16, 2
_PRODUCT_ROUNDS = 3  # 2 of a prepared product, 4 of another one
_MOST_ARITY = 8


def _best_arity(lengths: np.ndarray, copies: int) -> int:
    """How many elements should meet at a time, of `copies` times these segments."""

    def price(arity: int) -> float:
        total, left = 0.0, lengths
        while left.max() > 1:
            sizes = _group_sizes(left, arity)
            pairs = copies * int((sizes * (sizes - 1) // 2).sum())
            chain = 1 if arity == 2 else int(sizes.max()) - 1
            selects = pairs if arity == 2 else 2 * pairs
            total += pairs * _COMPARE_BYTES + selects * _SELECT_BYTES
            total += _ROUND_BYTES * (_COMPARE_ROUNDS + chain * _SELECT_ROUNDS)
            left = -(-left // arity)
        return total

    return min(range(2, _MOST_ARITY + 1), key=price)


def _group_sizes(lengths: np.ndarray, most: int) -> np.ndarray:
    """Sizes of the groups of up to `most` elements, as equal as they can be, that segments are divided into."""
    groups = -(-lengths // most)
    place = np.arange(groups.sum()) - np.repeat(np.cumsum(groups) - groups, groups)  # of a group in its segment
    return np.repeat(lengths // groups, groups) + (place < np.repeat(lengths % groups, groups))


def _filled_group_sizes(lengths: np.ndarray, most: int) -> np.ndarray:
    """Sizes of groups of `most` elements, and of what is left over of each segment."""
    groups = -(-lengths // most)
    sizes = np.full(groups.sum(), most)
    sizes[np.cumsum(groups) - 1] = lengths - most * (groups - 1)
    return sizes


def _largest_prepared(packed: Array, sizes: np.ndarray) -> Array:
    """The largest element of every group: those of one size are one operation, and all of them wait together."""
    starts = np.cumsum(sizes) - sizes
    found, order = [], []
    for size in np.unique(sizes):
        (groups,) = np.nonzero(sizes == size)
        members = packed[..., starts[groups, None] + np.arange(size)]
        found.append(largest(members) if size > 1 else members[..., 0])
        order.append(groups)
    return jnp.concatenate(found, -1)[..., np.argsort(np.concatenate(order))]


def _largest_of_pairs(packed: Array, sizes: np.ndarray) -> Array:
    """The larger of every group of two elements, and those that are alone."""
    starts = np.cumsum(sizes) - sizes
    left = starts[sizes == 2]
    larger = jnp.maximum(packed[..., left], packed[..., left + 1])
    pool = jnp.concatenate([larger, packed[..., starts[sizes == 1]]], -1)
    place = np.where(sizes == 2, np.cumsum(sizes == 2) - 1, len(left) + np.cumsum(sizes == 1) - 1)
    return pool[..., place]


def _largest_of_groups(packed: Array, sizes: np.ndarray) -> Array:
    """The largest element of every group: all pairs are compared at once, and who loses any becomes 0.

    Of equal elements the first one wins, so that exactly one is left, and the group's sum is its largest element.
    Compiling takes longer than computing here, and every pass has shapes of its own: so all elements' fights are
    gathered once, and a step that all of them have is one operation.
    """
    first, size = np.repeat(np.cumsum(sizes) - sizes, sizes), np.repeat(sizes, sizes)
    entry = np.arange(len(first))
    offset = entry - first
    pairs = [(i, i + step) for step in range(1, sizes.max()) for i in entry[offset + step < size]]
    number = {pair: place for place, pair in enumerate(pairs)}
    left, right = np.array(pairs).T
    loses = packed[..., left] < packed[..., right]  # the left one; where it does not, the right one does

    steps = [entry[size > step] for step in range(1, sizes.max())]  # who fights
    others = [first[who] + (offset[who] + step) % size[who] for step, who in enumerate(steps, 1)]
    fights = [number[min(pair), max(pair)] for who, other in zip(steps, others) for pair in zip(who, other)]
    beaten = loses[..., np.array(fights)] ^ np.concatenate([who > other for who, other in zip(steps, others)])
    left_over, done = packed, 0
    for who in steps:
        lost = beaten[..., done : done + len(who)]
        done += len(who)
        if len(who) == len(entry):
            left_over = jnp.where(lost, 0.0, left_over)
        else:
            pool = jnp.concatenate([left_over, jnp.where(lost, 0.0, left_over[..., who])], -1)
            place = entry.copy()
            place[who] = len(entry) + np.arange(len(who))
            left_over = pool[..., place]

    padded = jnp.concatenate([left_over, jnp.zeros((*packed.shape[:-1], 1), packed.dtype)], -1)
    starts, places = np.cumsum(sizes) - sizes, np.arange(sizes.max())
    members = np.where(places < sizes[:, None], starts[:, None] + places, len(first))
    return padded[..., members].sum(axis=-1)


# exp(x) for x <= 0 is the fourth power of A (u^2 + alpha u + beta)^2 + gamma u + delta, u = max(x / 4 + _EXP_END, 0),
# which is 0 at u = 0: the smallest largest error, found by `benchmarks/fit_functions.py`.
_EXP_END = 2.9
_EXP_ALPHA, _EXP_BETA = -1.3707712, 1.9068299
_EXP_A, _EXP_GAMMA, _EXP_DELTA = 0.01498947, 0.15574059, -0.05450172


def exp_by_quartic(x: Array) -> Array:
    """exp(x) for x <= 0, absolute error 0.00017 and the digits that follow; nothing below -11.6; 550 bytes.

    A comparison and four squarings, where powers of 1 + x / 2^t need eight for an error of 0.001.
    """
    inside = relu(0.25 * x + _EXP_END)

    def fourth_power(u: Array) -> Array:
        return square(square(_EXP_A * square(square(u) + _EXP_ALPHA * u + _EXP_BETA) + _EXP_GAMMA * u + _EXP_DELTA))

    return in_full_ciphertexts(fourth_power, inside)


def exp_of_nonpositive(x: Array, iterations: int) -> Array:
    """The softmax kernel (1 + max(x, -0.9 2^t) / 2^t)^(2^t) for x <= 0, t = `iterations`; 98 + 110 t bytes.

    As an approximation of exp(x) its relative error is about x^2 / 2^(t+1). The clip bounds what is squared: below
    -2^(t+1) the powers would explode. What is clipped comes out as 0.1^(2^t).
    """

    return power(0.1 + relu(0.9 + x * 2.0**-iterations), iterations)


def power(x: Array, iterations: int) -> Array:
    """x^(2^t), t = `iterations`, in the range of `square`; 110 t bytes, and nothing compared."""

    def squares(x: Array) -> Array:
        for _ in range(iterations):
            x = square(x)
        return x

    return in_full_ciphertexts(squares, x)


def reciprocal(x: Array, spread: np.ndarray, *, prepared: bool = False) -> Array:
    """1 / x for x in [spread^-1/2, spread^1/2], relative error 2^-16 (1 + sqrt(spread)) and 0.00005.

    1,280 bytes for a spread of 128. `spread` is public, at least 1 and broadcasts against x. The engine's own
    reciprocal, which knows no range, costs more than twice that and ten times the messages.
    """
    half = np.log2(np.maximum(spread, 1.5)) / 2 + _MARGIN
    return _polynomial_reciprocal(x, -half, half, prepared=prepared)


def reciprocal_of_wide(x: Array, bits: int, *, prepared: bool = False) -> Array:
    """1 / x for x in [2^-bits, 2^bits], error 2^-15 (1 + 1 / x) and 0.00005 / x; 2,070 bytes for 8 bits.

    That holds to 2.8 times this range. What is above is 0; what is below comes out too small, by 3 % at x = 2^-bits / 4
    and never above 16 2^bits.
    """
    low, high = -bits - _WIDE_MARGIN, bits + _WIDE_MARGIN
    return _polynomial_reciprocal(x, low, high, zero_above=True, prepared=prepared)


# Octaves beyond what a reciprocal promises, at either end: what rounding adds; and text that was not calibrated with.
_MARGIN, _WIDE_MARGIN = 0.1, 1.5


def _polynomial_reciprocal(x: Array, low: Any, high: Any, *, prepared: bool, zero_above: bool = False) -> Array:
    """1 / x for x between 2^`low` and 2^`high`: comparisons, and then 4 products one after another, of few numbers 3.

    Where both are `prepared` numbers are always few.

    Comparisons with all edges at once find the interval of x, and with it a p for which y = p x is near 1; 1 / x is
    p C(y). The polynomial C is the one of least relative error: 1 - y C(y) is a Chebyshev polynomial T_n, scaled to be
    1 at y = 0. With n a power of two it falls into factors, for T_2n = 2 T_n^2 - 1, and T_n(z)^2 - T_n(z0)^2 is a
    product again. The scale of y makes the leading coefficient 1, so that no product with a public number is needed.
    """
    octaves = float(np.max(high - low))
    count, squares = _intervals(x.size, octaves, prepared)
    exponents = low + (high - low) * np.arange(count + 1).reshape(-1, *[1] * x.ndim) / count
    middle, half = _chebyshev(2.0 ** (octaves / count), squares + 1)
    powers = np.sqrt(middle**2 - half**2) * 2.0 ** (-(exponents[1:] + exponents[:-1]) / 2)
    edges = 2.0 ** exponents[1:]
    if zero_above:
        powers = np.append(powers, np.zeros_like(powers[:1]), axis=0)
    else:
        edges = edges[:-1]
    (power,) = _by_interval(x, edges, powers[None])

    polynomial, at_zero = times(x, power) - middle, middle  # a multiple of T_1, and what it is less at y = 0
    result = times(power, at_zero - polynomial)
    for _ in range(squares):
        half = half**2 / 2
        polynomial, at_zero = square(polynomial) - half, at_zero**2 - half
        result = times(result, at_zero + polynomial)
    return result


def _intervals(size: int, octaves: float, prepared: bool) -> tuple[int, int]:
    """Into how many intervals `_polynomial_reciprocal` divides so many octaves, and how often it then squares.

    With five in two octaves there is a product less to wait for than with two in three, at a greater error of the two:
    0.000046.
    """
    few, many = math.ceil(2.5 * octaves), math.ceil(octaves / 1.5)
    extra = (few - many) * (_COMPARE_BYTES + _SELECT_BYTES)
    return (few, 1) if prepared or _is_few(size, extra) else (many, 2)


def _is_few(size: int, more: int) -> bool:
    """Whether one product less to wait for is worth `more` bytes a number, for so many numbers."""
    return size * more < _PRODUCT_ROUNDS * _ROUND_BYTES


def _chebyshev(ratio: float, doublings: int) -> tuple[float, float]:
    """Middle and half of the length of the interval whose ends have this ratio, in the scale without a factor.

    There 1 - T_n(z(y)) / T_n(z(0)), n = 2^`doublings`, z from -1 to 1, is y times a product of which every factor's
    leading coefficient is 1 or -1. Its largest error is 1 / T_n(z(0)).
    """
    at_zero, degree = (ratio + 1) / (ratio - 1), 2**doublings
    largest = np.cosh(degree * np.arccosh(at_zero))
    half = float((2.0 ** (degree - 1) / largest) ** (1 / degree))
    return at_zero * half, half


def _by_interval(x: Array, edges: np.ndarray, tables: np.ndarray, *, exact: int = 0, wide: bool = False) -> Array:
    """From every table the entry of the interval that x lies in: entry i below edge i, the last one above all.

    Tables `(t, edges + 1, ...)` fall, edges rise. What is added up loses what the fraction bits or float32 do not hold
    of every step. Begun with the small entries, these lose little. The first `exact` tables, of few digits each, are
    begun with the large ones, and lose nothing until they reach the last digit.
    """
    steps = tables[:, :-1] - tables[:, 1:]
    above, below = np.zeros_like(steps), steps.copy()
    above[:exact], below[:exact] = -steps[:exact], 0.0
    begun = np.concatenate([tables[:exact, 0], tables[exact:, -1]])
    below, above, begun = (part.astype(x.dtype) for part in (below, above, begun))
    return begun + (by_edges_of_any if wide else by_edges)(x, edges.astype(x.dtype), below, above)


class _RootPolynomial(NamedTuple):
    """y^-1/2 on [start, ratio * start] as `zero` - y times squares (y - c)^2 + g, of least relative error."""

    start: float
    ratio: float
    zero: float
    squares: tuple[tuple[float, float], ...]  # c and g


# In the scale of y that needs no factor before the product. `benchmarks/fit_functions.py` finds the constants.
_ROOT = _RootPolynomial(
    0.36317886, 4.0, 2.017927, ((0.10155598, 0.33963751), (0.84363449, 0.891881), (1.6659658, 0.49131384))
)
_FEW_ROOT = _RootPolynomial(0.580258, 1.5, 1.8238104, ((0.6071504, 1.0548796),))
LEAST_ROOT = 2.0**-13  # from which on `inverse_root` holds
_FEW_ROOT_FRACTION_BITS = 18


def largest_root(fraction_bits: int) -> float:
    """Up to which `inverse_root` holds: what x is multiplied by has to have digits."""
    return 2.0 ** (fraction_bits // 2 * 2 - 2)


def inverse_root(x: Array, fraction_bits: int = 18, *, prepared: bool = False) -> Array:
    """1 / sqrt(x) for x in [2^-13, 2^16], error 2^-15 (1 + x^-1/2) and 0.00006 x^-1/2; 2,680 bytes.

    Beside that is what the error of x itself makes. The upper end is that of 18 `fraction_bits`, see `largest_root`; of
    larger x, from half as much again on, it is 0. Below the range it is too small, and never above 400.

    Comparisons find a power p of four for which y = p x is in the range of a polynomial, and 1 / sqrt(x) is
    sqrt(p) y^-1/2: 4 products one after another. No other p would do: where x is large, p has few digits. Few numbers
    have p of all powers of two and 3/4 of them, and one product less; with few fraction bits, what they do not hold of
    each such sqrt(p) would add up.
    """
    least = -int(np.log2(largest_root(fraction_bits)))
    powers, more = 2.0 ** np.arange(12, least - 1, -2), 2.0 ** np.arange(13, least - 1, -1)
    extra = (2 * len(more) - len(powers)) * (_COMPARE_BYTES + 2 * _SELECT_BYTES)
    form = _ROOT
    if fraction_bits >= _FEW_ROOT_FRACTION_BITS and (prepared or _is_few(x.size, extra)):
        form, powers = _FEW_ROOT, np.stack([more, 0.75 * more], axis=1).reshape(-1)
    powers = powers.reshape(-1, *[1] * x.ndim)
    digits = 2.0 ** max(fraction_bits, 18)
    tables = np.round(np.stack([powers, np.sqrt(powers)]) * digits) / digits
    tables = np.append(tables, np.zeros_like(tables[:, :1]), axis=1)
    power, root = _by_interval(x, form.start * form.ratio / powers, tables, exact=1, wide=True)

    near_one = times(x, power)
    result = times(root, form.zero - near_one)
    first, *others = (square(near_one - centre) + rest for centre, rest in form.squares)
    result = times(result, first)
    return times(result, times(*others)) if others else result


# GELU(x) = relu(x) - g(|x|), g(a) = a P(N > a) falls to nothing beyond _GELU_END. With u = max(_GELU_END - a, 0) the
# quartic A (u^2 + alpha u + beta)^2 + gamma u + delta is the minimax fit of g, to the exact and the tanh form at once:
# `benchmarks/fit_functions.py` finds the constants.
_GELU_END = 3.18
_GELU_ALPHA, _GELU_BETA = -2.0078923, -0.4444392
_GELU_A, _GELU_GAMMA, _GELU_DELTA = -0.02132011, 0.07003382, 0.00536868


def _positive_and_inside(x: Array, end: float, prepared: bool) -> tuple[Array, Array]:
    """max(x, 0) and max(end - |x|, 0), by two comparisons, one after the other; of few numbers by three at once.

    Prepared comparisons are always three.
    """
    if prepared or x.size * _COMPARE_BYTES < (_COMPARE_ROUNDS + _SELECT_ROUNDS) * _ROUND_BYTES:
        below, positive, above = relu(jnp.stack([x + end, x, x - end]))
        return positive, below - (positive + positive) + above
    positive = relu(x)
    return positive, relu(end + x - (positive + positive))


def gelu(x: Array, *, prepared: bool = False) -> Array:
    """GELU, absolute error below 0.0018 everywhere, of the tanh form as of the exact one; 430 bytes.

    Two comparisons (relu, from which |x| follows, and the end of the fit) and two squarings.
    """
    positive, inside = _positive_and_inside(x, _GELU_END, prepared)
    quartic = square(square(inside) + _GELU_ALPHA * inside + _GELU_BETA)
    return positive - (_GELU_A * quartic + _GELU_GAMMA * inside + _GELU_DELTA)


# SiLU(x) = relu(x) - h(|x|), h(a) = a / (1 + e^a), in the form of GELU, but of least squares under a density of gates.
_SILU_END = 5.45
_SILU_ALPHA, _SILU_BETA = -3.9574726, 0.9036014
_SILU_A, _SILU_GAMMA, _SILU_DELTA = -0.004671741, 0.06836667, 0.00818543


def silu(x: Array, *, prepared: bool = False) -> Array:
    """x sigmoid(x), absolute error below 0.0024 for |x| < 2.5, 0.0039 for |x| < 4 and 0.019 everywhere; 430 bytes.

    The smallest largest error would be 0.0074, with which pretrained models, most of whose gates are near 0, lose more.
    """
    positive, inside = _positive_and_inside(x, _SILU_END, prepared)
    quartic = square(square(inside) + _SILU_ALPHA * inside + _SILU_BETA)
    return positive - (_SILU_A * quartic + _SILU_GAMMA * inside + _SILU_DELTA)


def silu_exact(x: Array) -> Array:
    """What `silu` stands for; not for the secure engine."""
    return x / (1.0 + jnp.exp(-x))


def gelu_tanh(x: Array) -> Array:
    """GPT-2's GELU ("gelu_new"), which `gelu` stands for; not for the secure engine."""
    return 0.5 * x * (1.0 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@partial(bilinear, static_argnames=("private",))
def scale_rows(x: Array, factor: Array, *, private: bool = False) -> Array:
    """Row i of `x` `(..., n, d)` times `factor` `(..., n)`, which one party knows if `private`.

    168 bytes an element as products of numbers, 109 with private factors; as a product with a diagonal matrix 73 for
    128 rows of 768, and half of it with private ones. That takes ten times the processor's time, so it has to save
    two fifths of the bytes. A few numbers: 240.
    """
    if private and x.size < _FEW:
        return x * shared(factor, x)[..., None]
    rows, width = x.shape[-2:]
    block = min(rows, 128)
    numbers = block * width * (_PRIVATE_PRODUCT_BYTES if private else _PRODUCT_BYTES)
    matrix = product_bytes(block, block, width) // (2 if private else 1)
    if rows % block or matrix > 0.6 * numbers:
        return x * factor[..., None]
    blocks = x.reshape(-1, block, width)
    factors = factor.reshape(-1, block)
    # Chosen by a public mask, the server's factors stay the server's, and its product with them costs half.
    diagonal = jnp.where(np.eye(block, dtype=bool), factors[..., None], jnp.zeros((), factors.dtype))
    return (diagonal @ blocks).reshape(x.shape)


def shared(x: Array, other: Array) -> Array:
    """`x`, which one party knows, as a value that neither knows, as `other` is: without communication.

    For such values alone the engine prepares products in advance; others cost a ciphertext each way however few they
    are. The gather keeps the compiler from seeing that nothing of `other` remains.
    """
    joint = jnp.concatenate([x.reshape(-1), other.reshape(-1)[:1]])
    return joint[np.arange(x.size)].reshape(x.shape)


@bilinear
def sums_of_squares(x: Array) -> Array:
    """Sum of squares of every row, `(n, d)` -> `(n,)`, error 2^-18 whatever d.

    For many rows the diagonal of x x^T: 56 bytes an element at 128 x 768; otherwise 110.
    """
    rows, width = x.shape
    block = min(rows, 128)
    if rows % block or product_bytes(block, width, block) >= block * width * 0.65 * _PRODUCT_BYTES:
        return square(x).sum(axis=-1)
    blocks = x.reshape(-1, block, width)
    products = (blocks @ blocks.transpose(0, 2, 1)).reshape(len(blocks), -1)
    return products[:, :: block + 1].reshape(rows)


def _keep_larger(left: tuple[Any, Any], right: tuple[Any, Any]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """(value, index) pairs elementwise: the larger values with their indices, and the smaller ones; left wins ties."""
    keep = left[0] >= right[0]
    value, index = jnp.where(keep, left[0], right[0]), jnp.where(keep, left[1], right[1])
    return (value, index), (left[0] + right[0] - value, left[1] + right[1] - index)


def argmax(x: Array) -> Array:
    """Index of the largest of `(n,)`, as a float `()`; the first of equals. A tournament: about 115 bytes."""
    value, index = x, jnp.arange(x.size, dtype=x.dtype)
    while value.size > 1:
        half = value.size // 2
        odd = value[2 * half :], index[2 * half :]
        winners, _ = _keep_larger((value[: 2 * half : 2], index[: 2 * half : 2]), (value[1::2], index[1::2]))
        value, index = (jnp.concatenate(pair) for pair in zip(winners, odd))
    return index[0]


def top_k(x: Array, k: int) -> tuple[Array, Array]:
    """The `k` largest of `(n,)`, k <= n, descending, and their indices as floats; 115 bytes a comparison.

    Runs of w = k rounded up to a power of two are sorted, then merged in pairs of which the larger half is kept:
    about n (log2(w) (log2(w) + 1) / 4 + 1 + log2(w) / 2) comparisons.
    """
    width = 1 << max(k - 1, 0).bit_length()
    missing = -x.size % width
    value = jnp.concatenate([x, jnp.full(missing, -(2.0**20), x.dtype)]).reshape(-1, width)
    index = jnp.arange(value.size, dtype=x.dtype).reshape(value.shape)
    length = 2
    while length <= width:
        value, index = _merge_step(value, index, length, mirror=True)
        for shorter in _halvings(length // 2):
            value, index = _merge_step(value, index, shorter, mirror=False)
        length *= 2
    while len(value) > 1:
        half = len(value) // 2
        odd = value[2 * half :], index[2 * half :]
        # Against the mirrored neighbour, the larger of each pair are the largest w of both runs.
        other = value[1::2, ::-1], index[1::2, ::-1]
        (value, index), _ = _keep_larger((value[: 2 * half : 2], index[: 2 * half : 2]), other)
        for shorter in _halvings(width):
            value, index = _merge_step(value, index, shorter, mirror=False)
        value, index = (jnp.concatenate(pair) for pair in zip((value, index), odd))
    return value[0, :k], index[0, :k]


def _halvings(length: int) -> list[int]:
    """length, length / 2, ... down to 2."""
    return [length >> step for step in range(length.bit_length() - 1)]


def _merge_step(value: Array, index: Array, length: int, mirror: bool) -> tuple[Array, Array]:
    """Compare and exchange within groups of `length` columns: i with i + length / 2, or with its mirror image."""
    columns = np.arange(value.shape[1]).reshape(-1, length)
    left = columns[:, : length // 2].reshape(-1)
    right = (columns[:, : length // 2 - 1 : -1] if mirror else columns[:, length // 2 :]).reshape(-1)
    high, low = _keep_larger((value[:, left], index[:, left]), (value[:, right], index[:, right]))
    back = np.argsort(np.concatenate([left, right]))
    value, index = (jnp.concatenate([h, w], axis=1)[:, back] for h, w in zip(high, low))
    return value, index
