"""Computing the random numbers of a session under the engine's own protocols, before anything is known of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import enable_x64

from entropi.private.compute import attention, functions
from entropi.private.compute.functions import CIPHERTEXT, POLYNOMIALS
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.cutting import Shape
from entropi.private.preparation.material import Need, pool_of_need
from entropi.private.preparation.ring import Ring, uniform
from entropi.records import StageCommunication

if TYPE_CHECKING:  # what is dealt is priced where there is no engine
    from entropi.private.compute.engine import Engine

POOL_STEP = 1 << 20  # numbers that are multiplied at a time
_BLOCK = 128  # rows whose squares are summed by one product


@dataclass(frozen=True)
class Piece:
    """What the engine multiplies at a time, and the shapes and owners of the whole numbers that it reads."""

    stage: Stage
    operands: Mapping[str, tuple[Shape, int]]


def pieces(need: Need) -> Iterator[Piece]:
    """The multiplications of `need`, one after another: as many columns of a matrix, or numbers, as memory holds."""
    if need.masking == "server":
        (rows, inner), (_, columns) = need.shapes
        step = max(POLYNOMIALS * CIPHERTEXT // (min(rows, _BLOCK) * inner), 1)
        for start in range(0, columns, step):
            width = min(step, columns - start)
            operands = {"mask": ((rows, inner), CLIENT), "matrix": ((inner, width), SERVER)}
            yield _piece(need, functions.times_matrix, operands)
    elif not pool_of_need(need):
        options = {"rows": need.result[1]} if need.kind == "mix" else {}
        yield _of_shared(need, need.shapes, **options)
    else:
        each = int(np.prod(need.shapes[0][1:], dtype=np.int64))
        step = max(POOL_STEP // each // _BLOCK, 1) * _BLOCK
        for start in range(0, need.shapes[0][0], step):
            count = min(step, need.shapes[0][0] - start)
            shapes = (count, *need.shapes[0][1:]), (count, *need.shapes[1][1:])
            if need.masking == "self":
                function = _diagonal if need.kind == "sums_of_squares" else jax.lax.mul
                yield _piece(need, function, {f"a {rank}": (shapes[0], rank) for rank in (SERVER, CLIENT)})
            else:
                yield _of_shared(need, shapes)


def _piece(need: Need, function: Callable[..., Any], operands: Mapping[str, tuple[Shape, int]]) -> Piece:
    return Piece(Stage(need.name, -1, function, tuple(operands), ("product",)), operands)


def _of_shared(need: Need, shapes: tuple[Shape, Shape], **options: int) -> Piece:
    """Both operands are sums of what the parties draw."""
    named = zip(("a", "b"), shapes)
    operands = {f"{operand} {rank}": (shape, rank) for operand, shape in named for rank in (SERVER, CLIENT)}
    return _piece(need, partial(_product_of_sums, kind=need.kind, **options), operands)


def _product_of_sums(x: Array, y: Array, u: Array, v: Array, *, kind: str, **options: int) -> Any:
    function = getattr(attention if kind in ("scores", "mix") else functions, kind)
    return function(x + y, u + v, **options)


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
            yield from _deal_matrix(engine, need, matrix)
        else:
            for piece in pieces(need):
                yield _deal_squares(engine, need, piece) if need.masking == "self" else _deal_pair(engine, need, piece)


def _deal_matrix(
    engine: Engine, need: Need, matrix: np.ndarray | None
) -> Iterator[tuple[dict[str, Ring], StageCommunication]]:
    """The client's rows times the server's matrix."""
    assert (matrix is not None) == (engine.rank == SERVER)
    drawn = uniform(need.shapes[0]) if engine.rank == CLIENT else None
    engine.hold_whole("mask", need.shapes[0], drawn)
    start = 0
    for piece in pieces(need):
        shape, _ = piece.operands["matrix"]
        columns = None if matrix is None else matrix[:, start : start + shape[1]].astype(np.int64)
        engine.hold_whole("matrix", shape, columns)
        cost = engine.run(piece.stage, 0)
        parts = {f"{need.name} c": engine.numbers("product")}
        if drawn is not None and not start:
            parts[f"{need.name} a"] = drawn
        yield parts, cost
        start += shape[1]


def _deal_pair(engine: Engine, need: Need, piece: Piece) -> tuple[dict[str, Ring], StageCommunication]:
    """Random operands of which each party draws a share, and the shares of their product."""
    parts = {}
    for operand, (shape, rank) in piece.operands.items():
        drawn = uniform(shape) if rank == engine.rank else None
        engine.hold_whole(operand, shape, drawn)
        if drawn is not None:
            parts[f"{need.name} {operand.split()[0]}"] = drawn
    cost = engine.run(piece.stage, 0)
    return {**parts, f"{need.name} c": engine.numbers("product")}, cost


def _deal_squares(engine: Engine, need: Need, piece: Piece) -> tuple[dict[str, Ring], StageCommunication]:
    """Random numbers and shares of their squares, or of the sums of their rows' squares.

    (x + y)^2 = x^2 + 2 x y + y^2, x the client's and y the server's: only x y takes communication.
    """
    parts, cost = _deal_pair(engine, need, piece)
    drawn, mixed = parts[f"{need.name} a"], parts[f"{need.name} c"]
    own = drawn * drawn
    own = own.sum(axis=-1, dtype=np.uint64) if need.kind == "sums_of_squares" else own
    return {**parts, f"{need.name} c": own + mixed * np.uint64(2)}, cost


def _diagonal(x: Array, y: Array) -> Array:
    """Products of the rows of two matrices `(n, d)`, `(n,)`, as diagonals of matrix products."""
    parts = []
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK] @ y[start : start + _BLOCK].T
        parts.append(block.reshape(-1)[:: len(block) + 1])
    return jnp.concatenate(parts)
