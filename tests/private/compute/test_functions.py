"""Secure nonlinear functions: a table of operations x protocols, errors and prices as their docstrings claim."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("spu")
import jax.numpy as jnp  # noqa: E402
from jax.extend.core import Literal  # noqa: E402
from jax.scipy.stats import norm  # noqa: E402

from entropi.private.compute import functions  # noqa: E402
from entropi.private.compute.engine import PARTIES, Simulation  # noqa: E402
from entropi.private.compute.fixed_point import largest_mean_square  # noqa: E402
from entropi.private.compute.program import Stage  # noqa: E402
from entropi.private.compute.settings import Settings  # noqa: E402

random = np.random.default_rng(7)
RESOLUTION = 2.0**-18


def exact(values):
    """Rounded to 14 binary places, so that either half of them is a fixed-point number: no error of the input's."""
    return (np.round(values * 2.0**14) / 2.0**14).astype(np.float32)


def uniform(low, high, *shape):
    return exact(random.uniform(low, high, shape))


def log_uniform(low, high, *shape):
    return exact(np.exp2(random.uniform(low, high, shape)))


def exact_gelu(x):
    return x * norm.cdf(x)


def kernel(iterations):
    def reference(x):
        return (1 + np.maximum(x, -0.9 * 2**iterations) / 2**iterations) ** (2**iterations)

    return reference


LENGTHS = np.array([1, 2, 7, 40, 150])

# name: function, operand, definition in float64, absolute error, error relative to the true value.
OPERATIONS = {
    "square": (functions.square, uniform(-2, 2, 4000), np.square, 12 * RESOLUTION, 0),
    "square of much": (functions.square, uniform(400, 500, 4000), np.square, 2004 * RESOLUTION, 1.2e-7),
    "relu": (functions.relu, uniform(-1e5, 1e5, 200), lambda x: np.maximum(x, 0), 2 * RESOLUTION, 1e-7),
    "segment_max": (
        lambda x: functions.segment_max(x, LENGTHS),
        uniform(-50, 50, 2, 200),
        lambda x: np.stack([x[:, e - n : e].max(axis=1) for e, n in zip(np.cumsum(LENGTHS), LENGTHS)], axis=1),
        2 * RESOLUTION,
        0,
    ),
    "exp by quartic": (functions.exp_by_quartic, uniform(-60, 0, 400), np.exp, 0.00017 + 24 * RESOLUTION, 0),
    # 2^-18 of the base and of every squaring, doubled by each that follows.
    "exp 2": (lambda x: functions.exp_of_nonpositive(x, 2), uniform(-9, 0, 200), kernel(2), 16 * RESOLUTION, 0),
    "exp 3": (lambda x: functions.exp_of_nonpositive(x, 3), uniform(-20, 0, 200), kernel(3), 32 * RESOLUTION, 0),
    "exp 5": (lambda x: functions.exp_of_nonpositive(x, 5), uniform(-60, 0, 200), kernel(5), 128 * RESOLUTION, 0),
    "exp 8": (lambda x: functions.exp_of_nonpositive(x, 8), uniform(-400, 0, 200), kernel(8), 1024 * RESOLUTION, 0),
    # A few last digits of every factor, and the polynomial's own error, which is another one of few numbers.
    "reciprocal": (
        lambda x: functions.reciprocal(x, np.array(1024)),
        log_uniform(-5, 5, 200),
        lambda x: 1 / x,
        0,
        0.00005 + 33 * 4 * RESOLUTION,
    ),
    "reciprocal of few": (
        lambda x: functions.reciprocal(x, np.array(1024)),
        log_uniform(-5, 5, 12),
        lambda x: 1 / x,
        0,
        0.00005 + 33 * 4 * RESOLUTION,
    ),
    "reciprocal of rows": (
        lambda x: functions.reciprocal(x, np.array([[1], [2], [64], [256]])),
        exact(np.exp2(random.uniform(-1, 1, (4, 50)) * np.array([[0], [0.5], [3], [4]]))),
        lambda x: 1 / x,
        0,
        0.00005 + 17 * 4 * RESOLUTION,
    ),
    "reciprocal of wide": (
        lambda x: functions.reciprocal_of_wide(x, 8),
        log_uniform(-8, 8, 400),
        lambda x: 1 / x,
        8 * RESOLUTION,
        0.00005 + 8 * RESOLUTION,
    ),
    "reciprocal of few wide": (
        lambda x: functions.reciprocal_of_wide(x, 8),
        log_uniform(-8, 8, 12),
        lambda x: 1 / x,
        8 * RESOLUTION,
        0.00005 + 8 * RESOLUTION,
    ),
    "reciprocal of wide, small": (
        lambda x: functions.reciprocal_of_wide(x, 8),
        log_uniform(-10, -7, 200),
        lambda x: 1 / x,
        0,
        0.02,
    ),
    "inverse_root": (
        functions.inverse_root,
        log_uniform(-6, 15.9, 400),
        lambda x: x**-0.5,
        8 * RESOLUTION,
        0.00007 + 8 * RESOLUTION,
    ),
    "inverse_root of few": (
        functions.inverse_root,
        log_uniform(-6, 15.9, 8),
        lambda x: x**-0.5,
        8 * RESOLUTION,
        0.00006 + 8 * RESOLUTION,
    ),
    "gelu": (functions.gelu, uniform(-12, 12, 400), exact_gelu, 0.0018, 1e-5),
    "gelu, many": (functions.gelu, uniform(-12, 12, 8000), exact_gelu, 0.0018, 1e-5),
    "silu": (functions.silu, uniform(-2.5, 2.5, 400), lambda x: x / (1 + np.exp(-x)), 0.0024, 1e-5),
    "silu further": (functions.silu, uniform(-4, 4, 400), lambda x: x / (1 + np.exp(-x)), 0.0039, 1e-5),
    "silu of much": (functions.silu, uniform(-40, 40, 400), lambda x: x / (1 + np.exp(-x)), 0.019, 1e-5),
    "silu, many": (functions.silu, uniform(-40, 40, 8000), lambda x: x / (1 + np.exp(-x)), 0.019, 1e-5),
    "scale_rows small": (
        lambda x: functions.scale_rows(x, x[..., 0]),
        uniform(-5, 5, 2, 3, 8),
        lambda x: x * x[..., :1],
        4 * RESOLUTION,
        1e-6,
    ),
    "scale_rows large": (
        lambda x: functions.scale_rows(x, x[..., 0]),
        uniform(-5, 5, 128, 256),
        lambda x: x * x[..., :1],
        4 * RESOLUTION,
        1e-6,
    ),
    "sums_of_squares small": (
        functions.sums_of_squares,
        uniform(-5, 5, 3, 40),
        lambda x: (x * x).sum(axis=-1),
        160 * RESOLUTION,
        1e-6,
    ),
    "sums_of_squares large": (
        functions.sums_of_squares,
        uniform(-5, 5, 128, 256),
        lambda x: (x * x).sum(axis=-1),
        160 * RESOLUTION,
        1e-6,
    ),
    "argmax": (functions.argmax, uniform(-5, 5, 301), np.argmax, 0, 0),
    "top_k": (
        lambda x: jnp.stack(functions.top_k(x, 5)),
        uniform(-5, 5, 301),
        lambda x: np.stack([np.sort(x)[::-1][:5], np.argsort(-x)[:5]]),
        2 * RESOLUTION,
        0,
    ),
}


@pytest.fixture(scope="module")
def simulations():
    started = {}

    def start(protocol):
        if protocol not in started:
            started[protocol] = Simulation(protocol, Settings())
        return started[protocol]

    return start


def run(simulation, function, *operands):
    """The result, and what its second run cost: the first pays for keys."""
    names = tuple(f"x{number}" for number in range(len(operands)))
    for number, operand in enumerate(operands):
        # Half of it from either party: shared, as values within a program are.
        simulation.hold("a", operand - operand / 2, 0)
        simulation.hold("b", operand / 2, 1 % simulation.parties)
        simulation.run(Stage("share", number, jnp.add, ("a", "b"), (names[number],)))
    stage = Stage("operation", -1, function, names, ("result",))
    simulation.run(stage)
    cost = simulation.run(stage)
    return simulation.reveal("result"), cost


@pytest.mark.parametrize(
    "protocol", ["ref2k", *(pytest.param(name, marks=pytest.mark.slow) for name in ("semi2k", "aby3", "cheetah"))]
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_under_protocol(simulations, protocol, name):
    function, operand, definition, absolute, relative = OPERATIONS[name]
    result, cost = run(simulations(protocol), function, operand)
    expected = definition(operand.astype(np.float64))
    np.testing.assert_allclose(result, expected, atol=absolute, rtol=relative)
    assert (cost.bytes > 0) == (PARTIES[protocol] > 1)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_in_plaintext(name):
    function, operand, definition, absolute, relative = OPERATIONS[name]
    with jax.experimental.enable_x64():
        result = jax.jit(function)(jnp.asarray(operand, jnp.float64))  # by itself each operation takes as long
    np.testing.assert_allclose(result, definition(operand.astype(np.float64)), atol=max(absolute, 1e-9), rtol=relative)
    if not (name.startswith(("gelu", "silu", "exp by", "inverse_root")) or "reciprocal" in name):
        np.testing.assert_allclose(result, definition(operand.astype(np.float64)), rtol=1e-9, atol=1e-12)


FULL = 2 * functions.CIPHERTEXT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "shape", "claimed"),
    [
        (functions.square, (FULL,), 110),
        (lambda x: x * x, (FULL,), 168),
        (functions.relu, (FULL,), 98),
        (lambda x: functions.exp_of_nonpositive(-x * x, 3), (FULL,), 168 + 98 + 3 + 330),
        (functions.gelu, (FULL,), 430),
        (functions.exp_by_quartic, (FULL,), 550),
        (lambda x: functions.scale_rows(x, x[..., 0]), (2, 128, 64), 168),
        (lambda x: functions.scale_rows(x, x[..., 0]), (128, 256), 88),
        (functions.sums_of_squares, (128, 768), 56),
        (lambda x: functions.reciprocal(x, np.array(128)), (FULL,), 1280),
        (functions.inverse_root, (FULL,), 2680),
        (functions.argmax, (8192,), 115),
        (lambda x: functions.top_k(x, 8)[1], (8192,), 627),
        (lambda x: functions.reciprocal_of_wide(x, 8), (FULL,), 2070),
    ],
)
def test_prices_under_cheetah(simulations, function, shape, claimed):
    # Transfers are made ten million at a time, in some operation or other: not in each of three that follow.
    size = min(run(simulations("cheetah"), function, uniform(0.5, 2, *shape))[1].bytes for _ in range(3))
    assert size / np.prod(shape) == pytest.approx(claimed, rel=0.04)


def wide(x):
    return functions.reciprocal_of_wide(x, 8)


def narrow(x):
    return functions.reciprocal(x, np.array(1024))


@pytest.mark.parametrize("size", [4, 400])
@pytest.mark.parametrize("fraction_bits", [14, 17, 18, 20])
def test_outside_their_range_roots_and_reciprocals_are_small(size, fraction_bits):
    """Above it 0, and below it too small: nothing explodes whatever the fraction bits resolve."""
    simulation = Simulation("ref2k", Settings(fraction_bits=fraction_bits))
    end = np.log2(functions.largest_root(fraction_bits))
    ends = np.resize(exact(np.exp2(end + np.array([0.6, 1.0, 2.0, 3.5]))), size)
    root, _ = run(simulation, lambda x: functions.inverse_root(x, fraction_bits), ends)
    np.testing.assert_allclose(root, 0.0, atol=2.0**-12)
    reciprocal, _ = run(simulation, wide, np.resize(exact(np.exp2([9.6, 10.0, 13.0, 19.0])), size))
    np.testing.assert_allclose(reciprocal, 0.0, atol=2.0**-12)

    small = np.resize(np.array([0, 2 * 2.0**-fraction_bits, 2.0**-12, 2.0**-11], np.float32), size)
    root, _ = run(simulation, lambda x: functions.inverse_root(x, fraction_bits), small)
    assert root.min() > 0
    assert (root <= np.minimum(400, 1.01 * np.maximum(small, 1e-9) ** -0.5)).all()
    reciprocal, _ = run(simulation, wide, small)
    assert reciprocal.min() > 0
    assert reciprocal.max() <= 16 * 2.0**8


@pytest.mark.parametrize("fraction_bits", [14, 16, 18, 20])
@pytest.mark.parametrize("size", [8, 400])
def test_the_root_holds_up_to_where_calibration_lets_it(size, fraction_bits):
    settings = Settings(fraction_bits=fraction_bits)
    most = np.log2(largest_mean_square(settings))
    x = log_uniform(0, most - 0.001, size)
    found, _ = run(Simulation("ref2k", settings), lambda x: functions.inverse_root(x, fraction_bits), x)
    np.testing.assert_allclose(found, x.astype(np.float64) ** -0.5, rtol=0.0002, atol=4 * 2.0**-fraction_bits)


@pytest.mark.parametrize("function", [wide, narrow, functions.inverse_root])
def test_four_products_wait_for_one_another_or_three_of_few_numbers(function):
    """All are marked, so that they can be prepared; and few numbers need no product that many would not."""
    few, many = marked_products(function, 8), marked_products(function, 400)
    assert max(few) == 3
    assert max(many) == 4
    assert sum(few.values(), Counter()) <= sum(many.values(), Counter())


def marked_products(function, size):
    """By how many products they wait for, themselves included, the kinds of all; there are no others."""
    jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((size,), np.float32)).jaxpr
    waits, found = {}, {}
    for equation in jaxpr.eqns:
        assert equation.primitive.name not in ("mul", "dot_general", "square", "div", "rsqrt")
        depth = max((waits.get(v, 0) for v in equation.invars if not isinstance(v, Literal)), default=0)
        if equation.params.get("name") in functions.BILINEAR:
            depth += 1
            found.setdefault(depth, Counter())[equation.params["name"]] += 1
        waits.update(dict.fromkeys(equation.outvars, depth))
    return found


@pytest.mark.slow
def test_a_few_factors_of_one_party_cost_no_ciphertext(simulations):
    """The server's factors for one row of queries: a ciphertext each way is 0.87 MB."""
    engine, rows, factors = simulations("cheetah"), uniform(-2, 2, 4, 1, 64), uniform(0.5, 2, 4, 1)
    run(engine, functions.relu, rows)  # leaves the rows behind as "x0", shared
    engine.hold("factors", factors, 0)

    def cost(function):
        stage = Stage("operation", -1, function, ("x0", "factors"), ("result",))
        least = min(engine.run(stage).bytes for _ in range(3))  # one of them may prepare products for the next
        np.testing.assert_allclose(engine.reveal("result"), rows * factors[..., None], atol=4 * RESOLUTION)
        return least

    assert cost(lambda x, f: functions.scale_rows(x, f, private=True)) < rows.size * 240
    assert cost(lambda x, f: x * f[..., None]) > 800_000


@pytest.mark.slow
def test_parts_save_a_ciphertext(simulations):
    odd = uniform(-1, 1, FULL + 200)
    _, whole = run(simulations("cheetah"), functions.square, odd)
    _, parts = run(simulations("cheetah"), lambda x: functions.in_full_ciphertexts(functions.square, x), odd)
    assert parts.bytes < 0.8 * whole.bytes


@pytest.mark.parametrize("size", [5, 8192, 8193, FULL, FULL + 1, 2 * FULL - 1])
def test_parts_are_the_whole(size):
    x = uniform(-1, 1, 1, size)
    np.testing.assert_array_equal(functions.in_full_ciphertexts(jnp.negative, jnp.asarray(x)), -x)


def test_gelu_stands_for_both_forms():
    x = jnp.linspace(-20, 20, 40_001)
    for form in (functions.gelu_tanh, exact_gelu):
        assert np.abs(functions.gelu(x) - form(x)).max() < 0.0018


@pytest.mark.parametrize("arity", [2, 3, 4, 7, None])
@pytest.mark.parametrize("lengths", [[1], [1, 2, 3, 4, 5], [7, 1, 16, 3], list(range(1, 34)), [5, 5, 5], [129]])
def test_segment_max(lengths, arity, monkeypatch):
    """Whatever meets at a time, and with equal elements, of which one may win only."""
    if arity is not None:
        monkeypatch.setattr(functions, "_best_arity", lambda lengths, copies: arity)
    values = random.normal(size=(3, sum(lengths)))
    values[1] = random.integers(-2, 2, sum(lengths))
    ends = np.cumsum(lengths)
    expected = np.stack([values[:, e - n : e].max(axis=1) for e, n in zip(ends, lengths)], axis=1)
    found = jax.jit(lambda x: functions.segment_max(x, np.array(lengths)))(jnp.asarray(values, jnp.float32))
    np.testing.assert_array_equal(found, expected.astype("f"))
    prepared = jax.jit(lambda x: functions.segment_max(x, np.array(lengths), prepared=True))(jnp.asarray(values, "f"))
    np.testing.assert_array_equal(prepared, expected.astype("f"))


def test_few_elements_meet_in_groups_and_many_in_pairs():
    assert functions._best_arity(np.array([129]), 9) > 3
    assert functions._best_arity(np.arange(1, 129), 9) == 2


@pytest.mark.parametrize("size", [1, 2, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (17, 64))])
def test_choosing_from_any_number_with_ties(size):
    x = random.integers(0, 6, size).astype(np.float32)
    assert functions.argmax(jnp.asarray(x)) == np.argmax(x)
    for k in {1, 2, min(5, size), min(16, size)} - ({2} if size < 2 else set()):
        values, indices = functions.top_k(jnp.asarray(x), k)
        np.testing.assert_array_equal(values, np.sort(x)[::-1][:k])
        np.testing.assert_array_equal(x[np.asarray(indices, int)], values)
        assert len(set(np.asarray(indices, int))) == k


@pytest.mark.parametrize("iterations", [1, 4, 5, 8])
def test_kernel_error_against_exp_is_the_documented_one(iterations):
    with jax.experimental.enable_x64():
        x = jnp.linspace(-0.2 * 2**iterations, 0, 500)
        relative = np.abs(functions.exp_of_nonpositive(x, iterations) / jnp.exp(x) - 1)
        assert (relative <= 1.2 * x**2 / 2 ** (iterations + 1) + 1e-9).all()  # 1.2: higher terms, at most x = -2^t / 5
        far = functions.exp_of_nonpositive(jnp.asarray([-1e3, -1e6]), iterations)
        assert (far < 0.11 ** (2**iterations) + 1e-300).all()


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "products"),
    [
        (128, 768, 2304, 1),
        (512, 768, 2304, 4),
        (500, 768, 2304, 4),
        (129, 768, 2304, 2),
        (512, 128, 128, 1),
        (128, 768, 3072, 1),  # twice the memory that is meant, and full ciphertexts
        (64, 576, 49152, 8),
        (3, 8192, 49152, 3),
    ],
)
def test_products_with_private_matrices_come_in_pieces_where_memory_asks_for_it(rows, inner, columns, products):
    x, matrix = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((rows, inner), (inner, columns)))
    (marked,) = jax.make_jaxpr(functions.times_matrix)(x, matrix).eqns  # one operation, which can be prepared
    assert marked.params["name"] == "times_matrix"
    equations = marked.params["jaxpr"].eqns
    found = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert len(found) == products
    most = max(2 * functions.POLYNOMIALS * functions.CIPHERTEXT, inner * columns)
    assert all(product.invars[0].aval.shape[0] * inner * columns <= most for product in found)
    if rows <= 129 and columns < 4_000:
        # Whole numbers whose sums float32 holds, in whichever order they are summed.
        a, b = np.ones((rows, inner), np.float32), np.rint(uniform(-8, 8, inner, columns))
        a *= np.arange(rows)[:, None]
        np.testing.assert_array_equal(functions.times_matrix(a, b), a @ b)


@pytest.mark.parametrize(
    ("rows", "entries", "width", "products"),
    # one further token; 16 and 128 tokens in pairs: blocks of 8 rows; a small table; nothing to choose
    [(1, 50257, 768, 1), (8, 50257, 768, 2), (64, 50257, 768, 16), (64, 2048, 128, 1), (3, 53, 24, 1)],
)
def test_the_table_comes_in_pieces_that_memory_holds(rows, entries, width, products):
    chosen, table = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((rows, entries), (entries, width)))
    (marked,) = jax.make_jaxpr(functions.times_table)(chosen, table).eqns  # one operation, which can be prepared
    assert marked.params["name"] == "times_table"
    found = [e for e in marked.params["jaxpr"].eqns if e.primitive.name == "dot_general"]
    assert len(found) == products
    for product in found:
        (block, inner), (_, columns) = (operand.aval.shape for operand in product.invars)
        assert block * inner * columns <= functions.POLYNOMIALS * functions.CIPHERTEXT


@pytest.mark.parametrize(("polynomials", "rows"), [(1, 5), (1, 64), (2, 7), (30_000, 7)])
def test_the_table_in_pieces_is_the_whole(monkeypatch, polynomials, rows):
    monkeypatch.setattr(functions, "POLYNOMIALS", polynomials)
    table = uniform(-1, 1, 603, 40)
    ids = random.integers(0, 603, rows)
    np.testing.assert_array_equal(functions.times_table(np.eye(603, dtype=np.float32)[ids], table), table[ids])


@pytest.fixture(scope="module")
def fitting():
    """The script that fits constants."""
    pytest.importorskip("scipy")
    script = Path(__file__).parents[3] / "benchmarks" / "fit_functions.py"
    spec = importlib.util.spec_from_file_location("fit_functions", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # which its data class needs
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("form", [functions._ROOT, functions._FEW_ROOT])
def test_the_roots_constants_are_those_of_the_script_that_fits_them(fitting, form):
    found = fitting.fit_root(form.ratio, 2 * len(form.squares) + 1)
    assert (found.start, found.zero) == pytest.approx((form.start, form.zero), rel=2e-5)
    np.testing.assert_allclose(form.squares, found.squares, rtol=2e-4)
    assert found.error < 6.3e-5

    y = np.linspace(form.start, form.ratio * form.start, 8001)
    wrong = (form.zero - y) * np.prod([(y - c) ** 2 + g for c, g in form.squares], axis=0) * np.sqrt(y) - 1
    assert np.abs(wrong).max() == pytest.approx(found.error, rel=0.01)


@pytest.mark.parametrize("name", ["exp", "gelu", "silu"])
def test_the_constants_are_those_of_the_script_that_fits_them(fitting, name):
    constant = lambda part: getattr(functions, f"_{name.upper()}_{part}")  # noqa: E731
    fit = getattr(fitting, f"fit_{name}")
    found = fit(constant("END"))
    for part in ("alpha", "beta", "a", "gamma", "delta"):
        assert getattr(found, part) == pytest.approx(constant(part.upper()), rel=2e-5)
    worth = fitting.weighted if name == "silu" else lambda other: other.error
    for other in (0.97, 1.03) if name != "exp" else (0.97,):  # further out the exponential's gains next to nothing
        assert worth(fit(other * constant("END"))) > worth(found)

    x = np.linspace(0, 30, 8001) if name != "exp" else np.linspace(-30, 0, 8001)
    exact = {
        "exp": [np.exp(x)],
        "gelu": [x - fall for fall in fitting.gelu_falls(x)],
        "silu": [x - fitting.silu_falls(x)],
    }[name]
    function = functions.exp_by_quartic if name == "exp" else getattr(functions, name)
    computed = np.asarray(function(x.astype(np.float32)), np.float64)
    error = max(np.abs(computed - values).max() for values in exact)
    assert error == pytest.approx(found.error, rel=0.01)
