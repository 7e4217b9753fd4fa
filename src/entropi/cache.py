"""Where tokenizers, token streams and compiled code are kept between runs, and how a file gets there whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from entropi.errors import UserError


def default_cache_dir() -> Path:
    """`$ENTROPI_CACHE`, else `$XDG_CACHE_HOME/entropi`, else `~/.cache/entropi`."""
    if chosen := os.environ.get("ENTROPI_CACHE"):
        return Path(os.path.expanduser(chosen))
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared, "entropi")
    try:
        return Path.home() / ".cache" / "entropi"
    except RuntimeError:
        raise UserError("there is no home folder to cache in: set ENTROPI_CACHE to a folder") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends, and vanishes if the block fails.

    Raises `UserError` if the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # others may write the same entry
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {path.parent}: {error.strerror or error}; "
            "set ENTROPI_CACHE to a folder with room that can be written"
        ) from None
