"""The model owner's side: a control channel over WebSocket, and one party process for every session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import ssl
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import jax
from aiohttp import web
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from entropi.errors import UserError
from entropi.private.admission import (
    SPARE_CONNECTIONS,
    ClientLeft,
    Limits,
    Quota,
    Refusal,
    SessionError,
    Slots,
    expect,
    receive,
)
from entropi.private.certificates import Tls, name_of_peer
from entropi.private.messages import (
    MAX_SERVER_MESSAGE,
    PROTOCOL_VERSION,
    SERVER,
    Accepted,
    Failed,
    Hello,
    Job,
    Linked,
    Next,
    Refused,
    Revealed,
    Settings,
    StageDone,
    Start,
    Welcome,
    encode,
)
from entropi.private.monitoring import Counters, Ending, SessionLog, monitoring_app
from entropi.private.program import Description
from entropi.private.ranges import settle
from entropi.private.session import (
    WEIGHTS_FILE,
    Party,
    confinement,
    load_folded,
    memory_for,
    parse_address,
    sha256_of,
    unread_for,
)
from entropi.private.tunnel import MAX_LINK_MESSAGE, LinkBroken, Tunnel
from entropi.private.versions import engine_version

HANDSHAKE_SECONDS = 10
LINK_SECONDS = 60.0  # for both engines to start and find each other
HEARTBEAT_SECONDS = 10.0  # a peer that says nothing for one and a half of these is gone
LEAVE_SECONDS = 10.0  # for the client to say good-bye once it has everything
GRACE_SECONDS = 3.0  # for a party to end after its link
REPORT_SECONDS = 1.0  # for the server's party to report what it did before the client left
log = logging.getLogger("entropi.server")
request_log = logging.getLogger("entropi.server.requests")  # aiohttp's, for what is not even HTTP


@dataclass(frozen=True)
class Host:
    """Everything a session needs of the server."""

    folder: Path
    welcome: Welcome
    digest: str
    limits: Limits
    slots: Slots
    quota: Quota
    counters: Counters
    table: Path | None  # the token embeddings, where they are public
    sockets: set[web.WebSocketResponse] = field(default_factory=set)
    busy: set[asyncio.BaseTransport | None] = field(default_factory=set)  # connections that are being answered


def serve(
    folder: Path,
    tokenizer: str,
    listen: str,
    settings: Settings,
    limits: Limits,
    tls: Tls | None = None,
    metrics: str = "127.0.0.1:0",
    *,
    choose_fraction_bits: bool = False,
) -> None:
    """Answer clients until SIGINT or SIGTERM.

    Args:
        folder: of the folded model.
        tokenizer: its JSON; public.
        listen: "HOST:PORT"; port 0 takes a free one, which the log names.
        tls: only clients with a certificate of its authority are answered; needed unless `listen` is loopback.
        metrics: "HOST:PORT" for `/health` and `/metrics`, which know no certificates: loopback only.
        choose_fraction_bits: by the range check, instead of checking those of `settings`.

    Raises:
        UserError: an address in use or not allowed, unusable TLS files, a damaged model, or one whose values fixed
            point would not hold.
    """
    address, watched = parse_address(listen, tls=tls is not None), parse_address(metrics)
    where = address, watched, tls.server_context() if tls is not None else None
    description, weights = load_folded(folder)
    _check_tokenizer(tokenizer, description)
    if settings.output == "top_k" and settings.choices > description.vocab_size:
        raise UserError(f"{settings.choices} choices are more than the model's {description.vocab_size} tokens")
    jax.config.update("jax_platforms", "cpu")  # the check is small; looking for accelerators is slow and noisy
    settings, reasons = settle(description, weights, settings, choose=choose_fraction_bits)
    for line in reasons:
        log.info("%s", line)
    counters = Counters()
    with tempfile.TemporaryDirectory(prefix="entropi-table-") as temporary:
        table = None
        if settings.embedding == "public":
            table = Path(temporary) / "table.safetensors"
            save_file({"embedding": weights["embedding"]}, table)
        del weights
        welcome = Welcome(description, tokenizer, settings, sha256_of(table) if table else None)
        slots, quota = Slots(limits, counters), Quota(limits)
        asyncio.run(_serve(Host(folder, welcome, welcome.digest(), limits, slots, quota, counters, table), *where))
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
    host: Host, address: tuple[str, int], watched: tuple[str, int], context: ssl.SSLContext | None
) -> None:
    async def handler(request: web.Request) -> web.WebSocketResponse:
        with _answered(request, host):
            return await _session(request, host)

    async def table(request: web.Request) -> web.FileResponse:
        assert host.table is not None
        with _answered(request, host):
            response = web.FileResponse(host.table)
            await response.prepare(request)  # which sends it
            return response

    async def end_sessions(_: web.Application) -> None:
        await asyncio.gather(*(_dismiss(socket, "the server is stopping") for socket in host.sockets))

    app = web.Application()
    app.router.add_get("/v1/session", handler)
    if host.table is not None:
        app.router.add_get("/v1/table", table)
    app.on_shutdown.append(end_sessions)
    request_log.addFilter(_without_trace)
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    log.info("in force for a session's process: %s", await confinement())
    async with contextlib.AsyncExitStack() as closing:
        for each, where, trusted in ((app, address, context), (monitoring_app(host.counters), watched, None)):
            runner = web.AppRunner(each, access_log=None, logger=request_log, shutdown_timeout=LEAVE_SECONDS)
            await runner.setup()
            closing.push_async_callback(runner.cleanup)
            port = await _listen(runner, host, where, trusted, closing)
            if each is app:
                log.info(
                    "listening on %s, %s, protocol %s, %s",
                    _spell(where[0], port),
                    host.welcome.description.architecture,
                    host.welcome.settings.protocol,
                    "TLS 1.3 with client certificates" if context else "no TLS: this machine only",
                )
            else:
                log.info("metrics on http://%s/metrics", _spell(where[0], port))
        await stopping.wait()
        log.info("stopping")


async def _listen(
    runner: web.AppRunner,
    host: Host,
    address: tuple[str, int],
    context: ssl.SSLContext | None,
    closing: contextlib.AsyncExitStack,
) -> int:
    """Accept connections until `closing` does; the port."""
    loop, answering = asyncio.get_running_loop(), runner.server
    assert answering is not None

    def accept() -> asyncio.BaseProtocol:
        if len(answering.connections) >= host.limits.max_connections + SPARE_CONNECTIONS:
            return _Closed()
        return answering()

    patience = HANDSHAKE_SECONDS if context else None
    try:
        listening = await loop.create_server(accept, *address, ssl=context, ssl_handshake_timeout=patience)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise UserError(f"cannot listen on {_spell(*address)}: {reason}") from None
    closing.callback(listening.close)
    closing.callback(loop.create_task(_drop_silent(answering, host)).cancel)
    return int(listening.sockets[0].getsockname()[1])


@contextlib.contextmanager
def _answered(request: web.Request, host: Host) -> Iterator[None]:
    """Keep the request's connection among those that are not silent."""
    transport = request.transport  # which the request forgets when the connection ends
    host.busy.add(transport)
    try:
        yield
    finally:
        host.busy.discard(transport)


async def _drop_silent(answering: web.Server, host: Host) -> None:
    """End connections that are older than a handshake may take and have not asked for anything."""
    before: set[web.RequestHandler] = set()
    while True:
        await asyncio.sleep(HANDSHAKE_SECONDS)
        silent = {protocol for protocol in answering.connections if protocol.transport not in host.busy}
        for protocol in silent & before:
            if isinstance(protocol.transport, asyncio.Transport):
                protocol.transport.abort()
        before = silent - before


class _Closed(asyncio.Protocol):
    """For connections beyond all limits."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


def _spell(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _without_trace(record: logging.LogRecord) -> bool:
    """Let a log record pass as one line: what strangers send is not a fault of this program."""
    record.exc_info = record.exc_text = None
    return True


async def _session(request: web.Request, host: Host) -> web.WebSocketResponse:
    if "Origin" in request.headers:  # a web page in somebody's browser
        raise web.HTTPForbidden
    socket = web.WebSocketResponse(
        max_msg_size=MAX_LINK_MESSAGE, heartbeat=HEARTBEAT_SECONDS, timeout=LEAVE_SECONDS / 2, compress=False
    )
    await socket.prepare(request)
    client = name_of_peer(request.transport)
    session_log = SessionLog(log, secrets.token_hex(4), client)
    started = time.monotonic()
    session_log.info("opened%s", f" by {client}" if client else "")
    host.sockets.add(socket)
    ending: Ending = "failed"
    try:
        if len(host.sockets) > host.limits.max_connections:
            raise Refusal("too many connections; try again later")
        await _talk(socket, client.partition("/")[0], session_log, host)
        ending = "finished"
        await _dismiss(socket)
    except (ClientLeft, ConnectionError):  # the latter where this side was about to say something
        ending = "left"
    except SessionError as error:
        ending = "refused" if isinstance(error, Refusal) else "failed"
        session_log.warning("%s", error)
        await _dismiss(socket, str(error))
    except Exception:
        session_log.exception("failed")
        await _dismiss(socket, "the server failed")
    finally:
        host.sockets.discard(socket)
        host.counters.endings[ending] += 1
        seconds = time.monotonic() - started
        session_log.info("closed after %.1f s", seconds, fields={"ending": ending, "seconds": round(seconds, 3)})
    return socket


async def _dismiss(socket: web.WebSocketResponse, reason: str | None = None) -> None:
    """Close the control channel, with a reason if there is one to tell."""
    with contextlib.suppress(ConnectionError, RuntimeError):
        if reason is not None:
            await socket.send_str(encode(Refused(reason=reason[:300])).decode())
        await socket.close()


async def _talk(socket: web.WebSocketResponse, name: str, session_log: SessionLog, host: Host) -> None:
    """Handshake, then the session itself once there is room for it."""
    hello = await receive(socket, Hello, HANDSHAKE_SECONDS)
    if hello.version != PROTOCOL_VERSION or hello.engine != engine_version():
        raise Refusal(f"versions differ: the server speaks protocol {PROTOCOL_VERSION} on engine {engine_version()}")
    await socket.send_str(encode(host.welcome).decode())
    start = await receive(socket, Start, HANDSHAKE_SECONDS)
    if start.digest != host.digest:
        raise Refusal("the description of the model that reached the client is not the server's")
    if start.max_new_tokens > host.limits.max_new_tokens:
        raise Refusal(f"at most {host.limits.max_new_tokens} new tokens a session are allowed")
    positions = host.welcome.description.positions
    if start.prompt_length + start.max_new_tokens - 1 > positions:
        raise Refusal(
            f"{start.prompt_length} prompt tokens and {start.max_new_tokens} new ones do not fit the model's "
            f"{positions} positions"
        )
    with host.quota.session(name, start.max_new_tokens):
        async with host.slots.slot(socket):
            host.counters.prompt_tokens += start.prompt_length
            began = time.monotonic()
            try:
                await asyncio.wait_for(_compute(socket, name, session_log, host, start), host.limits.session_seconds)
            except asyncio.TimeoutError:
                raise SessionError("the session's time limit was reached") from None
            finally:
                host.counters.session_seconds += time.monotonic() - began


async def _compute(socket: web.WebSocketResponse, name: str, session_log: SessionLog, host: Host, start: Start) -> None:
    """One pass for the prompt and one for every `Next`."""
    session, welcome = secrets.token_hex(16), host.welcome
    memory = memory_for(welcome.description, start.prompt_length + start.max_new_tokens, host.limits.memory_gb)
    async with Tunnel(SERVER, session, socket.send_bytes, unread_for(memory)) as tunnel:
        party = await Party.start(
            Job(
                rank=SERVER,
                session=session,
                links=tunnel.links,
                description=welcome.description,
                settings=welcome.settings,
                max_new_tokens=start.max_new_tokens,
                prompt_length=start.prompt_length,
                weights=str(host.folder / WEIGHTS_FILE),
            ),
            memory_bytes=memory,
        )
        tasks: list[asyncio.Task[None]] = []
        progress = _Progress()
        try:
            await socket.send_str(encode(Accepted(session)).decode())
            work = asyncio.create_task(_watch_party(party, session_log, host, name, progress))
            listen = asyncio.create_task(_listen_to_client(socket, party, tunnel, start.max_new_tokens, progress))
            link = asyncio.create_task(_watch_link(tunnel))
            tasks += [work, listen, link]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and work.exception() is None:  # the client may still be reading its last share
                await asyncio.wait([listen], timeout=LEAVE_SECONDS)
            elif listen.done() and listen.exception() is None:  # it has its last share; ours may still be reporting it
                await asyncio.wait([work], timeout=REPORT_SECONDS)
            for task in (work, listen):
                if task.done():
                    task.result()
            if not (work.done() or listen.done()):
                link.result()
            if progress.revealed < progress.asked:
                raise ClientLeft("the client left in the middle of a pass")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await party.stop()
            session_log.info(
                "the link carried %d bytes to the client, %d from it, in %d turns; at most %d were unread",
                tunnel.sent,
                tunnel.received,
                tunnel.turns,
                tunnel.most_unread,
                fields={
                    "link_sent": tunnel.sent,
                    "link_received": tunnel.received,
                    "turns": tunnel.turns,
                    "most_unread": tunnel.most_unread,
                },
            )


@dataclass
class _Progress:
    """Tokens of one session."""

    asked: int = 1
    revealed: int = 0


async def _watch_party(party: Party, session_log: SessionLog, host: Host, name: str, progress: _Progress) -> None:
    """Log what the party reports, until it has finished."""
    sent = received = 0
    patience = min(LINK_SECONDS, host.limits.stall_seconds)
    while True:
        try:
            event = await asyncio.wait_for(party.event(), patience)
        except asyncio.TimeoutError:
            raise SessionError(f"nothing happened for {patience:g} s") from None
        match event:
            case None:
                return
            case Linked():
                patience = host.limits.stall_seconds
            case StageDone(traffic):
                sent, received = sent + traffic.sent_bytes, received + traffic.received_bytes
                host.counters.sent_bytes += traffic.sent_bytes
                host.counters.received_bytes += traffic.received_bytes
            case Revealed():
                progress.revealed += 1
                host.counters.tokens += 1
                host.quota.count_token(name)
                session_log.info(
                    "a token, %d bytes sent, %d received so far",
                    sent,
                    received,
                    fields={"sent_bytes": sent, "received_bytes": received},
                )
            case Failed(reason):
                session_log.warning("%s", reason)
                raise SessionError("the server's party failed")  # why may be none of the client's business


def _printable(text: str) -> str:
    """What a stranger has written, fit for one line of a log."""
    return "".join(c for c in text[:120] if c.isprintable())


async def _watch_link(tunnel: Tunnel) -> None:
    """Raise once the engines' link is broken although nobody has finished."""
    await tunnel.broken()
    await asyncio.sleep(GRACE_SECONDS)  # the party may have finished, or be about to say why not
    raise SessionError("the engines' link broke")


async def _listen_to_client(
    socket: web.WebSocketResponse, party: Party, tunnel: Tunnel, max_new_tokens: int, progress: _Progress
) -> None:
    """Pass on the client's `Next`s, one fewer than there are tokens, and its engine's bytes; until it leaves."""
    with contextlib.suppress(ClientLeft):
        while True:
            message = await socket.receive()
            if message.type == aiohttp.WSMsgType.BINARY:
                try:
                    await tunnel.receive(message.data)
                except LinkBroken as error:
                    raise SessionError(str(error)) from None
                continue
            if message.type == aiohttp.WSMsgType.CLOSE and message.data == aiohttp.WSCloseCode.POLICY_VIOLATION:
                raise SessionError(f"the client refused this side's bytes: {_printable(message.extra or '')}")
            expect(message, Next)
            if progress.asked == max_new_tokens:
                raise SessionError("all tokens were asked for already")
            progress.asked += 1
            await party.proceed()
