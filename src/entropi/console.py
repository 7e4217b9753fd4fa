"""What long work shows while it runs: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

WIDE = 120  # columns of a terminal with room for everything
PLAIN_INTERVAL_S = 5.0  # a log file wants a line every few seconds, not sixty redraws a second


# Characters that move a terminal's cursor, change its state or turn text round: C0, DEL, C1, lone surrogates, line and
# paragraph separators, marks of writing direction. Tab and newline are told apart below.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def without_controls(text: str, keep: str = "") -> str:
    """`text` for a terminal, each control character that is not in `keep` replaced by U+FFFD.

    What the other side of a connection wrote (names, reasons, tokens) could otherwise clear the screen, colour a line
    as if it were ours, or set a terminal's title.
    """
    return _CONTROLS.sub(lambda match: match[0] if match[0] in keep else "\ufffd", text)


def escaped_json(line: str) -> str:
    """JSON with the control characters that it may hold unescaped written as escapes: the same value, harmless to show.

    JSON forbids those below U+0020 in strings; the newlines of its layout stay.
    """
    return _CONTROLS.sub(lambda match: match[0] if match[0] < " " else f"\\u{ord(match[0]):04x}", line)


def make_console() -> Console:
    """A console on standard error, so that standard output stays clean for results and `--json`."""
    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


class _ProgressBelowText(Progress):
    """A live bar with text above it that may grow."""

    text = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.text:
            yield Text(self.text, overflow="fold")
        yield from super().get_renderables()


class ProgressLine:
    """Progress of `total` units of work under one title; use as a context manager.

    `update(done, status)` is cheap enough to call on every unit. On a terminal it drives a bar with the time
    left; anywhere else it prints at most one line every `PLAIN_INTERVAL_S` seconds, and the last one always.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, console: Console | None = None) -> None:
        self.title, self.total = title, total
        self.console = console or make_console()
        self._started = self._printed = time.monotonic()
        self._first = self._done = done
        self._status = ""
        self._shown: int | None = None  # the last count printed
        self._bar: _ProgressBelowText | None = None
        if self.console.is_terminal:
            wide = self.console.width >= WIDE
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}", style="bold", markup=False, table_column=Column(no_wrap=True)),
                BarColumn(bar_width=24 if wide else 8),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                *([TimeElapsedColumn()] if wide else []),
                TextColumn("left"),
                TimeRemainingColumn(),
                # The status has what room the others leave, and not the other way round.
                TextColumn("{task.fields[status]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            ]
            self._bar = _ProgressBelowText(*columns, console=self.console, expand=True)
            self._task = self._bar.add_task(title, total=total, completed=done, status="")

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def update(self, done: int, status: str = "") -> None:
        """`done` units of `total` are finished; `status` is a short text shown at the end of the line."""
        self._done, self._status = done, status
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif time.monotonic() - self._printed >= PLAIN_INTERVAL_S:
            self._print_plain()

    def expect(self, total: int) -> None:
        """There are `total` units after all."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def show(self, text: str) -> None:
        """Text to stand above the bar until it ends; on a terminal only."""
        if self._bar is not None:
            self._bar.text = text
            self._bar.refresh()

    def _print_plain(self) -> None:
        self._printed, self._shown = time.monotonic(), self._done
        elapsed = self._printed - self._started
        fresh = self._done - self._first
        left = f", {elapsed / fresh * (self.total - self._done):.0f} s left" if 0 < fresh < self.total else ""
        status = f"  {self._status}" if self._status else ""
        self.console.print(f"{self.title}: {self._done}/{self.total}, {elapsed:.0f} s{left}{status}", markup=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.text = ""
            self._bar.stop()
        elif self._shown != self._done and (kind is None or self._done > self._first):  # no work, nothing to tell
            self._print_plain()
        sys.stderr.flush()
