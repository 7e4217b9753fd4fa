"""A corpus is a list of texts in two parts, train and held-out, always split the same way."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from entropi.data.split import hash_of_parts, split, split_by_name
from entropi.errors import UserError

STDLIB = "stdlib"
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
GENERATED_FOLDERS = frozenset({"encodings", "pydoc_data"})
FOREIGN_FOLDERS = frozenset({"__pycache__", "CVS", "node_modules", "site-packages", "dist-packages"})
ENVIRONMENT_MARKS = ("pyvenv.cfg", "conda-meta")  # what a virtual environment has at its top


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it lies: `path` is relative to the corpus, with forward slashes."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where part of a corpus comes from: a package with its version, its licence, and the part, train or held-out."""

    name: str
    licence: str
    part: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to train on and texts to measure on: lists, or for large data sets what reads them one by one.

    `content_hash` is the SHA-256 (hexadecimal) of the paths and texts of all documents and of the part each is
    in; `skipped` counts the files that are not UTF-8 text, `duplicates` those left out because another has the
    very same text. `sources` names where the texts come from, where that is known.
    """

    name: str
    train: Collection[Document]
    heldout: Collection[Document]
    content_hash: str
    skipped: int = 0
    duplicates: int = 0
    sources: tuple[Source, ...] = ()


def load_corpus(source: str, content_hash: str = "") -> Corpus:
    """Read a corpus: `"stdlib"`, or the path of a text file or of a folder of text files.

    `"stdlib"` is the `*.py` source of the running Python's standard library without its test suites: those are
    repetitive tables and near-duplicates of each other, which would flatter the held-out perplexity, and some
    distributions of Python leave them out, so that the corpus would depend on who packaged Python. `encodings`
    (some 120 near-equal code tables) and `pydoc_data` (one file of help texts, larger than a whole held-out
    part) are generated and left out for the same reason. A folder of that name is written `./stdlib`.

    A folder is read recursively in the order of the relative paths. Hidden files and folders, virtual
    environments, `__pycache__`, `node_modules` and `site-packages` are passed over, linked folders are not
    followed, blank files and exact copies of an earlier file are left out, and what is not UTF-8 text is
    counted in `skipped`.

    About 5 % of the text is held out, whole files or the ends of files: see `split.split`. What was split by an
    earlier rule is split so again if that gives `content_hash`, which a run records.

    Raises `UserError` if the source is missing, empty, unreadable, not text, or not a file or folder.
    """
    return _split(*_read_source(source), content_hash)


def load_texts(source: str) -> list[Document]:
    """All documents of what `load_corpus` takes, none of them split or held out."""
    return _read_source(source)[1]


def _read_source(source: str) -> tuple[str, list[Document], int, int]:
    """The name of a corpus, its documents, the number of files skipped, the number of copies."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        documents, skipped, duplicates = _read_all(root, _stdlib_files(root))
        if not documents:
            raise UserError("this Python carries no standard library source: give a text file or a folder")
        return f"Python {platform.python_version()} standard library", documents, skipped, duplicates

    path = Path(os.path.expanduser(source))  # pathlib's own raises on an unknown user
    shown = as_shown(path)
    try:
        if not source.strip() or not path.exists():
            raise UserError(
                f"there is no file or folder {as_shown(source)!r}: give a text file, a folder or {STDLIB!r}"
            )
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a parent folder that may not be entered, a name too long
        raise UserError(f"cannot open {shown}: {_reason(error)}; give a text file or a folder") from None
    name = as_shown(path.resolve().name) or shown

    if is_folder:
        documents, skipped, duplicates = _read_all(path, _walk(path))
        if not documents:
            reason = f"{skipped} files, none of them text" if skipped else "no files with text in them"
            raise UserError(f"the folder {shown} has {reason}: give a folder with UTF-8 text files")
        return name, documents, skipped, duplicates

    if not is_file:  # reading a pipe or a device could wait forever
        raise UserError(f"{shown} is a device, pipe or socket: give a text file or a folder")
    text = read_text(path)
    if text is None:
        raise UserError(f"{shown} is not UTF-8 text: convert it to UTF-8 or give another file")
    if not text.strip():
        raise UserError(f"{shown} is empty: give a file with text in it")
    return name, [Document(as_shown(path.name), text)], 0, 0


def as_shown(path: str | Path) -> str:
    """A path fit for one line of a message and for JSON, whatever bytes the file system allows."""
    return "".join(c if c.isprintable() else "?" for c in str(path))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _refuse(error: OSError) -> NoReturn:
    """A part of a folder that cannot be read is an error: skipping it would silently change the corpus."""
    path = as_shown(error.filename or "the corpus")
    raise UserError(f"cannot read {path}: {_reason(error)}; make it readable or leave it out") from None


def _walk(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root, onerror=_refuse):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".")
            and name not in FOREIGN_FOLDERS
            and not any(os.path.lexists(os.path.join(folder, name, mark)) for mark in ENVIRONMENT_MARKS)
        ]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _stdlib_files(root: Path) -> Iterator[Path]:
    for path in _walk(root):
        folders = path.relative_to(root).parts[:-1]
        # _sysconfigdata* and config-* are written when Python is built and name folders of the build machine.
        built = path.name.startswith("_sysconfigdata") or any(name.startswith("config-") for name in folders)
        if path.suffix == ".py" and not built and (TEST_FOLDERS | GENERATED_FOLDERS).isdisjoint(folders):
            yield path


def read_text(path: Path) -> str | None:
    """The text of a regular file, or None if it is not UTF-8 text; raises `UserError` if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        _refuse(error)
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _read_all(root: Path, paths: Iterator[Path]) -> tuple[list[Document], int, int]:
    """Documents in the order of their relative paths, the number of files skipped, the number of copies."""
    documents: list[Document] = []
    seen: set[str] = set()  # a copy could otherwise stand on both sides of the split
    skipped = duplicates = 0
    for relative, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        try:
            regular = path.is_file()  # not a pipe, a device or a dangling link
        except OSError as error:
            _refuse(error)
        text = read_text(path) if regular else None
        if text is None:
            skipped += 1
        elif text in seen:
            duplicates += 1
        elif text.strip():
            seen.add(text)
            documents.append(Document(relative, text))
    return documents, skipped, duplicates


def _split(name: str, documents: list[Document], skipped: int, duplicates: int, content_hash: str) -> Corpus:
    parts = split(documents)
    digest = hash_of_parts(*parts)
    if content_hash and digest != content_hash:
        earlier = split_by_name(documents)
        if hash_of_parts(*earlier) == content_hash:
            parts, digest = earlier, content_hash
    return Corpus(name, *parts, digest, skipped, duplicates)
