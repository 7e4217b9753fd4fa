"""The model owner's side: a control channel over WebSocket, and one party process for every session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import jax
from aiohttp import web
from tokenizers import Tokenizer

from entropi.errors import UserError
from entropi.private.messages import (
    MAX_CLIENT_MESSAGE,
    MAX_SERVER_MESSAGE,
    PROTOCOL_VERSION,
    SERVER,
    Accepted,
    BadMessage,
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
HEARTBEAT_SECONDS = 20.0
BUSY_SECONDS = 3.0  # a session that is just ending gives its slot to the next one
LEAVE_SECONDS = 10.0  # for the client to say good-bye once it has everything
REPORT_SECONDS = 1.0  # for the server's party to report what it did before the client left
MAX_CONNECTIONS = 32  # open control channels; only those that ask for a session take one of its slots
log = logging.getLogger("entropi.server")
request_log = logging.getLogger("entropi.server.requests")  # aiohttp's, for what is not even HTTP


class SessionError(Exception):
    """Something that ends one session; the text is sent to the client."""


@dataclass(frozen=True)
class Limits:
    """What the server allows; `stall_seconds` may pass without any operation finished or token asked for.

    Raises:
        UserError: a limit that would let nobody in.
    """

    max_sessions: int = 1
    max_new_tokens: int = 64
    session_seconds: float = 3600.0
    stall_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"{name} is {value} but must be positive")


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
    sockets: set[web.WebSocketResponse] = field(default_factory=set)


def serve(folder: Path, tokenizer: str, listen: str, settings: Settings, limits: Limits) -> None:
    """Answer clients until SIGINT or SIGTERM.

    Args:
        folder: of the folded model.
        tokenizer: its JSON; public.
        listen: "HOST:PORT"; port 0 takes a free one, which the log names.

    Raises:
        UserError: an address in use or not allowed, a damaged model, or one whose values would overflow.
    """
    host, port = parse_address(listen)
    description, weights = load_folded(folder)
    _check_tokenizer(tokenizer, description)
    jax.config.update("jax_platforms", "cpu")  # the check is small; looking for accelerators is slow and noisy
    name, value = check_ranges(description, weights, settings)
    log.info("largest value on random text: %.3g in %s", value, name)
    del weights
    asyncio.run(_serve(host, port, folder, description, tokenizer, settings, limits))
    log.info("stopped")


def _check_tokenizer(tokenizer: str, description: Description) -> None:
    """Raise `UserError` for what every client would refuse."""
    try:
        size = Tokenizer.from_str(tokenizer).get_vocab_size()
    except Exception:  # tokenizers raises plain Exception for malformed input
        raise UserError("the model's tokenizer.json is damaged") from None
    if size > description.vocab_size:
        raise UserError(f"the tokenizer has {size} tokens, but the model only {description.vocab_size}")
    if len(tokenizer.encode()) > MAX_SERVER_MESSAGE // 2:  # the message around it escapes quotes
        raise UserError(f"the model's tokenizer.json is longer than {MAX_SERVER_MESSAGE // 2} bytes")


async def _serve(
    host: str, port: int, folder: Path, description: Description, tokenizer: str, settings: Settings, limits: Limits
) -> None:
    state = Host(host, folder, description, tokenizer, settings, limits, asyncio.Semaphore(limits.max_sessions))

    async def handler(request: web.Request) -> web.WebSocketResponse:
        return await _session(request, state)

    app = web.Application()

    async def end_sessions(_: web.Application) -> None:
        await asyncio.gather(*(_dismiss(socket, "the server is stopping") for socket in state.sockets))

    app.router.add_get("/v1/session", handler)
    app.on_shutdown.append(end_sessions)
    request_log.addFilter(_without_trace)
    runner = web.AppRunner(app, access_log=None, logger=request_log, shutdown_timeout=LEAVE_SECONDS)
    await runner.setup()
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise UserError(f"cannot listen on {host}:{port}: {reason}") from None
        assert site._server is not None
        bound = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        log.info("listening on %s:%d, %s, protocol %s", host, bound, description.architecture, settings.protocol)
        await stopping.wait()
        log.info("stopping")
    finally:
        await runner.cleanup()


def _without_trace(record: logging.LogRecord) -> bool:
    """Let a log record pass as one line: what strangers send is not a fault of this program."""
    record.exc_info = record.exc_text = None
    return True


async def _session(request: web.Request, host: Host) -> web.WebSocketResponse:
    if "Origin" in request.headers:  # a web page in somebody's browser
        raise web.HTTPForbidden
    socket = web.WebSocketResponse(
        max_msg_size=MAX_CLIENT_MESSAGE, heartbeat=HEARTBEAT_SECONDS, timeout=LEAVE_SECONDS / 2
    )
    await socket.prepare(request)
    name = secrets.token_hex(4)
    started = time.monotonic()
    log.info("session %s: opened", name)
    host.sockets.add(socket)
    try:
        if len(host.sockets) > MAX_CONNECTIONS:
            raise SessionError("too many connections; try again later")
        await _talk(socket, name, host)
        await _dismiss(socket)
    except ClientLeft:
        pass
    except SessionError as error:
        log.warning("session %s: %s", name, error)
        await _dismiss(socket, str(error))
    except Exception:
        log.exception("session %s: failed", name)
        await _dismiss(socket, "the server failed")
    finally:
        host.sockets.discard(socket)
        log.info("session %s: closed after %.1f s", name, time.monotonic() - started)
    return socket


async def _dismiss(socket: web.WebSocketResponse, reason: str | None = None) -> None:
    """Close the control channel, with a reason if there is one to tell."""
    with contextlib.suppress(ConnectionError, RuntimeError):
        if reason is not None:
            await socket.send_bytes(encode(Refused(reason=reason[:300])))
        await socket.close()


async def _talk(socket: web.WebSocketResponse, name: str, host: Host) -> None:
    """Handshake, then the session itself if there is room for it."""
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
    try:
        await asyncio.wait_for(host.slots.acquire(), BUSY_SECONDS)
    except asyncio.TimeoutError:
        raise SessionError("the server is busy with other sessions; try again later") from None
    try:
        await asyncio.wait_for(_compute(socket, name, host, start), host.limits.session_seconds)
    except asyncio.TimeoutError:
        raise SessionError("the session's time limit was reached") from None
    finally:
        host.slots.release()


async def _compute(socket: web.WebSocketResponse, name: str, host: Host, start: Start) -> None:
    """One pass for the prompt and one for every `Next`."""
    link, session = f"{host.address}:{free_port(host.address)}", secrets.token_hex(16)
    party = await Party.start(
        Job(
            rank=SERVER,
            session=session,
            links=(link, start.link),
            description=host.description,
            settings=host.settings,
            max_new_tokens=start.max_new_tokens,
            prompt_length=start.prompt_length,
            weights=str(host.folder / WEIGHTS_FILE),
        )
    )
    tasks: list[asyncio.Task[None]] = []
    try:
        await socket.send_bytes(encode(Accepted(link, session)))
        work = asyncio.create_task(_watch_party(party, name, host.limits.stall_seconds))
        listen = asyncio.create_task(_forward_next(socket, party, start.max_new_tokens))
        tasks += [work, listen]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if work.done() and work.exception() is None:  # the client may still be reading its last share
            await asyncio.wait([listen], timeout=LEAVE_SECONDS)
        elif listen.done() and listen.exception() is None:  # it has its last share; ours may still be reporting it
            await asyncio.wait([work], timeout=REPORT_SECONDS)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await party.stop()


def parse_client_link(link: str) -> None:
    """Refuse a client's engine address that this server must not connect to."""
    try:
        _, port = parse_address(link)
    except UserError as error:
        raise SessionError(str(error)) from None
    if port == 0:
        raise SessionError("the client's engine has no port")


async def _watch_party(party: Party, name: str, stall_seconds: float) -> None:
    """Log what the party reports, until it has finished."""
    sent = received = 0
    while True:
        try:
            event = await asyncio.wait_for(party.event(), stall_seconds)
        except asyncio.TimeoutError:
            raise SessionError(f"nothing happened for {stall_seconds:g} s") from None
        match event:
            case None:
                return
            case StageDone(traffic):
                sent, received = sent + traffic.sent_bytes, received + traffic.received_bytes
            case Revealed():
                log.info("session %s: a token, %d bytes sent, %d received so far", name, sent, received)
            case Failed(reason):
                log.warning("session %s: %s", name, reason)
                raise SessionError("the server's party failed")  # why may be none of the client's business


async def _forward_next(socket: web.WebSocketResponse, party: Party, max_new_tokens: int) -> None:
    """Pass on the client's `Next`s, one fewer than there are tokens; returns when the client leaves."""
    with contextlib.suppress(ClientLeft):
        for _ in range(max_new_tokens - 1):
            await _receive(socket, Next, None)
            await party.proceed()
        await _receive(socket, Next, None)
        raise SessionError("all tokens were asked for already")


class ClientLeft(SessionError):
    """The client closed the connection, or it broke."""


async def _receive(socket: web.WebSocketResponse, kind: type, timeout: float | None):  # type: ignore[no-untyped-def]
    """The next message, which must be of `kind`."""
    try:
        message = await asyncio.wait_for(socket.receive(), timeout)
    except asyncio.TimeoutError:
        raise SessionError(f"no {kind.__name__} message within {timeout} s") from None
    if message.type not in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT):
        raise ClientLeft("the client left")
    try:
        decoded = decode_from_client(message.data)
    except BadMessage:
        raise SessionError("that message is not of this protocol") from None
    if not isinstance(decoded, kind):
        raise SessionError(f"expected a {kind.__name__} message")
    return decoded
