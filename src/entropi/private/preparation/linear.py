"""Parts of the program that are linear in secret values: each party computes them on its own shares, in numpy.

Moving, adding, and multiplying by public numbers commutes with taking shares, so nothing is sent for it. What a product
returns has twice the fraction bits, and so has a value times a public number that is not whole: such a value is added
to others as it is, and cut to its fraction bits only where a product, the engine or another such number needs it
(`truncation`), all values of a part at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from jax.extend.core import Literal as Constant
from numpy.typing import NDArray

from entropi.private.preparation.ring import Ring

Array: TypeAlias = NDArray[Any]
_WHOLE = 2.0**20  # below which a whole public number is a factor without fraction bits


def _broadcast(x: Array, *, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_: Any) -> Array:
    sizes = dict(zip(broadcast_dimensions, x.shape))
    return np.broadcast_to(x.reshape([sizes.get(axis, 1) for axis in range(len(shape))]), shape)


def _slice(x: Array, *, start_indices: Sequence[int], limit_indices: Sequence[int], strides: Any) -> Array:
    steps = strides or [1] * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, steps))]


def _dynamic_slice(x: Array, *starts: Array, slice_sizes: Sequence[int]) -> Array:
    firsts = [min(max(int(start), 0), whole - size) for start, whole, size in zip(starts, x.shape, slice_sizes)]
    return x[tuple(slice(first, first + size) for first, size in zip(firsts, slice_sizes))]


def _select(which: Array, *cases: Array) -> Array:
    return np.where(which, cases[1], cases[0])


def _gather(x: Array, indices: Array, *, dimension_numbers: Any, **_: Any) -> Array:
    return np.take(x, indices[..., 0], axis=dimension_numbers.start_index_map[0])


# How numpy computes what JAX calls by these names. Of the first two groups all operands may be secret, of `_MOVES` the
# first one; of the last group none may.
_SUMS: dict[str, Callable[..., Array]] = {
    "add": lambda x, y: x + y,
    "add_any": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "neg": lambda x: np.zeros((), x.dtype) - x,
    "reduce_sum": lambda x, *, axes: x.sum(axis=axes, dtype=x.dtype),
}
_JOINS: dict[str, Callable[..., Array]] = {
    "concatenate": lambda *parts, dimension: np.concatenate(parts, axis=dimension),
    "select_n": _select,
}
_MOVES: dict[str, Callable[..., Array]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "transpose": lambda x, *, permutation: x.transpose(permutation),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "squeeze": lambda x, *, dimensions: x.squeeze(dimensions),
    "gather": _gather,
    "copy": lambda x: x,
    "device_put": lambda x, **_: x,
    "convert_element_type": lambda x, **_: x,
}
_OF_PUBLIC: dict[str, Callable[..., Array]] = {
    "mul": lambda x, y: x * y,
    "lt": lambda x, y: x < y,
    "iota": lambda *, dtype, shape, dimension, **_: np.indices(shape)[dimension].astype(dtype),
}
_BY_NAME = {**_SUMS, **_JOINS, **_MOVES, **_OF_PUBLIC}


def is_secret(variable: Any, public: Mapping[Any, Any]) -> bool:
    """Whether a variable of a trace is not among the `public` ones, whose values are known."""
    return not isinstance(variable, Constant) and variable not in public


def known(variable: Any, public: Mapping[Any, Any]) -> Array:
    """The value of a public variable."""
    return np.asarray(variable.val if isinstance(variable, Constant) else public[variable])


def evaluated(equation: Any, public: Mapping[Any, Any]) -> list[Any] | None:
    """Results of an equation of public values alone; None where one is secret, or the operation is not ours."""
    name = equation.primitive.name
    if name not in _BY_NAME or any(is_secret(v, public) for v in equation.invars):
        return None
    if name == "gather" and not _is_take(equation):
        return None
    operands = [known(v, public) for v in equation.invars]
    (out,) = equation.outvars
    return [_BY_NAME[name](*operands, **_options(equation)).astype(out.aval.dtype)]


def is_linear(equation: Any, public: Mapping[Any, Any]) -> bool:
    """Whether an equation is linear in its secret operands, and of a kind that `LinearPart` computes."""
    name, operands = equation.primitive.name, equation.invars
    if any(np.dtype(v.aval.dtype).kind != "f" for v in operands if is_secret(v, public)):
        return False
    if len(equation.outvars) != 1 or np.dtype(equation.outvars[0].aval.dtype).kind != "f":
        return False
    if name == "mul":
        return sum(is_secret(v, public) for v in operands) == 1
    if name == "select_n":
        return not is_secret(operands[0], public) and len(operands) == 3
    if name in _MOVES:
        return not any(is_secret(v, public) for v in operands[1:]) and (name != "gather" or _is_take(equation))
    return name in _SUMS or name in _JOINS


def _is_take(equation: Any) -> bool:
    """Whether a gather takes whole slices along one axis, by indices that stand in that axis' place."""
    x, indices = (v.aval for v in equation.invars)
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or numbers.collapsed_slice_dims != numbers.start_index_map:
        return False
    if getattr(numbers, "operand_batching_dims", ()):
        return False
    (axis,) = numbers.start_index_map
    wide = len(indices.shape) - 1
    others = [a for a in range(len(x.shape) - 1 + wide) if not axis <= a < axis + wide]
    whole = all(sizes[a] == x.shape[a] for a in range(len(x.shape)) if a != axis)
    return whole and list(numbers.offset_dims) == others


def _options(equation: Any) -> dict[str, Any]:
    """An equation's parameters, without those of its primitive that say nothing of the result here."""
    ignored = {"indices_are_sorted", "unique_indices", "mode", "fill_value", "sharding"}
    return {name: value for name, value in equation.params.items() if name not in ignored}


@dataclass(frozen=True, eq=False)
class LinearPart:
    """Some linear equations of a trace as one function of shares.

    Args:
        inputs, outputs: names of what is read and written, in the order of `read` and `written`, their variables; what
            is only read may be written too, with its fraction bits.
        doubled: variables that are read with twice the fraction bits.
        public: values of the trace's public variables.
    """

    equations: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    read: tuple[Any, ...]
    written: tuple[Any, ...]
    doubled: frozenset[Any]
    public: Mapping[Any, Any]

    @functools.cached_property
    def _plan(self) -> _Plan:
        return _Plan(self)

    def renamed(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> LinearPart:
        """The same over other values."""
        part = replace(self, inputs=inputs, outputs=outputs)
        part.__dict__["_plan"] = self._plan  # which does not depend on names
        return part

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of what is written."""
        return [tuple(v.aval.shape) for v in self.written]

    @property
    def truncations(self) -> list[int]:
        """How many numbers are truncated at a time."""
        return [sum(int(np.prod(v.aval.shape)) for v in some) for some in self._plan.truncated if some]

    def evaluate(
        self, shares: Sequence[Ring], fraction_bits: int, *, server: bool
    ) -> Generator[list[Ring], list[Ring], list[Ring]]:
        """This party's shares of what is written; yields what has to be truncated, and is sent that."""
        plan, bits = self._plan, np.uint64(fraction_bits)
        full: dict[Any, Ring] = dict(zip(self.read, shares))
        short: dict[Any, Ring] = {}

        def constant(variable: Any, level: int) -> Ring:
            """Shares of a public number: all of it is the server's."""
            value = known(variable, self.public).astype(np.float64)
            scaled = np.rint(value * 2.0 ** (fraction_bits * level)) if server else np.zeros(value.shape)
            return scaled.astype(np.int64).view(np.uint64)

        def operand(variable: Any, level: int) -> Ring:
            if not is_secret(variable, self.public):
                return constant(variable, level)
            if plan.level[variable] == level:
                return full[variable]
            return short[variable] if level == 1 else full[variable] << bits

        for number, equations in enumerate(plan.rounds):
            for equation in equations:
                full[equation.outvars[0]] = self._computed(equation, operand, fraction_bits)
            if wanted := plan.truncated[number]:
                cut = yield [full[v] for v in wanted]
                short.update(zip(wanted, cut))
        return [operand(v, 1) for v in self.written]

    def _computed(self, equation: Any, operand: Callable[[Any, int], Ring], fraction_bits: int) -> Ring:
        name, level = equation.primitive.name, self._plan.level[equation.outvars[0]]
        if name == "mul":
            (secret,) = (v for v in equation.invars if is_secret(v, self.public))
            factor = _public_factor(equation, self.public)
            whole = _is_whole(factor)
            numbers = np.rint(factor if whole else factor * 2.0**fraction_bits).astype(np.int64).view(np.uint64)
            product: Ring = operand(secret, level if whole else 1) * numbers
            return product
        if name == "select_n":
            which, *cases = equation.invars
            return _select(known(which, self.public), *(operand(v, level) for v in cases))
        if name in _MOVES:
            others = [known(v, self.public) for v in equation.invars[1:]]
            return _MOVES[name](operand(equation.invars[0], level), *others, **_options(equation))
        return _BY_NAME[name](*(operand(v, level) for v in equation.invars), **_options(equation))


def _public_factor(equation: Any, public: Mapping[Any, Any]) -> Array:
    (variable,) = (v for v in equation.invars if not is_secret(v, public))
    return known(variable, public).astype(np.float64)


def _is_whole(factor: Array) -> bool:
    return bool((factor == np.rint(factor)).all() and np.abs(factor).max(initial=0) < _WHOLE)


class _Plan:
    """In which round every equation is computed, and what is truncated at the end of each.

    `level` of a value is 2 where it has twice the fraction bits, otherwise 1. A value is truncated before it is
    multiplied by a public number, before there are more copies of it, and before it is joined with others that have
    been; sums take others to twice the fraction bits, which is exact.
    """

    def __init__(self, part: LinearPart) -> None:
        self.level: dict[Any, int] = {v: 2 if v in part.doubled else 1 for v in part.read}
        self.rounds: list[list[Any]] = [[]]
        self.truncated: list[list[Any]] = [[]]
        self._known: dict[Any, int] = dict.fromkeys(part.read, 0)  # the round in which a value is computed
        self._public = part.public
        for equation in part.equations:
            self._place(equation)
        for variable in part.written:
            if is_secret(variable, part.public):
                self._cut(variable)

    def _place(self, equation: Any) -> None:
        secret = [v for v in equation.invars if is_secret(v, self._public)]
        (out,) = equation.outvars
        levels = {self.level[v] for v in secret}
        name, grows = equation.primitive.name, out.aval.size > max(v.aval.size for v in secret)
        scales = name == "mul" and not _is_whole(_public_factor(equation, self._public))
        joins_cut = name in _JOINS and len(levels) == 2
        low = scales or joins_cut or (grows and name not in _JOINS)

        number = 0
        for variable in secret:
            number = max(number, self._cut(variable) if low else self._known[variable])
        self._grow(number)
        self.rounds[number].append(equation)
        self._known[out] = number
        self.level[out] = 2 if scales or (not low and 2 in levels) else 1

    def _cut(self, variable: Any) -> int:
        """Have a value with its fraction bits, and say from which round on it is there."""
        known = self._known[variable]
        if self.level[variable] == 1:
            return known
        if variable not in self.truncated[known]:
            self.truncated[known].append(variable)
        self._grow(known + 1)
        return known + 1

    def _grow(self, last: int) -> None:
        while len(self.rounds) <= last:
            self.rounds.append([])
            self.truncated.append([])
