"""Random numbers and their products, made by both parties on an ideal engine for whole numbers: exact, in pieces."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("spu")

from entropi.private.compute import functions
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation import dealing
from entropi.private.preparation.dealing import deal
from entropi.private.preparation.material import Need, array_name, joined
from entropi.private.preparation.products import multiply, packed_size
from masked_passes import IdealEngine, chi_square

NEEDS = {
    need.name: need
    for need in (
        Need("0.up", "times_matrix", "server", ((5, 7), (7, 11)), (5, 11), "0.up"),
        Need("1.up", "times_matrix", "server", ((131, 3), (3, 5)), (131, 5), "1.up"),
        Need("embedding", "times_table", "server", ((9, 30), (30, 4)), (9, 4), "embedding"),
        Need("0.scores", "scores", "pair", ((4, 5, 3), (2, 5, 3)), (4, packed_size(5))),
        Need("0.mix", "mix", "pair", ((4, packed_size(5)), (2, 5, 3)), (4, 5, 3)),
        Need("times", "times", "pair", ((300,), (300,)), (300,)),
        Need("scale_rows.3", "scale_rows", "pair", ((259, 3), (259,)), (259, 3)),
        Need("square", "square", "self", ((300,), (300,)), (300,)),
        Need("sums_of_squares.3", "sums_of_squares", "self", ((259, 3), (259, 3)), (259,)),
    )
}


class WholeNumbers(IdealEngine):
    """An engine whose values are whole numbers modulo 2^64."""

    def hold_whole(self, name, shape, value):
        assert value is None or value.shape == shape
        self.shares[name] = np.zeros(shape, np.uint64) if value is None else value.view(np.uint64)

    def value(self, name):
        assert jax.config.jax_enable_x64
        return jnp.asarray((self.shares[name] + self.other.shares[name]).view(np.int64))

    def drop(self, name):
        del self.shares[name]

    def results(self, stage):
        result = stage.function(*map(self.value, stage.inputs))
        assert result.dtype == jnp.int64
        return [np.asarray(result).view(np.uint64)]


def both(need, matrix=None):
    """Both parties' arrays, and in how many pieces they came."""
    engines = WholeNumbers.pair(0, np.random.default_rng(3))
    found, failures = [None, None], []

    def party(engine):
        pieces = []
        try:
            for piece, cost in deal(engine, need, matrix if engine.rank == SERVER else None):
                assert not jax.config.jax_enable_x64  # or what runs between pieces would be traced otherwise
                assert not engine.shares  # nothing is left in the engine
                assert cost.name == need.name
                pieces.append(piece)
        except BaseException as error:
            failures.append(error)
            engine.barrier.abort()
        found[engine.rank] = joined(need, pieces), len(pieces)

    threads = [threading.Thread(target=party, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failures:
        raise error
    return found


def check(need):
    matrix = None
    if need.matrix:
        matrix = np.random.default_rng(1).integers(-(2**31), 2**31, need.shapes[1]).astype(np.int32)
    (server, pieces), (client, same) = both(need, matrix)
    assert pieces == same

    def whole(which):
        parts = [
            arrays[array_name(need.name, which)]
            for arrays in (server, client)
            if array_name(need.name, which) in arrays
        ]
        assert len(parts) == (1 if need.matrix and which == "a" else 2)
        return sum(parts, start=np.uint64(0))

    a, c = whole("a"), whole("c")
    b = {"server": lambda: matrix.astype(np.int64).view(np.uint64), "self": lambda: a, "pair": lambda: whole("b")}
    assert c.shape == need.result
    assert a.shape == need.shapes[0]
    np.testing.assert_array_equal(c, multiply(need.kind, a, b[need.masking]()))
    assert (array_name(need.name, "b") in client) == (need.masking == "pair")
    assert (array_name(need.name, "a") in server) == (need.matrix is None)
    return pieces


@pytest.mark.parametrize("name", NEEDS)
def test_products_of_random_numbers(name):
    assert check(NEEDS[name]) == 1


@pytest.mark.parametrize("name", NEEDS)
def test_in_pieces(name, monkeypatch):
    """Rows for a matrix, as a power of two, and for the token table; and rows of a pool in whole blocks of products."""
    monkeypatch.setattr(functions, "table_blocks", lambda rows, entries, width: (4, entries))
    monkeypatch.setattr(dealing, "POOL_STEP", 400)
    monkeypatch.setattr(functions, "POLYNOMIALS", 1)
    monkeypatch.setattr(functions, "CIPHERTEXT", 800)
    pieces = check(NEEDS[name])
    assert pieces == {"0.up": 1, "1.up": 5, "0.scores": 1, "0.mix": 1, "times": 1, "square": 1}.get(name, 3)


def test_nothing_is_drawn_twice():
    need = NEEDS["times"]
    masks = [array_name(need.name, which) for which in ("a", "b")]
    joint = np.concatenate([arrays[name] for _ in range(2) for arrays, _ in both(need) for name in masks])
    assert len(joint) == 2 * 2 * 2 * need.rows
    assert len(np.unique(joint)) == len(joint)
    assert chi_square(joint) < 400


@pytest.mark.parametrize(("rank", "matrix"), [(SERVER, None), (CLIENT, np.ones((7, 11), np.int32))])
def test_the_matrix_is_the_servers(rank, matrix):
    with pytest.raises(AssertionError):
        next(deal(WholeNumbers.pair(0, None)[rank], NEEDS["0.up"], matrix))
