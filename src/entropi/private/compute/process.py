"""A computation in a process of its own: its engine's log, memory and crashes are not its parent's.

The child is a module of this package with a `main`, which answers one question on its standard input, a line of JSON
for every answer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import msgspec

from entropi.errors import UserError

A = TypeVar("A")
Q = TypeVar("Q")


def answers(module: str, question: object, kind: type[A], failed: str, seconds: float | None = None) -> Iterator[A]:
    """What `python -m module` says to a question, one answer after another.

    Args:
        kind: of the answers.
        failed: what to say of a run that fails.
        seconds: after which it is ended, and has failed.

    Raises:
        UserError: a status other than 0, or an answer that is none.
    """
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(seconds, process.kill) if seconds is not None else None
        try:
            if watchdog is not None:
                watchdog.start()
            process.stdin.write(msgspec.json.encode(question))
            process.stdin.close()
            for line in process.stdout:
                yield msgspec.json.decode(line, type=kind)
        except (BrokenPipeError, msgspec.MsgspecError, UnicodeError):
            process.kill()
            raise UserError(failed) from None
        except BaseException:
            process.kill()
            raise
        finally:
            if watchdog is not None:
                watchdog.cancel()
    if seconds is not None and time.monotonic() - started >= seconds:
        raise UserError(f"{failed}: it was not done after {seconds:g} s")
    if process.returncode == -signal.SIGKILL:
        raise UserError(f"{failed}: its process was killed, as happens where memory runs out")
    if process.returncode:
        raise UserError(failed)


def answer_one(kind: type[Q], answer: Callable[[Q, Callable[[object], None]], None]) -> None:
    """Be such a child: `answer` the question on standard input by what it is given to say answers with."""
    # SPU and its libraries may print; only answers go to the parent.
    out: BinaryIO = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    answer(msgspec.json.decode(sys.stdin.buffer.read(), type=kind), lambda found: _say(out, found))


def _say(out: BinaryIO, found: object) -> None:
    out.write(msgspec.json.encode(found) + b"\n")
