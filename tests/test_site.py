"""The documentation builds as a site without a warning, and everything it links to within itself is there."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("mkdocs", reason="the documentation needs the extra docs")
from entropi.cli import COMMANDS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


class Links(HTMLParser):
    """What a page links to, and where in it links can lead."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.targets.append(value)
            if name in ("id", "name") and value:
                self.anchors.add(value)


def build(folder):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert (built.returncode, built.stderr) == (0, "")
    return folder


def test_every_link_within_the_site_leads_somewhere(site):
    pages = {path.resolve(): Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are for a server's root
            continue
        for target in page.targets:
            if re.match(r"[a-z]+:", target):
                continue
            place, _, anchor = target.partition("#")
            found = (path.parent / unquote(place)).resolve() if place else path
            if found.is_dir():
                found /= "index.html"
            if not found.exists() or (anchor and found in pages and unquote(anchor) not in pages[found].anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []


def test_every_command_and_public_name_is_in_the_reference(site):
    import entropi

    commands = Links((site / "reference" / "commands.html").read_text(encoding="utf-8"))
    assert {f"entropi-{name}" for name in COMMANDS} <= commands.anchors
    python = Links((site / "reference" / "python.html").read_text(encoding="utf-8"))
    assert {name for name in entropi.__all__ if not any(a.endswith(f".{name}") for a in python.anchors)} == set()


def test_every_option_is_in_the_reference(site):
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    for option in ("--max-new-tokens", "--entropy-margin", "--fraction-bits", "--softmax"):
        assert f"<code>{option}</code>" in text


def test_nothing_is_loaded_from_elsewhere(site):
    """A page that works offline has no style, script, font or picture of another host."""
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*src=\"(https?://[^\"]*)", text)
        loaded += re.findall(r"<link[^>]*rel=\"(?:stylesheet|preconnect)\"[^>]*href=\"(https?://[^\"]*)", text)
        assert loaded == [], path
