"""A hub of models and data sets on this machine, for programs that are told of it by HF_ENDPOINT.

It speaks the part of the Hugging Face hub's HTTP interface that reading takes: what a repository is and holds, and its
files by range, with entity tags and the commit. Repositories are folders, `datasets/OWNER/NAME` and
`models/OWNER/NAME`; a commit is a hash of what a folder holds, so that a changed file is a new commit.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Serves the repositories under `root`; `log` has the method and path of every request."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.log = root, list[str]()
        self.break_after: int | None = None  # bytes of a file after which the connection ends
        self.breaks = 0  # how many times that is still to happen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub with the repositories under `root`, as long as the context lasts."""
    with Hub(root) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()


def commit_of(folder: Path) -> str:
    """Forty hexadecimal digits that change with the folder's files."""
    digest = hashlib.sha1()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        form = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        names = parse_qs(form).get("paths", []) if "=" in form else json.loads(form or "{}").get("paths", [])
        self._answer(body=True, names=names)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bool, names: list[str] | None = None) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(.*))?", path):
            kind, name, rest = found[1], found[2], found[3] or ""
            if (folder := self.server.root / kind / name).is_dir():
                return self._describe(folder, name, rest, names)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            folder = self.server.root / ("datasets" if found[1] else "models") / found[2]
            if folder.is_dir():
                return self._file(folder, found[3], found[4], body)
        self._error("RepoNotFound", 404 if "/api/" in path else 401)

    def _describe(self, folder: Path, name: str, rest: str, names: list[str] | None) -> None:
        commit = commit_of(folder)
        action, _, argument = rest.partition("/")
        revision, _, below = argument.partition("/")
        if action in ("revision", "tree", "paths-info") and revision not in ("main", commit):
            return self._error("RevisionNotFound", 404)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if action in ("", "revision"):
            siblings = [{"rfilename": p.relative_to(folder).as_posix()} for p in files]
            kept = {"id": name, "sha": commit, "private": False, "gated": False, "disabled": False, "downloads": 0}
            return self._json(kept | {"likes": 0, "tags": [], "siblings": siblings, "lastModified": _DATE})
        if action == "tree":
            entries = [p for p in sorted(folder.rglob("*")) if not below or (folder / below) in p.parents]
            if parse_qs(urlsplit(self.path).query).get("recursive", ["False"])[0].lower() != "true":
                entries = [p for p in entries if p.parent == folder / below]
            if below and not (folder / below).is_dir():
                return self._error("EntryNotFound", 404)
            return self._json([_entry(p, folder) for p in entries])
        if action == "paths-info":
            wanted = [folder / name for name in names or []]
            return self._json([_entry(p, folder) for p in wanted if p.exists()])
        self._error("EntryNotFound", 404)

    def _file(self, folder: Path, revision: str, name: str, body: bool) -> None:
        commit, path = commit_of(folder), folder / name
        if revision not in ("main", commit):
            return self._error("RevisionNotFound", 404)
        if not path.is_file():
            return self._error("EntryNotFound", 404, {"X-Repo-Commit": commit})
        content = path.read_bytes()
        total, first, last = len(content), 0, len(content) - 1
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        else:
            self.send_response(200)
        part = content[first : last + 1]
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not body:
            return
        if self.server.breaks and self.server.break_after is not None and len(part) > self.server.break_after:
            self.server.breaks -= 1
            self.wfile.write(part[: self.server.break_after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(part)

    def _json(self, content: Any) -> None:
        sent = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def _error(self, code: str, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"X-Error-Code": code, "Content-Length": "0"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()


_DATE = "2026-01-01T00:00:00.000Z"


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    content = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
