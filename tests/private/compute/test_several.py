"""Several prompts in one pass: each prompt's logits are those it has alone, whatever the lengths, and who leaves."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from entropi.private.compute import several  # noqa: E402
from entropi.private.compute.embedding import one_hot  # noqa: E402
from entropi.private.compute.layout import Layout  # noqa: E402
from entropi.private.compute.prefix import with_prefix  # noqa: E402
from entropi.private.compute.program import forward, keep_prompts, run_stages, stages_of_pass  # noqa: E402
from entropi.private.compute.settings import CLIENT, SERVER, Settings  # noqa: E402
from private_reference import VARIANTS, describe, random_weights, reference_logits  # noqa: E402

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]
PREFIX = [7, 9]


@pytest.fixture
def _double_precision():
    with jax.experimental.enable_x64():
        yield


def logits_together(model, weights, prompts, passes, leaving=None, prefix=0, **options):
    """Logits `(B, V)` of each of greedy passes over the prompts; `leaving` are gone after the first."""
    values, found = dict(weights), []
    layout, fresh = Layout.first([len(prompt) for prompt in prompts], prefix), np.concatenate(prompts)
    for number in range(passes):
        values["embedded"] = weights["embedding"][fresh[layout.last_rows_last()]]
        stages = forward(model, layout.tokens, layout.before, "power-5", embedding="public", layout=layout, **options)
        run_stages(stages, values, exact=True)
        rows = np.asarray(values["logits"])
        found.append(rows)
        fresh = rows.argmax(axis=1)
        if leaving is not None and not number:
            staying = [place for place in range(len(prompts)) if place != leaving]
            run_stages([keep_prompts(model, layout, staying)], values)
            layout, fresh = layout.of(staying), fresh[staying]
        layout = layout.following()
    return found


def assert_as_alone(model, weights, prompts, found, leaving=None, prefix=()):
    """What came out is, by prompt and pass, what the layer equations say of it alone."""
    ids, staying = [[*prefix, *prompt] for prompt in prompts], list(range(len(prompts)))
    for number, rows in enumerate(found):
        assert len(rows) == len(staying)
        for prompt, row in zip(staying, rows):
            expected = reference_logits(model, weights, ids[prompt])
            np.testing.assert_allclose(row, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
            ids[prompt].append(int(row.argmax()))
        staying = [prompt for prompt in staying if number or prompt != leaving]


@pytest.mark.usefixtures("_double_precision")
@pytest.mark.parametrize(
    "variant", ["temperature", "length", "polynomial", "powers", pytest.param("gemma3", marks=pytest.mark.slow)]
)
def test_each_prompt_has_the_logits_that_it_has_alone(variant, monkeypatch):
    """Learned and rotary positions, grouped heads, lengths that differ, a prefix, one that leaves; joined and apart."""
    changes = {"layers": 2} | ({"rotary_layers": [1, 0]} if variant == "gemma3" else {})
    model = describe(**{**VARIANTS[variant], **changes})
    weights = random_weights(model, dtype=np.float64)
    assert_as_alone(model, weights, PROMPTS, logits_together(model, weights, PROMPTS, 1))
    known = with_prefix(model, weights, PREFIX)
    monkeypatch.setattr(several, "_at_best", lambda *sizes: float("inf") if variant != "length" else 0.0)
    found = logits_together(model, known, PROMPTS, 3, leaving=0, prefix=len(PREFIX))
    assert_as_alone(model, weights, PROMPTS, found, leaving=0, prefix=PREFIX)


@pytest.mark.usefixtures("_double_precision")
@pytest.mark.parametrize("size", [(3, 2), (1, 4), (5, 1), (12, 1), (1, 1)], ids=str)
def test_blocks_are_multiplied_together(size, monkeypatch):
    """With zeros in the others' columns, side by side, and with a rest that does not fill a product."""
    monkeypatch.setattr(several, "_at_once", lambda *sizes: size)
    random = np.random.default_rng(0)
    left, right = (jax.numpy.asarray(random.normal(size=shape)) for shape in ((12, 2, 3), (12, 3, 4)))
    np.testing.assert_allclose(several.product_of_blocks(left, right), left @ right, atol=1e-12)


@pytest.mark.parametrize("output", ["top_k", "argmax"])
def test_likeliest_tokens_of_each_prompt_in_fixed_point(output):
    """The engine's own numbers, a private table whose rows are read in pairs, and the likeliest tokens of each."""
    pytest.importorskip("spu")
    from entropi.private.compute.engine import Simulation

    settings = Settings(output=output, choices=3, paired=True)
    model = describe(**{**VARIANTS["polynomial"], "layers": 1})
    weights = random_weights(model)
    engine = Simulation("ref2k", settings)
    for name, weight in weights.items():
        engine.hold(name, weight, SERVER)
    layout = Layout.first([len(prompt) for prompt in PROMPTS], 0)
    ids = np.concatenate(PROMPTS)[layout.last_rows_last()].tolist()
    engine.hold("tokens", one_hot(ids, model.vocab_size, True, settings.fraction_bits), CLIENT)
    for stage in stages_of_pass(model, settings, layout.tokens, 0, layout=layout):
        engine.run(stage)
    found = np.rint(engine.reveal("tokens_out")).astype(int)
    expected = [reference_logits(model, weights, prompt) for prompt in PROMPTS]
    likeliest = [np.argsort(-logits)[:3].tolist() for logits in expected]
    if output == "argmax":
        assert found.tolist() == [one[0] for one in likeliest]
        return
    assert found.tolist() == likeliest
    np.testing.assert_allclose(engine.reveal("logits_out"), [-np.sort(-one)[:3] for one in expected], atol=0.01)


def test_places_of_a_pass():
    """Two prompts of three and one tokens behind a prefix of two: last rows last, keys by prompt."""
    layout = Layout.first([3, 1], 2)
    assert (layout.tokens, layout.before, layout.keys) == (4, 2, 6)
    assert layout.last_rows_last().tolist() == [0, 1, 2, 3]
    assert Layout.first([2, 3], 0).last_rows_last().tolist() == [0, 2, 3, 1, 4]
    assert Layout.first([2, 3], 0).by_prompt().tolist() == [0, 3, 1, 2, 4]
    assert layout.positions().tolist() == [2, 3, 4, 2]
    assert layout.seen(2).tolist() == [5, 3]
    following = layout.following()
    assert following.joined().tolist() == [0, 1, 2, 3, 4, 6, 5, 7]
    assert following.keys_of(1).tolist() == [0, 1, 6, 7]
    assert following.kept([1]).tolist() == [0, 1, 6, 7]
    assert following.of([1]) == Layout((1,), (1,), 2)
