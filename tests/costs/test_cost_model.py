"""Networks, and what a prediction says whatever its prices."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("jax")

from cost_shapes import SMALL
from entropi.costs.calibration import shipped
from entropi.costs.network import Network, parse_network
from entropi.costs.prediction import CostModel, Options
from entropi.errors import UserError


def test_networks():
    assert parse_network("lan").bits_per_second == 1e9
    assert parse_network("300Mbps, 20 ms") == Network("300Mbps, 20 ms", 300e6, 0.01)
    assert parse_network("2Gbit/s,1ms").bits_per_second == 2e9
    for wrong in ("", "100Mbps", "0Mbps,1ms", "1.2.3Mbps,1ms", "100,20"):
        with pytest.raises(UserError, match="is no network"):
            parse_network(wrong)


def test_latency_is_computing_and_rounds_and_carriage():
    line = Network("test", 1e8, 0.04)
    record = CostModel(shipped("cheetah"), line, Options()).predict(SMALL, 16)
    for part in (record.set_up, record.prompt, record.further):
        least = part.seconds + 0.04 * part.rounds
        assert least < part.latency <= least + 8 * part.bytes / 1e8 + 1e-9
    everywhere = CostModel(shipped("cheetah"), Network("none", math.inf, 0.0), Options()).predict(SMALL, 16)
    assert everywhere.prompt.latency == pytest.approx(everywhere.prompt.seconds)


def test_the_public_function_counts_and_predicts():
    import entropi

    found = entropi.cost(entropi.EntropiConfig(architecture="SM+LN+R"), 128, network="lan")
    assert (found.counts.ffn_flops, found.counts.folded, found.folded.folded) == (14_495_514_624, False, True)
    assert found.prediction.network.startswith("lan")
    assert found.prediction.seq_len == 128


def test_a_further_token_costs_less_and_is_left_out_at_the_end():
    costs = CostModel.shipped(network="lan")
    record = costs.predict(SMALL, 63)
    assert record.further is not None
    assert record.further.bytes < record.prompt.bytes
    assert costs.predict(SMALL, 64).further is None
    with pytest.raises(UserError, match="64 positions"):
        costs.predict(SMALL, 65)
