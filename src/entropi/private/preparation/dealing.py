"""Computing the random numbers of a session under the engine's own protocols, before anything is known of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import enable_x64

from entropi.private.compute import attention, functions
from entropi.private.compute.engine import Engine
from entropi.private.compute.functions import CIPHERTEXT, POLYNOMIALS
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.material import Need, pool_of_need
from entropi.private.preparation.ring import Ring, uniform
from entropi.records import StageCommunication

POOL_STEP = 1 << 20  # numbers that are multiplied at a time
_BLOCK = 128  # rows whose squares are summed by one product


def deal(
    engine: Engine, need: Need, matrix: np.ndarray | None = None
) -> Iterator[tuple[dict[str, Ring], StageCommunication]]:
    """This party's share of the random numbers of `need`, in step with the other party.

    In pieces: arrays of the same name follow each other, along the last axis for a matrix and along the first otherwise.

    Args:
        matrix: the server's weight as whole numbers, where there is one; None at the client.
    """
    with enable_x64():
        if need.masking == "server":
            yield from _of_matrix(engine, need, matrix)
        elif pool_of_need(need):
            yield from _of_pool(engine, need)
        else:
            function = getattr(attention, need.kind)
            options = {"rows": need.result[1]} if need.kind == "mix" else {}
            yield _of_pair(engine, need, need.shapes, lambda x, y: function(x, y, **options))


def _of_matrix(
    engine: Engine, need: Need, matrix: np.ndarray | None
) -> Iterator[tuple[dict[str, Ring], StageCommunication]]:
    """The client's rows times the server's matrix, as many columns at a time as memory holds."""
    (rows, inner), (_, columns) = need.shapes
    assert (matrix is not None) == (engine.rank == SERVER)
    drawn = uniform((rows, inner)) if engine.rank == CLIENT else None
    engine.hold_whole("mask", (rows, inner), drawn)
    step = max(POLYNOMIALS * CIPHERTEXT // (min(rows, _BLOCK) * inner), 1)
    for start in range(0, columns, step):
        width = min(step, columns - start)
        piece = None if matrix is None else matrix[:, start : start + width].astype(np.int64)
        engine.hold_whole("matrix", (inner, width), piece)
        stage = Stage(need.name, -1, functions.times_matrix, ("mask", "matrix"), ("product",))
        cost = engine.run(stage, 0)
        parts = {f"{need.name} c": engine.numbers("product")}
        if drawn is not None and not start:
            parts[f"{need.name} a"] = drawn
        yield parts, cost


def _of_pool(engine: Engine, need: Need) -> Iterator[tuple[dict[str, Ring], StageCommunication]]:
    """Numbers, or rows of them, and their products."""
    each = int(np.prod(need.shapes[0][1:], dtype=np.int64))
    step = max(POOL_STEP // each // _BLOCK, 1) * _BLOCK
    for start in range(0, need.shapes[0][0], step):
        count = min(step, need.shapes[0][0] - start)
        shapes = (count, *need.shapes[0][1:]), (count, *need.shapes[1][1:])
        if need.masking == "self":
            yield _of_squares(engine, need, shapes[0])
        else:
            yield _of_pair(engine, need, shapes, getattr(functions, need.kind))


def _of_pair(
    engine: Engine, need: Need, shapes: tuple[tuple[int, ...], ...], function: Callable[..., Any]
) -> tuple[dict[str, Ring], StageCommunication]:
    """Random operands of which each party draws a share, and the shares of their product."""
    a, b = uniform(shapes[0]), uniform(shapes[1])
    for name, drawn in (("a", a), ("b", b)):
        for rank in (SERVER, CLIENT):
            engine.hold_whole(f"{name} {rank}", drawn.shape, drawn if rank == engine.rank else None)

    def product(x: Array, y: Array, u: Array, v: Array) -> Any:
        return function(x + y, u + v)

    cost = engine.run(Stage(need.name, -1, product, ("a 0", "a 1", "b 0", "b 1"), ("product",)), 0)
    return {f"{need.name} a": a, f"{need.name} b": b, f"{need.name} c": engine.numbers("product")}, cost


def _of_squares(engine: Engine, need: Need, shape: tuple[int, ...]) -> tuple[dict[str, Ring], StageCommunication]:
    """Random numbers and shares of their squares, or of the sums of their rows' squares.

    (x + y)^2 = x^2 + 2 x y + y^2, x the client's and y the server's: only x y takes communication.
    """
    drawn = uniform(shape)
    for rank in (SERVER, CLIENT):
        engine.hold_whole(f"a {rank}", shape, drawn if rank == engine.rank else None)
    sums = need.kind == "sums_of_squares"
    function = _diagonal if sums else jax.lax.mul
    cost = engine.run(Stage(need.name, -1, function, ("a 0", "a 1"), ("product",)), 0)
    own = drawn * drawn
    mixed = engine.numbers("product") * np.uint64(2)
    squares: Ring = (own.sum(axis=-1, dtype=np.uint64) if sums else own) + mixed
    return {f"{need.name} a": drawn, f"{need.name} c": squares}, cost


def _diagonal(x: Array, y: Array) -> Array:
    """Products of the rows of two matrices `(n, d)`, `(n,)`, as diagonals of matrix products."""
    parts = []
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK] @ y[start : start + _BLOCK].T
        parts.append(block.reshape(-1)[:: len(block) + 1])
    return jnp.concatenate(parts)
