"""Predictions against the meter of the engine itself, on shapes and architectures that no price was measured on."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pytest

pytest.importorskip("spu")

from entropi.costs import cheetah
from entropi.costs.calibration import shipped, trials, workers
from entropi.costs.network import NETWORKS
from entropi.costs.prediction import CostModel, Options, Predictor
from entropi.costs.tracing import ProtocolCall, Value, trace_calls
from entropi.private.compute import tiling
from entropi.private.compute.description import Description
from entropi.private.compute.embedding import one_hot
from entropi.private.compute.engine import Simulation
from entropi.private.compute.layout import Layout
from entropi.private.compute.program import forward, warm_up
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.records import PassCost
from private_reference import FIELDS

MODELS = {
    "SM+LN+G": dict(layers=3, heads=3, key_value_heads=3, hidden_size=96, norm="rms", activation="gelu",
                    intermediate_size=384, centre=False),
    "SM(t)+ScFuFFN": dict(layers=2, heads=5, key_value_heads=5, hidden_size=160, temperature=True, softmax="power-3"),
    "polynomial": dict(layers=2, heads=3, key_value_heads=3, hidden_size=144, softmax="polynomial-1"),
    "Pow(t)+ScFuFFN": dict(layers=2, heads=3, key_value_heads=3, hidden_size=96, temperature=True,
                           softmax="polynomial-1/keys", final_norm="none", centre=False),
    "SM+RMS+SwiGLU": dict(layers=2, heads=4, key_value_heads=2, hidden_size=128, norm="rms", activation="swiglu",
                          intermediate_size=300, position_embedding="rotary", rotary_dimensions=32, centre=False),
    "norms of heads and branches": dict(layers=2, heads=3, key_value_heads=1, hidden_size=112, norm="rms",
                                        activation="geglu", intermediate_size=260, position_embedding="rotary",
                                        rotary_dimensions=40, head_width=40, query_key_norm=True, branch_norm=True,
                                        centre=False),
}  # fmt: skip
RUNS = [
    ("cheetah", "SM+LN+G", 72, {}),
    ("cheetah", "SM(t)+ScFuFFN", 150, {"embedding": "public"}),
    ("cheetah", "polynomial", 100, {"embedding": "public"}),
    ("cheetah", "Pow(t)+ScFuFFN", 40, {"embedding": "public"}),
    ("cheetah", "SM+RMS+SwiGLU", 40, {"embedding": "public", "output": "argmax"}),
    ("cheetah", "norms of heads and branches", 48, {"embedding": "public"}),
    ("semi2k", "SM+LN+G", 40, {}),
    ("aby3", "SM(t)+ScFuFFN", 40, {"embedding": "public"}),
]


def describe(name: str) -> Description:
    fields = {**FIELDS, **MODELS[name], "architecture": name, "vocab_size": 700, "positions": 200}
    return msgspec.convert(fields, Description)


def metered(protocol: str, model: Description, tokens: int, options: Options) -> list[list]:
    """Communication of the set-up, a prompt and one more token, by the engine's own count."""
    engine = Simulation(protocol, Settings(fraction_bits=options.fraction_bits))
    random = np.random.default_rng(0)
    for name, shape in model.weight_shapes().items():
        engine.hold(name, 0.05 * random.standard_normal(shape), SERVER)
    stage, shapes = warm_up()
    for name, (shape, owner) in shapes.items():
        engine.hold(name, np.zeros(shape), SERVER if owner == "server" else CLIENT)
    passes = [[engine.run(stage)]]
    paired = options.embedding == "private" and protocol == "cheetah"
    for new, past in ((tokens, 0), (1, tokens)):
        if options.embedding == "public":
            engine.hold("embedded", 0.5 * random.standard_normal((new, model.hidden_size)), CLIENT)
        else:
            engine.hold("tokens", one_hot([1] * new, model.vocab_size, paired=paired), CLIENT)
        stages = forward(
            model,
            new,
            past,
            options.exact_softmax_as,
            embedding=options.embedding,
            paired=paired,
            output=options.output,
            choices=options.choices,
        )
        passes.append([engine.run(stage) for stage in stages])
    return passes


def sums(stages: list, what: str, key=lambda stage: stage.name) -> Counter:
    total: Counter = Counter()
    for stage in stages:
        total[key(stage)] += getattr(stage, what)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "name", "tokens", "chosen"), RUNS)
def test_prediction_equals_the_meter(protocol, name, tokens, chosen):
    """Bytes within 3 % for layers and 10 % for operations, messages within 5 %."""
    prices = msgspec.structs.replace(shipped(protocol), workers=workers())
    options = Options(exact_softmax_as="power-4", **chosen)
    model = describe(name)
    predictor = Predictor(model, CostModel(prices, NETWORKS["lan"], options))
    predicted = [predictor.set_up(), predictor.run(tokens), predictor.run(1)]
    measured = metered(protocol, model, tokens, options)
    for whole, stages in zip(predicted, measured):
        # One process has all shares here, so that none is sent to reveal a result: see `test_preparation` for that.
        guess = PassCost(operations=[one for one in whole.operations if one.name != "reveal"])
        assert guess.bytes == pytest.approx(sum(stage.bytes for stage in stages), rel=0.03, abs=2_000)
        assert guess.messages == pytest.approx(sum(stage.messages for stage in stages), rel=0.05, abs=4)
        layers = sums(guess.operations, "bytes", key=lambda stage: stage.layer)
        for layer, size in sums(stages, "bytes", key=lambda stage: stage.layer).items():
            assert layers[layer] == pytest.approx(size, rel=0.03, abs=2_000), layer
        operations = sums(guess.operations, "bytes")
        for operation, size in sums(stages, "bytes").items():
            assert operations[operation] == pytest.approx(size, rel=0.1, abs=2_000), operation


@pytest.mark.slow
@pytest.mark.parametrize(("name", "output"), [("polynomial", "logits"), ("SM+RMS+SwiGLU", "top_k")])
def test_prediction_of_a_batch_equals_the_meter(name, output):
    """Three prompts of different lengths, and a token more of each; as exact as for one."""
    prices = msgspec.structs.replace(shipped("cheetah"), workers=workers())
    options = Options(embedding="public", output=output, exact_softmax_as="power-4")
    model, random = describe(name), np.random.default_rng(0)
    predictor = Predictor(model, CostModel(prices, NETWORKS["lan"], options))
    predictor.set_up()
    engine = Simulation("cheetah", Settings())
    for weight, shape in model.weight_shapes().items():
        engine.hold(weight, 0.05 * random.standard_normal(shape), SERVER)
    stage, shapes = warm_up()
    for warm, (shape, owner) in shapes.items():
        engine.hold(warm, np.zeros(shape), SERVER if owner == "server" else CLIENT)
    engine.run(stage)

    layout = Layout.first([20, 7, 12], 0)
    for _ in range(2):
        engine.hold("embedded", 0.5 * random.standard_normal((layout.tokens, model.hidden_size)), CLIENT)
        how = dict(embedding="public", output=output, choices=options.choices, layout=layout)
        stages = [engine.run(one) for one in forward(model, layout.tokens, layout.before, "power-4", **how)]
        predicted = predictor.run_batch(layout)
        guess = PassCost(operations=[one for one in predicted.operations if one.name != "reveal"])
        assert guess.bytes == pytest.approx(sum(one.bytes for one in stages), rel=0.03, abs=2_000)
        assert guess.messages == pytest.approx(sum(one.messages for one in stages), rel=0.05, abs=4)
        operations = sums(guess.operations, "bytes")
        for operation, size in sums(stages, "bytes").items():
            assert operations[operation] == pytest.approx(size, rel=0.1, abs=2_000), operation
        layout = layout.following()


def test_shapes_of_the_check_were_not_calibrated_on():
    """Matrix products of the checked models, against those whose prices were measured."""
    calibrated = {
        (*left, right[1]) for left, right in (pair_of_matrices(trial) for trial in trials("cheetah")) if right
    }
    for _, name, tokens, chosen in RUNS:
        model = describe(name)
        values = {weight: Value(shape, "server") for weight, shape in model.weight_shapes().items()}
        values["embedded"] = Value((tokens, model.hidden_size), "client")
        stages = forward(model, tokens, 0, "power-4", embedding="public")
        products = {call.shape for stage in stages for call in trace_calls(stage, values) if call.kind == "product"}
        assert products
        assert not products & calibrated


def pair_of_matrices(trial) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(shape for shape, _ in trial.operands) if trial.name.startswith("product") else ((), ())


# What SPU's log says of its cuts: rows x inner x columns => tile.
LOGGED = {
    (128, 768, 2304): (128, 64, 1),
    (128, 64, 128): (128, 64, 1),
    (128, 128, 64): (1, 128, 64),
    (64, 128, 64): (64, 128, 1),
    (64, 64, 128): (64, 64, 2),
    (128, 128, 768): (128, 64, 1),
}


@pytest.mark.parametrize("shape", LOGGED)
def test_tiles_are_those_that_the_engine_logs(shape):
    assert tiling._cheapest_tile(*shape, packed=True) == LOGGED[shape]


def test_transfers_run_out_where_the_engine_s_did():
    """Places of extensions in sequences of calls that were metered (two workers, both extend at the same call)."""
    counter = cheetah.Cheetah(workers=2)

    def extended(kinds: tuple[str, ...], size: int, calls: int) -> list[int]:
        found = []
        for call in range(calls):
            if sum(counter.count(ProtocolCall(kind, size))["transfer extensions"] for kind in kinds):  # type: ignore[arg-type]
                found.append(call)
        return found

    assert extended(("compare",), 4096, 140) == [0, 61, 123]
    assert extended(("compare", "select"), 4096, 140) == [45, 106]
    assert extended(("compare", "select"), 4096, 70) == [27, 34]
    assert extended(("truncate",), 1_048_576, 25) == [5, 24]


@pytest.mark.parametrize(("shift", "calls"), [(3, []), (-3, ["truncate"])])
def test_rows_move_up_before_a_norm_for_nothing_and_down_by_a_truncation(shift, calls):
    model = Description(**{**FIELDS, "norm": "rms"})
    moving = [s for s in forward(model, 4, 0, "quartic", norm_shifts=[0, shift, 0, 0]) if s.outputs == ("moved",)]
    assert {stage.layer for stage in moving} == {1}
    assert [call.kind for call in trace_calls(moving[0], {"state": Value((4, 24))})] == calls
