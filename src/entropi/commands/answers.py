"""Private answers as a terminal shows them: progress while they are computed, their text, what they cost."""

from __future__ import annotations

import sys
from pathlib import Path

from entropi import records
from entropi.console import ProgressLine, make_console, without_controls
from entropi.errors import UserError

ANSWER_CONTROLS = "\n\t"  # of an answer's control characters, those that belong to text; --json has all of them


class AnswerDisplay:
    """Progress on standard error and the answer on standard output, as both arrive; use as a context manager.

    Args:
        quiet: standard output is for something else.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = make_console()
        self._line: ProgressLine | None = None
        self._moved = 0  # bytes
        self._received, self._printed = "", 0  # text, and how many characters of it are printed
        self._finished = False

    def __enter__(self) -> AnswerDisplay:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._line is not None:
            self._line.__exit__(None, None, None)
        if not self._quiet and (self._finished or self._received):  # after a failure, what had been received
            print(self._received[self._printed :], flush=True)

    def begin(self, total: int) -> None:
        if self._line is None:
            self._line = ProgressLine("private inference", total, console=self._console).__enter__()
        else:
            self._line.expect(total)

    def stage(self, done: int, communication: records.StageCommunication) -> None:
        assert self._line is not None
        self._moved += communication.bytes
        layer = f"layer {communication.layer} " if communication.layer >= 0 else ""
        self._line.update(
            done, f"token {communication.token + 1}, {layer}{communication.name}, {self._moved / 1e6:.1f} MB"
        )

    def text(self, piece: str) -> None:
        self._received += without_controls(piece, ANSWER_CONTROLS)
        if self._quiet:
            return
        if sys.stdout.isatty() and self._line is not None:  # there it would run into the progress bar
            self._line.show(self._received)
        else:
            print(self._received[self._printed :], end="", flush=True)
            self._printed = len(self._received)

    def finish(self, answer: str) -> None:
        """The whole answer is known."""
        self._received, self._finished = without_controls(answer, ANSWER_CONTROLS), True

    def status(self, happening: str) -> None:
        self._console.print(without_controls(happening), markup=False)


def check_run_folder(record: Path | None) -> None:
    """Raise `UserError` for a run folder to record answers in that is not there."""
    if record is not None and not record.is_dir():
        raise UserError(f"there is no run folder {record} to add the record to")


def summary(run: records.PrivateRun) -> str:
    """Bytes, messages and seconds of a private generation, in one line; an answer that nobody sees, with escapes."""
    drafts = f" by {run.passes} passes, {run.held_tokens} of {run.drafted_tokens} drafts held,"
    drafts = drafts if run.drafted_tokens else ""
    before = f", prepared before with {run.prepared_bytes / 1e6:.1f} MB in {run.prepared_seconds:.0f} s"
    before = before if run.prepared_bytes else ""
    unseen = "" if run.new_text.strip() else f"the answer is {run.new_text!r}; "
    return (
        f"{unseen}{len(run.new_tokens)} tokens{drafts} in {run.seconds:.1f} s, {run.bytes / 1e6:.1f} MB "
        f"both directions (set-up {run.setup_bytes / 1e6:.1f} MB), {run.messages:,} messages, {run.kernel}{before}"
    )
