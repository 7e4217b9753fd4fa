"""Bits that are computed of shared bits in one exchange, with products of random bits that were prepared.

A product of several bits needs no more than one: each is opened under a random bit, x = e + a modulo two, and the
product of all (e_i + a_i) is a sum of products of random bits, shares of which were prepared (Beaver's products, CRYPTO
1991, of more than two), with factors that both parties know. Sixty-four numbers are computed at a time, one bit of each
in a word.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TypeAlias

import numpy as np

from entropi.private.preparation.ring import Ring

Variables: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Gate:
    """Bits that are sums of products of other bits, modulo two, all found in one exchange.

    Attributes:
        opened: variables that are opened under masks.
        sums: variables that are the sum of two of these, opened with them.
        results: of each the products that it is the sum of; what stands alone need not be opened.
        negated: variables that are one less another, opened with it.
    """

    opened: Variables
    sums: tuple[tuple[str, str, str], ...]
    results: tuple[tuple[Variables, ...], ...]
    negated: tuple[tuple[str, str], ...] = ()

    @cached_property
    def products(self) -> tuple[Variables, ...]:
        """All products of masks that are needed, shorter ones first: each is one before it times its last factor."""
        found = {
            some
            for monomials in self.results
            for monomial in monomials
            for size in range(2, len(monomial) + 1)
            for some in combinations(monomial, size)
        }
        return tuple(sorted(found, key=lambda some: (len(some), some)))

    def masks(self, drawn: Ring) -> dict[str, Ring]:
        """Masks of all variables, of those that are opened: `(opened, ...)`, in their order."""
        named = dict(zip(self.opened, drawn))
        for name, one, other in self.sums:
            named[name] = named[one] ^ named[other]
        return named | {name: named[one] for name, one in self.negated}

    def evaluated(self, alone: dict[str, Ring], seen: Ring, drawn: Ring, products: Ring, *, server: bool) -> list[Ring]:
        """This party's shares of the results.

        Args:
            alone: its shares of variables, at least of those that stand alone.
            seen: what was opened, of the variables in their order.
            drawn: its shares of their masks.
            products: its shares of the products of masks.
        """
        known, masks = self.masks(seen), self.masks(drawn)
        known |= {name: ~known[name] for name, _ in self.negated}
        of_masks: dict[Variables, Ring] = {(name,): mask for name, mask in masks.items()}
        of_masks |= dict(zip(self.products, products))
        found = []
        for monomials in self.results:
            total = np.zeros(seen.shape[1:], np.uint64)
            for monomial in monomials:
                total ^= alone[monomial[0]] if len(monomial) == 1 else _product(monomial, known, of_masks, server)
            found.append(total)
        return found


def _product(factors: Variables, known: dict[str, Ring], of_masks: dict[Variables, Ring], server: bool) -> Ring:
    """This party's share of a product of what is `known` under masks, of its shares of the masks' products."""
    terms: list[Ring | np.uint64] = [np.uint64(2**64 - 1 if server else 0)]  # by which factors are still masks
    masked: list[Variables] = [()]
    for name in factors:
        masked += [(*some, name) for some in masked]
    terms += [of_masks[some] for some in masked[1:]]
    for name in reversed(factors):
        half = len(terms) // 2
        terms = [known[name] & one ^ other for one, other in zip(terms[:half], terms[half:])]
    (product,) = terms
    return np.asarray(product)


Gates: TypeAlias = Sequence[tuple[Gate, int]]  # and how many of each


def masks_of(gates: Gates) -> int:
    """Random bits that so many gates take of each party."""
    return sum(len(gate.opened) * count for gate, count in gates)


def products_of(gates: Gates) -> int:
    """Products of them."""
    return sum(len(gate.products) * count for gate, count in gates)


def products_by_size(gates: Gates) -> list[int]:
    """How many products of two masks, of three, and so on: each is a product of one of these and a mask."""
    sizes = [len(some) for gate, count in gates for some in gate.products * count]
    return [sizes.count(size) for size in range(2, max(sizes) + 1)]


def multiplied(masks: Ring, gates: Gates) -> Generator[tuple[Ring, Ring], Ring, Ring]:
    """Shares of the products of `masks` `(words, masks_of)`: `(words, products_of)`.

    Yields words whose bits are to be multiplied, `(n, words)` each, and is sent this party's shares of the products.
    """
    known = []
    for (gate, count), drawn in zip(gates, split(masks.T, [len(gate.opened) * count for gate, count in gates])):
        named = gate.masks(drawn.reshape(len(gate.opened), count, -1))
        known.append(dict[Variables, Ring]({(name,): mask for name, mask in named.items()}))
    for size in range(2, len(products_by_size(gates)) + 2):
        wanted = [(place, some) for place, (gate, _) in enumerate(gates) for some in gate.products if len(some) == size]
        left = [known[place][some[:-1]] for place, some in wanted]
        right = [known[place][some[-1:]] for place, some in wanted]
        found = yield np.concatenate(left), np.concatenate(right)
        for (place, some), share in zip(wanted, split(found, [gates[place][1] for place, _ in wanted])):
            known[place][some] = share
    every = [known[place][some] for place, (gate, _) in enumerate(gates) for some in gate.products]
    return np.ascontiguousarray(np.concatenate(every).T)


def split(rows: Ring, sizes: Sequence[int]) -> list[Ring]:
    """So many rows each."""
    return np.split(rows, np.cumsum(sizes)[:-1])
