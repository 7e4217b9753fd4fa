"""Private answers as a terminal shows them: progress while they are computed, their text, what they cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from entropi import records
from entropi.commands.common import as_json
from entropi.console import ProgressLine, make_console, without_controls
from entropi.errors import UserError

ANSWER_CONTROLS = "\n\t"  # of an answer's control characters, those that belong to text; --json has all of them


class AnswerDisplay:
    """Progress on standard error and the answer on standard output, as both arrive; use as a context manager.

    Args:
        quiet: standard output is for something else.
        lines: what arrives are whole lines, each with its end.
    """

    def __init__(self, *, quiet: bool, lines: bool = False) -> None:
        self._quiet, self._lines = quiet, lines
        self._console = make_console()
        self._line: ProgressLine | None = None
        self.moved = 0  # bytes
        self._received, self._printed = "", 0  # text, and how many characters of it are printed
        self._finished = False

    def __enter__(self) -> AnswerDisplay:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._line is not None:
            self._line.__exit__(None, None, None)
        if not self._quiet and (self._finished or self._received):  # after a failure, what had been received
            print(self._received[self._printed :], end="" if self._lines else "\n", flush=True)

    def begin(self, total: int) -> None:
        if self._line is None:
            self._line = ProgressLine("private inference", total, console=self._console).__enter__()
        else:
            self._line.expect(total)

    def stage(self, done: int, communication: records.StageCommunication) -> None:
        assert self._line is not None
        self.moved += communication.bytes
        layer = f"layer {communication.layer} " if communication.layer >= 0 else ""
        self._line.update(
            done, f"token {communication.token + 1}, {layer}{communication.name}, {self.moved / 1e6:.1f} MB"
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


class AnswerLines:
    """Answers to several prompts, one a line in the prompts' order; use as a context manager.

    An answer is written once those before it are, and at the end whatever there is: an empty line, or none with `json`,
    stands for an answer that is missing then.

    Args:
        write: takes pieces of what is written, as `AnswerDisplay.text` does.
        json: whole records instead of the text.
    """

    def __init__(self, write: Callable[[str], None], *, json: bool) -> None:
        self._write, self._json = write, json
        self._found: dict[int, records.PrivateRun] = {}
        self._next = 0

    def __enter__(self) -> AnswerLines:
        return self

    def __exit__(self, *failure: object) -> None:
        while self._next <= max(self._found, default=-1):
            self._go_on()

    def add(self, place: int, record: records.PrivateRun) -> None:
        """Note the answer to the prompt at this place."""
        self._found[place] = record
        while self._next in self._found:
            self._go_on()

    def _go_on(self) -> None:
        record = self._found.get(self._next)
        self._next += 1
        if record is None and self._json:
            return
        line = as_json(record) if self._json else one_line("" if record is None else record.new_text)
        self._write(f"{line}\n")

    def summary(self, seconds: float, moved: int) -> str:
        """How many answers there are, of how many tokens, and what they took together, in one line."""
        tokens = sum(len(record.new_tokens) for record in self._found.values())
        most = max((record.batch_prompts for record in self._found.values()), default=0)
        return (
            f"{len(self._found)} answers of {tokens} tokens in {seconds:.1f} s, {60 * tokens / seconds:,.1f} tokens a "
            f"minute, {moved / 1e6:.1f} MB both directions, at most {most} prompts a pass"
        )


def one_line(text: str) -> str:
    """A text without line ends and control characters, each spelled as Python spells it, and a backslash doubled."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return without_controls(text)


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
