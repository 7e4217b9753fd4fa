"""What looks ahead: where it may, that the same is computed, how exactly, and how many rounds it saves."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax")

from entropi.private.compute import lookahead
from entropi.private.compute.program import run_stages, stages_of_pass
from entropi.private.compute.settings import Settings
from entropi.private.preparation.cutting import cut
from entropi.private.preparation.linear import LinearPart
from entropi.private.preparation.ring import encode
from private_reference import VARIANTS, describe, random_weights

PASSES = [[7, 3, 11, 2, 0], [1, 1, 9]]
SETTINGS = Settings(embedding="public")
# Of three layers those from which the next one's queries, keys and values are computed: never the last one.
AHEAD = {
    "softmax only": [0, 1],
    "temperature": [0],  # a matrix follows the second one
    "length": [0, 1],
    "kernel": [0, 1],
    "polynomial": [0, 1],
    "powers": [0, 1],
    "powers over a number": [0, 1],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_what_is_linear_is_looked_ahead_over(variant):
    model = describe(**VARIANTS[variant])
    expected = AHEAD.get(variant, [])
    assert [layer for layer in range(-1, model.layers) if lookahead.looks_ahead(model, layer)] == expected
    for prepared in (False, True):
        stages = list(stages_of_pass(model, SETTINGS, 3, 0, prepared=prepared))
        names = [(stage.name, stage.layer) for stage in stages]
        assert [layer for layer in range(model.layers) if ("qkv", layer) not in names] == [
            layer + 1 for layer in expected if prepared
        ]
        read = {name for stage in stages for name in stage.inputs}
        assert read.isdisjoint(lookahead.shapes(model)) == (not (expected and prepared))


OTHERS = dict(query_key_norm=True, key_value_heads=2, position_embedding="rotary", rotary_dimensions=4, layers=4)


@pytest.mark.parametrize("variant", ["powers", "norms of queries and keys"])
def test_the_same_is_computed_in_floating_point(variant):
    """Of a prompt and a message after it, to what float32 rounds."""
    model = describe(**VARIANTS.get(variant, {**OTHERS, "explicit_ffn": [1]}))
    weights = random_weights(model)
    made = lookahead.weights(model, weights)
    assert {name: array.shape for name, array in made.items()} == lookahead.shapes(model)
    assert made
    found = {}
    for prepared in (False, True):
        values, past, found[prepared] = {**weights, **(made if prepared else {})}, 0, []
        for tokens in PASSES:
            values["embedded"] = jnp.asarray(weights["embedding"][tokens])
            run_stages(stages_of_pass(model, SETTINGS, len(tokens), past, prepared=prepared), values)
            past += len(tokens)
            found[prepared].append(np.asarray(values["logits"]))
    for one, other in zip(found[False], found[True], strict=True):
        # Divisions and roots have another form where they are prepared, each with an error of its own.
        exact = variant == "powers"
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 if exact else 2e-3)


def test_the_matrix_is_what_both_products_are():
    model = describe(**VARIANTS["powers"])
    weights = random_weights(model)
    made = lookahead.weights(model, weights)
    random = np.random.default_rng(1)
    x, heads = random.normal(size=(5, model.hidden_size)), random.normal(size=(5, model.query_size))
    joint = np.concatenate([x, heads], axis=1) @ made["1.ahead"] + made["1.ahead_bias"]
    after = x + heads @ weights["1.output"] + weights["1.output_bias"]
    np.testing.assert_allclose(joint[:, : model.hidden_size] + x, after, atol=1e-5)
    columns = joint[:, model.hidden_size :]
    np.testing.assert_allclose(columns, after @ weights["2.qkv"] + weights["2.qkv_bias"], atol=1e-5)


@pytest.mark.parametrize("bits", [14, 18, 22])
def test_rounding_stays_below_its_bound(bits):
    """A product with the matrix, rounded to the nearest, is wrong by half a last place for each unit of x and heads."""
    model = describe(**VARIANTS["powers"])
    matrix = lookahead.weights(model, random_weights(model))["0.ahead"]
    x = np.random.default_rng(2).normal(size=(200, len(matrix)))
    wrong = np.abs(x @ (encode(matrix, bits) / 2.0**bits) - x @ matrix.astype(np.float64))
    bound = 2.0 ** -(bits + 1) * np.abs(x).sum(axis=1, keepdims=True)
    assert (wrong <= bound).all()
    assert wrong.max() > bound.max() / 100  # so it is not what nothing was rounded for


def rounds(model, new):
    """Exchanges one after another of a pass, and numbers that it has prepared products and truncations of."""
    shapes = {**model.weight_shapes(), **lookahead.shapes(model), "embedded": (new, model.hidden_size)}
    found = masked = truncated = 0
    for stage in stages_of_pass(model, SETTINGS, new, 0, prepared=True):
        for step in cut(stage, shapes):
            found += bool(step.products or step.comparisons)
            masked += sum(int(np.prod(p.shapes[0])) for p in step.products if p.kind == "times_matrix")
            for part in step.parts:
                if isinstance(part, LinearPart):
                    found += len(part.truncations)
                    truncated += sum(part.truncations)
    return found, masked, truncated


@pytest.mark.parametrize("variant", ["powers", "polynomial"])
def test_two_rounds_fewer_a_layer_and_nothing_more_is_sent(variant, monkeypatch):
    changes = {**VARIANTS[variant], "temperature": False, "layers": 4}
    model = describe(**changes)
    ahead = rounds(model, 3)
    assert lookahead.shapes(model)
    for module in ("lookahead", "program"):
        monkeypatch.setattr(f"entropi.private.compute.{module}.looks_ahead", lambda model, layer: False)
    assert not lookahead.shapes(model)
    apart = rounds(model, 3)
    assert apart[0] - ahead[0] == 2 * (model.layers - 1)
    assert ahead[1] == apart[1]  # masked numbers: of the state and of heads, once each
    assert ahead[2] <= apart[2]  # the last layer's state has fewer rows
