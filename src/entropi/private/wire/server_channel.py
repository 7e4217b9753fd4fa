"""A server's control channel to one client: messages sent and received in time, and what ends a session."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

from entropi.private.wire.messages import (
    MAX_CLIENT_MESSAGE,
    BadMessage,
    FromServer,
    Hello,
    Next,
    Prepare,
    Start,
    Tickets,
    decode_from_client,
    encode,
)

MOST_PINGS = 60  # of one client within a minute; ours sends one in ten seconds
SEND_SECONDS = 30.0  # for a message to leave; a peer that does not read is gone
FRAME = 64 << 10  # bytes of the welcome that leave at a time, and so about what one client's buffer holds of it


class SessionError(Exception):
    """Something that ends one session; the text is sent to the client."""


class Refusal(SessionError):
    """A session that does not begin."""


class Flood(Refusal):
    """A client that would keep the server busy for as long as it is listened to."""


class ClientLeft(SessionError):
    """The client closed the connection, or it broke."""


class ControlChannel(web.WebSocketResponse):
    """The server's end of a client's control channel: one message in a turn of the event loop, and few pings.

    What has arrived in one piece would otherwise be worked off in one turn, a hundred thousand pings and their answers
    among it, while every other client waits.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(autoping=False, **options)
        self._pings, self._minute = 0, time.monotonic()

    async def receive(self, timeout: float | None = None) -> aiohttp.WSMessage:
        """The next message that is no ping or pong.

        Raises:
            Flood: there are too many of these.
        """
        while True:
            await asyncio.sleep(0)
            message = await super().receive(timeout)
            if message.type not in (aiohttp.WSMsgType.PING, aiohttp.WSMsgType.PONG):
                return message
            if time.monotonic() - self._minute > 60:
                self._pings, self._minute = 0, time.monotonic()
            self._pings += 1
            if self._pings > MOST_PINGS:
                raise Flood(f"more than {MOST_PINGS} pings within a minute")
            if message.type == aiohttp.WSMsgType.PING:
                await leave_in_time(self.pong(message.data))


async def send(socket: web.WebSocketResponse, message: FromServer) -> None:
    """A control message; `ClientLeft` if the client does not take it."""
    await leave_in_time(socket.send_str(encode(message).decode()))


async def leave_in_time(sending: Awaitable[object], seconds: float = SEND_SECONDS) -> None:
    """Wait for something to be sent; `ClientLeft` if the client does not take it."""
    try:
        await asyncio.wait_for(sending, seconds)
    except asyncio.TimeoutError:
        raise ClientLeft(f"the client took nothing for {seconds:g} s") from None


M = TypeVar("M", bound=Hello | Start | Prepare | Tickets | Next)


async def receive(socket: web.WebSocketResponse, *kinds: type[M], timeout: float) -> M:
    """The next message, which must be of one of `kinds`."""
    try:
        return expect(await asyncio.wait_for(socket.receive(), timeout), *kinds)
    except asyncio.TimeoutError:
        raise Refusal(f"no {kinds[0].__name__} message within {timeout} s") from None


def expect(message: aiohttp.WSMessage, *kinds: type[M]) -> M:
    """A control message, which must be of one of `kinds`."""
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
    if not isinstance(decoded, kinds):
        raise Refusal(f"expected a {kinds[0].__name__} message")
    return decoded


def text_frames(message: bytes, size: int = FRAME) -> tuple[bytes, ...]:
    """A WebSocket text message in fragments of at most `size` bytes, as a server sends them (RFC 6455, section 5.4)."""
    parts = [message[start : start + size] for start in range(0, len(message), size)] or [b""]
    frames = []
    for index, part in enumerate(parts):
        first = (aiohttp.WSMsgType.TEXT if index == 0 else 0) | (0x80 if index == len(parts) - 1 else 0)
        if len(part) < 126:
            head = struct.pack("!BB", first, len(part))
        elif len(part) < 1 << 16:
            head = struct.pack("!BBH", first, 126, len(part))
        else:
            head = struct.pack("!BBQ", first, 127, len(part))
        frames.append(head + part)
    return tuple(frames)
