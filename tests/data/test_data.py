"""Corpora, tokenizer and packing: the split, the round trip, the exact blocks, the cache, the refusals."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models

from entropi import cache
from entropi.data import prepare as preparation
from entropi.data import shards, split, tokenizer
from entropi.data.corpus import Corpus, Document, load_corpus, load_texts
from entropi.data.prepare import encode, load_or_pack, pack, prepare
from entropi.data.tokenizer import END_OF_TEXT, load_or_train_tokenizer, pieces, train_tokenizer
from entropi.errors import UserError

WORDS = ("def", "return", "self", "value", "entropy", "attention", "for", "in", "if", "None", "[]", "()", "=")
HELDOUT = {"a/file1.py", "a/file59.py", "b/file42.py"}  # of the folder below: a change breaks old runs


def _source_text(seed: int, lines: int = 40) -> str:
    rng = random.Random(seed)
    return "".join(
        "    " * rng.randrange(3) + " ".join(rng.choices(WORDS, k=rng.randint(1, 8))) + "\n" * rng.randint(1, 3)
        for _ in range(lines)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty small files in two folders."""
    root = tmp_path / "texts"
    for number in range(60):
        path = root / ("a" if number % 2 else "b") / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_source_text(number))
    return root


@pytest.fixture(scope="module")
def small() -> Corpus:
    documents = [Document(f"{n}.py", _source_text(n)) for n in range(20)]
    return Corpus("small", documents[:18], documents[18:], content_hash="of-small")


@pytest.fixture(scope="module")
def small_tokenizer(small: Corpus) -> Tokenizer:
    return train_tokenizer(small, 400)


@contextmanager
def _refused(*words: str) -> Iterator[None]:
    """Expect a `UserError` of one line with all of `words` in it."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    for word in words:
        assert word in message


def _paths(documents: list[Document]) -> set[str]:
    return {document.path for document in documents}


# --- corpora


def test_room_needs_no_torch() -> None:
    code = "import entropi.data.prepare, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stdlib_is_the_library_without_its_tests() -> None:
    loaded = load_corpus("stdlib")
    documents = loaded.train + loaded.heldout
    paths = _paths(documents)
    assert {"ast.py", "json/decoder.py", "asyncio/tasks.py", "unittest/mock.py"} <= paths
    assert sum(len(document.text) for document in documents) > 5_000_000
    folders = {name for path in paths for name in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert all(path.endswith(".py") for path in paths)
    assert not any("_sysconfigdata" in path for path in paths)
    assert loaded.skipped == 0
    share = len(loaded.heldout) / len(documents)
    assert 0.02 < share < 0.1


def test_split_is_by_file_and_complete(folder: Path) -> None:
    loaded = load_corpus(str(folder))
    train, heldout = _paths(loaded.train), _paths(loaded.heldout)
    assert not train & heldout
    assert train | heldout == {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")}
    assert heldout == HELDOUT
    assert [d.path for d in loaded.train] == sorted(train)
    for document in loaded.train + loaded.heldout:
        assert document.text == (folder / document.path).read_text()
    assert loaded.name == "texts"


def test_split_and_hash_are_stable(folder: Path, tmp_path: Path) -> None:
    first = load_corpus(str(folder))
    assert load_corpus(str(folder)) == first
    moved = folder.rename(tmp_path / "elsewhere")
    again = load_corpus(str(moved))
    assert (again.train, again.heldout, again.content_hash) == (first.train, first.heldout, first.content_hash)

    (moved / "more.py").write_text("another = 1\n")
    grown = load_corpus(str(moved))
    assert _paths(first.heldout) <= _paths(grown.heldout)
    assert _paths(first.train) <= _paths(grown.train)
    assert grown.content_hash != first.content_hash


def test_hash_sees_texts_and_paths(tmp_path: Path) -> None:
    def content_hash(files: dict[str, str]) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        root.mkdir()
        for name, text in files.items():
            (root / name).write_text(text)
        return load_corpus(str(root)).content_hash

    files = [{"a": "xy", "bz": "q"}, {"a": "x", "bz": "q"}, {"a": "xy", "c": "q"}, {"a": "xyb", "z": "q"}]
    assert len({content_hash(each) for each in files}) == len(files)
    assert content_hash(files[0]) == content_hash(files[0])


def test_hash_sees_the_split(folder: Path) -> None:
    documents = load_texts(str(folder))
    first = split.hash_of_parts(*split.split(documents))
    assert first == load_corpus(str(folder)).content_hash
    assert split.hash_of_parts(documents[1:], documents[:1]) != first


def share(train: list[Document], heldout: list[Document]) -> float:
    """Of all characters, those held out."""
    held = sum(len(document.text) for document in heldout)
    return held / (held + sum(len(document.text) for document in train))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11, 12, 20, 40, 100, 300])
@pytest.mark.parametrize("sizes", ["alike", "one large", "few large", "mixed"])
def test_about_a_twentieth_is_held_out(count: int, sizes: str) -> None:
    lines = {
        "alike": [40] * count,
        "one large": [4000, *[40] * (count - 1)],
        "few large": [1000 if n % 10 == 0 else 10 for n in range(count)],
        "mixed": [20 + n * 37 % 200 for n in range(count)],
    }[sizes]
    documents = [Document(f"{n}.txt", _source_text(n, each)) for n, each in enumerate(lines)]
    train, heldout = split.split(documents)
    assert 0.025 <= share(train, heldout) <= 0.1
    together = {document.path: "" for document in documents}
    for document in [*train, *heldout]:
        together[document.path] += document.text
    assert together == {document.path: document.text for document in documents}
    assert _paths(train) <= {d.path for d in documents}


def test_eight_files_hold_out_the_end_of_each() -> None:
    """The rule before held out 12 to 34 % of so few, by what they were called."""
    documents = [Document(f"{n}.txt", _source_text(n)) for n in range(8)]
    train, heldout = split.split(documents)
    assert _paths(train) == _paths(heldout) == _paths(documents)
    assert all(document.text.endswith("\n") for document in train)
    assert 0.05 <= share(train, heldout) < 0.1
    assert share(*split.split_by_name(documents)) > 0.1


def test_whole_files_come_first(folder: Path) -> None:
    documents = load_texts(str(folder))
    assert split.split(documents) == split.split_by_name(documents)
    few = documents[:15]
    train, heldout = split.split(few)
    assert not _paths(train) & _paths(heldout)


def test_the_split_of_older_versions_is_found_by_its_hash(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(_source_text(number))
    train, heldout = split.split_by_name(load_texts(str(tmp_path)))
    earlier = load_corpus(str(tmp_path), split.hash_of_parts(train, heldout))
    assert (earlier.train, earlier.heldout) == (train, heldout)
    now = load_corpus(str(tmp_path))
    assert load_corpus(str(tmp_path), now.content_hash) == load_corpus(str(tmp_path), "of another corpus") == now
    assert now.heldout != earlier.heldout


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("position", [0.0, 0.01, 0.99])
def test_neither_part_stays_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, position: float) -> None:
    monkeypatch.setattr(split, "position", lambda path: position)
    for number in range(count):
        (tmp_path / f"{number}.txt").write_text(f"text number {number}\n")
    for loaded in (load_corpus(str(tmp_path)), Corpus("", *split.split_by_name(load_texts(str(tmp_path))), "")):
        assert loaded.train
        assert loaded.heldout


@pytest.mark.parametrize("in_folder", [False, True])
def test_single_text_is_split_at_a_line(tmp_path: Path, in_folder: bool) -> None:
    path = tmp_path / "book.txt"
    text = "".join(f"line {number} of the book\n" for number in range(1000))
    path.write_text(text)
    loaded = load_corpus(str(tmp_path if in_folder else path))
    (train,), (heldout,) = loaded.train, loaded.heldout
    assert train.text + heldout.text == text
    assert train.text.endswith("\n")
    assert 0.05 <= len(heldout.text) / len(text) < 0.06


@pytest.mark.parametrize("text", ["one long line " * 100, "title\n" + "one long line " * 100])
def test_single_text_without_lines_is_split_too(tmp_path: Path, text: str) -> None:
    path = tmp_path / "line.txt"
    path.write_text(text)
    loaded = load_corpus(str(path))
    assert loaded.train[0].text + loaded.heldout[0].text == text
    assert 0.04 < len(loaded.heldout[0].text) / len(text) < 0.06


def test_folder_skips_what_is_not_its_text(tmp_path: Path) -> None:
    def put(name: str, content: bytes = b"some text\n") -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + name.encode() if content else b"")

    for name in ("a.txt", "b/c.txt", "environment/readme.md"):
        put(name)
    for name in (".git/config", ".hidden", "__pycache__/a.txt", "venv/lib/x.py", "node_modules/x.js"):
        put(name)
    (tmp_path / "venv" / "pyvenv.cfg").write_text("home = /usr\n")
    put("zero.bin", b"text\0text")
    put("latin1.txt", "é".encode("latin-1"))
    put("empty.txt", b"")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "copy.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")

    loaded = load_corpus(str(tmp_path))
    assert _paths(loaded.train + loaded.heldout) == {"a.txt", "b/c.txt", "environment/readme.md"}
    assert loaded.skipped == 4  # two of them binary, two links to nothing
    assert loaded.duplicates == 1


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bom.txt"
    path.write_bytes("\ufeffhello world\n".encode())
    assert load_corpus(str(path)).train[0].text.startswith("hello")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty", "give")),
        (b" \n\t\n", ("empty", "give")),
        (b"text\0text", ("not UTF-8 text", "convert")),
        ("naïve".encode("latin-1"), ("not UTF-8 text", "convert")),
        ("text".encode("utf-16"), ("not UTF-8 text", "convert")),
    ],
)
def test_unusable_file_is_refused(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "given.txt"
    path.write_bytes(content)
    with _refused("given.txt", *words):
        load_corpus(str(path))


@pytest.mark.parametrize("source", ["", "no/such/path", "~nobody-of-that-name/x", "two\nlines", "zero\0byte"])
def test_missing_source_is_refused(source: str) -> None:
    with _refused("give a text file"):
        load_corpus(source)


def test_forbidden_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def exists(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", exists)
    with _refused("cannot open", "closed/book.txt", "Permission denied"):
        load_corpus("closed/book.txt")


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    with _refused("no files with text", tmp_path.name):
        load_corpus(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe")
    with _refused("2 files, none of them text"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize("in_folder", [False, True])
def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_folder: bool) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("text\n")
    (tmp_path / "other.txt").write_text("other\n")
    original = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self.name == "secret.txt":  # a superuser can read what chmod forbids
            raise PermissionError(13, "Permission denied", str(self))
        return original(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with _refused("cannot read", "secret.txt", "Permission denied", "make it readable"):
        load_corpus(str(tmp_path if in_folder else path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="a superuser can read everything")
def test_unreadable_subfolder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    try:
        with _refused("cannot read", "closed"):
            load_corpus(str(tmp_path))
    finally:
        closed.chmod(0o700)


@pytest.fixture
def deadline() -> Iterator[None]:
    """Five seconds: reading a pipe that nobody writes would hang for ever."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.usefixtures("deadline")
def test_pipes_and_devices_are_never_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with _refused("pipe", "give a text file"):
        load_corpus(str(tmp_path / "pipe"))
    with _refused("/dev/zero", "device"):
        load_corpus("/dev/zero")
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    assert load_corpus(str(tmp_path)).skipped == 2


# --- tokenizer


def _random_text(rng: random.Random) -> str:
    code_points = (rng.randrange(0x110000) if rng.random() < 0.3 else rng.randrange(0x250) for _ in range(200))
    return "".join(chr(c) for c in code_points if not 0xD800 <= c < 0xE000)


def test_round_trip_of_any_text(small_tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    texts = [_random_text(rng) for _ in range(200)]
    texts += [chr(c) for c in range(0x180)]
    texts += ["", " ", "\r\n\t \n\n  x", f"a{END_OF_TEXT}b", "\ufeffx", "日本語 🙂‍↔️ e\u0301", "def f(x):\n\treturn x"]
    for text in texts:
        ids = small_tokenizer.encode(text).ids
        assert small_tokenizer.decode(ids, skip_special_tokens=False) == text
        assert 0 not in ids


def test_vocabulary(small: Corpus, small_tokenizer: Tokenizer) -> None:
    assert small_tokenizer.token_to_id(END_OF_TEXT) == 0
    assert 257 < small_tokenizer.get_vocab_size() <= 400
    assert sorted(small_tokenizer.get_vocab().values()) == list(range(small_tokenizer.get_vocab_size()))
    assert train_tokenizer(small, 400).to_str() == small_tokenizer.to_str()
    bytes_only = train_tokenizer(small, 257)
    assert bytes_only.get_vocab_size() == 257
    assert len(bytes_only.encode("né\n").ids) == 4


def test_small_corpus_gives_a_smaller_vocabulary(small: Corpus) -> None:
    assert 257 < train_tokenizer(small, 50_000).get_vocab_size() < 1000


def test_tokenizer_learns_from_train_only() -> None:
    train, heldout = [Document("a", "common words " * 50)], [Document("b", "zyzzyva " * 500)]
    learnt = train_tokenizer(Corpus("c", train, heldout, "h"), 300)
    assert len(learnt.encode("common").ids) == 1
    assert len(learnt.encode("zyzzyva").ids) == len("zyzzyva")


@pytest.mark.parametrize("vocab_size", [-1, 0, 256])
def test_tiny_vocabulary_is_refused(small: Corpus, tmp_path: Path, vocab_size: int) -> None:
    for attempt in (
        lambda: train_tokenizer(small, vocab_size),
        lambda: load_or_train_tokenizer(small, vocab_size, tmp_path),
        lambda: prepare("stdlib", vocab_size, 128, tmp_path),
    ):
        with _refused("vocab_size", str(vocab_size), "257"):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_pieces_have_the_tokens_of_the_whole(small_tokenizer: Tokenizer, size: int) -> None:
    text = _source_text(99, lines=200) + "x\n\n  y\n\u3000z\n日本\n語\n\x1c\n\x85a\n\u2028b\n'll\n\r\nc"
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert len(parts) > 10 or size > 50
    ids = [i for part in parts for i in small_tokenizer.encode(part).ids]
    assert ids == small_tokenizer.encode(text).ids


# --- packing


def test_blocks_are_the_concatenated_ids(small: Corpus, small_tokenizer: Tokenizer) -> None:
    expected: list[int] = []
    for document in small.train:
        expected += [*small_tokenizer.encode(document.text).ids, 0]
    assert len(expected) % 64  # so that something is dropped
    blocks = pack(small.train, small_tokenizer, 64)
    assert blocks.dtype == np.int32
    assert blocks.shape == (len(expected) // 64, 64)
    assert blocks.ravel().tolist() == expected[: blocks.size]


def test_small_pieces_and_batches_change_nothing(
    small: Corpus, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode(small.train, small_tokenizer)
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 300)
    monkeypatch.setattr(preparation, "pieces", lambda text: pieces(text, 100))
    np.testing.assert_array_equal(encode(small.train, small_tokenizer), whole)


def test_blocks_of_each_document(small: Corpus, small_tokenizer: Tokenizer) -> None:
    documents = [*small.train[:3], Document("short", "x"), Document("none", ""), small.train[3]]
    expected = []
    for document in documents:
        ids = small_tokenizer.encode(document.text).ids
        expected += [ids[i : i + 50] for i in range(0, len(ids) - 49, 50)]
    blocks = pack(documents, small_tokenizer, 50, per_document=True)
    assert blocks.tolist() == expected
    assert blocks.dtype == np.int32
    assert pack([Document("short", "x")], small_tokenizer, 50, per_document=True).shape == (0, 50)


def test_spelt_out_end_of_text_ends_no_document(small_tokenizer: Tokenizer) -> None:
    theirs = Tokenizer.from_str(small_tokenizer.to_str())  # as a stranger would load it
    theirs.enable_truncation(3)
    theirs.enable_padding(length=500)
    text = f"one {END_OF_TEXT} two {END_OF_TEXT} three"
    ids = encode([Document("a", text), Document("b", "four")], theirs)
    assert np.flatnonzero(ids == 0).tolist() == [len(small_tokenizer.encode(text).ids), len(ids) - 1]
    assert theirs.truncation is not None  # the caller's tokenizer is left as it was


def test_another_end_of_text(small: Corpus, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert encode(small.heldout, small_tokenizer, 300)[-1] == 300
    assert load_or_pack(small, small_tokenizer, 8, tmp_path, eos_id=300).train_tokens
    plain = load_or_pack(small, small_tokenizer, 8, tmp_path)
    np.testing.assert_array_equal(plain.train, pack(small.train, small_tokenizer, 8))


@pytest.mark.parametrize("block_length", [-3, 0, 1])
def test_block_length_is_checked(small: Corpus, small_tokenizer: Tokenizer, tmp_path: Path, block_length: int) -> None:
    for attempt in (
        lambda: pack(small.train, small_tokenizer, block_length),
        lambda: load_or_pack(small, small_tokenizer, block_length, tmp_path),
        lambda: prepare("stdlib", 300, block_length, tmp_path),
    ):
        with _refused("block_length", str(block_length), "at least 2"):
            attempt()
    assert not list(tmp_path.iterdir())


def test_too_little_text_is_refused(small: Corpus, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    held = [Document("h", "x" * 36)]
    short = Corpus("little", small.train, held, "short-heldout")
    count = len(encode(held, small_tokenizer))
    with _refused("held-out", "little", f"{count} tokens", "128", "smaller context length"):
        load_or_pack(short, small_tokenizer, 128, tmp_path)
    with _refused("train", "little", f"{count} tokens", "128"):
        load_or_pack(Corpus("little", held, small.heldout, "short-train"), small_tokenizer, 128, tmp_path)
    with _refused("none of its documents"):
        load_or_pack(
            Corpus("little", held * 50, small.heldout, "many"), small_tokenizer, 128, tmp_path, per_document=True
        )


# --- cache


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was trained and encoded, in order; empty when all came from the cache."""
    done: list[str] = []
    train, encode_all = tokenizer.train_tokenizer, preparation.encoded

    def train_tokenizer(*arguments: object, **options: object) -> Tokenizer:
        done.append("train")
        return train(*arguments, **options)  # type: ignore[arg-type]

    def encoded(*arguments: object, **options: object) -> Iterator[tuple[preparation.Tokens, int]]:
        done.append("encode")
        return encode_all(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenizer, "train_tokenizer", train_tokenizer)
    monkeypatch.setattr(preparation, "encoded", encoded)
    return done


def test_prepare_works_once(folder: Path, tmp_path: Path, work: list[str]) -> None:
    kept = tmp_path / "cache"
    first = prepare(str(folder), 300, 32, kept)
    assert work == ["train", "encode", "encode"]
    written = {path: path.stat().st_mtime_ns for path in kept.rglob("*") if path.is_file()}
    names = {path.name for path in written if not path.name.startswith("tokenizer-")}
    shards_of = {f"{part}-00000{ending}" for part in ("train", "held-out") for ending in (".npy", ".ends.npy")}
    assert names == {"manifest.json", "tokenizer.json", *shards_of}

    work.clear()
    again = prepare(str(folder), 300, 32, kept)
    assert work == []
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert again.corpus == first.corpus
    assert again.tokenizer.to_str() == first.tokenizer.to_str()
    assert again.tokenizer.encode(END_OF_TEXT).ids == first.tokenizer.encode(END_OF_TEXT).ids != [0]
    np.testing.assert_array_equal(again.packed.train, first.packed.train)
    np.testing.assert_array_equal(again.packed.heldout, first.packed.heldout)

    loaded = load_corpus(str(folder))
    np.testing.assert_array_equal(again.packed.train, pack(loaded.train, again.tokenizer, 32))
    np.testing.assert_array_equal(again.packed.heldout, pack(loaded.heldout, again.tokenizer, 32))
    ids = shards.open_stream(again.packed.train.streams[0].path)
    assert isinstance(ids, np.memmap)
    assert not ids.flags.writeable
    assert ids.dtype == np.uint16
    assert again.packed.train_tokens == len(encode(loaded.train, again.tokenizer))
    assert again.packed.train_tokens // 32 == len(again.packed.train)
    assert again.corpus.train_documents == len(loaded.train)
    assert again.corpus.heldout_characters == sum(len(document.text) for document in loaded.heldout)


def test_cache_follows_content_vocabulary_and_tokenizer(folder: Path, tmp_path: Path, work: list[str]) -> None:
    kept = tmp_path / "cache"
    prepare(str(folder), 300, 32, kept)
    work.clear()
    longer = prepare(str(folder), 300, 64, kept)
    assert work == []  # the same stream, cut elsewhere
    assert longer.packed.train.shape[1] == 64
    prepare(str(folder), 310, 32, kept)
    assert work == ["train", "encode", "encode"]
    work.clear()
    name = load_corpus(str(folder)).train[0].path
    (folder / name).write_text("something new\n")
    changed = prepare(str(folder), 300, 32, kept)
    assert work == ["train", "encode", "encode"]
    np.testing.assert_array_equal(changed.packed.train, pack(load_corpus(str(folder)).train, changed.tokenizer, 32))


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "wrong content"])
def test_damaged_cache_is_mended(folder: Path, tmp_path: Path, work: list[str], damage: str) -> None:
    kept = tmp_path / "cache"
    good = prepare(str(folder), 300, 32, kept)
    train, heldout = np.array(good.packed.train), np.array(good.packed.heldout)
    del good
    files = [path for path in kept.rglob("*") if path.is_file() and path.name != "tokenizer.json"]
    assert len(files) == 6
    for path in files:
        content = path.read_bytes()
        if damage == "garbage":
            path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((((" + random.Random(0).randbytes(500))
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "empty":
            path.write_bytes(b"")
        elif path.suffix == ".npy":
            np.save(path, np.array([7, 65_000, 0], dtype=np.uint16))
        elif path.name.startswith("tokenizer-"):
            path.write_text(train_tokenizer(load_corpus(str(folder)), 400).to_str())
    work.clear()
    mended = prepare(str(folder), 300, 32, kept)
    assert work == ["train", "encode", "encode"]
    np.testing.assert_array_equal(mended.packed.train, train)
    np.testing.assert_array_equal(mended.packed.heldout, heldout)
    work.clear()
    prepare(str(folder), 300, 32, kept)
    assert work == []
    assert len([path for path in kept.rglob("*") if path.is_file()]) == 7  # no partial files are left


@pytest.mark.parametrize(
    "stream", [np.array([1, 2, 0], dtype=np.int64), np.array([[1, 0]], dtype=np.int32), np.array([0.5])]
)
def test_streams_are_checked(tmp_path: Path, stream: np.ndarray) -> None:
    path = tmp_path / "stream.npy"
    np.save(path, stream)
    with _refused("stream.npy", "no token ids"):
        shards.open_stream(path)
    path.write_bytes(b"no numbers")
    with _refused("stream.npy", "cannot read"):
        shards.open_stream(path)
    np.save(path, np.array([1, 2, 0], dtype=np.int32))
    assert shards.open_stream(path).tolist() == [1, 2, 0]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    target.write_bytes(b"before")

    def write_half() -> None:
        with cache.atomic_write(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert target.read_bytes() == b"before"


def test_unwritable_cache_is_refused(small: Corpus, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file, where a folder should be")
    with _refused("ENTROPI_CACHE", str(blocked)):
        load_or_train_tokenizer(small, 300, blocked)
    with _refused("ENTROPI_CACHE"):
        load_or_train_tokenizer(small, 300, blocked / "below")


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, small: Corpus, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ENTROPI_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.default_cache_dir() == Path.home() / ".cache" / "entropi"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_cache_dir() == tmp_path / "xdg" / "entropi"
    monkeypatch.setenv("ENTROPI_CACHE", str(tmp_path / "own"))
    assert cache.default_cache_dir() == tmp_path / "own"
    load_or_train_tokenizer(small, 300)
    assert len(list((tmp_path / "own").glob("tokenizer-*.json"))) == 1


def test_prepare_speaks_only_to_the_console(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 2000)
    spoken = io.StringIO()
    console = Console(file=spoken, width=200)
    prepare(str(folder), 300, 32, tmp_path / "one", console)
    assert "training the tokenizer on" in spoken.getvalue()
    assert "encoding" in spoken.getvalue()
    spoken.truncate(0)
    prepare(str(folder), 300, 32, tmp_path / "one", console)
    prepare(str(folder), 300, 32, tmp_path / "two")
    assert spoken.getvalue().strip("\0") == ""
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_cannot_encode_is_one_line():
    """Its unknown token is missing from its vocabulary, which nothing notices before the first unknown letter."""
    broken = Tokenizer(models.BPE({"a": 0}, [], unk_token="?"))
    with pytest.raises(UserError, match=r"the tokenizer cannot encode this text: Unk token .* not found"):
        encode([Document("a", "abc")], broken)
