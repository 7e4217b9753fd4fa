"""Honest clients are answered rightly while hostile ones do what they can: a server with TLS under siege.

    python benchmarks/siege.py --minutes 60 --sessions 20

Starts `entropi serve` of a small model with its default guards, in a process of its own, and keeps so many clients at
it, a quarter of them honest. These are `entropi ask` processes whose every token is compared with what the folded model
says in plaintext. The others are dealt from `HOSTILE` like cards, so that every kind comes equally often: connections
that stop half-way or drip, control messages and engines' frames that are damaged, replayed or too many, certificates of
strangers, clients that are stopped, killed, cancelled or never read.

The server's memory, descriptors, threads and logs are sampled all the time. The last line is JSON; the status is 1 if
an answer was wrong, an honest client was refused without one of the documented reasons, an attack got further than it
may, or the server died. However this process ends, the processes that it started end too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # what the tests say to servers is said here too

from entropi import cli
from entropi.machine import machine
from entropi.private.compute.folded import load_folded
from entropi.private.compute.program import run_plain
from entropi.private.compute.settings import Settings
from entropi.private.sessions.canary import TOLERANCE
from entropi.private.sessions.tokenization import own_tokenizer
from entropi.private.wire.authority import issue, revoke
from entropi.private.wire.certificates import Tls
from entropi.private.wire.channel import ServerAddress, greet
from entropi.private.wire.messages import Next, Start, encode
from link_messages import place, push, two_chunks
from private.wire.test_link import damaged
from private.wire.test_messages_fuzz import BINARY, CLOSE, SPECIAL, UPGRADE, ending_of, frame, mutated
from private.wire.test_messages_fuzz import TEXT as TEXT_FRAME
from serving import TEXT, hello, save_model

HOST = "127.0.0.1"
TOKENIZER_BYTES = 8_000_000  # of the served file, by spaces: more than the system's buffers of a connection hold
START_SECONDS = 300
ASK_SECONDS = 900  # for an honest answer, the queue included
ATTACK_SECONDS = 600
HELD_SECONDS = 20.0  # for which a client that does nothing does it, at least; the server may end it earlier
DRIP_SECONDS = 0.4  # between two bytes
PONG_SECONDS = 5.0  # a server hears of a client in its queue at least every 15
MARK_SECONDS = 600  # between two rows of the table
MOST_TAMPERING = 2  # clients at a time that compute and are hostile
MOST_TOKENS = 3  # of an honest answer
PIECE = 60_000  # bytes of one binary message
MOST_PUSHED = 3000  # megabytes that nobody waits for
SERVER_OPTIONS = (
    *("--max-sessions", 2, "--max-queue", 64, "--max-new-tokens", 8, "--self-test", "none"),
    *("--client-sessions", 64, "--client-tokens", 1_000_000),
)
PROMPTS = ("the key", "the keeper lies", "behind the old stone wall", TEXT[:40], TEXT[20:80])
# What docs/deploy.md says a client may be told although it did nothing wrong.
DOCUMENTED = ("is busy", "was busy", "closed the connection", "more tokens within 24 hours", "sessions already")

# `entropi ask`, whose messages of the engines' link are tampered with once so many have left.
CLIENT = """
import asyncio, random, signal, sys
import aiohttp
from entropi import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
fixed, kind, after = random.Random(int(sys.argv[1])), sys.argv[2], int(sys.argv[3])
channel, sent = aiohttp.ClientWebSocketResponse, 0
send, receive = channel.send_bytes, channel.receive

async def tampering(self, data, *rest):
    global sent
    sent += 1
    if sent == after:
        print("now", flush=True)
    data = bytearray(data)
    if sent >= after and kind in ("frames", "values"):
        least, most = (1, 80) if kind == "frames" else (200, len(data) - 1)
        for _ in range(3 if most > least else 0):
            data[fixed.randint(least, min(most, len(data) - 1))] ^= 1 << fixed.randrange(8)
    await send(self, bytes(data), *rest)
    if sent >= after and kind == "twice":
        await send(self, bytes(data), *rest)

async def deaf(self, *rest):
    while kind == "deaf" and sent >= after:
        await asyncio.sleep(1)
    return await receive(self, *rest)

channel.send_bytes, channel.receive = tampering, deaf
sys.exit(cli.main(sys.argv[4:]))
"""


Attack = Callable[["Server", random.Random], Awaitable[str]]


class Breach(Exception):
    """An attack got further than it may; the text says how far."""


# --- Processes that do not outlive this one ---------------------------------------------------------------------------


async def start(*words: object, ends_by: str = "KILL", descriptors: int | None = None, **how: Any) -> Any:
    """A process that gets a signal when this one dies, however it dies."""
    limit = ("prlimit", f"--nofile={descriptors}") if descriptors is not None else ()
    tied = ("setpriv", "--pdeathsig", ends_by)  # by the kernel; the signal outlives the two programs' exec
    return await asyncio.create_subprocess_exec(*map(str, (*tied, *limit, *words)), **how)


@contextlib.asynccontextmanager
async def running(*words: object, **how: Any) -> AsyncIterator[Any]:
    """A process that is killed at the end."""
    process = await start(*words, **how)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def stopped(pids: Sequence[int]) -> AsyncIterator[None]:
    """Processes that stand still meanwhile; whoever ends this one by force lets them go on."""
    script = "; ".join(["read nothing", *(f"kill -CONT {pid}" for pid in pids)])
    waker = await asyncio.create_subprocess_exec(
        "sh", "-c", script, stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, start_new_session=True
    )
    assert waker.stdin is not None
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        waker.stdin.close()
        await waker.wait()


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


# --- The server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A prompt and what follows it in plaintext, where each token leads by more than fixed point can be wrong."""

    prompt: str
    tokens: list[int]
    logits: np.ndarray


@dataclass
class Site:
    """What a server needs on disk, and what clients need to know of it."""

    folder: Path
    folded: Path
    questions: list[Question] = field(default_factory=list)

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    def tls(self, name: str) -> Tls:
        """Files of a client: "alice" is honest, "eve" comes in crowds, which displace each other, "oscar" comes alone,
        "mallory" has another authority, and "eve-revoked" is on the list.
        """
        folder = self.keys / "strangers" if name == "mallory" else self.keys
        return Tls(folder / f"{name}.pem", folder / f"{name}-key.pem", self.keys / "ca.pem")

    @functools.cached_property
    def contexts(self) -> dict[str, ssl.SSLContext]:
        names = ("alice", "eve", "oscar", "eve-revoked", "mallory", HOST)
        found = {name: self.tls(name).client_context() for name in names}
        found["nobody"] = ssl.create_default_context(cafile=self.keys / "ca.pem")
        return found


def prepare(folder: Path, tokenizer_bytes: int = TOKENIZER_BYTES) -> Site:
    """A model, folded, with questions; certificates. What an earlier run left in the folder is used."""
    site, file = Site(folder, folder / "folded"), folder / "questions.json"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        save_model(folder / "model")
        assert cli.main(["fold", str(folder / "model"), str(site.folded)]) == 0
        found = questions(site.folded)
        path = site.folded / "tokenizer.json"
        path.write_text(path.read_text() + " " * tokenizer_bytes)
        issue(site.keys, [HOST], ["alice", "eve", "oscar", "eve-revoked"], days=2)
        issue(site.keys / "strangers", [], ["mallory"], days=2)
        revoke(site.keys, ["eve-revoked"])
        file.write_text(json.dumps([(one.prompt, one.tokens, one.logits.tolist()) for one in found]))
    site.questions = [Question(one, two, np.asarray(three)) for one, two, three in json.loads(file.read_text())]
    return site


def questions(folded: Path) -> list[Question]:
    """What the folded model says in plaintext, as far as it is beyond doubt."""
    description, weights = load_folded(folded)
    encoder, found = own_tokenizer((folded / "tokenizer.json").read_text()), []
    for prompt in PROMPTS:
        ids = encoder.encode(prompt, description.positions)
        most = min(MOST_TOKENS, description.positions + 1 - len(ids))
        tokens, logits = run_plain(description, weights, ids, most, Settings().exact_softmax_as)
        two = [np.sort(row)[-2:] for row in logits]
        unclear = [number for number, (second, best) in enumerate(two) if best - second <= 2 * TOLERANCE]
        clear = unclear[0] if unclear else most
        if clear:
            found.append(Question(prompt, tokens[:clear], np.asarray(logits[:clear])))
    return found


class Server:
    """An `entropi serve` process and what /proc and its logs say of it."""

    def __init__(self, site: Site, process: Any, log: Path) -> None:
        self.site, self.process, self.log_file = site, process, log
        self.digest = ""

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def address(self) -> str:
        found = re.search(r"listening on ([^, ]+:\d+)", self.log)
        assert found, self.log
        return found[1]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    async def at_rest(self, seconds: float = 180.0) -> None:
        """Wait until all its sessions have ended and their processes are gone."""
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline:
            if self.log.count(": opened") == self.log.count(": closed") and not children_of(self.process.pid):
                await asyncio.sleep(12)  # handshakes that nobody goes on with end after ten seconds
                return
            await asyncio.sleep(0.5)

    def sample(self) -> dict[str, float]:
        """Megabytes, counts: of the server and of its sessions' processes together."""
        pid, sessions = self.process.pid, children_of(self.process.pid)
        found = {"seconds": time.monotonic(), "rss": memory(pid), "pss": memory(pid, "Pss"), "sessions": len(sessions)}
        found["sessions_rss"] = sum(memory(child) for child in sessions)
        found["load"] = os.getloadavg()[0]
        found["descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
        found["threads"] = len(os.listdir(f"/proc/{pid}/task"))
        logs = (self.log_file, self.site.folder / "audit.jsonl")
        found["log_kb"], found["audit_kb"] = (path.stat().st_size / 1e3 if path.exists() else 0 for path in logs)
        return found


def reasons(audit: Path) -> dict[str, int]:
    """Why handshakes and sessions ended, as the server wrote it down, without numbers; how often."""
    found: Counter[str] = Counter()
    for written in audit.read_text().splitlines() if audit.exists() else ():
        told = json.loads(written)
        reason = re.sub(r"\d+", "N", told["reason"])
        found[f"{told['event']}: {reason}"] += told.get("count", 1)
    return dict(found.most_common())


def memory(pid: int, name: str = "Rss") -> float:
    """Megabytes that a process has in memory; 0 if it is gone."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s*(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 / 1e6 if found else 0.0
    return 0.0


@contextlib.asynccontextmanager
async def serving(site: Site, *options: object, descriptors: int | None = None) -> AsyncIterator[Server]:
    """A server with TLS that listens."""
    log = site.folder / "server.log"
    for name in ("audit.jsonl", "samples.jsonl"):  # of an earlier run
        (site.folder / name).unlink(missing_ok=True)
    keys = ("--tls-cert", site.keys / f"{HOST}.pem", "--tls-key", site.keys / f"{HOST}-key.pem")
    more = ("--clients-ca", site.keys / "ca.pem", "--revoked", site.keys / "revoked.pem")
    audit = ("--audit-log", site.folder / "audit.jsonl")
    words = ("serve", site.folded, "--listen", f"{HOST}:0", *keys, *more, *audit, *options)
    with open(log, "wb") as file:
        process = await start(
            *(sys.executable, "-m", "entropi", *words),
            ends_by="TERM",
            descriptors=descriptors,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, "TMPDIR": str(site.folder), "XDG_STATE_HOME": str(site.folder / "state")},
        )
    server = Server(site, process, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "metrics on" not in server.log:
            if not server.alive or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{server.log}")
            await asyncio.sleep(0.2)
        server.digest = (await greet(ServerAddress.at(server.address, site.tls("alice")))).digest()
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 30)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()


# --- Honest clients ---------------------------------------------------------------------------------------------------


def ask_words(server: Server, prompt: str, tokens: int, name: str) -> tuple[object, ...]:
    """The words of `entropi ask` with a client's certificate."""
    tls = server.site.tls(name)
    keys = ("--tls-cert", tls.cert, "--tls-key", tls.key, "--server-ca", tls.ca)
    return ("ask", prompt, "--server", server.address, "--max-new-tokens", tokens, "--full-length", *keys)


async def honest(server: Server, fixed: random.Random) -> tuple[str, float]:
    """Ask and compare: "right", "wrong: ...", "refused: ...", "failed: ..."; the largest error of a logit."""
    question = fixed.choice(server.site.questions)
    count = fixed.randint(1, len(question.tokens))
    with tempfile.NamedTemporaryFile(dir=server.site.folder, suffix=".npy") as file:
        words = (*ask_words(server, question.prompt, count, "alice"), "--json", "--retries", 2, "--logits", file.name)
        pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
        async with running(sys.executable, "-m", "entropi", *words, **pipes) as process:
            try:
                out, said = await asyncio.wait_for(process.communicate(), ASK_SECONDS)
            except asyncio.TimeoutError:
                return f"failed: no answer within {ASK_SECONDS} s", 0.0
        if process.returncode == 0:
            found, logits = json.loads(out)["new_tokens"], np.load(file.name)
    if process.returncode:
        reason = (said.decode(errors="replace").strip().splitlines() or [f"status {process.returncode}"])[-1]
        return f"{'refused' if any(words in reason for words in DOCUMENTED) else 'failed'}: {reason}", 0.0
    error = float(np.abs(logits - question.logits[:count]).max())
    if found != question.tokens[:count] or not error < TOLERANCE:
        return (
            f"wrong: {found} after {question.prompt!r} for {question.tokens[:count]}, logits off by {error:.3g}",
            error,
        )
    return "right", error


# --- Hostile clients: connections -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def line(
    server: Server, name: str | None = "oscar", buffer: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection with somebody's certificate, None for no TLS; it is cut at the end."""
    raw = socket.socket()
    if buffer is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_connect(raw, (HOST, server.port))
        tls = {} if name is None else {"ssl": server.site.contexts[name], "server_hostname": HOST}
        reader, writer = await asyncio.open_connection(sock=raw, limit=buffer or 1 << 16, **tls)
    except OSError:  # displaced by others of its kind
        raw.close()
        raise
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def heard_from(reader: asyncio.StreamReader, seconds: float) -> tuple[bytes, bool]:
    """The last of what the server says, and whether it ended the connection within this time."""
    heard = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        try:
            async with asyncio.timeout(seconds):
                while part := await reader.read(1 << 18):
                    heard = (heard + part)[-4000:]
        except TimeoutError:
            return heard, False
    return heard, True


async def say(writer: asyncio.StreamWriter, data: bytes) -> bool:
    """Whether it could be sent."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        writer.write(data)
        await writer.drain()
        return True
    return False


async def crowd(count: int, one: Callable[[], Awaitable[str]]) -> str:
    """Many of one kind at a time; the commonest outcome."""

    async def guarded() -> str:
        try:
            return await one()
        except (OSError, ssl.SSLError):
            return "displaced"

    return Counter(await asyncio.gather(*(guarded() for _ in range(count)))).most_common(1)[0][0]


async def half_open(server: Server, fixed: random.Random) -> str:
    """80 connections that never begin TLS."""

    async def one() -> str:
        async with line(server, None) as (reader, _):
            _, ended = await heard_from(reader, HELD_SECONDS)
            return "ended by the server" if ended else "kept"

    return await crowd(80, one)


async def idle(server: Server, fixed: random.Random) -> str:
    """40 connections that do nothing after the handshake."""

    async def one() -> str:
        async with line(server, "eve") as (reader, _):
            _, ended = await heard_from(reader, HELD_SECONDS)
            return "ended by the server" if ended else "kept"

    return await crowd(40, one)


async def drip(server: Server, fixed: random.Random) -> str:
    """Bytes that come one by one: of a handshake, of a request, of a message."""
    stage = fixed.choice(["handshake", "request", "message"])
    said = {
        "handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + fixed.randbytes(500),
        "request": UPGRADE[:-2] + b"X: " + b"x" * 500,
        "message": frame(TEXT_FRAME, b'{"type":"Hello"' + b" " * 1000),
    }[stage]
    async with line(server, None if stage == "handshake" else "oscar") as (reader, writer):
        if stage == "message":
            await say(writer, UPGRADE)
        listening = asyncio.create_task(heard_from(reader, 3 * HELD_SECONDS))
        for byte in said:
            if listening.done() or not await say(writer, bytes([byte])):
                break
            await asyncio.sleep(DRIP_SECONDS)
        return f"{stage}: {'ended by the server' if (await listening)[1] else 'kept'}"


async def unread_welcome(server: Server, fixed: random.Random) -> str:
    """20 clients that ask for the welcome and do not read it."""

    async def one() -> str:
        async with line(server, "eve", 4096) as (_, writer):
            await say(writer, UPGRADE + frame(TEXT_FRAME, hello().encode()))
            await asyncio.sleep(HELD_SECONDS)
            return "not read"

    return await crowd(20, one)


async def wrong_certificate(server: Server, fixed: random.Random) -> str:
    """No certificate, a stranger's, a revoked one, the server's own."""
    name = fixed.choice(["nobody", "mallory", "eve-revoked", HOST])
    try:
        async with line(server, name) as (reader, writer):
            await say(writer, UPGRADE + frame(TEXT_FRAME, hello().encode()))
            heard, _ = await heard_from(reader, HELD_SECONDS)
    except (OSError, ssl.SSLError):
        return f"{name}: no handshake"
    if b"Welcome" in heard or b"Accepted" in heard:
        raise Breach(f"{name} was let in")
    return f"{name}: {ending_of(heard)}"


# --- Hostile clients: messages ----------------------------------------------------------------------------------------


async def malformed(server: Server, fixed: random.Random) -> str:
    """40 conversations with a damaged control message."""
    seeds = [hello().encode(), encode(Start(4, 2, server.digest)), encode(Next())]
    endings: Counter[str] = Counter()
    for _ in range(40):
        message = fixed.choice(SPECIAL) if fixed.random() < 0.3 else mutated(fixed, fixed.choice(seeds))
        said = frame(fixed.choice([TEXT_FRAME, TEXT_FRAME, BINARY]), message)
        said = mutated(fixed, said) if fixed.random() < 0.2 else said
        greeting = frame(TEXT_FRAME, hello().encode()) if fixed.random() < 0.5 else b""
        with contextlib.suppress(OSError, ssl.SSLError):
            async with line(server) as (reader, writer):
                await say(writer, UPGRADE + greeting + said + frame(CLOSE, b"\x03\xe8"))
                endings[ending_of((await heard_from(reader, 2 * HELD_SECONDS))[0])] += 1
    return f"mostly {endings.most_common(1)[0][0]}" if endings else "displaced"


async def oversized(server: Server, fixed: random.Random) -> str:
    """Messages and headers beyond what may be said."""
    kind, said = fixed.choice(
        [
            ("a text of 100 KB", UPGRADE + frame(TEXT_FRAME, b'"' + b"x" * 60_000 + b'"')),
            ("an endless header", UPGRADE[:-2] + b"X: " + b"x" * 200_000),
            ("a frame of 2^40 bytes", UPGRADE + b"\x82\xff" + (1 << 40).to_bytes(8, "big") + bytes(4) + bytes(100_000)),
            ("a hundred thousand pings", UPGRADE + frame(9, b"") * 100_000),
        ]
    )
    async with line(server) as (reader, writer):
        listening = asyncio.create_task(heard_from(reader, 3 * HELD_SECONDS))
        await say(writer, said)
        heard, ended = await listening
    return f"{kind}: {ending_of(heard) if ended else 'kept'}"


async def replayed_messages(server: Server, fixed: random.Random) -> str:
    """What a client has said once, once more: in another connection, out of turn, many times."""
    greeting, beginning = frame(TEXT_FRAME, hello().encode()), frame(TEXT_FRAME, encode(Start(4, 2, server.digest)))
    kind, said = fixed.choice(
        [
            ("Hello twice", greeting * 2),
            ("Start twice", greeting + beginning * 2),
            ("Start before Hello", beginning + greeting),
            ("a hundred Nexts", greeting + beginning + frame(TEXT_FRAME, encode(Next())) * 100),
            ("another session's push", greeting + beginning + frame(BINARY, b"\x01" + push(1, 1, place(1, 1, 1)))),
        ]
    )
    async with line(server) as (reader, writer):
        await say(writer, UPGRADE + said)
        heard, ended = await heard_from(reader, ATTACK_SECONDS / 2)
    return f"{kind}: {ending_of(heard) if ended else 'kept'}"


# --- Hostile clients: the engines' link -------------------------------------------------------------------------------


class Refused(Exception):
    """The server did not accept this client."""


async def stay_awake(writer: asyncio.StreamWriter) -> None:
    """Pongs for the server's pings, which come before a slot is free."""
    while await say(writer, frame(10, b"")):
        await asyncio.sleep(PONG_SECONDS)


async def accepted(server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    """Begin a session whose engine never comes; its name."""
    beginning = frame(TEXT_FRAME, encode(Start(4, 2, server.digest)))
    await say(writer, UPGRADE + frame(TEXT_FRAME, hello().encode()) + beginning)
    heard = b""
    async with asyncio.timeout(ATTACK_SECONDS / 2):
        while part := await reader.read(1 << 18):
            heard = (heard + part)[-4000:]
            if found := re.search(rb'"Accepted","session":"([0-9a-f]{32})"', heard):
                return found[1].decode()
    raise Refused(ending_of(heard))


async def attack_link(server: Server, messages: Callable[[str], Sequence[bytes]], pause: float = 0.0) -> str:
    """Send pieces of an engine's stream after acceptance; what the server said when it ended the session."""
    try:
        async with line(server) as (reader, writer):
            waiting = asyncio.create_task(stay_awake(writer))
            try:
                session = await accepted(server, reader, writer)
            finally:
                waiting.cancel()
            listening = asyncio.create_task(heard_from(reader, ATTACK_SECONDS / 2))
            for piece in messages(session):
                if listening.done() or not await say(writer, frame(BINARY, b"\x01" + piece)):
                    break
                await asyncio.sleep(pause)
            heard, ended = await listening
    except Refused as refused:
        return f"no session: {refused}"
    except TimeoutError:
        return "no session: still in the queue"
    if not ended:
        raise Breach("the session went on")
    reasons = re.findall(rb'"Refused","reason":"([^"]*)"', heard)
    return re.sub(r"\d+", "N", reasons[-1].decode()) if reasons else ending_of(heard)


async def two_chunk_pushes(server: Server, fixed: random.Random) -> str:
    """Two chunks of one key with lengths that do not agree: a write beyond the engine's buffer."""
    return await attack_link(server, lambda session: two_chunks(1, session), pause=1.0)


async def pushes_nobody_waits_for(server: Server, fixed: random.Random) -> str:
    """A megabyte after the other, until it is too much."""

    def pushes(session: str) -> Any:
        value = bytes(1 << 20)
        for number in range(1, MOST_PUSHED):
            data = push(1, number, place(1, number, number, session), value)
            for start_at in range(0, len(data), PIECE):
                yield data[start_at : start_at + PIECE]

    return await attack_link(server, pushes)


async def damaged_pushes(server: Server, fixed: random.Random) -> str:
    """Pushes with changed bytes, until one is noticed."""

    def pushes(session: str) -> Any:
        for number in range(1, 200):
            yield damaged(fixed, push(1, number, place(1, number, number, session), fixed.randbytes(300)))

    return await attack_link(server, pushes)


async def dripped_link(server: Server, fixed: random.Random) -> str:
    """An engine that says one byte at a time."""
    return await attack_link(
        server, lambda session: [bytes([b]) for b in push(1, 1, place(1, 1, 1, session), bytes(300))], DRIP_SECONDS
    )


# --- Hostile clients: `entropi ask`, tampered with --------------------------------------------------------------------


@contextlib.asynccontextmanager
async def tampered(server: Server, fixed: random.Random, kind: str) -> AsyncIterator[Any]:
    """A client in the middle of its computation, whose engine's messages go wrong from now on."""
    words = (fixed.randrange(1 << 30), kind, fixed.randint(20, 400), *ask_words(server, "the keeper lies", 4, "oscar"))
    pipes = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    async with running(sys.executable, "-c", CLIENT, *words, **pipes) as process:
        async with asyncio.timeout(ATTACK_SECONDS / 2):
            while (said := await process.stdout.readline()) and said != b"now\n":
                pass
        yield process


async def outcome(process: Any) -> str:
    """How a client ended: its complaint without what differs from time to time."""
    _, said = await asyncio.wait_for(process.communicate(), ATTACK_SECONDS / 2)
    last = (said.decode(errors="replace").strip().splitlines() or ["answered"])[-1]
    return "answered" if process.returncode == 0 else re.sub(r"[\d.]+:\d+|\d+", "N", last.removeprefix("entropi: "))


async def tampered_frames(server: Server, fixed: random.Random) -> str:
    """Heads of the engine's frames with changed bits."""
    async with tampered(server, fixed, "frames") as process:
        return await outcome(process)


async def tampered_values(server: Server, fixed: random.Random) -> str:
    """Values with changed bits, which only engines understand."""
    async with tampered(server, fixed, "values") as process:
        return await outcome(process)


async def repeated_frames(server: Server, fixed: random.Random) -> str:
    """Every message of the engine twice."""
    async with tampered(server, fixed, "twice") as process:
        return await outcome(process)


async def deaf(server: Server, fixed: random.Random) -> str:
    """A client that sends and does not read any more."""
    async with tampered(server, fixed, "deaf"):
        await asyncio.sleep(2 * HELD_SECONDS)
        return "did not read"


async def killed(server: Server, fixed: random.Random) -> str:
    """SIGKILL in the middle of a token, of the client or of its engine."""
    async with tampered(server, fixed, "none") as process:
        pids = [process.pid] if fixed.random() < 0.5 else children_of(process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return "client" if pids == [process.pid] else f"engine: {await outcome(process)}"


async def cancelled(server: Server, fixed: random.Random) -> str:
    """Ctrl-C in the middle of a token."""
    async with tampered(server, fixed, "none") as process:
        process.send_signal(signal.SIGINT)
        return await outcome(process)


async def stopped_client(server: Server, fixed: random.Random) -> str:
    """SIGSTOP in the middle of a token: the client, its engine, or both."""
    async with tampered(server, fixed, "none") as process:
        engines = children_of(process.pid)
        who = fixed.choice(["client", "engine", "both"])
        pids = {"client": [process.pid], "engine": engines, "both": [process.pid, *engines]}[who]
        async with stopped(pids):
            await asyncio.sleep(2 * HELD_SECONDS)
        return f"{who}: {await outcome(process)}"


TAMPERED = (tampered_frames, tampered_values, repeated_frames, deaf, killed, cancelled, stopped_client)
HOSTILE = (
    *(half_open, idle, drip, unread_welcome, wrong_certificate, malformed, oversized, replayed_messages),
    *(two_chunk_pushes, pushes_nobody_waits_for, damaged_pushes, dripped_link),
    *TAMPERED,
)


# --- The siege --------------------------------------------------------------------------------------------------------


@dataclass
class Siege:
    """What has happened so far."""

    server: Server
    fixed: random.Random
    kinds: Sequence[Attack]
    deadline: float = 0.0
    honest: list[tuple[float, float, str, float]] = field(default_factory=list)  # begin, end, outcome, error
    hostile: list[tuple[float, float, str, str]] = field(default_factory=list)  # begin, end, kind, outcome
    breaches: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    deck: list[Attack] = field(default_factory=list)
    tampering: int = 0

    async def one_honest(self) -> None:
        begin = time.monotonic()
        told, error = await honest(self.server, random.Random(self.fixed.random()))
        self.honest.append((begin, time.monotonic(), told, error))
        note(f"honest {len(self.honest)}: {told}, {time.monotonic() - begin:.0f} s")

    def draw(self) -> Attack:
        """The next kind; of those that compute, and so take a core each, there are few at a time."""
        while True:
            for attack in self.deck:
                if attack not in TAMPERED or self.tampering < MOST_TAMPERING:
                    self.deck.remove(attack)
                    return attack
            self.deck += self.fixed.sample(self.kinds, len(self.kinds))
            if set(self.deck) <= set(TAMPERED):
                return self.deck.pop()

    async def one_hostile(self, attack: Attack | None = None) -> None:
        attack = attack or self.draw()
        begin = time.monotonic()
        self.tampering += attack in TAMPERED
        try:
            told = await asyncio.wait_for(attack(self.server, random.Random(self.fixed.random())), ATTACK_SECONDS)
        except Breach as breach:
            told = f"BREACH: {breach}"
            self.breaches.append(f"{attack.__name__}: {breach}")
        except Exception as error:  # an attack that fails is one more outcome
            told = type(error).__name__
        finally:
            self.tampering -= attack in TAMPERED
        self.hostile.append((begin, time.monotonic(), attack.__name__, told))
        note(f"hostile {len(self.hostile)}: {attack.__name__}: {told}")

    async def keep(self, one: Callable[[], Awaitable[None]], pause: float) -> None:
        """One client after the other, with pauses of random length, until the time is over or the server is."""
        await asyncio.sleep(self.fixed.uniform(0, pause / 2))
        while self.server.alive and time.monotonic() < self.deadline:
            await one()
            await asyncio.sleep(min(self.fixed.expovariate(1 / pause), max(0.0, self.deadline - time.monotonic())))

    async def watch(self, every: float, file: Path) -> None:
        """Sample for ever; every sample is written at once."""
        with open(file, "a") as out:
            while self.server.alive:
                with contextlib.suppress(OSError):
                    self.samples.append(self.server.sample())
                    print(json.dumps(self.samples[-1]), file=out, flush=True)
                await asyncio.sleep(every)


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def besiege(site: Site, given: argparse.Namespace) -> dict[str, Any]:
    """Warm up, besiege, let the server come to rest; the record."""
    async with serving(site, *SERVER_OPTIONS) as server:
        kinds = [attack for attack in HOSTILE if attack.__name__ in given.kinds]
        siege = Siege(server, random.Random(given.seed), kinds)
        if given.warm_up:
            note("warm-up: every kind of client once")
            others = [kind for kind in siege.kinds if kind not in TAMPERED]
            await asyncio.gather(*map(siege.one_hostile, others), siege.one_honest(), siege.one_honest())
            for kind in siege.kinds:
                if kind in TAMPERED:
                    await siege.one_hostile(kind)
        await server.at_rest()
        before, warm = server.sample(), (len(siege.honest), len(siege.hostile))
        note(f"at rest after the warm-up: {before['rss']:.0f} MB")
        began = time.monotonic()
        siege.deadline = began + 60 * given.minutes
        honest_clients = max(1, given.sessions // 4)
        watching = asyncio.create_task(siege.watch(given.every, site.folder / "samples.jsonl"))
        try:
            async with asyncio.TaskGroup() as clients:
                for number in range(given.sessions):
                    one = siege.one_honest if number < honest_clients else siege.one_hostile
                    clients.create_task(siege.keep(one, given.pause))
        finally:
            watching.cancel()
        await server.at_rest()
        survived = server.alive
        after = server.sample() if survived else before
        return record(siege, given, began, before, after, survived, warm)


def record(
    siege: Siege,
    given: argparse.Namespace,
    began: float,
    before: dict[str, float],
    after: dict[str, float],
    survived: bool,
    warm: tuple[int, int],
) -> dict[str, Any]:
    """Everything that is reported."""
    honest_ones, hostile_ones = siege.honest[warm[0] :], siege.hostile[warm[1] :]
    beside = sum(any(a < end and begin < b for a, b, *_ in hostile_ones) for begin, end, *_ in honest_ones)
    kinds: dict[str, Counter[str]] = {}
    for _, _, kind, told in siege.hostile:
        kinds.setdefault(kind, Counter())[told] += 1
    told = Counter(outcome.partition(":")[0] for _, _, outcome, _ in siege.honest)
    marks = []
    for number in range(1, int((siege.samples[-1]["seconds"] - began) / MARK_SECONDS + 1.01) if siege.samples else 1):
        end = began + number * MARK_SECONDS
        last = [s for s in siege.samples if end - 120 <= s["seconds"] < end]
        if last:
            marks.append(
                {name: statistics.median(s[name] for s in last) for name in last[0]} | {"minutes": 10 * number}
            )
    seconds = [s["seconds"] - began for s in siege.samples]
    steep = np.polyfit(seconds, [s["rss"] for s in siege.samples], 1)[0] * 3600 if len(seconds) > 2 else 0.0
    return {
        "machine": machine(),
        "minutes": given.minutes,
        "sessions": given.sessions,
        "seed": given.seed,
        "honest": dict(told),
        "honest_beside_hostile": beside,
        "honest_after_warm_up": len(honest_ones),
        "honest_seconds": [round(q, 1) for q in np.quantile([b - a for a, b, *_ in siege.honest], [0, 0.5, 0.9, 1])],
        "largest_logit_error": max(error for *_, error in siege.honest),
        "not_right": [told for _, _, told, _ in siege.honest if told != "right"],
        "hostile": {kind: dict(found.most_common()) for kind, found in kinds.items()},
        "hostile_after_warm_up": len(hostile_ones),
        "breaches": siege.breaches,
        "before": before,
        "marks": marks,
        "after": after,
        "most_rss": max((s["rss"] for s in siege.samples), default=0.0),
        "rss_mb_per_hour": float(steep),
        "audit": reasons(siege.server.site.folder / "audit.jsonl"),
        "tracebacks": siege.server.log.count("Traceback"),
        "survived": survived,
    }


def failed(found: dict[str, Any]) -> bool:
    """Whether something happened that may not."""
    unexplained = set(found["honest"]) - {"right", "refused"}
    return bool(
        unexplained
        or not found["honest"].get("right")
        or found["breaches"]
        or found["tracebacks"]
        or not found["survived"]
    )


COLUMNS = ("rss", "sessions", "sessions_rss", "descriptors", "threads", "log_kb", "audit_kb", "load")


def table(found: dict[str, Any]) -> str:
    """The record for people."""
    rows = ["| kind | sessions | outcomes |", "|---|---|---|"]
    for kind, outcomes in {"honest": found["honest"], **found["hostile"]}.items():
        words = "; ".join(f"{count} {told}" for told, count in outcomes.items())
        rows.append(f"| {kind.replace('_', ' ')} | {sum(outcomes.values())} | {words} |")
    rows += ["", "| | server MB | its sessions | their MB | descriptors | threads | log KB | audit KB | load |"]
    rows.append("|---" * 9 + "|")
    named = [(f"after {mark['minutes']} min", mark) for mark in found["marks"]]
    for name, sample in [("at rest before", found["before"]), *named, ("at rest afterwards", found["after"])]:
        rows.append(f"| {name} | " + " | ".join(f"{sample[key]:.0f}" for key in COLUMNS) + " |")
    rows += ["", "| in the audit log | times |", "|---|---|"]
    rows += [f"| {reason} | {count} |" for reason, count in found["audit"].items()]
    return "\n".join(rows)


def main() -> int:
    """Run the siege; status 1 if something happened that may not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--sessions", type=int, default=20, help="clients at a time, a quarter of them honest")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--pause", type=float, default=40, help="seconds between two sessions of one client, on average"
    )
    parser.add_argument("--every", type=float, default=5, help="seconds between two samples")
    names = [attack.__name__ for attack in HOSTILE]
    parser.add_argument("--kinds", nargs="+", choices=names, default=names, metavar="KIND", help=", ".join(names))
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false")
    parser.add_argument("--keep", type=Path, help="folder to copy the server's logs and the samples to")
    parser.add_argument("--site", type=Path, help="folder for model and certificates, for several runs; temporary else")
    given = parser.parse_args()
    with contextlib.ExitStack() as closing:
        if given.site is None:
            given.site = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="entropi-siege-")))
        site = prepare(given.site)
        try:
            found = asyncio.run(supervised(besiege(site, given)))
        finally:
            if given.keep is not None:
                given.keep.mkdir(parents=True, exist_ok=True)
                for name in ("server.log", "audit.jsonl", "samples.jsonl"):
                    with contextlib.suppress(OSError):
                        shutil.copy(site.folder / name, given.keep)
    print(table(found), "", json.dumps(found), sep="\n")
    return int(failed(found))


async def supervised(work: Any) -> Any:
    """Run something that SIGTERM ends as Ctrl-C does."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
