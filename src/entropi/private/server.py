"""The model owner's side: a control channel over WebSocket, and one party process for every session."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import aiohttp
import jax
import numpy as np
from aiohttp import web
from safetensors.numpy import save_file

from entropi.console import without_controls
from entropi.errors import UserError
from entropi.private import findings
from entropi.private.admission import (
    SEND_SECONDS,
    ClientLeft,
    Limits,
    Refusal,
    SessionError,
    Slots,
    expect,
    leave_in_time,
    receive,
    send,
)
from entropi.private.audit import Audit
from entropi.private.canary import make_canary
from entropi.private.certificates import Peer, Revoked, Tls, Watched
from entropi.private.door import HANDSHAKE_SECONDS, Door, Guest, check_free, cut, startups_that_fit
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
from entropi.private.monitoring import Counters, Ending, SessionLog, Sparing, monitoring_app
from entropi.private.program import Description
from entropi.private.quotas import Quota, Usage, open_store
from entropi.private.ranges import settle, sweep_vocabulary
from entropi.private.self_test import self_test
from entropi.private.session import (
    WEIGHTS_FILE,
    Party,
    confinement,
    load_folded,
    memory_for,
    needed_memory,
    parse_address,
    sha256_of,
    unread_for,
)
from entropi.private.tokenization import objections, own_tokenizer, sha256_of_tokenizer
from entropi.private.tunnel import MAX_LINK_MESSAGE, LinkBroken, Tunnel
from entropi.private.versions import engine_version
from entropi.temporary import swept_folder

WELCOME_SECONDS = 15.0  # to take the welcome; clients do not wait for longer either
TABLE_BYTES_PER_SECOND = 50_000  # a client that takes the token embeddings more slowly is not waited for
FRAME = 64 << 10  # bytes of the welcome that leave at a time, and so about what one client's buffer holds of it
WATCH_SECONDS = 2.0  # between two looks at files that may be replaced
METRICS_CONNECTIONS = 16
QUIET_SESSIONS = 100  # connections within a minute that have log lines of their own before they have a slot
LINK_SECONDS = 60.0  # for both engines to start and find each other
HEARTBEAT_SECONDS = 10.0  # a peer that says nothing for one and a half of these is gone
REVOKED = "this client's certificate was revoked"
LEAVE_SECONDS = 10.0  # for the client to say good-bye once it has everything
GRACE_SECONDS = 3.0  # for a party to end after its link
SHORT_TEST_TOKENS = 8  # of the test of known answers, where an earlier start has passed the whole one
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
    audit: Audit
    watched: Watched | None  # certificates and what is revoked; None without TLS
    greeting: tuple[bytes, ...] = ()  # the welcome as it goes over every connection
    sockets: dict[web.WebSocketResponse, Peer | None] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=deque)  # when connections had their own log lines

    @property
    def revoked(self) -> Revoked:
        return self.watched.revoked if self.watched is not None else Revoked()


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
    revoked: Path | None = None,
    audit_log: Path | None = None,
    quota_store: str | None = None,
    self_tests: Sequence[Literal["ref2k", "cheetah"]] = (),
    canary: str | None = None,
    recheck: bool = False,
) -> None:
    """Answer clients until SIGINT or SIGTERM.

    Args:
        folder: of the folded model.
        tokenizer: its JSON; public.
        listen: "HOST:PORT"; port 0 takes a free one, which the log names.
        tls: only clients with a certificate of its authority are answered; needed unless `listen` is loopback.
        metrics: "HOST:PORT" for `/health` and `/metrics`, which know no certificates: loopback only.
        choose_fraction_bits: by the range check, instead of checking those of `settings`.
        revoked: certificates that are refused, see `Revoked.read`; reread like the TLS files when they change.
        audit_log: file for who was refused and who was answered; None for the log.
        quota_store: path or URL, see `open_store`; None for a file of its own.
        self_tests: ways in which the program is run on a known prompt first, see `self_test`.
        canary: a public prompt whose answer clients are told, so that they can ask for it.
        recheck: look at all tokens and run the whole tests although an earlier start has done so with this model.

    Raises:
        UserError: an address in use or not allowed, unusable TLS files, a damaged model, or one whose values fixed
            point would not hold; a self-test that fails, or a canary that would prove nothing.
    """
    address, watched = check_surroundings(listen, limits, tls, metrics, revoked, audit_log, quota_store)
    files = Watched(tls, revoked) if tls is not None else None
    limits = replace(limits, max_startups=startups_that_fit(limits))
    description, weights = load_folded(folder)
    _check_tokenizer(tokenizer, description)
    if settings.output == "top_k" and settings.choices > description.vocab_size:
        raise UserError(f"{settings.choices} choices are more than the model's {description.vocab_size} tokens")
    jax.config.update("jax_platforms", "cpu")  # the check is small; looking for accelerators is slow and noisy
    published = None
    if canary is not None:
        published = make_canary(canary, own_tokenizer(tokenizer), description, weights, settings, limits.max_new_tokens)
        log.info("the canary is %s", encode(published).decode())
    least = needed_memory(description, 2)
    if limits.memory_gb and limits.memory_gb * 1e9 < least:
        log.warning(
            "memory_gb %g may be too little: about %.1f GB are predicted for the shortest of sessions",
            limits.memory_gb,
            least / 1e9,
        )
    settings = _verified(folder, description, weights, settings, choose_fraction_bits, self_tests, recheck=recheck)
    counters = Counters()
    with swept_folder("entropi-table-") as temporary:
        table = None
        if settings.embedding == "public":
            table = temporary / "table.safetensors"
            save_file({"embedding": weights["embedding"]}, table)
        del weights
        welcome = Welcome(description, tokenizer, settings, sha256_of(table) if table else None, published)
        slots, quota = Slots(limits, counters), Quota(limits, open_store(quota_store, limits))
        audit = Audit(counters, audit_log)
        greeting = text_frames(encode(welcome))
        digest = welcome.digest()
        host = Host(folder, welcome, digest, limits, slots, quota, counters, table, audit, files, greeting)
        # What is here by now stays; the door searches often for what connections leave behind.
        gc.collect()
        gc.freeze()
        try:
            asyncio.run(_serve(host, address, watched))
        finally:
            gc.unfreeze()  # or what others keep in circles, as Triton does, would count as leaked at the end
        audit.close()
    log.info("stopped")


def _verified(
    folder: Path,
    description: Description,
    weights: Mapping[str, np.ndarray],
    settings: Settings,
    choose: bool,
    self_tests: Sequence[Literal["ref2k", "cheetah"]],
    *,
    recheck: bool,
) -> Settings:
    """The settings that sessions can rely on, once the model has been looked at and its tests are passed.

    What an earlier start has found of the same model is not found out again, which takes minutes for a large one,
    unless `recheck` asks for it. But that was another day, and perhaps another machine with the same cache: so a few
    tokens are computed again in fixed point on every start.
    """
    key = findings.key_of(folder, settings, choose)
    known = None if recheck else findings.read(key)
    if known is None:
        log.info("looking at the values of all tokens, which takes minutes for a large model")
        sweep, passed = sweep_vocabulary(description, weights, settings), list[str]()
    else:
        log.info("an earlier start has looked at the values of this model's tokens; --recheck looks again")
        sweep, passed = known.sweep, list(known.passed)
    settled, reasons = settle(description, weights, settings, choose=choose, sweep=sweep)
    for line in reasons:
        log.info("%s", line)
    for protocol in self_tests:
        tokens = sweep.worst
        if protocol in passed:
            log.info("an earlier start has passed the test of known answers (%s)", protocol)
            if protocol != "ref2k":
                continue
            tokens = tokens[:SHORT_TEST_TOKENS]
        log.info("%s", self_test(folder, settled, protocol, tokens))
        passed += [protocol] if protocol not in passed else []
    if known is None or list(known.passed) != passed:
        findings.keep(findings.Findings(key, sweep, tuple(passed)))
    return settled


def check_surroundings(
    listen: str,
    limits: Limits,
    tls: Tls | None,
    metrics: str,
    revoked: Path | None = None,
    audit_log: Path | None = None,
    quota_store: str | None = None,
) -> tuple[tuple[str, int], tuple[str, int]]:
    """Look at everything that a server needs besides its model, because looking at the model takes minutes.

    Args:
        listen: and the others, see `serve`.

    Returns:
        host and port to listen on, and those for metrics.

    Raises:
        UserError: something cannot be used, in one line.
    """
    address, watched = parse_address(listen, tls=tls is not None), parse_address(metrics)
    if revoked is not None and tls is None:
        raise UserError("certificates can only be revoked where there are any: TLS files are missing")
    if tls is not None:
        Watched(tls, revoked)
    for where in (address, watched):
        with _listening(where):
            check_free(*where)
    Audit(Counters(), audit_log).close()

    async def check_store() -> None:
        quota = Quota(limits, open_store(quota_store, limits))
        try:
            await quota.check()
        finally:
            await quota.close()

    asyncio.run(check_store())
    if quota_store is not None and limits.client_sessions is None and limits.client_tokens is None:
        log.warning("the quota store keeps nothing: neither client_sessions nor client_tokens limits anybody")
    return address, watched


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


def _check_tokenizer(tokenizer: str, description: Description) -> None:
    """Raise `UserError` for what every client would refuse."""
    try:
        ids = own_tokenizer(tokenizer).tokenizer.get_vocab(with_added_tokens=True)
    except UserError:
        raise UserError("the model's tokenizer.json is damaged") from None
    # Fewer tokens than rows are usual: many checkpoints are padded to a multiple of 64 or 128 rows.
    if beyond := sorted((number, token) for token, number in ids.items() if number >= description.vocab_size):
        first = without_controls(repr(beyond[0][1][:40]))
        raise UserError(
            f"{len(beyond)} of the tokenizer's {len(ids)} tokens have an id that the model, which has "
            f"{description.vocab_size} rows, does not know, {first} ({beyond[0][0]}) for example: take them out of "
            "tokenizer.json, if they were added to it only, or use the tokenizer that the model was trained with"
        )
    if len(tokenizer.encode()) > MAX_SERVER_MESSAGE // 2:  # the message around it escapes quotes
        raise UserError(f"the model's tokenizer.json is longer than {MAX_SERVER_MESSAGE // 2} bytes")
    log.info("the tokenizer's SHA-256 is %s", sha256_of_tokenizer(tokenizer))
    if found := objections(tokenizer, description.vocab_size):
        log.warning("clients will not apply this tokenizer unless they name its SHA-256: %s", "; ".join(found))


async def _serve(host: Host, address: tuple[str, int], watched: tuple[str, int]) -> None:
    async def handler(request: web.Request) -> web.WebSocketResponse:
        return await _session(request, host, entrance.guest(request))

    async def table(request: web.Request) -> web.FileResponse:
        assert host.table is not None
        peer, transport = Peer.of(request.transport), request.transport
        if peer is not None and peer in host.revoked:
            raise web.HTTPForbidden
        response = web.FileResponse(host.table)
        patience = SEND_SECONDS + host.table.stat().st_size / TABLE_BYTES_PER_SECOND
        try:
            await asyncio.wait_for(response.prepare(request), patience)  # which sends it
        except asyncio.TimeoutError:
            if transport is not None:
                cut(transport)
        return response

    async def end_sessions(_: web.Application) -> None:
        await asyncio.gather(*(_dismiss(socket, "the server is stopping") for socket in host.sockets))

    app = web.Application()
    app.router.add_get("/v1/session", handler)
    if host.table is not None:
        app.router.add_get("/v1/table", table)
    app.on_shutdown.append(end_sessions)
    request_log.addFilter(_without_trace)
    for strangers in (request_log, logging.getLogger("asyncio")):
        strangers.addFilter(Sparing())
    files = host.watched
    entrance = Door(files, startups_that_fit(host.limits), host.limits.source_startups, host.audit)
    side_door = Door(None, METRICS_CONNECTIONS, METRICS_CONNECTIONS, host.audit)
    loop, stopping, again = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    if files is not None:
        loop.add_signal_handler(signal.SIGHUP, again.set)
    log.info("in force for a session's process: %s", await confinement())
    async with contextlib.AsyncExitStack() as closing:
        closing.push_async_callback(host.quota.close)
        await host.quota.check()
        for task in (loop.create_task(host.audit.keep()), loop.create_task(_watch_files(host, again))):
            closing.callback(task.cancel)
        for each, door, where in (
            (app, entrance, address),
            (monitoring_app(host.counters), side_door, watched),
        ):
            each.middlewares.append(door.attend)
            runner = web.AppRunner(each, access_log=None, logger=request_log, shutdown_timeout=LEAVE_SECONDS)
            await runner.setup()
            closing.push_async_callback(runner.cleanup)
            assert runner.server is not None
            closing.callback(door.close)
            with _listening(where):
                port = door.open(runner.server, *where)
            if each is app:
                log.info(
                    "listening on %s, %s, protocol %s, %s",
                    _spell(where[0], port),
                    host.welcome.description.architecture,
                    host.welcome.settings.protocol,
                    "TLS 1.3 with client certificates" if files is not None else "no TLS: this machine only",
                )
            else:
                log.info("metrics on http://%s/metrics", _spell(where[0], port))
        await stopping.wait()
        log.info("stopping")


@contextlib.contextmanager
def _listening(address: tuple[str, int]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise UserError(f"cannot listen on {_spell(*address)}: {reason}") from None


async def _watch_files(host: Host, again: asyncio.Event) -> None:
    """Read certificates and revocations again on SIGHUP and when they change, and end sessions of who is revoked."""
    files = host.watched
    host.counters.revoked = len(host.revoked)
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(again.wait(), WATCH_SECONDS)
        if files is None or not (again.is_set() or files.has_changed()):
            again.clear()
            continue
        again.clear()
        try:
            files.reload()
        except Exception as error:  # whatever it is, the next change is to be looked at
            log.error("what was read before stays in use: %s", error)
            host.audit.happened("certificates not reloaded", str(error))
            continue
        host.counters.revoked = len(files.revoked)
        host.audit.happened("certificates reloaded", f"{len(files.revoked)} revoked")
        ended = [socket for socket, peer in host.sockets.items() if peer is not None and peer in files.revoked]
        await asyncio.gather(*(_dismiss(socket, REVOKED) for socket in ended))


def _spell(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _without_trace(record: logging.LogRecord) -> bool:
    """Let a log record pass as one line: what strangers send is not a fault of this program."""
    record.exc_info = record.exc_text = None
    return True


async def _session(request: web.Request, host: Host, guest: Guest) -> web.WebSocketResponse:
    if "Origin" in request.headers:  # a web page in somebody's browser
        raise web.HTTPForbidden
    socket = web.WebSocketResponse(
        max_msg_size=MAX_LINK_MESSAGE, heartbeat=HEARTBEAT_SECONDS, timeout=LEAVE_SECONDS / 2, compress=False
    )
    transport, peer = request.transport, Peer.of(request.transport)
    await socket.prepare(request)
    client = str(peer) if peer is not None else ""
    session_log = SessionLog(log, secrets.token_hex(4), client, quiet=_too_many_lines(host))
    started = time.monotonic()
    session_log.info("opened%s", f" by {client}" if client else "")
    host.sockets[socket] = peer
    ending: Ending = "failed"
    progress, reason = _Progress(), ""
    try:
        if peer is not None and peer in host.revoked:
            raise Refusal(REVOKED)
        await _talk(request, socket, peer.name if peer is not None else "", session_log, host, guest, progress)
        ending = "finished"
        await _dismiss(socket)
    except (ClientLeft, ConnectionError) as error:  # the latter where this side was about to say something
        ending = "left"
        if peer is not None and peer in host.revoked:
            ending, reason = "refused", REVOKED
        elif isinstance(error, ClientLeft):
            reason = str(error)
    except SessionError as error:
        ending, reason = "refused" if isinstance(error, Refusal) else "failed", str(error)
        session_log.warning("%s", error)
        await _dismiss(socket, reason)
    except Exception:
        session_log.exception("failed")
        reason = "the server failed"
        await _dismiss(socket, reason)
    finally:
        del host.sockets[socket]
        if transport is not None:  # what a client that does not read has not taken by then is thrown away
            asyncio.get_running_loop().call_later(LEAVE_SECONDS / 2, cut, transport)
        host.counters.endings[ending] += 1
        seconds = round(time.monotonic() - started, 3)
        session_log.info("closed after %.1f s", seconds, fields={"ending": ending, "seconds": seconds})
        told = {"session": session_log.session, "address": guest.address, "seconds": seconds}
        told["tokens"] = progress.revealed
        host.audit.session(client or guest.address, ending, reason, told, computed=progress.computing)
    return socket


def _too_many_lines(host: Host) -> bool:
    """Whether so many connections had lines in the log of late that another one's would only fill it."""
    now = time.monotonic()
    while host.recent and host.recent[0] < now - 60:
        host.recent.popleft()
    if len(host.recent) >= QUIET_SESSIONS:
        return True
    host.recent.append(now)
    return False


async def _dismiss(socket: web.WebSocketResponse, reason: str | None = None) -> None:
    """Close the control channel, with a reason if there is one to tell."""
    with contextlib.suppress(ConnectionError, RuntimeError, ClientLeft):
        if reason is not None:
            await leave_in_time(socket.send_str(encode(Refused(reason=reason[:300])).decode()), LEAVE_SECONDS / 2)
        await leave_in_time(socket.close(), LEAVE_SECONDS)  # a client that does not read would be waited for


async def _greet(request: web.Request, greeting: tuple[bytes, ...]) -> None:
    """Send the welcome, a piece whenever there is room for one."""
    for frame in greeting:
        await request.writer.write(frame)
        await request.writer.drain()


async def _talk(
    request: web.Request,
    socket: web.WebSocketResponse,
    name: str,
    session_log: SessionLog,
    host: Host,
    guest: Guest,
    progress: _Progress,
) -> None:
    """Handshake, then the session itself once there is room for it."""
    hello = await receive(socket, Hello, HANDSHAKE_SECONDS)
    if hello.version != PROTOCOL_VERSION or hello.engine != engine_version():
        raise Refusal(f"versions differ: the server speaks protocol {PROTOCOL_VERSION} on engine {engine_version()}")
    await leave_in_time(_greet(request, host.greeting), WELCOME_SECONDS)
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
    async with host.quota.session(name, start.max_new_tokens) as usage, host.slots.slot(socket, guest.admitted()):
        session_log.quiet, progress.computing = False, True
        host.counters.prompt_tokens += start.prompt_length
        began = time.monotonic()
        try:
            work = _compute(socket, usage, session_log, host, start, progress)
            await asyncio.wait_for(work, host.limits.session_seconds)
        except asyncio.TimeoutError:
            raise SessionError("the session's time limit was reached") from None
        finally:
            host.counters.session_seconds += time.monotonic() - began


async def _compute(
    socket: web.WebSocketResponse,
    usage: Usage,
    session_log: SessionLog,
    host: Host,
    start: Start,
    progress: _Progress,
) -> None:
    """One pass for the prompt and one for every `Next`."""
    session, welcome = secrets.token_hex(16), host.welcome
    memory = memory_for(welcome.description, start.prompt_length + start.max_new_tokens, host.limits.memory_gb)

    async def carry(message: bytes) -> None:
        try:
            await leave_in_time(socket.send_bytes(message))
        except ClientLeft:
            raise ConnectionResetError from None  # the link is broken, as where the connection is

    async with Tunnel(SERVER, session, carry, unread_for(memory)) as tunnel:
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
        try:
            await send(socket, Accepted(session))
            work = asyncio.create_task(_watch_party(party, session_log, host, usage, progress))
            listen = asyncio.create_task(_listen_to_client(socket, party, tunnel, start.max_new_tokens, progress))
            link = asyncio.create_task(_watch_link(tunnel))
            suspended = asyncio.create_task(party.suspended())
            tasks += [work, listen, link, suspended]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if work.done() and work.exception() is None:  # the client may still be reading its last share
                await asyncio.wait([listen], timeout=LEAVE_SECONDS)
            elif listen.done() and listen.exception() is None:  # it has its last share; ours may still be reporting it
                await asyncio.wait([work], timeout=REPORT_SECONDS)
            for task in (work, listen):
                if task.done():
                    task.result()
            if suspended.done():
                session_log.warning("somebody stopped the party's process")
                raise SessionError("the server's party failed")
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
    computing: bool = False  # it had a slot


async def _watch_party(party: Party, session_log: SessionLog, host: Host, usage: Usage, progress: _Progress) -> None:
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
                await usage.count_token()
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
