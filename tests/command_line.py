"""Commands called in this process or in one of their own, and what is expected of a refusal."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[1] / "src"
TINY = (
    *("--vocab-size", "300", "--context-length", "16", "--layers", "2", "--heads", "2", "--hidden-size", "16"),
    *("--steps", "3", "--batch-size", "4", "--precision", "fp32", "--log-every", "1"),
)


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


def spawn(*words: Any, code: str | None = None) -> Done:
    """The same in a process of its own; `code` may prepare something first."""
    start = ["-c", f"{code}\nimport sys\nfrom entropi.cli import main\nsys.exit(main(sys.argv[1:]))"]
    done = subprocess.run(
        [sys.executable, *(start if code is not None else ["-m", "entropi"]), *map(str, words)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def assert_refused(done: Done, *parts: str) -> None:
    """One line on standard error, status 2, nothing on standard output."""
    assert done.status == 2, done
    assert done.out == ""
    assert re.fullmatch(r"entropi: [^\n]+\n", done.err), done.err
    for part in parts:
        assert part in done.err, done.err


def text_folder(folder: Path) -> Path:
    folder.mkdir()
    for number in range(12):
        lines = (f"def f{number}_{i}(self, value): return value + {i * number % 7}\n" for i in range(30))
        (folder / f"{number}.py").write_text("".join(lines), encoding="utf-8")
    return folder
