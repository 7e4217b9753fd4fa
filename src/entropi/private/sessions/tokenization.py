"""What a client does with a tokenizer that the other side chose: which ones it applies, and to what.

The server learns how many tokens a prompt has. Whoever writes the tokenizer decides how that number follows from the
text: a normaliser or a pattern of the server's could spell the prompt out, one session a character. A client therefore
takes tokenizers of two forms whose only freedom is the vocabulary, and others if it knows the file beforehand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from entropi.console import without_controls
from entropi.errors import UserError, is_failure

MAX_PROMPT = 1 << 20  # characters; encoding takes about 200 bytes of memory for each
MAX_TOKEN = 256  # characters of an entry; GPT-4's and Llama's longest have 128
# What tokenizers call the token that ends a text. These end an answer unless the client names others.
ENDS_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")

# Splitting patterns of published byte-level tokenizers: GPT-4 and Llama 3, Qwen 2. GPT-2's is ByteLevel's own.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, _CONTRACTIONS + r"\p{N}" + _REST)
# What the bytes are called that a byte-level vocabulary may lack, as pretrained ones do that were learnt on text: those
# that UTF-8 never uses or only for planes without characters, and control characters. A prompt with one is refused,
# like any that would change.
_BYTES_UTF8_LACKS = frozenset(map(chr, (0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))))
_CONTROLS = frozenset(chr(256 + byte) for byte in range(0x20) if chr(byte) not in "\t\n\r")
_standard_error = threading.Lock()
_SPACE = "\u2581"  # what SentencePiece writes for a space


class _Added(msgspec.Struct):
    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    special: bool = False


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    vocab: dict[str, int]
    merges: list[Any]
    type: str | None = None
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _File(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that is applied to the whole prompt and nothing but the prompt.

    Attributes:
        tokenizer: without truncation, padding and added tokens at the ends; text that spells out a special token is
            plain text.
        longest: characters of its longest entry, where that is known.
        faithful: whether decoding has to give the text back.
    """

    tokenizer: Tokenizer
    longest: int | None
    faithful: bool

    def encode(self, text: str, most: int) -> list[int]:
        """Token ids of a prompt, of which there may be `most`.

        Raises:
            UserError: no tokens, a text that cannot fit, or one that decoding would not give back.
        """
        if self.longest is not None and len(text) > most * self.longest:
            raise UserError(f"the prompt has {len(text)} characters, more than {most} tokens of this model can hold")
        with _one_line("the tokenizer cannot encode this prompt"):
            ids = list(self.tokenizer.encode(text, add_special_tokens=False).ids)
            back = self.tokenizer.decode(ids, skip_special_tokens=False) if self.faithful else text
        if not ids:
            raise UserError("the prompt is empty")
        if back != text:
            raise UserError("the tokenizer would change this prompt: decoding its tokens gives another text")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of an answer."""
        with _one_line("the tokenizer cannot decode the answer"):
            return str(self.tokenizer.decode(ids))

    def special_ids(self) -> set[int]:
        """Ids of the tokens that no text becomes, and that are not shown."""
        return {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}

    def ids_of(self, names: tuple[str, ...] | None) -> list[int]:
        """Ids of tokens by name; of those that end a text, as far as they exist, for None.

        Raises:
            UserError: a name that the tokenizer does not have.
        """
        found = [(name, self.tokenizer.token_to_id(name)) for name in (ENDS_OF_TEXT if names is None else names)]
        if names is not None and (unknown := [name for name, number in found if number is None]):
            raise UserError(f"the tokenizer has no token {unknown[0]!r} to stop at")
        return [number for _, number in found if number is not None]


def check_prompt(prompt: str, what: str = "the prompt") -> None:
    """Raise `UserError` for what no tokenizer is to see: too long a text, or one that is no Unicode text."""
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"{what} has more than {MAX_PROMPT} characters, the most that are possible")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not valid Unicode text") from None


def sha256_of_tokenizer(text: str) -> str:
    """SHA-256, hex, of a tokenizer.json: what `sha256sum` says of the file."""
    return hashlib.sha256(text.encode()).hexdigest()


def own_tokenizer(text: str) -> Encoder:
    """The encoder of a tokenizer.json that this side trusts.

    Raises:
        UserError: "that cannot be read", to follow what the tokenizer is.
    """
    return Encoder(_load(text), None, faithful=False)


def public_ids(tokenizer: str, text: str) -> list[int]:
    """Token ids of a public text of the server's own, in which a special token spelled out is that token.

    Args:
        tokenizer: content of its tokenizer.json.

    Raises:
        UserError: an empty text, or a tokenizer that cannot encode it.
    """
    encoder = _load(tokenizer)
    encoder.encode_special_tokens = False
    with _one_line("the tokenizer cannot encode the prefix"):
        ids = list(encoder.encode(text, add_special_tokens=False).ids)
    if not ids:
        raise UserError("the prefix is empty")
    return ids


def text_ids(tokenizer: str, text: str) -> tuple[list[int], list[list[int]], list[int]]:
    """A text for calibration: what the tokenizer puts in front, the ids of the text's paragraphs, all special tokens.

    Args:
        tokenizer: content of its tokenizer.json.

    Raises:
        UserError: a tokenizer that cannot encode it, or a text without tokens.
    """
    encoder = _load(tokenizer)
    encoder.encode_special_tokens = False
    with _one_line("the tokenizer cannot encode the calibration text"):
        paragraphs = [list(encoder.encode(part, add_special_tokens=False).ids) for part in text.split("\n\n")]
        whole = Tokenizer.from_str(json.dumps(json.loads(tokenizer) | {"truncation": None, "padding": None}))
        begun = whole.encode("a")
        first = begun.special_tokens_mask.index(0) if 0 in begun.special_tokens_mask else 0
    special = [number for number, token in sorted(encoder.get_added_tokens_decoder().items()) if token.special]
    paragraphs = [ids for ids in paragraphs if ids]
    if not paragraphs:
        raise UserError("the calibration text is empty")
    return list(begun.ids[:first]), paragraphs, special


def tokenizer_of_stranger(text: str, vocab_size: int) -> Encoder:
    """The encoder of a tokenizer.json that the other side wrote.

    Whether it is taken does not depend on the prompt, or taking it would tell something of that.

    Raises:
        UserError: it cannot be read, or `objections` has some; the end of a sentence, as in `own_tokenizer`.
    """
    tokenizer = _load(text)
    if found := objections(text, vocab_size):
        raise UserError(
            "that could change the prompt, or let its length tell too much: "
            f"{without_controls(found[0])}; if you know this tokenizer, give its file with --tokenizer or its hash "
            "with --tokenizer-sha256"
        )
    entries = msgspec.json.decode(text.encode(), type=_File)
    longest = max(map(len, [*entries.model.vocab, *(token.content for token in entries.added_tokens)]))
    return Encoder(tokenizer, longest, faithful=True)


def objections(text: str, vocab_size: int) -> list[str]:
    """Why a client would not apply this tokenizer.json without knowing it; empty if it would.

    Taken are byte-level BPE with a splitting pattern that is published, and SentencePiece's BPE with byte fallback and
    no normalisation. With these every text decodes to itself, and its length is a sum over its words (added
    tokens, which may run across marks between words, hold no spaces).
    """
    try:
        file = msgspec.json.decode(text.encode(), type=_File)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return ["it is no BPE tokenizer of a known form"]
    model, found = file.model, []
    if model.type not in (None, "BPE") or model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        found.append("its model is not plain BPE")
    sentencepiece = model.byte_fallback
    if sentencepiece:
        alphabet = {f"<0x{byte:02X}>" for byte in range(256)}
        forms = _sentencepiece_forms(file)
    else:
        alphabet = set(ByteLevel.alphabet()) - _BYTES_UTF8_LACKS - _CONTROLS
        forms = _byte_level_forms(file)
    found += forms
    if missing := alphabet - model.vocab.keys():
        found.append(f"{len(missing)} bytes of text have no token")
    ids = dict(model.vocab)
    for token in file.added_tokens:
        if ids.setdefault(token.content, token.id) != token.id:
            found.append(f"two ids of {token.content!r}")
        # Where special tokens are plain text, only the others are looked for; in ASCII they decode to themselves.
        if not token.special and (sentencepiece or not token.content.isascii()):
            found.append(f"{token.content!r} is added but not special")
        if not token.special and any(character.isspace() for character in token.content):
            found.append(f"{token.content!r} is one token of several words")
        if not token.special and (token.single_word or token.lstrip or token.rstrip):
            found.append(f"{token.content!r} takes in what stands around it")
    if len(set(ids.values())) < len(ids) or not all(0 <= number < vocab_size for number in ids.values()):
        found.append("its ids are not one for every entry, within the model's vocabulary")
    if any(not 0 < len(entry) <= MAX_TOKEN for entry in ids):
        found.append(f"an entry is empty or longer than {MAX_TOKEN} characters")
    return found


def _byte_level_forms(file: _File) -> list[str]:
    found = [] if file.normalizer is None else ["it has a normaliser"]
    if (file.decoder or {}).get("type") != "ByteLevel":
        found.append("its decoder is not the byte-level one")
    steps = _steps(file.pre_tokenizer, "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space") is not False:
        return [*found, "it does not end in a byte-level step without a prefix"]
    for step in steps[:-1]:
        pattern = step.get("pattern")
        known = isinstance(pattern, dict) and pattern.get("Regex") in _PATTERNS
        whole = step.get("behavior") == "Isolated" and step.get("invert") is False
        if not (step.get("type") == "Digits" or (step.get("type") == "Split" and known and whole)):
            found.append("it splits text by a pattern that is not a published one")
    if steps[-1].get("use_regex") is not True and "Split" not in kinds:
        found.append("it does not split text into words")
    return found


def _sentencepiece_forms(file: _File) -> list[str]:
    prepend = {"type": "Prepend", "prepend": _SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = [{**replace, "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps = _steps(file.normalizer, "normalizers")
    before = file.pre_tokenizer
    metaspace = before is not None and before.get("type") == "Metaspace" and before.get("replacement") == _SPACE
    found = []
    if not ((before is None and steps in ([prepend, replace], [replace])) or (metaspace and not steps)):
        found.append("its normaliser or its splitting is not plain SentencePiece's")
    after = _steps(file.decoder, "decoders")
    if after not in (back, [*back, strip]):
        found.append("its decoder is not plain SentencePiece's")
    return found


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a part of the file, which may be a sequence."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    steps = part.get(inner)
    return steps if isinstance(steps, list) and all(isinstance(step, dict) for step in steps) else [{}]


def _load(text: str) -> Tokenizer:
    """A tokenizer that changes no prompt behind its owner's back: no truncation, padding or additions at the ends."""
    with _one_line("that cannot be read"):
        plain = json.loads(text)
        plain |= {"truncation": None, "padding": None, "post_processor": None}
        tokenizer = Tokenizer.from_str(json.dumps(plain))
        tokenizer.encode_special_tokens = True
    return tokenizer


@contextlib.contextmanager
def _one_line(message: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises, panics of Rust included, into a `UserError`.

    A panic also writes its trace to the process's standard error, which is closed to it meanwhile.
    """
    with _silent():
        try:
            yield
        except UserError:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            raise UserError(message) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing reaches the standard error of this process."""
    with _standard_error:  # two at once would restore each other's
        kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nothing)
