"""The queue: sessions that may compute at a time, first come, first served."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any

from aiohttp import web

from entropi.private.admission.limits import Limits
from entropi.private.admission.monitoring import Counters
from entropi.private.wire.messages import (
    Next,
    Queued,
)
from entropi.private.wire.server_channel import Refusal, expect, send

QUEUE_SECONDS = 2.0  # between two looks at a client's place in the queue


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
