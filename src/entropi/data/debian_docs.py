"""English prose as a corpus: the documentation that this machine's Debian packages ship, held out by package."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import msgspec
from rich.console import Console

from entropi.cache import atomic_write, default_cache_dir
from entropi.console import ProgressLine
from entropi.data.corpus import Corpus, Document, Source
from entropi.data.site_packages import choose_heldout
from entropi.data.split import hash_of_parts
from entropi.errors import UserError

DEBIAN_DOCS = "debian-docs"
ROOT = Path("/")
FORMAT = 1  # raise it when another choice of text is made, so that old cache entries are not met
SUGGESTED = (
    "anarchism linux-doc python3-doc postgresql-doc erlang-doc racket-doc python-sqlalchemy-doc python-django-doc"
)

LEAST_HELDOUT = 0.02  # of the text
LEAST_PAGE = 500  # characters of prose: what has less is an index or a reference
LEAST_WORDS = 12  # of a paragraph
LEAST_COMMON = 0.2  # of its words are those below: in English prose a third, in lists of names and other languages few
LEAST_LETTERS = 0.93  # of its characters: less is formulas, tables or code
_COMMON = frozenset("the of to and a in is that for it be as are with this or by on not an".split())  # noqa: SIM905
_PUNCTUATION = frozenset(" ,.'-")
_ENDS = frozenset(".?!:;\"')")

_PAGE = re.compile(r"usr/share/doc/.*\.html?(\.gz)?")
# Elements without prose, and those that end a paragraph.
_LEFT_OUT = frozenset(
    ["script", "style", "pre", "table", "nav", "head", "header", "footer", "svg", "math", "form", "button"]
)
_BLOCKS = frozenset(
    ["p", "li", "div", "h1", "h2", "h3", "h4", "h5", "dd", "dt", "section", "article", "blockquote", "br"]
)
_LICENCE = re.compile(r"^Files: *\*\s*$.*?^License: *(.+?)$", re.MULTILINE | re.DOTALL)


class _Documented(msgspec.Struct):
    """What the cache keeps of a package with documentation."""

    source: str  # its name and version
    licence: str
    pages: list[tuple[str, str]]  # path below the root, and text
    heldout: bool = False


@dataclass(frozen=True, slots=True)
class _Installed:
    """What dpkg says of a package."""

    name: str
    version: str
    pages: tuple[tuple[str, str], ...]  # path below the root, and MD5 of the file


def load_debian_docs(cache_dir: Path | None = None, console: Console | None = None) -> Corpus:
    """The prose in the HTML pages of all installed Debian packages: paragraphs of English sentences.

    Left out are code, tables, lists of short items, other languages, paragraphs that stand in pages before, and pages
    with little else. Packages are held out as by `load_site_packages`, and the held-out part gives way where both have
    the same paragraph. Texts are taken once for each state of the installed documentation, then read from the cache.

    Raises:
        UserError: fewer than two packages with prose; says what to install.
    """
    installed = [one for one in _installed(ROOT) if one.pages]
    state = "".join(f"{one.name} {one.version} {one.pages}\n" for one in installed)
    key = hashlib.sha256(f"{FORMAT} {ROOT}\n{state}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = (cache_dir or default_cache_dir()) / f"debian-docs-{key}.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=list[_Documented])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        found = _read(installed, console)
        with atomic_write(path) as file:
            file.write(msgspec.json.encode(found))

    train, heldout = (
        [Document(name, text) for one in found if one.heldout is part for name, text in one.pages]
        for part in (False, True)
    )
    if not train or not heldout:
        raise UserError(
            f"the documentation of two Debian packages or more is needed, and {len(found)} here have English prose: "
            f"apt-get install {SUGGESTED}"
        )
    sources = tuple(Source(one.source, one.licence, "held-out" if one.heldout else "train") for one in found)
    name = f"documentation of {len(found)} Debian packages"
    return Corpus(name, train, heldout, hash_of_parts(train, heldout), sources=sources)


def _installed(root: Path) -> Iterator[_Installed]:
    """The packages that dpkg knows, by name, with those of their HTML pages that are there."""
    dpkg = root / "var/lib/dpkg"
    status = (dpkg / "status").read_text(encoding="utf-8") if (dpkg / "status").is_file() else ""
    versions = dict(re.findall(r"^Package: (\S+)$(?:\n\S.*|\n .*)*?\nVersion: (\S+)$", status, re.MULTILINE))
    for file in sorted((dpkg / "info").glob("*.md5sums")):
        name = file.name.removesuffix(".md5sums").partition(":")[0]
        lines = (line.partition("  ") for line in file.read_text(encoding="utf-8").splitlines())
        # Containers are often told to leave documentation out, which their lists of files do not show.
        pages = sorted((page, md5) for md5, _, page in lines if _PAGE.fullmatch(page) and (root / page).is_file())
        yield _Installed(name, versions.get(name, "unknown"), tuple(pages))


def _read(installed: list[_Installed], console: Console | None) -> list[_Documented]:
    """Take the prose from all pages, and decide which packages are held out."""
    texts: dict[str, dict[str, list[str]]] = {}
    done, count = 0, sum(len(one.pages) for one in installed)
    with ProgressLine("reading documentation, pages", count, console=console) as line:
        for one in installed:
            texts[one.name] = {}
            for page, _ in one.pages:
                texts[one.name][page] = paragraphs(_html(ROOT / page))
                done += 1
                line.update(done)
    held = _held_out({name: size for name, pages in texts.items() if (size := _size(pages))})

    seen: set[int] = set()
    found: dict[str, _Documented] = {}
    for one in sorted(installed, key=lambda one: one.name in held):
        pages = [(page, text) for page, own in texts[one.name].items() if (text := _unseen(own, seen))]
        if pages:
            source = f"{one.name} {one.version}"
            found[one.name] = _Documented(source, _licence(ROOT, one.name), pages, one.name in held)
    return [found[name] for name in sorted(found)]


def _held_out(sizes: dict[str, int]) -> set[str]:
    """As of `choose_heldout`, and where only small packages come to too little, the smallest of the others as well."""
    held = choose_heldout(sizes)
    if sum(sizes[name] for name in held) < LEAST_HELDOUT * sum(sizes.values()):
        large = [name for name in sizes if sizes[name] >= LEAST_HELDOUT * sum(sizes.values()) and name not in held]
        if len(large) > 1:
            held.add(min(large, key=lambda name: (sizes[name], name)))
    return held


def _size(pages: dict[str, list[str]]) -> int:
    return sum(len(text) for page in pages.values() for text in page)


def _unseen(page: list[str], seen: set[int]) -> str:
    """The paragraphs of a page that are new, and added to `seen`; nothing if they are too little."""
    new = {zlib.crc32(text.encode()) << 32 | len(text): text for text in page}
    new = {key: text for key, text in new.items() if key not in seen}
    if sum(map(len, new.values())) < LEAST_PAGE:
        return ""
    seen.update(new)
    return "\n\n".join(new.values()) + "\n"


def _html(path: Path) -> str:
    """A page's text; what cannot be read is said."""
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


class _Text(HTMLParser):
    """Collects what a page says outside of code, tables and navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._within: list[str] = []  # elements that are left out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _LEFT_OUT:
            self._within.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._within:
            while self._within.pop() != tag:  # of elements that were never closed
                pass
        elif tag in _BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._within:
            self.parts.append(data)


def paragraphs(page: str) -> list[str]:
    """The paragraphs of an HTML page that are English prose, each in one line."""
    parser = _Text()
    parser.feed(page)
    found = (" ".join(text.split()) for text in re.split(r"\n\s*\n", "".join(parser.parts)))
    return [text for text in found if text and is_prose(text)]


def is_prose(text: str) -> bool:
    """Whether a paragraph is one of English sentences: enough words, many of them frequent ones, few other signs."""
    words = re.findall(r"[a-z']+", text.lower())
    if len(words) < LEAST_WORDS or text[-1] not in _ENDS:
        return False
    letters = sum(c.isalpha() or c in _PUNCTUATION for c in text)
    return sum(word in _COMMON for word in words) >= LEAST_COMMON * len(words) and letters >= LEAST_LETTERS * len(text)


def _licence(root: Path, name: str) -> str:
    """What the package's copyright file says of most of its files, in one line."""
    try:
        text = (root / "usr/share/doc" / name / "copyright").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "not stated"
    if text.startswith("Format:"):  # has short names of licences
        stated = _LICENCE.search(text) or re.search(r"^License: *(.+?)$", text, re.MULTILINE)
        if stated:
            return stated[1][:80]
    return f"see /usr/share/doc/{name}/copyright"
