"""Linear algebra modulo 2^64: equal to Python's integers everywhere, and random numbers that are."""

import math

import numpy as np
import pytest

pytest.importorskip("jax")

from entropi.errors import UserError
from entropi.private.compute import attention, functions
from entropi.private.compute.functions import BILINEAR
from entropi.private.preparation import ring
from entropi.private.preparation.products import multiply, packed_size
from entropi.private.preparation.ring import SmallMatrix, encode, uniform
from masked_passes import chi_square

RANDOM = np.random.default_rng(5)
MOST = 2**37  # of an entry of a matrix


def ring_numbers(*shape):
    """Numbers of all sizes, the largest and smallest among them."""
    numbers = RANDOM.integers(0, 2**64, shape, dtype=np.uint64) >> RANDOM.integers(0, 64, shape, dtype=np.uint64)
    numbers.reshape(-1)[:3] = (2**64 - 1, 0, 2**63)[: numbers.size]
    return numbers


def exact_product(x, matrix):
    """By Python's integers."""
    return (x.astype(object) @ matrix.astype(object) % 2**64).astype(np.uint64)


def check_exact(x, matrix):
    """As whole numbers and by digits, whichever is taken for so many rows."""
    small, exact = SmallMatrix(matrix), exact_product(x, matrix)
    np.testing.assert_array_equal(small.after(x), exact)
    np.testing.assert_array_equal(small._by_digits(x), exact)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 5, 7), (1, 2049, 3), (130, 9, 5), (3, 4097, 2), (2, 1, 1)])
@pytest.mark.parametrize("bits", [1, 18, 31, 37])
def test_a_small_matrix_is_exact(rows, inner, columns, bits):
    matrix = RANDOM.integers(-(2**bits), 2**bits, (inner, columns), endpoint=True)
    matrix[0, 0] = -(2**bits)
    x = ring_numbers(rows, inner)
    check_exact(x, matrix)


@pytest.mark.parametrize("bits", [18, 37])
def test_a_small_matrix_is_exact_where_all_is_largest(bits):
    """Every digit and every entry: a sum that is not cut where it should be would leave float64's whole numbers."""
    x, matrix = np.full((2, 2500), 2**64 - 1, np.uint64), np.full((2500, 2), 2**bits)
    matrix[:, 1] *= -1
    check_exact(x, matrix)


def test_a_wide_small_matrix():
    """Columns that are multiplied one after another, the last of them few."""
    x, matrix = ring_numbers(2, 3), RANDOM.integers(-(2**20), 2**20, (3, 2 * ring._COLUMNS + 5)).astype(np.int32)
    check_exact(x, matrix)


def test_a_small_matrix_knows_the_smallest_entry_of_a_type():
    """-2^31 has no magnitude in 32 bits."""
    x, matrix = np.full((1, 2**7), 2**64 - 1, np.uint64), np.full((2**7, 1), -(2**31), np.int32)
    check_exact(x, matrix)


@pytest.mark.parametrize("entry", [MOST + MOST // 2, -2 * MOST, 2**62, -(2**63)])
def test_a_small_matrix_refuses_larger_entries(entry):
    with pytest.raises(ValueError, match="37 bits"):
        SmallMatrix(np.array([[0], [entry], [1], [0]]))


def test_products_of_real_numbers_come_back():
    bits = 18
    weights, x = RANDOM.normal(size=(40, 6)), RANDOM.normal(size=(3, 40))
    shares = uniform((3, 40))
    other = np.rint(x * 2.0**bits).astype(np.int64).view(np.uint64) - shares
    small = SmallMatrix(encode(weights, bits))
    whole = (small.after(shares) + small.after(other)).view(np.int64)
    np.testing.assert_allclose(whole / 4.0**bits, x @ weights, atol=40 * 4 * 2.0**-bits)


@pytest.mark.parametrize("value", [2.0**13, -(2.0**13), math.inf, math.nan])
def test_weights_that_do_not_fit_are_refused(value):
    assert encode(np.array([2.0**13 - 2.0**-18, -0.3]), 18).tolist() == [2**31 - 1, round(-0.3 * 2**18)]
    with pytest.raises(UserError, match="weights of 8192 or more"):
        encode(np.array([1.0, value]), 18)


def test_uniform_numbers():
    """Chi-square of bytes; 255 degrees of freedom are below 400 but for one time in 10^8."""
    numbers = uniform((50_000, 2))
    assert numbers.shape == (50_000, 2)
    assert numbers.dtype == np.uint64
    for byte in range(8):
        assert chi_square((numbers >> np.uint64(8 * byte)).astype(np.uint8)) < 400
    assert chi_square((numbers >> np.uint64(57)).astype(np.uint8)) > 400  # so it would be seen
    assert len(np.unique(np.concatenate([numbers.reshape(-1), uniform((100_000,))]))) == 200_000
    numbers += np.uint64(1)  # it is the caller's


def whole_numbers(*shape):
    return RANDOM.integers(-(2**9), 2**9, shape)


CASES = {
    "times_matrix": ((3, 5), (5, 4), {}),
    "times_table": ((3, 5), (5, 4), {}),
    "times": ((4, 5), (4, 5), {}),
    "scale_rows": ((2, 3, 5), (2, 3), {}),
    "scale_rows of a block": ((128, 5), (128,), {}),
    "square": ((4, 5), None, {}),
    "sums_of_squares": ((6, 5), None, {}),
    "scores": ((4, 3, 5), (4, 3, 5), {}),
    "scores of grouped heads, further rows": ((4, 2, 5), (2, 7, 5), {}),
    "scores of several blocks": ((2, 131, 3), (1, 133, 3), {}),
    "mix": ((4, packed_size(3)), (4, 3, 5), dict(rows=3)),
    "mix of grouped heads, further rows": ((4, packed_size(7) - packed_size(5)), (2, 7, 5), dict(rows=2)),
    "mix of one row": ((2, 9), (1, 9, 3), dict(rows=1)),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_program(case):
    """On whole numbers that float32 holds."""
    first, second, options = CASES[case]
    kind = case.split(" ")[0]
    x = whole_numbers(*first)
    y = x if second is None else whole_numbers(*second)
    operands = [part.astype(np.float32) for part in ([x] if second is None else [x, y])]
    expected = np.asarray(BILINEAR[kind](*operands, **options)).astype(np.int64)
    np.testing.assert_array_equal(multiply(kind, x.view(np.uint64), y.view(np.uint64)).view(np.int64), expected)


@pytest.mark.parametrize("case", CASES)
def test_products_are_bilinear_modulo_the_ring(case):
    """(x + x') y = x y + x' y for numbers of all sizes, whose products wrap around; exact against Python's integers."""
    first, second, _ = CASES[case]
    kind = case.split(" ")[0]
    x, more, y = ring_numbers(*first), ring_numbers(*first), ring_numbers(*(first if second is None else second))
    together = multiply(kind, x + more, y)
    np.testing.assert_array_equal(together, multiply(kind, x, y) + multiply(kind, more, y))
    if kind in ("times", "square", "times_matrix", "times_table", "sums_of_squares"):
        wide = [part.astype(object) for part in (x, y)]
        exact = wide[0] @ wide[1] if kind.startswith("times_") else wide[0] * wide[1]
        exact = exact.sum(axis=-1) if kind == "sums_of_squares" else exact
        np.testing.assert_array_equal(multiply(kind, x, y), (exact % 2**64).astype(np.uint64))


def test_every_marked_function_has_its_product():
    assert {case.split(" ")[0] for case in CASES} == set(BILINEAR)
    assert BILINEAR["mix"] is attention.mix
    assert BILINEAR["square"] is functions.square
    with pytest.raises(ValueError, match="no product is called cube"):
        multiply("cube", ring_numbers(3), ring_numbers(3))
