"""Computing the random numbers of a session under the engine's own protocols, before its prompt is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import enable_x64

from entropi.private.compute import functions
from entropi.private.compute.engine import Engine
from entropi.private.compute.functions import BILINEAR, CIPHERTEXT, POLYNOMIALS
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.cutting import Shape
from entropi.private.preparation.material import Need, array_name
from entropi.private.preparation.ring import Ring, uniform
from entropi.records import StageCommunication

Piece: TypeAlias = tuple[dict[str, Ring], StageCommunication]  # named arrays, and what the engine's run of them cost

POOL_STEP = 1 << 20  # numbers that are multiplied at a time
_BLOCK = 128  # rows whose squares are summed by one product


def deal(engine: Engine, need: Need, matrix: np.ndarray | None = None) -> Iterator[Piece]:
    """This party's share of the random numbers of `need`, in step with the other party, in pieces: see `joined`.

    Products of whole numbers are the engine's, and not truncated. It may be wrong by one in the last of 64 digits, as
    it may with any product, but has not been in 60,000 of all kinds with operands from all of the ring. A value would
    move by 2^-36, with 18 fraction bits.

    Args:
        matrix: the server's weight as whole numbers, where there is one; None at the client.
    """
    if need.masking == "server":
        yield from _of_matrix(engine, need, matrix)
    elif need.pooled:
        yield from _of_pool(engine, need)
    else:
        function = BILINEAR[need.kind]
        if need.kind == "mix":
            function = partial(function, rows=need.rows)
        yield _of_pair(engine, need, need.shapes, function)


def _of_matrix(engine: Engine, need: Need, matrix: np.ndarray | None) -> Iterator[Piece]:
    """The client's rows times the server's matrix, as many columns at a time as memory holds."""
    (rows, inner), (_, columns) = need.shapes
    assert (matrix is not None) == (engine.rank == SERVER)
    drawn = uniform((rows, inner)) if engine.rank == CLIENT else None
    step = max(POLYNOMIALS * CIPHERTEXT // (min(rows, _BLOCK) * inner), 1)
    for start in range(0, columns, step):
        width = min(step, columns - start)
        piece = None if matrix is None else matrix[:, start : start + width].astype(np.int64)
        held = {"mask": ((rows, inner), drawn), "matrix": ((inner, width), piece)}
        product, cost = _product(engine, need, functions.times_matrix, held)
        arrays = {array_name(need.name, "c"): product}
        if drawn is not None and not start:
            arrays[array_name(need.name, "a")] = drawn
        yield arrays, cost


def _of_pool(engine: Engine, need: Need) -> Iterator[Piece]:
    """Numbers, or rows of them, and their products."""
    each = int(np.prod(need.shapes[0][1:], dtype=np.int64))
    step = max(POOL_STEP // each // _BLOCK, 1) * _BLOCK
    for start in range(0, need.rows, step):
        count = min(step, need.rows - start)
        shapes = (count, *need.shapes[0][1:]), (count, *need.shapes[1][1:])
        if need.masking == "self":
            yield _of_squares(engine, need, shapes[0])
        else:
            yield _of_pair(engine, need, shapes, BILINEAR[need.kind])


def _of_pair(engine: Engine, need: Need, shapes: tuple[Shape, Shape], function: Callable[..., Any]) -> Piece:
    """Random operands of which each party draws a share, and the shares of their product."""
    a, b = uniform(shapes[0]), uniform(shapes[1])

    def product(x: Array, y: Array, u: Array, v: Array) -> Any:
        return function(x + y, u + v)

    held = {**_of_both(engine, "a", a), **_of_both(engine, "b", b)}
    c, cost = _product(engine, need, product, held)
    return {array_name(need.name, "a"): a, array_name(need.name, "b"): b, array_name(need.name, "c"): c}, cost


def _of_squares(engine: Engine, need: Need, shape: Shape) -> Piece:
    """Random numbers and shares of their squares, or of the sums of their rows' squares.

    (x + y)^2 = x^2 + 2 x y + y^2, x the one party's and y the other's: only x y takes communication.
    """
    drawn = uniform(shape)
    sums = need.kind == "sums_of_squares"
    mixed, cost = _product(engine, need, _diagonal if sums else jax.lax.mul, _of_both(engine, "a", drawn))
    own = drawn * drawn
    squares: Ring = (own.sum(axis=-1, dtype=np.uint64) if sums else own) + mixed * np.uint64(2)
    return {array_name(need.name, "a"): drawn, array_name(need.name, "c"): squares}, cost


def _of_both(engine: Engine, name: str, drawn: Ring) -> dict[str, tuple[Shape, Ring | None]]:
    """What each party has drawn of some numbers, as two values."""
    return {f"{name} {rank}": (drawn.shape, drawn if rank == engine.rank else None) for rank in (SERVER, CLIENT)}


def _product(
    engine: Engine, need: Need, function: Callable[..., Any], held: Mapping[str, tuple[Shape, np.ndarray | None]]
) -> tuple[Ring, StageCommunication]:
    """This party's share of a function of whole numbers, each of which one party passes."""
    for name, (shape, value) in held.items():
        engine.hold_whole(name, shape, value)
    with enable_x64():  # here alone: between pieces others trace what they like
        cost = engine.run(Stage(need.name, -1, function, tuple(held), ("product",)), 0)
    product = engine.numbers("product")
    for name in (*held, "product"):
        engine.drop(name)
    return product, cost


def _diagonal(x: Array, y: Array) -> Array:
    """Products of the rows of two matrices `(n, d)`, `(n,)`, as diagonals of matrix products."""
    parts = []
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK] @ y[start : start + _BLOCK].T
        parts.append(block.reshape(-1)[:: len(block) + 1])
    return jnp.concatenate(parts)
