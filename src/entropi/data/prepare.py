"""Documents to streams of token ids to blocks of one length, and the one call that does it all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer, pre_tokenizers

from entropi.cache import atomic_write, default_cache_dir
from entropi.console import ProgressLine
from entropi.data import shards
from entropi.data.books import find_books, open_books
from entropi.data.corpus import STDLIB, Corpus, Document, Source, load_corpus, load_texts
from entropi.data.debian_docs import DEBIAN_DOCS, load_debian_docs
from entropi.data.hub import Rows, find_dataset, open_dataset
from entropi.data.shards import Blocks, Manifest, Tokens
from entropi.data.site_packages import SITE_PACKAGES, load_site_packages
from entropi.data.tokenizer import (
    END_OF_TEXT_ID,
    check_vocab_size,
    encode_alike,
    end_of_text_id,
    load_or_train_tokenizer,
    load_tokenizer,
    pieces,
    tokenizer_hash,
)
from entropi.errors import UserError, is_failure

FORMAT = 2  # raise it when the stream of the same text changes, so that old cache entries are not met
BATCH_CHARACTERS = 4 << 20
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class PackedData:
    """Blocks of token ids, read from disk when asked for: `train (N, T)` and `heldout (M, T)`, int32.

    The token counts are those of the whole streams, ends of text and the dropped remainder included.
    """

    train: Blocks
    heldout: Blocks
    train_tokens: int
    heldout_tokens: int


@dataclass(frozen=True, slots=True)
class CorpusSummary:
    """What remains to be said of a corpus once it is packed; sizes in characters, 0 where only tokens are known."""

    name: str
    content_hash: str
    train_documents: int
    heldout_documents: int
    train_characters: int
    heldout_characters: int
    skipped: int
    duplicates: int
    sources: tuple[Source, ...] = ()  # with their licences, where they are known


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything training needs to know of its data."""

    corpus: CorpusSummary
    tokenizer: Tokenizer
    packed: PackedData

    @property
    def parts(self) -> str:
        """What is trained on and what is held out, in words."""
        train, heldout = self.packed.train_tokens, self.packed.heldout_tokens
        return (
            f"training on {train:,} tokens of {_texts(self.corpus.train_documents)}; held out {heldout:,} tokens of "
            f"{_texts(self.corpus.heldout_documents)} ({heldout / (train + heldout):.1%} of all)"
        )


def _texts(count: int) -> str:
    return f"{count:,} text{'s' * (count != 1)}"


def prepare(
    source: str,
    vocab_size: int,
    block_length: int,
    cache_dir: Path | None = None,
    console: Console | None = None,
    *,
    tokenizer: str = "",
    per_document: bool = False,
    content_hash: str = "",
) -> Prepared:
    """From a corpus to blocks.

    `source` is what `load_corpus` takes, `"site-packages"` (see `load_site_packages`), `"debian-docs"` (see
    `load_debian_docs`), the name of a data set that `hub.NAMED` knows, a folder of Parquet or Arrow files, a folder of
    tokenised books, or a folder of shards that was prepared elsewhere. `tokenizer` is what `load_tokenizer` takes;
    without one it is learnt from the corpus, with `vocab_size` entries. `content_hash` is that of the corpus of a run
    that is to be continued, see `load_corpus`.

    What takes long is done once and then read from the cache; a `console` is told what takes long.
    Raises `UserError` for whatever cannot be read or does not fit together.
    """
    check_block_length(block_length)
    if (folder := find_books(source)) is not None:
        return _prepare_books(folder, tokenizer, block_length, cache_dir, console)
    if (folder := Path(os.path.expanduser(source)) / shards.MANIFEST).is_file():
        return _open_prepared(folder.parent, tokenizer, block_length, per_document)
    if not tokenizer:
        check_vocab_size(vocab_size)
    given = load_tokenizer(tokenizer) if tokenizer else None
    corpus = _open_corpus(source, cache_dir, console, content_hash)
    found = given or load_or_train_tokenizer(corpus, vocab_size, cache_dir, console=console)
    eos_id = end_of_text_id(found)
    manifest, folder = _prepare_shards(corpus, found, cache_dir, eos_id, console)
    packed = _cut(manifest, folder, block_length, per_document)
    summary = replace(_summary(manifest, corpus.skipped, corpus.duplicates), sources=corpus.sources)
    return Prepared(summary, found, packed)


def _open_corpus(
    source: str, cache_dir: Path | None = None, console: Console | None = None, content_hash: str = ""
) -> Corpus:
    """The texts of what `load_corpus` takes, of `"site-packages"`, of `"debian-docs"`, or of a data set."""
    if source == SITE_PACKAGES:
        return load_site_packages(cache_dir, console)
    if source == DEBIAN_DOCS:
        return load_debian_docs(cache_dir, console)
    dataset = find_dataset(source)
    return load_corpus(source, content_hash) if dataset is None else open_dataset(dataset)


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    block_length: int,
    eos_id: int = END_OF_TEXT_ID,
    *,
    per_document: bool = False,
) -> Tokens:
    """Blocks `(N, block_length)` int32 of the ids of `documents`, in memory.

    By default the documents follow each other in one stream, `eos_id` after each; the stream is cut into
    blocks and the remainder, less than one block in all, is dropped.

    The paper's CodeParrot data (2501.03489, after chapter 7.6 of the Hugging Face course) are chunked file by
    file: no end of text, blocks of exactly T from the start of each file, and what is left of each file,
    or a shorter file altogether, is dropped. `per_document=True` does that. No block then spans two files,
    but much text is lost where files are short, and the model never sees a text end.

    Raises `UserError` if `block_length` is below 2.
    """
    check_block_length(block_length)
    found = [ids for ids, _ in encoded(documents, tokenizer, eos_id)]
    runs = [ids[:-1] for ids in found] if per_document else [np.concatenate(found)] if found else []
    cut = [run[: len(run) // block_length * block_length].reshape(-1, block_length) for run in runs]
    return np.concatenate([np.empty((0, block_length), np.int32), *cut])


def is_plain_text(source: str) -> bool:
    """Whether `source` names somebody's own text file or folder: no data set with a name, no Parquet, no tokens."""
    prepared = Path(os.path.expanduser(source)) / shards.MANIFEST
    if source in (STDLIB, SITE_PACKAGES, DEBIAN_DOCS) or prepared.is_file():
        return False
    return find_books(source) is None and find_dataset(source) is None


def heldout_blocks(
    source: str,
    tokenizer: Tokenizer,
    block_length: int,
    eos_id: int,
    *,
    per_document: bool = False,
    whole: bool = False,
    content_hash: str = "",
) -> Tokens:
    """Blocks `(N, block_length)` int32 of the held-out part of what `prepare` takes, in memory, cut as `pack` does.

    With `whole`, of all of it, which has to be plain text: for models that were trained on no part of it.
    `content_hash` is that of the corpus a run was trained on, see `load_corpus`.

    Raises `UserError` for what cannot be read, and for tokens that another tokenizer made.
    """
    if (folder := find_books(source)) is not None:
        books = open_books(folder)
        if books.largest >= tokenizer.get_vocab_size():
            raise UserError(f"the tokenizer of this model has no token {books.largest}, which is in {folder}")
        return Blocks(books.heldout, block_length)[:]
    if (folder := Path(os.path.expanduser(source))) and (folder / shards.MANIFEST).is_file():
        prepared = _open_prepared(folder, "", block_length, per_document)
        if not encode_alike(prepared.tokenizer, tokenizer):
            raise UserError(f"the tokens in {folder} were made with another tokenizer than this model's")
        return prepared.packed.heldout[:]
    if whole and is_plain_text(source):
        return pack(load_texts(source), tokenizer, block_length, eos_id, per_document=per_document)
    corpus = _open_corpus(source, content_hash=content_hash)
    return pack(corpus.heldout, tokenizer, block_length, eos_id, per_document=per_document)


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

    The cache under `cache_dir` (default: `default_cache_dir()`) holds a folder of shards for each text and tokenizer,
    which serves every block length. An interrupted encoding goes on after the last whole shard, and damaged shards are
    encoded anew. `console` shows progress where encoding takes long.

    Raises `UserError` if a part holds less than one block, or the cache cannot be written.
    """
    check_block_length(block_length)
    manifest, folder = _prepare_shards(corpus, tokenizer, cache_dir, eos_id, console)
    return _cut(manifest, folder, block_length, per_document)


def _prepare_shards(
    corpus: Corpus, tokenizer: Tokenizer, cache_dir: Path | None, eos_id: int, console: Console | None
) -> tuple[Manifest, Path]:
    """A complete folder of shards of a corpus, and its manifest."""
    made_from = Manifest(
        name=corpus.name, source=corpus.content_hash, tokenizer=tokenizer_hash(tokenizer), end_of_text=eos_id
    )
    content = f"{FORMAT} {made_from.source} {made_from.tokenizer} {eos_id}"
    folder = (cache_dir or default_cache_dir()) / f"tokens-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
    dtype = np.uint16 if max(tokenizer.get_vocab_size(), eos_id + 1) <= 1 << 16 else np.int32
    with shards.locked(folder):
        manifest = shards.load_manifest(folder)
        if manifest is None or (manifest.source, manifest.tokenizer) != (made_from.source, made_from.tokenizer):
            manifest = made_from
            with atomic_write(folder / TOKENIZER_FILE) as file:
                file.write(tokenizer.to_str().encode())
        for name, documents in (("train", corpus.train), ("held-out", corpus.heldout)):
            part = manifest.parts.setdefault(name, shards.Part())
            whole = shards.whole_shards(folder, part.shards)
            if part.complete and len(whole) == len(part.shards):
                continue
            part.shards, part.complete = whole, False
            with _progress(name, documents, part, console) as tell:
                stream = encoded(_after(documents, part.documents), tokenizer, eos_id, tell=tell)
                while shard := shards.write_shard(folder, f"{name}-{len(part.shards):05}", stream, dtype):
                    part.shards.append(shard)
                    shards.save_manifest(folder, manifest)
            part.complete = True
            shards.save_manifest(folder, manifest)
    return manifest, folder


def _after(documents: Collection[Document], count: int) -> Iterator[Document]:
    """All but the first `count` documents."""
    return documents.after(count) if isinstance(documents, Rows) else iter(list(documents)[count:])


Tell = Callable[[int, int], None]  # documents and characters done, since the last call


@contextmanager
def _progress(
    name: str, documents: Collection[Document], part: shards.Part, console: Console | None
) -> Iterator[Tell | None]:
    """Something to tell of the work done: shown in characters if all texts are at hand, else in documents."""
    by_rows = isinstance(documents, Rows)
    total = len(documents) if by_rows else sum(len(document.text) for document in documents)
    if console is None or not (by_rows or total > BATCH_CHARACTERS):
        yield None
        return
    if part.documents:
        console.print(f"encoding goes on after {part.documents:,} documents", markup=False)
    done = part.documents if by_rows else part.characters
    unit = 1 if by_rows else 1e6
    title = f"encoding {name} documents" if by_rows else "encoding, million characters"
    with ProgressLine(title, round(total / unit), done=round(done / unit), console=console) as line:

        def tell(documents_done: int, characters: int) -> None:
            nonlocal done
            done += documents_done if by_rows else characters
            if by_rows and done > line.total:  # not every data set says how long it is
                line.expect(done)
            line.update(round(done / unit))

        yield tell


def _open_prepared(folder: Path, tokenizer: str, block_length: int, per_document: bool) -> Prepared:
    """Shards that were prepared elsewhere, with the tokenizer beside them; refused if either is not as it was."""
    manifest = shards.load_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder / shards.MANIFEST} cannot be read: prepare the corpus anew")
    found = load_tokenizer(str(folder))
    if tokenizer_hash(found) != manifest.tokenizer:
        raise UserError(f"the tokenizer in {folder} is not the one its tokens were made with: prepare the corpus anew")
    if tokenizer and tokenizer_hash(load_tokenizer(tokenizer)) != manifest.tokenizer:
        raise UserError(f"the tokens in {folder} were made with another tokenizer than {tokenizer}")
    for name in ("train", "held-out"):
        part = manifest.parts.get(name, shards.Part())
        if not part.complete:
            raise UserError(f"the {name} part in {folder} is not complete: prepare the corpus to its end")
        if damaged := part.shards[len(shards.whole_shards(folder, part.shards)) :]:
            raise UserError(f"{folder / damaged[0].file} is not as it was written: prepare the corpus anew")
    return Prepared(_summary(manifest), found, _cut(manifest, folder, block_length, per_document))


def _summary(manifest: Manifest, skipped: int = 0, duplicates: int = 0) -> CorpusSummary:
    train, heldout = manifest.parts["train"], manifest.parts["held-out"]
    return CorpusSummary(
        name=manifest.name,
        content_hash=manifest.source,
        train_documents=train.documents,
        heldout_documents=heldout.documents,
        train_characters=train.characters,
        heldout_characters=heldout.characters,
        skipped=skipped,
        duplicates=duplicates,
    )


def _cut(manifest: Manifest, folder: Path, block_length: int, per_document: bool) -> PackedData:
    """The shards of both parts as blocks."""
    found = {}
    for part, content in manifest.parts.items():
        found[part] = Blocks(shards.streams(folder, content), block_length, per_document=per_document)
        _check_blocks(found[part], f"the {part} part of {manifest.name}", content.tokens, per_document)
    return PackedData(
        found["train"], found["held-out"], manifest.parts["train"].tokens, manifest.parts["held-out"].tokens
    )


def _check_blocks(blocks: Blocks, what: str, tokens: int, per_document: bool) -> None:
    if not len(blocks):
        raise UserError(
            f"{what} holds {tokens:,} tokens{', none of its documents a whole block' if per_document else ''}, "
            f"one block needs {blocks.block_length}: give more text or a smaller context length"
        )


def _prepare_books(
    folder: Path, tokenizer: str, block_length: int, cache_dir: Path | None, console: Console | None
) -> Prepared:
    """Books are tokens already: they are cut where they lie, each from its start, with its own tokenizer."""
    if not tokenizer:
        raise UserError(f"{folder} holds tokenised books: name their tokenizer, a tokenizer.json")
    found = load_tokenizer(tokenizer)
    books = open_books(folder, cache_dir, console)
    if books.largest >= found.get_vocab_size():
        raise UserError(
            f"{folder} has token {books.largest}, the tokenizer {tokenizer} only {found.get_vocab_size()} entries: "
            "these books were made with another one"
        )
    parts, tokens = [], []
    for name, streams in (("train", books.train), ("held-out", books.heldout)):
        parts.append(Blocks(streams, block_length))
        tokens.append(sum(stream.tokens for stream in streams))
        _check_blocks(parts[-1], f"the {name} part of {books.name}", tokens[-1], per_document=True)
    summary = CorpusSummary(books.name, books.content_hash, len(books.train), len(books.heldout), 0, 0, 0, 0)
    return Prepared(summary, found, PackedData(parts[0], parts[1], tokens[0], tokens[1]))


def check_block_length(block_length: int) -> None:
    """Raise `UserError` for blocks without a next token to predict."""
    if block_length < 2:
        raise UserError(f"block_length is {block_length} but must be at least 2: a token and its successor")


def encode(documents: Iterable[Document], tokenizer: Tokenizer, eos_id: int = END_OF_TEXT_ID) -> Tokens:
    """The ids `(tokens,)` int32 of all `documents` in order, `eos_id` after each; see `encoded`."""
    return np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in encoded(documents, tokenizer, eos_id))])


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, eos_id: int = END_OF_TEXT_ID, *, tell: Tell | None = None
) -> Iterator[tuple[Tokens, int]]:
    """The ids `(tokens,)` int32 of one document after another, each with `eos_id` at its end, and its characters.

    Text that spells out a special token is encoded as text, so `eos_id` marks the ends of documents only. Batches are
    encoded on all cores. `tell` is called with the documents and characters done since the last call.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy: the caller's own settings stay
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = np.array([eos_id], dtype=np.int32)
    parts: list[Tokens] = []
    size = 0
    for batch in _batches(documents, in_pieces=_may_be_cut(tokenizer)):
        try:
            encodings = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
        except BaseException as error:  # the tokenizers library raises nothing narrower, and panics
            if not is_failure(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the tokenizer cannot encode this text: {reason}") from None
        for (piece, is_last), encoding in zip(batch, encodings):
            parts.append(np.array(encoding.ids, dtype=np.int32))
            size += len(piece)
            if tell is not None:
                tell(int(is_last), len(piece))
            if is_last:
                yield np.concatenate([*parts, end]), size
                parts, size = [], 0


def _may_be_cut(tokenizer: Tokenizer) -> bool:
    """Whether text cut by `pieces` has the tokens of the whole: so with GPT-2's kind of splitting, and no other."""
    splitting = tokenizer.pre_tokenizer
    return (
        isinstance(splitting, pre_tokenizers.ByteLevel)
        and splitting.use_regex
        and not splitting.add_prefix_space
        and tokenizer.normalizer is None
    )


def _batches(documents: Iterable[Document], *, in_pieces: bool) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of text, and whether each is the last of its document, in lists of about `BATCH_CHARACTERS`."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        left = len(document.text)
        for piece in pieces(document.text) if in_pieces else (document.text,):
            left -= len(piece)
            batch.append((piece, left == 0))
            size += len(piece)
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
