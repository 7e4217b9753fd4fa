"""Shares in SPU's form: what a party holds is read and made anew as the engine's own."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("spu")

import spu

from entropi.private.compute.engine import Simulation, _runtime_config
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.compute.shares import numbers_of, share_of

X = np.array([[0.0, 1.5, -2.25], [1024.0, -(2.0**-18), 3.0]], np.float32)
WHOLE = np.rint(X.astype(np.float64) * 2**18).astype(np.int64).view(np.uint64)


@pytest.fixture(scope="module")
def io():
    return spu.Io(2, _runtime_config(Settings()))


@pytest.mark.parametrize("owner", [(), (SERVER,), (CLIENT,)])
def test_both_parties_numbers_are_the_value(io, owner):
    """A shared value, and one that one party knows: there the other one's part is nothing."""
    shares = io.make_shares(X, spu.libspu.Visibility.VIS_SECRET, *owner)
    parts = [numbers_of(share, rank) for rank, share in enumerate(shares)]
    assert {part.dtype for part in parts} == {np.dtype(np.uint64)}
    np.testing.assert_array_equal(parts[SERVER] + parts[CLIENT], WHOLE)
    if owner:
        np.testing.assert_array_equal(parts[owner[0]], WHOLE)
    else:
        assert not np.isin(WHOLE[WHOLE > 0], parts).any()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0), (3, 1, 4)])
def test_made_shares_are_read_by_the_engine(io, shape):
    random = np.random.default_rng(1)
    whole = random.integers(-(2**40), 2**40, shape).astype(np.int64)
    mask = random.integers(0, 2**64, shape, dtype=np.uint64)
    parts = [whole.view(np.uint64) - mask if shape else np.uint64(whole.view(np.uint64) - mask), mask]
    shares = [share_of(np.asarray(part)) for part in parts]
    found = io.reconstruct(shares)
    assert found.shape == shape
    np.testing.assert_array_equal(found, (whole / 2.0**18).astype(np.float32))
    for rank, share in enumerate(shares):
        np.testing.assert_array_equal(numbers_of(share, rank), parts[rank])


def test_numbers_need_not_lie_in_order(io):
    """Transposed, reversed and strided arrays, as slices of material are."""
    whole = WHOLE.reshape(2, 3)
    for view in (whole.T, whole[::-1], whole[:, ::2]):
        np.testing.assert_array_equal(numbers_of(share_of(view), SERVER), view)


@pytest.mark.parametrize("sizes", [[48], [8, 40], [16, 16, 16], [3, 45], [1] * 48])
def test_several_chunks_in_any_order(sizes):
    """SPU parts a large share; a chunk says where it belongs, which need not be at a number's beginning."""
    share = share_of(WHOLE)
    content, chunks, place = WHOLE.tobytes(), [], 0
    for size in sizes:
        chunk = spu.libspu.ValueChunk()
        chunk.content, chunk.total_bytes, chunk.chunk_offset = content[place : place + size], len(content), place
        chunks.append(chunk.SerializeToString())
        place += size
    share.share_chunks = chunks[::-1]
    np.testing.assert_array_equal(numbers_of(share, SERVER), WHOLE)


def test_a_missing_chunk_is_seen(io):
    """What no chunk brings would be whatever the memory held before."""
    share = share_of(WHOLE)
    share.share_chunks = []
    with pytest.raises(ValueError, match="a share of 48 bytes came with 0"):
        numbers_of(share, SERVER)


def test_another_form_is_refused(io):
    """A public value is nobody's share, and a bit of a comparison no number modulo 2^64."""
    public = io.make_shares(X, spu.libspu.Visibility.VIS_PUBLIC)[SERVER]
    with pytest.raises(ValueError, match="a share is stored as"):
        numbers_of(public, SERVER)


@pytest.mark.parametrize("known", ["both", "one"])
def test_values_of_a_computation(known):
    """Of what one party knows alone, a part of it or a sum with itself is still known to it alone, and read as such."""
    engine = Simulation("cheetah", Settings())
    engine.hold("x", X, CLIENT)
    engine.hold("y", X, SERVER)

    def function(x, y):
        return (x[:, 1:] + y[:, 1:] if known == "both" else x[:, 1:] + x[:, 1:]) + jnp.float32(0.5)

    engine.run(Stage("sum", 0, function, ("x", "y"), ("z",)))
    shares = [runtime.get_var("z") for runtime in engine._runtimes]
    parts = [numbers_of(share, rank) for rank, share in enumerate(shares)]
    np.testing.assert_array_equal((parts[0] + parts[1]).view(np.int64) / 2.0**18, 2 * X[:, 1:] + 0.5)
    if known == "one":
        assert not parts[SERVER].any()
    for rank, runtime in enumerate(engine._runtimes):
        runtime.set_var("again", share_of(parts[rank]))
    again = [runtime.get_var("again") for runtime in engine._runtimes]
    np.testing.assert_array_equal(engine.reveal("z"), engine._io.reconstruct(again))
