"""The engines' link through the control channel: one connection, opened by the client, carries everything.

Each engine listens on a Unix socket in a folder of its own that only this user can enter, and connects to another
one there, where its side's tunnel listens. What the engine writes travels as binary messages of the control
channel: one byte, the rank of the engine that opened the connection, and then its bytes. Control messages are text.

So a client needs no open port, what authenticates the control channel authenticates the engines' link, and no other
user of either machine can connect to an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from entropi.private.wire.link_frames import DEFAULT_UNREAD, BadFrame, LinkGuard
from entropi.temporary import swept_folder

CHUNK = 256 << 10  # bytes of one read; a binary message carries them, and what was kept of an incomplete head
MAX_LINK_MESSAGE = CHUNK + 512  # aiohttp refuses messages of its limit and more
CONNECT_SECONDS = 60.0  # for this side's engine to listen: its process may still be starting
_LONGEST_FOLDER = 80  # characters; a Unix socket's path has room for 107
_READ_LIMIT = 4 * CHUNK


class LinkBroken(Exception):
    """The other side sent what is no part of a link; the text is one line."""


def link_folder() -> contextlib.AbstractContextManager[Path]:
    """A folder that only this user can enter, for sockets of both engines and parts of prepared material.

    What a killed process left there goes with the next folder.
    """
    short = len(tempfile.gettempdir()) <= _LONGEST_FOLDER
    return swept_folder("entropi-tunnel-", None if short else Path("/tmp"))


class Tunnel:
    """One side's end of the link; use as an asynchronous context manager.

    Args:
        rank: of this side's engine.
        session: the engines' name for this computation.
        send: sends one binary message over the control channel, returning once there is room for another.
        unread: bytes that this side's engine may leave unread; the other side ends the session with one more.
    """

    def __init__(
        self, rank: int, session: str, send: Callable[[bytes], Awaitable[None]], unread: int = DEFAULT_UNREAD
    ) -> None:
        self.rank, self._send = rank, send
        self._guard = LinkGuard(rank, session, unread)
        # How often the direction of the engines' own messages changed: at most one round (a message latency) each.
        self.turns = 0
        self.sent = self.received = 0  # bytes, the first of every message included
        self._last = -1
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._broken = asyncio.Event()

    async def __aenter__(self) -> Tunnel:
        self._folders = contextlib.ExitStack()
        self._folder = self._folders.enter_context(link_folder())
        self._server = await asyncio.start_unix_server(self._accept, self._path("tunnel"), limit=_READ_LIMIT)
        return self

    @property
    def folder(self) -> Path:
        """That of the sockets, the only one that this side's party may write to."""
        return self._folder

    def _path(self, name: str) -> Path:
        return self.folder / name

    @property
    def links(self) -> tuple[str, str]:
        """Addresses of both engines by rank, as this side's engine is to know them."""
        own, other = f"unix:{self._path('engine')}", f"unix:{self._path('tunnel')}"
        return (own, other) if self.rank == 0 else (other, own)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """This side's engine connects to the other one."""
        if self.rank in self._writers:  # an engine connects once
            self._broken.set()
            writer.transport.abort()
            return
        self._begin(self.rank, reader, writer)

    def _begin(self, stream: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers[stream] = writer
        self._tasks.append(asyncio.create_task(self._pump(stream, reader)))

    async def _pump(self, stream: int, reader: asyncio.StreamReader) -> None:
        """Engine to control channel."""
        head = bytes([stream])
        # BadFrame: this side's engine is ending in disorder, or it is not an engine any more.
        with contextlib.suppress(ConnectionError, BadFrame):
            while data := await reader.read(CHUNK):
                if passing := self._guard.leaves(stream, data):
                    self._count(stream, self.rank)
                    self.sent += len(passing) + 1
                    await self._send(b"".join((head, passing)))
        self._broken.set()

    def _count(self, stream: int, sender: int) -> None:
        """Only what an engine sends on the connection it opened is a message; the way back carries receipts."""
        if stream == sender and sender != self._last:
            self._last = sender
            self.turns += 1

    async def receive(self, message: bytes) -> None:
        """Control channel to engine: one binary message; returns once there is room for another.

        What an engine that is gone or never came does not take is dropped; `broken` tells.

        Raises:
            LinkBroken: the message is no part of a link; this side's engine has got nothing of what is wrong with it.
        """
        stream = message[0] if message else -1
        if stream not in (0, 1):
            raise LinkBroken("that message is no part of the engines' link")
        try:
            if self._broken.is_set():
                return
            if stream not in self._writers:
                if stream == self.rank:
                    raise LinkBroken("an answer to an engine that has not spoken")
                self._begin(stream, *await asyncio.wait_for(self._connect(), CONNECT_SECONDS))
            self._count(stream, 1 - self.rank)
            self.received += len(message)
            writer = self._writers[stream]
            try:
                passing = self._guard.arrives(stream, message, 1)
            except BadFrame as error:
                raise LinkBroken(f"the engines' link carried {error}") from None
            writer.write(passing)
            await writer.drain()
        except (OSError, asyncio.TimeoutError):
            self._broken.set()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To this side's engine, once it listens."""
        while True:
            with contextlib.suppress(OSError):
                return await asyncio.open_unix_connection(self._path("engine"), limit=_READ_LIMIT)
            await asyncio.sleep(0.05)

    @property
    def most_unread(self) -> int:
        """Bytes that this side's engine has left unread at most."""
        return self._guard.most_unread

    async def broken(self) -> None:
        """Return once one of the connections has ended."""
        await self._broken.wait()

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers.values():
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._folders.close()
