"""One session of a server: handshake, a slot, this side's party, and why it ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from entropi.errors import UserError
from entropi.private.admission.door import HANDSHAKE_SECONDS, Guest, cut
from entropi.private.admission.limits import Limits
from entropi.private.admission.logs import SessionLog
from entropi.private.admission.monitoring import Ending
from entropi.private.admission.quotas import Usage
from entropi.private.compute.folded import WEIGHTS_FILE
from entropi.private.compute.settings import SERVER
from entropi.private.sessions.material import Growing, Size, Taken
from entropi.private.sessions.memory import memory_for, unread_for
from entropi.private.sessions.party_handle import GRACE_SECONDS, PREPARING_GRACE_SECONDS, Party
from entropi.private.sessions.server_state import ServerState
from entropi.private.wire.certificates import Peer
from entropi.private.wire.messages import (
    MAX_INQUIRIES,
    PROTOCOL_VERSION,
    Accepted,
    Event,
    Failed,
    Held,
    Hello,
    Job,
    Linked,
    Next,
    PartDone,
    Prepare,
    Prepared,
    Refused,
    Revealed,
    StageDone,
    Start,
    Tickets,
    encode,
)
from entropi.private.wire.server_channel import (
    ClientLeft,
    ControlChannel,
    Flood,
    Refusal,
    SessionError,
    expect,
    leave_in_time,
    receive,
    send,
)
from entropi.private.wire.tunnel import MAX_LINK_MESSAGE, LinkBroken, Tunnel
from entropi.private.wire.versions import engine_version

WELCOME_SECONDS = 15.0  # to take the welcome; clients do not wait for longer either
START_SECONDS = 30.0  # to read it, a tokenizer of megabytes perhaps, and to encode a prompt
QUIET_SESSIONS = 100  # connections within a minute that have log lines of their own before they have a slot
LINK_SECONDS = 60.0  # for both engines to start and find each other
HEARTBEAT_SECONDS = 10.0  # a peer that says nothing for one and a half of these is gone
REVOKED = "this client's certificate was revoked"
LEAVE_SECONDS = 10.0  # for the client to say good-bye once it has everything
FAREWELL_SECONDS = 1.0  # for it to say so too; all that it sends meanwhile is read and thrown away
REPORT_SECONDS = 1.0  # for the server's party to report what it did before the client left
log = logging.getLogger("entropi.server")


async def run_session(request: web.Request, state: ServerState, guest: Guest) -> web.WebSocketResponse:
    if "Origin" in request.headers:  # a web page in somebody's browser
        raise web.HTTPForbidden
    socket = ControlChannel(
        max_msg_size=MAX_LINK_MESSAGE, heartbeat=HEARTBEAT_SECONDS, timeout=FAREWELL_SECONDS, compress=False
    )

    transport, peer = request.transport, Peer.of(request.transport)
    await socket.prepare(request)
    client = str(peer) if peer is not None else ""
    session_log = SessionLog(log, secrets.token_hex(4), client, quiet=_too_many_lines(state))

    started = time.monotonic()
    session_log.info("opened%s", f" by {client}" if client else "")
    state.sockets[socket] = peer

    ending: Ending = "failed"
    progress, reason = Progress(), ""
    try:
        if peer is not None and peer in state.revoked:
            raise Refusal(REVOKED)
        await _talk(request, socket, peer.name if peer is not None else "", session_log, state, guest, progress)
        ending = "finished"
        await dismiss(socket)
    except (ClientLeft, ConnectionError) as error:  # the latter where this side was about to say something
        ending = "left"
        if peer is not None and peer in state.revoked:
            ending, reason = "refused", REVOKED
        elif isinstance(error, ClientLeft):
            reason = str(error)
    except SessionError as error:
        ending, reason = "refused" if isinstance(error, Refusal) else "failed", str(error)
        session_log.warning("%s", error)
        if isinstance(error, Flood) and transport is not None:
            cut(transport)  # a farewell would be waited for, and everything read meanwhile
        await dismiss(socket, reason)
    except Exception:
        session_log.exception("failed")
        reason = "the server failed"
        await dismiss(socket, reason)
    finally:
        del state.sockets[socket]
        if transport is not None:  # what a client that does not read has not taken by then is thrown away
            asyncio.get_running_loop().call_later(LEAVE_SECONDS / 2, cut, transport)
        state.counters.endings[ending] += 1
        seconds = round(time.monotonic() - started, 3)
        session_log.info("closed after %.1f s", seconds, fields={"ending": ending, "seconds": seconds})
        told = {"session": session_log.session, "address": guest.address, "seconds": seconds}
        told["tokens"] = progress.tokens
        state.audit.session(client or guest.address, ending, reason, told, computed=progress.computing)
    return socket


def _too_many_lines(state: ServerState) -> bool:
    """Whether so many connections had lines in the log of late that another one's would only fill it."""
    now = time.monotonic()
    while state.recent and state.recent[0] < now - 60:
        state.recent.popleft()
    if len(state.recent) >= QUIET_SESSIONS:
        return True
    state.recent.append(now)
    return False


async def dismiss(socket: web.WebSocketResponse, reason: str | None = None) -> None:
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
    state: ServerState,
    guest: Guest,
    progress: Progress,
) -> None:
    """Handshake, then the session itself once there is room for it."""
    hello = await receive(socket, Hello, timeout=HANDSHAKE_SECONDS)
    if hello.version != PROTOCOL_VERSION or hello.engine != engine_version():
        raise Refusal(f"versions differ: the server speaks protocol {PROTOCOL_VERSION} on engine {engine_version()}")

    await leave_in_time(_greet(request, state.greeting), WELCOME_SECONDS)
    start = await _first_request(socket, name, session_log, state)
    if start.digest != state.digest:
        raise Refusal("the description of the model that reached the client is not the server's")
    if isinstance(start, Start):
        _check_length(start, state)
        prompt_length = start.prompt_length + sum(start.others)
        slots, new_tokens = state.slots, start.max_new_tokens * (1 + len(start.others)) + start.drafts
    else:
        _check_preparing(start, state)
        slots, new_tokens, prompt_length = state.preparing, 0, 0

    async with (
        state.quota.session(name, new_tokens) as usage,
        slots.slot(socket, guest.admitted()),
    ):
        session_log.quiet, progress.computing = False, True
        state.counters.prompt_tokens += prompt_length
        began, limits = time.monotonic(), state.limits
        try:
            session = Session(socket, name, usage, session_log, state, progress)
            if isinstance(start, Start):
                work, short = session.answer(start), not start.conversation
            else:
                work, short = session.prepare(start), False
            await asyncio.wait_for(work, limits.session_seconds if short else limits.conversation_seconds)
        except asyncio.TimeoutError:
            raise SessionError("the session's time limit was reached") from None
        finally:
            state.counters.session_seconds += time.monotonic() - began


async def _first_request(
    socket: web.WebSocketResponse, name: str, session_log: SessionLog, state: ServerState
) -> Start | Prepare:
    """What a client wants, which may ask before what is left of its tickets, a bounded number of times."""
    for left in range(MAX_INQUIRIES, -1, -1):
        request: Start | Prepare | Tickets = await receive(socket, Start, Prepare, Tickets, timeout=START_SECONDS)
        if not isinstance(request, Tickets):
            return request
        if left:
            await send(socket, await held(request, name, session_log, state))
    raise Refusal("too many tickets were asked for over one connection")


async def held(request: Tickets, name: str, session_log: SessionLog, state: ServerState) -> Held:
    """What this side has of a client's tickets, after it has destroyed it where that is asked for.

    Args:
        name: in the client's certificate; of tickets that are not this client's nothing is destroyed, and nothing told.
    """
    if state.material is None:
        return Held(None)
    try:
        if request.destroy:
            count = await state.material.discard(*request.tickets, peer=name)
            session_log.info("destroyed %d prepared sessions, as the client asked for", count)
        return Held(list(await state.material.held(request.tickets, name)))
    except UserError as error:  # a client keeps what is unknown, and goes on without
        session_log.warning("without prepared material: %s", error)
        return Held(["unknown"] * len(request.tickets))


def _check_length(start: Start, state: ServerState) -> None:
    """Raise `Refusal` for a session of more tokens than are allowed, or than the model has positions for."""
    limits, asked = state.limits, max(start.prompt_length, *start.others, 0) + start.max_new_tokens
    if start.conversation and not limits.conversation_tokens:
        raise Refusal("conversations are not allowed")
    if start.conversation and asked > limits.conversation_tokens:
        raise Refusal(f"at most {limits.conversation_tokens} tokens a conversation are allowed")
    if not start.conversation and start.max_new_tokens > limits.max_new_tokens:
        raise Refusal(f"at most {limits.max_new_tokens} new tokens a session are allowed")

    if start.drafts > start.max_new_tokens or (start.drafts and not state.welcome.draft_tokens):
        raise Refusal(f"{start.drafts} drafts beside {start.max_new_tokens} new tokens are not allowed")
    if start.others:
        _check_batch(start, limits)

    positions = state.welcome.description.positions - len(state.welcome.prefix)
    if asked - 1 > positions:
        raise Refusal(
            f"{asked - start.max_new_tokens} prompt tokens and {start.max_new_tokens} new ones do not fit the "
            f"{positions} positions that the model has for them"
        )


def _check_batch(start: Start, limits: Limits) -> None:
    """Raise `Refusal` for more prompts than may share the passes of a session, or with what is for one prompt."""
    lengths = [start.prompt_length, *start.others]
    if len(lengths) > limits.batch_prompts:
        most = f"at most {limits.batch_prompts} prompts" if limits.batch_prompts > 1 else "one prompt"
        raise Refusal(f"{most} a session {'are' if limits.batch_prompts > 1 else 'is'} allowed")
    if start.conversation or start.drafts or start.ticket is not None:
        raise Refusal("conversations, drafts and prepared material are for one prompt a session")
    tokens = sum(lengths) + len(lengths) * start.max_new_tokens
    if tokens > limits.batch_tokens:
        raise Refusal(f"at most {limits.batch_tokens} tokens of several prompts a session are allowed, not {tokens}")


def _check_preparing(request: Prepare, state: ServerState) -> None:
    """Raise `Refusal` for material that nobody could use, or where none is kept."""
    if state.material is None:
        raise Refusal("this server prepares nothing: it was started without --material")
    if request.tokens > (positions := state.welcome.description.positions):
        raise Refusal(f"material for {request.tokens} tokens was asked for, and the model has {positions} positions")


@dataclass(frozen=True)
class Session:
    """One client's session, from its slot on."""

    socket: web.WebSocketResponse
    client: str  # name in its certificate
    usage: Usage
    log: SessionLog
    state: ServerState
    progress: Progress

    async def answer(self, start: Start) -> None:
        """One pass for the prompt and one for every `Next`."""
        welcome, limits = self.state.welcome, self.state.limits
        lengths = [len(welcome.prefix) + one + start.max_new_tokens for one in (start.prompt_length, *start.others)]
        length = sum(lengths)
        # In a conversation messages' tokens are counted too, and which of all will be answers' is the client's affair.
        passes = 1 if start.conversation else start.max_new_tokens
        taken = await self._take(start, Size(length - 1 + start.drafts, passes + start.drafts))
        asked = dict(max_new_tokens=start.max_new_tokens, prompt_length=start.prompt_length, drafts=start.drafts)
        job = self._job(prepared=taken is not None, **asked, others=start.others)
        self.progress.idle_seconds = limits.idle_seconds if start.conversation else None
        self.progress.several = bool(start.others)
        memory = memory_for(
            welcome.description,
            length,
            limits.memory_gb,
            taken.nbytes if taken is not None else 0,
            draft_tokens=welcome.draft_tokens if start.drafts else 0,
            prompts=lengths if start.others else (),
        )
        accepted = Accepted(job.session, prepared=taken is not None)
        asking = Asking(start.max_new_tokens - 1, start.drafts, welcome.draft_tokens, conversation=start.conversation)
        asking.prompts = len(lengths)
        await self._compute(job, memory, accepted, asking, material=taken)

    async def prepare(self, request: Prepare) -> None:
        """Compute a ticket's material, or what is missing of it."""
        assert self.state.material is not None
        try:
            size = Size(request.tokens, request.passes)
            growing = await self.state.material.grow(request.ticket, size, self.client)
            done = min(await growing.done(), request.parts)
            await growing.go_back(done)
            left = await growing.expire_within(request.expires_in)
        except UserError as error:
            raise Refusal(str(error)) from None
        self.log.info("preparing %d tokens, from part %d of %d on", request.tokens, done, growing.total)
        asked = dict(material_tokens=request.tokens, material_passes=request.passes)
        job = self._job(prepared=True, prepares=True, first_part=done, **asked)
        memory = memory_for(self.state.welcome.description, request.tokens, self.state.limits.memory_gb, prepares=True)
        accepted = Accepted(job.session, parts=done, expires_in=max(left, 1.0))
        await self._compute(job, memory, accepted, Asking(0), growing=growing)

    async def _take(self, start: Start, size: Size) -> Taken | None:
        """This side's half of the ticket that the client offers; None where there is none, and the client is told."""
        if start.ticket is None or self.state.material is None:
            return None
        try:
            return await self.state.material.take(start.ticket, size, self.client)
        except UserError as error:
            self.log.info("without prepared material: %s", error)
            return None

    def _job(self, *, prepared: bool, **what: Any) -> Job:
        welcome, state = self.state.welcome, self.state
        return Job(
            rank=SERVER,
            session=secrets.token_hex(16),
            links=("", ""),
            description=welcome.description,
            settings=welcome.settings,
            weights=str(state.folder / WEIGHTS_FILE),
            ahead=str(state.ahead) if prepared and state.ahead is not None else None,
            prefix_length=len(welcome.prefix),
            prefix=str(state.prefix) if state.prefix is not None else None,
            **what,
        )

    async def _compute(
        self,
        job: Job,
        memory: int | None,
        accepted: Accepted,
        asking: Asking,
        *,
        material: Taken | None = None,
        growing: Growing | None = None,
    ) -> None:
        """Run this side's party, carry its engine's link, until both sides are done."""
        socket, progress = self.socket, self.progress

        async def carry(message: bytes) -> None:
            try:
                await leave_in_time(socket.send_bytes(message))
            except ClientLeft:
                raise ConnectionResetError from None  # the link is broken, as where the connection is

        async with Tunnel(SERVER, job.session, carry, unread_for(memory)) as tunnel:
            party = await Party.start(msgspec.structs.replace(job, links=tunnel.links), memory, material)

            async def watch() -> None:
                try:
                    await _watch_party(party, self.log, self.state, self.usage, progress, tunnel.folder, growing)
                    if growing is not None:
                        await growing.finish()
                except UserError as error:  # of the store
                    raise SessionError(str(error)) from None
                if growing is not None:
                    progress.revealed = progress.tokens = progress.asked
                    await send(socket, Prepared())

            tasks: list[asyncio.Task[None]] = []
            try:
                await send(socket, accepted)
                work = asyncio.create_task(watch())
                listen = asyncio.create_task(_listen_to_client(socket, party, tunnel, asking, progress))
                link = asyncio.create_task(
                    _watch_link(tunnel, party, GRACE_SECONDS if growing is None else PREPARING_GRACE_SECONDS)
                )
                suspended = asyncio.create_task(party.suspended())
                tasks += [work, listen, link, suspended]
                await _end_of_session(work, listen, link, suspended, self.log)
                if progress.revealed < progress.asked:
                    raise ClientLeft("the client left in the middle of a pass")
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await party.stop()
                _log_link(tunnel, self.log)


async def _end_of_session(
    work: asyncio.Task[None],
    listen: asyncio.Task[None],
    link: asyncio.Task[None],
    suspended: asyncio.Task[None],
    session_log: SessionLog,
) -> None:
    """Wait until one of a session's tasks has ended, and raise what says most about why."""
    await asyncio.wait([work, listen, link, suspended], return_when=asyncio.FIRST_COMPLETED)
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


def _log_link(tunnel: Tunnel, session_log: SessionLog) -> None:
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
class Asking:
    """What a client may still ask for in its session, and what it has asked for."""

    left: int  # tokens, of each prompt
    drafts: int = 0  # of these, that may still be forgotten after their pass
    draft_tokens: int = 0  # most drafts of a pass
    conversation: bool = field(default=False, kw_only=True)
    drafted: int = 0  # in the latest pass
    prompts: int = 1  # in the latest pass

    def count(self, following: Next) -> int:
        """Count a pass; how many drafts of the one before are forgotten.

        Raises:
            SessionError: more than it may ask for.
        """
        ended = set(following.ended)
        if len(ended) < len(following.ended) or len(ended) >= self.prompts or max(ended, default=0) >= self.prompts:
            raise SessionError(f"{len(following.ended)} of {self.prompts} prompts were said to have ended")
        if following.kept > self.drafted:
            raise SessionError(f"{following.kept} drafts were kept of {self.drafted}")
        dropped = self.drafted - following.kept
        left, drafts = self.left + dropped, self.drafts - dropped
        own = following.tokens - following.drafts
        if not left:
            raise SessionError("all tokens were asked for already")
        if following.tokens > left or own < 1 or (own > 1 and not self.conversation):
            raise SessionError(f"{following.tokens} tokens were asked for at once")
        if following.drafts > min(self.draft_tokens, drafts):
            raise SessionError(f"{following.drafts} drafts were asked for at once")
        self.left, self.drafts, self.drafted = left - following.tokens, drafts, following.drafts
        self.prompts -= len(ended)
        return dropped


@dataclass
class Progress:
    """Passes of one session, each of which reveals a token of every prompt, and one more for each of its drafts."""

    asked: int = 1
    revealed: int = 0
    tokens: int = 0  # revealed
    several: bool = False  # prompts share the passes
    computing: bool = False  # it had a slot
    idle_seconds: float | None = None  # that a conversation may wait for its next message; None for no conversation
    more: asyncio.Event = field(default_factory=asyncio.Event)  # a further pass was asked for

    @property
    def waits(self) -> bool:
        """Whether it is for the client to go on."""
        return self.revealed == self.asked


async def _watch_party(
    party: Party,
    session_log: SessionLog,
    state: ServerState,
    usage: Usage,
    progress: Progress,
    folder: Path,
    growing: Growing | None,
) -> None:
    """Log what the party reports, and keep the parts of material that it leaves in `folder`, until it has finished."""
    sent = received = 0

    patience = min(LINK_SECONDS, state.limits.stall_seconds)
    while True:
        event = await _next_event(party, progress, patience)
        match event:
            case None:
                return
            case Linked():
                patience = state.limits.stall_seconds
            case PartDone(number, communication):
                assert growing is not None
                await growing.add(number, folder, communication)
            case StageDone(communication):
                if growing is not None:
                    growing.note(communication)
                sent, received = sent + communication.sent_bytes, received + communication.received_bytes
                state.counters.sent_bytes += communication.sent_bytes
                state.counters.received_bytes += communication.received_bytes
            case Revealed(rows=rows):
                progress.revealed += 1
                progress.tokens += rows
                state.counters.tokens += rows
                for _ in range(rows):
                    await usage.count_token()
                session_log.info(
                    "%s, %d bytes sent, %d received so far",
                    "a token" if rows == 1 else f"{rows} tokens{'' if progress.several else ' with drafts'}",
                    sent,
                    received,
                    fields={"sent_bytes": sent, "received_bytes": received},
                )
            case Failed(reason):
                session_log.warning("%s", reason)
                raise SessionError("the server's party failed")  # why may be none of the client's business


async def _next_event(party: Party, progress: Progress, patience: float) -> Event | None:
    """What the party reports next.

    Raises:
        SessionError: nothing for `patience` seconds, or while it is for the client to go on with a conversation, for
            as long as that may take.
    """
    event = asyncio.ensure_future(party.event())
    try:
        if progress.waits and progress.idle_seconds is not None:
            more = asyncio.ensure_future(progress.more.wait())
            await asyncio.wait({event, more}, timeout=progress.idle_seconds, return_when=asyncio.FIRST_COMPLETED)
            more.cancel()
            if progress.waits and not event.done():
                raise SessionError(f"nothing was asked for {progress.idle_seconds:g} s")
        progress.more.clear()
        return await asyncio.wait_for(event, patience)
    except asyncio.TimeoutError:
        raise SessionError(f"nothing happened for {patience:g} s") from None
    finally:
        event.cancel()


def _printable(text: str) -> str:
    """What a stranger has written, fit for one line of a log."""
    return "".join(c for c in text[:120] if c.isprintable())


async def _watch_link(tunnel: Tunnel, party: Party, grace: float) -> None:
    """Raise once the engines' link is broken although this side's party has not finished."""
    await party.without_link(tunnel, grace)
    raise SessionError("the engines' link broke")


async def _listen_to_client(
    socket: web.WebSocketResponse, party: Party, tunnel: Tunnel, asking: Asking, progress: Progress
) -> None:
    """Pass on the client's `Next`s, as far as it may ask, and its engine's bytes; until it leaves."""
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
            following = expect(message, Next)
            dropped = asking.count(following)
            progress.asked += 1
            progress.more.set()
            await party.proceed(following.tokens, drafts=following.drafts, dropped=dropped, ended=following.ended)
