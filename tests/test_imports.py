"""Which room may import which, and that every file is read and packaged."""

from __future__ import annotations

import ast
import sys
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "entropi"


COMMON = {
    "activations",
    "bounds",
    "cache",
    "chat",
    "downloads",
    "errors",
    "console",
    "machine",
    "record_files",
    "records",
    "softmax",
    "temporary",
}


ROOMS: dict[str, set[str]] = {
    "entropy": set(),
    "model": {"entropy"},
    "data": set(),
    "training": {"model", "data", "entropy", "costs"},
    "costs": {"model", "private"},
    "private": set(),
    "report": set(),
    "commands": {"model", "data", "training", "costs", "private", "report"},
}


FOREIGN: dict[str, set[str]] = {  # packages that only these may import
    "torch": {"entropy", "model", "training", "commands"},
    "transformers": {"entropy", "model", "training"},
    "jax": {"private", "costs"},
    "spu": {"private"},
    "aiohttp": {"private"},
    "cryptography": {"private"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "jsonargparse": {"cli"},
    "ray": {"training"},
}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    package = ("entropi", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_file_has_a_room():
    named = {*ROOMS, *COMMON, "cli", "__init__", "__main__"}
    assert {room_of(path) for path in FILES} == named


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    room = room_of(path)
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] != "entropi":
            assert room in FOREIGN.get(parts[0], {room}), f"{room} imports {parts[0]}"
        elif room in ROOMS:
            target = parts[1]
            assert target in {room, "__version__", *COMMON, *ROOMS[room]}, f"{room} imports {target}"
        elif room in COMMON:
            assert parts[1] in COMMON, f"{room} imports {parts[1]}"


def test_the_direction_test_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "report").mkdir()
    path = tmp_path / "report" / "page.py"
    path.write_text(
        "from .. import model\nfrom . import figures\nimport torch.nn as nn\ndef f():\n  from entropi.d import x"
    )
    assert imports_of(path) == {"entropi.model", "entropi.report.figures", "torch.nn", "entropi.d.x"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_3_10_can_read_it(path: Path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))


def test_every_file_that_is_not_python_is_packaged():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    packaged = {
        path for pattern in project["tool"]["setuptools"]["package-data"]["entropi"] for path in PACKAGE.glob(pattern)
    }
    others = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}}
    assert others == packaged


def test_the_command_is_installed_under_its_name():
    try:
        scripts = metadata.entry_points(group="console_scripts", name="entropi")
    except metadata.PackageNotFoundError:
        pytest.skip("not installed")
    if not scripts:
        pytest.skip("not installed")
    assert {script.value for script in scripts} == {"entropi.cli:main"}
