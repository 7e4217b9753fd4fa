"""What each thing that a protocol counts costs, measured on a machine: bytes, messages, seconds and rounds.

A calibration runs every protocol of the engine at several sizes, counts what it exchanges by the same rules that
predict, and solves for the prices. Bytes and messages come out exact, because SPU decides by sizes alone; seconds are
the machine's; rounds are what an artificial delay on the link adds in time.

A round is one message latency, one way: messages that are sent together and that the next computation waits for. A
question and its answer take two rounds, a round trip of the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import os
import socket
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import msgspec
import numpy as np

from entropi.costs import exchanges
from entropi.costs.cheetah import CALLS, Cheetah
from entropi.costs.tracing import Known, ProtocolCall, Value, trace_calls
from entropi.errors import UserError
from entropi.machine import machine
from entropi.private.compute.program import Stage

ProtocolName: TypeAlias = Literal["cheetah", "semi2k", "aby3"]
_DELAYS_S = (0.002, 0.032)  # one way, for counting rounds
_SHORT = 7_000  # numbers of operands at most, for trials whose rounds are counted


class Price(msgspec.Struct, frozen=True, array_like=True):
    """Of one counted thing, all parties together."""

    bytes: float
    messages: float
    seconds: float  # on the calibrated machine, all parties on it at the same time
    rounds: float  # message latencies, one way, one after another


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Prices of a protocol, and where and how they were measured."""

    format: Literal[1] = 1
    protocol: ProtocolName
    machine: str
    measured: str  # day
    engine: str  # version of SPU
    fraction_bits: int
    workers: Annotated[int, msgspec.Meta(ge=1, le=48)]  # processor cores that oblivious transfers are shared out to
    prices: dict[str, Price]


class CallCounter(Protocol):
    """Counts what one call of a protocol exchanges."""

    def count(self, call: ProtocolCall) -> Counter[str]: ...


class Linear:
    """SEMI2K and ABY3, whose costs are a sum over calls and numbers whatever the sizes."""

    def count(self, call: ProtocolCall) -> Counter[str]:
        private = {call.left, call.right} != {"shared"}
        name = f"{call.kind} with a known operand" if private else call.kind
        counted = Counter({f"{name}{CALLS}": 1, f"{name} numbers": call.size})
        if call.kind == "product":
            rows, inner, columns = call.shape
            counted[f"{name} operands"] = rows * inner + inner * columns
            counted[f"{name} multiplications"] = rows * inner * columns
        return counted


def call_counter(protocol: ProtocolName, workers: int) -> CallCounter:
    """A new one, of parties that have exchanged nothing yet."""
    return Cheetah(workers) if protocol == "cheetah" else Linear()


def shipped(protocol: ProtocolName) -> Calibration:
    """The prices that come with the package."""
    folder = importlib.resources.files("entropi.costs")
    return read((folder / f"{protocol}.json").read_bytes(), f"the package's {protocol}.json")


def read(data: bytes, name: str) -> Calibration:
    """A calibration file's content.

    Raises:
        UserError: not one, in one line.
    """
    try:
        return msgspec.json.decode(data, type=Calibration)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is no calibration: {error}") from None


def write(calibration: Calibration, path: Path) -> None:
    """As JSON, a line a price."""
    text = msgspec.json.format(msgspec.json.encode(calibration), indent=1)
    path.write_bytes(text + b"\n")


# --- What is run ------------------------------------------------------------------------------------------------------

_SIZES = (300, 3_000, 7_000, 20_000, 50_000, 99_072)
_MATRICES = (
    (8, 8, 8),
    (16, 128, 48),
    (1, 256, 1024),
    (128, 64, 128),
    (128, 128, 64),
    (64, 300, 200),
    (128, 768, 96),
    (96, 96, 512),
    (256, 64, 256),
    (200, 256, 700),
)


@dataclass(frozen=True)
class Trial:
    """A stage on operands of these shapes, each known to one party or shared; or on shared words of bits."""

    name: str
    function: Callable[..., Any]
    operands: tuple[tuple[tuple[int, ...], Known], ...]
    words: bool = False


def trials(protocol: ProtocolName) -> Iterator[Trial]:
    """Every operation at several sizes; small ones last, when everything is set up.

    Words of bits are shared under CHEETAH alone, where `preparation.comparisons` needs them.
    """
    import jax.numpy as jnp

    from entropi.private.compute.functions import square

    shared: Known = "shared"
    server: Known = "server"
    client: Known = "client"

    def pair(x: Any, y: Any) -> Any:
        return x * y

    for size in (*_SIZES, *_SIZES[:3]):
        one = (((size,), shared),)
        yield Trial("compare", lambda x: x > 0.5, one)
        yield Trial("max", lambda x: jnp.maximum(x, 0.5), one)
        yield Trial("select public", lambda x: jnp.where(x > 0.5, np.arange(x.size, dtype=np.float32), 0.0), one)
        yield Trial("truncate", lambda x: x * 0.37, one)
        yield Trial("multiply", pair, one * 2)
        yield Trial("multiply known", pair, (*one, ((size,), server)))
        yield Trial("multiply known", pair, (*one, ((size,), client)))
        if size > 4_000:
            yield Trial("square", square, one)
        if protocol == "cheetah":
            yield Trial("and", lambda x, y: x & y, one * 2, words=True)
    for rows, inner, columns in _MATRICES:
        left, right = (rows, inner), (inner, columns)
        yield Trial("product", jnp.matmul, ((left, shared), (right, shared)))
        yield Trial("product known", jnp.matmul, ((left, shared), (right, server)))
        yield Trial("product known", jnp.matmul, ((left, server), (right, shared)))


@dataclass(frozen=True)
class Reading:
    """What one trial cost, and what was counted for it."""

    name: str
    counted: Counter[str]
    bytes: int
    messages: int
    seconds: float


def run_trials(
    protocol: ProtocolName, fraction_bits: int, chosen: list[Trial], delay_s: float = 0.0, progress: Any = None
) -> list[Reading]:
    """Run trials under a protocol, all parties on this machine, their messages `delay_s` late."""
    from jax.experimental import enable_x64

    from entropi.private.compute.engine import PARTIES, Simulation
    from entropi.private.compute.settings import CLIENT, SERVER, Settings

    late = None
    if delay_s:
        from entropi.private.sessions.engine_link import open_link

        links = LateLinks(PARTIES[protocol], delay_s)

        def late(rank: int) -> Any:
            return open_link(rank, links.links[rank])

    engine = Simulation(protocol, Settings(fraction_bits=fraction_bits), late)
    counter = call_counter(protocol, workers())
    random = np.random.default_rng(0)
    readings = []
    for number, trial in enumerate(chosen):
        values: dict[str, Value] = {}
        names = []
        for place, (shape, known) in enumerate(trial.operands):
            name = f"x{place}"
            names.append(name)
            values[name] = Value(shape, known, "whole" if trial.words else "real")
            if trial.words:
                engine.hold_words(name, random.integers(0, 2**64, (2, *shape), dtype=np.uint64))
                continue
            # A shared value is the sum of what both parties know.
            parts = (SERVER, CLIENT) if known == "shared" else (SERVER if known == "server" else CLIENT,)
            for owner in parts:
                engine.hold(f"{name} {owner}", random.uniform(0.1, 0.5, shape), owner)
            own = tuple(f"{name} {owner}" for owner in parts)
            engine.run(Stage("share", -1, _sum, own, (name,)))
        stage = Stage(trial.name, -1, trial.function, tuple(names), ("result",))
        counted: Counter[str] = Counter()
        for call in trace_calls(stage, values):
            counted += counter.count(call)
        with enable_x64(trial.words):
            metered = engine.run(stage)
        readings.append(Reading(trial.name, counted, metered.bytes, metered.messages, metered.seconds))
        if progress is not None:
            progress(number + 1, len(chosen))
    return readings


def _numbers(trial: Trial) -> int:
    return sum(int(np.prod(shape)) for shape, _ in trial.operands)


def _sum(*parts: Any) -> Any:
    return sum(parts[1:], parts[0])


class LateLinks:
    """Sockets between every two parties of this machine that pass everything on `delay_s` later."""

    def __init__(self, parties: int, delay_s: float) -> None:
        self._delay = delay_s
        own = [_free_port() for _ in range(parties)]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.links = [
            [self._listen(own[other]) if other != rank else f"127.0.0.1:{own[rank]}" for other in range(parties)]
            for rank in range(parties)
        ]

    def _listen(self, target: int) -> str:
        async def start() -> int:
            server = await asyncio.start_server(lambda r, w: self._accept(r, w, target), "127.0.0.1", 0)
            port: int = server.sockets[0].getsockname()[1]
            return port

        return f"127.0.0.1:{asyncio.run_coroutine_threadsafe(start(), self._loop).result()}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: int) -> None:
        while True:
            try:
                onward = await asyncio.open_connection("127.0.0.1", target)
                break
            except ConnectionRefusedError:  # that party is still starting
                await asyncio.sleep(0.05)
        await asyncio.gather(self._carry(reader, onward[1]), self._carry(onward[0], writer))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while (item := await late.get())[1]:
                await asyncio.sleep(max(0.0, item[0] - self._loop.time()))
                sink.write(item[1])
            sink.close()

        delivery = self._loop.create_task(deliver())
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 20):
                late.put_nowait((self._loop.time() + self._delay, data))
        late.put_nowait((0.0, b""))
        await delivery


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def workers() -> int:
    """Processor cores that SPU finds on this machine, at most as many as it uses for oblivious transfers."""
    return min(48, os.cpu_count() or 1)


# --- Solving for prices -----------------------------------------------------------------------------------------------

_REPEATS = 2  # of all trials, for the sake of seconds
_LATE_REPEATS = 4  # of the short ones over slow links; the first sets up


def calibrate(
    protocol: ProtocolName, fraction_bits: int = 18, progress: Callable[[float], None] | None = None
) -> Calibration:
    """Measure a protocol's prices on this machine; some minutes.

    `progress` is told the share that is done.
    """
    from datetime import date

    from entropi.private.wire.versions import engine_version

    def part(first: float, last: float) -> Callable[[int, int], None]:
        def report(done: int, of: int) -> None:
            if progress is not None:
                progress(first + (last - first) * done / of)

        return report

    readings = run_trials(protocol, fraction_bits, list(trials(protocol)) * _REPEATS, progress=part(0.0, 0.5))
    short = [trial for trial in trials(protocol) if _numbers(trial) < _SHORT] * _LATE_REPEATS
    prompt, late = (
        run_trials(protocol, fraction_bits, short, delay_s=delay, progress=part(begin, begin + 0.25))
        for begin, delay in ((0.5, _DELAYS_S[0]), (0.75, _DELAYS_S[1]))
    )
    count = len(short) // _LATE_REPEATS
    waits = [(b.seconds - a.seconds) / (_DELAYS_S[1] - _DELAYS_S[0]) for a, b in zip(prompt, late)]
    rounds = [statistics.median(waits[place + count :: count]) for place in range(count)]

    names = sorted({name for reading in readings for name in reading.counted})
    calls = [name for name in names if name.endswith(CALLS)]
    solved = {
        "bytes": solve(readings, [reading.bytes for reading in readings], names),
        "messages": solve(readings, [reading.messages for reading in readings], names),
        "seconds": solve(readings, [reading.seconds for reading in readings], names, least=0.02),
        "rounds": solve(prompt[-count:], rounds, calls, least=1.0),
    }
    found = {
        name: Price(**{kind: float(f"{prices.get(name, 0.0):.6g}") for kind, prices in solved.items()})
        for name in names
    }
    return Calibration(
        protocol=protocol,
        machine=machine(),
        measured=date.today().isoformat(),
        engine=engine_version(),
        fraction_bits=fraction_bits,
        workers=workers(),
        prices={**found, **prices_of_exchanges()} if protocol == "cheetah" else found,
    )


def prices_of_exchanges() -> dict[str, Price]:
    """Prices of what `exchanges` counts, their seconds measured on this machine."""
    readings = [Reading("", counted, 0, 0, seconds) for counted, seconds in exchanges.readings()]
    names = [name for name in exchanges.SENT if name != exchanges.MESSAGES]  # the time of which is the exchange's
    seconds = solve(readings, [reading.seconds for reading in readings], names)
    return {
        name: Price(size, messages, float(f"{seconds.get(name, 0.0):.6g}"), rounds)
        for name, (size, messages, rounds) in exchanges.SENT.items()
    }


def solve(readings: list[Reading], values: list[Any], names: list[str], least: float = 0.0) -> dict[str, float]:
    """Prices, none negative, that explain `values` of the readings best.

    Errors count relative to a value, to `least` where a value is smaller.
    """
    from scipy.optimize import nnls

    counts = np.array([[reading.counted.get(name, 0) for name in names] for reading in readings], float)
    target = np.maximum(np.array(values, float), 0.0)
    weight = 1 / np.maximum(target, max(least, float(target.max()) * 1e-9))
    scale = np.maximum((counts * weight[:, None]).max(axis=0), 1e-300)  # for the solver's sake
    prices, _ = nnls(counts * weight[:, None] / scale, target * weight, maxiter=1000 * len(names))
    return dict(zip(names, (prices / scale).tolist()))
