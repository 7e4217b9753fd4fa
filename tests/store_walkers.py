"""Processes that prepare and take one-time material and are killed meanwhile.

Tests of the store start this file as a program. The processes are forked by one without threads, so that a new one
costs nothing. What each side gets out of its store it writes to a log on the disk before it would send anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from entropi.errors import UserError
from entropi.private.preparation import store as store_module
from entropi.private.preparation.growth import Growth
from entropi.private.preparation.store import Store
from entropi.private.preparation.tickets import Binding

PARTS = ("scores", "values")
WORDS = 700  # of each part
SIZE = 8 * WORDS * len(PARTS)
PR_SET_PDEATHSIG = 1
OFFERS = 3  # tickets that may be ready at once


def binding(side: str = "client", **changes: Any) -> Binding:
    own, peer = ("alice", "server") if side == "client" else ("server", "alice")
    fields = {"model": "m", "settings": "s", "own": own, "peer": peer, "side": side, "tokens": 8, "passes": 3}
    return Binding(**{**fields, **changes})


def first_ready(store: Store, wanted: Binding) -> bytes | None:
    """The ticket that is offered next."""
    return next((ticket for _, ticket in store.ready(wanted)), None)


def refusal(call: Callable[[], Any]) -> str:
    """Why a store refuses; "" if it does not."""
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def words(ticket: bytes, side: str, part: str) -> np.ndarray:
    """A part's numbers, which only these three names give."""
    content = hashlib.shake_256(ticket + f"{side} {part}".encode()).digest(8 * WORDS)
    return np.frombuffer(content, np.uint64)


def digest(material: dict[str, dict[str, np.ndarray]]) -> str:
    content = [(part, name, array.tobytes()) for part, arrays in material.items() for name, array in arrays.items()]
    return hashlib.sha256(repr(sorted(content)).encode()).hexdigest()


def expected(ticket: bytes, side: str) -> str:
    return digest({part: {"a": words(ticket, side, part)} for part in PARTS})


def add_missing(growth: Growth, side: str) -> None:
    for part in PARTS:
        if part not in growth.parts():
            growth.add(part, {"a": words(growth.ticket, side, part)})


def prepare(store: Store, ticket: bytes, side: str = "client") -> bytes:
    growth = store.grow(ticket, binding(side), SIZE)
    add_missing(growth, side)
    growth.finish()
    return ticket


def take_and_log(store: Store, ticket: bytes, side: str, log: Path) -> None:
    line = f"{ticket.hex()} {digest(store.take(ticket, binding(side)))}\n"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, line.encode())
    os.fsync(descriptor)
    os.close(descriptor)


def handed_out(log: Path) -> list[tuple[bytes, str]]:
    lines = log.read_text().split("\n")[:-1] if log.exists() else []  # a line is written at once
    return [(bytes.fromhex(line.split()[0]), line.split()[1]) for line in lines]


def check(folder: Path, side: str, log: Path) -> None:
    """What must hold of a side's store and log after anything that may happen."""
    taken = handed_out(log)
    assert len({ticket for ticket, _ in taken}) == len(taken), "handed out twice"
    for ticket, found in taken:
        assert found == expected(ticket, side), "not what was prepared"
    with Store(folder) as store:
        entries = store.entries()
        live = {entry.ticket.hex() for entry in entries}
        assert {path.name for path in (folder / store_module.MATERIAL).iterdir()} == live
        for ticket, _ in taken:
            assert ticket.hex() not in live
            assert refusal(lambda ticket=ticket: store.take(ticket, binding(side)))
        for entry in entries:
            if entry.state == "ready":
                assert digest(store.take(entry.ticket, binding(side))) == expected(entry.ticket, side)
            else:
                growth = store.grow(entry.ticket, binding(side), SIZE)
                add_missing(growth, side)
                growth.finish()
                assert digest(store.take(entry.ticket, binding(side))) == expected(entry.ticket, side)
        assert not list((folder / store_module.MATERIAL).iterdir())


def fork(work: Callable[[], Any]) -> int:
    """A process that does the work and ends with status 0, or says what failed."""
    if process := os.fork():
        return process
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody is left if a test is cut off
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended_well(processes: Iterable[int]) -> None:
    for process in processes:
        assert os.waitpid(process, 0)[1] == 0, "a process failed"


def killed(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL, "it had ended by itself"


# --- Two sides, killed at any moment ----------------------------------------------------------------------------------


def serve(folder: Path) -> None:
    address = folder / "socket"
    address.unlink(missing_ok=True)
    with Store(folder / "server") as store, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen()
        while True:
            connection, _ = listening.accept()
            with contextlib.suppress(ConnectionError), connection, connection.makefile("rw") as lines:
                for line in lines:
                    lines.write(answer(store, folder, *line.split()) + "\n")
                    lines.flush()


def answer(store: Store, folder: Path, what: str, name: str) -> str:
    ticket = bytes.fromhex(name)
    try:
        if what == "take":
            take_and_log(store, ticket, "server", folder / "server.log")
        else:
            prepare(store, ticket, "server")
    except UserError as error:
        return "" if "prepared already" in str(error) else str(error)
    return ""


def ask(folder: Path) -> None:
    with Store(folder / "client") as store:
        while True:
            with socket.socket(socket.AF_UNIX) as connection:
                try:
                    connection.connect(str(folder / "socket"))
                    with connection.makefile("rw") as lines:
                        while True:
                            one_session(store, folder, lines)
                except (ConnectionError, FileNotFoundError):
                    time.sleep(0.001)


def one_session(store: Store, folder: Path, lines: Any) -> None:
    def refused(what: str, ticket: bytes) -> str:
        lines.write(f"{what} {ticket.hex()}\n")
        lines.flush()
        if not (reply := lines.readline()).endswith("\n"):
            raise ConnectionError
        return reply.strip()

    growing = next(iter(store.growing(binding())), None)
    if len(store.entries()) < OFFERS or growing is not None:
        ticket = growing or os.urandom(16)
        growth = store.grow(ticket, binding(), SIZE)
        add_missing(growth, "client")
        if refused("prepare", ticket):
            store.discard(ticket)
            return
        growth.finish()
    if (ready := first_ready(store, binding())) is not None:
        if refused("take", ready):
            store.discard(ready)
        else:
            take_and_log(store, ready, "client", folder / "client.log")


def wait_for_sessions(folder: Path, more: int) -> None:
    """Until the client, which takes last, has taken so many more tickets."""
    log, until = folder / "client.log", time.monotonic() + 120
    least = len(handed_out(log)) + more
    while len(handed_out(log)) < least:
        assert time.monotonic() < until, "they take nothing any more"
        time.sleep(0.001)


def kills(folder: Path, times: int) -> None:
    chance = random.Random(7)
    sides = {"server": lambda: serve(folder), "client": lambda: ask(folder)}
    running = {side: fork(work) for side, work in sides.items()}
    for turn in range(times):
        if turn % 3:  # else also while they start and clean up
            wait_for_sessions(folder, 1)
        time.sleep(chance.uniform(0, 0.03))
        for side in chance.choice((["server"], ["client"], ["server", "client"])):
            killed(running[side])
            running[side] = fork(sides[side])
    wait_for_sessions(folder, 5)
    for process in running.values():
        killed(process)
    for side in sides:
        check(folder / side, side, folder / f"{side}.log")
    client, server = ({ticket for ticket, _ in handed_out(folder / f"{side}.log")} for side in ("client", "server"))
    assert client <= server  # as it asks first
    print(len(client))


# --- One side, killed at every line -----------------------------------------------------------------------------------


def killed_at(line: int, work: Callable[[], Any]) -> bool:
    """Do the work in a process that is killed before so many lines of the store; False if it has fewer."""
    room, left = str(Path(store_module.__file__).parent), line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(room):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced() -> None:
        sys.settrace(trace)
        work()

    status = os.waitpid(fork(traced), 0)[1]
    assert status in (0, signal.SIGKILL), "it failed"
    return status != 0


def every_line(folder: Path, step: int) -> None:
    """Kill one who prepares and takes a ticket, and who opens the store after that, at every so many lines."""
    line = 0

    def work(case: Path) -> None:
        with Store(case / "client") as store:
            ticket = next(iter(store.growing(binding())), None) or first_ready(store, binding()) or os.urandom(16)
            if first_ready(store, binding()) is None:
                prepare(store, ticket)
            take_and_log(store, ticket, "client", case / "client.log")

    while True:
        case = folder / str(line)
        case.mkdir()
        if not killed_at(line, lambda case=case: work(case)):
            break
        killed_at(line // 3, lambda case=case: work(case))
        check(case / "client", "client", case / "client.log")
        line += step
    print(line)


# --- Several at once --------------------------------------------------------------------------------------------------


def race(folder: Path, rounds: int) -> None:
    """Four processes want the same ticket."""
    for turn in range(rounds):
        ticket, log = turn.to_bytes(16, "big"), folder / f"{turn}.log"
        with Store(folder / "store") as store:
            prepare(store, ticket)
        reading, writing = os.pipe()

        def taker(ticket: bytes = ticket, log: Path = log, reading: int = reading, writing: int = writing) -> None:
            with Store(folder / "store") as store:
                os.close(writing)
                os.read(reading, 1)  # which ends when the other end is closed
                refused = refusal(lambda: take_and_log(store, ticket, "client", log))
            assert not refused or "was taken already" in refused, refused

        takers = [fork(taker) for _ in range(4)]
        os.close(writing)
        ended_well(takers)
        os.close(reading)
        assert handed_out(log) == [(ticket, expected(ticket, "client"))]


def openers(folder: Path, rounds: int) -> None:
    """Processes that open a store again and again find nothing to destroy in what others are just doing."""

    def walk(side: int) -> None:
        with Store(folder / "store") as store:
            for turn in range(rounds):
                ticket = bytes([side]) * 8 + turn.to_bytes(8, "big")
                prepare(store, ticket)
                take_and_log(store, ticket, "client", folder / f"{side}.log")

    def look() -> None:
        for _ in range(3 * rounds):
            Store(folder / "store").close()

    ended_well([fork(lambda: walk(1)), fork(lambda: walk(2)), fork(look), fork(look)])
    for side in (1, 2):
        assert len(handed_out(folder / f"{side}.log")) == rounds
        check(folder / "store", "client", folder / f"{side}.log")


if __name__ == "__main__":
    {"kills": kills, "every_line": every_line, "race": race, "openers": openers}[sys.argv[1]](
        Path(sys.argv[2]), int(sys.argv[3])
    )
