"""The client's side of preparing: computing, before any prompt, what makes later sessions fast."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from entropi.errors import UserError
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.parts import kept_bytes, parts_for
from entropi.private.preparation.store import Store
from entropi.private.preparation.tickets import Entry, State
from entropi.private.sessions.inquiry import ask_about, usable
from entropi.private.sessions.material import Growing, Material, Size
from entropi.private.sessions.memory import memory_for, unread_for
from entropi.private.sessions.party_handle import PREPARING_GRACE_SECONDS, Party
from entropi.private.sessions.party_session import LINK_SECONDS, PartySession
from entropi.private.wire.certificates import Tls
from entropi.private.wire.channel import LostServer, ServerAddress, open_channel, welcome_from
from entropi.private.wire.messages import Accepted, Failed, Job, Linked, PartDone, Prepare, StageDone, Welcome
from entropi.private.wire.tunnel import Tunnel
from entropi.records import StageCommunication

NEW_TOKENS = 64  # that are prepared for, if nobody says
EXPIRY_SECONDS = 3600.0  # by which one side may keep its half for less than the other, and nobody is told


@dataclass(frozen=True)
class Watcher:
    """What a caller may want to see: how many parts there are and are there already, each part, what else happens.

    A part may take minutes; `piece` is called for everything that is computed of it.
    """

    begin: Callable[[int, int], None] = field(default=lambda total, done: None)
    part: Callable[[int, StageCommunication], None] = field(default=lambda done, communication: None)
    piece: Callable[[StageCommunication], None] = field(default=lambda communication: None)
    status: Callable[[str], None] = field(default=lambda line: None)


def prepare(
    server: str,
    tokens: int,
    store: Store,
    watcher: Watcher | None = None,
    *,
    new_tokens: int | None = None,
    draft_tokens: int = 0,
    tls: Tls | None = None,
    memory_gb: float | None = None,
) -> str:
    """Prepare one session of at most `tokens` tokens, prompt and answer together; the ticket's id.

    What an earlier call began for a session of this size is gone on with.

    Args:
        new_tokens: of these, most that are answered; by default `NEW_TOKENS`, or `tokens` if that is less.
        draft_tokens: beside these, drafts that may turn out wrong: what is prepared for them is used up all the same.

    Raises:
        UserError: a refusal, no room, a server or link that dies; what is prepared by then is kept.
    """
    where = ServerAddress.at(server, tls)
    return asyncio.run(_prepare(where, _size(tokens, new_tokens, draft_tokens), store, watcher or Watcher(), memory_gb))


def ready(
    server: str,
    tokens: int,
    store: Store,
    *,
    new_tokens: int | None = None,
    draft_tokens: int = 0,
    tls: Tls | None = None,
    status: Callable[[str], None] = lambda line: None,
) -> int:
    """How many sessions of just this size both sides have prepared, for what the server serves now.

    What the server has lost is destroyed here too; `status` is told. Other arguments as of `prepare`.

    Raises:
        UserError: nobody there, or not an entropi server.
    """
    where, asked = ServerAddress.at(server, tls), _size(tokens, new_tokens, draft_tokens)

    async def count() -> int:
        async with open_channel(where) as (_, socket):
            welcome = await welcome_from(socket, where.name)
            size = Size(asked.tokens + len(welcome.prefix), asked.passes)
            material = Material(store, welcome)
            found = [one for one in await material.fitting(size, where.name) if one[1] == size]
            return len(await usable(material, socket, where.name, found, status))

    return asyncio.run(count())


def tell_deleted(entries: Sequence[Entry], tls: Tls | None = None) -> list[str]:
    """Have servers destroy their halves of what has been destroyed here; one line for every half that stays, or may."""
    lines = []
    for server in sorted({entry.peer for entry in entries}):
        theirs = [entry for entry in entries if entry.peer == server]
        until = when(max(entry.expires for entry in theirs))
        try:
            states = asyncio.run(_have_destroyed(ServerAddress.at(server, tls), theirs))
        except UserError as error:
            lines.append(f"{server} keeps its half until {until}: {error}")
            continue
        if states is None:
            lines.append(f"{server} was started without --material: what it may have kept before stays until {until}")
        elif unknown := sum(state == "unknown" and entry.state == "ready" for entry, state in zip(theirs, states)):
            lines.append(
                f"{server} does not know {unknown} of these: whoever has the other half keeps it until {until}"
            )
    return lines


async def _have_destroyed(server: ServerAddress, entries: Sequence[Entry]) -> list[State] | None:
    async with open_channel(server) as (_, socket):
        await welcome_from(socket, server.name)
        return await ask_about(socket, server.name, [entry.ticket.hex() for entry in entries], destroy=True)


def when(expires: float) -> str:
    """A time, in seconds since 1970, for people: in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(expires))


def _size(tokens: int, new_tokens: int | None, draft_tokens: int) -> Size:
    passes = min(NEW_TOKENS, tokens) if new_tokens is None else new_tokens
    if not 1 <= passes <= tokens:
        raise UserError(f"{passes} new tokens of {tokens}: there must be at least 1, and no more than all")
    if draft_tokens < 0:
        raise UserError(f"{draft_tokens} draft tokens: there cannot be fewer than none")
    return Size(tokens + draft_tokens, passes + draft_tokens)


async def _prepare(server: ServerAddress, asked: Size, store: Store, watcher: Watcher, memory_gb: float | None) -> str:
    async with open_channel(server) as (_, socket):
        welcome = await welcome_from(socket, server.name)
        size = Size(asked.tokens + len(welcome.prefix), asked.passes)
        if size.tokens > welcome.description.positions:
            most = welcome.description.positions - len(welcome.prefix)
            raise UserError(f"material for {asked.tokens} tokens was asked for, and {server.name} takes at most {most}")
        material = Material(store, welcome)
        growing = await material.begin(size, server.name)
        try:
            session = PartySession(server, socket, watcher.status)
            accepted = await _agree(session, welcome, material, growing)
            await growing.go_back(accepted.parts)
            watcher.begin(growing.total, accepted.parts)
            memory = memory_for(welcome.description, size.tokens, memory_gb, prepares=True)
            async with Tunnel(CLIENT, accepted.session, socket.send_bytes, unread_for(memory)) as tunnel:
                job = Job(
                    rank=CLIENT,
                    session=accepted.session,
                    links=tunnel.links,
                    description=welcome.description,
                    settings=welcome.settings,
                    prefix_length=len(welcome.prefix),
                    prepares=True,
                    material_tokens=size.tokens,
                    material_passes=size.passes,
                    first_part=accepted.parts,
                )
                party = await Party.start(job, memory)
                work = _follow(session, party, tunnel, growing, watcher)
                await session.finish(party, tunnel, work, PREPARING_GRACE_SECONDS)
        finally:
            growing.release()
    return growing.ticket


async def _agree(session: PartySession, welcome: Welcome, material: Material, growing: Growing) -> Accepted:
    """Have the server accept that it prepares its half; of what it refuses, only what was computed before stays."""
    server, size = session.where, growing.size
    parts = parts_for(welcome.description, welcome.settings, size.tokens, size.passes)
    here, there = (kept_bytes(parts, rank) / 1e6 for rank in (CLIENT, SERVER))
    session.status(f"{here:,.1f} MB will be kept here and {there:,.1f} MB at {server}, until a session uses it")
    done, own = await growing.done(), await growing.expire_within(math.inf)
    try:
        asked = Prepare(size.tokens, size.passes, welcome.digest(), growing.ticket, max(own, 1.0), done)
        await session.say(asked)
        accepted = await session.wait_for_slot()
    except LostServer:  # which may have begun it: the next one goes on with it
        raise
    except BaseException:
        if not done:
            await material.discard(growing.ticket)
        raise
    if accepted.expires_in is None or accepted.parts > done:
        raise UserError(f"{server} does not follow the protocol")
    left = await growing.expire_within(accepted.expires_in)
    if left < own - EXPIRY_SECONDS:
        session.status(f"{server} keeps its half until {when(time.time() + left)} only, and so does this side")
    return accepted


async def _follow(session: PartySession, party: Party, tunnel: Tunnel, growing: Growing, watcher: Watcher) -> None:
    """Keep the parts that this side's party has computed; at the end, wait until the server has its own."""
    try:
        event = await asyncio.wait_for(party.event(), LINK_SECONDS)
    except asyncio.TimeoutError:
        raise LostServer(f"no engine link with {session.where} within {LINK_SECONDS} s") from None
    while event is not None:
        match event:
            case PartDone(number, communication):
                await growing.add(number, tunnel.folder, communication)
                watcher.part(number + 1, communication)
            case Failed(reason):
                raise LostServer(f"preparing with {session.where} failed: {reason}")
            case StageDone(communication):
                growing.note(communication)
                watcher.piece(communication)
            case Linked():
                pass
        event = await party.event()
    await session.kept.wait()  # the server's half first: what this side offers, it has
    await growing.finish()
