"""Many who connect and want nothing good: an honest client is answered while they are there.

Every flood is bounded in connections and time and stays on this machine. The attackers come from the address of the
honest client, which is the harder case, or from another one of loopback.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("spu")
import aiohttp
from aiohttp import web

from entropi.errors import UserError
from entropi.private import connect
from entropi.private.admission import audit, door, monitoring
from entropi.private.admission.limits import Limits
from entropi.private.admission.logs import Sparing
from entropi.private.sessions import server_session
from entropi.private.wire.authority import issue
from entropi.private.wire.certificates import Tls
from entropi.private.wire.server_channel import (
    MOST_PINGS,
    ClientLeft,
    ControlChannel,
    Refusal,
    leave_in_time,
    text_frames,
)
from serving import (
    HANGING,
    PROMPT,
    TOLERANCE,
    Server,
    command,
    hello,
    no_parties_left,
    parties,
    plain_logits,
    wait_for,
)

pytest_plugins = ["serving"]  # its fixtures
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors and memory in /proc")
two_party = pytest.mark.two_party

HALF_OPEN = 1600
IDLE = 200
UNREAD = 42
DESCRIPTORS = 1024
MOST_GROWTH = 150_000_000  # bytes of the server's memory during a flood; without bounds it was 450 to 2,100 MB
LARGE_TOKENIZER = 12_000_000  # bytes


# --- Parts ------------------------------------------------------------------------------------------------------------


def make_audit():
    counters = monitoring.Counters()
    return counters, audit.Audit(counters)


@contextlib.asynccontextmanager
async def open_door(limits, handler=None):
    """A door without TLS before a server that says yes, its port and its counters."""

    async def yes(request):
        if handler is not None:
            return await handler(request, opened.guest(request))
        return web.Response(text="yes")

    counters, events = make_audit()
    opened = door.Door(None, limits.max_startups, limits.source_startups, events)
    app = web.Application(middlewares=[opened.attend])
    app.router.add_get("/", yes)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        yield opened, opened.open(runner.server, "127.0.0.1", 0), counters
    finally:
        opened.close()
        await runner.cleanup()


async def get(port, source="127.0.0.1"):
    connector = aiohttp.TCPConnector(local_addr=(source, 0))
    async with aiohttp.ClientSession(connector=connector) as http, http.get(f"http://127.0.0.1:{port}/") as response:
        return await response.text()


async def all_of(stream):
    """What the other side says until it ends the connection, which it may do by a reset."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while part := await asyncio.wait_for(stream.read(1 << 16), HANGING):
            said += part
    return said


async def has_ended(stream):
    """Whether the other side has ended the connection; it never says anything."""
    with contextlib.suppress(ConnectionResetError):
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(stream.read(1), 0.05) == b""
        return False
    return True


def test_newcomers_take_the_place_of_the_oldest_of_the_largest_crowd():
    async def scenario():
        async with open_door(Limits(max_startups=8, source_startups=6)) as (_, port, counters):

            async def enter(source):
                return await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))

            lonely = await enter("127.0.0.3")
            crowd = [await enter("127.0.0.2") for _ in range(6)]
            assert not any([await has_ended(reader) for reader, _ in [lonely, *crowd]])
            seventh = await enter("127.0.0.2")  # more than one address may have
            assert [await has_ended(reader) for reader, _ in crowd] == [True] + [False] * 5
            assert await get(port) == "yes"
            other = [await enter("127.0.0.4") for _ in range(2)]  # more than there may be at all
            ended = [await has_ended(reader) for reader, _ in [lonely, *crowd, seventh, *other]]
            assert ended == [False, True, True, *[False] * 7]
            assert counters.handshakes["crowded"] == 2
            for _, writer in [lonely, *crowd, seventh, *other]:
                writer.close()

    asyncio.run(scenario())


def test_who_has_asked_stays_before_who_has_not_and_sessions_stay_for_good():
    async def scenario():
        asked, finish = asyncio.Event(), asyncio.Event()

        async def handler(request, guest):
            if "inside" in request.query:
                with guest.admitted():
                    asked.set()
                    await finish.wait()
            asked.set()
            await finish.wait()
            return web.Response(text="yes")

        limits = Limits(max_startups=4, source_startups=4)
        async with open_door(limits, handler) as (_, port, counters), aiohttp.ClientSession() as http:
            waiting = []
            for query in ("?inside", ""):
                asked.clear()
                waiting.append(asyncio.create_task(http.get(f"http://127.0.0.1:{port}/{query}")))
                await asyncio.wait_for(asked.wait(), HANGING)
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
            await asyncio.sleep(0.1)
            assert counters.handshakes["crowded"] == 37  # all but three
            finish.set()
            for response in await asyncio.gather(*waiting):
                assert response.status == 200
            for _, writer in silent:
                writer.close()

    asyncio.run(scenario())


def test_silent_connections_end_after_a_while(monkeypatch):
    monkeypatch.setattr(door, "HANDSHAKE_SECONDS", 0.2)
    monkeypatch.setattr(door, "TICK_SECONDS", 0.05)

    async def scenario():
        async with open_door(Limits()) as (_, port, counters):
            silent, _ = await asyncio.open_connection("127.0.0.1", port)
            half, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nX-Slow: ")
            for stream in (silent, half):
                assert await all_of(stream) == b""
            assert counters.handshakes["silent"] == 2
            kept, writer = await asyncio.open_connection("127.0.0.1", port)  # and after an answer, as well
            writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            assert b"yes" in await all_of(kept)

    asyncio.run(scenario())


def test_a_system_without_descriptors_costs_the_connection_and_not_the_server(monkeypatch, caplog):
    async def scenario():
        async with open_door(Limits(max_startups=4)) as (opened, port, counters):
            silent, _ = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.sleep(0.05)

            class Exhausted:
                """A listening socket; the first connections meet a full table of descriptors."""

                def __init__(self, listening):
                    self.listening, self.failures = listening, 3

                def accept(self):
                    if self.failures:
                        self.failures -= 1
                        raise OSError(errno.EMFILE, "Too many open files")
                    return self.listening.accept()

                def fileno(self):
                    return self.listening.fileno()

                def close(self):
                    self.listening.close()

            loop, real = asyncio.get_running_loop(), opened._listening[0]
            exhausted = opened._listening[0] = Exhausted(real)
            loop.remove_reader(real)
            loop.add_reader(exhausted, opened._accept, exhausted)
            first, _ = await asyncio.open_connection("127.0.0.1", port)
            assert await all_of(first) == b""  # closed at once, not left to wait
            assert await all_of(silent) == b""  # whose descriptor the next one has
            exhausted.failures = 0
            assert await asyncio.wait_for(get(port), HANGING) == "yes"
            assert counters.handshakes["descriptors"] >= 1

    asyncio.run(scenario())


def test_connections_that_fit_into_the_descriptors(monkeypatch):
    told = []
    monkeypatch.setattr(door.resource, "setrlimit", lambda _, limits: told.append(limits))
    for soft, hard, expected in ((1 << 20, 1 << 20, 64), (150, 1 << 20, 64), (150, 150, 150 - 1 * 16 - 8 - 96)):
        monkeypatch.setattr(door.resource, "getrlimit", lambda _, found=(soft, hard): found)
        assert door.startups_that_fit(Limits()) == expected
    assert told == [(184, 1 << 20), (150, 150)]
    with pytest.raises(UserError, match="may open 150 files, but 4 sessions"):
        door.startups_that_fit(Limits(max_sessions=4))


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
    ],
)
def test_what_one_subscriber_has(address, network):
    assert door.network_of(address) == network


@pytest.mark.parametrize("length", [0, 1, 125, 126, 300, 70_000, 1_000_000])
def test_a_message_in_fragments_arrives_as_one(length):
    message = json.dumps("a" * length).encode()

    async def handler(request):
        socket = web.WebSocketResponse(heartbeat=0.01, compress=False)  # with pings in between
        await socket.prepare(request)
        await server_session._greet(request, text_frames(message, 64 << 10))
        await server_session._greet(request, text_frames(b"b" * 300, 100))
        await socket.receive()
        return socket

    async def scenario():
        app = web.Application()
        app.router.add_get("/", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        async with aiohttp.ClientSession() as http, http.ws_connect(url, max_msg_size=1 << 22) as channel:
            received = [(await channel.receive(HANGING)) for _ in range(2)]
        await runner.cleanup()
        return received

    first, second = asyncio.run(scenario())
    assert (first.type, first.data.encode()) == (aiohttp.WSMsgType.TEXT, message)
    assert (second.type, second.data) == (aiohttp.WSMsgType.TEXT, "b" * 300)


def ping_flood(pings):
    """What a control channel receives of so many pings and a message behind them, and how often others had a turn."""
    told, turns = [], [0]

    async def others():
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async def handler(request):
        channel = ControlChannel(compress=False)
        await channel.prepare(request)
        await channel.send_str("ready")
        await asyncio.sleep(0.2)  # until everything has arrived
        competing = asyncio.create_task(others())
        try:
            told.append((await channel.receive()).data)
        except Refusal as refusal:
            told.append(str(refusal))
        competing.cancel()
        return channel

    async def scenario():
        app = web.Application()
        app.router.add_get("/", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        pongs = 0
        async with aiohttp.ClientSession() as http, http.ws_connect(url, autoping=False) as channel:
            await channel.receive(HANGING)
            for _ in range(pings):
                await channel.ping()
            await channel.send_str("hello")
            while (await channel.receive(HANGING)).type == aiohttp.WSMsgType.PONG:
                pongs += 1
        await runner.cleanup()
        return pongs

    return asyncio.run(scenario()), told, turns[0]


def test_a_flood_of_pings_ends_and_a_few_are_answered():
    """A hundred thousand empty ones, 600 KB, once kept a server busy for seconds in which nobody else had a turn."""
    pongs, told, turns = ping_flood(MOST_PINGS)
    assert (pongs, told) == (MOST_PINGS, ["hello"])
    assert turns >= pongs
    pongs, told, turns = ping_flood(1000)
    assert (pongs, told) == (MOST_PINGS, [f"more than {MOST_PINGS} pings within a minute"])
    assert turns >= pongs


def test_nothing_is_sent_for_ever():
    async def never():
        await asyncio.sleep(HANGING)

    with pytest.raises(ClientLeft, match="took nothing for 0"):
        asyncio.run(leave_in_time(never(), 0.01))


def test_a_client_that_does_not_read_is_not_waited_for_when_its_session_ends(monkeypatch):
    monkeypatch.setattr(server_session, "LEAVE_SECONDS", 0.05)

    class Full:
        """A connection whose other side takes nothing."""

        async def send_str(self, text):
            await asyncio.sleep(HANGING)

        async def close(self):
            await asyncio.sleep(HANGING)

    started = time.monotonic()
    asyncio.run(server_session.dismiss(Full(), "stopping"))
    asyncio.run(server_session.dismiss(Full()))
    assert time.monotonic() - started < HANGING / 2


def test_strangers_cannot_fill_the_log(caplog):
    logger = logging.getLogger("entropi.test.strangers")
    sparing = Sparing(10)
    logger.addFilter(sparing)
    for number in range(1000):
        logger.error("garbage %d", number)
    sparing._began -= 60
    logger.error("garbage %s", "again")
    assert len(caplog.messages) == 11
    assert caplog.messages[-1] == "garbage again (990 lines before were not written)"


# --- The audit log ----------------------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_flood_is_written_in_full_and_in_few_lines(tmp_path, monkeypatch):
    counters, path = monitoring.Counters(), tmp_path / "audit.jsonl"
    events = audit.Audit(counters, path)
    for number in range(5000):
        events.refused(f"10.0.{number % 3}.1", "tls", "no TLS")
    for number in range(3000):
        events.refused(f"2001:db8:{number:x}::/64", "timeout", "no TLS handshake")
    for number in range(3):  # computed, and so each for itself
        events.session("alice/00", "finished", "", {"session": str(number), "tokens": number}, computed=True)
    events.close()
    lines = lines_of(path)
    assert len(lines) <= 3 + audit.MOST_KINDS + 8 + 3
    assert sum(line.get("count", 1) for line in lines if line["event"] == "handshake refused") == 8000
    assert [line["tokens"] for line in lines if line["event"] == "session over"] == [0, 1, 2]
    assert counters.handshakes == {"tls": 5000, "timeout": 3000}
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="cannot write"):
        audit.Audit(counters, tmp_path / "nowhere" / "audit.jsonl")


# --- Floods of a real server ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    issue(folder, ["127.0.0.1"], ["alice", "eve"], days=2)
    issue(folder / "strangers", [], ["mallory"], days=2)
    return folder


def tls_of(folder, name, ca=None):
    return Tls(folder / f"{name}.pem", folder / f"{name}-key.pem", ca or folder / "ca.pem")


@pytest.fixture(scope="module")
def talkative(folded, tmp_path_factory):
    """The folded model with a tokenizer file that is large, by spaces that mean nothing."""
    folder = tmp_path_factory.mktemp("models") / "talkative"
    shutil.copytree(folded, folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " " * LARGE_TOKENIZER)
    return folder


def few_descriptors():
    """A command before the server's: soft and hard limit."""
    return ["bash", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "bash"]


@pytest.fixture(scope="module")
def guarded(folded, scratch, authority):
    """A server with TLS that may open 1,024 files."""
    keys = ["--tls-cert", authority / "127.0.0.1.pem", "--tls-key", authority / "127.0.0.1-key.pem"]
    options = [*keys, "--clients-ca", authority / "ca.pem", "--audit-log", scratch / "audit.jsonl"]
    started = Server(folded, scratch / "guarded.log", *options, prefix=few_descriptors())
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def unguarded(talkative, scratch):
    """A server on loopback, where everybody may connect, with a large welcome."""
    started = Server(talkative, scratch / "unguarded.log", prefix=few_descriptors())
    yield started
    started.process.kill()
    started.process.wait()


def memory_of(process):
    text = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s*(\d+)", text)[1])


def metrics(serving):
    wait_for(lambda: "metrics on" in serving.log)
    address = re.search(r"metrics on (http://\S+)", serving.log)[1]

    async def fetch():
        async with aiohttp.ClientSession() as http, http.get(address) as response:
            return await response.text()

    text = asyncio.run(fetch())
    samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


@contextlib.contextmanager
def held(serving, count, source, first=None):
    """So many connections, kept open by this process; `first` is what each says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, count + 500), hard), hard))
    host, port = serving.address().split(":")
    connections = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):
                connection = socket.create_connection((host, int(port)), HANGING, source_address=(source, 0))
                connections.append(connection)
                if first is not None:
                    connection.sendall(first)
        yield connections
    finally:
        for connection in connections:
            connection.close()


def honest(serving, model, tls):
    """Whether a client is answered, once, with what the model says."""
    answer = connect(serving.address(), tls).ask(PROMPT, 1)
    expected = plain_logits(model[1], answer.record.prompt_tokens)
    return bool(np.abs(answer.logits[0] - expected).max() < TOLERANCE)


def client_hello():
    """The first bytes of a TLS handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


@two_party
@pytest.mark.parametrize(("source", "greets"), [("127.0.0.1", False), ("127.0.0.1", True), ("127.0.0.2", True)])
def test_half_open_handshakes(guarded, model, authority, source, greets):
    address = guarded.address()
    before, lines = memory_of(guarded.process), guarded.log.count("\n")
    with held(guarded, HALF_OPEN, source, client_hello() if greets else None):
        assert honest(guarded, model, tls_of(authority, "alice"))
        assert len(os.listdir(f"/proc/{guarded.process.pid}/fd")) < 200
        assert memory_of(guarded.process) - before < MOST_GROWTH
    counted = metrics(guarded)
    kinds = ("crowded", "timeout")  # the latter where a slow machine takes ten seconds for so many connections
    assert sum(counted[f'entropi_refused_handshakes_total{{kind="{kind}"}}'] for kind in kinds) >= HALF_OPEN - 200
    assert guarded.log.count("\n") - lines < 100
    assert address == guarded.address()
    assert "Traceback" not in guarded.log


@two_party
def test_half_open_handshakes_that_come_all_the_time(guarded, model, authority):
    """A few thousand, from other addresses, while a client asks."""
    host, port = guarded.address().split(":")
    stop, came, before = threading.Event(), [0], memory_of(guarded.process)

    def flood(source):
        kept = []
        for _ in range(1500):
            if stop.is_set():
                break
            with contextlib.suppress(OSError):
                kept.append(socket.create_connection((host, int(port)), 5, source_address=(source, 0)))
                came[0] += 1
            if len(kept) > 100:
                kept.pop(0).close()
            time.sleep(0.002)
        for connection in kept:
            connection.close()

    attackers = [threading.Thread(target=flood, args=(f"127.0.0.{number}",)) for number in (5, 6)]
    for attacker in attackers:
        attacker.start()
    try:
        assert honest(guarded, model, tls_of(authority, "alice"))
    finally:
        stop.set()
        for attacker in attackers:
            attacker.join(HANGING)
    assert came[0] > 500
    assert memory_of(guarded.process) - before < MOST_GROWTH


@two_party
@pytest.mark.parametrize("first", [None, b"GET /v1/session HTTP/1.1\r\nHost: a\r\nX: "])
def test_idle_connections(guarded, unguarded, model, authority, first):
    for serving, tls in ((guarded, tls_of(authority, "alice")), (unguarded, None)):
        with held(serving, IDLE, "127.0.0.1", first):
            assert honest(serving, model, tls)


@two_party
def test_the_metrics_take_no_more_than_their_part(unguarded, model):
    unguarded.address()
    address = re.search(r"metrics on http://([^/]+)/", unguarded.log)[1]
    with held(SimpleNamespace(address=lambda: address), 1000, "127.0.0.1"):
        wait_for(lambda: metrics(unguarded)["entropi_sessions"] == 0)  # the one before may be just ending
        assert honest(unguarded, model, None)
        assert len(os.listdir(f"/proc/{unguarded.process.pid}/fd")) < 200


@two_party
def test_garbage_in_numbers(unguarded, model):
    """What is not even HTTP, from a machine where nobody needs a certificate."""
    host, port = unguarded.address().split(":")
    before = unguarded.log.count("\n")
    for number in range(1000):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), HANGING) as raw:
            raw.sendall(b"\0 nothing \r\n\r\n")
            if number == 500:
                assert honest(unguarded, model, None)
    assert unguarded.log.count("\n") - before < 200
    assert "Traceback" not in unguarded.log


@two_party
def test_who_sends_nothing_but_pings_is_cut_off(unguarded, model):
    host, port = unguarded.address().split(":")
    upgrade = (
        b"GET /v1/session HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    heard = b""
    with socket.create_connection((host, int(port)), HANGING) as raw, contextlib.suppress(ConnectionError):
        raw.sendall(upgrade + b"\x89\x80\0\0\0\0" * 100_000)
        while part := raw.recv(1 << 16):
            heard += part
    wait_for(unguarded.sessions_closed)
    assert "more than 60 pings within a minute" in unguarded.log
    assert b"Refused" not in heard  # no farewell, during which it would go on
    assert heard.count(b"\x8a\0") <= 60
    assert honest(unguarded, model, None)


@two_party
def test_strangers_are_refused_and_written_down(guarded, authority, scratch):
    naked = ssl.create_default_context(cafile=authority / "ca.pem")
    stranger = tls_of(authority / "strangers", "mallory", authority / "ca.pem").client_context()
    before = metrics(guarded)['entropi_refused_handshakes_total{kind="certificate"}']
    host, port = guarded.address().split(":")
    for context in (naked, stranger):
        with (
            socket.create_connection((host, int(port))) as raw,
            context.wrap_socket(raw, server_hostname=host) as line,
            contextlib.suppress(ssl.SSLError, ConnectionError),
        ):
            assert line.recv(1) == b""
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            raw.recv(1000)
    wait_for(lambda: metrics(guarded)['entropi_refused_handshakes_total{kind="certificate"}'] == before + 2)
    reasons = {
        line["reason"] for line in lines_of(scratch / "audit.jsonl") if line.get("kind") in ("certificate", "tls")
    }
    assert {"peer did not return a certificate", "unable to get local issuer certificate"} <= reasons
    assert any("request" in reason for reason in reasons)


@two_party
def test_clients_that_never_read(unguarded, model):
    """Each asks for the welcome, which is larger than all buffers on the way, and takes nothing of it."""
    unguarded.address()
    before = memory_of(unguarded.process)
    upgrade = (
        b"GET /v1/session HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    said = hello().encode()
    mask = bytes(4)
    frame = bytes([0x81, 0x80 | len(said)]) + mask + said
    assert len(said) < 126
    with held(unguarded, UNREAD, "127.0.0.1", upgrade + frame) as connections:
        wait_for(lambda: unguarded.log.count(": opened") >= UNREAD)
        assert honest(unguarded, model, None)
        assert memory_of(unguarded.process) - before < MOST_GROWTH
        wait_for(lambda: all(ended(connection) for connection in connections))  # within the deadline of a send
    wait_for(unguarded.sessions_closed)
    assert memory_of(unguarded.process) - before < MOST_GROWTH


def ended(connection):
    """Whether the server has ended it, without reading what it sent."""
    state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state != 1  # ESTABLISHED


# --- Clients that are stopped -----------------------------------------------------------------------------------------


def stopped_in_the_middle(serving, mark, choose):
    """Seconds for which the server holds the slot of a client of which `choose(ask, engine)` is stopped."""
    address = serving.address()
    answered = serving.log.count(": a token, ")
    process = subprocess.Popen(
        command("ask", PROMPT, "--server", address, "--max-new-tokens", 8),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stopped = []
    try:
        wait_for(lambda: serving.log.count(": a token, ") > answered or process.poll() is not None)
        (engine,) = parties(mark, process.pid)
        for pid in choose(process.pid, engine):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        began = time.monotonic()
        assert metrics(serving)["entropi_sessions"] == 1
        wait_for(lambda: metrics(serving)["entropi_sessions"] == 0)
        return time.monotonic() - began
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        process.kill()
        process.communicate(timeout=HANGING)


@pytest.fixture(scope="module")
def patient(folded, scratch):
    """A server whose clients are stopped."""
    started = Server(folded, scratch / "stopped.log")
    yield started
    started.process.kill()
    started.process.wait()


@two_party
@pytest.mark.parametrize("who", ["client", "engine", "both"])
def test_a_stopped_client_gives_its_slot_back(patient, scratch, model, who):
    chosen = {"client": lambda ask, _: [ask], "engine": lambda _, engine: [engine], "both": lambda *all: all}[who]
    assert stopped_in_the_middle(patient, scratch, chosen) < 30
    assert honest(patient, model, None)
    assert no_parties_left(scratch)
    wait_for(patient.sessions_closed)
