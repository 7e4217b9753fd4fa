"""Documents to a stream of token ids to blocks of one length, and the one call that does it all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from tokenizers import Tokenizer

from entropi.cache import default_cache_dir, written_whole
from entropi.console import ProgressLine
from entropi.data.corpus import Corpus, Document, load_corpus
from entropi.data.tokenizer import (
    END_OF_TEXT_ID,
    check_vocab_size,
    load_or_train_tokenizer,
    pieces,
    tokenizer_hash,
)
from entropi.errors import UserError

FORMAT = 1  # raise it when the stream of the same text changes, so that old cache entries are not met
BATCH_CHARACTERS = 4 << 20

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PackedData:
    """Blocks of token ids, read-only: `train (N, T)` and `heldout (M, T)`, int32.

    The token counts are those of the whole streams, ends of text and the dropped remainder included.
    """

    train: Tokens
    heldout: Tokens
    train_tokens: int
    heldout_tokens: int


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """What remains to be said of a corpus once it is packed; sizes in characters."""

    name: str
    content_hash: str
    train_documents: int
    heldout_documents: int
    train_characters: int
    heldout_characters: int
    skipped: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything training needs to know of its data."""

    corpus: CorpusSummary
    tokenizer: Tokenizer
    packed: PackedData


def prepare(
    source: str,
    vocab_size: int,
    block_length: int,
    cache_dir: Path | None = None,
    console: Console | None = None,
    *,
    per_document: bool = False,
) -> Prepared:
    """From a corpus to blocks: `load_corpus`, `load_or_train_tokenizer`, `load_or_pack`.

    What takes long is done once and then read from the cache; a `console` is told what takes long.
    Raises `UserError` for whatever those three refuse.
    """
    check_vocab_size(vocab_size)
    check_block_length(block_length)
    corpus = load_corpus(source)
    tokenizer = load_or_train_tokenizer(corpus, vocab_size, cache_dir, console=console)
    packed = load_or_pack(corpus, tokenizer, block_length, cache_dir, per_document=per_document, console=console)
    summary = CorpusSummary(
        name=corpus.name,
        content_hash=corpus.content_hash,
        train_documents=len(corpus.train),
        heldout_documents=len(corpus.heldout),
        train_characters=_characters(corpus.train),
        heldout_characters=_characters(corpus.heldout),
        skipped=corpus.skipped,
        duplicates=corpus.duplicates,
    )
    return Prepared(summary, tokenizer, packed)


def pack(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    block_length: int,
    eos_id: int = END_OF_TEXT_ID,
    *,
    per_document: bool = False,
) -> Tokens:
    """Blocks `(N, block_length)` int32 of the ids of `documents`.

    By default the documents follow each other in one stream, `eos_id` after each; the stream is cut into
    blocks and the remainder, less than one block in all, is dropped.

    The paper's CodeParrot data (2501.03489, after chapter 7.6 of the Hugging Face course) are chunked file by
    file: no end of text, blocks of exactly T from the start of each file, and what is left of each file,
    or a shorter file altogether, is dropped. `per_document=True` does that. No block then spans two files,
    but much text is lost where files are short, and the model never sees a text end.

    Raises `UserError` if `block_length` is below 2.
    """
    check_block_length(block_length)
    return _blocks(encode(documents, tokenizer, eos_id), block_length, eos_id, per_document)


def load_or_pack(
    corpus: Corpus,
    tokenizer: Tokenizer,
    block_length: int,
    cache_dir: Path | None = None,
    *,
    eos_id: int = END_OF_TEXT_ID,
    per_document: bool = False,
    console: Console | None = None,
) -> PackedData:
    """`pack` for both parts of a corpus, encoded once for each corpus content and tokenizer.

    The cache under `cache_dir` (default: `default_cache_dir()`) holds the streams, so one entry serves every
    block length. The blocks are views of the memory-mapped file, or copies with `per_document`. A damaged
    entry is encoded anew. `console` shows progress where encoding takes long.

    Raises `UserError` if a part holds less than one block, or the cache cannot be written.
    """
    check_block_length(block_length)
    content = f"{FORMAT} {corpus.content_hash} {tokenizer_hash(tokenizer)} {eos_id}"
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    folder = cache_dir or default_cache_dir()

    def part(name: str, documents: Sequence[Document]) -> tuple[Tokens, int]:
        path = folder / f"tokens-{key}-{name}.npy"
        stream = _load_stream(path, tokenizer, eos_id)
        if stream is None:
            with written_whole(path) as file:
                np.save(file, encode(documents, tokenizer, eos_id, console=console), allow_pickle=False)
            stream = _open_stream(path)
        blocks = _blocks(stream, block_length, eos_id, per_document)
        if not len(blocks):
            raise UserError(
                f"the {name} part of {corpus.name} holds {len(stream):,} tokens"
                f"{', none of its documents a whole block' if per_document else ''}, "
                f"one block needs {block_length}: give more text or a smaller context length"
            )
        return blocks, len(stream)

    train, train_tokens = part("train", corpus.train)
    heldout, heldout_tokens = part("held-out", corpus.heldout)
    return PackedData(train, heldout, train_tokens, heldout_tokens)


def check_block_length(block_length: int) -> None:
    """Raise `UserError` for blocks without a next token to predict."""
    if block_length < 2:
        raise UserError(f"block_length is {block_length} but must be at least 2: a token and its successor")


def encode(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    eos_id: int = END_OF_TEXT_ID,
    *,
    console: Console | None = None,
) -> Tokens:
    """The ids `(tokens,)` int32 of all `documents` in order, `eos_id` after each.

    Text that spells out a special token is encoded as text, so `eos_id` marks the ends of documents only.
    `console` shows the progress of more than one batch.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: the caller's own settings stay
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = np.array([eos_id], dtype=np.int32)
    parts: list[Tokens] = [np.empty(0, dtype=np.int32)]
    total, done = _characters(documents), 0
    shown: AbstractContextManager[ProgressLine | None] = nullcontext()
    if console is not None and total > BATCH_CHARACTERS:
        shown = ProgressLine("encoding, million characters", round(total / 1e6), console=console)
    with shown as progress:
        for batch in _batches(documents):
            encodings = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            for (piece, is_last), encoding in zip(batch, encodings):
                parts.append(np.array(encoding.ids, dtype=np.int32))
                if is_last:
                    parts.append(end)
                done += len(piece)
            if progress is not None:
                progress.update(round(done / 1e6))
    return np.concatenate(parts)


def _characters(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _batches(documents: Sequence[Document]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of text, and whether each is the last of its document, in lists of about `BATCH_CHARACTERS`."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        left = len(document.text)
        for piece in pieces(document.text):
            left -= len(piece)
            batch.append((piece, left == 0))
            size += len(piece)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _blocks(stream: Tokens, block_length: int, eos_id: int, per_document: bool) -> Tokens:
    if not per_document:
        count = len(stream) // block_length
        return stream[: count * block_length].reshape(count, block_length)
    chunks = [np.empty((0, block_length), dtype=np.int32)]
    start = 0
    for end in np.flatnonzero(stream == eos_id):
        count = (end - start) // block_length
        chunks.append(stream[start : start + count * block_length].reshape(count, block_length))
        start = end + 1
    return np.concatenate(chunks)


def _open_stream(path: Path) -> Tokens:
    return np.lib.format.open_memmap(path, mode="r")


def _load_stream(path: Path, tokenizer: Tokenizer, eos_id: int) -> Tokens | None:
    """A cached stream, or None if it is missing or not what was once written."""
    try:
        stream = _open_stream(path)
    except Exception:  # a damaged header fails in the many ways in which Python text can
        return None
    if stream.dtype != np.int32 or stream.ndim != 1 or not len(stream) or stream[-1] != eos_id:
        return None
    # An id beyond the vocabulary would otherwise come to light as a crash in the embedding.
    if stream.min() < 0 or stream.max() >= max(tokenizer.get_vocab_size(), eos_id + 1):
        return None
    return stream
