"""The index of a store of one-time material: an SQLite file that several processes use, and that is whole or not used.

The journal is the one that is deleted at the end (not WAL): then one file is the whole truth, and a file that was cut
short is seen. A log beside the file, cut short, would leave an earlier state that looks sound.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from entropi.errors import UserError
from entropi.private.preparation.files import for_this_user_only, hold, sync

FILE = "index.sqlite"
VERSION = 1  # of the tables; an index of any other is not read
PATIENCE_SECONDS = 30.0  # for other processes to let go of the index
# `run` names who prepares a growing ticket; of one taken or destroyed, `expires` is when it is forgotten.
_TABLES = (
    "CREATE TABLE tickets (id BLOB PRIMARY KEY CHECK (length(id) = 16), binding BLOB NOT NULL, peer TEXT NOT NULL,"
    " state TEXT NOT NULL CHECK (state IN ('growing', 'ready', 'taken', 'destroyed')), size INTEGER NOT NULL,"
    " made REAL NOT NULL, expires REAL NOT NULL, run BLOB NOT NULL, digest BLOB NOT NULL)",
    "CREATE TABLE parts (ticket BLOB NOT NULL, part TEXT NOT NULL, size INTEGER NOT NULL, file BLOB NOT NULL,"
    " PRIMARY KEY (ticket, part))",
    f"PRAGMA user_version = {VERSION}",
)


class Index:
    """The index of a folder, which is locked as long as this is open.

    Args:
        folder: for this user only.
        damaged: called before a new index is made, because there is none or it is damaged; nobody else is in the
            folder then.

    Raises:
        UserError: as all methods do.
    """

    def __init__(self, folder: Path, damaged: Callable[[], None]) -> None:
        self._folder, self._path = folder, folder / FILE
        self._mutex = threading.Lock()  # whose holder alone uses the connection
        self._held: int | None
        with self.plainly():
            self._held, self._connection = self._open(damaged)

    def close(self) -> None:
        """Let go of the file and the folder."""
        with self._mutex:
            self._connection.close()
            if self._held is not None:
                os.close(self._held)
            self._held = None

    @contextlib.contextmanager
    def plainly(self) -> Iterator[None]:
        """Turn what SQLite and the system refuse into a `UserError`."""
        try:
            yield
        except sqlite3.Error as error:
            raise UserError(f"cannot use the index {self._path}: {error}") from None
        except OSError as error:
            raise UserError(f"cannot keep prepared material in {self._folder}: {error.strerror or error}") from None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """The tables, which no other process changes meanwhile; at the end what was changed is on the disk."""
        with self.plainly(), self._mutex:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _open(self, damaged: Callable[[], None]) -> tuple[int, sqlite3.Connection]:
        """The folder's lock and the tables, which only a process that is alone makes anew."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:  # others may be opening it
            for alone in (True, False):
                if (held := hold(self._folder, alone=alone)) is None:
                    continue
                try:
                    connection = self._sound() or (self._made_anew(damaged) if alone else None)
                    if connection is not None:
                        fcntl.flock(held, fcntl.LOCK_SH)
                        return held, connection
                except BaseException:
                    os.close(held)
                    raise
                os.close(held)
            time.sleep(0.01)
        raise UserError(f"the index {self._path} is damaged, and another process has it open: end that one first")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode=rw",
            timeout=PATIENCE_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            uri=True,
        )
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = EXTRA")  # what is committed is on the disk, the journal's end as well
        return connection

    def _sound(self) -> sqlite3.Connection | None:
        """The tables, if they are there and nothing of them is missing."""
        if not self._path.exists():
            return None
        for_this_user_only(self._path)
        connection: sqlite3.Connection | None = None
        try:
            connection = self._connect()
            connection.execute("BEGIN IMMEDIATE")  # which first takes back what a crash left half written
            version, pages, page = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("user_version", "page_count", "page_size")
            )
            whole = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            connection.execute("COMMIT")
            if whole and version == VERSION and pages * page == self._path.stat().st_size:
                return connection
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # busy, or the disk fails: no sign of damage
                raise
        if connection is not None:
            connection.close()
        return None

    def _made_anew(self, damaged: Callable[[], None]) -> sqlite3.Connection:
        damaged()  # first, so that a crash leaves no material beside a new index
        for suffix in ("", "-journal", "-wal", "-shm"):
            (self._folder / f"{FILE}{suffix}").unlink(missing_ok=True)
        os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        connection = self._connect()
        connection.execute("BEGIN IMMEDIATE")
        for statement in _TABLES:
            connection.execute(statement)
        connection.execute("COMMIT")
        sync(self._folder)
        return connection
