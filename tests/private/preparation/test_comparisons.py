"""Comparisons from prepared bits: every gate is addition, signs hold where a window says, and results are exact."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax")

from entropi.private.compute import functions
from entropi.private.compute.functions import COMPARING
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import SERVER
from entropi.private.compute.windows import Window, exact, narrow, wide
from entropi.private.preparation.comparisons import compute
from entropi.private.preparation.cutting import cut
from entropi.private.preparation.material import Material, of_comparisons
from entropi.private.preparation.parts import together
from entropi.private.preparation.signs import (
    digit,
    digit_bits_of,
    joint,
    masks_of,
    opened_in_steps,
    products_by_size,
    products_of,
    signs,
)
from masked_passes import ideal_arrays, products_of_masks

RANDOM = np.random.default_rng(11)
EVERY = np.uint64(2**64 - 1)


def draw(shape):
    return RANDOM.integers(0, 2**64, shape, dtype=np.uint64)


def both(server, client):
    """What two parties return that send each other what they yield; and what each has sent."""
    parties, sent, results = (server, client), [[], []], [None, None]
    waiting = [next(party) for party in parties]
    while any(result is None for result in results):
        for rank in range(2):
            sent[rank].append(waiting[rank])
        arrived = waiting[::-1]
        for rank, party in enumerate(parties):
            try:
                waiting[rank] = party.send(arrived[rank])
            except StopIteration as done:
                results[rank] = done.value
    return results, sent


# --- Gates ------------------------------------------------------------------------------------------------------------


def results_of(gate, values):
    """Results of a gate, of all values of its variables, from what both parties compute; each value is 0 or 1."""
    whole = {name: np.where(np.array(bits), EVERY, np.uint64(0)) for name, bits in values.items()}
    count = len(next(iter(whole.values())))
    shares = {name: draw(count) for name in whole}
    masks = draw((2, len(gate.opened), count))
    all_masks = gate.masks(masks[0] ^ masks[1])
    every = []
    for names in gate.products:
        every.append(np.bitwise_and.reduce([all_masks[name] for name in names]))
    products = draw((len(every), count))
    opened = np.stack([whole[name] for name in gate.opened]) ^ masks[0] ^ masks[1]
    parties = [
        gate.evaluated(own, opened, masks[rank], drawn, server=rank == SERVER)
        for rank, (own, drawn) in enumerate(
            [
                ({name: whole[name] ^ shares[name] for name in whole}, np.stack(every) ^ products),
                (shares, products),
            ]
        )
    ]
    found = [one ^ other for one, other in zip(*parties)]
    assert all(set(np.unique(one)) <= {0, EVERY} for one in found)
    return [one == EVERY for one in found]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_digit_makes_a_carry_or_passes_one_on_as_in_addition(bits):
    rows = list(product(range(2**bits), repeat=2))
    values = {
        f"{party}{place}": [row[which] >> place & 1 for row in rows]
        for which, party in enumerate("uv")
        for place in range(bits)
    }
    makes, passes = results_of(digit(bits), values)
    assert makes.tolist() == [u + v >= 2**bits for u, v in rows]
    assert passes.tolist() == [u + v == 2**bits - 1 for u, v in rows]


@pytest.mark.parametrize("lowest", [False, True])
def test_neighbours_are_one_digit(lowest):
    """g and p of one never hold at the same time."""
    states = list(product([(0, 0), (1, 0), (0, 1)], repeat=4))  # g and p of every digit, lowest first
    values = {
        f"{which}{place}": [row[place][n] for row in states] for n, which in enumerate("gp") for place in range(4)
    }
    if lowest:
        del values["p0"]
    results = results_of(joint(lowest=lowest), values)

    def carry(row, carried):
        for makes, passes in row:
            carried = makes or (passes and carried)
        return bool(carried)

    assert results[0].tolist() == [carry(row, 0) for row in states]
    if not lowest:
        assert results[1].tolist() == [all(passes for _, passes in row) for row in states]
    assert len(results) == 2 - lowest


@pytest.mark.parametrize("digit_bits", [1, 2, 3])
def test_counts_are_those_of_what_is_made(digit_bits):
    masks = draw((3, masks_of(digit_bits)))
    products = products_of_masks(masks, digit_bits)
    assert products.shape == (3, products_of(digit_bits))
    assert products.flags.c_contiguous  # safetensors would write another array down wrongly
    assert sum(products_by_size(digit_bits)) == products_of(digit_bits)
    assert sum(opened_in_steps(digit_bits)) == masks_of(digit_bits)
    assert digit_bits_of(masks_of(digit_bits)) == digit_bits


# --- Signs ------------------------------------------------------------------------------------------------------------


def found_signs(numbers, window):
    """Signs of whole numbers, and what each party has sent."""
    client = draw(len(numbers))
    words = -(-len(numbers) // 64)
    masks = draw((2, words, masks_of(window.digit_bits)))
    products = draw((words, products_of(window.digit_bits)))
    whole = products_of_masks(masks[0] ^ masks[1], window.digit_bits)
    shares = (numbers.view(np.uint64) - client, client), (whole ^ products, products)
    parties = [signs(shares[0][rank], window, masks[rank], shares[1][rank], server=rank == SERVER) for rank in range(2)]
    (one, other), sent = both(*parties)
    assert abs(one[:-1].mean() - 0.5) < 5 * 0.5 / len(one) ** 0.5  # a share of them says nothing
    return one ^ other, sent


@pytest.mark.parametrize("window", [narrow(18), exact(18), wide(18), narrow(14), exact(22), Window(1, 7)], ids=str)
def test_signs_hold_within_the_window(window):
    """But for numbers that are nearer to 0, from above, or to the window's lower end than the last place looked at."""
    place, largest = 2**window.dropped, 2 ** (window.bits + window.dropped)
    ends = [0, 1, place - 1, place, 2 * place - 1, largest - 1]
    numbers = np.array([*ends, *(-end for end in ends), -1, -place - 1, place - largest], np.int64)
    sizes = RANDOM.integers(0, window.bits + window.dropped, 5000)
    numbers = np.append(numbers, RANDOM.integers(place - largest, largest, 5000) >> sizes)
    found, _ = found_signs(numbers, window)
    sure = ((numbers < 0) & (numbers >= place - largest)) | (numbers >= place)
    np.testing.assert_array_equal(found[sure], numbers[sure] < 0)
    assert sure.sum() > 3000
    beyond, _ = found_signs(np.full(3000, largest + place), window)
    assert beyond.all()  # so the window's end is where it says


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_three_exchanges_of_words(count):
    window = wide(18)
    _, sent = found_signs(np.append(np.arange(-3000, 3000), np.zeros(count, int)), window)
    words = -(-(6000 + count) // 64)
    for party in sent:
        assert [message.shape for message in party] == [(bits, words) for bits in opened_in_steps(window.digit_bits)]
        joined = np.concatenate([message.reshape(-1) for message in party]).view(np.uint8)
        assert abs(np.unpackbits(joined).mean() - 0.5) < 5 * 0.5 / (8 * len(joined)) ** 0.5


# --- What follows from signs ------------------------------------------------------------------------------------------

EDGES = np.array([-3.0, -0.5, 0.25, 8.0], np.float32).reshape(4, 1, 1)
BELOW = np.array([[1.0, 2.0, 3.5, -4.25], [0.125, 0.0, -1.0, 2.0]], np.float32).reshape(2, 4, 1, 1)
FUNCTIONS = {
    "kept": lambda x: functions.relu(x),
    "two of a kind": lambda x: (functions.relu(x), functions.relu(1.5 - x)),
    "by edges": lambda x: functions.by_edges(x, EDGES, BELOW, BELOW[::-1]),
    "two windows": lambda x: (
        functions.by_edges_of_any(x, EDGES, BELOW, BELOW[::-1]),
        functions.relu(x),
        functions.by_edges(x, EDGES[:1], BELOW[:, :1], BELOW[:, 1:2]),
    ),
}


@pytest.mark.parametrize("fraction_bits", [14, 18, 22])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_exact(name, fraction_bits):
    x = np.round(RANDOM.normal(size=(3, 50)) * 4 * 2**10) / 2**10
    if fraction_bits <= 18:  # with more, what is as near to an edge as that may be taken for what is below it
        x[0, :4] = 0.0, -3.0, 0.25, 8.0
    outputs = FUNCTIONS[name](jnp.asarray(x, jnp.float32))
    count = len(outputs) if isinstance(outputs, tuple) else 1
    stage = Stage("other", 0, FUNCTIONS[name], ("x",), tuple(f"result {number}" for number in range(count)))
    comparisons = [comparison for step in cut(stage, {"x": x.shape}) for comparison in step.comparisons]
    wanted = of_comparisons(comparisons, fraction_bits)
    dealt = [ideal_arrays(need, {}, fraction_bits, RANDOM) for need in wanted]
    materials = [Material(wanted, together([party[rank] for party in dealt])) for rank in range(2)]
    operands = [x if comparison.operand == "x" else 1.5 - x for comparison in comparisons]
    whole = [np.rint(one * 2.0**fraction_bits).astype(np.int64).view(np.uint64) for one in operands]
    client = [draw(one.shape) for one in whole]
    shares = [one - other for one, other in zip(whole, client)], client
    parties = [
        compute(comparisons, shares[rank], materials[rank], fraction_bits, server=rank == SERVER) for rank in range(2)
    ]
    results, sent = both(*parties)
    assert [len(one) for one in sent[0]] == [len(other) for other in sent[1]]
    for comparison, operand, one, other in zip(comparisons, operands, *results):
        expected = np.asarray(COMPARING[comparison.kind](jnp.asarray(operand, jnp.float32), *comparison.public))
        found = (one + other).view(np.int64) / 2.0**fraction_bits
        assert found.shape == comparison.result_shape == expected.shape
        np.testing.assert_array_equal(found, expected)
