"""Which random numbers a session takes, and one party's share of them while the session uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from entropi.private.compute.description import Description
from entropi.private.compute.program import stages_of_pass
from entropi.private.compute.settings import Settings
from entropi.private.preparation.cutting import Product, Shape, cut
from entropi.private.preparation.products import Masking, masking, packed_size, pool_of
from entropi.private.preparation.ring import Ring


@dataclass(frozen=True)
class Need:
    """Random numbers for one place of the program and all tokens of a session, or one pool of them for all places.

    `shapes` are those of both operands, a square's twice, and of the result; `matrix` names the server's weight.
    """

    name: str
    kind: str
    masking: Masking
    shapes: tuple[Shape, Shape]
    result: Shape
    matrix: str | None = None


def needs(model: Description, settings: Settings, tokens: int) -> list[Need]:
    """What a session of at most `tokens` tokens, its public prefix included, takes, in whichever passes they come."""
    weights = model.weight_shapes()
    shapes: dict[str, Shape] = {**weights, "embedded": (tokens, model.hidden_size)}
    shapes["tokens"] = (-(-tokens // 2) if settings.paired and tokens > 1 else tokens, model.vocab_size)
    found: dict[str, Need] = {}
    for stage in stages_of_pass(model, settings, tokens, 0, every_row=True, prepared=True):
        for step in cut(stage, shapes, settings.fraction_bits):
            for product in step.products:
                need = _need(product, stage.layer, set(weights))
                before = found.get(need.name)
                found[need.name] = need if before is None else _with_more(before, need)
    return list(found.values())


def name_of(product: Product, layer: int) -> str:
    """Of the material that a product in this layer takes."""
    if (pool := pool_of(product)) is not None:
        return pool
    return product.operands[1] if product.kind == "times_matrix" else f"{layer}.{product.kind}"


def _need(product: Product, layer: int, weights: set[str]) -> Need:
    name, who = name_of(product, layer), masking(product, weights)
    first, second = product.shapes[0], product.shapes[-1]
    result = product.result_shape
    if pool_of(product) is not None:
        width = first[-1:] if product.kind in ("scale_rows", "sums_of_squares") else ()
        count = int(np.prod(first, dtype=np.int64)) // int(np.prod(width, dtype=np.int64))
        first, second = (count, *width), (count, *(width if who == "self" else ()))
        result = (count,) if product.kind == "sums_of_squares" else first
    return Need(name, product.kind, who, (first, second), result, product.operands[1] if who == "server" else None)


def _with_more(pool: Need, more: Need) -> Need:
    def longer(one: Shape, other: Shape) -> Shape:
        return (one[0] + other[0], *one[1:])

    assert pool_of_need(pool), f"{pool.name} occurs twice"
    shapes = longer(pool.shapes[0], more.shapes[0]), longer(pool.shapes[1], more.shapes[1])
    return replace(pool, shapes=shapes, result=longer(pool.result, more.result))


def pool_of_need(need: Need) -> bool:
    """Whether this is a pool, of which every product takes what it needs, and not one place of the program."""
    return need.kind not in ("times_matrix", "scores", "mix")


@dataclass(frozen=True)
class Masks:
    """One party's part of what masks a product: of its operands a and b, and of their product c; None is not its own."""

    a: Ring | None
    b: Ring | None
    c: Ring


class MaterialUsedUp(Exception):
    """More was asked of a session's material than is in it, or something a second time."""


class Material:
    """One party's share of a session's random numbers. Each is handed out once.

    Args:
        parts: by the name of a `Need` and " a", " b" or " c".
    """

    def __init__(self, parts: Mapping[str, Ring]) -> None:
        self._parts = parts
        self._used: dict[str, int] = {}

    def masks(self, product: Product, layer: int, keys: int) -> Masks:
        """For a product in a pass after which there are `keys` tokens. Masks of keys and values are those of all tokens.

        Raises:
            MaterialUsedUp: see there.
        """
        name = name_of(product, layer)
        if pool_of(product) is not None:
            return self._of_pool(name, product)
        rows = product.result_shape[1] if product.kind == "mix" else product.shapes[0][-2]
        first = keys - rows
        self._use(name, first, keys)
        pairs = slice(packed_size(first), packed_size(keys))
        if product.kind == "times_matrix":
            return self._cut(name, slice(first, keys), None, slice(first, keys))
        tokens = (slice(None), slice(first, keys))
        seen, packed = (slice(None), slice(keys)), (slice(None), pairs)
        return (
            self._cut(name, tokens, seen, packed) if product.kind == "scores" else self._cut(name, packed, seen, tokens)
        )

    def _of_pool(self, name: str, product: Product) -> Masks:
        first = product.shapes[0]
        count = int(np.prod(first[:-1] if " " in name else first, dtype=np.int64))
        start = self._used.get(name, 0)
        self._use(name, start, start + count)
        place = slice(start, start + count)
        masks = self._cut(name, place, place, place)
        b = None if masks.b is None else masks.b.reshape(product.shapes[-1])
        a = None if masks.a is None else masks.a.reshape(first)
        return Masks(a, b, masks.c.reshape(product.result_shape))

    def _use(self, name: str, first: int, end: int) -> None:
        """Numbers are handed out in their order, so that how far they are used up is one number."""
        result = self._parts.get(f"{name} c")
        if result is None:
            raise MaterialUsedUp(f"nothing was prepared for {name}")
        if first < self._used.get(name, 0):
            raise MaterialUsedUp(f"what was prepared for {name} would be used twice")
        room = (
            result.shape[1] if result.ndim == 3 else len(result) if result.ndim == 1 or " " not in name else len(result)
        )
        if " " not in name and result.ndim == 2 and name.endswith(".scores"):
            room = int(((8 * result.shape[1] + 1) ** 0.5 - 1) / 2)
        if end > room:
            raise MaterialUsedUp(f"of what was prepared for {name}, {room}, {end} are needed")
        self._used[name] = end

    def _cut(self, name: str, of_a: object, of_b: object, of_c: object) -> Masks:
        a, b = self._parts.get(f"{name} a"), self._parts.get(f"{name} b")
        return Masks(
            None if a is None else a[of_a],  # type: ignore[index]
            None if b is None else b[of_b],  # type: ignore[index]
            self._parts[f"{name} c"][of_c],  # type: ignore[index]
        )
