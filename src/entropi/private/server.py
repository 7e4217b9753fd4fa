"""The model owner's side: a control channel over WebSocket, and one party process for every session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web

from entropi.errors import UserError
from entropi.private.messages import (
    MAX_CLIENT_MESSAGE,
    PROTOCOL_VERSION,
    SERVER,
    Accepted,
    Failed,
    Hello,
    Job,
    Next,
    Refused,
    Revealed,
    Settings,
    StageDone,
    Start,
    Welcome,
    decode_from_client,
    encode,
)
from entropi.private.program import Description
from entropi.private.ranges import check_ranges
from entropi.private.session import WEIGHTS_FILE, Party, free_port, load_folded, parse_address
from entropi.private.versions import engine_version

HANDSHAKE_SECONDS = 10
HEARTBEAT_SECONDS = 5.0
log = logging.getLogger("entropi.server")


class SessionError(Exception):
    """Something that ends one session; the text is sent to the client."""


@dataclass(frozen=True)
class Limits:
    """What the server allows."""

    max_sessions: int = 1
    max_new_tokens: int = 64
    session_seconds: float = 3600.0


@dataclass(frozen=True)
class Host:
    """Everything a session needs of the server."""

    address: str
    folder: Path
    description: Description
    tokenizer: str
    settings: Settings
    limits: Limits
    slots: asyncio.Semaphore


def serve(folder: Path, tokenizer: str, listen: str, settings: Settings, limits: Limits) -> None:
    """Answer clients until interrupted.

    Args:
        folder: of the folded model.
        tokenizer: its JSON; public.
        listen: "HOST:PORT"; port 0 takes a free one, which the log names.

    Raises:
        UserError: an address in use or not allowed, a damaged model, or one whose values would overflow.
    """
    host, port = parse_address(listen)
    description, weights = load_folded(folder)
    name, value = check_ranges(description, weights, settings)
    log.info("largest value on random text: %.3g in %s", value, name)
    del weights
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(host, port, folder, description, tokenizer, settings, limits))
    log.info("stopped")


async def _serve(
    host: str, port: int, folder: Path, description: Description, tokenizer: str, settings: Settings, limits: Limits
) -> None:
    state = Host(host, folder, description, tokenizer, settings, limits, asyncio.Semaphore(limits.max_sessions))

    async def handler(request: web.Request) -> web.WebSocketResponse:
        return await _session(request, state)

    app = web.Application()
    app.router.add_get("/v1/session", handler)
    runner = web.AppRunner(app, handle_signals=True, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        assert site._server is not None
        bound = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        log.info("listening on %s:%d, %s, protocol %s", host, bound, description.architecture, settings.protocol)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def _session(request: web.Request, host: Host) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(max_msg_size=MAX_CLIENT_MESSAGE, heartbeat=HEARTBEAT_SECONDS)
    await socket.prepare(request)
    name = secrets.token_hex(4)
    started = time.monotonic()
    log.info("session %s: opened", name)
    try:
        if host.slots.locked():
            raise SessionError("the server is busy with other sessions; try again later")
        async with host.slots, asyncio.timeout(host.limits.session_seconds):
            await _talk(socket, name, host)
    except SessionError as error:
        log.warning("session %s: %s", name, error)
        await _refuse(socket, str(error))
    except TimeoutError:
        log.warning("session %s: time limit reached", name)
        await _refuse(socket, "the session's time limit was reached")
    finally:
        log.info("session %s: closed after %.1f s", name, time.monotonic() - started)
        with contextlib.suppress(ConnectionError):
            await socket.close()
    return socket


async def _refuse(socket: web.WebSocketResponse, reason: str) -> None:
    with contextlib.suppress(ConnectionError, RuntimeError):
        await socket.send_bytes(encode(Refused(reason=reason[:300])))


async def _talk(socket: web.WebSocketResponse, name: str, host: Host) -> None:
    """Handshake, then one pass for the prompt and one for every `Next`."""
    hello = await _receive(socket, Hello, HANDSHAKE_SECONDS)
    if hello.version != PROTOCOL_VERSION or hello.engine != engine_version():
        raise SessionError(
            f"versions differ: the server speaks protocol {PROTOCOL_VERSION} on engine {engine_version()}"
        )
    await socket.send_bytes(encode(Welcome(host.description, host.tokenizer, host.settings)))
    start = await _receive(socket, Start, HANDSHAKE_SECONDS)
    parse_client_link(start.link)
    if start.max_new_tokens > host.limits.max_new_tokens:
        raise SessionError(f"at most {host.limits.max_new_tokens} new tokens a session are allowed")
    if start.prompt_length + start.max_new_tokens - 1 > host.description.positions:
        raise SessionError(
            f"{start.prompt_length} prompt tokens and {start.max_new_tokens} new ones do not fit the model's "
            f"{host.description.positions} positions"
        )
    link = f"{host.address}:{free_port(host.address)}"
    party = await Party.start(
        Job(
            rank=SERVER,
            links=(link, start.link),
            description=host.description,
            settings=host.settings,
            max_new_tokens=start.max_new_tokens,
            prompt_length=start.prompt_length,
            weights=str(host.folder / WEIGHTS_FILE),
        )
    )
    try:
        await socket.send_bytes(encode(Accepted(link)))
        work = asyncio.create_task(_watch_party(party, name))
        listen = asyncio.create_task(_forward_next(socket, party, start.max_new_tokens))
        done, pending = await asyncio.wait({work, listen}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in done:
            task.result()
    finally:
        await party.stop()


def parse_client_link(link: str) -> None:
    """Refuse a client's engine address that this server must not connect to."""
    try:
        _, port = parse_address(link)
    except UserError as error:
        raise SessionError(str(error)) from None
    if port == 0:
        raise SessionError("the client's engine has no port")


async def _watch_party(party: Party, name: str) -> None:
    sent = received = 0
    async for event in party.events():
        match event:
            case StageDone(traffic):
                sent, received = sent + traffic.sent_bytes, received + traffic.received_bytes
            case Revealed():
                log.info("session %s: a token, %d bytes sent, %d received so far", name, sent, received)
            case Failed(reason):
                raise SessionError(f"the server's party failed: {reason}"[:300])


async def _forward_next(socket: web.WebSocketResponse, party: Party, max_new_tokens: int) -> None:
    """Pass the client's `Next`s on; returns when the client leaves."""
    for _ in range(max_new_tokens - 1):
        try:
            await _receive(socket, Next, None)
        except ClientLeft:
            return
        await party.proceed()
    message = await socket.receive()
    if message.type not in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED):
        raise SessionError("no further message was expected")


class ClientLeft(SessionError):
    """The client closed the connection, or it broke."""


async def _receive(socket: web.WebSocketResponse, kind: type, timeout: float | None):  # type: ignore[no-untyped-def]
    """The next message, which must be of `kind`."""
    try:
        message = await asyncio.wait_for(socket.receive(), timeout)
    except TimeoutError:
        raise SessionError(f"no {kind.__name__} message within {timeout} s") from None
    if message.type not in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT):
        raise ClientLeft("the client left")
    try:
        decoded = decode_from_client(message.data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise SessionError("that message is not of this protocol") from None
    if not isinstance(decoded, kind):
        raise SessionError(f"expected a {kind.__name__} message")
    return decoded
