"""Which bits of a number's shares a prepared comparison looks at, and so for which numbers it holds."""

from __future__ import annotations

from dataclasses import dataclass

DIGITS = 16  # that the bits below a sign are cut into


@dataclass(frozen=True)
class Window:
    """Which bits of a share matter: below the sign 16 digits, and below these what is not looked at.

    Numbers hold to 2^`digits` of the last place that is looked at. What is dropped may make a number from 0 to below
    that place a negative one, as a carry from there is lost.

    Attributes:
        digit_bits: bits of a digit.
        dropped: bits of a share below the lowest digit.
    """

    digit_bits: int
    dropped: int

    @property
    def bits(self) -> int:
        """Bits of all digits."""
        return DIGITS * self.digit_bits

    def limit(self, fraction_bits: int) -> float:
        """Magnitude of a number with so many fraction bits below which its sign is right."""
        return 2.0 ** (self.bits + self.dropped - fraction_bits)


# Two bits a digit hold to 2^18 with 14 fraction bits, or to 2^14 with 18; three to 2^30 with 18.
_NARROW_FRACTION_BITS, _EXACT_FRACTION_BITS = 14, 18
_FEW_FRACTION_BITS = 16  # which are chosen where values are large


def narrow(fraction_bits: int) -> Window:
    """For what may lose the smallest numbers: |x| < 2^18, and one from 0 to 2^-14 may be taken for a negative one.

    With 16 fraction bits and fewer `wide`.
    """
    if fraction_bits <= _FEW_FRACTION_BITS:
        return wide(fraction_bits)
    return Window(2, max(fraction_bits - _NARROW_FRACTION_BITS, 0))


def exact(fraction_bits: int) -> Window:
    """For |x| < 2^14."""
    return Window(2, max(fraction_bits - _EXACT_FRACTION_BITS, 0))


def wide(fraction_bits: int) -> Window:
    """For any number that can be multiplied: |x| < 2^30 with 18 fraction bits."""
    del fraction_bits  # whatever they are
    return Window(3, 0)
