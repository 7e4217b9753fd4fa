"""A ticket while its material is made, part by part."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import msgspec
import numpy as np

from entropi.errors import UserError
from entropi.private.preparation.files import hold, write_part
from entropi.private.preparation.index import Index
from entropi.private.preparation.tickets import Row, bytes_of, digest_of, known, must_be, parts_of, short


class Growth:
    """A ticket while its material is made, see `Store.grow`, which after any error also goes on with it."""

    def __init__(
        self,
        index: Index,
        folder: Path,
        sweep: Callable[[], None],
        clock: Callable[[], float],
        ticket: bytes,
        run: bytes,
    ) -> None:
        self.ticket = ticket
        self._index, self._folder, self._sweep, self._clock, self._run = index, folder, sweep, clock, run

    def parts(self) -> frozenset[str]:
        """Names of the parts that are there for good."""
        with self._index.transaction() as index:
            self._ours(index)
            return frozenset(parts_of(index, self.ticket))

    def keep(self, parts: Collection[str]) -> None:
        """Destroy all other parts: those that the other side does not have are to be made again by both."""
        with self._index.transaction() as index:
            self._ours(index)
            for part in set(parts_of(index, self.ticket)) - set(parts):
                index.execute("DELETE FROM parts WHERE ticket = ? AND part = ?", (self.ticket, part))
        self._sweep()

    def expire_within(self, seconds: float) -> float:
        """Let the ticket expire so many seconds from now, if it would later; how many seconds it has then."""
        with self._index.transaction() as index:
            self._ours(index)
            now = self._clock()
            index.execute("UPDATE tickets SET expires = MIN(expires, ?) WHERE id = ?", (now + seconds, self.ticket))
            (expires,) = index.execute("SELECT expires FROM tickets WHERE id = ?", (self.ticket,)).fetchone()
            return float(expires) - now

    def add(self, part: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep one part's arrays (uint64); when it returns they are on the disk, all or none of them."""
        if not arrays or any(array.dtype != np.uint64 for array in arrays.values()):
            raise ValueError("a part has arrays of 64-bit ring elements")
        size = sum(array.nbytes for array in arrays.values())
        with self._index.transaction() as index:
            self._may_add(index, part, size)
            held = hold(self._folder, alone=False)  # so that nobody takes it for what a crash left
        if held is None:
            raise UserError(f"ticket {short(self.ticket)} is being destroyed")
        try:
            with self._index.plainly():
                values = (self.ticket, part, size, msgspec.json.encode(write_part(held, arrays)))
            with self._index.transaction() as index:
                self._may_add(index, part, size)
                index.execute("INSERT INTO parts VALUES (?, ?, ?, ?)", values)
        except BaseException:
            os.close(held)
            with contextlib.suppress(UserError):  # what was written is removed later then
                self._sweep()
            raise
        os.close(held)

    def finish(self) -> None:
        """Say that all parts are there: the ticket is ready and does not change any more."""
        with self._index.transaction() as index:
            self._ours(index)
            if not (parts := parts_of(index, self.ticket)):
                raise UserError(f"ticket {short(self.ticket)} has no material")
            state = (digest_of(parts), self.ticket)
            index.execute("UPDATE tickets SET state = 'ready', digest = ? WHERE id = ?", state)

    def _may_add(self, index: sqlite3.Connection, part: str, size: int) -> None:
        row = self._ours(index)
        if part in parts_of(index, self.ticket):
            raise UserError(f"ticket {short(self.ticket)} has this part already")
        if bytes_of(index, self.ticket) + size > row.size:
            raise UserError(f"ticket {short(self.ticket)} gets more material than was said when it was begun")

    def _ours(self, index: sqlite3.Connection) -> Row:
        row = known(index, self.ticket)
        must_be(self.ticket, row, "growing")
        if row.run != self._run:
            raise UserError(f"ticket {short(self.ticket)} is prepared over another connection now")
        return row
