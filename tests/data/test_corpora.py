"""Corpora that are no folders of text: data sets, tokenised books, prepared shards; offline, on files of their kind."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers

from entropi.data import books, hub, shards
from entropi.data import prepare as preparation
from entropi.data.corpus import Corpus, Document
from entropi.data.prepare import heldout_blocks, load_or_pack, prepare
from entropi.data.shards import Blocks, Stream
from entropi.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from entropi.errors import UserError

datasets = pytest.importorskip("datasets")
WORDS = ("def", "return", "self", "value", "entropy", "attention", "for", "in", "if", "None", "[]", "()", "=")


def source_text(seed: int, lines: int) -> str:
    rng = random.Random(seed)
    return "".join("    " * rng.randrange(3) + " ".join(rng.choices(WORDS, k=5)) + "\n" for _ in range(lines))


TEXTS = [source_text(n, n % 7 * 12 + 1) for n in range(40)]  # some shorter than a block
HELD = [source_text(100 + n, 30) for n in range(6)]

SYLLABLES = ("ba", "ke", "lo", "mi", "nu", "ra", "se", "to", "vi", "zu", "ing", "er", "an")
PROSE = ["".join(random.Random(n).choices(SYLLABLES, k=1 + n % 4)) for n in range(200)]


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """Expect a `UserError` of one line with all of `words` in it."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    return train_tokenizer(Corpus("c", [Document(str(n), t) for n, t in enumerate(TEXTS)], [], "h"), 400)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENTROPI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "cache"


def codeparrot_at(folder: Path, tokenizer: Tokenizer, kind: str = "parquet") -> None:
    """The three repositories of the course, as `datasets` and `huggingface_hub` find them in a working directory."""
    for name, split, texts in (("train", "train", TEXTS), ("valid", "validation", HELD)):
        rows = datasets.Dataset.from_dict(
            {"repo_name": [f"r{n}" for n in range(len(texts))], "content": texts, "license": ["mit"] * len(texts)}
        )
        place = folder / f"huggingface-course/codeparrot-ds-{name}"
        place.mkdir(parents=True)
        if kind == "parquet":
            half = len(rows) // 2  # in two files, as large data sets are
            rows.select(range(half)).to_parquet(place / f"{split}-00000-of-00002.parquet")
            rows.select(range(half, len(rows))).to_parquet(place / f"{split}-00001-of-00002.parquet")
        else:
            rows.to_json(place / f"{split}.json.gz", compression="gzip")
    (folder / "huggingface-course/code-search-net-tokenizer").mkdir()
    tokenizer.save(str(folder / "huggingface-course/code-search-net-tokenizer/tokenizer.json"))


def as_the_course_does(texts: list[str], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Chapter 7.6: truncate with overflow, keep the chunks of exactly `length`. By transformers, not by our code."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()))
    out = theirs(texts, truncation=True, max_length=length, return_overflowing_tokens=True, return_length=True)
    return [ids for ids, n in zip(out["input_ids"], out["length"]) if n == length]


# --- CodeParrot


@pytest.mark.parametrize("kind", ["parquet", "json"])
@pytest.mark.parametrize("length", [16, 37])
def test_codeparrot_is_that_of_the_course(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt: Tokenizer, kind: str, length: int
) -> None:
    codeparrot_at(tmp_path, learnt, kind)
    monkeypatch.chdir(tmp_path)
    name = "huggingface-course/code-search-net-tokenizer"
    prepared = prepare("codeparrot", 0, length, tokenizer=name, per_document=True)
    assert prepared.packed.train[:].tolist() == as_the_course_does(TEXTS, learnt, length)
    assert prepared.packed.heldout[:].tolist() == as_the_course_does(HELD, learnt, length)
    assert 0 < len(prepared.packed.train) < prepared.packed.train_tokens // length
    assert prepared.tokenizer.to_str() == learnt.to_str()
    assert (prepared.corpus.train_documents, prepared.corpus.heldout_documents) == (40, 6)
    assert prepared.corpus.train_characters == sum(map(len, TEXTS))
    np.testing.assert_array_equal(
        heldout_blocks("codeparrot", learnt, length, 0), prepare("codeparrot", 0, length, tokenizer=name).packed.heldout
    )


def test_a_changed_data_set_is_another_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt: Tokenizer):
    codeparrot_at(tmp_path, learnt)
    monkeypatch.chdir(tmp_path)
    name = "huggingface-course/code-search-net-tokenizer"
    first = prepare("codeparrot", 0, 16, tokenizer=name)
    again = prepare("codeparrot", 0, 16, tokenizer=name)
    assert first.corpus == again.corpus
    rows = datasets.Dataset.from_dict({"content": [*HELD[:-1], HELD[-1] + "x"]})
    rows.to_parquet(tmp_path / "huggingface-course/codeparrot-ds-valid/validation-00001-of-00002.parquet")
    changed = prepare("codeparrot", 0, 16, tokenizer=name)
    assert changed.corpus.content_hash != first.corpus.content_hash
    assert changed.corpus.heldout_documents == 9


def test_a_tokenizer_is_learnt_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt: Tokenizer):
    codeparrot_at(tmp_path, learnt)
    monkeypatch.chdir(tmp_path)
    prepared = prepare("codeparrot", 400, 16)
    assert prepared.tokenizer.to_str() == learnt.to_str()  # from the same texts


def test_pg19_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "emozilla/pg19/data"
    place.mkdir(parents=True)
    for split, texts in (("train", TEXTS), ("validation", HELD), ("test", HELD[:1])):
        columns = {"short_book_title": ["t"] * len(texts), "publication_date": [1900] * len(texts), "text": texts}
        datasets.Dataset.from_dict(columns).to_parquet(place / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    prepared = prepare("pg19", 300, 32)
    assert (prepared.corpus.train_documents, prepared.corpus.heldout_documents) == (40, 6)


# --- Folders of Parquet and Arrow


@pytest.mark.parametrize("kind", ["parquet", "saved to disk"])
def test_folder_of_a_data_set(tmp_path: Path, learnt: Tokenizer, kind: str) -> None:
    folder = tmp_path / "mine"
    parts = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in (("train", TEXTS), ("test", HELD))}
    if kind == "parquet":
        (folder / "data").mkdir(parents=True)
        for name, rows in parts.items():
            rows.to_parquet(folder / f"data/{name}-0.parquet")
    else:
        datasets.DatasetDict(parts).save_to_disk(folder)
    prepared = prepare(str(folder), 400, 16)
    documents = [Document(str(n), text) for n, text in enumerate(TEXTS)]
    np.testing.assert_array_equal(prepared.packed.train, preparation.pack(documents, prepared.tokenizer, 16))
    assert prepared.corpus.name == "mine"


def test_data_sets_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = tmp_path / "only"
    only.mkdir()
    rows = datasets.Dataset.from_dict({"story": TEXTS})
    rows.to_parquet(only / "train.parquet")
    with refused("only", "validation or test"):
        prepare(str(only), 300, 16)
    rows.to_parquet(only / "valid.parquet")
    with refused("no column of text content or text", "story"):
        prepare(str(only), 300, 16)
    (only / "train.parquet").write_bytes(b"PAR1 no more than that")
    with refused("cannot read the data set only"):
        prepare(str(only), 300, 16)
    (only / "test.arrow").write_bytes(b"")
    with refused("mixes .arrow and .parquet"):
        prepare(str(only), 300, 16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused("cannot read the data set huggingface-course/codeparrot-ds-train"):
        prepare("codeparrot", 300, 16)


def test_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("entropi[corpora]"):
        prepare("pg19", 300, 16)


# --- Tokenizers of others


def test_tokenizers_that_cannot_be_used(tmp_path: Path, learnt: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with refused("cannot read the tokenizer"):
        load_tokenizer(str(tmp_path))
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(path))
    with refused("no token that ends a text", "</s>"):
        load_tokenizer(str(path))
    with refused("there is no tokenizer", "nowhere.json"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    learnt.save(str(path))
    assert load_tokenizer(str(path)).encode(END_OF_TEXT).ids != [0]


def test_text_of_other_kinds_of_tokenizers_is_not_cut(learnt: Tokenizer) -> None:
    """A normaliser that prepends a space would prepend one to every piece."""
    other = Tokenizer.from_str(learnt.to_str())
    assert preparation._may_be_cut(other)
    other.normalizer = normalizers.Prepend("x")
    assert not preparation._may_be_cut(other)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("bytes_known", [True, False])
def test_sentencepiece_models_give_sentencepiece_s_ids(tmp_path: Path, kind: str, bytes_known: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    prose = [" ".join(random.Random(n).choices(PROSE, k=30)) for n in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=400,
        model_type=kind,
        byte_fallback=bytes_known,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ours = load_tokenizer(str(tmp_path / "spm.model"))
    assert ours.get_vocab_size() == theirs.get_piece_size()
    assert preparation.end_of_text_id(ours) == theirs.eos_id() == 2
    texts = [*prose[:50], "  two  spaces ", "Unknown: ξ and 日本 words", "", "x", "ﬁne ligatures, ½"]
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)).replace("<unk>", "⁇") == theirs.decode(theirs.encode(text)) or (
            not bytes_known and theirs.unk_id() in theirs.encode(text)
        ), text


# --- Books


@pytest.fixture
def languini(tmp_path: Path) -> Path:
    """Twelve books as Languini's script leaves them: files/NAME.npy, and its lists beside the folder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "books" / "books_16384"
    (folder / "files").mkdir(parents=True)
    names = [f"book {n}" for n in range(12)]
    for number, name in enumerate(names):
        np.save(folder / "files" / f"{name}.npy", rng.integers(0, 16_384, 40 + 31 * number).astype(np.uint16))
    np.save(tmp_path / "books/file_list_train.npy", np.array([(f"a/{n}.epub.txt", "9") for n in names[:9]]))
    for name in names:  # their names keep one ending of two
        (folder / "files" / f"{name}.npy").rename(folder / "files" / f"{name}.epub.npy")
    np.save(tmp_path / "books/file_list_test_iid.npy", np.array([(f"b/{n}.epub.txt", "9") for n in names[9:]]))
    return folder


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{n}": n for n in range(3, 16_384)}
    path = tmp_path / "spm.json"
    Tokenizer(models.BPE(tokens, [])).save(str(path))
    return str(path)


def test_languini_books_are_cut_where_they_lie(languini: Path, vocabulary: str, cache: Path) -> None:
    prepared = prepare(str(languini), 0, 64, tokenizer=vocabulary)
    kept = [np.load(languini / "files" / f"book {n}.epub.npy") for n in range(12)]
    expected = [book[i : i + 64].tolist() for book in kept[:9] for i in range(0, len(book) - 63, 64)]
    assert prepared.packed.train[:].tolist() == expected
    assert prepared.packed.train[0].dtype == np.int32
    assert prepared.packed.train_tokens == sum(len(book) for book in kept[:9])
    assert prepared.packed.heldout[0].tolist() == kept[9][:64].tolist()
    assert (prepared.corpus.train_documents, prepared.corpus.heldout_documents) == (9, 3)
    assert [path.name for path in cache.iterdir()] == [next(cache.glob("books-*.json")).name]  # no copy of the tokens
    again = prepare(str(languini), 0, 64, tokenizer=vocabulary)
    assert again.corpus == prepared.corpus
    np.testing.assert_array_equal(
        heldout_blocks(str(languini), load_tokenizer(vocabulary), 64, 2), prepared.packed.heldout
    )


def test_a_changed_book_is_seen(languini: Path, vocabulary: str) -> None:
    before = prepare(str(languini), 0, 64, tokenizer=vocabulary).corpus.content_hash
    path = languini / "files" / "book 3.epub.npy"
    ids = np.load(path)
    ids[5] += 1
    np.save(path, ids)
    assert prepare(str(languini), 0, 64, tokenizer=vocabulary).corpus.content_hash != before


def test_books_are_read_once(languini: Path, vocabulary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(str(languini), 0, 64, tokenizer=vocabulary)
    monkeypatch.setattr(books, "file_digest", lambda path: 1 / 0)
    prepare(str(languini), 0, 64, tokenizer=vocabulary)


@pytest.mark.parametrize("layout", ["two folders", "no parts"])
def test_books_without_lists(tmp_path: Path, vocabulary: str, layout: str) -> None:
    folder = tmp_path / "plain"
    for number in range(30):
        place = folder / (("test" if number < 3 else "train") if layout == "two folders" else "")
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{number:02}.npy", np.full(70, number, np.uint16))
    prepared = prepare(str(folder), 0, 64, tokenizer=vocabulary)
    train, held = ({int(block[0]) for block in part} for part in (prepared.packed.train, prepared.packed.heldout))
    assert train | held == set(range(30))
    assert not train & held
    assert held == {0, 1, 2} if layout == "two folders" else 1 <= len(held) < 8


def test_books_that_cannot_be_used(languini: Path, vocabulary: str, tmp_path: Path) -> None:
    with refused("name their tokenizer"):
        prepare(str(languini), 0, 64)
    with refused("one block needs 5000"):
        prepare(str(languini), 0, 5000, tokenizer=vocabulary)
    small = tmp_path / "small.json"
    Tokenizer(models.BPE({"</s>": 0, "a": 1}, [])).save(str(small))
    with refused("made with another one", "only 2 entries"):
        prepare(str(languini), 0, 64, tokenizer=str(small))
    path = languini / "files" / "book 3.epub.npy"
    for content, words in ((np.zeros(0, np.uint16), "is empty"), (np.full(9, -1, np.int32), "negative ids")):
        np.save(path, content)
        with refused("book 3", words):
            prepare(str(languini), 0, 64, tokenizer=vocabulary)
    np.save(path, np.zeros(9, np.float32))
    with refused("book 3", "no token ids"):
        prepare(str(languini), 0, 64, tokenizer=vocabulary)
    path.unlink()
    with refused("file_list_train.npy names", "book 3"):
        prepare(str(languini), 0, 64, tokenizer=vocabulary)


# --- Shards


@pytest.fixture
def in_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 300)


def corpus_of(texts: list[str]) -> Corpus:
    parts = [[Document(str(n), text) for n, text in enumerate(part)] for part in (texts, HELD)]
    return Corpus("c", parts[0], parts[1], hashlib.sha256("".join(texts).encode()).hexdigest())


@pytest.mark.usefixtures("in_small_shards")
def test_shards_are_cut_between_documents(learnt: Tokenizer, tmp_path: Path) -> None:
    packed = load_or_pack(corpus_of(TEXTS), learnt, 16, tmp_path, per_document=True)
    assert len(packed.train.streams) > 5
    assert packed.train[:].tolist() == as_the_course_does(TEXTS, learnt, 16)
    stream = load_or_pack(corpus_of(TEXTS), learnt, 16, tmp_path)
    assert len(stream.train) == sum(s.tokens // 16 for s in stream.train.streams)
    ids = np.concatenate([shards.open_stream(s.path) for s in stream.train.streams])
    np.testing.assert_array_equal(ids, preparation.encode(corpus_of(TEXTS).train, learnt))
    assert sum(len(s.ends) for s in stream.train.streams) == len(TEXTS)


@pytest.mark.parametrize("vocabulary_size", [65_536, 65_537])
def test_ids_have_room(vocabulary_size: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0} | {f"t{n}": n for n in range(1, vocabulary_size)}, "t1"))
    last = f"t{vocabulary_size - 1}"
    packed = load_or_pack(Corpus("c", [Document("a", last)], [Document("b", last)], "h"), tokenizer, 2, tmp_path)
    assert packed.train[:].tolist() == [[vocabulary_size - 1, 0]]
    assert shards.open_stream(packed.train.streams[0].path).dtype == (
        np.uint16 if vocabulary_size <= 65_536 else np.int32
    )


KILLED = """
import os, signal, sys
from entropi.data import shards
from entropi.data import prepare as preparation
from entropi.data.prepare import prepare
shards.SHARD_TOKENS, preparation.BATCH_CHARACTERS = 500, 300
written, kept = [], shards.np.save

def save(*arguments, **options):
    written.append(1)
    if len(written) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    kept(*arguments, **options)

shards.np.save = save
prepare(sys.argv[1], 0, 16, tokenizer=sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_preparation_goes_on(tmp_path: Path, cache: Path, learnt: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Three kills while shards are written; what is there in the end is byte for byte what one go leaves."""
    folder, path = tmp_path / "rows", tmp_path / "tokenizer.json"
    folder.mkdir()
    for name, texts in (("train", TEXTS), ("test", HELD)):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / f"{name}.parquet")
    learnt.save(str(path))
    for count in (3, 8, 7):
        words = [sys.executable, "-c", KILLED, str(folder), str(count), str(path)]
        done = subprocess.run(words, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (place,) = cache.glob("tokens-*")
    found = json.loads((place / "manifest.json").read_text())["parts"]["train"]
    assert len(found["shards"]) == 1 + 3 + 3  # a shard is two files
    assert not found["complete"]
    stamps = {p: p.stat().st_mtime_ns for p in place.glob("train-0000[0-6].npy")}
    monkeypatch.setattr(shards, "SHARD_TOKENS", 500)
    resumed = prepare(str(folder), 0, 16, tokenizer=str(path))
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    whole = prepare(str(folder), 0, 16, tmp_path / "other", tokenizer=str(path))
    np.testing.assert_array_equal(resumed.packed.train, whole.packed.train)
    (other,) = (tmp_path / "other").glob("tokens-*")
    contents = [{p.name: p.read_bytes() for p in f.glob("*") if "partial" not in p.name} for f in (place, other)]
    assert contents[0] == contents[1]


@pytest.mark.usefixtures("in_small_shards")
def test_only_damaged_shards_are_written_anew(tmp_path: Path, learnt: Tokenizer) -> None:
    before = np.array(load_or_pack(corpus_of(TEXTS), learnt, 16, tmp_path).train)
    files = sorted(tmp_path.glob("tokens-*/train-?????.npy"))
    content = bytearray(files[3].read_bytes())
    content[-3] ^= 1
    files[3].write_bytes(content)
    stamps = [path.stat().st_mtime_ns for path in files]
    np.testing.assert_array_equal(load_or_pack(corpus_of(TEXTS), learnt, 16, tmp_path).train, before)
    assert [p.stat().st_mtime_ns == stamp for p, stamp in zip(files, stamps)][:4] == [True, True, True, False]


def test_prepared_shards_are_a_corpus(tmp_path: Path, cache: Path, learnt: Tokenizer) -> None:
    """They can be taken to another machine, without the text, and are refused if they or the tokenizer changed."""
    path = tmp_path / "t.json"
    learnt.save(str(path))
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(TEXTS):
        (texts / f"{number}.py").write_text(text)
    first = prepare(str(texts), 0, 16, tokenizer=str(path))
    moved = next(cache.glob("tokens-*")).rename(tmp_path / "moved")
    there = prepare(str(moved), 0, 16)
    assert there.corpus.content_hash == first.corpus.content_hash
    assert there.corpus.name == "texts"
    blocks = np.array(there.packed.heldout)
    np.testing.assert_array_equal(prepare(str(moved), 0, 16, tokenizer=str(path)).packed.heldout, blocks)
    np.testing.assert_array_equal(heldout_blocks(str(moved), learnt, 16, 0), blocks)

    other = train_tokenizer(corpus_of(TEXTS), 300)
    other.save(str(path))
    with refused("made with another tokenizer than"):
        prepare(str(moved), 0, 16, tokenizer=str(path))
    with refused("made with another tokenizer than this model's"):
        heldout_blocks(str(moved), other, 16, 0)
    other.save(str(moved / "tokenizer.json"))
    with refused("is not the one its tokens were made with"):
        prepare(str(moved), 0, 16)
    learnt.save(str(moved / "tokenizer.json"))
    prepare(str(moved), 0, 16)
    shard = moved / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\1")
    with refused("train-00000.npy is not as it was written"):
        prepare(str(moved), 0, 16)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["parts"]["train"]["complete"] = False
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with refused("train part", "not complete"):
        prepare(str(moved), 0, 16)
    (moved / "manifest.json").write_text("{")
    with refused("manifest.json cannot be read"):
        prepare(str(moved), 0, 16)


def test_blocks_are_a_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    streams, expected = [], []
    for number in range(5):
        ids = np.arange(number * 100, number * 100 + 7 * number, dtype=np.uint16)  # the first is empty
        np.save(tmp_path / f"{number}.npy", ids)
        streams.append(Stream(tmp_path / f"{number}.npy", len(ids)))
        expected += [ids[i : i + 4].tolist() for i in range(0, len(ids) - 3, 4)]
    blocks = Blocks(streams, 4)
    assert [block.tolist() for block in blocks] == expected == blocks[:].tolist() == np.asarray(blocks).tolist()
    assert blocks[-1].tolist() == expected[-1]
    assert blocks[2:9:3].tolist() == expected[2:9:3]
    assert (blocks.shape, blocks.size, len(blocks)) == ((len(expected), 4), 4 * len(expected), len(expected))
    assert blocks[3:3].shape == (0, 4)
    for index in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            blocks[index]
    assert pickle.loads(pickle.dumps(blocks))[:].tolist() == expected
    assert blocks._open.cache_info().currsize == 2
    assert len(Blocks([], 4)) == 0


def test_rows_begin_anywhere(tmp_path: Path) -> None:
    for name, texts in (("train", TEXTS), ("test", HELD)):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"{name}.parquet")
    dataset = hub.find_dataset(str(tmp_path))
    assert dataset is not None
    train = hub.open_dataset(dataset).train
    assert [d.text for d in train] == TEXTS
    assert isinstance(train, hub.Rows)
    assert [(d.path, d.text) for d in train.after(38)] == [("38", TEXTS[38]), ("39", TEXTS[39])]
    assert Document("3", TEXTS[3]) in train
