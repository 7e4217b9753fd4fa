"""Computing a session's random numbers by the engine's own protocols, before anything is known of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import enable_x64

from entropi.private.compute import functions
from entropi.private.compute.functions import BILINEAR, CIPHERTEXT, POLYNOMIALS
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.cutting import Shape
from entropi.private.preparation.material import TRUNCATE, Need, array_name
from entropi.private.preparation.ring import Ring, uniform
from entropi.private.preparation.truncation import WORD, packed
from entropi.records import StageCommunication

if TYPE_CHECKING:  # what is dealt is priced where there is no engine
    from entropi.private.compute.engine import Engine

POOL_STEP = 1 << 20  # numbers that are multiplied at a time
_BLOCK = 128  # rows whose squares are summed by one product


@dataclass(frozen=True)
class Piece:
    """What the engine multiplies at a time, and the shapes and owners of the whole numbers that it reads.

    What it truncates has no owner: the parties' shares of it are what each has drawn.
    """

    stage: Stage
    operands: Mapping[str, tuple[Shape, int | None]]


def pieces(need: Need, fraction_bits: int) -> Iterator[Piece]:
    """The multiplications of `need`, one after another: as many columns of a matrix, or numbers, as memory holds.

    Of the token table as many one-hot rows as the program would multiply at a time.
    """
    if need.kind == "times_table":
        (rows, entries), (_, width) = need.shapes
        step, _ = functions.table_blocks(rows, entries, width)
        for start in range(0, rows, step):
            operands: dict[str, tuple[Shape, int | None]] = {
                "mask": ((min(step, rows - start), entries), CLIENT),
                "matrix": ((entries, width), SERVER),
            }
            yield _piece(need, functions.times_table, operands)
    elif need.masking == "server":
        (rows, inner), (_, columns) = need.shapes
        step = max(POLYNOMIALS * CIPHERTEXT // (min(rows, _BLOCK) * inner), 1)
        for start in range(0, columns, step):
            width = min(step, columns - start)
            operands = {"mask": ((rows, inner), CLIENT), "matrix": ((inner, width), SERVER)}
            yield _piece(need, functions.times_matrix, operands)
    elif need.kind == TRUNCATE:
        for count in counts_of(need):
            yield _piece(need, partial(_truncation, bits=fraction_bits), {"bits": ((count,), None)})
    elif not need.pooled:
        yield _of_shared(need, need.shapes, **({"rows": need.rows} if need.kind == "mix" else {}))
    else:
        for count in counts_of(need):
            shapes = (count, *need.shapes[0][1:]), (count, *need.shapes[1][1:])
            if need.masking == "self":
                function = _diagonal if need.kind == "sums_of_squares" else _product_with_sum
                yield _piece(need, function, {f"a {rank}": (shapes[0], rank) for rank in (SERVER, CLIENT)})
            else:
                yield _of_shared(need, shapes)


def counts_of(pool: Need) -> list[int]:
    """How many numbers of a pool, or rows of them, are multiplied at a time."""
    each = int(np.prod(pool.shapes[0][1:], dtype=np.int64))
    step = max(POOL_STEP // each // _BLOCK, 1) * _BLOCK
    return [min(step, pool.rows - start) for start in range(0, pool.rows, step)]


def _piece(need: Need, function: Callable[..., Any], operands: Mapping[str, tuple[Shape, int | None]]) -> Piece:
    return Piece(Stage(need.name, -1, function, tuple(operands), ("product",)), operands)


def _of_shared(need: Need, shapes: tuple[Shape, Shape], **options: int) -> Piece:
    """Both operands are sums of what the parties draw."""
    named = zip(("a", "b"), shapes)
    operands: dict[str, tuple[Shape, int | None]] = {
        f"{operand} {rank}": (shape, rank) for operand, shape in named for rank in (SERVER, CLIENT)
    }
    return _piece(need, partial(_product_of_sums, kind=need.kind, **options), operands)


def _product_of_sums(x: Array, y: Array, u: Array, v: Array, *, kind: str, **options: int) -> Any:
    return BILINEAR[kind](x + y, u + v, **options)


def _product_with_sum(x: Array, y: Array) -> Array:
    """y (x + y): a number that one party knows times a shared one takes half the bytes of any other two."""
    return y * (x + y)


def _diagonal(x: Array, y: Array) -> Array:
    """Products of the rows of two matrices `(n, d)`, `(n,)`, as diagonals of matrix products."""
    parts = []
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK] @ y[start : start + _BLOCK].T
        parts.append(block.reshape(-1)[:: len(block) + 1])
    return jnp.concatenate(parts)


def _truncation(x: Array, *, bits: int) -> Array:
    """x / 2^bits.

    The last factor is 1, of a zero: by factors all of which are small the engine multiplies with twice its fraction
    bits.
    """
    factors = np.append(np.full(x.size, 2.0**-bits), 1.0).astype(x.dtype)
    return (jnp.concatenate([x, jnp.zeros(1, x.dtype)]) * factors)[:-1]


def deal(
    engine: Engine, need: Need, matrix: np.ndarray | None = None
) -> Iterator[tuple[dict[str, Ring], StageCommunication]]:
    """This party's share of the random numbers of `need`, in step with the other party, in pieces: see `joined`.

    Products of whole numbers are the engine's, and not truncated. One may be wrong by one in the last of 64 digits, as
    any product of the engine may (1 to 3 of 100,000 were). A value would move by 2^-36, with 18 fraction bits.

    Args:
        matrix: the server's weight as whole numbers, where there is one; None at the client.
    """
    if need.masking == "server":
        assert (matrix is not None) == (engine.rank == SERVER)
        yield from (_deal_table if need.kind == "times_table" else _deal_matrix)(engine, need, matrix)
    elif need.kind == TRUNCATE:
        for piece in pieces(need, engine.fraction_bits):
            yield _deal_truncations(engine, need, piece)
    else:
        for piece in pieces(need, engine.fraction_bits):
            yield _deal_squares(engine, need, piece) if need.masking == "self" else _deal_pair(engine, need, piece)


def _deal_matrix(
    engine: Engine, need: Need, matrix: np.ndarray | None
) -> Iterator[tuple[dict[str, Ring], StageCommunication]]:
    """The client's rows times the server's matrix, by columns."""
    drawn = uniform(need.shapes[0]) if engine.rank == CLIENT else None
    start = 0
    for piece in pieces(need, engine.fraction_bits):
        end = start + piece.operands["matrix"][0][1]
        columns = None if matrix is None else matrix[:, start:end].astype(np.int64)
        product, cost = _product(engine, piece, {"mask": drawn, "matrix": columns})
        arrays = {array_name(need.name, "c"): product}
        if drawn is not None and not start:
            arrays[array_name(need.name, "a")] = drawn
        yield arrays, cost
        start = end


def _deal_table(
    engine: Engine, need: Need, table: np.ndarray | None
) -> Iterator[tuple[dict[str, Ring], StageCommunication]]:
    """The client's rows, each as long as the vocabulary, times the server's token table, by rows."""
    whole = None if table is None else table.astype(np.int64)
    for piece in pieces(need, engine.fraction_bits):
        rows = uniform(piece.operands["mask"][0]) if engine.rank == CLIENT else None
        product, cost = _product(engine, piece, {"mask": rows, "matrix": whole})
        arrays = {array_name(need.name, "c"): product}
        if rows is not None:
            arrays[array_name(need.name, "a")] = rows
        yield arrays, cost


def _deal_pair(engine: Engine, need: Need, piece: Piece) -> tuple[dict[str, Ring], StageCommunication]:
    """Random operands of which each party draws a share, and the shares of their product."""
    own = {name: uniform(shape) for name, (shape, rank) in piece.operands.items() if rank == engine.rank}
    product, cost = _product(engine, piece, own)
    drawn = {f"{need.name} {name.split()[0]}": array for name, array in own.items()}
    return {**drawn, array_name(need.name, "c"): product}, cost


def _deal_squares(engine: Engine, need: Need, piece: Piece) -> tuple[dict[str, Ring], StageCommunication]:
    """Random numbers and shares of their squares, or of the sums of their rows' squares.

    x the server's and y the client's: (x + y)^2 = x^2 - y^2 + 2 y (x + y), of sums x^2 + y^2 + 2 x y: only the last of
    these takes communication.
    """
    arrays, cost = _deal_pair(engine, need, piece)
    drawn, mixed = arrays[array_name(need.name, "a")], arrays[array_name(need.name, "c")]
    own = drawn * drawn
    if need.kind == "sums_of_squares":
        own = own.sum(axis=-1, dtype=np.uint64)
    elif engine.rank == CLIENT:
        own = np.uint64(0) - own
    return {**arrays, array_name(need.name, "c"): own + mixed * np.uint64(2)}, cost


def _deal_truncations(engine: Engine, need: Need, piece: Piece) -> tuple[dict[str, Ring], StageCommunication]:
    """Random bits of this party, and its share of their products with the other's, modulo 2^f.

    The engine truncates numbers of which each party's share is its bit, moved to the highest place: of shares
    u 2^63 and v 2^63 it makes -(u + v) 2^(63 - f) + u v 2^(64 - f), exactly, because nothing is in the places that it
    cuts off.
    """
    (((count,), _),) = piece.operands.values()
    drawn, bits = uniform((count,)) >> np.uint64(WORD - 1), engine.fraction_bits
    engine.set_numbers("bits", drawn << np.uint64(WORD - 1))
    cost = engine.run(piece.stage, 0)
    share = engine.numbers("product") + (drawn << np.uint64(WORD - 1 - bits))
    for name in (*piece.operands, "product"):
        engine.drop(name)

    # The shares of a multiple of 2^(64 - f): below that they add up to nothing or to one of these.
    low = share & np.uint64(2 ** (WORD - bits) - 1)
    products = share >> np.uint64(WORD - bits)
    if engine.rank == SERVER:
        products = (products + (low != 0)) & np.uint64(2**bits - 1)
    words, halves = packed(drawn.astype(np.uint8), products.astype(np.uint32))
    return {array_name(need.name, "a"): words, array_name(need.name, "c"): halves}, cost


def _product(engine: Engine, piece: Piece, own: Mapping[str, np.ndarray | None]) -> tuple[Ring, StageCommunication]:
    """This party's share of what the engine computes of a piece, of whose operands it passes its `own`."""
    for name, (shape, _) in piece.operands.items():
        engine.hold_whole(name, shape, own.get(name))
    with enable_x64():  # here alone: between pieces others trace what they like
        cost = engine.run(piece.stage, 0)
    product = engine.numbers("product")
    for name in (*piece.operands, "product"):
        engine.drop(name)
    return product, cost
