"""The paper's figures, and what would help."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("jax")

from cost_shapes import SMALL
from entropi.costs import advice
from entropi.costs.prediction import CostModel
from entropi.model.shape import Shape


def test_what_would_help_really_saves():
    costs = CostModel.shipped()
    shape = replace(SMALL, hidden_size=128)
    now = costs.predict(shape, 48)
    found = advice.changes(shape, 48, costs, now)
    assert [change.saved_bytes for change in found] == sorted((c.saved_bytes for c in found), reverse=True)
    words = " ".join(change.words for change in found)
    assert "softmax only" in words
    assert "ReLU in place of GELU" in words
    relu = costs.predict(replace(shape, architecture="SM+LN+R"), 48)
    saved = next(change.saved_bytes for change in found if "ReLU" in change.words)
    assert saved == pytest.approx(now.prompt.bytes - relu.prompt.bytes)


def test_the_paper_s_figures_stand_beside_its_configurations():
    assert advice.paper_figures(Shape(architecture="SM+LN+G"), 128) == (25.32, 8.21)
    assert advice.paper_figures(Shape(architecture="SM+LN+R", num_hidden_layers=18), 128) == (13.34, 8.04)
    assert advice.paper_figures(Shape(architecture="SM+LN+G", hidden_size=1024, num_attention_heads=16), 128) is None
