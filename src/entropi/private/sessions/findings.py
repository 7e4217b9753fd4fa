"""What a server's start has found out about a model, kept in the cache for the next start with the same one.

An entry is named after a digest of everything that it follows from: the folded model's two files, the settings, the
versions of the libraries that compute, and this package's own text. So a model that has changed never meets what was
found of another. An entry that is damaged, or that somebody else may have written, is as good as none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import stat
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

from entropi.cache import atomic_write, default_cache_dir
from entropi.errors import UserError
from entropi.private.compute.fixed_point import Sweep
from entropi.private.compute.folded import DESCRIPTION_FILE, WEIGHTS_FILE, sha256_of
from entropi.private.compute.settings import Settings
from entropi.private.wire.messages import BadMessage, Digest, decode, encode

MAX_ENTRY = 16 << 20  # bytes
_LIBRARIES = ("jax", "jaxlib", "numpy", "spu")
log = logging.getLogger("entropi.server")


class Findings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What was found.

    Attributes:
        key: the digest of what it follows from, again, since files can be renamed.
        sweep: what the values of all tokens reach.
        passed: tests of known answers, by protocol, with the sweep's worst sequence.
    """

    key: Digest
    sweep: Sweep
    passed: tuple[str, ...]


def key_of(
    folder: Path,
    settings: Settings,
    choose: bool,
    prefix: Sequence[int] = (),
    calibration: Sequence[Sequence[int]] = (),
) -> str:
    """The digest of a folded model, of settings, prefix and calibration text, and of all that computes with them.

    With `choose` the fraction bits are the server's choice, and tests may have been passed with others than `settings`
    has.
    """
    parts = [sha256_of(folder / name) for name in (DESCRIPTION_FILE, WEIGHTS_FILE)]
    parts += [
        encode(settings).decode(),
        str(choose),
        str([*prefix]),
        str([*calibration]),
        platform.machine(),
        platform.python_version(),
    ]
    parts += [f"{name} {metadata.version(name)}" for name in _LIBRARIES]
    package = Path(__file__).parents[1]
    parts += [f"{path.relative_to(package)} {sha256_of(path)}" for path in sorted(package.rglob("*.py"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read(key: str) -> Findings | None:
    """What was found earlier; None if nothing was, or what there is cannot be trusted."""
    try:
        descriptor = os.open(_path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, UserError):
        return None
    status = os.fstat(descriptor)
    ours = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if not (stat.S_ISREG(status.st_mode) and ours and status.st_size <= MAX_ENTRY):
        os.close(descriptor)
        return None
    with open(descriptor, "rb") as file:
        digest, _, content = file.read().partition(b"\n")
    try:
        if digest.decode() != hashlib.sha256(content).hexdigest():
            return None
        found = decode(content, Findings)
    except (BadMessage, UnicodeError):
        return None
    return found if found.key == key else None


def keep(found: Findings) -> None:
    """Write an entry for this user alone; where that is not possible, the log says so."""
    content = encode(found)
    try:
        with atomic_write(_path(found.key)) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    except UserError as error:
        log.warning("what was found of the model is not kept for the next start: %s", error)


def _path(key: str) -> Path:
    return default_cache_dir() / "served" / f"{key}.json"
