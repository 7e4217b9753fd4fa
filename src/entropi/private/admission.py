"""Which clients a server lets in, when, and what it takes from them: limits, the queue, messages."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

from entropi.errors import UserError
from entropi.private.messages import (
    MAX_CLIENT_MESSAGE,
    BadMessage,
    FromServer,
    Hello,
    Next,
    Queued,
    Start,
    decode_from_client,
    encode,
)
from entropi.private.monitoring import Counters

QUEUE_SECONDS = 2.0  # between two looks at a client's place in the queue
MOST_MEMORY_GB = 1_000_000  # which no machine has; a system's numbers end at 2^63 bytes
SEND_SECONDS = 30.0  # for a message to leave; a peer that does not read is gone


class SessionError(Exception):
    """Something that ends one session; the text is sent to the client."""


class Refusal(SessionError):
    """A session that does not begin."""


class ClientLeft(SessionError):
    """The client closed the connection, or it broke."""


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    Attributes:
        max_sessions: computing at a time.
        max_queue: clients waiting for one of these; 0 refuses whoever finds all slots taken.
        queue_seconds: the longest wait.
        max_new_tokens: that a session may ask for.
        session_seconds: from the end of the queue on.
        stall_seconds: that may pass without any operation finished or token asked for.
        memory_gb: address space that a session's process may write to, in 10^9 bytes; None for what its model and
            length need, with room; 0 for no limit.
        client_sessions: computing or waiting at a time, of one client certificate; None for no limit.
        client_tokens: generated within a day, of one client certificate; None for no limit.
        max_startups: connections that have no session yet.
        source_startups: of these, of one address or client certificate.

    Raises:
        UserError: a limit that would let nobody in.
    """

    max_sessions: int = 1
    max_queue: int = 8
    queue_seconds: float = 600.0
    max_new_tokens: int = 64
    session_seconds: float = 3600.0
    stall_seconds: float = 600.0
    memory_gb: float | None = None
    client_sessions: int | None = None
    client_tokens: int | None = None
    max_startups: int = 64
    source_startups: int = 48

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (value > 0 or (name in ("max_queue", "memory_gb") and value == 0)):
                may = "cannot be negative" if name in ("max_queue", "memory_gb") else "must be positive"
                raise UserError(f"{name} is {value} but {may}")
        if self.memory_gb is not None and self.memory_gb > MOST_MEMORY_GB:
            raise UserError(f"memory_gb is {self.memory_gb} but must not be more than {MOST_MEMORY_GB:,}")


class Slots:
    """Sessions that may compute at a time, first come, first served."""

    def __init__(self, limits: Limits, counters: Counters) -> None:
        self._limits, self._counters = limits, counters
        self._free = limits.max_sessions
        self._waiting: list[asyncio.Future[None]] = []

    @contextlib.asynccontextmanager
    async def slot(
        self, socket: web.WebSocketResponse, admitted: AbstractContextManager[None] | None = None
    ) -> AsyncIterator[None]:
        """One slot; the client is told how many are before it, and `Refusal` if there is no room to wait.

        `admitted` is entered once it has a slot or a place in the queue.
        """
        queued = not (self._free and not self._waiting)
        if queued and len(self._waiting) >= self._limits.max_queue:
            raise Refusal("the server is busy with other sessions; try again later")
        with admitted or contextlib.nullcontext():
            if queued:
                await self._wait(socket)
            else:
                self._free -= 1
            self._counters.sessions += 1
            try:
                yield
            finally:
                self._counters.sessions -= 1
                self._free += 1
                self._call_next()

    def _call_next(self) -> None:
        for turn in self._waiting:
            if self._free and not turn.done():
                self._free -= 1
                turn.set_result(None)

    async def _wait(self, socket: web.WebSocketResponse) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._counters.waiting += 1
        leaves = asyncio.create_task(socket.receive())
        # A session that is just ending may make room before the client needs to be told that there is none.
        deadline, told = time.monotonic() + self._limits.queue_seconds, -1
        try:
            while not turn.done():
                if leaves.done():
                    expect(leaves.result(), Next)  # nothing is expected but that the client leaves
                    raise Refusal("this is not the time for a Next message")
                if time.monotonic() > deadline:
                    raise Refusal("the server was busy with other sessions for too long; try again later")
                pending: set[asyncio.Future[Any]] = {turn, leaves}
                patience = min(QUEUE_SECONDS, max(deadline - time.monotonic(), 0.0))
                await asyncio.wait(pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if not (turn.done() or leaves.done()) and told != (told := self._waiting.index(turn)):
                    await send(socket, Queued(told))
        except BaseException:
            if turn.done():  # it came just now, and somebody else may have it
                self._free += 1
            turn.cancel()
            raise
        finally:
            self._waiting.remove(turn)
            self._counters.waiting -= 1
            leaves.cancel()
            await asyncio.gather(leaves, return_exceptions=True)
            self._call_next()


async def send(socket: web.WebSocketResponse, message: FromServer) -> None:
    """A control message; `ClientLeft` if the client does not take it."""
    await leave_in_time(socket.send_str(encode(message).decode()))


async def leave_in_time(sending: Awaitable[object], seconds: float = SEND_SECONDS) -> None:
    """Wait for something to be sent; `ClientLeft` if the client does not take it."""
    try:
        await asyncio.wait_for(sending, seconds)
    except asyncio.TimeoutError:
        raise ClientLeft(f"the client took nothing for {seconds:g} s") from None


M = TypeVar("M", Hello, Start, Next)


async def receive(socket: web.WebSocketResponse, kind: type[M], timeout: float) -> M:
    """The next message, which must be of `kind`."""
    try:
        return expect(await asyncio.wait_for(socket.receive(), timeout), kind)
    except asyncio.TimeoutError:
        raise Refusal(f"no {kind.__name__} message within {timeout} s") from None


def expect(message: aiohttp.WSMessage, kind: type[M]) -> M:
    """A control message, which must be of `kind`."""
    if message.type == aiohttp.WSMsgType.BINARY:
        raise Refusal("that message is not of this protocol")
    if message.type != aiohttp.WSMsgType.TEXT:
        raise ClientLeft("the client left")
    try:
        if len(message.data) > MAX_CLIENT_MESSAGE:
            raise BadMessage("too long")
        decoded = decode_from_client(message.data)
    except BadMessage:
        raise Refusal("that message is not of this protocol") from None
    if not isinstance(decoded, kind):
        raise Refusal(f"expected a {kind.__name__} message")
    return decoded
