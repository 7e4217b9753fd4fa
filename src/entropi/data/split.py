"""Which part of a corpus is held out: the rule, and the earlier one that runs of older versions were begun under."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from entropi.data.corpus import Document

HELDOUT_SHARE = 0.05
LEAST_SHARE, MOST_SHARE = HELDOUT_SHARE / 2, HELDOUT_SHARE * 2

Parts: TypeAlias = "tuple[list[Document], list[Document]]"  # trained on, and held out


def split(documents: Sequence[Document]) -> Parts:
    """Documents to train on and documents to measure on, which hold about 5 % of all characters.

    Whole documents are held out where they come to between 2.5 and 10 %: those with a low hash of their path, so that
    a document stays on its side when others come and go; or, where sizes or numbers are against that, those that come
    nearest to 5 %. Where whole documents are too large, as for a handful of files, the end of each is held out.
    """
    for held in (_by_name(documents), _nearest(documents)):
        if LEAST_SHARE <= _characters(held) / _characters(documents) <= MOST_SHARE:
            return _partition(documents, {document.path for document in held})

    pairs = [_cut(document, MOST_SHARE) for document in documents]
    train, heldout = ([document for document in part if document.text] for part in zip(*pairs))
    return train, heldout


def split_by_name(documents: Sequence[Document]) -> Parts:
    """The rule before `split`: by the hash of the path alone, whatever share of the text that comes to."""
    if len(documents) == 1:
        train, heldout = _cut(documents[0], 0.5)
        return [train], [heldout]
    half = _characters(documents) / 2
    candidates = [document for document in documents if len(document.text) <= half]
    first = min(candidates, key=lambda document: position(document.path))
    held = {first.path} | {document.path for document in _by_name(candidates)}
    if len(held) == len(documents):  # a few files whose hashes are all small
        held = {first.path}
    return _partition(documents, held)


def hash_of_parts(train: Collection[Document], heldout: Collection[Document]) -> str:
    """SHA-256 (hexadecimal) of the paths and texts of all documents and of the part each is in."""
    digest = hashlib.sha256()
    for part, members in ((b"train", train), (b"held-out", heldout)):
        for document in members:
            for field in (part, document.path.encode("utf-8", "surrogateescape"), document.text.encode()):
                digest.update(len(field).to_bytes(8, "big") + field)
    return digest.hexdigest()


def position(path: str) -> float:
    """A number in [0, 1) that depends on the relative path alone."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _by_name(documents: Sequence[Document]) -> list[Document]:
    return [document for document in documents if position(document.path) < HELDOUT_SHARE]


def _nearest(documents: Sequence[Document]) -> list[Document]:
    """Documents that come near to the share: what fits into it in the order of hashes, or with the smallest other."""
    wanted = HELDOUT_SHARE * _characters(documents)
    fitting: list[Document] = []
    others: list[Document] = []
    size = 0
    for document in sorted(documents, key=lambda document: position(document.path)):
        fits = size + len(document.text) <= wanted
        (fitting if fits else others).append(document)
        size += len(document.text) if fits else 0

    choices = [fitting]
    if others:
        smallest = min(others, key=lambda document: len(document.text))
        choices += [[smallest], [*fitting, smallest]]
    return min(choices, key=lambda chosen: abs(_characters(chosen) - wanted))


def _cut(document: Document, most: float) -> tuple[Document, Document]:
    """A document without its last 5 %, and those; they begin with a line unless that made them more than `most`."""
    text = document.text
    cut = int(len(text) * (1 - HELDOUT_SHARE))
    line_start = text.rfind("\n", int(len(text) * (1 - most)), cut) + 1
    cut = line_start or cut
    return replace(document, text=text[:cut]), replace(document, text=text[cut:])


def _partition(documents: Sequence[Document], held: set[str]) -> Parts:
    train = [document for document in documents if document.path not in held]
    heldout = [document for document in documents if document.path in held]
    return train, heldout


def _characters(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)
