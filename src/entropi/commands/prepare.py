"""`entropi prepare`: computing what does not depend on the prompt, before there is one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from entropi.commands.common import Command, secure_engine, terminated_like_interrupted
from entropi.console import ProgressLine, make_console, without_controls
from entropi.errors import UserError
from entropi.records import StageCommunication

if TYPE_CHECKING:
    from entropi.private.preparation.store import Store

LOOK_SECONDS = 30.0  # between two looks at how many sessions are ready


def run(
    server: str = "127.0.0.1:9000",
    tokens: int = 192,
    new_tokens: int | None = None,
    draft_tokens: int = 0,
    sessions: int = 1,
    keep_ready: int = 0,
    material: Path | None = None,
    material_gb: float = 10.0,
    material_sessions: int = 50,
    expires_days: float = 7.0,
    list: bool = False,
    delete: str | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    server_ca: Path | None = None,
    memory_gb: float | None = None,
) -> None:
    """Compute, before there is a prompt, what makes its answer fast: products of random numbers.

    Both sides keep their half of it, this one in a folder, for one session each, which `entropi ask` uses by itself and
    which is destroyed then. Whoever interrupts this goes on with the same command.

    Args:
        server: HOST:PORT of an `entropi serve --material`
        tokens: most tokens of a session, prompt and answer together
        new_tokens: of these, most that are answered; by default 64, or all if there are fewer
        draft_tokens: beside these, drafts that may turn out wrong (ask --draft), which use up what was prepared for
            them; as many as new tokens are always enough
        sessions: how many of this size are to be ready on both sides; those that are count, and what is missing is
            prepared, one after another
        keep_ready: stay, and prepare another session whenever fewer than so many are left, until this is interrupted
        material: folder to keep it in, as secret as keys; by default entropi/material in the user's state folder
        material_gb: most of it for one server, in GB
        material_sessions: most sessions for one server, up to 1,000; the server has a limit of its own
        expires_days: after which it is destroyed, used or not, up to 30; on both sides, if the server keeps it as long
        list: show what is kept, and nothing else
        delete: destroy what is kept, here and at the server: all, expired, or what a ticket's name in --list begins
            with, several with commas
        tls_cert: certificate of this client, PEM (see `entropi certificates`); not needed on the server's machine
        tls_key: its private key
        server_ca: certificate of the authority that the server's certificate is from
        memory_gb: most memory of this side's process, in GB; by default what the model needs, with room; 0: no limit
    """
    from entropi.private.preparation.store import DAY_SECONDS, Store, default_folder, quota_for_one

    if tokens < 1 or sessions < 1:
        raise UserError("--tokens and --sessions must be at least 1")
    if keep_ready < 0 or (keep_ready and sessions > 1):
        raise UserError("--keep-ready is how many sessions are to be there at any time, in place of --sessions")
    if list and delete is not None:
        raise UserError("--list shows and --delete destroys: one of them at a time")
    quota = quota_for_one(material_gb, material_sessions, "--material-gb", "--material-sessions")
    folder = material or default_folder()
    if (list or delete is not None) and not folder.is_dir():
        raise UserError(f"nothing was prepared: there is no folder {folder}")
    with Store(folder, expires=expires_days * DAY_SECONDS, quota=quota) as store:
        if list:
            _show(store)
            return
        if delete is not None:
            _delete(store, delete, tls_cert, tls_key, server_ca)
            return

        with secure_engine():
            from entropi.private.sessions import preparing
            from entropi.private.wire.certificates import tls_files
        tls = tls_files(tls_cert, tls_key, server_ca, "--server-ca")

        def prepare(title: str) -> None:
            started = time.monotonic()
            display = _Display(title)
            with display:
                watcher = preparing.Watcher(display.begin, display.part, display.piece, display.status)
                ticket = preparing.prepare(
                    server,
                    tokens,
                    store,
                    watcher,
                    new_tokens=new_tokens,
                    draft_tokens=draft_tokens,
                    tls=tls,
                    memory_gb=memory_gb,
                )
            kept = next((entry for entry in store.entries() if entry.ticket.hex() == ticket), None)
            size = ""
            if kept is not None:
                until = preparing.when(kept.expires)
                size = f", {kept.size / 1e6:.1f} MB kept here for model {kept.model[:8]} until {until}"
            print(
                f"{ticket[:8]}: a session of up to {tokens} tokens; {display.moved / 1e6:.1f} MB were sent and "
                f"received in {time.monotonic() - started:.0f} s{size}",
                flush=True,
            )

        asked = partial(preparing.ready, server, tokens, store, new_tokens=new_tokens, draft_tokens=draft_tokens)
        ready = partial(asked, tls=tls, status=_Told())
        with terminated_like_interrupted():
            if keep_ready:
                _keep_ready(keep_ready, ready, prepare)
            _prepare_missing(sessions, ready, prepare)


def _prepare_missing(wanted: int, ready: Callable[[], int], prepare: Callable[[str], None]) -> None:
    """Prepare as many as are missing."""
    if (there := ready()) >= wanted:
        print(f"{there} ready already: --sessions {there + 1} prepares another one", flush=True)
    for number in range(there, wanted):
        prepare(f"preparing {number + 1} of {wanted}" if wanted > 1 else "preparing")


def _keep_ready(wanted: int, ready: Callable[[], int], prepare: Callable[[str], None]) -> NoReturn:
    """Prepare whenever fewer are ready than wanted; what fails after the first look is told, and tried again."""
    there, waits = ready(), False  # a wrong address or certificate ends this
    if there < wanted:
        print(f"{there} of {wanted} ready", flush=True)
    while True:
        try:
            if there < wanted:
                waits = False
                prepare(f"preparing, {there} of {wanted} ready")
            else:
                if not waits:
                    print(f"{there} of {wanted} ready: waiting until one is used", flush=True)
                waits = True
                time.sleep(LOOK_SECONDS)
            there = ready()
        except UserError as error:
            print(f"{error}; trying again in {LOOK_SECONDS:.0f} s", file=sys.stderr, flush=True)
            time.sleep(LOOK_SECONDS)


class _Told:
    """Says on standard error what is not what it has said just before."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, line: str) -> None:
        if line != self._last:
            print(without_controls(line), file=sys.stderr, flush=True)
        self._last = line


def _delete(store: Store, which: str, cert: Path | None, key: Path | None, authority: Path | None) -> None:
    """Destroy what is chosen, here first, and have the servers destroy their halves."""
    chosen = store.chosen(which if which in ("all", "expired") else which.split(","))
    print(f"{store.discard(*(entry.ticket for entry in chosen))} destroyed", flush=True)
    if not chosen:
        return
    with secure_engine():
        from entropi.private.sessions import preparing
        from entropi.private.wire.certificates import tls_files
    for line in preparing.tell_deleted(chosen, tls_files(cert, key, authority, "--server-ca")):
        print(without_controls(line), file=sys.stderr, flush=True)


def _show(store: Store) -> None:
    entries = store.entries()
    print(f"{len(entries)} sessions prepared, {sum(entry.size for entry in entries) / 1e6:.1f} MB")
    for entry in entries:
        days = (entry.expires - time.time()) / 86_400
        left = f"expires in {days:.1f} days" if days > 0 else "expired"
        state = "ready" if entry.state == "ready" else "begun"
        size = f"{entry.tokens} tokens, {entry.passes} new  {entry.size / 1e6:.1f} MB"
        print(f"{entry.name}  {state}  {size}  {entry.peer or '-'}  model {entry.model[:8]}  {left}")


class _Display:
    """Progress on standard error; use as a context manager."""

    def __init__(self, title: str) -> None:
        self._title, self._console, self._done, self.moved = title, make_console(), 0, 0
        self._line: ProgressLine | None = None

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.__exit__(None, None, None)

    def begin(self, total: int, done: int) -> None:
        self._line = ProgressLine(self._title, total, done=done, console=self._console).__enter__()
        self._done = done
        if done:
            self.status(f"going on after {done} of {total} parts")

    def part(self, done: int, communication: StageCommunication) -> None:
        self._done = done
        self._show(communication.name)

    def piece(self, communication: StageCommunication) -> None:
        self.moved += communication.bytes
        if self._line is not None:  # no longer the set-up
            self._show(communication.name)

    def _show(self, what: str) -> None:
        assert self._line is not None
        self._line.update(self._done, f"{what}, {self.moved / 1e6:.1f} MB")

    def status(self, happening: str) -> None:
        self._console.print(without_controls(happening), markup=False)


COMMAND = Command(run, place=10)
