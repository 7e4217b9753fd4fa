"""The source of the installed packages as a corpus: what is taken, how it is split, and what is noted."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from entropi import training
from entropi.data import site_packages
from entropi.data.prepare import prepare
from entropi.data.site_packages import is_data, load_site_packages, shingles
from entropi.errors import UserError


def code(name: str, functions: int = 40) -> str:
    """Source that shares no run of five lines with that of other names."""
    return "".join(
        f"def {name}_{i}(argument):\n    {name}_value = argument + {i}\n    return {name}_value\n\n\n"
        for i in range(functions)
    )


def install(root: Path, name: str, files: dict[str, str], licence: str = "License-Expression: MIT") -> None:
    about = root / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{licence}\n")
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (about / "RECORD").write_text("".join(f"{path},sha256=x,{len(text)}\n" for path, text in files.items()))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(folder)})
    return folder


def taken(root: Path, cache: Path) -> set[str]:
    corpus = load_site_packages(cache)
    return {document.path for document in [*corpus.train, *corpus.heldout]}


def test_whole_packages_are_held_out_and_their_licences_noted(root: Path, tmp_path: Path) -> None:
    for number in range(30):
        install(root, f"package{number}", {f"package{number}/{part}.py": code(f"p{number}{part}") for part in "ab"})
    corpus = load_site_packages(tmp_path)
    parts = {
        part: {document.path.split("/")[0] for document in documents}
        for part, documents in (("train", corpus.train), ("held-out", corpus.heldout))
    }
    assert parts["held-out"]
    assert not parts["train"] & parts["held-out"]
    assert parts["train"] | parts["held-out"] == {f"package{number}" for number in range(30)}
    for source in corpus.sources:
        name, version = source.name.split()
        assert (version, source.licence) == ("1.0", "MIT")
        assert name in parts[source.part]
    assert len(corpus.sources) == 30


def test_the_same_environment_gives_the_same_corpus_from_the_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        install(root, f"package{number}", {f"package{number}.py": code(f"p{number}")})
    first = load_site_packages(tmp_path / "one")
    assert load_site_packages(tmp_path / "two") == first
    with monkeypatch.context() as context:
        context.delattr(site_packages, "_choose")  # the choice is read from the cache
        assert load_site_packages(tmp_path / "one") == first
    install(root, "another", {"another.py": code("another")})
    assert load_site_packages(tmp_path / "one").content_hash != first.content_hash


def test_tests_vendored_and_generated_files_and_tables_are_left_out(root: Path, tmp_path: Path) -> None:
    table = "table = {\n" + "".join(f"    {i}: 'value',\n" for i in range(300)) + "}\n"
    left_out = {
        "a/tests/helper.py": code("b"),
        "a/test_a.py": code("c"),
        "a/conftest.py": code("d"),
        "a/_vendor/other.py": code("e"),
        "a/messages_pb2.py": code("f"),
        "a/made.py": "# This file was automatically generated. Do not edit.\n" + code("g"),
        "a/table.py": table,
        "a/long.py": "x = '" + "a b " * 300 + "'\n" + code("h"),
        "a/empty.py": "\n",
        "a/data.txt": "text",
    }
    install(root, "a", {"a/kept.py": code("a"), **left_out})
    install(root, "b", {"b.py": code("z")})
    install(root, "entropi", {"entropi/own.py": code("own")})
    assert taken(root, tmp_path) == {"a/kept.py", "b.py"}


def test_near_duplicates_are_left_out_and_the_held_out_part_gives_way(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = code("same", 60)
    changed = "\n".join(line + " " for line in original.split("\n")) + code("more", 5)  # nearly all lines again
    monkeypatch.setattr(site_packages, "choose_heldout", lambda sizes: {"a"})  # the first by name
    install(root, "a", {"a/changed.py": changed, "a/copy.py": original, "a/own.py": code("own")})
    install(root, "b", {"b/changed.py": changed, "b/half_new.py": original + code("new", 120), "b/other.py": original})
    corpus = load_site_packages(tmp_path)
    assert [document.path for document in corpus.train] == ["b/changed.py", "b/half_new.py"]
    assert [document.path for document in corpus.heldout] == ["a/own.py"]
    assert corpus.duplicates == 3


def test_comments_and_white_space_make_no_difference_to_shingles() -> None:
    lines = code("a").split("\n")
    dressed = [text for line in lines for text in (f"  {line}\t", "# a comment", "")]
    assert shingles(lines).tolist() == shingles(dressed).tolist()
    assert len(shingles(lines)) > 10
    assert not set(shingles(lines).tolist()) & set(shingles(code("b").split("\n")).tolist())


def test_source_code_is_no_data() -> None:
    assert not is_data(Path(training.__file__).with_name("trainer.py").read_text())
    assert is_data("[\n" + "'entry',\n" * 100 + "]\n")


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License-Expression: Apache-2.0\nLicense: other", "Apache-2.0"),
        ("Classifier: License :: OSI Approved\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("License: BSD\n with a second line", "BSD"),
        ("Summary: nothing said", "not stated"),
    ],
)
def test_licences_are_those_that_packages_state(root: Path, tmp_path: Path, metadata: str, licence: str) -> None:
    for name in ("a", "b"):
        install(root, name, {f"{name}.py": code(name)}, metadata)
    assert {source.licence for source in load_site_packages(tmp_path).sources} == {licence}


def test_an_environment_without_two_packages_is_refused(root: Path, tmp_path: Path) -> None:
    install(root, "a", {"a.py": code("a")})
    with pytest.raises(UserError, match="two that differ are needed") as caught:
        load_site_packages(tmp_path)
    assert "\n" not in str(caught.value)


def test_it_is_prepared_as_any_corpus(root: Path, tmp_path: Path) -> None:
    for number in range(6):
        install(root, f"package{number}", {f"package{number}.py": code(f"p{number}")})
    prepared = prepare("site-packages", 400, 32, tmp_path)
    assert prepared.corpus.name == "Python source of 6 installed packages"
    assert len(prepared.corpus.sources) == 6
    assert len(prepared.packed.train) > len(prepared.packed.heldout) > 0
