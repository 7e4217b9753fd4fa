"""Checkpoints that are valid or do not count: the commit file, written last, names every file and its SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

CHECKPOINTS_FOLDER = "checkpoints"  # of a run folder
COMMIT_FILE = "seal.json"  # the name that it has in runs of every version


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint: its folder, its step, and what the recorder had not yet written at that step."""

    path: Path
    step: int
    pending: dict[str, Any]


def commit(folder: Path, pending: dict[str, Any]) -> None:
    """Declare the checkpoint in `folder` complete; `pending` is kept for whoever resumes from it.

    Everything is on the disk when this returns: the checkpoint before may then be removed.
    """
    files = {
        path.name: _digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != COMMIT_FILE
    }
    for name in files:
        _to_disk(folder / name)
    partial = folder / (COMMIT_FILE + ".partial")
    partial.write_text(json.dumps({"files": files, "pending": pending}, indent=2) + "\n", encoding="utf-8")
    _to_disk(partial)
    os.replace(partial, folder / COMMIT_FILE)
    _to_disk(folder)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest_committed(folder: Path) -> str | None:
    """Name of the newest checkpoint below `folder` that was committed."""
    return next((path.name for _, path in _by_step(folder) if (path / COMMIT_FILE).exists()), None)


def remove_oldest(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints below `folder`."""
    for _, path in _by_step(folder)[keep:]:
        (path / COMMIT_FILE).unlink(missing_ok=True)  # first: what is half removed must not look complete
        shutil.rmtree(path)


def latest_valid(folder: Path, console: Console) -> Checkpoint | None:
    """The newest valid checkpoint below `folder`; newer ones, and any that was not committed, are removed and named."""
    found: Checkpoint | None = None
    for step, path in _by_step(folder):
        if not (path / COMMIT_FILE).exists():
            problem = "was cut short"
        elif found is not None:
            continue
        else:
            pending, damaged = _open(path)
            if damaged is None:
                found = Checkpoint(path, step, pending)
                continue
            problem = f"is damaged, first in {damaged},"
        console.print(f"{path.name} {problem} and is removed", markup=False)
        shutil.rmtree(path)
    return found


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of all checkpoints, the newest first."""
    numbered = [(path.name.rpartition("-")[2], path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted(((int(number), path) for number, path in numbered if number.isdecimal()), reverse=True)


def _open(path: Path) -> tuple[dict[str, Any], str | None]:
    """What a commit file holds, and the first file that is not as it was committed."""
    try:
        content = json.loads((path / COMMIT_FILE).read_bytes())
        files, pending = dict(content["files"]), dict(content["pending"])
    except (ValueError, KeyError, TypeError):
        return {}, COMMIT_FILE
    for name, digest in files.items():
        if not (path / name).is_file() or _digest(path / name) != digest:
            return {}, name
    return pending, None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
