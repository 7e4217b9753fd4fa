"""The documentation of installed Debian packages as a corpus: which text is taken, how it is split, what is noted."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from entropi.data import debian_docs
from entropi.data.debian_docs import is_prose, load_debian_docs, paragraphs
from entropi.data.prepare import prepare
from entropi.errors import UserError

LICENCE = "Format: 1.0\n\nFiles: debian/*\nLicense: other\n\nFiles: *\nCopyright: somebody\nLicense: GFDL-1.3\n"


def sentence(name: str, number: int) -> str:
    return f"The {name} of the house is a part that was made in the year of the king, as the {'x' * number} of it says."


def page(name: str, sentences: int = 12, around: str = "") -> str:
    text = "".join(f"<p>{sentence(name, i)}</p>\n" for i in range(sentences))
    return f"<html><head><title>{name}</title></head><body>{around}{text}</body></html>"


def install(root: Path, name: str, files: dict[str, str], *, there: bool = True, copyright: str = LICENCE) -> None:
    """As dpkg leaves it; without `there`, as where the documentation was left out."""
    docs = root / "usr/share/doc" / name
    docs.mkdir(parents=True)
    (docs / "copyright").write_text(copyright)
    for file, text in files.items():
        content = text.encode()
        if there:
            (docs / file).write_bytes(gzip.compress(content, mtime=0) if file.endswith(".gz") else content)
    (root / "var/lib/dpkg/info").mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{hash(text):032x}  usr/share/doc/{name}/{file}\n" for file, text in files.items())
    (root / f"var/lib/dpkg/info/{name}:amd64.md5sums").write_text(lines)
    with open(root / "var/lib/dpkg/status", "a") as status:
        status.write(f"Package: {name}\nStatus: install ok installed\nDescription: a\n b\nVersion: 1.0-1\n\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "root"
    monkeypatch.setattr(debian_docs, "ROOT", folder)
    return folder


def test_whole_packages_are_held_out_and_their_licences_noted(root: Path, tmp_path: Path) -> None:
    for number in range(30):
        name = f"p{number}"
        install(root, name, {f"{part}.html.gz": page(f"{name}{part}") for part in "ab"})
    corpus = load_debian_docs(tmp_path)
    parts = [{document.path.split("/")[3] for document in part} for part in (corpus.train, corpus.heldout)]
    assert parts[0] | parts[1] == {f"p{number}" for number in range(30)}
    assert parts[1]
    assert not parts[0] & parts[1]
    assert {(source.licence, source.part) for source in corpus.sources} == {
        ("GFDL-1.3", "train"),
        ("GFDL-1.3", "held-out"),
    }
    assert {source.name for source in corpus.sources} == {f"p{number} 1.0-1" for number in range(30)}


def test_a_large_package_is_held_out_where_small_ones_are_too_little(root: Path, tmp_path: Path) -> None:
    for name, sentences in {"large": 300, "middle": 100, "least": 80, "small": 6}.items():
        install(root, name, {"a.html": page(name, sentences)})
    held = {source.name.split()[0] for source in load_debian_docs(tmp_path).sources if source.part == "held-out"}
    assert held == {"least", "small"}


def test_only_prose_is_taken() -> None:
    words = sentence("door", 3)
    taken = paragraphs(
        f"<head><title>{words}</title></head><script>{words}</script><p>{words}<pre>{words}</pre>"
        f"<table><tr><td>{words}</table><nav><li>{words}</nav>"
        f"<p>A short one.</p><ul><li>{words}\n again &amp; again.</ul>"
    )
    assert taken == [words, f"{words} again & again."]
    assert not is_prose(words.removesuffix("."))
    assert not is_prose(
        "Das Haus, das der König in jenem Jahr für seine Tochter am Ufer des Flusses hatte bauen lassen."
    )
    assert not is_prose("the f(x) = {2 ** 3} / [4 + 5] of a <= b && c != d || e[6] in g(7, 8) of the h(9) = 1024 / 16;")
    assert not is_prose("argument value list string option table index column database schema view trigger user role.")


def test_paragraphs_of_earlier_pages_are_left_out_and_the_held_out_part_gives_way(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian_docs, "_held_out", lambda sizes: {"a"})  # the first by name
    install(root, "a", {"copy.html": page("one"), "own.html": page("three"), "part.html": page("one", 20)})
    install(root, "b", {"again.html": page("one"), "first.html": page("one", 14) + page("two", 4)})
    corpus = load_debian_docs(tmp_path)
    assert [document.path for document in corpus.train] == ["usr/share/doc/b/again.html", "usr/share/doc/b/first.html"]
    assert [document.path for document in corpus.heldout] == ["usr/share/doc/a/own.html", "usr/share/doc/a/part.html"]
    texts = [text for document in [*corpus.train, *corpus.heldout] for text in document.text.strip().split("\n\n")]
    assert len(texts) == len(set(texts))


def test_the_same_packages_give_the_same_corpus_from_the_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        install(root, name, {"a.html": page(name)})
    first = load_debian_docs(tmp_path / "one")
    assert load_debian_docs(tmp_path / "two") == first
    with monkeypatch.context() as context:
        context.delattr(debian_docs, "_read")  # the texts are read from the cache
        assert load_debian_docs(tmp_path / "one") == first
    (root / "usr/share/doc/c/a.html").unlink()
    assert len(load_debian_docs(tmp_path / "one").sources) == 2


def test_a_damaged_page_is_named(root: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        install(root, name, {"a.html.gz": page(name)})
    path = root / "usr/share/doc/b/a.html.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read .*/b/a\.html\.gz"):
        load_debian_docs(tmp_path)


@pytest.mark.parametrize("there", [True, False])
def test_too_few_packages_are_refused(root: Path, tmp_path: Path, there: bool) -> None:
    install(root, "a", {"a.html": page("a")}, there=there)
    install(root, "b", {"b.html": page("b")}, there=False)
    with pytest.raises(UserError, match="apt-get install anarchism") as caught:
        load_debian_docs(tmp_path)
    assert f"{int(there)} here have English prose" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_system_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="0 here have English prose"):
        load_debian_docs(tmp_path)


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (LICENCE, "GFDL-1.3"),
        ("Format: 1.0\nLicense: MIT\n", "MIT"),
        ("License: Redistribution and use are allowed", "see /usr/share/doc/a/copyright"),
    ],
)
def test_licences_are_those_of_most_files(root: Path, tmp_path: Path, text: str, licence: str) -> None:
    for name in ("a", "b"):
        install(root, name, {"a.html": page(name)}, copyright=text.replace("/a/", f"/{name}/"))
    assert load_debian_docs(tmp_path).sources[0].licence == licence


def test_it_is_prepared_as_any_corpus(root: Path, tmp_path: Path) -> None:
    for number in range(6):
        install(root, f"p{number}", {"a.html": page(f"p{number}")})
    prepared = prepare("debian-docs", 400, 32, tmp_path)
    assert prepared.corpus.name == "documentation of 6 Debian packages"
    assert len(prepared.packed.train) > len(prepared.packed.heldout) > 0
