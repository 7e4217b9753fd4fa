"""What each side knows of the other's tickets, and what a refusal leaves: over connections, nothing is computed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("spu")

from entropi.errors import UserError
from entropi.private.admission.audit import Audit
from entropi.private.admission.door import Door
from entropi.private.admission.limits import Limits
from entropi.private.admission.logs import SessionLog
from entropi.private.admission.monitoring import Counters
from entropi.private.admission.quotas import Quota
from entropi.private.admission.slots import Slots
from entropi.private.compute.description import Description
from entropi.private.compute.settings import Settings
from entropi.private.preparation.store import Quota as StoreQuota
from entropi.private.preparation.store import Store
from entropi.private.sessions import preparing, server, server_session
from entropi.private.sessions.inquiry import ask_about, usable
from entropi.private.sessions.material import Growing, Material, Size
from entropi.private.sessions.server_state import ServerState
from entropi.private.wire.channel import ServerAddress, open_channel, welcome_from
from entropi.private.wire.messages import MAX_CLIENT_MESSAGE, MAX_TICKETS, Held, Tickets, Welcome, encode
from entropi.private.wire.server_channel import text_frames
from entropi.records import StageCommunication
from private_reference import FIELDS

MODEL = Description(**{**FIELDS, "layers": 1})
WELCOME = Welcome(MODEL, "{}", Settings())
SIZE = Size(4, 2)
WEIGHTS = "0" * 64
IDS = [bytes([number]) * 16 for number in range(1, 6)]


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[SimpleNamespace]:
    with Store(tmp_path / "client") as ours, Store(tmp_path / "server") as theirs:
        yield SimpleNamespace(client=ours, server=theirs)


def run(work: Callable[[str], Awaitable[None]], material: Material | None) -> None:
    """Do something with the address of a server."""

    async def running() -> None:
        async with serving(material) as address:
            await work(address)

    asyncio.run(running())


@contextlib.asynccontextmanager
async def serving(material: Material | None) -> AsyncIterator[str]:
    """The address of a server without TLS, as far as it needs no model."""
    limits, counters = Limits(), Counters()
    state = ServerState(
        folder=Path(),
        welcome=WELCOME,
        digest=WELCOME.digest(),
        limits=limits,
        slots=Slots(limits, counters),
        preparing=Slots(replace(limits, max_sessions=1), counters),
        quota=Quota(limits, None),
        counters=counters,
        table=None,
        prefix=None,
        audit=Audit(counters),
        material=material,
        watched=None,
        greeting=text_frames(encode(WELCOME)),
    )
    async with contextlib.AsyncExitStack() as closing:
        door = Door(None, 64, 48, state.audit)
        address = ("127.0.0.1", 0)
        yield f"127.0.0.1:{await server._listen(server._application(state, door), door, address, closing)}"


def make_ready(store: Store, material: Material, ticket: bytes, peer: str) -> None:
    growth = store.grow(ticket, material._binding(SIZE, peer), 8)
    growth.add("000000", {"a": np.zeros(1, np.uint64)})
    growth.finish()


def tickets(store: Store) -> set[bytes]:
    return {entry.ticket for entry in store.entries()}


async def look(address: str, material: Material) -> tuple[set[bytes], list[str]]:
    """Which tickets a client would use, and what it says."""
    said: list[str] = []
    where = ServerAddress.at(address, None)
    async with open_channel(where) as (_, socket):
        await welcome_from(socket, address)
        found = await usable(material, socket, address, await material.fitting(Size(1, 1), address), said.append)
    return {bytes.fromhex(ticket) for ticket, _ in found}, said


def test_a_client_keeps_what_a_server_does_not_know_and_destroys_what_it_has_lost(stores):
    one, gone, unknown, other = IDS[:4]
    ours, theirs = Material(stores.client, WELCOME), Material(stores.server, WELCOME, WEIGHTS)
    for ticket in (one, gone):
        make_ready(stores.server, theirs, ticket, "")
    make_ready(stores.server, Material(stores.server, WELCOME, "1" * 64), other, "")
    stores.server.take(gone, theirs._binding(SIZE, ""))

    async def without(address: str) -> None:
        for ticket in (one, gone, unknown, other):
            make_ready(stores.client, ours, ticket, address)
        found, (line,) = await look(address, ours)
        assert not found
        assert "was started without --material: what is prepared is kept here" in line
        assert len(tickets(stores.client)) == 4

        async with serving(theirs) as second, open_channel(ServerAddress.at(second, None)) as (_, socket):
            await welcome_from(socket, second)
            said: list[str] = []
            every = await ours.fitting(Size(1, 1), address)  # as if this were another one of the same name
            assert await usable(ours, socket, address, every, said.append) == [(one.hex(), SIZE)]
            assert said == [f"{address} has lost its half of 1 prepared session: destroyed here too"]
            assert tickets(stores.client) == {one, unknown, other}
            await usable(ours, socket, address, [(other.hex(), SIZE), (unknown.hex(), SIZE)], said.append)
            assert "other weights or settings than 1 prepared session would need: kept here" in said[1]
            assert "does not know 1 prepared session" in said[1]
            assert said[1].endswith("which another server may have a half of: kept here")
        assert tickets(stores.client) == {one, unknown, other}
        assert tickets(stores.server) == {one, other}

    run(without, None)


def test_what_a_session_of_the_same_user_is_just_taking_stays(stores):
    """Its server has taken the other half by then, and it will take its own in the next moment."""
    ours, theirs = Material(stores.client, WELCOME), Material(stores.server, WELCOME, WEIGHTS)
    make_ready(stores.server, theirs, IDS[0], "")
    stores.server.take(IDS[0], theirs._binding(SIZE, ""))

    async def both(address: str) -> None:
        make_ready(stores.client, ours, IDS[0], address)
        claim = await ours.claim(IDS[0].hex(), SIZE, address)
        assert claim is not None
        assert await ours.claim(IDS[0].hex(), SIZE, address) is None
        assert not (await look(address, ours))[0]
        assert tickets(stores.client) == {IDS[0]}
        claim.release()
        await look(address, ours)
        assert not tickets(stores.client)
        assert await ours.claim(IDS[0].hex(), SIZE, address) is None

    run(both, theirs)


def test_what_a_client_destroys_is_destroyed_at_the_server_if_it_is_its_own(stores, tmp_path):
    ours, theirs = Material(stores.client, WELCOME), Material(stores.server, WELCOME, WEIGHTS)
    own, of_another, unknown, lost = IDS[:4]
    make_ready(stores.server, theirs, own, "")
    make_ready(stores.server, theirs, of_another, "mallory")

    async def delete(address: str) -> None:
        for ticket in (own, of_another, unknown):
            make_ready(stores.client, ours, ticket, address)
        make_ready(stores.client, ours, lost, "127.0.0.1:9")
        chosen = stores.client.chosen("all")
        stores.client.delete("all")
        (lost_line, line) = sorted(await asyncio.to_thread(preparing.tell_deleted, chosen), key=len, reverse=True)
        until = preparing.when(chosen[-1].expires)
        assert f"127.0.0.1:9 keeps its half until {until}: cannot reach a server" in lost_line
        assert line == f"{address} does not know 2 of these: whoever has the other half keeps it until {until}"
        assert tickets(stores.server) == {of_another}

    run(delete, theirs)

    log = SessionLog(logging.getLogger("test"), "s", "mallory", quiet=True)
    state: Any = SimpleNamespace(material=theirs)
    request = Tickets([of_another.hex(), own.hex()], destroy=True)
    assert asyncio.run(server_session.held(request, "eve", log, state)) == Held(["unknown", "unknown"])
    assert asyncio.run(server_session.held(request, "mallory", log, state)) == Held(["gone", "unknown"])
    assert not tickets(stores.server)
    stores.server.close()  # as if its disk had failed
    assert asyncio.run(server_session.held(request, "mallory", log, state)) == Held(["unknown"] * 2)


def test_inquiries_are_bounded(stores):
    assert len(encode(Tickets(["0" * 32] * MAX_TICKETS, destroy=True))) < MAX_CLIENT_MESSAGE

    async def many(address: str) -> None:
        async with open_channel(ServerAddress.at(address, None)) as (_, socket):
            await welcome_from(socket, address)
            assert await ask_about(socket, address, ["0" * 32] * 1001) == ["unknown"] * 1000
            with pytest.raises(UserError, match="too many tickets were asked for over one connection"):
                await ask_about(socket, address, ["0" * 32])

    run(many, Material(stores.server, WELCOME, WEIGHTS))


def test_a_refused_preparation_leaves_nothing_that_was_not_there(stores, tmp_path):
    ours = Material(stores.client, WELCOME)

    async def prepare(address: str) -> None:
        async def refused() -> None:
            where = ServerAddress.at(address, None)
            with pytest.raises(UserError, match="no room for the material of 4 tokens"):
                await preparing._prepare(where, SIZE, stores.client, preparing.Watcher(), None)

        await refused()
        assert not stores.client.entries()
        growing = await ours.begin(SIZE, address)
        growing._growth.add("000000", {"a": np.zeros(1, np.uint64)})
        growing.release()
        await refused()
        assert tickets(stores.client) == {bytes.fromhex(growing.ticket)}

    with Store(tmp_path / "small", quota=StoreQuota(size=10)) as small:
        run(prepare, Material(small, WELCOME, WEIGHTS))
        assert not small.entries()


def test_two_who_prepare_do_not_take_each_others_ticket(stores):
    async def begin() -> Growing:
        return await Material(stores.client, WELCOME).begin(SIZE, "a server")

    first, second = asyncio.run(begin()), asyncio.run(begin())
    assert first.ticket != second.ticket
    asyncio.run(first.done())  # nobody else prepares it
    first.release()
    again = asyncio.run(begin())
    assert again.ticket == first.ticket
    assert len(stores.client.entries()) == 2


def test_the_set_up_counts_with_the_next_part(stores, tmp_path, monkeypatch):
    growing = asyncio.run(Material(stores.client, WELCOME).begin(SIZE, "a server"))
    added: list[dict[str, np.ndarray]] = []
    monkeypatch.setattr(growing._growth, "add", lambda part, arrays: added.append(arrays))
    monkeypatch.setattr("entropi.private.sessions.material.load_file", lambda path: {})
    monkeypatch.setattr("os.unlink", lambda path: None)
    for name, number in (("setup", None), ("qkv", 0), ("qkv", 1)):
        counts = dict(sent_bytes=7, received_bytes=3, sent_messages=1, received_messages=1)
        cost = StageCommunication(name=name, layer=0, token=0, seconds=2.0, **counts)
        growing.note(cost)
        if number is not None:
            asyncio.run(growing.add(number, tmp_path, cost))
    assert [told["told"].tolist() for told in added] == [[4, 2, 20, 4000], [4, 2, 10, 2000]]
