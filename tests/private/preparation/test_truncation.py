"""Truncating with prepared bits: right in the mean, in all of the range, and nothing but masked bits is sent."""

import numpy as np
import pytest

pytest.importorskip("jax")

from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.material import TRUNCATE, array_name, of_truncations
from entropi.private.preparation.ring import uniform
from entropi.private.preparation.truncation import (
    TruncationMasks,
    masked_signs,
    packed,
    packed_shapes,
    truncated,
    unpacked,
)
from masked_passes import ideal_truncations

EDGES = [0, 1, 2**18 - 1, 2**18, 2**40, 2**61, 2**62 - 1]
VALUES = np.array([sign * edge for edge in EDGES for sign in (1, -1)] + [-(2**62)], np.int64)


def both(values, bits, seed=0):
    """What is sent of the values, and their shares afterwards."""
    random = np.random.default_rng(seed)
    client = uniform(values.shape)
    shares = values.view(np.uint64) - client, client
    names = [array_name(TRUNCATE, which) for which in ("a", "c")]
    dealt = ideal_truncations(values.size, bits, random)
    masks = [unpacked(*(one[name] for name in names), values.size) for one in dealt]
    sides = [(share, mask, rank == SERVER) for rank, (share, mask) in enumerate(zip(shares, masks))]
    signs = [masked_signs(share, mask, server=server) for share, mask, server in sides]
    results = [
        truncated(share, signs[rank], signs[1 - rank], mask, bits, server=server)
        for rank, (share, mask, server) in enumerate(sides)
    ]
    return shares, masks, signs, results


@pytest.mark.parametrize("bits", [8, 16, 18, 20, 31])
def test_results_are_rounded_down_or_up(bits):
    many = np.random.default_rng(1).integers(-(2**62), 2**62, 20_000)
    values = np.concatenate([np.tile(VALUES, 50), many, many >> 30, many >> 50])
    *_, (server, client) = both(values, bits)
    wrong = (server + client).view(np.int64) - (values >> bits)
    assert set(np.unique(wrong)) == {0, 1}


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_nothing_is_lost_in_the_mean(part):
    """Whatever a number has below the last place: results are the next ones, by their distance."""
    low, count = int(part * 2**18), 100_000
    values = np.full(count, (5 << 18) + low, np.int64)
    *_, (server, client) = both(values, 18)
    error = (server + client).view(np.int64) - values / 2**18
    assert abs(error.mean()) < 5 * (part * (1 - part) / count) ** 0.5
    *_, (server, client) = both(np.zeros(count, np.int64), 18)
    assert np.count_nonzero(server + client) < 10  # one in 2^18 has a share that ends in zeros


def test_values_outside_the_range_are_not_truncated():
    """So the range is what the test before says, and no more."""
    values = np.full(64, 2**62 + 2**61, np.int64)
    *_, (server, client) = both(values, 18)
    wrong = np.abs((server + client).view(np.int64) - (values >> 18))
    assert (wrong > 2**40).any()


def test_what_is_sent_are_the_shares_highest_bits_under_random_ones():
    values = np.random.default_rng(2).integers(-(2**40), 2**40, 5_000)
    shares, masks, signs, _ = both(values, 18)
    for rank, (share, mask, sent) in enumerate(zip(shares, masks, signs)):
        moved = share + np.uint64(2**62) if rank == SERVER else share
        np.testing.assert_array_equal(sent ^ mask.bits, (moved >= 2**63).astype(np.uint8))
        assert abs(sent.mean() - 0.5) < 0.04


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_packing(count):
    random = np.random.default_rng(count)
    bits, products = random.integers(0, 2, count, np.uint8), random.integers(0, 2**18, count, np.uint32)
    words, halves = packed(bits, products)
    assert (words.shape, halves.shape) == packed_shapes(count)
    assert words.dtype == halves.dtype == np.uint64
    back = unpacked(words, halves, count)
    assert isinstance(back, TruncationMasks)
    np.testing.assert_array_equal(back.bits, bits)
    np.testing.assert_array_equal(back.products, products)
    assert of_truncations(count).kept(CLIENT) == {"truncate a": words.shape, "truncate c": halves.shape}
