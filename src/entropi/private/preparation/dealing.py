"""Computing a session's random numbers by the engine's own protocols, before anything is known of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import enable_x64

from entropi.private.compute import functions
from entropi.private.compute.functions import BILINEAR
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.cutting import Shape
from entropi.private.preparation.gates import multiplied, products_by_size
from entropi.private.preparation.material import BITS, KEPT, SIGNS, TRUNCATE, WINNERS, Need, array_name, gates_of
from entropi.private.preparation.ring import WORD, Ring, uniform
from entropi.private.preparation.truncation import packed
from entropi.records import StageCommunication

if TYPE_CHECKING:  # what is dealt is priced where there is no engine
    from entropi.private.compute.engine import Engine

POOL_STEP = 1 << 20  # numbers that are multiplied at a time
_BLOCK = 128  # rows whose squares are summed by one product

# Whose an operand is: whole numbers of one party; or of both, each of which draws its share: of real numbers, of words
# of bits, or of single bits.
Owner: TypeAlias = Literal[0, 1, "numbers", "words", "bits"]
Operands: TypeAlias = Mapping[str, tuple[Shape, Owner]]


@dataclass(frozen=True)
class Piece:
    """What the engine multiplies at a time, and the shapes and owners of what it reads."""

    stage: Stage
    operands: Operands


def pieces(need: Need, fraction_bits: int) -> Iterator[Piece]:
    """The multiplications of `need`, one after another: as many rows or numbers as memory holds.

    Of a matrix and of the token table as many as the program would multiply at a time.
    """
    if need.masking == "server":
        (rows, inner), (_, columns) = need.shapes
        if need.kind == "times_table":
            step, _ = functions.table_blocks(rows, inner, columns)
        else:
            step = functions.rows_at_a_time(rows, inner, columns)
        for start in range(0, rows, step):
            mask, matrix = (min(step, rows - start), inner), (inner, columns)
            yield _piece(need, BILINEAR[need.kind], {"mask": (mask, CLIENT), "matrix": (matrix, SERVER)})
    elif need.kind == TRUNCATE:
        for count in counts_of(need):
            yield _piece(need, partial(_truncation, bits=fraction_bits), {"bits": ((count,), "numbers")})
    elif need.kind in (SIGNS, WINNERS):
        for words in counts_of(need):
            for products in products_by_size(gates_of(need)):
                shape = (products * words,)
                yield _piece(need, _both, {"left": (shape, "words"), "right": (shape, "words")})
    elif need.kind in (BITS, KEPT):
        for count in counts_of(need):
            yield _of_bits(need, count)
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
    """How many numbers of a pool, or rows of them, are multiplied at a time; of words so many, for all of a size."""
    if pool.kind in (SIGNS, WINNERS):
        each = max(products_by_size(gates_of(pool)))
    else:
        each = int(np.prod(pool.shapes[0][1:], dtype=np.int64))
    step = max(POOL_STEP // each // _BLOCK, 1) * _BLOCK
    return [min(step, pool.rows - start) for start in range(0, pool.rows, step)]


def _piece(need: Need, function: Callable[..., Any], operands: Operands) -> Piece:
    return Piece(Stage(need.name, -1, function, tuple(operands), ("product",)), operands)


def _of_bits(need: Need, count: int) -> Piece:
    """Random bits as whole numbers, and what is kept by them."""
    bits: Operands = {"bits": ((count,), "bits")}
    if need.kind == BITS:
        return Piece(Stage(need.name, -1, _whole, ("bits",), ("whole",)), bits)
    stage = Stage(need.name, -1, _whole_and_kept, ("bits", "a"), ("whole", "product"))
    return Piece(stage, {**bits, "a": ((count,), "numbers")})


def _of_shared(need: Need, shapes: tuple[Shape, Shape], **options: int) -> Piece:
    """Both operands are sums of what the parties draw."""
    named = zip(("a", "b"), shapes)
    operands: Operands = {f"{operand} {rank}": (shape, rank) for operand, shape in named for rank in (SERVER, CLIENT)}
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


def _both(x: Array, y: Array) -> Array:
    """Words with the bits that are set in both."""
    return x & y


def _whole(bits: Array) -> Array:
    """1 where a bit is set. Real numbers as small as their last place the engine chooses wrongly."""
    return jnp.where(bits, jnp.ones((), int), jnp.zeros((), int))


def _whole_and_kept(bits: Array, x: Array) -> tuple[Array, Array]:
    return _whole(bits), jnp.where(bits, x, jnp.zeros((), x.dtype))


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
        yield from _deal_matrix(engine, need, matrix)
    elif need.kind in (SIGNS, WINNERS):
        yield from _deal_words(engine, need)
    elif need.kind in (TRUNCATE, BITS, KEPT):
        for piece in pieces(need, engine.fraction_bits):
            yield (_deal_truncations if need.kind == TRUNCATE else _deal_bits)(engine, need, piece)
    else:
        for piece in pieces(need, engine.fraction_bits):
            yield _deal_squares(engine, need, piece) if need.masking == "self" else _deal_pair(engine, need, piece)


def _deal_matrix(
    engine: Engine, need: Need, matrix: np.ndarray | None
) -> Iterator[tuple[dict[str, Ring], StageCommunication]]:
    """The client's rows times the server's matrix, or times its token table, by rows."""
    whole = None if matrix is None else matrix.astype(np.int64)
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
    packed_bits, halves = packed(drawn.astype(np.uint8), products.astype(np.uint32))
    return {array_name(need.name, "a"): packed_bits, array_name(need.name, "c"): halves}, cost


def _deal_words(engine: Engine, need: Need) -> Iterator[tuple[dict[str, Ring], StageCommunication]]:
    """Random words of each party, sums of which are masks, and shares of the products of masks."""
    gates = gates_of(need)
    left = iter(pieces(need, engine.fraction_bits))
    for words in counts_of(need):
        masks = uniform((words, need.shapes[0][1]))
        multiplying = multiplied(masks, gates)
        operands, products = next(multiplying), None
        while products is None:
            piece = next(left)
            for name, words_of in zip(piece.operands, operands):
                engine.set_words(name, words_of.reshape(-1))
            with enable_x64():
                cost = engine.run(piece.stage, 0)
            found = engine.numbers("product").reshape(operands[0].shape)
            for name in (*piece.operands, "product"):
                engine.drop(name)
            try:
                operands = multiplying.send(found)
            except StopIteration as done:
                products = done.value
            else:
                yield {}, cost
        yield {array_name(need.name, "a"): masks, array_name(need.name, "c"): products}, cost


def _deal_bits(engine: Engine, need: Need, piece: Piece) -> tuple[dict[str, Ring], StageCommunication]:
    """Random bits of each party, the sums of which are shared as whole numbers; and what is kept by them."""
    bits, arrays = piece.operands["bits"][0], dict[str, Ring]()
    engine.set_bits("bits", uniform(bits) & np.uint64(1))
    if need.kind == KEPT:
        arrays[array_name(need.name, "a")] = uniform(bits)
        engine.set_numbers("a", arrays[array_name(need.name, "a")])
    with enable_x64():
        cost = engine.run(piece.stage, 0)
    arrays[array_name(need.name, "b")] = engine.numbers("whole")
    if need.kind == KEPT:
        arrays[array_name(need.name, "c")] = engine.numbers("product")
    for name in (*piece.operands, *piece.stage.outputs):
        engine.drop(name)
    return arrays, cost


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
