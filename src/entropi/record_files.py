"""Files of records: one JSON object a line, tagged with its `kind` and the schema version.

Numbers that are not finite (say, of a softmax-only model that diverged) are written as the strings "NaN", "Infinity"
and "-Infinity".
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from entropi.errors import UserError
from entropi.records import (
    SCHEMA_VERSION,
    AttentionPattern,
    CountRecord,
    DiagnosisRecord,
    Evaluation,
    Record,
    RunStarted,
)
from entropi.softmax import FORMER, from_former

RECORDS_FILE = "records.jsonl"
STUDY_FILE = "study.jsonl"  # in the folder of a study, which holds run folders


class _Header(msgspec.Struct):
    """What is read of a record before it is known to fit."""

    version: int = SCHEMA_VERSION
    kind: str = ""


# Names of fields that older records have, by kind: what was written, and what it is called now.
_FORMER_NAMES = {"prediction": {"trips": "rounds"}}
_WITH_SOFTMAX = ("prediction", "private")  # kinds whose older records have two fields for it

_decoder = msgspec.json.Decoder(Record, strict=False)  # takes "NaN" for a float
_header_decoder = msgspec.json.Decoder(_Header)
_encoder = msgspec.json.Encoder()


def _writable(value: Any) -> Any:
    """What JSON has a form for.

    msgspec would write NaN as null, and then refuse to read the null back as a number; and it refuses names of files
    that are not UTF-8, of which undecodable bytes become question marks.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(item) for item in value]
    return value


def _decode(line: bytes, kind: str) -> Record:
    names = _FORMER_NAMES.get(kind, {})
    if any(f'"{name}"'.encode() in line for name in names):
        line = msgspec.json.encode(_renamed(msgspec.json.decode(line), names))
    if kind in _WITH_SOFTMAX and any(f'"{name}"'.encode() in line for name in FORMER):
        line = msgspec.json.encode(_with_softmax(msgspec.json.decode(line), kind))
    return _decoder.decode(line)


def _with_softmax(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """An older record with one field for its softmax; of private runs only their stages tell a polynomial."""
    if kind == "private" and "exp_iterations" in record:
        record |= {"polynomial": any(stage.get("name") == "power" for stage in record.get("stages", ()))}
    try:
        return from_former(record)
    except UserError as error:
        raise msgspec.ValidationError(str(error)) from None


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """JSON with its objects' keys renamed, at every depth."""
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(item, names) for key, item in value.items()}
    return [_renamed(item, names) for item in value] if isinstance(value, list) else value


def encode(record: Record) -> bytes:
    """One record as one line of JSON, without the newline."""
    return _encoder.encode(_writable(msgspec.to_builtins(record)))


def append(path: Path, record: Record) -> None:
    """Add one record as one line, in a single write; what a killed process left of a last line is removed."""
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(encode(record) + b"\n")


def read(path: Path) -> list[Record]:
    """All records of a file, in order.

    A last line cut short by a killed process is ignored.

    Raises:
        UserError: the file cannot be read, is damaged anywhere else, or has another schema version; names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the records {path}: {error.strerror}") from None
    records: list[Record] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is unfinished or empty
        try:
            header = _header_decoder.decode(line)  # first: records of another version may not fit ours
            if header.version != SCHEMA_VERSION:
                raise UserError(
                    f"{path}, line {number} has schema version {header.version}, this program reads {SCHEMA_VERSION}"
                )
            records.append(_decode(line, header.kind))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {number} is damaged: {error}") from None
    return records


def rewrite(path: Path, records: Iterable[Record]) -> None:
    """Replace a records file atomically."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        for record in records:
            file.write(encode(record) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def forget_after(path: Path, step: int) -> None:
    """Drop what a run that resumes after `step` will write again: records of later steps, and of the run's end."""
    if not path.exists():
        return
    found = read(path)
    total = max((r.total_steps for r in found if isinstance(r, RunStarted)), default=0)
    kept = []
    for record in found:
        of_the_end = isinstance(record, DiagnosisRecord | AttentionPattern | CountRecord) or (
            isinstance(record, Evaluation) and record.step >= total
        )
        if not of_the_end and getattr(record, "step", 0) <= step:
            kept.append(record)
    rewrite(path, kept)
