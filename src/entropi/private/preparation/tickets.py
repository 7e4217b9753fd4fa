"""A ticket of one-time material: what it was prepared for, what is known of it, and why it may not be used."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping
from typing import Literal

import msgspec

from entropi.errors import UserError
from entropi.private.preparation.files import PartFile

ID_BYTES = 16
LIVE = ("growing", "ready")  # states of tickets that have material
# What one side may count on of a ticket that it has its half of: the other half is ready; is there, and not for what is
# computed now; is gone, and will not be there again; or nothing is known of it, and another store may have it.
State = Literal["ready", "other", "gone", "unknown"]
_REFUSED = {
    "growing": "is not prepared to the end",
    "ready": "is prepared already",
    "taken": "was taken already, and its material is used once",
    "destroyed": "was destroyed",
}
_OTHERS = {
    "model": "another model",
    "settings": "other settings",
    "own": "another certificate of this side",
    "peer": "another party",
    "side": "the other side",
}


class Binding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What material was prepared for, and nothing else may use it."""

    model: str  # digest
    settings: str  # digest
    own: str  # name in this side's certificate; "" without TLS
    peer: str  # name in the other side's; "" without TLS
    side: Literal["server", "client"]
    tokens: int  # most of the session
    passes: int  # most of it: new tokens, and messages


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A ticket that has material, or gets some, without what is in it."""

    ticket: bytes
    name: str  # the beginning of the ticket's id, for people
    state: Literal["growing", "ready"]
    tokens: int
    passes: int
    size: int  # bytes of arrays that are kept
    model: str  # digest
    peer: str
    made: float  # seconds since 1970
    expires: float


class Row(msgspec.Struct, frozen=True):
    """What the index has of a ticket."""

    binding: Binding
    state: str
    size: int  # bytes of arrays, as they were announced
    expires: float
    run: bytes
    digest: bytes


def short(ticket: bytes) -> str:
    """The beginning of a ticket's id, by which people tell it from others."""
    return ticket.hex()[:8]


def encoded(binding: Binding) -> bytes:
    """The same bytes for equal bindings."""
    return msgspec.json.encode(binding, order="deterministic")


def find(index: sqlite3.Connection, ticket: bytes) -> Row | None:
    """What the index has of a ticket; None if it has nothing."""
    query = "SELECT binding, state, size, expires, run, digest FROM tickets WHERE id = ?"
    found = index.execute(query, (ticket,)).fetchone()
    return None if found is None else Row(msgspec.json.decode(found[0], type=Binding), *found[1:])


def known(index: sqlite3.Connection, ticket: bytes) -> Row:
    """What the index has of a ticket (`UserError` if it has nothing)."""
    if (row := find(index, ticket)) is None:
        raise UserError(f"ticket {short(ticket)} is not in this store")
    return row


def must_be(ticket: bytes, row: Row, state: str) -> None:
    """Refuse a ticket in any other state (`UserError`)."""
    if row.state != state:
        raise UserError(f"ticket {short(ticket)} {_REFUSED[row.state]}")


def must_fit(ticket: bytes, row: Row, binding: Binding) -> None:
    """Refuse a ticket for anything that it was not prepared for (`UserError`, which names nobody)."""
    for field, words in _OTHERS.items():
        if getattr(row.binding, field) != getattr(binding, field):
            raise UserError(f"ticket {short(ticket)} was prepared for {words}")
    for what in ("tokens", "passes"):
        had, wanted = getattr(row.binding, what), getattr(binding, what)
        if had < wanted:
            raise UserError(f"ticket {short(ticket)} was prepared for {had} {what}, not {wanted}")


def state_for(row: Row | None, binding: Binding, now: float) -> State:
    """See `State`: as the other side, which the binding names, is told; nothing of tickets that are not its own."""
    if row is None or row.binding.peer != binding.peer:
        return "unknown"
    if row.state != "ready" or row.expires <= now:  # one that grows is prepared anew, with other numbers
        return "gone"
    size = {"tokens": row.binding.tokens, "passes": row.binding.passes}
    return "ready" if msgspec.structs.replace(binding, **size) == row.binding else "other"


def parts_of(index: sqlite3.Connection, ticket: bytes) -> dict[str, PartFile]:
    """The ticket's parts by name."""
    rows = index.execute("SELECT part, file FROM parts WHERE ticket = ? ORDER BY part", (ticket,))
    return {part: msgspec.json.decode(file, type=PartFile) for part, file in rows}


def bytes_of(index: sqlite3.Connection, ticket: bytes) -> int:
    """Bytes of the arrays that are kept of a ticket."""
    return int(index.execute("SELECT COALESCE(SUM(size), 0) FROM parts WHERE ticket = ?", (ticket,)).fetchone()[0])


def digest_of(parts: Mapping[str, PartFile]) -> bytes:
    """Of all that was there when a ticket became ready, so that none can be missing later."""
    return hashlib.sha256(msgspec.json.encode([(part, parts[part]) for part in sorted(parts)])).digest()


def only(entries: list[Entry], beginning: str) -> bytes:
    """The one ticket whose id begins so (`UserError` if there is none, or several)."""
    found = [entry.ticket for entry in entries if entry.ticket.hex().startswith(beginning.lower())]
    if len(found) != 1 or not beginning:
        raise UserError(f"{'several tickets begin' if found else 'no ticket begins'} with {beginning!r}")
    return found[0]
