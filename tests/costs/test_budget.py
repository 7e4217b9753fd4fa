"""What fits a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("jax")

from cost_shapes import SMALL
from entropi.costs import budget, tables
from entropi.costs.budget import parse_budget, search
from entropi.costs.calibration import shipped
from entropi.costs.network import NETWORKS
from entropi.costs.prediction import CostModel, Options
from entropi.errors import UserError


def test_budgets():
    assert parse_budget("2GB").limit == 2e9
    assert parse_budget("1.5 min").limit == 90
    for wrong in ("2", "GB", "0MB", "2TB"):
        with pytest.raises(UserError, match="is no budget"):
            parse_budget(wrong)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> CostModel:
    """A small search under cheap prices."""
    monkeypatch.setattr(budget, "WIDTHS", (64, 128))
    monkeypatch.setattr(budget, "DEPTHS", (2, 3, 4, 6))
    return CostModel(shipped("semi2k"), NETWORKS["lan"], Options(embedding="public"))


def test_the_deepest_that_fits_of_every_width(few: CostModel):
    limit = parse_budget("150MB")
    found = search(limit, SMALL, 32, few).fitting
    assert found
    assert [one.parameters for one in found] == sorted((one.parameters for one in found), reverse=True)
    for one in found:
        assert one.prediction.prompt.bytes <= limit.limit
        deeper = [depth for depth in budget.DEPTHS if depth > one.shape.num_hidden_layers]
        if deeper:  # the next depth does not fit
            more = few.predict(replace(one.shape, num_hidden_layers=deeper[0]), 32)
            assert more.prompt.bytes > limit.limit


@pytest.mark.parametrize("text", ["1MB", "1s"])
def test_the_cheapest_is_told_where_nothing_fits(few: CostModel, text: str, capsys: pytest.CaptureFixture[str]):
    limit = parse_budget(text)
    found = search(limit, SMALL, 32, replace(few, network=NETWORKS["wan"]))
    assert found.fitting == []
    everything = [
        replace(few, network=NETWORKS["wan"]).predict(
            replace(
                SMALL,
                architecture=architecture,
                hidden_size=width,
                intermediate_size=4 * width,
                num_attention_heads=width // 64,
                num_key_value_heads=width // 64,
            ),
            32,
        )
        for architecture in budget.SEARCHED
        for width in budget.WIDTHS
    ]
    assert found.cheapest.shape.num_hidden_layers == 2
    assert limit.measure(found.cheapest.prediction) == min(map(limit.measure, everything))

    tables.show_search(found, text, 32)
    shown = capsys.readouterr().out
    assert f"within {text}; the cheapest is {found.cheapest.shape.architecture} with 2 layers of width 64: " in shown
    assert f"{found.cheapest.prediction.prompt.bytes / 1e6:.1f} MB" in shown
