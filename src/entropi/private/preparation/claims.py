"""Who works with a ticket: one process at a time, so that two of one user do not take each other's.

Nothing rests on this but that: `Store.take` hands a ticket out once, whoever has claimed it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from entropi.private.preparation.files import hold


class Claim:
    """A ticket that nobody else works with, until this is released or the process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def release(self) -> None:
        """Let others work with it; does nothing the second time."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(FileNotFoundError):  # while it is locked: who waits for it sees that it is gone
            os.unlink(self._path)
        os.close(self._descriptor)
        self._descriptor = -1


def claim(path: Path) -> Claim | None:
    """Lock the file that stands for a ticket, which is made for it; None while somebody has it."""
    while True:
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        try:
            if (held := hold(path, alone=True)) is None:
                return None
        except FileNotFoundError:  # released just now
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), os.stat(path)):
                return Claim(path, held)
        os.close(held)  # of a file that was removed before it was locked


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Remove those of these files that nobody has, who were killed."""
    for path in paths:
        if (abandoned := claim(path)) is not None:
            abandoned.release()
