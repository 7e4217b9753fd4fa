"""Stages cut at products and comparisons: the steps one after another are the whole stage, whatever the program has."""

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

pytest.importorskip("jax")

from entropi.model.architectures import ARCHITECTURES
from entropi.model.folding import fold
from entropi.private.compute import functions, lookahead
from entropi.private.compute.description import Description
from entropi.private.compute.functions import BILINEAR, COMPARING
from entropi.private.compute.prefix import with_prefix
from entropi.private.compute.program import Stage, run_stages, stages_of_pass
from entropi.private.compute.settings import Settings
from entropi.private.preparation.cutting import UNTRUNCATED, cut
from entropi.private.preparation.linear import LinearPart
from entropi.private.preparation.products import token_rows
from masked_passes import inputs_of_passes
from private.compute import test_models_in_private as models
from private_reference import VARIANTS, describe, random_weights

BITS = 24  # so many that what is compared is the parts, and not how constants are rounded
PASSES = [[7, 3, 11, 2, 0], [1, 9]]


def run_step(step, values):
    for product in step.products:
        operands = [values[name] for name in product.operands]
        assert tuple(operand.shape for operand in operands) == product.shapes
        options = {}
        if product.kind == "mix":
            options = dict(rows=token_rows(product.kind, product.shapes[0], product.result_shape))
        values[product.result] = BILINEAR[product.kind](*operands, **options) * 2.0**BITS
        assert product.result.endswith(UNTRUNCATED)
        assert values[product.result].shape == product.result_shape
    for comparison in step.comparisons:
        operand = values[comparison.operand]
        assert operand.shape == comparison.shape
        values[comparison.result] = COMPARING[comparison.kind](operand, *comparison.public)
        assert values[comparison.result].shape == comparison.result_shape
    for part in step.parts:
        if isinstance(part, LinearPart):
            compute(part, values)
        else:
            run_stages([part], values)


def compute(part, values):
    """A linear part on both parties' shares of the values, at random; what is truncated is not shared meanwhile."""
    random = np.random.default_rng(0)
    whole = [np.rint(np.asarray(values[name], np.float64) * 2.0**BITS).astype(np.int64) for name in part.inputs]
    client = [random.integers(-(2**62), 2**62, one.shape) for one in whole]
    shares = [one - other for one, other in zip(whole, client)], client
    parties = [
        part.evaluate([share.view(np.uint64) for share in one], BITS, server=server)
        for one, server in zip(shares, (True, False))
    ]
    results, cut_to = [None, None], [None, None]
    while results[0] is None:
        for number, party in enumerate(parties):
            try:
                cut_to[number] = party.send(cut_to[number])
            except StopIteration as done:
                results[number] = done.value
        if results[0] is None:
            values_cut = [(x + y).view(np.int64) >> BITS for x, y in zip(*cut_to)]
            other = [random.integers(-(2**62), 2**62, one.shape) for one in values_cut]
            cut_to = [[(one - two).view(np.uint64) for one, two in zip(values_cut, other)],
                      [two.view(np.uint64) for two in other]]  # fmt: skip
    for name, x, y in zip(part.outputs, *results):
        values[name] = jnp.asarray((x + y).view(np.int64) / 2.0**BITS, jnp.float32)


def run_cut(stage, values):
    """Like the whole stage, on a copy of the values; and its steps."""
    values = dict(values)
    shapes = {name: values[name].shape for name in stage.inputs}
    steps = cut(stage, shapes)
    for step in steps:
        run_step(step, values)
    assert {name: values[name].shape for name in stage.outputs} == {name: shapes[name] for name in stage.outputs}
    return values, steps


def products_of_passes(model, weights, **options):
    """Kinds of all products in some passes, each stage of which is compared with the stage cut at them."""
    settings = Settings(**options)
    weights = {**weights, **lookahead.weights(model, weights)}
    values, past, kinds = with_prefix(model, weights, options.pop("prefix", [])), 0, []
    for count, name, rows in inputs_of_passes(PASSES, model, settings, weights["embedding"]):
        values[name] = jnp.asarray(rows)
        for stage in stages_of_pass(model, settings, count, past, prepared=True):
            parted, steps = run_cut(stage, values)
            kinds += [product.kind for step in steps for product in step.products]
            run_stages([stage], values)
            for name in stage.outputs:
                largest = float(jnp.abs(values[name]).max())
                np.testing.assert_allclose(parted[name], values[name], rtol=0, atol=2e-5 * largest, err_msg=stage.name)
                assert largest > 0
        past += count
    return kinds


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_the_stage(variant):
    model = describe(**VARIANTS[variant])
    kinds = products_of_passes(model, random_weights(model), embedding="public")
    # Queries, keys and values, output, scores and mixed values of every layer, and the head.
    joint = sum(lookahead.looks_ahead(model, layer) for layer in range(model.layers))
    assert kinds.count("times_matrix") >= len(PASSES) * (2 * model.layers - joint + 1)
    assert kinds.count("scores") == kinds.count("mix") == len(PASSES) * model.layers


def folded_model(architecture, **options):
    folded = fold(models.make_model(architecture, **options))
    weights = {name: weight.astype(np.float32) for name, weight in folded.weights.items()}
    return msgspec.convert(folded.description, Description), weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_are_the_stage_for_every_architecture(architecture):
    options = {} if ARCHITECTURES[architecture].powers else dict(softmax=models.KERNEL)
    products_of_passes(*folded_model(architecture, **options), embedding="public")


@pytest.mark.parametrize("options", models.VARIANTS.values(), ids=models.VARIANTS)
@pytest.mark.parametrize("architecture", ["SM+LN+G", "SM+RMS+Bilinear", "SM+LeakyR", "SM(t)+ScFuFFN"])
def test_steps_are_the_stage_with_every_option(architecture, options):
    products_of_passes(*folded_model(architecture, **{"softmax": models.KERNEL, **options}), embedding="public")


@pytest.mark.parametrize("architecture", ["SM+RMS+GeGLU", "SM(t)+RMS+G"])
def test_steps_are_the_stage_with_norms_of_branches(architecture):
    options = dict(branch_norm=True, query_key_norm=True, bias="all")
    products_of_passes(*folded_model(architecture, **options), embedding="public")


@pytest.mark.parametrize(
    "options",
    [
        dict(output="top_k", choices=3, logit_bits=2),
        dict(output="argmax"),
        dict(exact_softmax_as="power-3", norm_shifts=(1, -2, 0, 1)),
        dict(logit_bits=1),
    ],
    ids=lambda options: " ".join(options),
)
def test_steps_are_the_stage_under_every_setting(options):
    model = describe(norm="layer", activation="gelu", intermediate_size=40, final_norm="layer")
    products_of_passes(model, random_weights(model), **options)


# --- Stages that the program does not have, yet -----------------------------------------------------------------------

X = np.array([[1.0, -2.0, 3.0]], np.float32)
TABLE = np.array([2.0, 4.0, 8.0], np.float32)
MANY = np.linspace(-3, 3, 5000).astype(np.float32)


def twice(x):
    y = functions.square(x)
    return y, y, y + 1.0


CUSTOM = {
    "a result is an input": (lambda x, y: (y, functions.times(x, y), x), 2),
    "a result is there twice": (twice, 1),
    "a local result is there twice": (lambda x: (x + 1.0, functions.square(x), x + 1.0), 1),
    "nothing to multiply": (lambda x, y: x + 2.0 * y, 2),
    "nothing to compute at all": (lambda x: x, 1),
    "a constant is a result": (lambda x: (functions.square(x), jnp.asarray(TABLE), 3.0), 1),
    "constants inside": (lambda x: functions.square(x + TABLE) * TABLE, 1),
    "a literal is a result": (lambda x: (jnp.float32(2.0), functions.square(x)), 1),
    "unused results": (lambda x, y: (functions.square(x), functions.times(x, y))[0] + jnp.split(x, 3, 1)[1], 2),
    "products of products": (lambda x, y: functions.times(functions.square(x) + y, functions.times(x, y)), 2),
    "an operand twice": (lambda x: functions.times(x, x) + x, 1),
    "a late product of an early value": (lambda x, y: functions.times(functions.square(functions.square(x)), y), 2),
    "many numbers": (lambda x: functions.power(jnp.resize(x, (MANY.size,)) + MANY, 2), 1),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_steps_of_other_stages(name):
    function, count = CUSTOM[name]
    outputs = len(jax.tree_util.tree_leaves(jax.eval_shape(function, *[X] * count)))
    inputs = ("a", "b")[:count]
    stage = Stage("other", 0, function, inputs, tuple(f"result {number}" for number in range(outputs)))
    values = dict(a=jnp.asarray(X), b=jnp.asarray(X[:, ::-1]))
    parted, _ = run_cut(stage, values)
    whole = compiled_results(stage, values)
    for output, expected in zip(stage.outputs, whole):
        np.testing.assert_allclose(parted[output], expected, rtol=1e-5, atol=1e-4)


def compiled_results(stage, values):
    return jax.tree_util.tree_leaves(stage.function(*(values[name] for name in stage.inputs)))


def test_products_that_do_not_wait_are_of_one_step():
    """Two of three squares are independent; what is local is computed as late as it can be, in one run."""
    stage = Stage("other", 0, CUSTOM["products of products"][0], ("a", "b"), ("c",))
    steps = cut(stage, dict(a=(1, 3), b=(1, 3)))
    assert [[product.kind for product in step.products] for step in steps] == [[], ["square", "times"], ["times"]]
    assert [len(step.parts) for step in steps] == [0, 1, 1]
    assert [part.truncations for step in steps for part in step.parts] == [[3 + 3], [3]]


def test_a_result_may_replace_an_input_that_nobody_reads_any_more():
    stage = Stage("other", 0, lambda x, y: functions.times(x, y) + x, ("a", "b"), ("a",))
    parted, _ = run_cut(stage, dict(a=jnp.asarray(X), b=jnp.asarray(X)))
    np.testing.assert_allclose(parted["a"], X * X + X)


def test_a_result_that_would_replace_an_input_too_early_is_refused():
    stage = Stage("other", 0, lambda x, y: (functions.times(x, y), jnp.maximum(x, y)), ("a", "b"), ("a", "c"))
    with pytest.raises(AssertionError, match="other reads a after it was replaced"):
        cut(stage, dict(a=(1, 3), b=(1, 3)))


def test_a_public_operand_is_refused():
    stage = Stage("other", 0, lambda x: functions.times(x, jnp.asarray(X)), ("a",), ("b",))
    with pytest.raises(AssertionError, match="public"):
        cut(stage, dict(a=(1, 3)))


def test_every_part_reads_what_is_there():
    """The first and last stages of a session have no other values than these."""
    model = describe(norm="rms", activation="gelu", intermediate_size=40)
    shapes = {**model.weight_shapes(), "embedded": (4, model.hidden_size)}
    known = set(shapes)
    for stage in stages_of_pass(model, Settings(embedding="public"), 4, 0, prepared=True):
        for step in cut(stage, shapes):
            assert known.issuperset(name for product in step.products for name in product.operands)
            assert known.issuperset(comparison.operand for comparison in step.comparisons)
            known |= {one.result for one in (*step.products, *step.comparisons)}
            for part in step.parts:
                assert known.issuperset(part.inputs)
                known |= set(part.outputs)
        assert known.issuperset(stage.outputs)


def test_an_ordinary_square_is_not_taken_for_another_function():
    """Functions are known by their names; JAX's own functions of such a name have to be the same."""
    assert "square" in BILINEAR
    stage = Stage("other", 0, lambda x: jnp.square(x) + 1.0, ("a",), ("b",))
    parted, _ = run_cut(stage, dict(a=jnp.asarray(X)))
    np.testing.assert_allclose(parted["b"], X * X + 1.0)


def test_compiled_functions_are_shared_by_layers():
    """Both parties trace and compile every stage once, not once a layer."""
    model = describe(layers=3)
    shapes = {**model.weight_shapes(), **lookahead.shapes(model), "embedded": (4, model.hidden_size)}
    first = {}
    for stage in stages_of_pass(model, Settings(embedding="public"), 4, 0, last_rows=4, prepared=True):
        parts = [
            part.equations if isinstance(part, LinearPart) else part.function
            for step in cut(stage, shapes)
            for part in step.parts
        ]
        if stage.layer >= 0:
            kind = stage.name, lookahead.looks_ahead(model, stage.layer)  # the last layer looks ahead at nothing
            assert parts == first.setdefault(kind, parts)
