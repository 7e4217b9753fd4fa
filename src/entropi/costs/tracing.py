"""Which protocols of the engine a stage of the private program calls, from its trace: no value is computed.

A stage is traced with public shapes, as the engine traces it, and its primitives are read one after another. What
costs nothing (additions, gathers by public index, changes of shape) leaves no trace here. Who knows a value decides
what an operation on it costs, so that is followed through the program.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.extend.core import Literal as Constant

from entropi.private.compute.program import Comparable, Stage

# Who knows a value: everybody, one party, or nobody (each party holds a share).
Known: TypeAlias = Literal["public", "server", "client", "shared"]

Kind: TypeAlias = Literal["product", "multiply", "square", "compare", "select", "select public", "truncate", "and"]


Numbers: TypeAlias = Literal["real", "whole", "bits"]
_TYPES: dict[Numbers, Any] = {"real": np.float32, "whole": np.int32, "bits": np.bool_}
_KINDS: dict[str, Numbers] = {"f": "real", "b": "bits"}  # numpy's kinds of types; all others are whole


@dataclass(frozen=True)
class ProtocolCall:
    """One call of a protocol of the engine.

    `size` numbers, for a product those of its result; `shape` (rows, inner, columns) of a product; who knows the
    operands of a product, of matrices or of numbers.
    """

    kind: Kind
    size: int
    shape: tuple[int, int, int] = (0, 0, 0)
    left: Known = "shared"
    right: Known = "shared"


class UnknownPrimitive(Exception):
    """The program uses a primitive that has no price."""


# Local whoever knows the operands: every party computes them on its shares.
_LOCAL = frozenset(
    (
        *("add", "sub", "neg", "reduce_sum"),
        *("concatenate", "reshape", "transpose", "broadcast_in_dim", "slice", "dynamic_slice", "squeeze", "rev", "pad"),
        *("expand_dims", "gather", "iota", "copy", "convert_element_type", "stop_gradient", "device_put"),
    )
)
_COMPARISONS = frozenset(("gt", "ge", "lt", "le"))


@dataclass(frozen=True)
class Value:
    """A named value between stages: its shape, who knows it, and whether its numbers are real, whole, or bits.

    Products of whole numbers, modulo 2^64, have no fraction bits to truncate.
    """

    shape: tuple[int, ...]
    known: Known = "shared"
    numbers: Numbers = "real"


def trace_calls(stage: Stage, values: dict[str, Value]) -> list[ProtocolCall]:
    """The protocols that `stage` calls on `values`, in order; what it writes is added to `values`.

    Raises:
        UnknownPrimitive: see there.
    """
    operands = tuple(values[name] for name in stage.inputs)
    found, results = _trace(Comparable.of(stage.function), operands)
    for name, value in zip(stage.outputs, results):
        values[name] = value
    return list(found)


@functools.lru_cache(maxsize=4096)
def _trace(program: Comparable, operands: tuple[Value, ...]) -> tuple[tuple[ProtocolCall, ...], tuple[Value, ...]]:
    """Traced once for every function and operands, which layers share."""
    arguments = [jax.ShapeDtypeStruct(one.shape, _TYPES[one.numbers]) for one in operands]
    closed = jax.make_jaxpr(program.function)(*arguments)
    found: list[ProtocolCall] = []
    known = _walk(closed.jaxpr, [operand.known for operand in operands], found)
    results = tuple(Value(tuple(v.aval.shape), k, _numbers(v.aval)) for v, k in zip(closed.jaxpr.outvars, known))
    return tuple(found), results


def _numbers(value: Any) -> Numbers:
    """Of which kind a traced value's numbers are."""
    return _KINDS.get(value.dtype.kind, "whole")


def _whole(value: Any) -> bool:
    return _numbers(value) == "whole"


def _walk(jaxpr: Any, inputs: list[Known], found: list[ProtocolCall]) -> list[Known]:
    """Append the calls of a jaxpr to `found`; returns who knows its outputs."""
    known: dict[Any, Known] = dict(zip(jaxpr.invars, inputs))
    known.update((variable, "public") for variable in jaxpr.constvars)

    def of(variable: Any) -> Known:
        return "public" if isinstance(variable, Constant) else known[variable]

    for equation in jaxpr.eqns:
        operands = [of(variable) for variable in equation.invars]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None:
            results = _walk(getattr(inner, "jaxpr", inner), operands, found)
        else:
            found += _calls_of(equation, operands)
            results = [_together(operands)] * len(equation.outvars)
        known.update(zip(equation.outvars, results))
    return [of(variable) for variable in jaxpr.outvars]


def _together(operands: list[Known]) -> Known:
    """Who knows what comes of these operands."""
    secret = {operand for operand in operands if operand != "public"}
    return "public" if not secret else secret.pop() if len(secret) == 1 else "shared"


def _calls_of(equation: Any, operands: list[Known]) -> Iterator[ProtocolCall]:
    name, result = equation.primitive.name, equation.outvars[0].aval
    size = int(np.prod(result.shape, dtype=np.int64))
    known = _together(operands)
    # A shared bit is turned around by one party alone, where the other operand is public.
    if name in _LOCAL or size == 0 or (name == "xor" and "public" in operands):
        return
    if name == "select_n":
        if operands[0] == "shared":  # between numbers that everybody knows it takes half of the transfers
            yield ProtocolCall("select public" if _together(operands[1:]) == "public" else "select", size)
    elif name in ("mul", "dot_general"):
        left, right = operands
        if known == "shared" and "public" not in (left, right):
            if name == "mul":
                yield ProtocolCall("multiply", size, left=left, right=right)
            else:
                batch, shape = _matrix_shape(equation)
                for _ in range(batch):
                    yield ProtocolCall("product", shape[0] * shape[2], shape, left, right)
                    if not _whole(result):
                        yield ProtocolCall("truncate", shape[0] * shape[2])
                return
        if known == "shared" and not _whole(result):
            yield ProtocolCall("truncate", size)
    elif known != "shared":
        if name not in ("max", "square", *_COMPARISONS):
            raise UnknownPrimitive(name)
    elif name == "max":
        yield ProtocolCall("compare", size)
        yield ProtocolCall("select", size)
    elif name in _COMPARISONS:
        yield ProtocolCall("compare", size)
    elif name == "square":
        yield ProtocolCall("square", size)
    elif name == "and" and _whole(result):  # of words, bit by bit
        yield ProtocolCall("and", size)
    else:
        raise UnknownPrimitive(name)


def _matrix_shape(equation: Any) -> tuple[int, tuple[int, int, int]]:
    """Number of products of a dot_general, and the (rows, inner, columns) of each."""
    (left_inner, _), (left_batch, _) = equation.params["dimension_numbers"]
    left, right = (variable.aval.shape for variable in equation.invars)
    batch = int(np.prod([left[axis] for axis in left_batch], dtype=np.int64))
    inner = int(np.prod([left[axis] for axis in left_inner], dtype=np.int64))
    rows = int(np.prod(left, dtype=np.int64)) // batch // inner
    columns = int(np.prod(right, dtype=np.int64)) // batch // inner
    return batch, (rows, inner, columns)
