"""The forms of a softmax: which function stands in the exponential's place, by one name everywhere.

| text | weight of a key, before it is divided |
|---|---|
| `exact` | exp(s) of the logit s |
| `quartic` | exp(x) to 0.0002 of the distance x to the row's largest logit, by two quartics; in private only |
| `power-t` | (1 + x / 2^t)^(2^t) of the distance x to the row's largest logit, clipped |
| `polynomial-t` | (1 + s / 2^t)^(2^t) of the logit s itself; nothing is compared |
| `polynomial-t/keys` | the same, divided by the number of keys that the row sees, which is public; no softmax |
| `polynomial-t/N` | the same, divided by N in every row, such as 128: the keys of a long row, and no softmax either |

Weights are divided by their row's sum, but for the last two forms, whose entropy is that of the weights so divided.

Configurations, recipes, messages and the command line hold the text. A further form is an entry of `KINDS`, and its
mathematics in `entropi.entropy.secure_softmax` and `entropi.private.compute`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from entropi.errors import UserError

# What a row's weights are divided by: their sum, how many they are, or a number that is the same for all rows.
Divisor: TypeAlias = Literal["sum", "keys"] | int
LARGEST_DIVISOR = 999_999


class Kind(NamedTuple):
    """What is known of a kind of softmax."""

    words: str  # before "t=3"
    label: str  # likewise, short enough to stand beside a figure
    formula: str  # of a weight before it is divided, {n} being 2^t
    most: int  # t that attention takes, the least is 1; 0 where there is no t
    most_in_models: int  # more squarings than fixed-point arithmetic has use for are not for models
    trained: bool  # models may be trained with it
    stands_for_exact: bool  # private inference may evaluate it for models trained with the exact softmax
    of_distance: bool  # weights are of the distance to the row's largest logit: T divides it, and the sum is 1 or more
    public_divisors: bool = False  # for weights that nothing has made small before


KINDS = {
    "exact": Kind("exact softmax", "exact", "exp(x)", 0, 0, trained=True, stands_for_exact=False, of_distance=True),
    "quartic": Kind(
        words="quartic exponential",
        label="quartic",
        formula="exp(x) to 0.0002, of the distance to the row's largest logit",
        most=0,
        most_in_models=0,
        trained=False,
        stands_for_exact=True,
        of_distance=True,
    ),
    "power": Kind(
        words="softmax kernel",
        label="",
        formula="(1 + x/{n})^{n} of the distance to the row's largest logit",
        most=16,
        most_in_models=8,
        trained=True,
        stands_for_exact=True,
        of_distance=True,
    ),
    # Beyond t=8 float32 would lose in 1 + s / 2^t what the power multiplies.
    "polynomial": Kind(
        words="polynomial kernel",
        label="polynomial",
        formula="(1 + x/{n})^{n} of the logit itself, nothing compared",
        most=8,
        most_in_models=8,
        trained=True,
        stands_for_exact=False,
        of_distance=False,
        public_divisors=True,
    ),
}


def _divides(divisor: object, kind: Kind) -> bool:
    """Whether weights of this kind may be divided so."""
    constant = type(divisor) is int and 1 <= divisor <= LARGEST_DIVISOR
    return divisor == "sum" or (kind.public_divisors and (divisor == "keys" or constant))


@dataclass(frozen=True)
class SoftmaxForm:
    """One form of the softmax; `str(form)` is its text, such as "power-2".

    Attributes:
        kind: a name of `KINDS`: "exact", "quartic", "power" or "polynomial".
        iterations: t, the number of squarings; 0 where the kind has none.
        divisor: what a row's weights are divided by: their "sum", the number of "keys" that the row sees, or a number.

    Raises:
        UserError: another kind, an impossible t, or a divisor that the kind does not have; lists what is possible.
    """

    kind: str = "exact"
    iterations: int = 0
    divisor: Divisor = "sum"

    def __post_init__(self) -> None:
        kind = KINDS.get(self.kind)
        if (
            kind is None
            or type(self.iterations) is not int
            or not bool(kind.most) <= self.iterations <= kind.most
            or not _divides(self.divisor, kind)
        ):
            raise _refusal("softmax", str(self), {name: known.most for name, known in KINDS.items()})

    def __str__(self) -> str:
        text = f"{self.kind}-{self.iterations}" if self.iterations else self.kind
        return text if self.divisor == "sum" else f"{text}/{self.divisor}"

    @classmethod
    def parse(cls, text: SoftmaxForm | str) -> SoftmaxForm:
        """The form that a text says; a form is one already.

        Raises:
            UserError: no form's text; lists what is possible.
        """
        if isinstance(text, SoftmaxForm):
            return text
        return _parsed(text, "softmax", {name: kind.most for name, kind in KINDS.items()})

    @property
    def exact(self) -> bool:
        return self.kind == "exact"

    @property
    def of_distance(self) -> bool:
        """Whether weights depend on the distance to the row's largest logit alone.

        Where they do not, no logits are compared in private, and the mean weight of a row may be of any size.
        """
        return KINDS[self.kind].of_distance

    @property
    def public_divisor(self) -> bool:
        """Whether weights are divided by what everyone knows, their number or a constant, and not by their sum."""
        return self.divisor != "sum"

    @property
    def over_sum(self) -> SoftmaxForm:
        """The form of the same weights divided by their sum, which all is of that speaks of a row's distribution."""
        return replace(self, divisor="sum")

    @property
    def has_offsets(self) -> bool:
        """Whether a temperature is an offset of the logits: where weights may be multiplied by anything."""
        return not self.of_distance and not self.public_divisor

    @property
    def stands_for_exact(self) -> bool:
        """Whether private inference may evaluate it for a model trained with the exact softmax."""
        return KINDS[self.kind].stands_for_exact

    @property
    def words(self) -> str:
        """For people: "softmax kernel t=8"."""
        over = f" over {self._over}" if self.public_divisor else ""
        return KINDS[self.kind].words + (f" t={self.iterations}" if self.iterations else "") + over

    @property
    def label(self) -> str:
        """The same, short enough to stand beside a figure: "t=8"."""
        label = " ".join(filter(None, (KINDS[self.kind].label, f"t={self.iterations}" if self.iterations else "")))
        return label + (f"/{self.divisor}" if self.public_divisor else "")

    @property
    def formula(self) -> str:
        """The weight of a key, before it is divided: "(1 + x/4)^4 of ..."."""
        over = f", over {self._over}" if self.public_divisor else ""
        return KINDS[self.kind].formula.replace("{n}", str(2**self.iterations)) + over

    @property
    def _over(self) -> str:
        return "the number of keys" if self.divisor == "keys" else str(self.divisor)


EXACT = SoftmaxForm()
OVER_KEYS = SoftmaxForm("polynomial", 1, "keys")  # of architectures of powers for which nobody says another
FORMER = ("exp_iterations", "polynomial")  # settings of older files, see `from_former`
USUAL_FOR_EXACT = "quartic"  # which private inference evaluates for models trained with the exact softmax


def share_scale(positions: int) -> float:
    """K of the public K / n by which a row's sum over n keys is multiplied in private; its weights are K times smaller.

    With a constant in the place of n it is the same K.
    As a fixed-point number 1 / n would be wrong by a share of up to n / 2^19 at 18 fraction bits, 0.2 % of 1,024 keys;
    but what short rows are wrong by grows with K. This one of the `positions` makes the former 0.02 % at 1,024.
    """
    return max(1.0, math.sqrt(positions) / 4)


def parse_of_model(text: str) -> SoftmaxForm:
    """The form that a model may be trained with, so that private inference can evaluate it.

    Raises:
        UserError: no such form; lists what is possible.
    """
    return _parsed(text, "softmax", {name: kind.most_in_models for name, kind in KINDS.items() if kind.trained})


def parse_of_attention(text: SoftmaxForm | str) -> SoftmaxForm:
    """The form that `entropi.entropy_attention` is to compute.

    Raises:
        UserError: no such form; lists what is possible.
    """
    return _parsed(str(text), "softmax", {name: kind.most for name, kind in KINDS.items() if kind.trained})


def parse_for_exact(text: str, name: str = "softmax") -> SoftmaxForm:
    """The form that private inference is to evaluate for models trained with the exact softmax.

    Raises:
        UserError: no form that could stand for it; says what is possible, and that it is the setting `name`.
    """
    return _parsed(text, name, {name: kind.most_in_models for name, kind in KINDS.items() if kind.stands_for_exact})


def parse_in_private(text: str, name: str = "softmax") -> SoftmaxForm:
    """The form that private inference is to evaluate, whatever the model was trained with.

    Raises:
        UserError: no such form, or the exact softmax; says what is possible, and that it is the setting `name`.
    """
    return _parsed(text, name, {name: kind.most_in_models for name, kind in KINDS.items() if name != "exact"})


def from_former(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `softmax` in the place of the two settings that older files have for it.

    These are `exp_iterations`, t, where 0, None and nothing mean the exact softmax, and `polynomial`, true or false.

    Raises:
        UserError: values of theirs that mean nothing, or both ways of saying it.
    """
    former = {name: settings[name] for name in FORMER if name in settings}
    kept = {name: value for name, value in settings.items() if name not in former}
    if not former:
        return kept
    if "softmax" in kept:
        raise UserError(f"softmax has taken the place of {' and '.join(former)}: leave {'/'.join(former)} out")

    iterations, polynomial = former.get("exp_iterations") or 0, former.get("polynomial") or False
    if type(iterations) is not int:
        raise UserError(f"exp_iterations is {iterations!r}, expected int")
    if type(polynomial) is not bool:
        raise UserError(f"polynomial is {polynomial!r}, expected bool")
    if polynomial and not iterations:
        raise UserError("polynomial needs exp_iterations; write softmax: polynomial-1, or another t, for both")
    kind = "polynomial" if polynomial else "power" if iterations else "exact"
    return {**kept, "softmax": f"{kind}-{iterations}" if iterations else kind}


def _parsed(text: object, name: str, most: Mapping[str, int]) -> SoftmaxForm:
    """The form of a text, if it is one of those with t up to `most` of their kind."""
    pattern = r"([a-z]+)(?:-([1-9][0-9]?))?(?:/(keys|[1-9][0-9]{0,5}))?"
    found = re.fullmatch(pattern, text, re.ASCII) if isinstance(text, str) else None
    kind, iterations = (found[1], int(found[2] or 0)) if found else ("", 0)
    divisor: Divisor = "sum"
    if found and found[3]:
        divisor = "keys" if found[3] == "keys" else int(found[3])
    if kind not in most or not bool(most[kind]) <= iterations <= most[kind] or not _divides(divisor, KINDS[kind]):
        raise _refusal(name, text, most)
    return SoftmaxForm(kind, iterations, divisor)


def _refusal(name: str, got: object, most: Mapping[str, int]) -> UserError:
    *first, last = (
        (f"{kind}-1 to {kind}-{iterations}" if iterations else kind)
        + (" with or without /keys or a number such as /128" if KINDS[kind].public_divisors else "")
        for kind, iterations in most.items()
    )
    return UserError(f"{name} must be {' or '.join(filter(None, (', '.join(first), last)))}, got {str(got)[:60]!r}")
