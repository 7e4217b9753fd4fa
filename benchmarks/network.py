"""A private generation over lines of limited speed and added delay, measured and predicted.

    python benchmarks/network.py MODEL [--prompt TEXT] [--new-tokens 2] [--link]

A server and a client on this machine talk through `SlowLine`, a proxy that delays and limits what passes, with TLS
1.3 on. The prediction takes bytes, turns and seconds of the same generation over the bare loopback, and adds to the
seconds one delay for every turn (half a round trip) and the time in which the line carries the bytes. `--link` compares
ways for two engines to reach each other instead. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import aiohttp
from aiohttp import web

from entropi.private import Tls, connect
from entropi.private.wire.authority import issue
from entropi.private.wire.tunnel import MAX_LINK_MESSAGE, Tunnel

START_SECONDS = 120
CHUNK = 64 << 10


@dataclass(frozen=True)
class Line:
    """A network between two machines: speed in each direction, and the time a bit takes from end to end."""

    bits_per_second: float
    delay_seconds: float


# LAN: a switched gigabit network. WAN: what the paper states, 100 Mbit/s and 80 ms, taken as the round trip.
LINES = {"lan": Line(1e9, 0.25e-3), "wan": Line(100e6, 40e-3)}


class SlowLine:
    """A TCP proxy in a thread of its own that carries what comes at the speed and with the delay of a `Line`.

    `cut()` ends all connections that pass, as a machine that goes down; `freeze()` keeps them and carries nothing more,
    as a cable that is pulled.
    """

    def __init__(self, target: str, line: Line) -> None:
        self.line, self._target = line, target.rpartition(":")[::2]
        self._writers: set[asyncio.StreamWriter] = set()
        self.connections = 0
        self.carried = 0  # bytes, both directions
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._frozen = asyncio.Event()
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._accept, "127.0.0.1", 0), self._loop)
        self._server = starting.result(10)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, far_writer}
        self._writers |= ends
        ways = [
            asyncio.ensure_future(self._carry(source, sink))
            for source, sink in ((reader, far_writer), (far_reader, writer))
        ]
        try:
            with contextlib.suppress(asyncio.CancelledError):  # by `close`
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait(ways, timeout=2 * self.line.delay_seconds + 1)  # for what is still on its way
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            self._writers -= ends
            for end in ends:
                end.transport.abort()

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """One direction: a queue whose entries leave when the line has carried them."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)

        async def deliver() -> None:
            while True:
                due, data = await on_the_way.get()
                if (early := due - time.monotonic()) > 0:
                    await asyncio.sleep(early)
                if self._frozen.is_set():
                    await asyncio.Event().wait()
                if not data:
                    return
                sink.write(data)
                await sink.drain()

        delivery = asyncio.ensure_future(deliver())
        free = 0.0  # when the line can take the next bit
        try:
            with contextlib.suppress(OSError):
                while data := await source.read(CHUNK):
                    self.carried += len(data)
                    free = max(free, time.monotonic()) + 8 * len(data) / self.line.bits_per_second
                    await on_the_way.put((free + self.line.delay_seconds, data))
                    # A sender is slowed down as by a line with little memory, not after megabytes.
                    if (ahead := free - time.monotonic()) > 0.01:
                        await asyncio.sleep(ahead - 0.005)
                await on_the_way.put((free + self.line.delay_seconds, b""))
                await delivery
        finally:
            delivery.cancel()

    def cut(self) -> None:
        """End every connection now."""
        self._loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in list(self._writers)])

    def freeze(self) -> None:
        """Carry nothing more, and say nothing about it."""
        self._loop.call_soon_threadsafe(self._frozen.set)

    def close(self) -> None:
        """End everything, the thread too."""

        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


# --- A generation over every line -------------------------------------------------------------------------------------


@dataclass
class Run:
    """One generation: seconds as the client saw them, and what the engines' link carried."""

    seconds: float
    bytes_to_client: int
    bytes_to_server: int
    turns: int


@contextlib.contextmanager
def tls_server(
    model: Path, folder: Path, *options: object, start_seconds: float = START_SECONDS
) -> Iterator[tuple[str, Path, Tls]]:
    """An `entropi serve` of `model` with TLS and `options`: its address, its log, and the files of a client."""
    issue(folder, ["127.0.0.1"], ["client"], days=1)
    log = folder / "server.log"
    keys = ["--tls-cert", folder / "127.0.0.1.pem", "--tls-key", folder / "127.0.0.1-key.pem"]
    words = ["serve", model, "--listen", "127.0.0.1:0", *keys, "--clients-ca", folder / "ca.pem"]
    words += ["--log", "json", *options]
    with open(log, "wb") as file:
        server = subprocess.Popen([sys.executable, "-m", "entropi", *map(str, words)], stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + start_seconds
        while not (match := re.search(r"listening on ([^, ]+:\d+)", log.read_text())):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {log.read_text()}")
            time.sleep(0.1)
        yield match[1], log, Tls(folder / "client.pem", folder / "client-key.pem", folder / "ca.pem")
    finally:
        server.terminate()
        server.wait()


def generate(address: str, log: Path, tls: Tls, prompt: str, new_tokens: int) -> Run:
    """Ask once, and read in the server's log what the link carried."""
    before = log.read_text().count('"turns"')
    answer = connect(address, tls).ask(prompt, new_tokens)
    while log.read_text().count('"turns"') == before:
        time.sleep(0.1)
    time.sleep(0.1)  # for the rest of the line
    found = [entry for line in log.read_text().splitlines() if "turns" in (entry := json.loads(line))]
    return Run(answer.record.seconds, found[-1]["link_sent"], found[-1]["link_received"], found[-1]["turns"])


def predict(base: Run, line: Line) -> float:
    """Seconds of the same generation over `line`."""
    carrying = 8 * (base.bytes_to_client + base.bytes_to_server) / line.bits_per_second
    return base.seconds + base.turns * line.delay_seconds + carrying


def measure(model: Path, prompt: str, new_tokens: int) -> dict[str, object]:
    """The generation over every line, each between two over the bare loopback that it is predicted from."""
    results: dict[str, object] = {"new_tokens": new_tokens}
    with tempfile.TemporaryDirectory() as folder, tls_server(model, Path(folder)) as (address, log, tls):
        generate(address, log, tls, prompt, 1)  # warms the caches of the disk
        before = generate(address, log, tls, prompt, new_tokens)
        for name, line in LINES.items():
            slow = SlowLine(address, line)
            run = generate(slow.address, log, tls, prompt, new_tokens)
            slow.close()
            after = generate(address, log, tls, prompt, new_tokens)
            base = replace(before, seconds=(before.seconds + after.seconds) / 2)
            predicted = predict(base, line)
            carried = (run.bytes_to_client + run.bytes_to_server) / 1e6
            print(
                f"{name}: {line.bits_per_second / 1e6:.0f} Mbit/s, {2e3 * line.delay_seconds:g} ms round trip, "
                f"{carried:.1f} MB, {run.turns} turns: measured {run.seconds:.1f} s, predicted {predicted:.1f} s "
                f"({before.seconds:.1f} and {after.seconds:.1f} s and {before.turns} turns over loopback), "
                f"ratio {run.seconds / predicted:.2f}",
                flush=True,
            )
            results[name] = {**asdict(line), **asdict(run), "predicted_seconds": predicted, "loopback": asdict(base)}
            before = after
    return results


# --- The engines' link ------------------------------------------------------------------------------------------------

SESSION = "0" * 32
ENGINE = """
import sys, time
from spu import libspu
rank, links, tls = int(sys.argv[1]), sys.argv[2:4], sys.argv[4:]
desc = libspu.link.Desc()
desc.id, desc.http_max_payload_size = "0" * 32, 1 << 30
for name, address in zip("ab", links): desc.add_party(name, address)
desc.recv_timeout_ms = desc.http_timeout_ms = 600000
desc.connect_retry_times = 100
if tls:
    desc.enable_ssl = True
    for options in (desc.client_ssl_opts, desc.server_ssl_opts):
        options.cert.certificate_path, options.cert.private_key_path, options.verify.ca_file_path = tls
        options.verify.verify_depth = 3
link = libspu.link.create_brpc(desc, rank)
mine, other = (link.send, link.recv) if rank == 0 else (link.recv, link.send)
speeds, delays = [], []
for _ in range(5):
    for test, repeats, message in ((speeds, 200, b"x" * (1 << 20)), (delays, 1000, b"x" * 100)):
        if rank == 0: link.recv(1)
        else: link.send(0, b"ready")
        started = time.perf_counter()
        for _ in range(repeats):
            if rank == 0:
                link.send(1, message)
                if test is delays: link.recv(1)
            else:
                link.recv(0)
                if test is delays: link.send(0, message)
        if rank == 0 and test is speeds: link.recv(1)
        elif test is speeds: link.send(0, b"done")
        seconds = time.perf_counter() - started
        test.append(repeats * len(message) / 1e6 / seconds if test is speeds else seconds / repeats * 1e6)
if rank == 0: print(sorted(speeds)[2], sorted(delays)[2])
link.stop_link()
"""


def engine(rank: int, links: tuple[str, str], *tls: Path) -> list[str]:
    return [sys.executable, "-c", ENGINE, str(rank), *links, *map(str, tls)]


def two_engines(links: tuple[str, str], *tls: Path) -> tuple[float, float]:
    """MB/s from the server to the client, and microseconds of a round trip, between engines that meet directly."""
    first, second = (subprocess.Popen(engine(rank, links, *tls), stdout=subprocess.PIPE, text=True) for rank in (0, 1))
    said, _ = first.communicate(timeout=300)
    second.wait(10)
    speed, delay = said.split()
    return float(speed), float(delay)


async def through_tunnel(folder: Path, secure: bool) -> tuple[float, float]:
    """The same through a WebSocket; both ends' forwarders share one process here, which is slower than two."""
    said = asyncio.get_running_loop().create_future()

    def tls(name: str) -> Tls:
        return Tls(folder / f"{name}.pem", folder / f"{name}-key.pem", folder / "ca.pem")

    async def side(rank: int, socket: web.WebSocketResponse | aiohttp.ClientWebSocketResponse) -> None:
        async with Tunnel(rank, SESSION, socket.send_bytes) as tunnel:
            process = await asyncio.create_subprocess_exec(*engine(rank, tunnel.links), stdout=subprocess.PIPE)

            async def listen() -> None:
                async for message in socket:
                    await tunnel.receive(message.data)

            listening = asyncio.ensure_future(listen())
            output, _ = await process.communicate()
            if rank == 0:
                said.set_result(output.decode())
            await said
            await asyncio.sleep(0.5)
            listening.cancel()

    async def handler(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_LINK_MESSAGE)
        await socket.prepare(request)
        await side(0, socket)
        return socket

    app = web.Application()
    app.router.add_get("/", handler)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls("127.0.0.1").server_context() if secure else None).start()
    url = f"{'https' if secure else 'http'}://127.0.0.1:{runner.addresses[0][1]}/"
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(
            url, ssl=tls("client").client_context() if secure else True, max_msg_size=MAX_LINK_MESSAGE
        ) as socket,
    ):
        await side(1, socket)
    await runner.cleanup()
    speed, delay = (await said).split()
    return float(speed), float(delay)


def compare_links() -> dict[str, tuple[float, float]]:
    """Speed and delay of every way between two engines on this machine."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        issue(folder, ["127.0.0.1"], ["client"], days=1)
        unix = (f"unix:{folder}/a", f"unix:{folder}/b")
        results = {
            "engines over TCP": two_engines(("127.0.0.1:29871", "127.0.0.1:29872")),
            "engines over Unix sockets": two_engines(unix),
            "tunnel, no TLS": asyncio.run(through_tunnel(folder, secure=False)),
            "tunnel, TLS 1.3": asyncio.run(through_tunnel(folder, secure=True)),
        }
    for name, (speed, delay) in results.items():
        print(f"{name}: {speed:.0f} MB/s, round trip {delay:.0f} us", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--prompt", default="import os")
    parser.add_argument("--new-tokens", type=int, default=2)
    parser.add_argument("--link", action="store_true")
    options = parser.parse_args()
    if options.link:
        print(json.dumps(compare_links()))
    elif options.model is None:
        parser.error("MODEL is missing")
    else:
        print(json.dumps(measure(options.model, options.prompt, options.new_tokens)))


if __name__ == "__main__":
    main()
