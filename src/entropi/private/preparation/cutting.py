"""A stage of the private program, cut at the products that can be prepared.

A stage is traced, and its trace is cut where it calls a function that `compute.functions.bilinear` has marked. Between
cuts are *local parts*, which the engine runs as ever; at a cut are products, all of those that wait for the same
parts at once. A product comes back with twice the fraction bits, and a part of its own truncates it: within another
part the compiler would multiply other factors into the truncation, of which the fraction bits hold nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal as Constant

from entropi.private.compute.functions import BILINEAR
from entropi.private.compute.program import Comparable, Stage

Shape: TypeAlias = tuple[int, ...]
UNTRUNCATED = "'"  # behind the name of a value with twice the fraction bits


@dataclass(frozen=True)
class Product:
    """A bilinear function of one or two secret values, which are named, and the name of its untruncated result.

    `kind` is the marked function's name.
    """

    kind: str
    operands: tuple[str, ...]
    shapes: tuple[Shape, ...]
    result: str
    result_shape: Shape


@dataclass(frozen=True)
class Step:
    """Products whose operands are known, all at once, and then what the engine computes of their results."""

    products: tuple[Product, ...]
    parts: tuple[Stage, ...]


def cut(stage: Stage, shapes: dict[str, Shape], fraction_bits: int) -> list[Step]:
    """`stage` as steps over named values; the shapes of its results are added to `shapes`."""
    known = tuple(shapes[name] for name in stage.inputs)
    steps, results = _cut(Comparable.of(stage.function), known, fraction_bits)
    shapes.update(zip(stage.outputs, results))
    _check_order(stage, steps)
    names = {f"in {number}": name for number, name in enumerate(stage.inputs)}
    names.update((f"out {number}", name) for number, name in enumerate(stage.outputs))
    return [_renamed(step, stage, names) for step in steps]


def _check_order(stage: Stage, steps: tuple[Step, ...]) -> None:
    """A result may have an input's name, and must then not be written before that input was read for the last time."""
    written: set[str] = set()

    def read(names: tuple[str, ...]) -> None:
        for name in names:
            kind, _, number = name.partition(" ")
            early = kind == "in" and stage.inputs[int(number)] in written
            assert not early, f"{stage.name} reads {stage.inputs[int(number)]} after it was replaced"

    for step in steps:
        for product in step.products:
            read(product.operands)
        for part in step.parts:
            read(part.inputs)
            results = (name.split(" ") for name in part.outputs if name.startswith("out "))
            written.update(stage.outputs[int(number)] for _, number in results)


def _renamed(step: Step, stage: Stage, names: dict[str, str]) -> Step:
    def of(name: str) -> str:
        bare = name.removesuffix(UNTRUNCATED)
        return names.get(bare, bare) + name[len(bare) :]

    def together(some: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(of, some))

    products = tuple(
        Product(p.kind, together(p.operands), p.shapes, of(p.result), p.result_shape) for p in step.products
    )
    parts = tuple(
        Stage(stage.name, stage.layer, part.function, together(part.inputs), together(part.outputs))
        for part in step.parts
    )
    return Step(products, parts)


@functools.lru_cache(maxsize=4096)
def _cut(
    program: Comparable, shapes: tuple[Shape, ...], fraction_bits: int
) -> tuple[tuple[Step, ...], tuple[Shape, ...]]:
    """Steps over values "in 0", "out 0" and others; cut once for every function and shapes, which layers share."""
    closed = jax.make_jaxpr(program.function)(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))
    jaxpr = closed.jaxpr
    trace = _Trace(jaxpr, dict(zip(jaxpr.constvars, closed.consts)), partial(truncate, bits=fraction_bits))
    results = tuple(tuple(variable.aval.shape) for variable in jaxpr.outvars)
    return tuple(trace.steps()), results


class _Trace:
    """A jaxpr, its equations by how many products one after another they wait for."""

    def __init__(self, jaxpr: Any, constants: dict[Any, Any], truncation: Callable[..., Any]) -> None:
        self.jaxpr, self.constants, self.truncation = jaxpr, constants, truncation
        self.name: dict[Any, str] = {v: f"in {number}" for number, v in enumerate(jaxpr.invars)}
        made = {v for equation in jaxpr.eqns for v in equation.outvars}
        for number, variable in enumerate(jaxpr.outvars):
            if not isinstance(variable, Constant) and variable in made:
                self.name.setdefault(variable, f"out {number}")
        self.waits: dict[Any, int] = dict.fromkeys([*jaxpr.invars, *jaxpr.constvars], 0)
        self.products: dict[int, list[Any]] = {}
        self.public = set(jaxpr.constvars)  # and what is made of constants alone: nobody's share
        for equation in jaxpr.eqns:
            if all(isinstance(v, Constant) or v in self.public for v in equation.invars):
                self.public.update(equation.outvars)
            depth = max((self.waits[v] for v in equation.invars if not isinstance(v, Constant)), default=0)
            marked = is_product(equation)
            if marked:
                self.products.setdefault(depth + 1, []).append(equation)
            self.waits.update(dict.fromkeys(equation.outvars, depth + marked))
        self._delay()

    def _delay(self) -> None:
        """Compute what is local as late as its readers allow: one part more is one run of the engine more."""
        last = max([*self.products, 0])
        latest: dict[Any, int] = dict.fromkeys(_variables([self.jaxpr]), last)
        local: dict[int, list[Any]] = {}
        for equation in reversed(self.jaxpr.eqns):
            if is_product(equation):
                depth = self.waits[equation.outvars[0]] - 1
            else:
                depth = min(latest.get(v, last) for v in equation.outvars)
                local.setdefault(depth, []).insert(0, equation)
            for variable in _variables([equation]):
                latest[variable] = min(latest.get(variable, last), depth)
        self.local = local

    def steps(self) -> Iterator[Step]:
        """The steps, in order."""
        last = max([*self.products, 0])
        for depth in range(last + 1):
            products = tuple(map(self._product, self.products.get(depth, [])))
            parts = [self._truncation(products)] if products else []
            if (part := self._part(depth)) is not None:
                parts.append(part)
            yield Step(products, tuple(parts))

    def _named(self, variable: Any) -> str:
        return self.name.setdefault(variable, f"value {len(self.name)}")

    def _product(self, equation: Any) -> Product:
        operands = equation.invars
        assert not any(isinstance(v, Constant) or v in self.public for v in operands), (
            "an operand of a product is public"
        )
        (result,) = equation.outvars
        return Product(
            kind=equation.params["name"],
            operands=tuple(map(self._named, operands)),
            shapes=tuple(tuple(v.aval.shape) for v in operands),
            result=self._named(result) + UNTRUNCATED,
            result_shape=tuple(result.aval.shape),
        )

    def _truncation(self, products: tuple[Product, ...]) -> Stage:
        raw = tuple(product.result for product in products)
        return Stage("", -1, self.truncation, raw, tuple(name.removesuffix(UNTRUNCATED) for name in raw))

    def _part(self, depth: int) -> Stage | None:
        """What waits for `depth` products: reads what earlier parts wrote, writes what later ones or nobody reads."""
        equations, last = self.local.get(depth, []), max([*self.products, 0])
        made = dict.fromkeys(v for equation in equations for v in equation.outvars)
        later = [e for d in range(depth + 1, last + 1) for e in (*self.products.get(d, []), *self.local.get(d, []))]
        used = {*_variables(later), *_variables([self.jaxpr])}
        results = [(v, self._named(v)) for v in made if v in used]
        if depth == last:  # inputs and constants that are results too, and results that are there twice
            outs = [(v, f"out {number}") for number, v in enumerate(self.jaxpr.outvars)]
            results += [(v, name) for v, name in outs if isinstance(v, Constant) or self.name.get(v) != name]
        if not results:
            return None
        needed = {*_variables(equations), *(v for v, _ in results if not isinstance(v, Constant))}
        reads = [v for v in self.waits if v in needed and v not in made and v not in self.constants]
        function = _Evaluation(tuple(equations), tuple(reads), tuple(v for v, _ in results), self.constants)
        return Stage("", -1, function, tuple(map(self._named, reads)), tuple(name for _, name in results))


def _variables(users: list[Any]) -> Iterator[Any]:
    """What some equations read, or a jaxpr returns."""
    for user in users:
        read = user.invars if hasattr(user, "primitive") else user.outvars
        yield from (v for v in read if not isinstance(v, Constant))


def is_product(equation: Any) -> bool:
    """Whether an equation of a trace calls a marked function."""
    return equation.primitive.name == "pjit" and equation.params["name"] in BILINEAR


class _Evaluation:
    """Some equations of a jaxpr as a function of the values that they read. Hashed by identity."""

    def __init__(
        self, equations: tuple[Any, ...], reads: tuple[Any, ...], writes: tuple[Any, ...], constants: dict[Any, Any]
    ) -> None:
        self.equations, self.reads, self.writes, self.constants = equations, reads, writes, constants

    def __call__(self, *operands: Array) -> Any:
        values: dict[Any, Any] = {**self.constants, **dict(zip(self.reads, operands))}

        def of(variable: Any) -> Any:
            return variable.val if isinstance(variable, Constant) else values[variable]

        for equation in self.equations:
            inner, options = equation.primitive.get_bind_params(equation.params)
            results = equation.primitive.bind(*inner, *map(of, equation.invars), **options)
            values.update(zip(equation.outvars, results if equation.primitive.multiple_results else [results]))
        written = [of(variable) for variable in self.writes]
        return written[0] if len(written) == 1 else tuple(written)


def truncate(*values: Array, bits: int) -> Any:
    """Values of 2 `bits` fraction bits, with `bits` of them; all at once, which takes one call's rounds.

    The last factor is 1, of a zero: by factors all of which are small the engine multiplies with twice its fraction
    bits, and the ring would hold no value above 2^9.
    """
    flat = jnp.concatenate([*(value.reshape(-1) for value in values), jnp.zeros(1, values[0].dtype)])
    factors = np.append(np.full(flat.size - 1, 2.0**-bits), 1.0).astype(flat.dtype)
    ends = np.cumsum([value.size for value in values])[:-1]
    parts = jnp.split((flat * factors)[:-1], ends)
    truncated = tuple(part.reshape(value.shape) for part, value in zip(parts, values))
    return truncated[0] if len(truncated) == 1 else truncated
