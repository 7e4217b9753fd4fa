"""Prices: read, written, solved for and measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("jax")

from cost_shapes import SMALL
from entropi.cli import main
from entropi.costs.calibration import Calibration, Price, read, shipped, solve, write
from entropi.costs.network import NETWORKS
from entropi.costs.prediction import CostModel, Options
from entropi.errors import UserError


def test_prices_are_read_as_they_were_written(tmp_path: Path):
    calibration = shipped("cheetah")
    write(calibration, tmp_path / "prices.json")
    assert read((tmp_path / "prices.json").read_bytes(), "prices.json") == calibration
    for damaged in (b"", b"{}", b'{"format": 2}', b"\xff"):
        with pytest.raises(UserError, match=r"prices\.json is no calibration"):
            read(damaged, "prices.json")
    incomplete = msgspec.structs.replace(calibration, prices={"rotations": Price(1, 1, 1, 1)})
    with pytest.raises(UserError, match="has no price for"):
        CostModel(incomplete, NETWORKS["lan"], Options()).predict(SMALL, 8)


def test_prices_are_found_where_they_explain_everything():
    from collections import Counter

    from entropi.costs.calibration import Reading

    true = {"call": 10.0, "number": 0.25, "unused": 0.0}
    readings = [
        Reading("x", Counter(call=1, number=n, unused=n % 3), round(10 + 0.25 * n), 0, 0.0) for n in (4, 40, 4000, 80)
    ]
    found = solve(readings, [reading.bytes for reading in readings], list(true))
    assert found == pytest.approx(true, abs=1e-6)


def test_shipped_prices_are_of_the_engine_s_protocols():
    for protocol in ("cheetah", "semi2k", "aby3"):
        calibration: Calibration = shipped(protocol)
        assert calibration.protocol == protocol
        assert calibration.machine
        assert all(value >= 0 for price in calibration.prices.values() for value in msgspec.structs.astuple(price))


@pytest.mark.slow
def test_a_calibration_finds_the_shipped_bytes_and_messages(tmp_path: Path):
    pytest.importorskip("spu")
    assert main(["cost", "--protocol", "semi2k", "--calibrate", str(tmp_path / "prices.json")]) == 0
    found, known = read((tmp_path / "prices.json").read_bytes(), "prices.json"), shipped("semi2k")
    assert found.prices.keys() == known.prices.keys()
    for name, price in known.prices.items():
        assert found.prices[name].bytes == pytest.approx(price.bytes, rel=0.01, abs=0.01), name
        assert found.prices[name].messages == pytest.approx(price.messages, rel=0.01, abs=0.01), name
    record = CostModel(found, NETWORKS["lan"], Options(embedding="public")).predict(SMALL, 16)
    assert record.calibrated_on == found.machine
