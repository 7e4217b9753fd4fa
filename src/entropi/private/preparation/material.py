"""Which random numbers a session takes, and one party's share of them while the session uses them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from entropi.private.compute import lookahead
from entropi.private.compute.description import Description
from entropi.private.compute.program import stages_of_pass
from entropi.private.compute.settings import CLIENT, Settings
from entropi.private.preparation import signs, winners
from entropi.private.preparation.comparisons import by_window, groups_of, kept_by, numbers_by, signs_of
from entropi.private.preparation.cutting import Comparison, Product, Shape, cut
from entropi.private.preparation.gates import Gates, masks_of, products_of
from entropi.private.preparation.linear import LinearPart
from entropi.private.preparation.products import OF_SERVER, Masking, masking, packed_size, pool_of, token_rows
from entropi.private.preparation.ring import WORD, Ring, words_for
from entropi.private.preparation.truncation import TruncationMasks, packed_shapes, unpacked

# Kinds of what is no product, and the pools of it: for truncations; for signs, by the bits of their digits; for the
# winners of groups; and for what follows from a sign, a number or a number that is kept.
TRUNCATE, SIGNS, WINNERS, BITS, KEPT = "truncate", "signs", "winners", "bits", "kept"


@dataclass(frozen=True)
class Need:
    """Random numbers for one place of the program and all tokens of a session, or one pool of them for all places.

    `shapes` are those of both operands, a square's twice, and `result` that of the product; `matrix` names the server's
    weight, if one operand is that. A truncation takes a random bit of each party, and shares of their product; signs
    and winners take words of shared random bits and their products, see `gates`; what follows from a sign takes shares
    of random bits, and of random numbers and their products, see `comparisons`.
    """

    name: str
    kind: str
    masking: Masking
    shapes: tuple[Shape, Shape]
    result: Shape
    matrix: str | None = None

    @property
    def pooled(self) -> bool:
        """Whether this is a pool, of which every product takes what it needs, and not one place of the program."""
        return self.kind in (SIGNS, WINNERS, BITS, KEPT) or pool_of(self.kind, self.shapes[0]) is not None

    @property
    def rows(self) -> int:
        """How many can be handed out: tokens of a place; numbers of a pool, or rows of them."""
        return self.shapes[0][0] if self.pooled else token_rows(self.kind, self.shapes[0], self.result)

    def kept(self, rank: int) -> dict[str, Shape]:
        """Names and shapes of the arrays that a party keeps, see `array_name`; of a matrix the server keeps no mask."""
        if self.kind == TRUNCATE:
            words, halves = packed_shapes(self.rows)
            return {array_name(self.name, "a"): words, array_name(self.name, "c"): halves}
        if self.kind == BITS:
            return {array_name(self.name, "b"): self.result}
        shapes = {array_name(self.name, "c"): self.result}
        if self.masking != "server" or rank == CLIENT:
            shapes[array_name(self.name, "a")] = self.shapes[0]
        if self.masking == "pair":
            shapes[array_name(self.name, "b")] = self.shapes[1]
        return shapes


def needs(model: Description, settings: Settings, tokens: int, passes: int | None = None) -> list[Need]:
    """What a session of at most `tokens` tokens, its public prefix included, takes, in whichever passes they come.

    That is what one pass of all tokens takes: other passes compute the same pairs and rows, or fewer. Of the last
    layer and the head a pass computes one row: there as many rows as there are `passes`, the last ones, which have
    most pairs; None for as many as tokens. Only scores and mixed values have a place for every token, in every layer.
    """
    read = tokens if passes is None else min(passes, tokens)
    weights = model.weight_shapes() | lookahead.shapes(model)
    shapes: dict[str, Shape] = {**weights, "embedded": (tokens, model.hidden_size)}
    shapes["tokens"] = (tokens, model.vocab_size)
    found: dict[str, Need] = {}
    for stage in stages_of_pass(model, settings, tokens, 0, last_rows=read, prepared=True):
        for step in cut(stage, shapes):
            here = [need_of(of_all_tokens(product, tokens), stage.layer, set(weights)) for product in step.products]
            here += of_comparisons(step.comparisons, settings.fraction_bits, read)
            for part in step.parts:
                if isinstance(part, LinearPart) and part.truncations:
                    here.append(of_truncations(sum(part.truncations)))
            for need in here:
                before = found.get(need.name)
                found[need.name] = need if before is None else _with_more(before, need)
    return list(found.values())


def of_truncations(count: int) -> Need:
    """What so many numbers take to be truncated."""
    return Need(TRUNCATE, TRUNCATE, "signs", ((count,), (count,)), (count,))


def of_comparisons(comparisons: Sequence[Comparison], fraction_bits: int, passes: int = 1) -> list[Need]:
    """What the comparisons of a step take, in so many passes, each of which may leave a word of bits half empty."""
    found = []

    def of_words(name: str, kind: str, count: int, gates: Gates) -> None:
        words = words_for(count) if passes == 1 else count // WORD + passes
        masks = (words, masks_of(gates))
        found.append(Need(name, kind, "bits", (masks, masks), (words, products_of(gates))))

    for which, places in by_window(comparisons, fraction_bits).items():
        count = sum(signs_of(comparisons[place]) for place in places)
        of_words(signs_name(which.digit_bits), SIGNS, count, signs.gates(which.digit_bits))
    if groups := groups_of(comparisons):
        of_words(WINNERS, WINNERS, groups, winners.gates())
    for kind, counting in ((KEPT, kept_by), (BITS, numbers_by)):
        if count := sum(map(counting, comparisons)):
            found.append(Need(kind, kind, "pair", ((count,), (count,)), (count,)))
    return found


def gates_of(need: Need) -> Gates:
    """What the words of a pool of signs or winners are for."""
    return winners.gates() if need.kind == WINNERS else signs.gates(signs.digit_bits_of(need.shapes[0][1]))


def signs_name(digit_bits: int) -> str:
    """The pool of signs of digits of so many bits."""
    return f"{SIGNS}.{digit_bits}"


def of_all_tokens(product: Product, tokens: int) -> Product:
    """Scores or mixed values of the last of so many tokens, for all of them; another product as it is."""
    first, result = product.shapes[0], product.result_shape
    if product.kind == "scores":
        first, result = (first[0], tokens, first[2]), (first[0], packed_size(tokens))
    elif product.kind == "mix":
        first, result = (first[0], packed_size(tokens)), (result[0], tokens, result[2])
    return replace(product, shapes=(first, *product.shapes[1:]), result_shape=result)


def name_of(product: Product, layer: int) -> str:
    """Of the material that a product in this layer takes."""
    if (pool := pool_of(product.kind, product.shapes[0])) is not None:
        return pool
    return product.operands[1] if product.kind in OF_SERVER else f"{layer}.{product.kind}"


def need_of(product: Product, layer: int, weights: set[str]) -> Need:
    """What a product takes, whose operands named `weights` are the server's."""
    name, who = name_of(product, layer), masking(product, weights)
    first, second, result = product.shapes[0], product.shapes[-1], product.result_shape
    if pool_of(product.kind, first) is not None:
        rows = _pool_rows(product)
        width = first[-1:] if product.kind in ("scale_rows", "sums_of_squares") else ()
        first, second = (rows, *width), (rows, *width) if who == "self" else (rows,)
        result = (rows,) if product.kind == "sums_of_squares" else first
    return Need(name, product.kind, who, (first, second), result, product.operands[1] if who == "server" else None)


def _pool_rows(product: Product) -> int:
    """What a product takes of its pool: numbers, or rows where a row has one factor or one sum."""
    by_row = product.kind in ("scale_rows", "sums_of_squares")
    return int(np.prod(product.shapes[0][:-1] if by_row else product.shapes[0], dtype=np.int64))


def _with_more(pool: Need, more: Need) -> Need:
    def longer(one: Shape, other: Shape) -> Shape:
        return (one[0] + other[0], *one[1:])

    assert pool.pooled, f"{pool.name} occurs twice"
    shapes = longer(pool.shapes[0], more.shapes[0]), longer(pool.shapes[1], more.shapes[1])
    return replace(pool, shapes=shapes, result=longer(pool.result, more.result))


def array_name(need: str, which: Literal["a", "b", "c"]) -> str:
    """Name of the array that holds the first operands' masks of a need, the second operands', or their products.

    Random bits by which numbers are multiplied are second operands.
    """
    return f"{need} {which}"


def joined(need: Need, pieces: Iterable[Mapping[str, Ring]]) -> dict[str, Ring]:
    """Arrays of one need, of the pieces in which they were dealt, by rows.

    Row by row in memory: safetensors writes others down in the order of memory, without a word.
    """
    found: dict[str, list[Ring]] = {}
    for piece in pieces:
        for name, array in piece.items():
            found.setdefault(name, []).append(array)
    whole = {name: some[0] if len(some) == 1 else np.concatenate(some) for name, some in found.items()}
    return {name: np.ascontiguousarray(array) for name, array in whole.items()}


@dataclass(frozen=True)
class Masks:
    """One party's part of what masks a product: of operands a and b, and of their product c. None is not its own."""

    a: Ring | None
    b: Ring | None
    c: Ring


class MaterialUsedUp(Exception):
    """More was asked of a session's material than is in it, or something a second time."""


class Material:
    """One party's share of a session's random numbers. Each is handed out once.

    Numbers are handed out in their order, so that how far they are used up is one number of each need. A product that
    is refused has used nothing up; after another error what was taken stays taken.

    Args:
        needs: what was prepared; several of the same name are parts of one pool.
        arrays: this party's arrays of all of them, see `array_name`; parts of a pool behind each other.
    """

    def __init__(self, needs: Iterable[Need], arrays: Mapping[str, Ring]) -> None:
        needs, self._arrays = list(needs), arrays
        self._used: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        for need in needs:
            self._rows[need.name] = self._rows.get(need.name, 0) + need.rows
        if count := self._rows.get(TRUNCATE):
            words, halves = arrays[array_name(TRUNCATE, "a")], arrays[array_name(TRUNCATE, "c")]
            self._truncations = unpacked(words, halves, count)

    def of_truncation(self, count: int) -> TruncationMasks:
        """For truncating so many numbers.

        Raises:
            MaterialUsedUp: see there.
        """
        place = self._following(TRUNCATE, count)
        return TruncationMasks(self._truncations.bits[place], self._truncations.products[place])

    def of_signs(self, digit_bits: int, words: int) -> tuple[Ring, Ring]:
        """For so many words of signs: shares of masks, and of their products, `(words, ...)`.

        Raises:
            MaterialUsedUp: see there.
        """
        masks, _, products = self._next(signs_name(digit_bits), words)
        return masks, products

    def of_winners(self, words: int) -> tuple[Ring, Ring]:
        """For so many words of groups: shares of masks, and of their products, `(words, ...)`.

        Raises:
            MaterialUsedUp: see there.
        """
        masks, _, products = self._next(WINNERS, words)
        return masks, products

    def of_bits(self, count: int) -> Ring:
        """Shares of so many random bits, each a number.

        Raises:
            MaterialUsedUp: see there.
        """
        return self._next(BITS, count)[1]

    def of_kept(self, count: int) -> tuple[Ring, Ring, Ring]:
        """Shares of so many random numbers a, bits r and products r a.

        Raises:
            MaterialUsedUp: see there.
        """
        a, bits, products = self._next(KEPT, count)
        return a, bits, products

    def _next(self, name: str, rows: int) -> list[Any]:
        """So many rows of a pool's arrays a, b and c, None for one that it has not."""
        place = self._following(name, rows)
        return [None if array is None else array[place] for array in self._of(name)]

    def masks(self, product: Product, layer: int, keys: int) -> Masks:
        """For a product in a pass after which there are `keys` tokens; of keys and values the masks of all of them.

        Raises:
            MaterialUsedUp: see there.
        """
        name = name_of(product, layer)
        if pool_of(product.kind, product.shapes[0]) is not None:
            place = self._following(name, _pool_rows(product))
            return self._cut(name, (place, place, place), (product.shapes[0], product.shapes[-1], product.result_shape))

        rows = token_rows(product.kind, product.shapes[0], product.result_shape)
        if product.kind in OF_SERVER:  # any row of R is as good as another
            place = self._following(name, rows)
            return self._cut(name, (place, place, place))
        first = keys - rows
        tokens = self._use(name, first, keys)
        every = slice(None)
        pairs = slice(packed_size(first), packed_size(keys))
        new, seen, packed = (every, tokens), (every, slice(keys)), (every, pairs)
        return self._cut(name, (new, seen, packed) if product.kind == "scores" else (packed, seen, new))

    def _following(self, name: str, rows: int) -> slice:
        """The next so many, used up from now on."""
        start = self._used.get(name, 0)
        return self._use(name, start, start + rows)

    def _use(self, name: str, first: int, end: int) -> slice:
        """The numbers from `first` to `end`, used up from now on, and with them all before."""
        rows, used = self._rows.get(name, 0), self._used.get(name, 0)
        if first < used:
            raise MaterialUsedUp(f"what was prepared for {name} would be used twice: {first} of {used} used")
        if end > rows:
            raise MaterialUsedUp(f"for {name} {rows} were prepared, {end} are needed")
        self._used[name] = end
        return slice(first, end)

    def _of(self, name: str) -> list[Ring | None]:
        """Arrays a, b and c of a need."""
        return [self._arrays.get(array_name(name, which)) for which in ("a", "b", "c")]

    def _cut(self, name: str, places: tuple[Any, Any, Any], shapes: tuple[Shape, Shape, Shape] | None = None) -> Masks:
        """Parts of a need's arrays, those of a pool in the `shapes` of operands and result."""
        a, b, c = (None if part is None else part[place] for part, place in zip(self._of(name), places))
        assert c is not None
        if shapes is not None:
            a = None if a is None else a.reshape(shapes[0])
            b = None if b is None else b.reshape(shapes[1])
            c = c.reshape(shapes[2])
        return Masks(a, b, c)
