"""docs/gallery.md shows what the command draws from the committed records, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image as png

from entropi.report.folder import read_run

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"
RECORDS = GALLERY / "records"
SHOWN = re.findall(r"!\[[^\]]+\]\(gallery/([^)]+)\)", (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def gallery() -> Any:
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "benchmarks" / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def runs() -> dict[str, Any]:
    return {path.name: read_run(path) for path in sorted(RECORDS.iterdir())}


def test_the_document_is_that_of_the_records(gallery: Any) -> None:
    assert gallery.document(gallery.read(RECORDS)) == (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def test_every_picture_of_the_document_is_there(gallery: Any) -> None:
    assert [*gallery.PAGES, *(f"{picture.name}.png" for picture in gallery.PICTURES)] == SHOWN
    assert {path.name for path in GALLERY.glob("*.png")} == set(SHOWN)
    for name in SHOWN:
        assert png.imread(GALLERY / name)[..., :3].var() > 1e-4, name


def test_the_records_are_small_and_of_real_runs(gallery: Any) -> None:
    assert sum(path.stat().st_size for path in RECORDS.rglob("*") if path.is_file()) < 400_000
    for folder, run in runs().items():
        assert run.started is not None
        assert run.steps or folder not in gallery.RUNS
        assert run.command is not None
        assert run.command.startswith("entropi train runs/")
    for path in RECORDS.rglob("*.json*"):
        assert not re.search(r"/(tmp|home|root|work)/", path.read_text()), path


@pytest.mark.slow
def test_the_command_draws_them(gallery: Any, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gallery.py"), "--docs", str(tmp_path), "--svg"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    drawn = [name for name in said["pictures"] if name.endswith(".png")]
    assert set(SHOWN) - set(drawn) <= set(gallery.PAGES)  # which need a browser
    assert set(drawn) <= set(SHOWN)
    for name in drawn:
        assert png.imread(tmp_path / "gallery" / name).shape == png.imread(GALLERY / name).shape, name
        assert name in gallery.PAGES or (tmp_path / "gallery" / name).with_suffix(".svg").stat().st_size > 2000
    assert (tmp_path / "gallery.md").read_text() == (ROOT / "docs" / "gallery.md").read_text()
