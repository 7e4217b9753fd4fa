"""`entropi report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Done

pytestmark = pytest.mark.usefixtures("surroundings")


def test_report_is_written(entropi: Callable[..., Done], model: Path, tmp_path: Path):
    done = entropi("report", model)
    assert (done.status, done.out, done.err) == (0, f"report in {model / 'report.html'}\n", "")
    assert "</html>" in (model / "report.html").read_text(encoding="utf-8")
    assert entropi("report", model, model, "--output", tmp_path / "two.html").status == 0
    assert (tmp_path / "two.html").exists()
