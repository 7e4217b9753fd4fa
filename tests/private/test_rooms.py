"""The rooms inside `private`: which may import which, and what none of them needs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRIVATE = Path(__file__).parents[2] / "src" / "entropi" / "private"
ROOMS: dict[str, set[str]] = {  # and what each may import, the lowest first
    "compute": set(),
    "wire": {"compute"},
    "admission": {"compute", "wire"},
    "preparation": {"compute"},
    "sessions": {"compute", "wire", "admission", "preparation"},
}
JAX_FREE = {"description", "settings"}  # all that `wire` and `admission` may import of `compute`
FOREIGN: dict[str, set[str]] = {  # packages that only these may import
    "jax": {"compute", "preparation"},
    "spu": {"compute", "sessions"},
    "aiohttp": {"wire", "admission", "sessions"},
    "cryptography": {"wire"},
    **{name: {"wire", "admission", "sessions"} for name in ("asyncio", "socket", "socketserver", "ssl", "http")},
}
FILES = [path for path in sorted(PRIVATE.rglob("*.py")) if path.parent != PRIVATE]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PRIVATE.parents[1])}


def imports_of(source: str) -> set[str]:
    """Every module that a file imports, wherever in it; relative ones begin with dots."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(room: str, source: str) -> list[str]:
    """What a file of a room imports although it may not."""
    wrong = []
    for module in sorted(imports_of(source)):
        parts = module.split(".")
        if room not in FOREIGN.get(parts[0], {room}) or not parts[0]:
            wrong.append(module)
        elif parts[:2] == ["entropi", "private"]:
            target, inside = parts[2], parts[3:4]
            needs_jax = target == "compute" and not JAX_FREE.issuperset(inside)
            if target not in {room, *ROOMS[room]} or (needs_jax and room in ("wire", "admission")):
                wrong.append(module)
    return wrong


def modules_in(*rooms: str) -> list[str]:
    return [f"entropi.private.{path.parent.name}.{path.stem}" for path in FILES if path.parent.name in rooms]


def python(script: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, stdin=subprocess.DEVNULL, check=True
    ).stdout


NEED_JAX = {"cutting", "dealing", "linear"}  # of `preparation`: keeping and using material takes arrays alone


def test_what_keeps_material_computes_nothing():
    files = [path for path in FILES if path.parent.name == "preparation"]
    using = {path.stem for path in files if any("jax" in name.split(".") for name in imports_of(path.read_text()))}
    assert using == NEED_JAX


def test_every_file_has_a_room():
    assert {path.parent.name for path in FILES} == set(ROOMS)
    assert {path.name for path in PRIVATE.glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PRIVATE)))
def test_imports_go_one_way(path: Path):
    assert wrong_imports(path.parent.name, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("compute", "from entropi.private.wire import messages"),
        ("compute", "def f():\n  import socket"),
        ("wire", "from entropi.private.compute.program import forward"),
        ("wire", "import jax.numpy"),
        ("wire", "from entropi.private import admission"),
        ("admission", "from entropi.private.sessions.party import run"),
        ("preparation", "from entropi.private.wire import messages"),
        ("preparation", "import asyncio"),
        ("preparation", "import spu"),
        ("compute", "from entropi.private.preparation.cutting import cut"),
        ("sessions", "from .. import wire"),
    ],
)
def test_wrong_imports_are_seen(room: str, source: str):
    assert len(wrong_imports(room, source)) == 1


def test_what_crosses_and_who_is_let_in_need_neither_jax_nor_spu():
    modules = modules_in("wire", "admission")
    assert len(modules) > 10
    blocked = "import sys\nfor name in ('jax', 'jaxlib', 'spu'): sys.modules[name] = None\n"
    imported = "".join(f"import {module}\n" for module in modules)
    assert python(f"{blocked}{imported}print('done')").strip() == "done"
    with pytest.raises(subprocess.CalledProcessError) as failed:  # so they are blocked
        python(f"{blocked}import entropi.private.compute.program")
    assert "ModuleNotFoundError" in failed.value.stderr


def test_a_client_loads_nothing_of_what_lets_clients_in():
    loaded = python("import sys, entropi.private.sessions.client; print(*sys.modules)").split()
    assert "entropi.private.wire.channel" in loaded
    assert not [name for name in loaded if name.startswith("entropi.private.admission")]


COMPUTE = """
import os
import numpy as np
from entropi.private.compute.engine import Simulation
from entropi.private.compute.program import warm_up
from entropi.private.compute.settings import CLIENT, SERVER, Settings

engine = Simulation("cheetah", Settings())
stage, shapes = warm_up()
for name, (shape, owner) in shapes.items():
    engine.hold(name, np.zeros(shape), SERVER if owner == "server" else CLIENT)
assert engine.run(stage).bytes > 0
links = ["/proc/self/fd/" + number for number in os.listdir("/proc/self/fd")]
targets = [os.readlink(link) for link in links if os.path.islink(link)]  # the folder's own is closed again
print(sum(target.startswith("socket:") for target in targets), len(targets))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux says what a process has open")
@pytest.mark.slow
def test_computing_opens_no_socket():
    """What SPU's own code opens would be among the process's descriptors too."""
    pytest.importorskip("spu")
    sockets, descriptors = python(COMPUTE).split()[-2:]
    assert int(sockets) == 0
    assert int(descriptors) > 2
    opened = python("import socket\nkept = socket.socket()\n" + COMPUTE).split()[-2]
    assert int(opened) == 1  # so they are seen
