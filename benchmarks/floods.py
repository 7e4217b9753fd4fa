"""What single attacks cost a server or a client now: memory before, during and after, and an honest answer meanwhile.

    python benchmarks/floods.py [--only NAME ...]

The figures of docs/attacks.md. Floods go against an `entropi serve` with TLS that may open 1,024 files. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import resource
import signal
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from entropi.machine import machine
from private.wire.test_messages_fuzz import TEXT as TEXT_FRAME
from private.wire.test_messages_fuzz import UPGRADE, frame
from siege import (
    SERVER_OPTIONS,
    Server,
    Site,
    ask_words,
    children_of,
    heard_from,
    hello,
    honest,
    line,
    memory,
    note,
    prepare,
    pushes_nobody_waits_for,
    running,
    say,
    serving,
    stopped,
    supervised,
    tampered,
)

DESCRIPTORS = 1024
HALF_OPEN, IDLE, UNREAD = 1600, 200, 42
AFTER_SECONDS = 30  # after the last connection of a flood
LAYERS = 10**8
PROMPT_BYTES = 10_000_000


def client_hello() -> bytes:
    """The first bytes of a TLS handshake."""
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


@contextlib.asynccontextmanager
async def crowd(count: int, one: Callable[[asyncio.Event], Any]) -> AsyncIterator[None]:
    """So many connections at a time; yields once all have been opened and tried to say what they say."""
    leave, ready = asyncio.Event(), [asyncio.Event() for _ in range(count)]

    async def guarded(number: int) -> None:
        try:
            with contextlib.suppress(OSError, ssl.SSLError):
                async with one(ready[number]):
                    ready[number].set()
                    await leave.wait()
        finally:
            ready[number].set()

    tasks = []
    for number in range(count):
        tasks.append(asyncio.create_task(guarded(number)))
        if number % 50 == 49:
            await asyncio.gather(*(event.wait() for event in ready[: number + 1]))
    try:
        await asyncio.gather(*(event.wait() for event in ready))
        yield
    finally:
        leave.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def flood(server: Server, count: int, name: str | None, said: bytes, buffer: int | None = None) -> dict[str, Any]:
    """Memory around a crowd that says something and then nothing, and what an honest client gets meanwhile."""

    @contextlib.asynccontextmanager
    async def one(ready: asyncio.Event) -> AsyncIterator[None]:
        async with line(server, name, buffer) as (_, writer):
            await asyncio.wait_for(say(writer, said), 5)
            yield

    peak, lines = [0.0, 0], server.log.count("\n")

    async def watch() -> None:
        while True:
            sample = server.sample()
            peak[0], peak[1] = max(peak[0], sample["rss"]), max(peak[1], sample["descriptors"])
            await asyncio.sleep(0.5)

    before, watching, began = server.sample(), asyncio.create_task(watch()), time.monotonic()
    try:
        async with crowd(count, one):
            there = time.monotonic() - began
            told, _ = await honest(server, random.Random(1))
            answered = time.monotonic() - began - there
    finally:
        watching.cancel()
    await asyncio.sleep(AFTER_SECONDS)
    await server.at_rest()
    return {
        "connections": count,
        "seconds_to_connect": there,
        "honest": told,
        "honest_seconds": answered,
        "mb_before": before["rss"],
        "mb_most": peak[0],
        "mb_after": server.sample()["rss"],
        "most_descriptors": peak[1],
        "log_lines": server.log.count("\n") - lines,
    }


async def half_open(server: Server) -> dict[str, Any]:
    """Handshakes that are begun and not gone on with."""
    return await flood(server, HALF_OPEN, None, client_hello())


async def idle(server: Server) -> dict[str, Any]:
    """Clients with a certificate that say nothing."""
    return await flood(server, IDLE, "eve", b"")


async def unread(server: Server) -> dict[str, Any]:
    """Clients that ask for the welcome and take nothing of it."""
    return await flood(server, UNREAD, "eve", UPGRADE + frame(TEXT_FRAME, hello().encode()), 4096)


async def pings(server: Server) -> dict[str, Any]:
    """One client that sends nothing but empty pings."""
    stop = asyncio.Event()

    async def ping() -> int:
        connections = 0
        while not stop.is_set():
            with contextlib.suppress(OSError, ssl.SSLError):
                async with line(server) as (reader, writer):
                    listening = asyncio.create_task(heard_from(reader, 600))
                    connections += await say(writer, UPGRADE)
                    with contextlib.suppress(asyncio.TimeoutError):  # it is listened to no more
                        while not (stop.is_set() or writer.is_closing()):
                            await asyncio.wait_for(say(writer, frame(9, b"") * 1000), 5)
                    listening.cancel()
        return connections

    quiet = await timed(honest(server, random.Random(1)))
    pinging = asyncio.create_task(ping())
    told = await timed(honest(server, random.Random(1)))
    stop.set()
    return {"honest": told[0][0], "seconds": told[1], "seconds_without": quiet[1], "connections": await pinging}


async def timed(work: Any) -> tuple[Any, float]:
    began = time.monotonic()
    return await work, time.monotonic() - began


async def unread_pushes(server: Server) -> dict[str, Any]:
    """Values of a megabyte that the server's engine does not wait for."""
    most = [0.0]

    async def watch() -> None:
        while True:
            most[0] = max(most[0], *(memory(child) for child in children_of(server.process.pid)), 0.0)
            await asyncio.sleep(0.2)

    before, watching = server.sample(), asyncio.create_task(watch())
    told, seconds = await timed(pushes_nobody_waits_for(server, random.Random(1)))
    watching.cancel()
    await server.at_rest()
    carried = int(re.findall(r"the link carried \d+ bytes to the client, (\d+) from it", server.log)[-1])
    return {
        "told": told,
        "seconds": seconds,
        "mb_carried": carried / 1e6,
        "session_mb_most": most[0],
        "mb_before": before["rss"],
        "mb_after": server.sample()["rss"],
    }


async def stopped_party(server: Server) -> dict[str, Any]:
    """Seconds for which the server keeps a slot for a client whose engine was stopped."""
    async with tampered(server, random.Random(1), "none") as process:
        async with stopped(children_of(process.pid)):
            _, seconds = await timed(no_session(server))
        return {"slot_held_seconds": seconds}


async def no_session(server: Server) -> None:
    """Return once no session's process is left."""
    while children_of(server.process.pid):
        await asyncio.sleep(0.2)


async def long_prompt(server: Server) -> dict[str, Any]:
    """A client that is given a prompt of 10 MB."""
    words = list(ask_words(server, "-", 1, "alice"))
    return await measured(*words, given=b"the key " * (PROMPT_BYTES // 8))


async def many_layers(server: Server) -> dict[str, Any]:
    """A model's folder whose config.json says that it has 10^8 layers."""
    folder = server.site.folder / "layers"
    folder.mkdir(exist_ok=True)
    for file in (server.site.folder / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    return await measured("serve", folder, "--listen", "127.0.0.1:0")


async def measured(*words: object, given: bytes = b"") -> dict[str, Any]:
    """What an `entropi` command says in the end, its seconds, and the most memory that it had."""
    # Not what the system counts for a process by its number, in which the memory before exec is the parent's.
    script = "import re, sys\nfrom entropi import cli\nstatus = cli.main(sys.argv[1:])\n"
    script += "print(status, re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    began = time.monotonic()
    async with running(sys.executable, "-c", script, *words, **pipes) as process:
        out, said = await asyncio.wait_for(process.communicate(given), 900)
    status, most = out.split()[-2:]
    told = said.decode(errors="replace").strip().splitlines()[-1][:300]
    return {"status": int(status), "told": told, "seconds": time.monotonic() - began, "mb_most": int(most) / 1e3}


ATTACKS = (half_open, idle, unread, pings, unread_pushes, stopped_party, long_prompt, many_layers)


async def measure(site: Site, names: list[str]) -> dict[str, Any]:
    """Every attack, one after the other, at one server."""
    found: dict[str, Any] = {"machine": machine()}
    async with serving(site, *SERVER_OPTIONS, descriptors=DESCRIPTORS) as server:
        note(f"warm-up: {(await honest(server, random.Random(0)))[0]}")
        await server.at_rest()
        for attack in ATTACKS:
            if attack.__name__ in names:
                found[attack.__name__] = await attack(server)
                note(f"{attack.__name__}: {json.dumps(found[attack.__name__])}")
    return found


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [attack.__name__ for attack in ATTACKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--site", type=Path, help="folder for model and certificates, for several runs; temporary else")
    given = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, HALF_OPEN + 500), hard), hard))
    with contextlib.ExitStack() as closing:
        if given.site is None:
            given.site = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="entropi-floods-")))
        site = prepare(given.site)
        print(json.dumps(asyncio.run(supervised(measure(site, given.only)))))


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(128 + signal.SIGINT)
