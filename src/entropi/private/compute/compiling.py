"""Stages compiled to SPU's bytecode, each function once for every shape, and the next pass's while this one runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from spu import libspu
from spu.utils import frontend

from entropi.private.compute.program import Comparable, Stage

_MOST = 4096  # compiled functions that are kept
_codes: dict[Any, tuple[bytes, list[Any]]] = {}
_compiling = threading.Lock()  # SPU's front end keeps a cache that knows no threads


class Compiler:
    """Shapes of all values, and stages compiled for them."""

    def __init__(self, shapes: Mapping[str, Any] | None = None) -> None:
        self._shapes = dict(shapes or {})

    def note(self, name: str, shape: tuple[int, ...], kind: Any = np.float32) -> None:
        """A value has this shape."""
        self._shapes[name] = jax.ShapeDtypeStruct(shape, kind)

    def forget(self, name: str) -> None:
        """A value is no more."""
        del self._shapes[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a value."""
        shape: tuple[int, ...] = self._shapes[name].shape
        return shape

    def copy(self) -> Compiler:
        """One that knows the same shapes, and goes its own way from here."""
        return Compiler(self._shapes)

    def compile(self, stage: Stage) -> Any:
        """A stage as the engine runs it, on the values that it names; what it writes has shapes from then on."""
        code, outputs = _bytecode(
            stage.name, Comparable.of(stage.function), tuple(self._shapes[name] for name in stage.inputs)
        )
        for name, shape in zip(stage.outputs, outputs):
            self.note(name, shape.shape, shape.dtype)
        return libspu.Executable(
            name=stage.name, input_names=list(stage.inputs), output_names=list(stage.outputs), code=code
        )


def compile_ahead(stages: Iterable[Stage], compiler: Compiler) -> threading.Thread:
    """Compile stages in a thread, so that a later pass over them does not wait for that.

    A further token has shapes of its own, and compiling them takes seconds, in which the engine mostly waits for the
    other party. What goes wrong here goes wrong again, and is told, where the stage is run.

    Args:
        compiler: knows the shapes of what the stages read; `stages` may note more while they are listed.
    """

    def work() -> None:
        with contextlib.suppress(Exception):
            for stage in stages:
                compiler.compile(stage)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def _bytecode(name: str, code: Comparable, arguments: tuple[Any, ...]) -> tuple[bytes, list[Any]]:
    """SPU's bytecode of a stage's function, and the shapes of what it returns.

    Layers share it under other names, and protocols too.
    """
    key = name, code, arguments
    if (found := _codes.get(key)) is not None:
        return found
    with _compiling:
        if (found := _codes.get(key)) is None:  # it was not compiled meanwhile
            if len(_codes) >= _MOST:
                del _codes[next(iter(_codes))]
            found = _codes[key] = _compiled(code, arguments)
    return found


def _compiled(code: Comparable, arguments: tuple[Any, ...]) -> tuple[bytes, list[Any]]:
    def function(*values: Any) -> Any:
        return code.function(*values)

    executable, shapes = frontend.compile(
        frontend.Kind.JAX,
        function,
        list(arguments),
        {},
        [f"operand {number}" for number in range(len(arguments))],
        [libspu.Visibility.VIS_SECRET] * len(arguments),
        lambda flat: [f"result {number}" for number in range(len(flat))],
    )
    return executable.code, jax.tree_util.tree_leaves(shapes)
