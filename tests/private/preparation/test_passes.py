"""Both parties' passes with prepared products on an ideal engine: right, within what was prepared, and uniform."""

from collections import Counter

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load, save

pytest.importorskip("jax")

from entropi.private.compute.prefix import with_prefix
from entropi.private.compute.program import stages_of_pass
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.preparation.cutting import cut
from entropi.private.preparation.material import (
    BITS,
    KEPT,
    SIGNS,
    TRUNCATE,
    WINNERS,
    Material,
    MaterialUsedUp,
    array_name,
    joined,
    needs,
    of_comparisons,
    of_truncations,
)
from entropi.private.preparation.products import multiply, token_rows
from entropi.private.preparation.truncation import unpacked
from masked_passes import (
    Session,
    chi_square,
    ideal_arrays,
    ideal_material,
    ideal_session,
    ideal_truncations,
    plain_passes,
    smallest_gap,
)
from private_reference import VARIANTS, describe, random_weights

PASSES = [[7, 3, 11, 2, 0], [5], [1, 1, 9]]  # a prompt, one further token, a message
TOKENS = sum(map(len, PASSES))
SETTINGS = Settings(embedding="public")
SPREAD = describe(
    **{**VARIANTS["llama"], "temperature": True, "activation": "geglu", "final_norm": "layer", "norm": "layer"}
)


def compare(session, model, settings, weights, passes):
    for found, expected in zip(session.logits, plain_passes(passes, model, settings, weights), strict=True):
        np.testing.assert_allclose(found, expected, atol=0.004)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_unprepared_programs(variant):
    model = describe(**VARIANTS[variant])
    weights = random_weights(model)
    session, _ = ideal_session(model, SETTINGS, weights, PASSES, TOKENS)
    compare(session, model, SETTINGS, weights, PASSES)


@pytest.mark.parametrize("paired", [False, True])
def test_a_private_table(paired):
    """Its rows are prepared one by one, also where a program without preparation takes them in pairs."""
    model, settings = describe(), Settings(embedding="private", paired=paired, fraction_bits=18)
    weights = random_weights(model)
    session, _ = ideal_session(model, settings, weights, PASSES, TOKENS)
    compare(session, model, settings, weights, PASSES)
    (table,) = [need for need in needs(model, settings, TOKENS) if need.kind == "times_table"]
    assert (table.matrix, table.masking, table.rows) == ("embedding", "server", TOKENS)


def test_a_public_prefix():
    """Its keys and values are the server's, and opened under their masks with the first prompt's."""
    model, prefix = describe(**VARIANTS["polynomial"]), [4, 4, 8]
    weights = with_prefix(model, random_weights(model), prefix)
    session, _ = ideal_session(model, SETTINGS, weights, PASSES, len(prefix) + TOKENS)
    compare(session, model, SETTINGS, weights, PASSES)


@pytest.mark.parametrize("sizes", [[9], [1] * 4, [2, 3, 1]], ids=str)
def test_any_split_into_passes_has_enough(sizes):
    """And in the last number of tokens that fits: temperatures are those of all positions then."""
    ids = np.random.default_rng(0).integers(0, 53, sum(sizes)).tolist()
    passes = [[ids.pop() for _ in range(size)] for size in sizes]
    model = describe(**{**VARIANTS["temperature"], "positions": sum(sizes)})
    weights = random_weights(model)
    session, _ = ideal_session(model, SETTINGS, weights, passes, sum(sizes))
    compare(session, model, SETTINGS, weights, passes)


@pytest.mark.parametrize("variant", ["llama", "spread"])
@pytest.mark.parametrize("sizes", [[60], [22, *[1] * 38], [1, 40, 1, 1, 13, 4], [9, 9, 9, 9]], ids=str)
def test_any_split_takes_no_more_comparisons_than_were_prepared(variant, sizes):
    """Also where tokens were taken back, so that what stands at later places sees fewer keys; rows of some levels."""
    model = describe(**VARIANTS["llama"]) if variant == "llama" else SPREAD
    model = msgspec.structs.replace(model, positions=64)
    prepared = {need.name: need.rows for need in needs(model, SETTINGS, 60, len(sizes))}
    for dropped in (0, 3):
        taken, past = Counter(), 0
        for size in sizes:
            for comparisons in comparisons_of(model, size, past):
                taken.update({need.name: need.rows for need in of_comparisons(comparisons, SETTINGS.fraction_bits)})
            past += size - min(dropped, size - 1)
        assert {"signs.2", "winners", "kept"} <= taken.keys() <= prepared.keys()
        assert all(count <= prepared[name] for name, count in taken.items()), (taken, prepared)


def comparisons_of(model, size, past):
    shapes = {**model.weight_shapes(), "embedded": (size, model.hidden_size)}
    for layer in range(model.layers if past else 0):
        shapes[f"{layer}.k"] = shapes[f"{layer}.v"] = (model.key_value_heads, past, model.head_size)
    for stage in stages_of_pass(model, SETTINGS, size, past, prepared=True):
        yield from (step.comparisons for step in cut(stage, shapes) if step.comparisons)


@pytest.mark.parametrize("passes", [[[1, 2, 3]], [[1, 2], [3]]], ids=str)
def test_a_token_too_many_is_refused(passes):
    model = describe()
    with pytest.raises(MaterialUsedUp, match="2 were prepared, 3 are needed"):
        ideal_session(model, SETTINGS, random_weights(model), passes, 2)


# --- Drafts -----------------------------------------------------------------------------------------------------------

# Of each pass how many of its tokens are drafts, and how many of these are taken back.
DRAFTED = {(7, 3, 11, 2, 0): (0, 0), (5, 8, 1): (2, 0), (9, 4, 4): (2, 1), (6, 1, 9): (2, 2), (2,): (0, 0)}


@pytest.mark.parametrize("prefix", [[], [4, 4, 8]], ids=["no prefix", "prefix"])
def test_drafts_that_are_taken_back_leave_no_trace(prefix):
    """Logits after each token are those of one pass over the tokens that were kept before it, and masks are used once:
    also of keys and values whose positions others take."""
    model = SPREAD if prefix else describe(**VARIANTS["polynomial"])
    weights = with_prefix(model, random_weights(model), prefix)
    passes, fates = [list(tokens) for tokens in DRAFTED], list(DRAFTED.values())
    read = sum(1 + drafted for drafted, _ in fates)
    tokens = len(prefix) + sum(map(len, passes))
    session, _ = ideal_session(model, SETTINGS, weights, passes, tokens, drafts=fates, read=read)
    kept = []
    for tokens, found, (drafted, dropped) in zip(passes, session.logits, fates, strict=True):
        (expected,) = plain_passes([kept + tokens], model, SETTINGS, weights, last_rows=1 + drafted)
        np.testing.assert_allclose(found, expected, atol=0.004)
        kept += tokens[: len(tokens) - dropped]
    assert smallest_gap(session.opened) > CLOSE


# --- What is sent -----------------------------------------------------------------------------------------------------

ENOUGH = 400  # chi-square of 255 degrees of freedom is larger one time in 10^8
# Values here are smaller than 64, 2^24 last digits: two under one mask differ by no more than 2^25. Among some 10^4
# numbers from all of the ring the smallest gap is below that one time in 1,000, but the seed is fixed.
CLOSE = 2**25


@pytest.fixture(scope="module")
def spread():
    """Every kind of product: a model, its weights, material for two sessions, and what the sessions sent."""
    weights = random_weights(SPREAD)
    random = np.random.default_rng(8)
    dealt = [ideal_material(SPREAD, SETTINGS, weights, 6, random) for _ in range(2)]
    passes = [[3, 9, 1, 3], [3], [3]]
    sessions = [run(weights, passes, wanted, arrays, random) for wanted, arrays in dealt]
    return weights, passes, dealt, sessions


def run(weights, passes, wanted, arrays, random=None):
    materials = [Material(wanted, one) for one in arrays]
    return Session(SPREAD, SETTINGS, weights, passes, materials, random or np.random.default_rng(2))


def test_every_kind_of_product_is_in_the_sample(spread):
    kinds = {need.kind for need in spread[2][0][0]}
    products = {"times_matrix", "scores", "mix", "scale_rows", "sums_of_squares", "times", "square"}
    assert kinds == products | {TRUNCATE, SIGNS, WINNERS, BITS, KEPT}


def test_what_is_sent_and_opened_is_uniform(spread):
    for session in spread[3]:
        for numbers in (*session.sent, session.opened):
            joint = np.concatenate([part.reshape(-1) for part in numbers])
            assert len(joint) > 3000
            for byte in range(8):
                assert chi_square((joint >> np.uint64(8 * byte)).astype(np.uint8)) < ENOUGH
        for bits in session.bits:
            assert abs(bits.mean() - 0.5) < 5 * 0.5 / len(bits) ** 0.5


def test_without_masks_what_is_opened_is_not_uniform(spread):
    """So the test before would see it; the ideal engine's shares by themselves are uniform."""
    weights, passes, dealt, _ = spread
    wanted, arrays = dealt[0]
    plain = [{name: np.zeros_like(array) for name, array in one.items()} for one in arrays]
    session = run(weights, passes, wanted, plain)
    compare(session, SPREAD, SETTINGS, weights, passes)
    joint = np.concatenate([part.reshape(-1) for part in session.opened])
    assert chi_square((joint >> np.uint64(56)).astype(np.uint8)) > 100 * ENOUGH


def test_no_mask_hides_two_values(spread):
    """Within a session that sees a token again and again, and between two sessions of the same tokens."""
    *_, sessions = spread
    assert smallest_gap([part for session in sessions for part in session.opened]) > CLOSE


def test_masks_used_twice_are_seen(spread):
    weights, passes, dealt, sessions = spread
    assert smallest_gap(sessions[0].opened + run(weights, passes, *dealt[0]).opened) <= CLOSE
    # Keys and values that were opened again with every pass, under the same mask but as new shares of equal values:
    again = [part for part in sessions[0].opened if part.ndim == 3]
    assert smallest_gap([*again, *(part[:, :1] for part in again)]) == 0


def test_the_server_gets_no_mask_of_the_client(spread):
    """Nor the client one of the server's: words of the masks, their products and what both together are."""
    for (_, arrays), session in zip(spread[2], spread[3]):
        for rank in (SERVER, CLIENT):
            received = np.concatenate([part.reshape(-1) for part in session.sent[1 - rank]])
            secrets = [array.reshape(-1) for array in arrays[1 - rank].values()]
            assert not np.isin(received, np.concatenate(secrets)).any()
            assert np.isin(np.append(received, secrets[0][:1]), np.concatenate(secrets)).any()  # so it would be seen


def test_the_client_sends_more_and_the_server_nothing_of_its_matrices(spread):
    """Rows for the server's matrices go one way; everything else crosses, in both directions alike."""
    wanted, _ = spread[2][0]
    first = spread[3][0]
    to_server = sum(int(np.prod(need.shapes[0])) for need in wanted if need.matrix)
    sizes = [sum(part.size for part in sent) for sent in first.sent]
    assert 0 < sizes[CLIENT] - sizes[SERVER] <= to_server


# --- Material ---------------------------------------------------------------------------------------------------------


def test_needs_are_named_once_and_say_how_many():
    wanted = {need.name: need for need in needs(SPREAD, SETTINGS, 6)}
    assert len(wanted) == len(needs(SPREAD, SETTINGS, 6))
    assert wanted["0.qkv"].rows == wanted["1.scores"].rows == wanted["1.mix"].rows == 6
    # One row for every token's norms: two in each layer and the last; temperatures are of rows of queries.
    width, heads = SPREAD.hidden_size, SPREAD.heads
    assert wanted[f"sums_of_squares.{width}"].rows == 6 * (2 * SPREAD.layers + 1)
    rows = wanted[f"scale_rows.{SPREAD.head_size}"].rows
    assert rows == 2 * 6 * heads * SPREAD.layers  # temperatures, and the softmax's division


def test_the_last_layer_and_the_head_are_prepared_for_as_many_rows_as_there_are_passes():
    """Their scores and values apart, whose places are those of tokens."""
    few, many = ({need.name: need for need in needs(SPREAD, SETTINGS, 6, passes)} for passes in (2, 6))
    last = SPREAD.layers - 1
    for name, need in many.items():
        if name in ("head", f"{last}.output", f"{last}.up", f"{last}.down", "centre"):
            assert (few[name].rows, need.rows) == (2, 6)
        elif need.pooled:
            assert few[name].rows < need.rows
        else:
            assert few[name] == need
    assert needs(SPREAD, SETTINGS, 6, 9) == needs(SPREAD, SETTINGS, 6) == list(many.values())


@pytest.mark.parametrize("positions", [6, 9])
def test_temperatures_of_all_positions_are_factors_too(positions):
    """A slice of all of them is the weight itself, which is no matrix."""
    model = describe(temperature=True, positions=positions)
    assert {need.kind for need in needs(model, SETTINGS, 6) if need.matrix} == {"times_matrix"}


def test_more_tokens_need_more_of_everything():
    for fewer, more in zip(needs(SPREAD, SETTINGS, 5), needs(SPREAD, SETTINGS, 6), strict=True):
        assert fewer.name == more.name
        assert fewer.rows < more.rows


def numbered(wanted):
    """Material whose every number is another one."""
    arrays, count = {}, 0
    for need in wanted:
        if need.kind == TRUNCATE:
            arrays |= ideal_truncations(need.rows, 18, np.random.default_rng(0))[SERVER]
            continue
        for which, shape in dict(a=need.shapes[0], b=need.shapes[1], c=need.result).items():
            if which == "b" and need.masking != "pair":
                continue
            size = int(np.prod(shape))
            arrays[array_name(need.name, which)] = np.arange(count, count + size, dtype=np.uint64).reshape(shape)
            count += size
    return arrays


def products_of(model, sizes, prefix=0):
    past = prefix
    shapes = {**model.weight_shapes()}
    for layer in range(model.layers if prefix else 0):
        shapes[f"{layer}.k"] = shapes[f"{layer}.v"] = (model.key_value_heads, prefix, model.head_size)
    for size in sizes:
        shapes["embedded"] = (size, model.hidden_size)
        for stage in stages_of_pass(model, SETTINGS, size, past, prepared=True):
            for step in cut(stage, shapes):
                for product in step.products:
                    yield product, stage.layer, past + size
        past += size


@pytest.mark.parametrize(("sizes", "prefix"), [([6], 0), ([1] * 6, 0), ([3, 1, 2], 0), ([2, 1], 3), ([5], 1)])
@pytest.mark.parametrize("variant", ["spread", "qwen3", "square"])
def test_every_number_is_handed_out_once(variant, sizes, prefix):
    """But those of keys and values, which are opened once and stay: their new rows are handed out once."""
    model = SPREAD if variant == "spread" else describe(**VARIANTS[variant])
    wanted = needs(model, SETTINGS, prefix + sum(sizes), len(sizes))
    material, seen, totals = Material(wanted, numbered(wanted)), [], prefix + np.cumsum(sizes)
    for product, layer, keys in products_of(model, sizes, prefix):
        masks = material.masks(product, layer, keys)
        assert masks.a.shape == product.shapes[0]
        assert masks.c.shape == product.result_shape
        b = masks.b
        if product.kind in ("scores", "mix"):
            assert b.shape == product.shapes[1]
            opened = max((one for one in totals if one < keys), default=0)
            b = b[:, opened:]
        seen += [part.reshape(-1) for part in (masks.a, b, masks.c) if part is not None]
    numbers = np.concatenate(seen)
    assert len(np.unique(numbers)) == len(numbers) > 0


def test_masks_belong_together():
    """Of an own row a, the column b and their product c the same places are handed out, in whichever pass."""
    model = describe(**VARIANTS["qwen3"])
    random = np.random.default_rng(4)
    wanted, _ = ideal_material(model, SETTINGS, random_weights(model), 6, random)
    arrays, matrices = {}, {}
    for need in wanted:
        if need.kind in (TRUNCATE, SIGNS, WINNERS, BITS, KEPT):
            arrays |= ideal_arrays(need, {}, 18, random)[SERVER]
            continue
        a, b = (random.integers(0, 2**64, shape, dtype=np.uint64) for shape in need.shapes)
        b = a if need.masking == "self" else b
        own = dict(a=a, b=b, c=multiply(need.kind, a, b))
        if need.masking == "server":
            matrices[need.name] = own.pop("b")
        arrays |= {array_name(need.name, which): part for which, part in own.items()}
    material = Material(wanted, arrays)
    for product, layer, keys in products_of(model, [3, 1, 2]):
        masks = material.masks(product, layer, keys)
        b = matrices[product.operands[1]] if product.kind == "times_matrix" else masks.b
        np.testing.assert_array_equal(multiply(product.kind, masks.a, b), masks.c)


def test_asking_twice_or_for_too_much_is_refused():
    wanted = needs(SPREAD, SETTINGS, 6)
    for product, layer, keys in products_of(SPREAD, [4]):
        material = Material(wanted, numbered(wanted))
        material.masks(product, layer, keys)

        def until_it_is_empty(ask=(product, layer, keys), material=material):
            for _ in range(10_000):
                material.masks(*ask)

        with pytest.raises(MaterialUsedUp):
            until_it_is_empty()
    for product, layer, keys in products_of(SPREAD, [7]):
        place = (product.kind, product.shapes[0], product.result_shape)
        if product.kind in ("scores", "mix") or (product.kind == "times_matrix" and token_rows(*place) == 7):
            with pytest.raises(MaterialUsedUp, match="6 were prepared, 7 are needed"):
                Material(wanted, numbered(wanted)).masks(product, layer, keys)
        with pytest.raises(MaterialUsedUp, match="0 were prepared"):
            Material([], {}).masks(product, layer, keys)


def test_bits_are_handed_out_once():
    wanted = [of_truncations(100), of_truncations(60)]  # two parts of the pool
    arrays = ideal_truncations(160, 18, np.random.default_rng(1))[CLIENT]
    material, every = Material(wanted, arrays), unpacked(*arrays.values(), 160)
    taken = [material.of_truncation(count) for count in (1, 99, 0, 60)]
    np.testing.assert_array_equal(np.concatenate([one.bits for one in taken]), every.bits)
    np.testing.assert_array_equal(np.concatenate([one.products for one in taken]), every.products)
    with pytest.raises(MaterialUsedUp, match="for truncate 160 were prepared, 161 are needed"):
        material.of_truncation(1)


def test_what_comparisons_take_is_handed_out_once():
    wanted = needs(SPREAD, SETTINGS, 6)
    material, rows = Material(wanted, numbered(wanted)), {need.name: need.rows for need in wanted}
    for name, take in (
        ("signs.2", lambda count: material.of_signs(2, count)),
        ("signs.3", lambda count: material.of_signs(3, count)),
        (WINNERS, material.of_winners),
        (BITS, lambda count: (material.of_bits(count),)),
        (KEPT, material.of_kept),
    ):
        taken = [part for count in (1, 2, rows[name] - 3) for part in take(count)]
        numbers = np.concatenate([part.reshape(-1) for part in taken])
        assert len(np.unique(numbers)) == len(numbers)
        with pytest.raises(MaterialUsedUp, match=f"for {name} {rows[name]} were prepared, {rows[name] + 1} are needed"):
            take(1)


def test_what_is_written_down_is_row_by_row_in_memory():
    """Safetensors writes another array down in the order of memory, and reads something else."""
    (need,) = (need for need in needs(SPREAD, SETTINGS, 6) if need.kind == BITS)
    other = np.arange(12, dtype=np.uint64).reshape(3, 4).T
    assert load(save({"x": other}))["x"].tolist() != other.tolist()
    (array,) = joined(need, [{"x": other}]).values()
    assert load(save({"x": array}))["x"].tolist() == other.tolist()


def test_a_refused_product_uses_nothing_up():
    wanted = needs(SPREAD, SETTINGS, 6)
    material = Material(wanted, numbered(wanted))
    large, small = (next(products_of(SPREAD, [size])) for size in (5, 2))
    assert large[0].kind == "sums_of_squares"
    assert next(need.rows for need in wanted if need.kind == "sums_of_squares") == 8 * 5 + 2
    for _ in range(8):
        material.masks(*large)
    with pytest.raises(MaterialUsedUp, match="42 were prepared, 45 are needed"):
        material.masks(*large)
    material.masks(*small)
    with pytest.raises(MaterialUsedUp):
        material.masks(*small)
