"""Progress on a terminal and in a log file."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from entropi.console import ProgressLine


def progress(console: Console, monkeypatch: pytest.MonkeyPatch, seconds: float) -> str:
    """What a work of 300 units, `seconds` each, leaves on a console."""
    clock = [0.0]
    monkeypatch.setattr("entropi.console.time.monotonic", lambda: clock[0])
    with ProgressLine("training [x]", 300, console=console) as line:
        for done in range(1, 301):
            clock[0] += seconds
            line.update(done, f"loss {done}.5 [y] :smile:")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_progress_in_a_log_file(monkeypatch: pytest.MonkeyPatch):
    console = Console(file=io.StringIO(), emoji=False, soft_wrap=True)
    monkeypatch.setattr("entropi.console.PLAIN_INTERVAL_S", 9.99)
    lines = progress(console, monkeypatch, 0.1).splitlines()
    assert len(lines) == 3  # one in ten seconds
    assert lines[0] == "training [x]: 100/300, 10 s, 20 s left  loss 100.5 [y] :smile:"
    assert lines[-1] == "training [x]: 300/300, 30 s  loss 300.5 [y] :smile:"
    console = Console(file=io.StringIO(), emoji=False, soft_wrap=True)
    assert len(progress(console, monkeypatch, 0.0001).splitlines()) == 1  # the last one always


@pytest.mark.parametrize("width", [80, 160])
def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int):
    """On a narrow one the status gives way, not the counts."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, emoji=False, color_system=None)
    shown = progress(console, monkeypatch, 0.1)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n").strip().splitlines()[-1]
    assert "training [x]" in last
    assert "300/300" in last
    assert "loss 300.5 [y]" in last
