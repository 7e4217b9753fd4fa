"""Signs of shared numbers, from bits that were prepared: three messages each way.

The parties' shares u and v of a number add up to it, so its sign is the highest bit of u + v: that of u, that of v and
the carry from the bits below, modulo two. These are sixteen digits of a few bits. Of each the parties find shares of
two bits, whether it makes a carry (g) and whether it passes one on (p), and so of four neighbours, highest first:

    g = g3 + p3 g2 + p3 p2 g1 + p3 p2 p1 g0    p = p3 p2 p1 p0    (modulo two)

Twice that, and one carry is left. Every such step is one exchange, because a product of several bits needs no more:
each is opened under a random bit, x = e + a modulo two, and the product of all (e_i + a_i) is a sum of products of
random bits, shares of which were prepared (Beaver's products, CRYPTO 1991, of more than two), with factors that both
parties know. Sixty-four numbers are computed at a time, one bit of each in a word.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from typing import TypeAlias

import numpy as np

from entropi.private.compute.windows import DIGITS, Window
from entropi.private.preparation.ring import WORD, Ring, words_for

_JOINED = 4  # neighbouring digits that become one in a step
Variables: TypeAlias = tuple[str, ...]


# --- What is computed of bits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """Bits that are sums of products of other bits, modulo two, all found in one exchange.

    Attributes:
        opened: variables that are opened under masks.
        sums: variables that are the sum of two of these, opened with them.
        results: of each the products that it is the sum of; what stands alone need not be opened.
    """

    opened: Variables
    sums: tuple[tuple[str, str, str], ...]
    results: tuple[tuple[Variables, ...], ...]

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
        return named

    def evaluated(self, alone: dict[str, Ring], seen: Ring, drawn: Ring, products: Ring, *, server: bool) -> list[Ring]:
        """This party's shares of the results.

        Args:
            alone: its shares of variables, at least of those that stand alone.
            seen: what was opened, of the variables in their order.
            drawn: its shares of their masks.
            products: its shares of the products of masks.
        """
        known, masks = self.masks(seen), self.masks(drawn)
        of_masks: dict[Variables, Ring] = {(name,): mask for name, mask in masks.items()}
        of_masks |= dict(zip(self.products, products))
        found = []
        for monomials in self.results:
            total = np.zeros(seen.shape[1:], np.uint64)
            for monomial in monomials:
                if len(monomial) == 1:
                    total ^= alone[monomial[0]]
                    continue
                for size in range(0 if server else 1, len(monomial) + 1):
                    for masked in combinations(monomial, size):
                        term = of_masks[masked] if masked else np.uint64(2**64 - 1)
                        for name in monomial:
                            if name not in masked:
                                term = term & known[name]
                        total ^= term
            found.append(total)
        return found


@cache
def digit(bits: int) -> Gate:
    """g and p of a digit, of the bits u of the server's share and v of the client's; the highest bit last."""
    passing = [f"p{place}" for place in range(1, bits)]
    carries = tuple((*reversed(passing[place:]), f"u{place}", f"v{place}") for place in range(bits))
    passes = tuple((*reversed(passing), lowest) for lowest in ("u0", "v0"))
    opened = tuple(f"{party}{place}" for place in range(bits) for party in "uv")
    return Gate(opened, tuple((f"p{j}", f"u{j}", f"v{j}") for j in range(1, bits)), (carries, passes))


@cache
def joint(*, lowest: bool) -> Gate:
    """g and p of four neighbours, highest last; of the `lowest` ones, to which nothing can be passed on, g alone."""
    above = [f"p{place}" for place in range(1, _JOINED)]
    carries = tuple((*reversed(above[place:]), f"g{place}") for place in range(_JOINED))
    opened = (*above, *(f"g{place}" for place in range(_JOINED - 1)))
    if lowest:
        return Gate(opened, (), (carries,))
    return Gate((*opened, "p0"), (), (carries, ((*reversed(above), "p0"),)))


@cache
def steps(digit_bits: int) -> tuple[tuple[tuple[Gate, int], ...], ...]:
    """The gates of every exchange, and how many of each; those of the lowest digits first."""
    lowest, others = joint(lowest=True), joint(lowest=False)
    return (((digit(digit_bits), DIGITS),), ((lowest, 1), (others, _JOINED - 1)), ((lowest, 1),))


def _gates(digit_bits: int) -> Iterator[tuple[Gate, int]]:
    for step in steps(digit_bits):
        yield from step


def masks_of(digit_bits: int) -> int:
    """Random bits that one sign takes of each party."""
    return sum(len(gate.opened) * count for gate, count in _gates(digit_bits))


def digit_bits_of(masks: int) -> int:
    """The reverse of `masks_of`."""
    return next(digit_bits for digit_bits in range(1, masks) if masks_of(digit_bits) == masks)


def products_of(digit_bits: int) -> int:
    """Products of them that one sign takes."""
    return sum(len(gate.products) * count for gate, count in _gates(digit_bits))


def opened_in_steps(digit_bits: int) -> list[int]:
    """Bits that each party sends of one number, in every exchange."""
    return [sum(len(gate.opened) * count for gate, count in step) for step in steps(digit_bits)]


# --- Preparing --------------------------------------------------------------------------------------------------------


def products_by_size(digit_bits: int) -> list[int]:
    """How many products of two masks one sign takes, of three, and so on: each a product of one of these and a mask."""
    sizes = [len(some) for gate, count in _gates(digit_bits) for some in gate.products * count]
    return [sizes.count(size) for size in range(2, max(sizes) + 1)]


def multiplied(masks: Ring, digit_bits: int) -> Generator[tuple[Ring, Ring], Ring, Ring]:
    """Shares of the products of `masks` `(words, masks_of)`: `(words, products_of)`.

    Yields words whose bits are to be multiplied, `(n, words)` each, and is sent this party's shares of the products.
    """
    gates = list(_gates(digit_bits))
    known = []
    for (gate, count), drawn in zip(gates, _split(masks.T, [len(gate.opened) * count for gate, count in gates])):
        named = gate.masks(drawn.reshape(len(gate.opened), count, -1))
        known.append(dict[Variables, Ring]({(name,): mask for name, mask in named.items()}))
    for size in range(2, len(products_by_size(digit_bits)) + 2):
        wanted = [(place, some) for place, (gate, _) in enumerate(gates) for some in gate.products if len(some) == size]
        left = [known[place][some[:-1]] for place, some in wanted]
        right = [known[place][some[-1:]] for place, some in wanted]
        found = yield np.concatenate(left), np.concatenate(right)
        for (place, some), share in zip(wanted, _split(found, [gates[place][1] for place, _ in wanted])):
            known[place][some] = share
    every = [known[place][some] for place, (gate, _) in enumerate(gates) for some in gate.products]
    return np.ascontiguousarray(np.concatenate(every).T)


def _split(rows: Ring, sizes: Sequence[int]) -> list[Ring]:
    return np.split(rows, np.cumsum(sizes)[:-1])


# --- Using ------------------------------------------------------------------------------------------------------------


def signs(x: Ring, window: Window, masks: Ring, products: Ring, *, server: bool) -> Generator[Ring, Ring, np.ndarray]:
    """This party's shares of which numbers are negative, one bit each, `uint8`, of its shares `x` `(n,)` of them.

    Yields what this party sends, and is sent what the other one did.

    Args:
        masks: `(words, masks_of)`, as prepared.
        products: `(words, products_of)`.
    """
    planes = _planes(x, window)
    own, highest = planes[:-1].reshape(DIGITS, window.digit_bits, -1), planes[-1]
    nothing = np.zeros_like(highest)
    shares: dict[str, Ring] = {}
    for place in range(window.digit_bits):
        shares[f"{'u' if server else 'v'}{place}"] = own[:, place]
        shares[f"{'v' if server else 'u'}{place}"] = np.broadcast_to(nothing, own[:, place].shape)

    entries = list(_gates(window.digit_bits))
    drawn = iter(_split(masks.T, [len(gate.opened) * count for gate, count in entries]))
    multiplied_masks = iter(_split(products.T, [len(gate.products) * count for gate, count in entries]))
    carry = passing = np.empty(0, np.uint64)
    for number, step in enumerate(steps(window.digit_bits)):
        if number:
            shares = _neighbours(carry, passing)
        gates, first = [], 0
        for gate, count in step:
            part = {name: share[first : first + count] for name, share in shares.items()}
            a = next(drawn).reshape(len(gate.opened), count, -1)
            c = next(multiplied_masks).reshape(len(gate.products), count, -1)
            gates.append((gate, part, a, c, np.stack([part[name] for name in gate.opened]) ^ a))
            first += count
        sent = np.concatenate([masked.reshape(-1, len(highest)) for *_, masked in gates])
        seen = sent ^ (yield sent)
        results = []
        for gate, part, a, c, masked in gates:
            opened, seen = seen[: masked.shape[0] * masked.shape[1]], seen[masked.shape[0] * masked.shape[1] :]
            results.append(gate.evaluated(part, opened.reshape(masked.shape), a, c, server=server))
        carry = np.concatenate([found[0] for found in results])
        passing = np.concatenate([found[1] if len(found) > 1 else np.zeros_like(found[0]) for found in results])
    bits = np.unpackbits((carry[0] ^ highest).view(np.uint8), bitorder="little")
    return bits[: x.size]


def _neighbours(carry: Ring, passing: Ring) -> dict[str, Ring]:
    """Shares of every four neighbours' g and p, each `(n, words)`, by their names in `joint`."""
    found = {f"g{place}": carry[place::_JOINED] for place in range(_JOINED)}
    return found | {f"p{place}": passing[place::_JOINED] for place in range(_JOINED)}


def _planes(x: Ring, window: Window) -> Ring:
    """The bits of a window, lowest first and the sign's last, `(bits + 1, words)`."""
    used = window.bits + 1
    shifted = np.zeros(words_for(x.size) * WORD, "<u8")
    shifted[: x.size] = x >> np.uint64(window.dropped)
    each = shifted.view(np.uint8).reshape(-1, 8)[:, : -(-used // 8)]
    bits = np.unpackbits(each, axis=1, bitorder="little")[:, :used]
    return (
        np.packbits(np.ascontiguousarray(bits.T), axis=1, bitorder="little").view("<u8").astype(np.uint64, copy=False)
    )
