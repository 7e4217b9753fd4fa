"""Data sets of the Hugging Face hub, and folders of Parquet or Arrow files, read row by row without a copy on disk."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropi.data.corpus import Corpus, Document
from entropi.data.shards import file_digest
from entropi.errors import UserError

FILE_TYPES = {".parquet": "parquet", ".arrow": "arrow"}
HELDOUT_NAMES = ("validation", "valid", "heldout", "held-out", "test", "eval")
COLUMNS = ("content", "text")
BARS = "HF_DATASETS_DISABLE_PROGRESS_BARS"


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where the two parts of a corpus lie: for each a repository and its split, or the files of a folder."""

    name: str
    train: tuple[str, str]
    heldout: tuple[str, str]
    column: str | None = None  # of the text; None: the one of `COLUMNS` that is there
    files: dict[str, list[str]] | None = None  # of a folder, by split


NAMED = {
    # As in chapter 7.6 of the Hugging Face course, which the paper's data follow.
    "codeparrot": DataSet(
        "codeparrot",
        ("huggingface-course/codeparrot-ds-train", "train"),
        ("huggingface-course/codeparrot-ds-valid", "validation"),
        "content",
    ),
    # Books in the public domain: an open stand-in for Languini's, which may not be redistributed.
    "pg19": DataSet("pg19", ("emozilla/pg19", "train"), ("emozilla/pg19", "validation"), "text"),
}


class Rows:
    """The texts of a split as documents, in order; iterating reads them anew. The length is 0 if it is not known."""

    def __init__(self, name: str, stream: Any, column: str, length: int) -> None:
        self.name, self.column, self._stream, self._length = name, column, stream, length

    def __len__(self) -> int:
        return self._length

    def __contains__(self, document: object) -> bool:
        return any(document == one for one in self)

    def __iter__(self) -> Iterator[Document]:
        return self.after(0)

    def after(self, count: int) -> Iterator[Document]:
        """All but the first `count` documents."""
        with _in_one_line(self.name):
            for number, row in enumerate(self._stream.skip(count) if count else self._stream, start=count):
                yield Document(str(number), row[self.column] or "")


def find_dataset(source: str) -> DataSet | None:
    """The data set that `source` names, or None: a name of `NAMED`, or a folder of Parquet or Arrow files.

    A folder needs files for training and others, told apart by a name with "train" in it, and by one with
    "validation", "test" or the like; either the files' own names or those of their folders.

    Raises:
        UserError: a folder of such files that lacks one of the two.
    """
    if source in NAMED:
        return NAMED[source]
    folder = Path(os.path.expanduser(source))
    try:
        if not folder.is_dir():
            return None
        found = sorted(p for p in folder.rglob("*") if p.suffix in FILE_TYPES and p.is_file())
    except OSError:
        return None  # `load_corpus` says why
    if not found or any(part.startswith(".") for path in found for part in path.relative_to(folder).parts):
        return None
    files: dict[str, list[str]] = {"train": [], "heldout": []}
    for path in found:
        name = path.relative_to(folder).as_posix().lower()
        if "train" in name:
            files["train"].append(str(path))
        elif any(word in name for word in HELDOUT_NAMES):
            files["heldout"].append(str(path))
    for split, words in (("train", "train"), ("heldout", "validation or test")):
        if not files[split]:
            raise UserError(f"{folder} has Parquet or Arrow files, but none with {words} in its name")
    kinds = {Path(path).suffix for paths in files.values() for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{folder} mixes {' and '.join(sorted(kinds))} files: one kind is needed")
    kind = FILE_TYPES[kinds.pop()]
    return DataSet(folder.resolve().name, (kind, "train"), (kind, "heldout"), files=files)


def open_dataset(dataset: DataSet) -> Corpus:
    """The two parts of `dataset` as a corpus whose documents are read while they are used.

    The content hash is that of the files: of a repository their names and its commit, of a folder what is in them.

    Raises:
        UserError: it cannot be found, reached or read, or has no column of text.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError("datasets is not installed: pip install 'entropi[corpora]'") from None
    digest = hashlib.sha256()
    parts = []
    for source, split in (dataset.train, dataset.heldout):
        with _in_one_line(source if dataset.files is None else dataset.name):
            datasets.disable_progress_bars()
            builder = datasets.load_dataset_builder(source, data_files=dataset.files)
            stream = builder.as_streaming_dataset(split=split)
            first = next(iter(stream), None)
            names = [str(name) for name in builder.config.data_files[split]]
            known = (builder.info.splits or {}).get(split)
        if first is None:
            raise UserError(f"the {split} part of {dataset.name} is empty")
        columns = [c for c in ([dataset.column] if dataset.column else COLUMNS) if isinstance(first.get(c), str)]
        if not columns:
            raise UserError(
                f"{dataset.name} has no column of text {dataset.column or ' or '.join(COLUMNS)}: its first row has "
                f"{', '.join(first)}"
            )
        for field in (split, columns[0], *_identities(names)):
            digest.update(len(field).to_bytes(8, "big") + field.encode())
        parts.append(Rows(dataset.name, stream, columns[0], known.num_examples if known else 0))
    return Corpus(dataset.name, parts[0], parts[1], digest.hexdigest())


def _identities(names: list[str]) -> Iterator[str]:
    """What tells that the files are the same: names on the hub hold its commit, local files are read."""
    local = [name for name in names if "://" not in name]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        digests = workers.map(file_digest, map(Path, local))
        yield from itertools.chain((name for name in names if "://" in name), digests)


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Whatever a reader of foreign files and of the network raises, as one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt, GeneratorExit):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot read the data set {name}: {reason}") from None
