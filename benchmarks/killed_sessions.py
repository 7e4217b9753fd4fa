"""Live processes that prepare and use one-time material, killed at random moments: is any mask used twice?

    python benchmarks/killed_sessions.py --kills 50 --seed 0

Serves a tiny model with `--embedding public --material FOLDER` on the loopback, keeps some tickets prepared, and asks
again and again. Two rounds of three end with SIGKILL, at a random moment, for one of `VICTIMS`: either side as a whole
or its party alone, in a session or while material is prepared; in the third nobody is killed. A moment is any of the
usual time, or shortly after a ticket's files begin to disappear, or after the first masked number. A server that was
killed starts again on the same folders. After every round:

1. Both indexes are read. A ticket that was taken or destroyed stays so; it is taken by one session, at most one is, and
   the client takes none but the one that the server took in the same session.
2. Of a session that sent anything masked, the ticket's files are gone from both sides, before anything is restarted;
   and no side keeps files of a ticket that is neither begun nor ready, once it has run again.
3. Every answer is right, those after kills too: logits within `TOLERANCE` of the plaintext model's.
4. No party's process is left, and no file of material outside the stores.

Once, before: copies of either side's store, put back after a session used its ticket, are of no use, whether their
files look restored or, as after a whole file system was set back, do not; answers are right without them.

All masked numbers are recorded: `sitecustomize`, in the parties' search path and in no file of the package, writes what
`Engine.send` sends, what either party sees in the open (an operand less both parties' masks), and the masks. Two values
under one mask differ by no more than values do: so numbers in the open, and sent ones, of different sessions that are
closer than 2^24 at the same position of the same message are counted, which none may be, and those anywhere, which as
many may be as by chance; and masks of one party that two sessions have, which none may be. As a control both stores are
set back once, of which the documents warn: the ticket is used twice, and the search has to see it.

The last line is JSON; the status is 1 if anything of this did not hold. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropi import cli
from entropi.data.corpus import load_corpus
from entropi.data.tokenizer import train_tokenizer
from entropi.machine import machine
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.private.preparation.index import FILE as INDEX
from entropi.private.preparation.store import MATERIAL
from entropi.private.preparation.tickets import LIVE, digest_of, parts_of

TEXT = "The secret garden lies behind the old stone wall, and the keeper of the garden has the only key. "
HOST = "127.0.0.1"
PROMPT_TOKENS, NEW_TOKENS = 3, 3  # of every session, so that masked numbers of all sessions have the same positions
TOLERANCE = 0.05  # of a logit, as in the tests
CLOSE = 1 << 24  # of values with 18 fraction bits: 64
READY = 3  # tickets that are prepared at a time
HANGING = 300.0  # seconds after which something hangs
SIDES = ("client", "server")
VICTIMS = (
    "client with its party",
    "client alone",
    "client's party",
    "server with its party",
    "server alone",
    "server's party",
    "preparing client",
    "preparing client's party",
    "preparing server",
    "preparing server's party",
)
MARK = "LC_ENTROPI_RECORDINGS"  # a variable that parties keep, see `party_handle`
KINDS = ("sent", "opened", "masks")

# For the parties' interpreters: records, in a file opened before they give up their rights, what is masked and how.
RECORDER = f'''
import os, sys, time
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

ONLINE = "entropi.private.preparation.online"


class Finder(MetaPathFinder):
    """Wraps one module's functions when it is imported, after the party has been confined."""

    def find_spec(self, name, path, target=None):
        if name != ONLINE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), wrap(module))[0]
        return spec


def wrap(module):
    send, exchange, masks = module.Engine.send, module.PreparedPasses._exchange, module.Material.masks
    rank = None

    def write(kind, content):
        file.write(bytes([kind, 2 if rank is None else rank]) + len(content).to_bytes(8, "little") + content)

    def recorded_send(self, content):
        write(0, content)
        send(self, content)

    def recorded_exchange(self, products, own, bits):
        theirs, *sizes = exchange(self, products, own, bits)
        seen = [x + y for ours, other in zip(own, theirs) for x, y in zip(ours, other)]
        write(1, b"".join(x.astype("<u8").tobytes() for x in seen))
        return theirs, *sizes

    def recorded(take):
        def recorded_take(self, *size):
            found = take(self, *size)
            drawn = found if isinstance(found, tuple) else (found,)
            write(2, b"".join(x.astype("<u8").tobytes() for x in drawn))
            return found

        return recorded_take

    def recorded_masks(self, *place):
        found = masks(self, *place)
        drawn = [x for x in (found.a, found.b) if x is not None]
        write(2, b"".join(x.astype("<u8").tobytes() for x in drawn))
        return found

    begin = module.PreparedPasses.__init__

    def begin_recorded(self, engine, *rest):
        nonlocal rank
        rank = engine.rank
        begin(self, engine, *rest)

    module.Engine.send, module.PreparedPasses._exchange = recorded_send, recorded_exchange
    module.Material.masks, module.PreparedPasses.__init__ = recorded_masks, begin_recorded
    for name in ("of_signs", "of_kept", "of_bits"):
        setattr(module.Material, name, recorded(getattr(module.Material, name)))


if "{MARK}" in os.environ and any("party_process" in word for word in sys.orig_argv):
    file = open(os.path.join(os.environ["{MARK}"], f"{{time.time_ns()}}-{{os.getpid()}}"), "ab", buffering=0)
    sys.meta_path.insert(0, Finder())
'''


# --- What was recorded ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """What one party recorded of one session: its messages, in their order, as whole numbers."""

    session: int
    rank: int
    messages: dict[str, list[np.ndarray]]

    @classmethod
    def read(cls, path: Path, session: int) -> Recording | None:
        """None if nothing was masked; what a kill cut short is left out."""
        content, at, rank = path.read_bytes(), 0, 2
        messages: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
        while at + 10 <= len(content):
            kind, rank, size = struct.unpack_from("<BBQ", content, at)
            at += 10 + size
            if at <= len(content):
                # Bits of truncations are sent hidden by random bits: eight bytes of them are as good as any number.
                messages[KINDS[kind]].append(np.frombuffer(content[at - size : at - size % 8], "<u8"))
        return cls(session, rank, messages) if any(messages.values()) else None


def repeats(recordings: Sequence[Recording]) -> dict[str, int | float]:
    """How many numbers of different sessions look as if one mask hid both: see the beginning of this file."""
    aligned: dict[tuple[Any, ...], list[np.ndarray]] = {}
    for one in recordings:
        for kind in ("sent", "opened"):
            for number, words in enumerate(one.messages[kind]):
                aligned.setdefault((kind, one.rank, number, len(words)), []).append(words)
    found: dict[str, int | float] = {"sent": 0, "opened": 0}
    compared = 0
    for (kind, *_), rows in aligned.items():
        if len(rows) > 1:
            table = np.sort(np.stack(rows), axis=0)
            apart = np.vstack([np.diff(table, axis=0), table[:1] - table[-1:]])  # around the end of the ring as well
            found[kind] += int((apart < CLOSE).sum())
            compared += table.size

    anywhere, chance, same = 0, 0.0, 0
    for rank in (0, 1):
        opened, owners = _words(recordings, rank, "opened")
        order = np.argsort(opened, kind="stable")
        apart, other = np.diff(opened[order]), np.diff(owners[order]) != 0
        anywhere += int((other & (apart < CLOSE)).sum())
        counts = np.bincount(owners) if len(owners) else np.zeros(1)
        chance += float((len(opened) ** 2 - (counts.astype(float) ** 2).sum()) / 2 * 2 * CLOSE / 2**64)
        masks, _ = _words(recordings, rank, "masks")
        same += len(masks) - len(np.unique(masks))
    words = sum(len(words) for one in recordings for some in one.messages.values() for words in some)
    return {**found, "anywhere": anywhere, "by_chance": chance, "masks": same, "compared": compared, "words": words}


def _words(recordings: Sequence[Recording], rank: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of a kind, each once a session, for one session hands out keys' masks again; whose they are."""
    some = [
        (np.unique(np.concatenate(one.messages[kind])), one.session)
        for one in recordings
        if one.rank == rank and one.messages[kind]
    ]
    if not some:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    return (
        np.concatenate([words for words, _ in some]),
        np.concatenate([np.full(len(words), session) for words, session in some]),
    )


# --- Processes --------------------------------------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    """Parties' processes are all that a client or a server starts."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def parties(mark: Path) -> list[int]:
    """Processes of parties with our mark in their environment, whoever their parent is by now."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            party = entry.name.isdigit() and b"party_process" in (entry / "cmdline").read_bytes()
            if party and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], Any], seconds: float = HANGING) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def free_port() -> int:
    """One below those that the system gives to connections; clients know a server by it, so that it has to stay."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


# --- Both sides -------------------------------------------------------------------------------------------------------


def make_model(folder: Path) -> tuple[EntropiForCausalLM, Any]:
    """Random weights and biases, in two layers of 16 columns, and a tokenizer of 300 entries; folded for serving."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(8):
        (corpus / f"{number}.txt").write_text(TEXT * 10 + str(number))
    tokenizer = train_tokenizer(load_corpus(str(corpus)), 300)
    torch.manual_seed(3)
    config = EntropiConfig(
        architecture="SM(t)+ScFuFFN",
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = EntropiForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    assert cli.main(["fold", str(folder / "model"), str(folder / "folded")]) == 0
    return model, tokenizer


def prompts_of(tokenizer: Any) -> list[str]:
    """Beginnings of sentences that have the same number of tokens."""
    words = TEXT.split()
    some = {" ".join(words[a:b]) for a, b in itertools.combinations(range(len(words)), 2)}
    return sorted(text for text in some if len(tokenizer.encode(text).ids) == PROMPT_TOKENS)


@dataclass
class Asked:
    """What came of one `entropi ask`."""

    status: int
    said: str
    prepared: bool = False
    error: float = 0.0  # largest of a logit


@dataclass
class Site:
    """A server, a client's store, and what both have done so far."""

    folder: Path
    chance: random.Random
    wrong: list[str] = field(default_factory=list)  # what did not hold
    session: int = 0
    before: dict[str, dict[str, str]] = field(default_factory=lambda: {side: {} for side in SIDES})
    taken: dict[str, dict[str, int]] = field(default_factory=lambda: {side: {} for side in SIDES})
    recordings: list[Recording] = field(default_factory=list)
    read: set[Path] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    largest: float = 0.0
    usual: dict[str, float] = field(default_factory=lambda: {"ask": 20.0, "online": 1.0})

    def __post_init__(self) -> None:
        self.folder.chmod(0o711)  # where this is root, parties become users of their own
        self.model, self.tokenizer = make_model(self.folder)
        self.prompts = prompts_of(self.tokenizer)
        assert len(self.prompts) > 3, self.prompts
        for name in ("recordings", "hooks", "temporary"):
            (self.folder / name).mkdir()
        (self.folder / "hooks" / "sitecustomize.py").write_text(RECORDER)
        self.mark = self.folder / "recordings"
        path = [str(self.folder / "hooks"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "TMPDIR": str(self.folder / "temporary"),
            "XDG_STATE_HOME": str(self.folder / "state"),
            "ENTROPI_CACHE": str(self.folder / "cache"),
            MARK: str(self.mark),
        }
        self.address = f"{HOST}:{free_port()}"
        self.server: subprocess.Popen[bytes] | None = None

    def store(self, side: str) -> Path:
        return self.folder / f"{side}-material"

    def complain(self, what: str) -> None:
        self.wrong.append(f"session {self.session}: {what}")
        print(f"WRONG {self.wrong[-1]}", flush=True)

    # Processes.

    def start(self, *words: object) -> subprocess.Popen[bytes]:
        """An entropi process, killed by the system when this one ends; what it says goes to a file."""
        with open(self.folder / f"{words[0]}.out", "wb") as out, open(self.folder / f"{words[0]}.log", "ab") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "entropi", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=self.environment,
            )

    def serve(self) -> None:
        """Start the server, on the folders that another one may have left."""
        log = self.folder / "serve.log"
        length = log.stat().st_size if log.exists() else 0
        options = ("--embedding", "public", "--material", self.store("server"), "--self-test", "none")
        limits = ("--max-new-tokens", 8, "--client-sessions", 100_000, "--client-tokens", 1_000_000)
        self.server = self.start("serve", self.folder / "folded", "--listen", self.address, *options, *limits)
        heard = wait_for(lambda: b"listening on" in log.read_bytes()[length:] or self.server.poll() is not None)
        if not heard or self.server.poll() is not None:
            raise SystemExit(f"the server did not start:\n{log.read_text()[-3000:]}")

    def stop_server(self) -> None:
        if self.server is not None:
            kill(self.server.pid, *children_of(self.server.pid))
            self.server.wait()

    def settle(self) -> None:
        """See that every party ends, and that both sides' sweeping leaves nothing but what lives."""
        assert self.server is not None
        if not wait_for(lambda: not parties(self.mark), 90):
            self.complain(f"processes are left: {parties(self.mark)}")
            kill(*parties(self.mark))
        if self.server.poll() is not None:
            self.counts["restarts"] += 1
            self.serve()
        if not wait_for(lambda: not self.stray("server"), 30):
            self.complain(f"the server keeps files of {self.stray('server')}")

    # Stores.

    def states(self, side: str) -> dict[str, str]:
        """State of every ticket in a side's index, by id."""
        where = f"{(self.store(side) / INDEX).as_uri()}?mode=rw"  # what was not committed is taken back
        with contextlib.closing(sqlite3.connect(where, uri=True, timeout=30)) as index:
            return {bytes(ticket).hex(): state for ticket, state in index.execute("SELECT id, state FROM tickets")}

    def ready(self) -> set[str]:
        """Tickets that both sides have."""
        client, server = (self.states(side) for side in SIDES)
        return {ticket for ticket, state in client.items() if state == server.get(ticket) == "ready"}

    def files(self, side: str, ticket: str | None = None) -> list[str]:
        """Of one ticket, or of all."""
        place = self.store(side) / MATERIAL
        return [name for _, _, names in os.walk(place / ticket if ticket else place) for name in names]

    def stray(self, side: str) -> set[str]:
        live = {ticket for ticket, state in self.states(side).items() if state in LIVE}
        return {path.name for path in (self.store(side) / MATERIAL).iterdir()} - live

    def look(self) -> dict[str, set[str]]:
        """Hold both indexes against what they were; the tickets that were taken since, by side."""
        newly: dict[str, set[str]] = {}
        for side in SIDES:
            now, before = self.states(side), self.before[side]
            for ticket, was in before.items():
                reopened = side == "server" and self.before["client"].get(ticket) == "growing"
                may = {"growing": {None, *LIVE, "destroyed", "taken"}, "ready": {"ready", "taken", "destroyed"}}
                may = may.get(was, {was}) | (set(LIVE) if reopened and was != "taken" else set())
                if now.get(ticket) not in may:
                    self.complain(f"{ticket} was {was} at the {side} and is {now.get(ticket)}")
            newly[side] = {t for t, state in now.items() if state == "taken" and before.get(t) != "taken"}
            for ticket in newly[side]:
                if self.taken[side].setdefault(ticket, self.session) != self.session:
                    self.complain(f"{ticket} was taken twice at the {side}")
            if len(newly[side]) > 1:
                self.complain(f"one session took several tickets at the {side}: {newly[side]}")
        for ticket in newly["client"]:
            if self.taken["server"].get(ticket) != self.session:
                self.complain(f"{ticket} was taken at the client and not, for the same session, at the server")
        self.before = {side: self.states(side) for side in SIDES}
        return newly

    def look_at_files(self) -> None:
        """As soon as a client has ended: if anything was masked, both sides have taken the ticket and erased it."""
        masked = any(path.stat().st_size for path in self.fresh())
        now = {side: self.states(side) for side in SIDES}
        for side in SIDES:
            newly = [t for t, state in now[side].items() if state == "taken" and self.before[side].get(t) != "taken"]
            if masked and len(newly) != 1:
                self.complain(f"something was masked, and the {side} has taken {newly}")
            for ticket in newly if masked else ():
                if self.files(side, ticket):
                    self.complain(f"something was masked, and the {side} has files of {ticket}")
        self.counts["masked"] += masked

    def fresh(self) -> list[Path]:
        """Recordings since the last session."""
        return [path for path in self.mark.iterdir() if path not in self.read]

    def collect(self) -> list[Recording]:
        paths = self.fresh()
        self.read.update(paths)
        found = [one for path in paths if (one := Recording.read(path, self.session)) is not None]
        for path in paths:
            path.unlink()
        return found

    def no_copies(self) -> None:
        """Of parts that a store has by now, in temporary folders, where parties leave them for their parents."""
        kept = {
            array.tobytes()
            for side in SIDES
            for path in (self.store(side) / MATERIAL).rglob("*.safetensors")
            for array in load_file(path).values()
            if array.size > 4  # not what is told beside the numbers
        }
        for path in (self.folder / "temporary").rglob("entropi-tunnel-*/*"):
            with contextlib.suppress(SafetensorError, OSError):  # sockets, what a kill cut short
                if kept & {array.tobytes() for array in load_file(path).values()}:
                    self.complain(f"{path.name} of {path.parent} is a copy of what a store keeps")

    # Sessions.

    def ask(self, after_start: Callable[[subprocess.Popen[bytes]], None] | None = None) -> Asked:
        """One session, and all that must hold once it has ended, however that was."""
        self.session += 1
        self.before = {side: self.states(side) for side in SIDES}
        prompt, file = self.chance.choice(self.prompts), self.folder / "logits.npy"
        file.unlink(missing_ok=True)
        words = ("--max-new-tokens", NEW_TOKENS, "--full-length", "--material", self.store("client"))
        log = self.folder / "ask.log"
        log.unlink(missing_ok=True)
        client = self.start("ask", prompt, "--server", self.address, *words, "--json", "--logits", file)
        if after_start is not None:
            after_start(client)
        try:
            client.wait(HANGING)
        except subprocess.TimeoutExpired:
            self.complain("the client hangs")
            kill(client.pid)
            client.wait()
        self.look_at_files()
        self.settle()
        newly, recordings = self.look(), self.collect()
        self.recordings += recordings

        asked = Asked(client.returncode, " ".join(log.read_text()[-600:].split()))
        if client.returncode == 0:
            record = json.loads((self.folder / "ask.out").read_text())
            asked.prepared = record["prepared_bytes"] > 0
            asked.error = self.error_of(prompt, record["new_tokens"], np.load(file))
            self.largest = max(self.largest, asked.error)
            self.counts["answers"] += 1
            self.counts["prepared answers"] += asked.prepared
            if not asked.error < TOLERANCE:
                self.complain(f"logits after {prompt!r} are off by {asked.error:.3g}")
            if asked.prepared != bool(newly["client"]) or asked.prepared != (len(recordings) == 2):
                self.complain(f"prepared: {asked.prepared}, taken {newly}, recorded by {len(recordings)} parties")
        return asked

    def error_of(self, prompt: str, tokens: list[int], logits: np.ndarray) -> float:
        """The largest difference from the plaintext model's logits, after the same tokens."""
        ids, errors = self.tokenizer.encode(prompt).ids, []
        assert len(logits) == len(tokens) == NEW_TOKENS
        for number, row in enumerate(logits):
            with torch.no_grad():
                plain = self.model(torch.tensor([ids + tokens[:number]])).logits[0, -1].double().numpy()
            errors.append(np.abs(row - plain).max())
        return float(max(errors))

    def must_answer(self, prepared: bool | None = None) -> Asked:
        """A session that nobody disturbs."""
        began = time.monotonic()
        asked = self.ask()
        if asked.status:
            self.complain(f"no answer: {asked.said}")
        elif prepared is not None and asked.prepared != prepared:
            self.complain(f"the session was {'' if asked.prepared else 'not '}prepared")
        if asked.prepared:
            self.usual["ask"] = time.monotonic() - began
        if left := self.stray("client"):
            self.complain(f"the client keeps files of {left}")
        return asked

    def prepare(
        self, count: int, after_start: Callable[[subprocess.Popen[bytes]], None] | None = None
    ) -> subprocess.Popen[bytes]:
        """Prepare so many sessions more, which may be disturbed."""
        self.before = {side: self.states(side) if self.store(side).exists() else {} for side in SIDES}
        count += len(self.ready()) if all(self.before.values()) else 0
        size = ("--tokens", PROMPT_TOKENS + NEW_TOKENS, "--new-tokens", NEW_TOKENS, "--sessions", count)
        client = self.start("prepare", "--server", self.address, *size, "--material", self.store("client"))
        if after_start is not None:
            after_start(client)
        client.wait(HANGING)
        self.settle()
        if newly := {side: tickets for side, tickets in self.look().items() if tickets}:
            self.complain(f"preparing took {newly}")
        self.no_copies()
        return client

    def top_up(self) -> None:
        """Have tickets ready on both sides."""
        if (missing := READY - len(self.ready())) > 0:
            before = len(self.ready())
            if self.prepare(missing).returncode:
                self.complain(f"preparing failed: {(self.folder / 'prepare.log').read_text()[-600:].strip()}")
            if len(self.ready()) < before + missing:
                self.complain("what was prepared is not ready on both sides")
            if left := self.stray("client"):
                self.complain(f"the client keeps files of {left}")

    # Moments.

    def wait_for_moment(self, client: subprocess.Popen[bytes]) -> str:
        """Until a random moment of a session; its kind, "" if the client has ended by then."""
        moment, began = self.chance.choice(("any", "taken", "masked")), time.monotonic()
        files = {side: len(self.files(side)) for side in SIDES}
        side, delay = self.chance.choice(SIDES), 0.0
        if moment == "any":
            delay = self.chance.uniform(0, self.usual["ask"])
        elif moment == "taken":
            while client.poll() is None and len(self.files(side)) >= files[side]:
                time.sleep(0.005)
            delay = self.chance.uniform(0, 0.02)
        else:
            while client.poll() is None and not any(path.stat().st_size for path in self.fresh()):
                time.sleep(0.01)
            delay = self.chance.uniform(0, self.usual["online"])
        until = time.monotonic() + delay
        while client.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        if moment == "masked" and client.poll() is not None:
            self.usual["online"] = max(0.1, 0.8 * self.usual["online"])
        print(f"  {moment}, after {time.monotonic() - began:.2f} s", flush=True)
        return moment if client.poll() is None else ""

    def wait_for_part(self, client: subprocess.Popen[bytes], total: int) -> str:
        """Until a random number of the parts that a ticket lacks, of either side, is there."""
        side, ready = self.chance.choice(SIDES), Counter(self.before["client"].values())["ready"]
        begun = max(0, len(self.files(side)) - total * ready)  # of a ticket that an earlier kill left unfinished
        parts = self.chance.randint(0, max(0, total - begun))
        files = len(self.files(side))
        while client.poll() is None and len(self.files(side)) < files + parts:
            time.sleep(0.005)
        time.sleep(self.chance.uniform(0, 0.05))
        print(f"  after {parts} of {total} parts at the {side}", flush=True)
        return f"{parts} parts" if client.poll() is None else ""

    def victims(self, victim: str, client: subprocess.Popen[bytes]) -> list[int]:
        """Ids of the processes to kill; where a party is meant, once there is one."""
        assert self.server is not None
        who = client.pid if "client" in victim else self.server.pid
        if victim.endswith("'s party"):
            wait_for(lambda: children_of(who) or client.poll() is not None)
            return children_of(who)
        return [who] if victim.endswith("alone") else [who, *children_of(who)]

    def round(self, victim: str, parts: int) -> bool:
        """Ask, or prepare, and kill; whether anybody was."""
        killed: list[int] = []

        def strike(client: subprocess.Popen[bytes]) -> None:
            preparing = victim.startswith("preparing")
            moment = self.wait_for_part(client, parts) if preparing else self.wait_for_moment(client)
            if moment:
                killed.extend(self.victims(victim, client))
                kill(*killed)
                if "server" in victim and self.server is not None and self.server.pid in killed:
                    self.server.wait()
                self.counts[f"{victim}, {moment}" if not preparing else victim] += bool(killed)

        if victim.startswith("preparing"):
            self.prepare(1, strike)
        else:
            asked = self.ask(strike)
            if killed and asked.status == 0:
                self.counts["answers in spite of a kill"] += 1
        return bool(killed)


# --- Stores that are set back -----------------------------------------------------------------------------------------


def put_back(site: Site, side: str, as_if_unchanged: bool) -> None:
    """Put the copy of a store in its place; as a whole file system that was set back would be, if so wanted."""
    place = site.store(side)
    if side == "server":
        site.stop_server()
    shutil.rmtree(place)
    shutil.copytree(site.folder / f"{side}-copy", place)
    if as_if_unchanged:
        with contextlib.closing(sqlite3.connect(place / INDEX)) as index, index:
            for (ticket,) in index.execute("SELECT id FROM tickets WHERE state = 'ready'").fetchall():
                for part, file in parts_of(index, ticket).items():
                    changed = os.stat(place / MATERIAL / ticket.hex() / file.name).st_ctime_ns
                    text = msgspec.json.encode(msgspec.structs.replace(file, changed=changed))
                    index.execute("UPDATE parts SET file = ? WHERE ticket = ? AND part = ?", (text, ticket, part))
                index.execute(
                    "UPDATE tickets SET digest = ? WHERE id = ?", (digest_of(parts_of(index, ticket)), ticket)
                )
    if side == "server":
        site.serve()


def set_back(site: Site) -> dict[str, Any]:
    """What old copies of stores are worth: nothing, unless both sides' are put back, which the search then sees."""
    site.prepare(1)
    (ticket,) = site.ready()
    for side in SIDES:
        shutil.copytree(site.store(side), site.folder / f"{side}-copy")
    site.must_answer(prepared=True)
    told: dict[str, Any] = {}
    for side, as_if_unchanged in itertools.product(SIDES, (False, True)):
        put_back(site, side, as_if_unchanged)
        asked = site.must_answer(prepared=False)
        refused = "going on without" in asked.said
        told[f"{side}, {'files as they were' if as_if_unchanged else 'copied files'}"] = (
            "refused by the other side" if refused else "not offered"
        )
        if refused != (side == "client" and as_if_unchanged):
            site.complain(f"the {side}'s copy was {'' if refused else 'not '}refused by the other side")

    put_back(site, "client", True)
    if site.ready() != {ticket}:
        site.complain("the control has no ticket that was used")
    recordings, taken = list(site.recordings), site.taken
    site.taken = {side: {} for side in SIDES}  # as nobody remembers
    site.must_answer(prepared=True)
    told["control"] = repeats(site.recordings)
    site.recordings, site.taken = recordings, taken
    for kind in ("opened", "masks"):
        if not told["control"][kind]:
            site.complain(f"a ticket was used twice, and the search sees nothing of that in {kind}")
    return told


# --- All of it --------------------------------------------------------------------------------------------------------


def deck(chance: random.Random) -> Iterator[str]:
    """Every victim equally often, in random order."""
    while True:
        cards = list(VICTIMS)
        chance.shuffle(cards)
        yield from cards


def run(site: Site, kills: int, minutes: float, copies: bool) -> dict[str, Any]:
    """As many kills, or fewer in this time; what was found of copied stores."""
    site.serve()
    told = set_back(site) if copies else {}
    print(json.dumps(told), flush=True)
    if not copies:
        site.prepare(READY)
    site.top_up()
    parts = len(site.files("client", min(site.ready())))
    done, number, victims, began = 0, 0, deck(site.chance), time.monotonic()
    while done < kills and time.monotonic() < began + 60 * minutes:
        number += 1
        site.top_up()
        if number % 3 == 0:
            site.must_answer(prepared=None)
            continue
        victim = next(victims)
        print(f"{time.monotonic() - began:6.0f} s: {done} of {kills}, now the {victim}", flush=True)
        done += site.round(victim, parts)
    site.top_up()
    site.must_answer()
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="for the kills; fewer are done in less time")
    parser.add_argument("--no-copies", action="store_true", help="kill only, and put no copies of stores back")
    parser.add_argument("--work", type=Path, help="folder to leave everything in; by default a temporary one")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="entropi-kills-")))
        work.mkdir(exist_ok=True)
        site = Site(work, random.Random(given.seed))
        stack.callback(site.stop_server)
        began = time.monotonic()
        told = run(site, given.kills, given.minutes, not given.no_copies)
        found = repeats(site.recordings)
        if found["sent"] or found["opened"] or found["masks"]:
            site.complain(f"masks were used twice: {found}")
        if found["anywhere"] > found["by_chance"] + 6 * found["by_chance"] ** 0.5 + 6:
            site.complain(f"more numbers are close to each other than by chance: {found}")
        kills = {name: count for name, count in sorted(site.counts.items()) if name.startswith(VICTIMS)}
        others = {name: count for name, count in sorted(site.counts.items()) if name not in kills}
    print(
        json.dumps(
            {
                "machine": machine(),
                "seconds": round(time.monotonic() - began),
                "kills": kills,
                "killed": sum(kills.values()),
                **others,
                "asked": site.session,
                "tickets_taken": {side: len(tickets) for side, tickets in site.taken.items()},
                "largest_error": site.largest,
                "recorded_sessions": len({one.session for one in site.recordings}),
                "repeats": found,
                "set_back": told,
                "wrong": site.wrong,
            }
        )
    )
    return int(bool(site.wrong))


if __name__ == "__main__":
    sys.exit(main())
