"""What tests of commands share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def model(tmp_path: Path, trained: Path) -> Path:
    """A copy of the trained run folder, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
