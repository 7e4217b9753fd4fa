"""A stage of the private program, cut at the products and comparisons that can be prepared.

A stage is traced, and its trace is cut where it calls a function that `compute.functions` has marked as bilinear or
comparing. At a cut is all of that which waits for the same parts. Between cuts are *local parts*: what is linear is
computed by each party on its own shares (`linear`), and the engine runs what is left: the choice of likeliest tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import Array
from jax.extend.core import Literal as Constant

from entropi.private.compute.functions import BILINEAR, COMPARING
from entropi.private.compute.program import Comparable, Stage
from entropi.private.preparation.linear import LinearPart, evaluated, is_linear, is_secret, known

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


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparing function of one secret value, which is named, and the name of its result.

    `kind` is the marked function's name, `public` the values of its other operands.
    """

    kind: str
    operand: str
    shape: Shape
    result: str
    result_shape: Shape
    public: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Step:
    """Products and comparisons whose operands are known, all at once, and then what is computed of their results."""

    products: tuple[Product, ...]
    comparisons: tuple[Comparison, ...]
    parts: tuple[LinearPart | Stage, ...]


def cut(stage: Stage, shapes: dict[str, Shape]) -> list[Step]:
    """`stage` as steps over named values; the shapes of its results are added to `shapes`."""
    operands = tuple(shapes[name] for name in stage.inputs)
    steps, results = _cut(Comparable.of(stage.function), operands)
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
        for comparison in step.comparisons:
            read((comparison.operand,))
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

    comparisons = tuple(
        replace(comparison, operand=of(comparison.operand), result=of(comparison.result))
        for comparison in step.comparisons
    )

    def renamed(part: LinearPart | Stage) -> LinearPart | Stage:
        inputs, outputs = together(part.inputs), together(part.outputs)
        if isinstance(part, Stage):
            return Stage(stage.name, stage.layer, part.function, inputs, outputs)
        return part.renamed(inputs, outputs)

    return Step(products, comparisons, tuple(map(renamed, step.parts)))


@functools.lru_cache(maxsize=4096)
def _cut(program: Comparable, shapes: tuple[Shape, ...]) -> tuple[tuple[Step, ...], tuple[Shape, ...]]:
    """Steps over values "in 0", "out 0" and others; cut once for every function and shapes, which layers share."""
    closed = jax.make_jaxpr(program.function)(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))
    jaxpr = closed.jaxpr
    trace = _Trace(jaxpr, dict(zip(jaxpr.constvars, closed.consts)))
    results = tuple(tuple(variable.aval.shape) for variable in jaxpr.outvars)
    return tuple(trace.steps()), results


class _Trace:
    """A jaxpr, its equations by how many products and comparisons one after another they wait for.

    `public` are the values of its constants, and of what is made of constants alone: nobody's share.
    """

    def __init__(self, jaxpr: Any, constants: Mapping[Any, Any]) -> None:
        self.jaxpr = jaxpr
        self.public: dict[Any, Any] = dict(constants)
        self.equations: list[Any] = []
        for equation in jaxpr.eqns:
            if (values := evaluated(equation, self.public)) is None:
                self.equations.append(equation)
            else:
                self.public.update(zip(equation.outvars, values))

        self.name: dict[Any, str] = {v: f"in {number}" for number, v in enumerate(jaxpr.invars)}
        made = {v for equation in self.equations for v in equation.outvars}
        for number, variable in enumerate(jaxpr.outvars):
            if not isinstance(variable, Constant) and variable in made:
                self.name.setdefault(variable, f"out {number}")

        self.waits: dict[Any, int] = dict.fromkeys(jaxpr.invars, 0)
        self.products: dict[int, list[Any]] = {}
        self.comparisons: dict[int, list[Any]] = {}
        for equation in self.equations:
            depth = max((self.waits[v] for v in _secrets([equation], self.public)), default=0)
            if is_product(equation):
                self.products.setdefault(depth + 1, []).append(equation)
            elif is_comparison(equation):
                self.comparisons.setdefault(depth + 1, []).append(equation)
            self.waits.update(dict.fromkeys(equation.outvars, depth + is_marked(equation)))
        self.last = max([*self.products, *self.comparisons, 0])
        self.local = self._delayed()

    def _delayed(self) -> dict[int, list[Any]]:
        """What is local, as late as its readers allow: one part more is one run of the engine more."""
        latest: dict[Any, int] = dict.fromkeys(_variables([self.jaxpr]), self.last)
        local: dict[int, list[Any]] = {}
        for equation in reversed(self.equations):
            if is_marked(equation):
                depth = self.waits[equation.outvars[0]] - 1
            else:
                depth = min(latest.get(v, self.last) for v in equation.outvars)
                local.setdefault(depth, []).insert(0, equation)
            for variable in _variables([equation]):
                latest[variable] = min(latest.get(variable, self.last), depth)
        return local

    def steps(self) -> Iterator[Step]:
        """The steps, in order."""
        for depth in range(self.last + 1):
            products = tuple(map(self._product, self.products.get(depth, [])))
            comparisons = tuple(map(self._comparison, self.comparisons.get(depth, [])))
            yield Step(products, comparisons, tuple(self._parts(depth)))

    def _named(self, variable: Any) -> str:
        return self.name.setdefault(variable, f"value {len(self.name)}")

    def _product(self, equation: Any) -> Product:
        operands = equation.invars
        assert all(is_secret(v, self.public) for v in operands), "an operand of a product is public"
        (result,) = equation.outvars
        return Product(
            kind=equation.params["name"],
            operands=tuple(map(self._named, operands)),
            shapes=tuple(tuple(v.aval.shape) for v in operands),
            result=self._named(result) + UNTRUNCATED,
            result_shape=tuple(result.aval.shape),
        )

    def _comparison(self, equation: Any) -> Comparison:
        operand, *others = equation.invars
        assert is_secret(operand, self.public), "what is compared is public"
        assert not any(is_secret(v, self.public) for v in others), "an edge is secret"
        (result,) = equation.outvars
        return Comparison(
            kind=equation.params["name"],
            operand=self._named(operand),
            shape=tuple(operand.aval.shape),
            result=self._named(result),
            result_shape=tuple(result.aval.shape),
            public=tuple(known(v, self.public) for v in others),
        )

    def _parts(self, depth: int) -> Iterator[LinearPart | Stage]:
        """What waits for `depth` cuts: reads what earlier parts wrote, writes what later ones or nobody reads."""
        before, engine, after = self._split(self.local.get(depth, []))
        later = [
            e
            for d in range(depth + 1, self.last + 1)
            for e in (*self.products.get(d, []), *self.comparisons.get(d, []), *self.local.get(d, []))
        ]
        products = [equation.outvars[0] for equation in self.products.get(depth, [])]
        if before or products:
            yield self._linear(before, [*engine, *after, *later], products, [])
        if engine:
            results = self._results(engine, [*after, *later])
            reads = self._reads(engine)
            function = _Evaluation(tuple(engine), reads, tuple(results), self.public)
            yield Stage("", -1, function, tuple(map(self._named, reads)), tuple(map(self._named, results)))

        again = []
        if depth == self.last:  # inputs and constants that are results too, and results that are there twice
            outs = [(v, f"out {number}") for number, v in enumerate(self.jaxpr.outvars)]
            again = [(v, name) for v, name in outs if isinstance(v, Constant) or self.name.get(v) != name]
        if after or again:
            yield self._linear(after, later, [], again)

    def _split(self, equations: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """What is linear and waits for nothing of the engine's, what the engine runs, and what is linear after it."""
        from_engine: set[Any] = set()
        for equation in equations:
            if not is_linear(equation, self.public) or from_engine.intersection(_variables([equation])):
                from_engine.update(equation.outvars)
        for_engine: set[Any] = set()
        for equation in reversed(equations):
            if not is_linear(equation, self.public) or for_engine.intersection(equation.outvars):
                for_engine.update(_variables([equation]))

        parts: tuple[list[Any], list[Any], list[Any]] = [], [], []
        for equation in equations:
            nonlinear = not is_linear(equation, self.public)
            late = bool(from_engine.intersection(equation.outvars))
            inside = nonlinear or (late and bool(for_engine.intersection(equation.outvars)))
            parts[1 if inside else 2 if late else 0].append(equation)
        return parts

    def _linear(
        self, equations: list[Any], later: list[Any], products: list[Any], again: list[tuple[Any, str]]
    ) -> LinearPart:
        """Of these equations, and of what is read of the `products` that were just computed elsewhere."""
        elsewhere = {*_variables(later), *_variables([self.jaxpr])}
        results = [*(v for v in products if v in elsewhere), *self._results(equations, later)]
        reads = list(self._reads(equations))
        written = [*results, *(v for v, _ in again)]
        made = {v for equation in equations for v in equation.outvars}
        more = dict.fromkeys(v for v in written if is_secret(v, self.public) and v not in made)
        reads += [v for v in more if v not in reads]
        doubled = frozenset(products)
        return LinearPart(
            equations=tuple(equations),
            inputs=tuple(self._named(v) + (UNTRUNCATED if v in doubled else "") for v in reads),
            outputs=(*map(self._named, results), *(name for _, name in again)),
            read=tuple(reads),
            written=tuple(written),
            doubled=doubled,
            public=self.public,
        )

    def _results(self, equations: list[Any], later: list[Any]) -> list[Any]:
        """What equations make and others read, or nobody."""
        used = {*_variables(later), *_variables([self.jaxpr])}
        return [v for v in dict.fromkeys(v for equation in equations for v in equation.outvars) if v in used]

    def _reads(self, equations: list[Any]) -> tuple[Any, ...]:
        """What equations read and do not make."""
        made = {v for equation in equations for v in equation.outvars}
        return tuple(v for v in dict.fromkeys(_secrets(equations, self.public)) if v not in made)


def _secrets(equations: list[Any], public: Mapping[Any, Any]) -> Iterator[Any]:
    """What some equations read that is not public."""
    yield from (v for equation in equations for v in equation.invars if is_secret(v, public))


def _variables(users: list[Any]) -> Iterator[Any]:
    """What some equations read, or a jaxpr returns."""
    for user in users:
        read = user.invars if hasattr(user, "primitive") else user.outvars
        yield from (v for v in read if not isinstance(v, Constant))


def is_product(equation: Any) -> bool:
    """Whether an equation of a trace calls a bilinear function."""
    return equation.primitive.name == "pjit" and equation.params["name"] in BILINEAR


def is_comparison(equation: Any) -> bool:
    """Whether an equation of a trace calls a comparing function."""
    return equation.primitive.name == "pjit" and equation.params["name"] in COMPARING


def is_marked(equation: Any) -> bool:
    """Whether an equation of a trace is what it is cut at."""
    return is_product(equation) or is_comparison(equation)


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
