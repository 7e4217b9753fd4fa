"""What preparing a session and using it is predicted to cost, against the meter of two parties that do both."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

pytest.importorskip("spu")

from entropi.costs.calibration import shipped, workers
from entropi.costs.network import NETWORKS
from entropi.costs.prediction import CostModel, Options
from entropi.costs.preparation import PreparedPredictor, stored_bytes
from entropi.private.compute.description import Description
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from private_reference import FIELDS
from two_engines import metered_session

MODELS = {
    "SM+ScFuFFN": dict(layers=3, heads=4, key_value_heads=4, hidden_size=64, softmax="polynomial-1"),
    "SM+LN+G": dict(layers=2, heads=3, key_value_heads=3, hidden_size=96, norm="rms", activation="gelu",
                    intermediate_size=384, centre=False),
    "SM+RMS+SwiGLU": dict(layers=2, heads=4, key_value_heads=2, hidden_size=128, norm="rms", activation="swiglu",
                          intermediate_size=300, position_embedding="rotary", rotary_dimensions=32, centre=False),
}  # fmt: skip
PASSES = (20, 1, 1, 5)


def describe(name: str) -> Description:
    return msgspec.convert({**FIELDS, **MODELS[name], "vocab_size": 700, "positions": 64}, Description)


def cost_model(**options) -> CostModel:
    prices = msgspec.structs.replace(shipped("cheetah"), workers=workers())
    return CostModel(prices, NETWORKS["lan"], Options(embedding="public", **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_predictions_of_both_phases_equal_the_meter_of_two_parties(name):
    """Bytes within 3 %, by kind of product offline and by pass online, and messages within 5 %."""
    model, options = describe(name), cost_model().options
    offline, online, kept = metered_session(model, Settings(embedding="public"), PASSES)
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
    assert [stored_bytes(material, rank) for rank in (SERVER, CLIENT)] == kept

    for tokens, costs in zip(PASSES, online):
        guess = predictor.run(tokens)
        assert guess.bytes == pytest.approx(sum(cost.bytes for cost in costs), rel=0.03), tokens
        assert guess.messages == pytest.approx(sum(cost.messages for cost in costs), rel=0.05, abs=4), tokens
        sizes = Counter()
        for cost in costs:
            sizes[cost.name] += cost.bytes
        for operation, size in sizes.items():
            assert guess.by_operation()[operation].bytes == pytest.approx(size, rel=0.1, abs=2_000), operation
    assert options.prefix_tokens == 0
