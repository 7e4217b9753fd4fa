"""Files of one-time material: for this user alone, on the disk before they count, and known again if they changed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
from safetensors.numpy import load, save

from entropi.errors import UserError

Arrays: TypeAlias = dict[str, np.ndarray]


class PartFile(msgspec.Struct, frozen=True):
    """What identifies a file of a ticket's folder.

    `changed` is the time in ns at which the system last saw the file change (`st_ctime`). No program can choose it, so
    a file that was copied, or restored from a backup, has another one.
    """

    name: str
    length: int  # bytes
    sha256: bytes
    changed: int


def private_folder(path: Path) -> None:
    """Make a folder that only this user can enter, or see that it is one.

    Raises:
        UserError: it cannot be made, or others can enter it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        for_this_user_only(path)
    except OSError as error:
        raise UserError(f"cannot keep prepared material in {path}: {error.strerror}") from None


def for_this_user_only(path: Path) -> None:
    """Refuse a file or folder of another user, or that others can read, write or enter (`UserError`)."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise UserError(f"{path} belongs to another user: prepared material is kept for one user alone")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{path} is open to other users: chmod 700, as prepared material is for this user alone")


def sync(folder: Path) -> None:
    """Return when the folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(path: Path, *, alone: bool) -> int | None:
    """A descriptor of a folder or file that holds its lock, shared or alone; None if others hold it otherwise.

    The system ends the lock when the descriptor is closed, thus also when the process is killed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def write_part(folder: int, arrays: Mapping[str, np.ndarray]) -> PartFile:
    """Write arrays as one safetensors file into an open folder; returns when all of it is on the disk.

    What is left of it by an error is removed, and by a crash is a file that no index names.
    """
    content = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    name = f"{secrets.token_hex(8)}.safetensors"
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            changed = os.fstat(file.fileno()).st_ctime_ns
        os.fsync(folder)
    except BaseException:
        os.unlink(name, dir_fd=folder)
        raise
    return PartFile(name, len(content), hashlib.sha256(content).digest(), changed)


def read_part(folder: int, part: PartFile) -> Arrays | None:
    """The arrays of a file; None if it is not there as it was written."""
    try:
        descriptor = os.open(part.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # nothing, or a link
            return None
        raise
    with open(descriptor, "rb") as file:
        if not _is(part, os.fstat(descriptor)):
            return None
        content = file.read()
    return load(content) if hashlib.sha256(content).digest() == part.sha256 else None


def is_unchanged(folder: Path, part: PartFile) -> bool:
    """Whether a file is there and nothing happened to it since it was written, as far as the system knows."""
    try:
        return _is(part, os.stat(folder / part.name, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _is(part: PartFile, status: os.stat_result) -> bool:
    return (stat.S_ISREG(status.st_mode), status.st_size, status.st_ctime_ns) == (True, part.length, part.changed)


def remove_folder(folder: Path) -> None:
    """Remove a ticket's folder, unless somebody holds it, and see to it that it does not come back."""
    try:
        held = hold(folder, alone=True)
    except FileNotFoundError:
        return
    if held is not None:
        try:
            with contextlib.suppress(FileNotFoundError):  # who held it before has removed it
                shutil.rmtree(folder)
            sync(folder.parent)
        finally:
            os.close(held)
