"""Byte-level byte-pair encoding, trained on the corpus itself and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from entropi.cache import atomic_write, default_cache_dir
from entropi.data.corpus import Corpus, Document
from entropi.data.shards import locked
from entropi.errors import UserError

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MIN_VOCAB_SIZE = 257  # 256 bytes and the end of text
ENDS_OF_TEXT = (END_OF_TEXT, "</s>", "<eos>")  # of tokenizers that were not learnt here
LEARN_CHARACTERS = 1 << 28  # enough for any vocabulary; learning holds every different word in memory
FORMAT = 1  # raise it when the training or the file changes, so that old cache entries are not met

PIECE_CHARACTERS = 1 << 20
_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")


def check_vocab_size(vocab_size: int) -> None:
    """Raise `UserError` if a byte-level vocabulary cannot be that small."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size} but must be at least {MIN_VOCAB_SIZE}: 256 bytes and the end of text"
        )


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learnt from the train part of `corpus` alone.

    Every byte is a token of its own, so no text is unknown and `decode(encode(text).ids) == text`. Id 0 is
    the end of text, `"<|endoftext|>"`; where text spells out those characters they are encoded as plain text.
    A small corpus may not hold `vocab_size` tokens worth learning: ask the result's `get_vocab_size()`. Of a large
    one the first 2^28 characters are learnt from.

    Raises `UserError` if `vocab_size` is below 257.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_all_pieces(corpus.train), trainer)
    return _as_plain_text(tokenizer)


def load_or_train_tokenizer(
    corpus: Corpus, vocab_size: int, cache_dir: Path | None = None, *, console: Console | None = None
) -> Tokenizer:
    """`train_tokenizer`, once for each corpus content and vocabulary size; later calls read the cache.

    `cache_dir` is `default_cache_dir()` unless given. A damaged entry is trained anew. `console` is told when
    training starts. Raises `UserError` if `vocab_size` is below 257 or the cache cannot be written.
    """
    check_vocab_size(vocab_size)
    key = hashlib.sha256(f"{FORMAT} {corpus.content_hash} {vocab_size}".encode()).hexdigest()[:32]
    folder = cache_dir or default_cache_dir()
    path = folder / f"tokenizer-{key}.json"
    if (found := _load(path, vocab_size)) is not None:
        return found
    with locked(folder):
        if (found := _load(path, vocab_size)) is not None:  # learnt by another process meanwhile
            return found
        if console is not None:
            at_hand = isinstance(corpus.train, list)
            size = f"{sum(len(document.text) for document in corpus.train):,} characters of " if at_hand else ""
            console.print(f"training the tokenizer on {size}{corpus.name}", markup=False)
        learnt = train_tokenizer(corpus, vocab_size)
        with atomic_write(path) as file:
            file.write(learnt.to_str().encode())
    return learnt


def load_tokenizer(source: str) -> Tokenizer:
    """A tokenizer somebody else made: a `tokenizer.json`, a folder with one, a SentencePiece `.model`, or the name of a
    repository of the hub.

    Raises:
        UserError: it cannot be found, reached or read.
    """
    path = Path(os.path.expanduser(source))
    try:
        if path.is_dir():
            path = path / "tokenizer.json"
        elif not path.exists() and source.count("/") == 1 and path.suffix != ".json":
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(source, "tokenizer.json"))
        if not path.exists():
            raise UserError(f"there is no tokenizer {source}: give a tokenizer.json, its folder, or a name on the hub")
        tokenizer = _from_sentencepiece(path) if path.suffix == ".model" else Tokenizer.from_file(str(path))
    except UserError:
        raise
    except Exception as error:  # what the network and the tokenizers library raise has no common class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot read the tokenizer {source}: {reason}") from None
    end_of_text_id(tokenizer)
    return _as_plain_text(tokenizer)


def _from_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model of type BPE or unigram, with the model's own ids.

    Raises:
        UserError: sentencepiece is not installed, or the model is of another type or changes characters of the text.
    """
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError:
        raise UserError("sentencepiece is not installed: pip install 'entropi[corpora]'") from None
    read = SentencePieceProcessor(model_file=str(path))
    content = sentencepiece_model_pb2.ModelProto.FromString(read.serialized_model_proto())
    names = [piece.piece for piece in content.pieces]
    scores = {piece.piece: piece.score for piece in content.pieces}
    unknown = content.trainer_spec.unk_id
    bytes_known = bool(content.trainer_spec.byte_fallback)
    model: models.Model
    if content.trainer_spec.model_type == content.trainer_spec.UNIGRAM:
        model = models.Unigram(list(scores.items()), unk_id=unknown, byte_fallback=bytes_known)
    elif content.trainer_spec.model_type == content.trainer_spec.BPE:
        # A piece is made by the merge of any two it consists of; SentencePiece merges the pair of the highest score.
        pairs = [(name[:cut], name[cut:]) for name in names for cut in range(1, len(name))]
        merges = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
        merges.sort(key=lambda pair: -scores[pair[0] + pair[1]])
        ids = {name: number for number, name in enumerate(names)}
        model = models.BPE(ids, merges, unk_token=names[unknown], fuse_unk=True, byte_fallback=bytes_known)
    else:
        raise UserError(f"{path} is a SentencePiece model of words or characters: BPE or unigram is needed")
    tokenizer = Tokenizer(model)
    rules = content.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(undo + [decoders.Strip(" ", 1, 0)] * rules.add_dummy_prefix)
    control = [piece.piece for piece in content.pieces if piece.type in (piece.CONTROL, piece.USER_DEFINED)]
    tokenizer.add_special_tokens(control)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that ends a text.

    Raises:
        UserError: the tokenizer has none of the tokens that are known to mean it.
    """
    for token in ENDS_OF_TEXT:
        if (found := tokenizer.token_to_id(token)) is not None:
            return int(found)
    raise UserError(f"this tokenizer has no token that ends a text: one of {', '.join(ENDS_OF_TEXT)} is needed")


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 (hexadecimal) of everything that decides how `tokenizer` encodes."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def encode_alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids to the same text, however their files say it."""
    parts = ("model", "normalizer", "pre_tokenizer")
    ours, theirs = (json.loads(tokenizer.to_str()) for tokenizer in (one, other))
    return all(ours[part] == theirs[part] for part in parts)


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """`text` in parts of about `size` characters that have, together, the very tokens of the whole.

    A book of a gigabyte would otherwise be encoded in one go, on one core and in a hundred times its memory.
    The byte-level pre-tokenizer never joins a single line break to a neighbour that is not white space, so
    a cut right after one changes no token; text without such a place stays whole.
    """
    start = 0
    while len(text) - start > size and (match := _SAFE_CUT.search(text, start + size)):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]


def _all_pieces(documents: Iterable[Document]) -> Iterator[str]:
    left = LEARN_CHARACTERS
    for document in documents:
        for piece in pieces(document.text):
            if left <= 0:
                return
            yield piece
            left -= len(piece)


def _as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True  # not part of the file, so set again after every load
    return tokenizer


def _load(path: Path, vocab_size: int) -> Tokenizer | None:
    try:
        tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
    except Exception:  # the tokenizers library raises nothing narrower; missing and damaged are mended alike
        return None
    if tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        return None
    if not MIN_VOCAB_SIZE <= tokenizer.get_vocab_size() <= vocab_size:
        return None
    return _as_plain_text(tokenizer)
