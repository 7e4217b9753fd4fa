"""Comparisons from prepared bits: every gate is addition, signs hold where a window says, and results are exact."""

from collections import Counter
from itertools import pairwise, product

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax")

from entropi.costs import exchanges
from entropi.private.compute import functions
from entropi.private.compute.functions import COMPARING, GROUP
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import SERVER
from entropi.private.compute.windows import Window, exact, narrow, wide
from entropi.private.preparation.comparisons import compute
from entropi.private.preparation.cutting import cut
from entropi.private.preparation.gates import masks_of, products_by_size, products_of
from entropi.private.preparation.material import Material, of_comparisons
from entropi.private.preparation.parts import together
from entropi.private.preparation.signs import digit, digit_bits_of, gates, joint, opened_in_steps, signs
from entropi.private.preparation.winners import gates as gates_of_winners
from entropi.private.preparation.winners import pairs, winners
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


@pytest.mark.parametrize("some", [gates(1), gates(2), gates(3), gates_of_winners()], ids=["1", "2", "3", "winners"])
def test_counts_are_those_of_what_is_made(some):
    masks = draw((3, masks_of(some)))
    products = products_of_masks(masks, some)
    assert products.shape == (3, products_of(some))
    assert products.flags.c_contiguous  # safetensors would write another array down wrongly
    assert sum(products_by_size(some)) == products_of(some)


@pytest.mark.parametrize("digit_bits", [1, 2, 3])
def test_exchanges_of_signs_are_all_of_their_gates(digit_bits):
    assert sum(opened_in_steps(digit_bits)) == masks_of(gates(digit_bits))
    assert digit_bits_of(masks_of(gates(digit_bits))) == digit_bits


def test_one_number_of_a_group_wins():
    """In every order of up to `GROUP` numbers, of which some may be equal: then it is the first of the largest."""
    sizes = range(3, GROUP + 1)
    groups = [np.array(list(product(range(size), repeat=size))).T for size in sizes]
    negative = [np.array([group[i] < group[j] for i, j in pairs(len(group))], np.uint8) for group in groups]
    ours = [RANDOM.integers(0, 2, bits.shape, dtype=np.uint8) for bits in negative]
    words = -(-sum(group.shape[1] for group in groups) // 64)
    some = gates_of_winners()
    masks, products = draw((2, words, masks_of(some))), draw((words, products_of(some)))
    all_products = products_of_masks(masks[0] ^ masks[1], some), products
    shares = [bits ^ own for bits, own in zip(negative, ours)], ours
    (one, other), sent = both(
        winners(shares[0], sizes, masks[0], all_products[0] ^ products, server=True),
        winners(shares[1], sizes, masks[1], products, server=False),
    )
    for group, server, client in zip(groups, one, other, strict=True):
        wins = server ^ client
        expected = np.arange(len(group))[:, None] == group.argmax(axis=0)
        np.testing.assert_array_equal(wins, expected[:-1])
    assert [len(messages) for messages in sent] == [1, 1]
    bits = np.unpackbits(np.ascontiguousarray(sent[0][0]).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5


# --- Signs ------------------------------------------------------------------------------------------------------------


def found_signs(numbers, window):
    """Signs of whole numbers, and what each party has sent."""
    client = draw(len(numbers))
    words = -(-len(numbers) // 64)
    masks = draw((2, words, masks_of(gates(window.digit_bits))))
    products = draw((words, products_of(gates(window.digit_bits))))
    whole = products_of_masks(masks[0] ^ masks[1], gates(window.digit_bits))
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
    if fraction_bits <= 18:
        x[0, :4] = 0.0, -3.0, 0.25, 8.0
    else:  # what is as near to an edge as that may be taken for what is below it
        x += 2.0**-11
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


# --- Row maxima -------------------------------------------------------------------------------------------------------


def steps_of(lengths, copies):
    stage = Stage("row max", 0, lambda x: functions.segment_max(x, lengths, prepared=True), ("x",), ("largest",))
    return cut(stage, {"x": (copies, int(lengths.sum()))})


def row_maxima(x, lengths, fraction_bits):
    """What both parties find of whole numbers, with exactly what they take; and the bytes that each sends by step."""
    shares = [dict(x=x.view(np.uint64) - (client := draw(x.shape))), dict(x=client)]
    sizes = []
    for step in steps_of(lengths, len(x)):
        wanted = of_comparisons(step.comparisons, fraction_bits)
        dealt = [ideal_arrays(need, {}, fraction_bits, RANDOM) for need in wanted]
        if step.comparisons:
            parties = [
                compute(
                    step.comparisons,
                    [shares[rank][one.operand] for one in step.comparisons],
                    Material(wanted, together([party[rank] for party in dealt])),
                    fraction_bits,
                    server=rank == SERVER,
                )
                for rank in range(2)
            ]
            results, sent = both(*parties)
            names = [one.result for one in step.comparisons]
            for own, found in zip(shares, results):
                own.update(zip(names, found))
            assert [len(one) for one in sent[0]] == [len(other) for other in sent[1]]
            sizes.append([len(message) for message in sent[0]])
        for part in step.parts:
            for rank, own in enumerate(shares):
                computing = part.evaluate([own[name] for name in part.inputs], fraction_bits, server=rank == SERVER)
                with pytest.raises(StopIteration) as done:  # nothing has to be truncated
                    next(computing)
                own.update(zip(part.outputs, done.value.value))
    return (shares[0]["largest"] + shares[1]["largest"]).view(np.int64), sizes


def segments(x, lengths):
    return np.split(x, np.cumsum(lengths)[:-1], axis=1)


LENGTHS = {"1 to 70": np.arange(1, 71), "one row": np.array([129]), "some": np.array([5, 1, 36, 37, 2, 217])}


@pytest.mark.parametrize("fraction_bits", [14, 17, 18, 22])
@pytest.mark.parametrize("which", LENGTHS)
def test_row_maxima_are_exact(which, fraction_bits):
    """Random, tied, and as large as the window allows; whose differences the window sees."""
    lengths = LENGTHS[which]
    grid = 2 ** max(fraction_bits - 13, 0)
    size = int(lengths.sum())
    limit = int(narrow(fraction_bits).limit(fraction_bits) * 2.0**fraction_bits) // (2 * grid)
    x = np.stack(
        [
            RANDOM.integers(-3000, 3000, size),
            RANDOM.integers(-2, 2, size),
            np.zeros(size, np.int64),
            RANDOM.integers(-limit + 1, limit, size),
            np.where(RANDOM.random(size) < 0.1, limit - 1, 1 - limit),
        ]
    )
    found, _ = row_maxima(x * grid, lengths, fraction_bits)
    expected = np.stack([part.max(axis=1) for part in segments(x * grid, lengths)], axis=1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fraction_bits", [17, 18, 22])
def test_of_nearly_equal_numbers_one_is_found(fraction_bits):
    """Never none, for which a much smaller one would stand, and never two: each could lose to another, if the window
    dropped last places of their differences."""
    lengths = np.repeat([3, 4, 5, 6, 7, 40], 60)
    dropped = 2 ** narrow(fraction_bits).dropped
    x = RANDOM.integers(0, 3 * dropped, (20, lengths.sum())) + dropped * RANDOM.integers(-1000, 1000, (20, 1))
    x -= 5000 * dropped * (RANDOM.random(x.shape) < 0.3)
    found, sizes = row_maxima(x, lengths, fraction_bits)
    for part, one in zip(segments(x, lengths), found.T):
        assert (part == one[:, None]).any(axis=1).all()
        assert (part.max(axis=1) - one < 2 * dropped * len(sizes)).all()
    exact_ones = np.stack([part.max(axis=1) for part in segments(x, lengths)], axis=1)
    assert (found != exact_ones).any()  # so these are near enough to each other


@pytest.mark.parametrize("fraction_bits", [14, 18])
@pytest.mark.parametrize("which", LENGTHS)
def test_what_is_sent_for_row_maxima_is_what_is_predicted(which, fraction_bits):
    lengths = LENGTHS[which]
    _, sizes = row_maxima(np.zeros((3, lengths.sum()), np.int64), lengths, fraction_bits)
    steps = [step for step in steps_of(lengths, 3) if step.comparisons]
    for step, messages in zip(steps, sizes, strict=True):
        counted = exchanges.count(step, (), 0, fraction_bits)
        size, both_ways, rounds = (
            sum(number * exchanges.SENT[name][place] for name, number in counted.items()) for place in range(3)
        )
        assert (size, both_ways, rounds) == (2 * sum(messages), 2 * len(messages), len(messages))


def test_rounds_of_row_maxima():
    """Five a level, four where two are left of every row."""

    def rounds(*lengths):
        return [exchanges.count(step, (), 0, 18)[exchanges._EXCHANGES] for step in steps_of(np.array(lengths), 2)[1:]]

    assert rounds(2) == rounds(1, 2) == [4]
    assert rounds(3) == rounds(6) == [5]
    assert rounds(7) == rounds(12) == [5, 4]
    assert rounds(13) == rounds(36) == rounds(*range(1, 37)) == [5, 5]
    assert rounds(39) == [5, 5, 4]
    assert rounds(73) == rounds(216) == [5, 5, 5]


def taken_by_step(length):
    """How much 64 rows, which fill their words, take in every step, of everything that is prepared."""
    return [
        Counter({need.name: need.rows for need in of_comparisons(step.comparisons, 18)})
        for step in steps_of(np.array([length]), 64)
    ]


def test_a_longer_row_takes_no_less_of_anything():
    """So what is prepared for the last places is enough for shorter rows there, after tokens were taken back."""
    for lengths in (range(1, 80), range(212, 225)):
        taken = [taken_by_step(length) for length in lengths]
        for shorter, longer in pairwise(taken):
            assert len(longer) >= len(shorter)
            assert all(fewer <= more for fewer, more in zip(shorter, longer))
