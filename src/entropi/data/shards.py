"""Tokens on disk: shards that are written one by one, checked when they are opened, and read as blocks."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from entropi.cache import atomic_write
from entropi.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SHARD_TOKENS = 1 << 26  # a hundred megabytes or two: what a kill costs, and what is held in memory while encoding
OPEN_FILES = 128  # a folder of books has more files than a process may keep open
MANIFEST = "manifest.json"

Tokens = NDArray[np.int32]
Ids = NDArray[Any]  # uint16 or int32 on disk


@dataclass(frozen=True, slots=True)
class Stream:
    """Ids of one file, `(tokens,)`, and where its documents end.

    Document k is `ids[ends[k-1] + 1 : ends[k]]`, with the end of text at `ends[k]`; without `ends` the file is one
    document without an end of text.
    """

    path: Path
    tokens: int
    ends: NDArray[np.int64] | None = None


class Blocks:
    """Blocks of token ids `(N, T)`, int32, cut from files when they are asked for.

    By default every stream is cut from its start and the remainder, less than a block, is dropped; `per_document`
    does so with every document and leaves out the ends of text. An index gives `(T,)`, a slice `(n, T)`.
    """

    def __init__(self, streams: Sequence[Stream], block_length: int, *, per_document: bool = False) -> None:
        self.streams, self.block_length = list(streams), block_length
        # A run is a stretch of tokens that is cut into blocks: a stream, or a document.
        starts: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        counts, owners = list(starts), list(starts)
        for number, stream in enumerate(self.streams):
            if per_document and stream.ends is not None:
                first = np.concatenate([[0], stream.ends[:-1] + 1]).astype(np.int64)
                lengths = stream.ends - first
            else:
                first, lengths = np.zeros(1, np.int64), np.array([stream.tokens], np.int64)
            kept = lengths >= block_length
            starts.append(first[kept])
            counts.append(lengths[kept] // block_length)
            owners.append(np.full(int(kept.sum()), number, np.int64))
        self._starts, self._owners = np.concatenate(starts), np.concatenate(owners)
        self._after = np.cumsum(np.concatenate(counts))  # blocks up to and with each run
        self._open = functools.lru_cache(OPEN_FILES)(open_stream)

    def __len__(self) -> int:
        return int(self._after[-1]) if len(self._after) else 0

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, T)`."""
        return len(self), self.block_length

    @property
    def size(self) -> int:
        """Tokens in all blocks."""
        return len(self) * self.block_length

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> Tokens: ...
    def __getitem__(self, index: int | slice) -> Tokens:
        if isinstance(index, slice):
            rows = [self[i] for i in range(*index.indices(len(self)))]
            return np.stack(rows) if rows else np.empty((0, self.block_length), np.int32)
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        run = int(np.searchsorted(self._after, number, side="right"))
        before = int(self._after[run - 1]) if run else 0
        start = int(self._starts[run]) + (number - before) * self.block_length
        ids = self._open(self.streams[int(self._owners[run])].path)
        return np.asarray(ids[start : start + self.block_length], dtype=np.int32)

    def __iter__(self) -> Iterator[Tokens]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:] if dtype is None else self[:].astype(dtype)

    def __getstate__(self) -> dict[str, Any]:  # memory maps are opened again in the other process
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open = functools.lru_cache(OPEN_FILES)(open_stream)


def open_stream(path: Path) -> Ids:
    """The ids of a file, memory-mapped.

    Raises:
        UserError: it is missing, damaged, or holds no ids.
    """
    try:
        ids = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header fails in the many ways in which Python text can
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:100] or type(error).__name__
        raise UserError(f"cannot read the tokens in {path}: {reason}") from None
    if ids.ndim != 1 or ids.dtype not in (np.uint16, np.int32):
        raise UserError(f"{path} holds no token ids: one row of uint16 or int32 is expected")
    return ids


class Shard(msgspec.Struct, kw_only=True, frozen=True):
    """What a manifest says of one shard."""

    file: str
    tokens: int
    documents: int
    characters: int
    sha256: str  # of the file of ids and the file of ends


class Part(msgspec.Struct, kw_only=True):
    """One part of a corpus, train or held-out: its shards so far, and whether they are all."""

    shards: list[Shard] = msgspec.field(default_factory=list)
    complete: bool = False

    @property
    def tokens(self) -> int:
        """Ends of text included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def characters(self) -> int:
        return sum(shard.characters for shard in self.shards)


class Manifest(msgspec.Struct, kw_only=True):
    """What is in a folder of shards, and what text and tokenizer it was made from."""

    name: str  # of the corpus
    source: str  # of the text, SHA-256
    tokenizer: str  # SHA-256
    end_of_text: int
    parts: dict[str, Part] = msgspec.field(default_factory=dict)


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder of shards, or None if there is none that can be read."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest whole or not at all."""
    with atomic_write(folder / MANIFEST) as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def ends_file(path: Path) -> Path:
    """Where the ends of the documents of a shard stand."""
    return path.with_suffix(".ends.npy")


def write_shard(
    folder: Path, name: str, documents: Iterable[tuple[Ids, int]], dtype: type[np.uint16] | type[np.int32]
) -> Shard | None:
    """Write documents, each its ids with the end of text and its characters, until the shard is full.

    Takes no document more than the shard holds; None if there was none. Raises `UserError` if it cannot be written.
    """
    ids: list[Ids] = []
    ends: list[int] = []
    tokens = characters = 0
    for document, size in documents:
        ids.append(document.astype(dtype))
        tokens += len(document)
        characters += size
        ends.append(tokens - 1)
        if tokens >= SHARD_TOKENS:
            break
    if not ends:
        return None
    path = folder / f"{name}.npy"
    for target, content in ((path, np.concatenate(ids)), (ends_file(path), np.array(ends, np.int64))):
        with atomic_write(target) as file:
            np.save(file, content, allow_pickle=False)
    return Shard(file=path.name, tokens=tokens, documents=len(ends), characters=characters, sha256=_digest(path))


def whole_shards(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """The shards up to the first that is missing or not as it was written."""
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        found = list(workers.map(lambda shard: _digest(folder / shard.file) == shard.sha256, shards))
    return list(shards[: found.index(False)]) if False in found else list(shards)


def streams(folder: Path, part: Part) -> list[Stream]:
    """The streams of the shards of a part."""
    paths = [folder / shard.file for shard in part.shards]
    return [
        Stream(path, shard.tokens, np.load(ends_file(path), mmap_mode="r")) for path, shard in zip(paths, part.shards)
    ]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create and hold a folder of the cache; the processes of one training wait here for the one that fills it."""
    try:
        if not folder.is_dir():  # one that is complete may lie where nobody can write
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {folder}: {error.strerror}; "
            "set ENTROPI_CACHE to a folder with room that can be written"
        ) from None
    try:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(path: Path) -> str:
    try:
        both = file_digest(path) + file_digest(ends_file(path))
    except OSError:
        return ""
    return hashlib.sha256(both.encode()).hexdigest()
