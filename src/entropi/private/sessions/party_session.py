"""A client's side of any session: its place in the queue, its party, the engines' link, and why it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp

from entropi.console import without_controls
from entropi.errors import UserError
from entropi.private.sessions.party_handle import GRACE_SECONDS, Party
from entropi.private.wire.channel import (
    HANDSHAKE_SECONDS,
    LAST_WORDS_SECONDS,
    LostServer,
    ServerAddress,
    decode,
    receive,
)
from entropi.private.wire.messages import Accepted, Next, Prepare, Prepared, Queued, Refused, Start, encode
from entropi.private.wire.tunnel import LinkBroken, Tunnel

LINK_SECONDS = 60


class PartySession:
    """One connection over which this side's party computes with the server's.

    Args:
        status: told when something happens that a person may want to know.
    """

    def __init__(
        self, server: ServerAddress, socket: aiohttp.ClientWebSocketResponse, status: Callable[[str], None]
    ) -> None:
        self.server, self.where, self.socket, self.status = server, server.name, socket, status
        self.kept = asyncio.Event()  # the server has its half of prepared material

    async def finish(
        self, party: Party, tunnel: Tunnel, working: Coroutine[Any, Any, None], grace: float = GRACE_SECONDS
    ) -> None:
        """Everything from the start of the party on: `working` follows it, while its link is carried.

        Args:
            grace: seconds that the party may take to end once its link is closed.
        """
        work = asyncio.create_task(working)
        watch = asyncio.create_task(self._watch_server(tunnel))
        link = asyncio.create_task(self._watch_link(tunnel, party, grace))
        suspended = asyncio.create_task(party.suspended())
        tasks = {work, watch, link, suspended}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() or work.exception() is not None:
                # The server's own words say more about a failure than the broken link they follow from.
                await asyncio.wait({watch}, timeout=LAST_WORDS_SECONDS)
                if watch.done():
                    watch.result()
            if suspended.done():  # the server's slot is not ours for as long as nothing happens here
                raise UserError("this side's private computation was stopped by somebody")
            if not work.done():
                link.result()
            work.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await party.stop()

    async def wait_for_slot(self) -> Accepted:
        """Wait until the server takes the session."""
        message = await receive(self.socket, self.where, Queued | Accepted, HANDSHAKE_SECONDS)
        while isinstance(message, Queued):
            before = f", {message.ahead} before this one" if message.ahead else ""
            self.status(f"{self.where} is busy; waiting in its queue{before}")
            message = await receive(self.socket, self.where, Queued | Accepted, None)
        return message

    async def say(self, message: Start | Prepare | Next) -> None:
        """Send the server a control message."""
        await self.socket.send_str(encode(message).decode())

    async def _watch_server(self, tunnel: Tunnel) -> None:
        """Carry the engines' link; any control message but that the server keeps its half ends the session."""
        while True:
            message = await self.socket.receive()
            text = message.type == aiohttp.WSMsgType.TEXT
            if text and isinstance(decode(message.data, self.where), Prepared):
                self.kept.set()
                continue
            if message.type != aiohttp.WSMsgType.BINARY:
                break
            try:
                await tunnel.receive(message.data)
            except LinkBroken as error:  # not to be tried again; the server is told why
                await self.socket.close(code=aiohttp.WSCloseCode.POLICY_VIOLATION, message=str(error)[:120].encode())
                raise UserError(f"{self.where} does not follow the protocol: {error}") from None
        if message.type == aiohttp.WSMsgType.TEXT:
            refused = decode(message.data, self.where)
            if isinstance(refused, Refused):
                raise LostServer(f"{self.where} ended the session: {without_controls(refused.reason)}")
            raise UserError(f"{self.where} does not follow the protocol")
        raise LostServer(f"{self.where} went away in the middle of the session")

    async def _watch_link(self, tunnel: Tunnel, party: Party, grace: float) -> None:
        """Raise once the engines' link is broken although this side's party has not finished."""
        await party.without_link(tunnel, grace)
        raise LostServer(f"the engines' link with {self.where} broke")
