"""Folders of tokenised books as Languini has them: one uint16 `.npy` of ids a book, read where it lies."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from entropi.cache import atomic_write, default_cache_dir
from entropi.console import ProgressLine
from entropi.data.shards import MANIFEST, Stream, file_digest, open_stream
from entropi.data.split import HELDOUT_SHARE, position
from entropi.errors import UserError

# Languini's own lists: rows of (path below the folder, tokens), beside the folder or in it.
TRAIN_LIST, HELDOUT_LIST = "file_list_train.npy", "file_list_test_iid.npy"


class _Book(msgspec.Struct, array_like=True):
    """What is remembered of a book: while size and time of change stay the same it is not read again."""

    bytes: int
    changed: int  # nanoseconds
    tokens: int
    largest: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Books:
    """Tokenised books, split into two parts; `content_hash` covers names, contents and parts, SHA-256."""

    name: str
    train: list[Stream]
    heldout: list[Stream]
    largest: int  # id
    content_hash: str


def find_books(source: str) -> Path | None:
    """The folder that `source` names if it holds tokenised books: `.npy` files in it or in its `files`."""
    folder = Path(os.path.expanduser(source))
    try:
        if not folder.is_dir() or (folder / MANIFEST).exists():
            return None
        below = [folder / "files", folder / "train", folder]
        return folder if any(p.is_dir() and next(p.glob("*.npy"), None) for p in below) else None
    except OSError:
        return None


def open_books(folder: Path, cache_dir: Path | None = None, console: Console | None = None) -> Books:
    """The books of `folder` and the part each is in.

    The parts are Languini's where its lists lie in the folder or beside it, else the folders `train` and `test` (or
    `heldout`) if both are there, else about 5 % of the books are held out by the hash of their names. All books are
    read once, on all cores, to know their contents; what was found is remembered in the cache.

    Raises:
        UserError: a book that is missing, cannot be read or holds no ids, or a part without books.
    """
    train, heldout = _split(folder)
    for part, names in (("train", train), ("held-out", heldout)):
        if not names:
            raise UserError(f"{folder} has no books for the {part} part")
    known = _inspect(folder, [*train, *heldout], cache_dir, console)
    digest = hashlib.sha256()
    for part, names in (("train", train), ("held-out", heldout)):
        for name in names:
            for field in (part, name, known[name].sha256):
                digest.update(len(field).to_bytes(8, "big") + field.encode())
    streams = [[Stream(folder / name, known[name].tokens) for name in names] for names in (train, heldout)]
    largest = max(known[name].largest for name in (*train, *heldout))
    return Books(folder.resolve().name, streams[0], streams[1], largest, digest.hexdigest())


def _split(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the books of both parts, relative to the folder."""
    for place in (folder, folder.parent):
        if (place / TRAIN_LIST).is_file() and (place / HELDOUT_LIST).is_file():
            return tuple(_listed(folder, place / name) for name in (TRAIN_LIST, HELDOUT_LIST))  # type: ignore[return-value]
    for other in ("test", "heldout"):
        if (folder / "train").is_dir() and (folder / other).is_dir():
            return tuple(  # type: ignore[return-value]
                sorted(p.relative_to(folder).as_posix() for p in (folder / part).rglob("*.npy"))
                for part in ("train", other)
            )
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.npy"))
    first = min(names, key=position)
    held = {first} | {name for name in names if position(name) < HELDOUT_SHARE}
    return [name for name in names if name not in held], [name for name in names if name in held]


def _listed(folder: Path, path: Path) -> list[str]:
    try:
        rows = np.load(path, allow_pickle=False)
        names = [str(name) for name in rows[:, 0]]
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"cannot read the list of books {path}: {' '.join(str(error).split())[:100]}") from None
    found = []
    for name in names:
        # The lists name the books as they were before they were tokenised, or the tokenised files.
        candidates = [name, f"files/{Path(name).stem}.npy"]
        there = next((c for c in candidates if c.endswith(".npy") and (folder / c).is_file()), None)
        if there is None:
            raise UserError(f"{path.name} names {name}, which is not in {folder}")
        found.append(there)
    return found


def _inspect(folder: Path, names: list[str], cache_dir: Path | None, console: Console | None) -> dict[str, _Book]:
    """Length, largest id and digest of every book, from the cache where a book has not changed."""
    key = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = (cache_dir or default_cache_dir()) / f"books-{key}.json"
    try:
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, _Book])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        known = {}

    def look(name: str) -> tuple[str, _Book]:
        book = folder / name
        try:
            stat = book.stat()
            before = known.get(name)
            if before is not None and (before.bytes, before.changed) == (stat.st_size, stat.st_mtime_ns):
                return name, before
            ids = open_stream(book)
            if not len(ids):
                raise UserError(f"the book {book} is empty")
            if ids.min() < 0:
                raise UserError(f"the book {book} has negative ids")
            return name, _Book(stat.st_size, stat.st_mtime_ns, len(ids), int(ids.max()), file_digest(book))
        except OSError as error:
            raise UserError(f"cannot read the book {book}: {error.strerror}") from None

    def looked() -> Iterator[tuple[str, _Book]]:
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            if console is None or len(names) < 1000:
                yield from workers.map(look, names)
                return
            with ProgressLine("reading books", len(names), console=console) as line:
                for done, item in enumerate(workers.map(look, names), start=1):
                    line.update(done)
                    yield item

    found = dict(looked())
    if found != known:
        with atomic_write(path) as file:
            file.write(msgspec.json.encode(found))
    return found
