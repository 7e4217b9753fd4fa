"""The store of one-time material: what was prepared for one session is a ticket, is taken whole, once, and destroyed.

A mask that is used twice reveals the difference of the two secrets under it. So nothing leaves the store before its
ticket is marked as taken *and* its files are gone, both on the disk: after a crash at any moment either nobody was
given the material, or it is not there any more. Where the index and the files disagree in any way, for instance after
a power failure, a full disk or a restored backup, the material is destroyed; it can be prepared again.

What deletion can promise: the files have no names any more, and the file system gives their blocks to others. Solid
state disks, journals, snapshots and backups may keep copies that no program can overwrite, so none is tried. Where that
matters, keep the store on a disk encrypted under a key that can be destroyed, or in memory (tmpfs).

What no store can see by itself: a file system or virtual machine set back to an earlier state as a whole. The other
side remembers what it took and refuses, so that one side may be set back, and never both.

Every method blocks, those of `Growth` as well: all wait for the index, for which other processes compete, and most for
files, `add` and `take` as long as it takes to write or read them. An event loop calls them in threads, which may be
several at once. A store that is open must not be taken through a fork.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from entropi.errors import UserError
from entropi.private.preparation.claims import Claim, claim, remove_abandoned
from entropi.private.preparation.files import (
    Arrays,
    PartFile,
    hold,
    is_unchanged,
    private_folder,
    read_part,
    remove_folder,
    sync,
)
from entropi.private.preparation.growth import Growth
from entropi.private.preparation.index import Index
from entropi.private.preparation.tickets import (
    ID_BYTES,
    LIVE,
    Binding,
    Entry,
    Row,
    State,
    bytes_of,
    digest_of,
    encoded,
    find,
    known,
    must_be,
    must_fit,
    only,
    parts_of,
    short,
    state_for,
)

DAY_SECONDS = 24 * 3600.0
MOST_EXPIRES_SECONDS = 30 * DAY_SECONDS
# How long it is remembered that a ticket was taken or destroyed. The other side's half has expired by then, whatever
# its store was told, with a day for clocks that differ. What is forgotten is unknown, which is refused as well.
REMEMBERED_SECONDS = MOST_EXPIRES_SECONDS + DAY_SECONDS
MATERIAL, CLAIMS = "material", "claims"  # folders
log = logging.getLogger("entropi.preparation")


class Quota(msgspec.Struct, frozen=True, kw_only=True):
    """What may be kept at most, in all and for one peer; tickets that are being prepared count in full."""

    size: int = 50_000_000_000  # bytes of arrays
    tickets: int = 1000
    peer_size: int = 10_000_000_000
    peer_tickets: int = 50


MOST_GB, MOST_TICKETS = 1e6, 1000


def quota_for_one(gigabytes: float, tickets: int, size_option: str, count_option: str) -> Quota:
    """A quota with these limits for one peer, and in all no less than usually; `UserError` names the option."""
    if not 0 < gigabytes <= MOST_GB:
        raise UserError(f"{size_option} is {gigabytes:g} but must be more than 0 and at most {MOST_GB:,.0f}")
    if not 1 <= tickets <= MOST_TICKETS:
        raise UserError(f"{count_option} is {tickets} but must be between 1 and {MOST_TICKETS:,}")
    size = int(gigabytes * 1e9)
    return Quota(size=max(size, Quota().size), peer_size=size, peer_tickets=tickets)


class Store:
    """One side's material, in a folder that several processes may use at once.

    Args:
        folder: made if it is not there, with mode 0700.
        expires: seconds after which a ticket is destroyed, used or not.
        clock: seconds since 1970.

    Raises:
        UserError: as every method does, in one line without anything secret; here if the folder cannot be used, or
            `expires` is not within 30 days.
    """

    def __init__(
        self,
        folder: Path,
        *,
        expires: float = 7 * DAY_SECONDS,
        quota: Quota | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not 0 < expires <= MOST_EXPIRES_SECONDS:
            most = MOST_EXPIRES_SECONDS / DAY_SECONDS
            raise UserError(f"prepared material expires after more than 0 and up to {most:g} days")
        self._folder = folder.resolve()
        self._material, self._claims = self._folder / MATERIAL, self._folder / CLAIMS
        self._expires, self._quota, self._clock = expires, quota or Quota(), clock
        private_folder(self._folder)
        private_folder(self._material)
        private_folder(self._claims)
        self._index = Index(self._folder, self._destroy_everything)
        try:
            self.sweep()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        self._index.close()

    def grow(self, ticket: bytes, binding: Binding, size: int, *, reopen: bool = False) -> Growth:
        """Begin to prepare a ticket, or go on with one after a crash or a broken connection.

        Whoever did so before can add nothing any more: what two connections prepared must not be mixed.

        Args:
            ticket: id of 16 bytes, from a secure generator, which both sides use.
            size: bytes of all arrays together, which the quota counts from now on.
            reopen: go on with a ticket that is ready here too, or begin one anew that was destroyed: the other side,
                which asks for that, has not got to its end, so that neither has ever used it. Never one that was taken.
        """
        if len(ticket) != ID_BYTES or size < 1:
            raise ValueError("a ticket has 16 bytes and a size")
        self.sweep()
        run, now = secrets.token_bytes(8), self._clock()
        with self._index.transaction() as index:
            if (row := find(index, ticket)) is not None:
                must_fit(ticket, row, binding)
                if reopen and row.state == "destroyed":
                    index.execute("DELETE FROM tickets WHERE id = ?", (ticket,))
                    row = None
                elif not (reopen and row.state == "ready"):
                    must_be(ticket, row, "growing")
            if row is not None:
                if row.size != size:
                    raise UserError(f"ticket {short(ticket)} was begun with another size")
                index.execute("UPDATE tickets SET state = 'growing', run = ? WHERE id = ?", (run, ticket))
            else:
                room, reason = min(self._rooms(index, size, binding.peer))
                if room < 1:
                    raise UserError(f"there is no room for the material of {binding.tokens} tokens: {reason}")
                values = (ticket, encoded(binding), binding.peer, size, now, now + self._expires, run)
                index.execute("INSERT INTO tickets VALUES (?, ?, ?, 'growing', ?, ?, ?, ?, x'')", values)
                self._path(ticket).mkdir(mode=0o700, exist_ok=True)
                sync(self._material)
        return Growth(self._index, self._path(ticket), self.sweep, self._clock, ticket, run)

    def claim(self, ticket: bytes) -> Claim | None:
        """Keep others who claim tickets first from this one, be it still to be begun; None while somebody has it.

        What is known of the ticket may have changed until it was claimed.
        """
        with self._index.plainly():
            return claim(self._claims / ticket.hex())

    def ready(self, binding: Binding) -> list[tuple[Binding, bytes]]:
        """Tickets to offer to the other side, of as many tokens and passes or more, smallest and oldest first.

        Only `take` takes one.
        """
        query = "SELECT id, binding FROM tickets WHERE peer = ? AND state = 'ready' AND expires > ? ORDER BY made, id"
        with self._index.transaction() as index:
            rows = index.execute(query, (binding.peer, self._clock())).fetchall()
        found = [(msgspec.json.decode(text, type=Binding), bytes(ticket)) for ticket, text in rows]
        same = msgspec.structs.replace
        fitting = [
            (other, ticket)
            for other, ticket in found
            if other.tokens >= binding.tokens
            and other.passes >= binding.passes
            and same(other, tokens=binding.tokens, passes=binding.passes) == binding
        ]
        return sorted(fitting, key=lambda one: (one[0].tokens, one[0].passes))

    def growing(self, binding: Binding) -> list[bytes]:
        """Tickets to go on with, of exactly as many tokens and passes, the oldest first."""
        query = "SELECT id FROM tickets WHERE binding = ? AND state = 'growing' AND expires > ? ORDER BY made, id"
        with self._index.transaction() as index:
            return [bytes(ticket) for (ticket,) in index.execute(query, (encoded(binding), self._clock())).fetchall()]

    def states(self, tickets: Sequence[bytes], binding: Binding) -> list[State]:
        """What the other side, which the binding names, may count on of tickets that it has its half of."""
        with self._index.transaction() as index:
            return [state_for(find(index, ticket), binding, self._clock()) for ticket in tickets]

    def take(self, ticket: bytes, binding: Binding) -> dict[str, Arrays]:
        """All parts of a ticket, which from then on is nowhere but in the result.

        Returns:
            The arrays of every part by name, in memory, once it is on the disk that they are taken and deleted.

        Raises:
            UserError: it is unknown, not ready, taken, destroyed or expired, or its files are damaged; for another
                binding it stays as it is.
        """
        with self._index.plainly():
            row, parts, held = self._claim(ticket, binding)
            try:
                if row.expires <= self._clock():
                    raise UserError(f"ticket {short(ticket)} has expired")
                found = {part: read_part(held, file) if held is not None else None for part, file in parts.items()}
                material = {part: arrays for part, arrays in found.items() if arrays is not None}
                if len(material) < len(found) or digest_of(parts) != row.digest:
                    raise UserError(f"the files of ticket {short(ticket)} are damaged: it was destroyed")
                return material
            finally:
                self._erase(ticket, parts, held)

    def _claim(self, ticket: bytes, binding: Binding) -> tuple[Row, dict[str, PartFile], int | None]:
        """Mark a ticket as taken, on the disk; the descriptor returned keeps other processes from its files."""
        held: int | None = None
        try:
            with self._index.transaction() as index:
                row = known(index, ticket)
                must_fit(ticket, row, binding)
                must_be(ticket, row, "ready")
                parts = parts_of(index, ticket)
                with contextlib.suppress(FileNotFoundError):
                    held = hold(self._path(ticket), alone=False)
                self._bury(index, ticket, "taken" if row.expires > self._clock() else "destroyed")
            sync(self._folder)
        except BaseException:
            if held is not None:
                os.close(held)
            raise
        return row, parts, held

    def _erase(self, ticket: bytes, parts: Mapping[str, PartFile], held: int | None) -> None:
        if held is not None:
            try:
                for file in parts.values():
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(file.name, dir_fd=held)
                os.fsync(held)
            finally:
                os.close(held)
        remove_folder(self._path(ticket))

    def discard(self, *tickets: bytes, peer: str | None = None) -> int:
        """Destroy those of these tickets that have material, or get some; returns how many.

        Args:
            peer: those of this other side alone, where one is given.
        """
        found = []
        with self._index.transaction() as index:
            for ticket in tickets:
                row = find(index, ticket)
                if row is None or row.state not in LIVE or peer not in (None, row.binding.peer):
                    continue
                self._bury(index, ticket, "destroyed")
                found.append(ticket)
        with self._index.plainly():
            for ticket in found:
                remove_folder(self._path(ticket))
        return len(found)

    def room_for(self, size: int, peer: str) -> int:
        """How many further tickets of so many bytes may be kept for a peer, by quota and by what the disk has free."""
        self.sweep()
        with self._index.transaction() as index:
            return max(0, min(self._rooms(index, size, peer))[0])

    def entries(self) -> list[Entry]:
        """What there is, the oldest first; without what was taken or destroyed."""
        query = "SELECT id, state, binding, made, expires FROM tickets WHERE state IN (?, ?) ORDER BY made, id"
        entries = []
        with self._index.transaction() as index:
            for ticket, state, text, made, expires in index.execute(query, LIVE).fetchall():
                binding, size = msgspec.json.decode(text, type=Binding), bytes_of(index, ticket)
                entry = Entry(
                    ticket=ticket,
                    name=short(ticket),
                    state=state,
                    tokens=binding.tokens,
                    passes=binding.passes,
                    size=size,
                    model=binding.model,
                    peer=binding.peer,
                    made=made,
                    expires=expires,
                )
                entries.append(entry)
        return entries

    def chosen(self, which: Collection[str] | Literal["all", "expired"]) -> list[Entry]:
        """What there is of tickets by the beginnings of their ids, or all, or those that have expired."""
        entries, now = self.entries(), self._clock()
        if isinstance(which, str):
            if which not in ("all", "expired"):
                raise ValueError("beginnings of ids come as a list")
            return [entry for entry in entries if which == "all" or entry.expires <= now]
        tickets = {only(entries, beginning) for beginning in which}
        return [entry for entry in entries if entry.ticket in tickets]

    def delete(self, which: Collection[str] | Literal["all", "expired"]) -> int:
        """Destroy what is `chosen`; returns how many there were."""
        return self.discard(*(entry.ticket for entry in self.chosen(which)))

    def sweep(self) -> None:
        """Destroy what has expired, and what crashes, changes of files and restored copies left; done on opening."""
        damaged = 0
        with self._index.transaction() as index:
            now = self._clock()
            index.execute("DELETE FROM tickets WHERE state NOT IN (?, ?) AND expires <= ?", (*LIVE, now))
            for ticket, expires in index.execute(
                "SELECT id, expires FROM tickets WHERE state IN (?, ?)", LIVE
            ).fetchall():
                if expires <= now or not self._is_whole(index, ticket):
                    damaged += expires > now
                    self._bury(index, ticket, "destroyed")
            states = {ticket.hex(): state for ticket, state in index.execute("SELECT id, state FROM tickets")}
            left = [folder for folder in self._folders() if states.get(folder.name) not in LIVE]
            for folder in left:
                if folder.name not in states:
                    remove_folder(folder)  # at once: nobody begins a ticket of this name meanwhile
        with self._index.plainly():
            for folder in left:
                remove_folder(folder)
            # Those of live tickets are left, so that nobody is kept from one by this.
            remove_abandoned(path for path in self._claims.iterdir() if states.get(path.name) not in LIVE)
        if damaged:
            log.warning("destroyed %d prepared tickets whose files are missing, changed or restored", damaged)

    def _destroy_everything(self) -> None:
        """For want of an index that says what was taken."""
        lost = self._folders()
        for folder in lost:
            remove_folder(folder)
        if lost:
            log.warning("the index of %s is damaged or missing: destroyed %d prepared tickets", self._folder, len(lost))

    def _bury(self, index: sqlite3.Connection, ticket: bytes, state: Literal["taken", "destroyed"]) -> None:
        """Keep of a ticket that it was taken or destroyed; nothing if no material was ever made for it."""
        if not index.execute("DELETE FROM parts WHERE ticket = ?", (ticket,)).rowcount:
            index.execute("DELETE FROM tickets WHERE id = ?", (ticket,))
        until = self._clock() + REMEMBERED_SECONDS
        index.execute("UPDATE tickets SET state = ?, expires = ? WHERE id = ?", (state, until, ticket))

    def _rooms(self, index: sqlite3.Connection, size: int, peer: str) -> list[tuple[int, str]]:
        """How many tickets of so many bytes each limit allows still, and the limit in words."""
        query = "SELECT COUNT(*), COALESCE(SUM(size), 0) FROM tickets WHERE state IN (?, ?)"
        tickets, kept = index.execute(query, LIVE).fetchone()
        peer_tickets, peer_kept = index.execute(f"{query} AND peer = ?", (*LIVE, peer)).fetchone()
        (written,) = index.execute("SELECT COALESCE(SUM(size), 0) FROM parts").fetchone()
        status, quota = os.statvfs(self._material), self._quota
        return [
            (quota.tickets - tickets, f"{quota.tickets} tickets are kept at most"),
            ((quota.size - kept) // size, f"{quota.size / 1e9:.3g} GB are kept at most"),
            (quota.peer_tickets - peer_tickets, f"{quota.peer_tickets} tickets are kept at most for one party"),
            ((quota.peer_size - peer_kept) // size, f"{quota.peer_size / 1e9:.3g} GB are kept at most for one party"),
            ((status.f_bavail * status.f_frsize - (kept - written)) // size, "the disk has no room for it"),
        ]

    def _is_whole(self, index: sqlite3.Connection, ticket: bytes) -> bool:
        """Whether all files are as they were written; also removes those that a crash left unfinished."""
        path, row, parts = self._path(ticket), known(index, ticket), parts_of(index, ticket)
        if row.state == "ready" and digest_of(parts) != row.digest:
            return False
        if not (path.is_dir() and all(is_unchanged(path, file) for file in parts.values())):
            return False
        if (held := hold(path, alone=True)) is not None:  # nobody is writing
            try:
                for name in set(os.listdir(path)) - {file.name for file in parts.values()}:
                    os.unlink(path / name)
            finally:
                os.close(held)
        return True

    def _path(self, ticket: bytes) -> Path:
        return self._material / ticket.hex()

    def _folders(self) -> list[Path]:
        """Those of tickets; whatever else somebody may have put there is not ours to remove."""
        paths = [path for path in self._material.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]
        return [path for path in paths if path.is_dir() and not path.is_symlink()]


def default_folder() -> Path:
    """Where a client keeps its material if nobody says: in the user's state folder."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "entropi" / MATERIAL


def existing(folder: Path | None) -> contextlib.AbstractContextManager[Store | None]:
    """The store in this folder, which has to be there, or the one where nobody says, if there is one."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"nothing was prepared: there is no folder {folder}")
    place = folder or default_folder()
    return Store(place) if place.is_dir() else contextlib.nullcontext()
