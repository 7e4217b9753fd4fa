"""What preparing a session and using it is predicted to cost, against the meter of two parties that do both."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

pytest.importorskip("jax")

from cost_shapes import SMALL
from entropi.costs import exchanges, preparation
from entropi.costs.calibration import shipped, workers
from entropi.costs.cheetah import Cheetah
from entropi.costs.network import NETWORKS
from entropi.costs.prediction import CostModel, Options, Predictor
from entropi.costs.preparation import PreparedPredictor
from entropi.costs.tracing import ProtocolCall, Value, trace_calls
from entropi.errors import UserError
from entropi.private.compute.attention import scores
from entropi.private.compute.description import Description
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.preparation.cutting import Comparison, Product, Step
from entropi.private.preparation.material import Need
from entropi.private.preparation.parts import kept_bytes
from private_reference import FIELDS
from two_engines import metered_session

MODELS = {
    "SM+ScFuFFN": dict(layers=3, heads=4, key_value_heads=4, hidden_size=64, softmax="polynomial-1"),
    "Pow+ScFuFFN": dict(layers=2, heads=4, key_value_heads=4, hidden_size=64, softmax="polynomial-1/keys",
                        final_norm="none", centre=False),
    "SM+LN+G": dict(layers=2, heads=3, key_value_heads=3, hidden_size=96, norm="rms", activation="gelu",
                    intermediate_size=384, centre=False),
    "SM+RMS+SwiGLU": dict(layers=2, heads=4, key_value_heads=2, hidden_size=128, norm="rms", activation="swiglu",
                          intermediate_size=300, position_embedding="rotary", rotary_dimensions=32, centre=False),
}  # fmt: skip
PASSES, READ = (40, 1, 1, 5), (1, 1, 1, 3)  # tokens, and those of the last ones after which there are logits


def describe(name: str) -> Description:
    return msgspec.convert({**FIELDS, **MODELS[name], "vocab_size": 700, "positions": 64}, Description)


def cost_model(**options) -> CostModel:
    prices = msgspec.structs.replace(shipped("cheetah"), workers=workers())
    return CostModel(prices, NETWORKS["lan"], Options(embedding="public", **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_predictions_of_both_phases_equal_the_meter_of_two_parties(name):
    """Bytes within 3 %, by kind of product offline and by pass online, and messages within 5 %."""
    pytest.importorskip("spu")
    model = describe(name)
    offline, online, kept = metered_session(model, Settings(embedding="public"), PASSES, READ)
    predictor = PreparedPredictor(model, cost_model())
    predictor.set_up()
    material = predictor.needs(sum(PASSES))
    kinds = {need.name: need.kind for need in material}

    guess, metered = predictor.offline(material), Counter()
    for cost in offline:
        metered[kinds[cost.name]] += cost.bytes
    assert guess.bytes == pytest.approx(sum(metered.values()), rel=0.03)
    assert guess.messages == pytest.approx(sum(cost.messages for cost in offline), rel=0.05, abs=4)
    predicted = guess.by_operation()
    assert predicted.keys() == metered.keys()
    for kind, size in metered.items():
        assert predicted[kind].bytes == pytest.approx(size, rel=0.03, abs=2_000), kind
    assert [kept_bytes(material, rank) for rank in (SERVER, CLIENT)] == kept

    for tokens, read, costs in zip(PASSES, READ, online, strict=True):
        guess = predictor.run(tokens, last_rows=read)
        assert guess.bytes == pytest.approx(sum(cost.bytes for cost in costs), rel=0.03), tokens
        assert guess.messages == pytest.approx(sum(cost.messages for cost in costs), rel=0.05, abs=4), tokens
        sizes = Counter()
        for cost in costs:
            sizes[cost.name] += cost.bytes
        for operation, size in sizes.items():
            assert guess.by_operation()[operation].bytes == pytest.approx(size, rel=0.1, abs=2_000), operation


def test_products_of_whole_numbers_are_not_truncated():
    values = dict.fromkeys("qk", Value((2, 5, 8), numbers="whole"))
    kinds = {call.kind for call in trace_calls(Stage("", -1, scores, ("q", "k"), ("s",)), values)}
    assert kinds == {"product"}
    assert values["s"] == Value((2, 15), numbers="whole")
    real = {"q": Value((2, 5, 8)), "k": Value((2, 5, 8))}
    assert {call.kind for call in trace_calls(Stage("", -1, scores, ("q", "k"), ("s",)), real)} == {
        "product",
        "truncate",
    }


def test_numbers_that_one_party_each_knows_are_multiplied_as_if_shared():
    """As the engine does it, metered: 32 bytes for each of few, two ciphertexts each way for many."""
    known = ProtocolCall("multiply", 300, left="server", right="client")
    shared = ProtocolCall("multiply", 300)
    assert Cheetah(2).count(known) == Cheetah(2).count(shared)
    many = Cheetah(2).count(ProtocolCall("multiply", 20_000, left="client", right="server"))
    assert many["shared blocks"] == 4
    one = Cheetah(2).count(ProtocolCall("multiply", 20_000, left="shared", right="server"))
    assert one["blocks by server"] == 3


def sent(counted: Counter) -> tuple[int, int, int]:
    """Bytes, messages and rounds."""
    return tuple(sum(number * exchanges.SENT[name][place] for name, number in counted.items()) for place in range(3))


def test_what_is_sent_between_parts_by_hand():
    """8 bytes a masked number: to the server alone where it knows the matrix; keys only the first time."""
    by_matrix = Product("times_matrix", ("x", "0.qkv"), ((3, 8), (8, 24)), "y'", (3, 24))
    logits = Product("scores", ("q", "0.k"), ((2, 1, 4), (2, 6, 4)), "s'", (2, 6))
    square = Product("square", ("s",), ((2, 6),), "t'", (2, 6))

    def of(*products, opened=0, comparisons=()):
        return sent(exchanges.count(Step(products, comparisons, ()), {"0.qkv"}, opened, 18))

    assert of(by_matrix) == (8 * 24, 1, 1)
    assert of(logits, opened=5) == (16 * (8 + 8), 2, 1)
    assert of(logits) == (16 * (8 + 48), 2, 1)
    assert of(square, by_matrix) == (16 * 12 + 8 * 24, 2, 1)
    # 97 bits for the sign of each of two words of numbers, in three exchanges of which the first is the product's; and
    # in a fourth a bit and a number of each.
    relu = Comparison("relu", "s", (70,), "u", (70,), ())
    assert of(by_matrix, comparisons=(relu,)) == (8 * 24 + 2 * (8 * 2 * 97 + 9 + 8 * 70), 8, 4)
    # 15 signs of each of 12 groups are three words of numbers, with their 97 bits; the winners one word of groups, of
    # 15 bits; and then a bit and a number for each but the last of a group.
    largest = Comparison("largest", "s", (2, 6, 6), "u", (2, 6), ())
    assert of(comparisons=(largest,)) == (2 * (8 * 3 * 97 + 8 * 15 + 8 + 8 * 60), 10, 5)
    pairs = Comparison("largest", "s", (2, 6, 2), "u", (2, 6), ())
    assert of(comparisons=(pairs,)) == (2 * (8 * 97 + 2 + 8 * 12), 8, 4)


def test_what_is_sent_to_truncate():
    """A bit each way, in whole bytes."""
    assert sent(exchanges.count_truncation(8_000)) == (2_000, 2, 1)
    assert sent(exchanges.count_truncation(3)) == (2, 2, 1)


def test_the_server_stores_no_mask_of_what_its_matrices_multiply():
    by_matrix = Need("0.qkv", "times_matrix", "server", ((3, 8), (8, 24)), (3, 24), "0.qkv")
    squares = Need("square", "square", "self", ((10,), (10,)), (10,))
    products = Need("times", "times", "pair", ((10,), (10,)), (10,))
    assert kept_bytes([by_matrix], CLIENT) == 8 * (24 + 72)
    assert kept_bytes([by_matrix], SERVER) == 8 * 72
    for rank in (CLIENT, SERVER):
        assert kept_bytes([squares, products], rank) == 8 * (20 + 30)


@pytest.mark.parametrize("kind", [Predictor, PreparedPredictor])
def test_many_passes_cost_what_each_of_them_does(kind):
    model, costs = describe("SM+RMS+SwiGLU"), cost_model()
    together, apart = kind(model, costs), kind(model, costs)
    for predictor in (together, apart):
        predictor.set_up()
        predictor.run(8)
    found = together.run_further(7)
    one_by_one = [apart.run(1) for _ in range(7)]
    assert found.bytes == pytest.approx(sum(one.bytes for one in one_by_one), rel=0.005)
    assert found.messages == pytest.approx(sum(one.messages for one in one_by_one), rel=0.01)
    assert found.latency == pytest.approx(sum(one.latency for one in one_by_one), rel=0.02)
    assert together.run(1).bytes == pytest.approx(apart.run(1).bytes, rel=0.001)


@pytest.mark.parametrize("kind", [Predictor, PreparedPredictor])
def test_a_pass_with_drafts_leaves_the_next_one_as_it_was(kind):
    model, costs = describe("SM+RMS+SwiGLU"), cost_model()
    predictor = kind(model, costs)
    predictor.set_up()
    predictor.run(8)
    drafted = predictor.run_drafted(3)
    alone, following = predictor.run_drafted(0), predictor.run(1)
    assert (alone.bytes, alone.latency) == pytest.approx((following.bytes, following.latency))
    assert following.bytes < drafted.bytes < 5 * following.bytes
    assert drafted.rounds < 4 * following.rounds
    if kind is PreparedPredictor:  # logits after each of them; ciphertexts have room for four rows
        sizes = [one.by_operation()["head"].bytes for one in (drafted, following)]
        assert sizes[0] == pytest.approx(4 * sizes[1], rel=0.01)


def test_both_phases_are_summed_beside_the_session_without_preparation():
    costs = cost_model()
    found = preparation.predict(costs, SMALL, 16, 3)
    totals = found.totals()
    assert found.tokens == 18
    assert totals["offline"].bytes == pytest.approx(found.set_up.bytes + found.offline.bytes)
    online = found.online_set_up.bytes + found.prompt.bytes + found.all_further.bytes
    assert totals["online"].bytes == pytest.approx(online)
    assert totals["both"].latency == pytest.approx(totals["offline"].latency + totals["online"].latency)
    usual = Predictor(preparation.described(SMALL), costs)
    passes = [usual.set_up(), usual.run(16), usual.run(1), usual.run(1)]
    assert totals["unprepared"].bytes == pytest.approx(sum(one.bytes for one in passes))
    assert found.prompt.bytes < passes[1].bytes
    assert found.further.bytes < passes[2].bytes
    assert preparation.predict(costs, SMALL, 64, 1).further is None
    with pytest.raises(UserError, match="65 tokens"):
        preparation.predict(costs, SMALL, 64, 2)


def test_keys_of_a_public_prefix_are_opened_with_the_prompt_s():
    """A pass of the same size after tokens of the session's own sends these keys and values less."""
    model = describe("SM+ScFuFFN")
    with_prefix, without = (
        PreparedPredictor(model, cost_model(prefix_tokens=10)),
        PreparedPredictor(model, cost_model()),
    )
    without.run(10)
    first, second = masked_numbers(with_prefix, 4), masked_numbers(without, 4)
    for name in ("scores", "values"):
        assert first[name] - second[name] == 10 * model.hidden_size * model.layers


def masked_numbers(predictor: PreparedPredictor, tokens: int) -> Counter:
    """How many cross in both directions, by operation, in a pass over so many tokens."""
    found = Counter()
    for stage, calls in predictor._trace_pass(tokens):
        for call in calls:
            if isinstance(call, Counter):
                found[stage.name] += call[exchanges.BOTH_WAYS]
    return found
