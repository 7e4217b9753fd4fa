"""Several prompts in one pass: each prompt's logits are those it has alone, whatever the lengths, and who leaves."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from entropi.private.compute import several  # noqa: E402
from entropi.private.compute.layout import Layout  # noqa: E402
from entropi.private.compute.prefix import with_prefix  # noqa: E402
from entropi.private.compute.program import forward, keep_prompts, run_stages  # noqa: E402
from private_reference import VARIANTS, describe, random_weights, reference_logits  # noqa: E402

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]
PREFIX = [7, 9]


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.experimental.enable_x64():
        yield


def logits_together(model, weights, prompts, passes, leaving=None, prefix=0, **options):
    """Logits `(B, V)` of each of greedy passes over the prompts; `leaving` are gone after the first."""
    values, found = dict(weights), []
    layout, fresh = Layout.first([len(prompt) for prompt in prompts], prefix), np.concatenate(prompts)
    for number in range(passes):
        values["embedded"] = weights["embedding"][fresh[layout.last_rows_last()]]
        stages = forward(
            model, layout.tokens, layout.before, "power-5", embedding="public", layout=layout, **options
        )
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


@pytest.mark.parametrize("variant", ["temperature", "length", "polynomial", "powers", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_each_prompt_has_the_logits_that_it_has_alone(variant, monkeypatch):
    """Learned and rotary positions, grouped heads; lengths that differ; a prefix; one that leaves; both ways to multiply."""
    changes = {"layers": 2} | ({"rotary_layers": [1, 0]} if variant == "gemma3" else {})
    model = describe(**{**VARIANTS[variant], **changes})
    weights = random_weights(model, dtype=np.float64)
    assert_as_alone(model, weights, PROMPTS, logits_together(model, weights, PROMPTS, 1))
    known = with_prefix(model, weights, PREFIX)
    monkeypatch.setattr(several, "_at_best", lambda *sizes: float("inf") if variant != "length" else 0.0)
    found = logits_together(model, known, PROMPTS, 3, leaving=0, prefix=len(PREFIX))
    assert_as_alone(model, weights, PROMPTS, found, leaving=0, prefix=PREFIX)


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
