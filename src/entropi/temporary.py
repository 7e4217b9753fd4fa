"""Temporary folders that do not outlive their process for long, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def swept_folder(prefix: str, base: Path | None = None) -> Iterator[Path]:
    """A folder of this user alone, mode 0700, that is removed at the end, or by the next caller if there is none.

    It is in `base`, by default where the system has temporary files.

    A process that is killed cleans nothing up. So the folder is locked while its process lives, which the system ends
    with the process, and who makes a folder removes those of the same prefix that nobody holds.
    """
    base = base or Path(tempfile.gettempdir())
    _sweep(base, prefix)
    # Nobody sweeps it before it has its name, and then it is locked.
    made = Path(tempfile.mkdtemp(prefix="entropi-new-", dir=base))
    held = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_EX)
    folder = base / (prefix + made.name.removeprefix("entropi-new-"))
    os.rename(made, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _sweep(base: Path, prefix: str) -> None:
    """Remove this user's folders that nobody holds."""
    for folder in base.glob(f"{prefix}*"):
        try:
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # somebody else's, or gone
            continue
        try:
            if os.fstat(held).st_uid == os.getuid():
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # its process lives
            pass
        finally:
            os.close(held)
