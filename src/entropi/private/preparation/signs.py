"""Signs of shared numbers, from bits that were prepared: three messages each way.

The parties' shares u and v of a number add up to it, so its sign is the highest bit of u + v: that of u, that of v and
the carry from the bits below, modulo two. These are sixteen digits of a few bits. Of each the parties find shares of
two bits, whether it makes a carry (g) and whether it passes one on (p), and so of four neighbours, highest first:

    g = g3 + p3 g2 + p3 p2 g1 + p3 p2 p1 g0    p = p3 p2 p1 p0    (modulo two)

Twice that, and one carry is left. Every such step is one exchange, see `gates`.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import cache

import numpy as np

from entropi.private.compute.windows import DIGITS, Window
from entropi.private.preparation.gates import Gate, Gates, masks_of, split
from entropi.private.preparation.ring import WORD, Ring, as_words, from_words, words_for

_JOINED = 4  # neighbouring digits that become one in a step


# --- What is computed of bits -----------------------------------------------------------------------------------------


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
def steps(digit_bits: int) -> tuple[Gates, ...]:
    """The gates of every exchange; those of the lowest digits first."""
    lowest, others = joint(lowest=True), joint(lowest=False)
    return (((digit(digit_bits), DIGITS),), ((lowest, 1), (others, _JOINED - 1)), ((lowest, 1),))


def gates(digit_bits: int) -> Gates:
    """Those of all exchanges."""
    return [entry for step in steps(digit_bits) for entry in step]


def digit_bits_of(masks: int) -> int:
    """Bits of the digits of signs that take so many random bits of each party."""
    return next(digit_bits for digit_bits in range(1, masks) if masks_of(gates(digit_bits)) == masks)


def opened_in_steps(digit_bits: int) -> list[int]:
    """Bits that each party sends of one number, in every exchange."""
    return [masks_of(step) for step in steps(digit_bits)]


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

    entries = gates(window.digit_bits)
    drawn = iter(split(masks.T, [len(gate.opened) * count for gate, count in entries]))
    multiplied_masks = iter(split(products.T, [len(gate.products) * count for gate, count in entries]))
    carry = passing = np.empty(0, np.uint64)
    for number, step in enumerate(steps(window.digit_bits)):
        if number:
            shares = _neighbours(carry, passing)
        masked_gates, first = [], 0
        for gate, count in step:
            part = {name: share[first : first + count] for name, share in shares.items()}
            a = next(drawn).reshape(len(gate.opened), count, -1)
            c = next(multiplied_masks).reshape(len(gate.products), count, -1)
            masked_gates.append((gate, part, a, c, np.stack([part[name] for name in gate.opened]) ^ a))
            first += count
        sent = np.concatenate([masked.reshape(-1, len(highest)) for *_, masked in masked_gates])
        seen = sent ^ (yield sent)
        results = []
        for gate, part, a, c, masked in masked_gates:
            opened, seen = seen[: masked.shape[0] * masked.shape[1]], seen[masked.shape[0] * masked.shape[1] :]
            results.append(gate.evaluated(part, opened.reshape(masked.shape), a, c, server=server))
        carry = np.concatenate([found[0] for found in results])
        passing = np.concatenate([found[1] if len(found) > 1 else np.zeros_like(found[0]) for found in results])
    return from_words(carry[0] ^ highest, x.size)


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
    return as_words(np.ascontiguousarray(bits.T))
