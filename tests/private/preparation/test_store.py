"""One-time material is handed out once, to whom it is for, or destroyed."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import store_walkers
from entropi.errors import UserError
from entropi.private.preparation import index as index_module
from entropi.private.preparation import store as store_module
from entropi.private.preparation.store import DAY_SECONDS, REMEMBERED_SECONDS, Quota, Store
from entropi.private.preparation.tickets import digest_of, parts_of
from store_walkers import PARTS, SIZE, add_missing, binding, digest, expected, first_ready, prepare, refusal, words

ONE, TWO, THREE, FOUR = (bytes([number]) * 16 for number in range(1, 5))
INDEX = index_module.FILE


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: no power fails in these tests, and disks are slow."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store") as opened:
        yield opened


def files_in(folder: Path) -> list[Path]:
    return [path for path in (folder / store_module.MATERIAL).rglob("*") if path.is_file()]


def right(store: Store, ticket: bytes, side: str = "client") -> bool:
    return digest(store.take(ticket, binding(side))) == expected(ticket, side)


def accept_as_unchanged(store: Store, ticket: bytes) -> None:
    """Let the index know the files as they are, as it does where a whole file system was set back."""
    with store._index.transaction() as index:
        for part, file in parts_of(index, ticket).items():
            changed = os.stat(store._path(ticket) / file.name).st_ctime_ns
            text = msgspec.json.encode(msgspec.structs.replace(file, changed=changed))
            index.execute("UPDATE parts SET file = ? WHERE ticket = ? AND part = ?", (text, ticket, part))
        index.execute("UPDATE tickets SET digest = ? WHERE id = ?", (digest_of(parts_of(index, ticket)), ticket))


# --- A ticket's life --------------------------------------------------------------------------------------------------


def test_a_ticket_grows_is_offered_and_taken_once(store, tmp_path):
    growth = store.grow(ONE, binding(), 10_000)
    square = np.arange(16, dtype=np.uint64).reshape(4, 4).T
    growth.add("layer 0", {"mask": square, "one": np.array(2**64 - 1, np.uint64), "none": np.zeros((0, 3), np.uint64)})
    assert growth.parts() == {"layer 0"}
    assert "not prepared to the end" in refusal(lambda: store.take(ONE, binding()))
    assert first_ready(store, binding()) is None
    assert store.growing(binding()) == [ONE]

    growth.add("layer 1", {"mask": square + np.uint64(1)})
    growth.finish()
    assert first_ready(store, binding()) == ONE
    assert len(files_in(tmp_path / "store")) == 2
    material = store.take(ONE, binding())
    assert {part: set(arrays) for part, arrays in material.items()} == {
        "layer 0": {"mask", "one", "none"},
        "layer 1": {"mask"},
    }
    np.testing.assert_array_equal(material["layer 0"]["mask"], square)
    assert material["layer 0"]["one"] == np.uint64(2**64 - 1)
    assert material["layer 0"]["none"].shape == (0, 3)
    np.testing.assert_array_equal(material["layer 1"]["mask"], square + np.uint64(1))

    assert "taken already" in refusal(lambda: store.take(ONE, binding()))
    assert "taken already" in refusal(lambda: store.grow(ONE, binding(), 10_000))
    assert "taken already" in refusal(lambda: growth.add("layer 2", {"mask": square}))
    assert first_ready(store, binding()) is None
    assert store.entries() == []
    assert files_in(tmp_path / "store") == []


def test_the_oldest_of_a_binding_is_offered(tmp_path):
    now = [0.0]
    with Store(tmp_path, clock=lambda: now[0]) as store:
        for ticket in (TWO, ONE, THREE):
            now[0] += 1
            prepare(store, ticket)
        prepare(store, FOUR, "server")
        assert first_ready(store, binding()) == TWO
        assert first_ready(store, binding("server")) == FOUR
        assert first_ready(store, binding(tokens=9)) is None


def test_only_ring_elements_and_no_more_than_was_said_are_kept(store):
    growth = store.grow(ONE, binding(), 100)
    for arrays in ({}, {"a": np.zeros(2)}, {"a": np.zeros(2, np.int64)}, {"a": np.zeros(2, ">u8")}):
        with pytest.raises(ValueError, match="64-bit ring elements"):
            growth.add("p", arrays)
    assert "no material" in refusal(growth.finish)
    growth.add("p", {"a": np.zeros(12, np.uint64)})
    assert "more material than was said" in refusal(lambda: growth.add("q", {"a": np.zeros(1, np.uint64)}))
    assert "has this part already" in refusal(lambda: growth.add("p", {"a": np.zeros(0, np.uint64)}))
    assert "begun with another size" in refusal(lambda: store.grow(ONE, binding(), 101))
    for ticket, size in ((b"short", 1), (TWO, 0)):
        with pytest.raises(ValueError, match="16 bytes and a size"):
            store.grow(ticket, binding(), size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "n"}, "another model"),
        ({"settings": "t"}, "other settings"),
        ({"own": "bob"}, "another certificate of this side"),
        ({"peer": "mallory"}, "another party"),
        ({"side": "server"}, "the other side"),
        ({"tokens": 9}, "8 tokens, not 9"),
        ({"passes": 4}, "3 passes, not 4"),
    ],
)
def test_another_binding_is_refused_and_takes_nothing(store, change, words):
    prepare(store, ONE)
    other = msgspec.structs.replace(binding(), **change)
    told = refusal(lambda: store.take(ONE, other))
    assert told == f"ticket 01010101 was prepared for {words}"  # and for whom is not said
    assert words in refusal(lambda: store.grow(ONE, other, SIZE))
    assert first_ready(store, other) is None
    assert right(store, ONE)
    assert words in refusal(lambda: store.take(ONE, other))  # nor what became of it


def test_preparing_goes_on_where_it_ended_and_only_for_the_last_who_did(store):
    first = store.grow(ONE, binding(), SIZE)
    first.add(PARTS[0], {"a": words(ONE, "client", PARTS[0])})
    second = store.grow(ONE, binding(), SIZE)
    assert second.parts() == {PARTS[0]}
    for late in (
        first.finish,
        first.parts,
        lambda: first.keep([]),
        lambda: first.add(PARTS[1], {"a": words(TWO, "client", PARTS[1])}),
    ):
        assert "over another connection now" in refusal(late)
    add_missing(second, "client")
    second.finish()
    assert right(store, ONE)


def test_parts_that_the_other_side_lacks_are_made_again(store, tmp_path):
    growth = store.grow(ONE, binding(), SIZE)
    growth.add(PARTS[0], {"a": words(ONE, "client", PARTS[0])})
    growth.add(PARTS[1], {"a": words(TWO, "client", PARTS[1])})
    growth.keep([PARTS[0], "of theirs"])
    assert growth.parts() == {PARTS[0]}
    assert len(files_in(tmp_path / "store")) == 1
    add_missing(growth, "client")
    growth.finish()
    assert right(store, ONE)


def test_discarded_and_deleted_tickets_are_gone_and_remembered(store, tmp_path):
    for ticket in (ONE, TWO, THREE):
        prepare(store, ticket)
    store.grow(FOUR, binding(), SIZE)
    assert [(entry.ticket, entry.name, entry.state, entry.size) for entry in store.entries()] == [
        *((ticket, ticket.hex()[:8], "ready", SIZE) for ticket in (ONE, TWO, THREE)),
        (FOUR, "04040404", "growing", 0),
    ]
    assert {(entry.peer, entry.tokens) for entry in store.entries()} == {("server", 8)}

    assert store.discard(ONE) == 1
    assert store.discard(ONE, b"never met before") == 0
    assert store.discard(ONE, TWO, peer="mallory") == 0
    assert store.entries()[0].ticket == TWO
    assert "was destroyed" in refusal(lambda: store.take(ONE, binding()))
    assert "no ticket begins" in refusal(lambda: store.delete(["0101"]))
    assert "no ticket begins" in refusal(lambda: store.delete([TWO.hex(), "77"]))
    assert "several tickets begin" in refusal(lambda: store.delete(["0"]))
    assert store.delete(["0202", TWO.hex()]) == 1
    with pytest.raises(ValueError, match="as a list"):
        store.delete("0202")
    assert store.delete("expired") == 0
    assert store.discard(*(entry.ticket for entry in store.entries()), peer="server") == 2
    assert store.delete("all") == 0
    assert "was destroyed" in refusal(lambda: store.grow(THREE, binding(), SIZE))
    assert files_in(tmp_path / "store") == []
    assert list((tmp_path / "store" / store_module.MATERIAL).iterdir()) == []
    prepare(store, FOUR)  # of which there never was any material


def test_the_other_side_may_have_a_ticket_reopened_that_was_never_taken(store):
    """One that was killed before its own end is behind: what is ready here, or was destroyed, is of no use to it."""
    prepare(store, ONE)
    prepare(store, TWO)
    assert "prepared already" in refusal(lambda: store.grow(ONE, binding(), SIZE))
    assert "another party" in refusal(lambda: store.grow(ONE, binding(peer="mallory"), SIZE, reopen=True))
    growth = store.grow(ONE, binding(), SIZE, reopen=True)
    assert "not prepared to the end" in refusal(lambda: store.take(ONE, binding()))
    assert first_ready(store, binding()) == TWO
    assert growth.parts() == set(PARTS)
    growth.keep(PARTS[:1])
    add_missing(growth, "client")
    growth.finish()
    assert right(store, ONE)
    assert "taken already" in refusal(lambda: store.grow(ONE, binding(), SIZE, reopen=True))

    store.discard(TWO)
    growth = store.grow(TWO, binding(), SIZE, reopen=True)
    assert growth.parts() == set()
    add_missing(growth, "client")
    growth.finish()
    assert right(store, TWO)


def test_who_still_writes_for_a_destroyed_ticket_leaves_nothing(store, tmp_path, monkeypatch):
    growth = store.grow(ONE, binding(), SIZE)
    growth.add(PARTS[0], {"a": words(ONE, "client", PARTS[0])})
    written = []

    def write(folder: int, arrays: Any) -> Any:
        written.append(write_part(folder, arrays))
        store.discard(ONE)
        return written[0]

    write_part = sys.modules[type(growth).__module__].write_part
    monkeypatch.setattr(f"{type(growth).__module__}.write_part", write)
    assert "was destroyed" in refusal(lambda: growth.add(PARTS[1], {"a": words(ONE, "client", PARTS[1])}))
    assert written
    assert list((tmp_path / "store" / store_module.MATERIAL).iterdir()) == []


def test_all_is_on_the_disk_before_anything_is_returned(store, tmp_path, monkeypatch):
    """What a power failure would leave cannot be tried here, but the order of what is written can be seen."""
    events = []

    def seen(module: Any, function: str, name: Callable[..., str]) -> None:
        called = getattr(module, function)

        def call(*words: Any, **options: Any) -> Any:
            events.append(f"{function} {name(*words)}")
            return called(*words, **options)

        monkeypatch.setattr(module, function, call)

    prepare(store, TWO)
    growth = store.grow(ONE, binding(), SIZE)
    seen(os, "fsync", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
    seen(os, "unlink", lambda path, **_: Path(path).name)
    seen(os, "rmdir", lambda path, **_: Path(path).name)
    seen(store_module, "read_part", lambda folder, part: part.name)
    seen(store._index, "transaction", str)  # which returns when SQLite has done the same
    assert store._index._connection.execute("PRAGMA synchronous").fetchone() == (3,)
    assert store._index._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)

    growth.add(PARTS[0], {"a": words(ONE, "client", PARTS[0])})
    (name,) = (path.name for path in files_in(tmp_path / "store") if path.parent.name == ONE.hex())
    assert events == ["transaction ", f"fsync {name}", f"fsync {ONE.hex()}", "transaction "]
    events.clear()
    one, two = (file.name for file in parts_of(store._index._connection, TWO).values())
    store.take(TWO, binding())
    assert events == [
        "transaction ",
        "fsync store",
        *(f"read_part {name}" for name in (one, two)),
        *(f"unlink {name}" for name in (one, two)),
        f"fsync {TWO.hex()}",
        f"rmdir {TWO.hex()}",
        "fsync material",
    ]


def test_the_other_side_is_told_what_it_may_count_on(tmp_path):
    now = [0.0]
    with Store(tmp_path, expires=60, clock=lambda: now[0]) as store:
        for ticket in (ONE, TWO, THREE):
            prepare(store, ticket, "server")
        store.grow(FOUR, binding("server"), SIZE)
        store.discard(TWO)
        right(store, THREE, "server")
        every = [ONE, TWO, THREE, FOUR, b"never met before"]
        size = {"tokens": 1, "passes": 1}  # are the client's to know
        assert store.states(every, binding("server", **size)) == ["ready", "gone", "gone", "gone", "unknown"]
        assert store.states(every, binding("server", model="n"))[0] == "other"
        assert store.states(every, binding("server", peer="mallory")) == ["unknown"] * 5
        now[0] = 60
        assert store.states([ONE], binding("server")) == ["gone"]


def test_two_processes_do_not_work_with_one_ticket(tmp_path):
    with Store(tmp_path) as store, Store(tmp_path) as other:
        claim = store.claim(ONE)
        assert other.claim(ONE) is None
        other.claim(TWO).release()
        claim.release()
        claim.release()
        again = other.claim(ONE)
        claim.release()
        assert store.claim(ONE) is None
        again.release()
    holding = "import sys; from pathlib import Path; from entropi.private.preparation.store import Store;"
    holding += "claim = Store(Path(sys.argv[1])).claim(bytes.fromhex(sys.argv[2])); print(claim); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holding, tmp_path, ONE.hex()], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert b"Claim" in process.stdout.readline()
        with Store(tmp_path) as store:
            assert store.claim(ONE) is None
            process.kill()
            process.wait()
            store.sweep()
            assert not list((tmp_path / store_module.CLAIMS).iterdir())
            assert store.claim(ONE) is not None
            store.sweep()
            assert store.claim(ONE) is None


# --- Time and room ----------------------------------------------------------------------------------------------------


def test_tickets_expire_and_tombstones_are_forgotten_later(tmp_path):
    now = [1000.0]
    with Store(tmp_path, expires=DAY_SECONDS, clock=lambda: now[0]) as store:
        for ticket in (ONE, TWO, THREE):
            prepare(store, ticket)
        growth = store.grow(FOUR, binding(), SIZE)
        growth.add(PARTS[0], {"a": words(FOUR, "client", PARTS[0])})
        assert {entry.expires - entry.made for entry in store.entries()} == {DAY_SECONDS}
        now[0] += DAY_SECONDS - 1
        assert right(store, THREE)
        store.sweep()

        now[0] += 1
        assert first_ready(store, binding()) is None
        assert "has expired" in refusal(lambda: store.take(ONE, binding()))
        assert "was destroyed" in refusal(lambda: store.take(ONE, binding()))
        assert store.delete("expired") == 2
        assert files_in(tmp_path) == []

    now[0] += REMEMBERED_SECONDS - 2
    with Store(tmp_path, clock=lambda: now[0]) as store:
        for ticket, told in ((ONE, "was destroyed"), (TWO, "was destroyed"), (FOUR, "was destroyed")):
            assert told in refusal(lambda ticket=ticket: store.take(ticket, binding()))
        assert "taken already" in refusal(lambda: store.take(THREE, binding()))
        now[0] += 10
        store.sweep()
        for ticket in (ONE, TWO, THREE, FOUR):
            assert "not in this store" in refusal(lambda ticket=ticket: store.take(ticket, binding()))


def test_the_earlier_expiry_counts(tmp_path):
    now = [1000.0]
    with Store(tmp_path, expires=60, clock=lambda: now[0]) as store:
        growth = store.grow(ONE, binding(), SIZE)
        now[0] += 10
        assert growth.expire_within(float("inf")) == growth.expire_within(70) == 50
        assert growth.expire_within(20) == growth.expire_within(30) == 20
        now[0] += 20
        store.sweep()
        assert not store.entries()


def test_what_expired_is_destroyed_on_opening(tmp_path):
    with Store(tmp_path, expires=60) as store:
        prepare(store, ONE)
    later = store._clock() + 61
    with Store(tmp_path, clock=lambda: later):
        assert files_in(tmp_path) == []


@pytest.mark.parametrize("expires", [0, -1, REMEMBERED_SECONDS, float("nan"), float("inf")])
def test_no_ticket_outlives_what_is_remembered(tmp_path, expires):
    with pytest.raises(UserError, match="up to 30 days"):
        Store(tmp_path, expires=expires)


def test_quotas_are_known_before_anything_is_spent(tmp_path, monkeypatch):
    quota = Quota(size=10 * SIZE, tickets=4, peer_size=2 * SIZE, peer_tickets=3)
    alice, bob, carol = (binding("server", peer=name) for name in ("alice", "bob", "carol"))
    with Store(tmp_path, quota=quota) as store:
        assert [store.room_for(size, "alice") for size in (SIZE, 2 * SIZE, 2 * SIZE + 1, 1)] == [2, 1, 0, 3]
        prepare(store, ONE, "server")
        store.grow(TWO, alice, SIZE)  # counts in full before it has anything
        assert store.room_for(1, "alice") == 0
        assert "GB are kept at most for one party" in refusal(lambda: store.grow(THREE, alice, 1))
        assert store.room_for(SIZE, "bob") == 2
        assert {entry.ticket for entry in store.entries()} == {ONE, TWO}

        store.grow(THREE, bob, SIZE)
        store.grow(FOUR, bob, 1)
        assert store.room_for(1, "carol") == 0
        assert "4 tickets are kept at most" in refusal(lambda: store.grow(b"5" * 16, carol, 1))
        assert store.grow(TWO, alice, SIZE).parts() == frozenset()  # going on takes no further room
        store.take(ONE, alice)
        store.discard(FOUR)
        assert store.room_for(SIZE, "carol") == 2

        free = SimpleNamespace(f_bavail=3 * SIZE, f_frsize=1)
        monkeypatch.setattr(store_module.os, "statvfs", lambda _: free)
        assert store.room_for(SIZE, "carol") == 1  # besides what was promised to alice and bob
        free.f_bavail = SIZE
        assert store.room_for(SIZE, "carol") == 0
        assert "the disk has no room" in refusal(lambda: store.grow(b"5" * 16, carol, SIZE))


# --- For this user alone ----------------------------------------------------------------------------------------------


def test_nobody_else_can_read_anything(tmp_path):
    before = os.umask(0)
    try:
        with Store(tmp_path / "store") as store:
            prepare(store, ONE)
            store.claim(ONE)
            modes = {path: path.stat().st_mode & 0o777 for path in [*tmp_path.rglob("*")] if path != tmp_path}
    finally:
        os.umask(before)
    assert len(modes) == 8
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o755, 0o701])
@pytest.mark.parametrize("what", ["", store_module.MATERIAL, INDEX])
def test_what_is_open_to_others_is_refused(tmp_path, what, mode):
    folder = tmp_path / "store"
    with Store(folder) as store:
        prepare(store, ONE)
    (folder / what).chmod(mode)
    with pytest.raises(UserError, match="open to other users: chmod 700"):
        Store(folder)
    (folder / what).chmod(0o600 if what == INDEX else 0o700)
    with Store(folder) as store:
        assert right(store, ONE)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_of_another_user_is_refused(tmp_path):
    Store(tmp_path / "store").close()
    os.chown(tmp_path / "store", 12345, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        Store(tmp_path / "store")


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(UserError, match="cannot keep prepared material in"):
            Store(folder)


def test_nothing_is_said_of_material_and_ids(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with Store(tmp_path) as store:
        prepare(store, ONE)
        path = files_in(tmp_path)[0]
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        told = refusal(lambda: store.take(ONE, binding()))
    assert "damaged" in told
    assert ONE.hex() not in told + caplog.text
    assert path.name not in told + caplog.text


# --- Files and index that disagree ------------------------------------------------------------------------------------


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def copy(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "shorter": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.open("ab").write(b"\0"),
    "changed": change,
    "a copy": copy,
    "a link": lambda path: (path.rename(path.parent / "kept"), path.symlink_to(path.parent / "kept")),
    "no folder": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("opening", [True, False], ids=["opening", "taking"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_ticket_with_another_file_than_was_written_is_destroyed(tmp_path, caplog, damage, opening):
    with Store(tmp_path) as store:
        prepare(store, ONE)
        prepare(store, TWO)
        DAMAGES[damage](next(path for path in files_in(tmp_path) if path.parent.name == ONE.hex()))
        if not opening:
            assert "damaged" in refusal(lambda: store.take(ONE, binding()))
    with Store(tmp_path) as store:
        assert ("destroyed 1 prepared tickets" in caplog.text) == opening
        assert ("was destroyed" if opening else "taken already") in refusal(lambda: store.take(ONE, binding()))
        assert {path.parent.name for path in files_in(tmp_path)} == {TWO.hex()}
        assert right(store, TWO)


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing"])
def test_a_checksum_finds_what_the_system_does_not_tell(store, tmp_path, damage):
    prepare(store, ONE)
    path = files_in(tmp_path / "store")[0]
    if damage == "missing":  # with what the index had of it
        with store._index.transaction() as index:
            (part,) = [part for part, file in parts_of(index, ONE).items() if file.name == path.name]
            index.execute("DELETE FROM parts WHERE part = ?", (part,))
    else:
        DAMAGES[damage](path)
        accept_as_unchanged(store, ONE)
    assert "damaged" in refusal(lambda: store.take(ONE, binding()))
    assert files_in(tmp_path / "store") == []


def test_files_that_the_index_does_not_know_are_destroyed_and_others_are_not(tmp_path):
    with Store(tmp_path) as store:
        prepare(store, ONE)
        growth = store.grow(TWO, binding(), SIZE)
        growth.add(PARTS[0], {"a": words(TWO, "client", PARTS[0])})
    material = tmp_path / store_module.MATERIAL
    for name in (THREE.hex(), ONE.hex(), TWO.hex()):
        (material / name).mkdir(exist_ok=True)
        (material / name / "left.safetensors").write_bytes(b"left by a crash")
    (material / "notes").write_text("of somebody")
    (tmp_path / "notes").write_text("of somebody")
    with Store(tmp_path) as store:
        assert not list(material.rglob("left*"))
        assert not (material / THREE.hex()).exists()
        assert (material / "notes").exists()
        assert (tmp_path / "notes").exists()
        growth = store.grow(TWO, binding(), SIZE)
        add_missing(growth, "client")
        growth.finish()
        assert right(store, ONE)
        assert right(store, TWO)


def with_all_states(folder: Path) -> Path:
    """A folder with tickets taken (1), ready (2), growing (3), and taken by one who crashed before it deleted (4)."""
    with Store(folder) as store:
        for ticket in (ONE, TWO, FOUR):
            prepare(store, ticket)
        store.grow(THREE, binding(), SIZE).add(PARTS[0], {"a": words(THREE, "client", PARTS[0])})
        store.take(ONE, binding())
        with store._index.transaction() as index:
            store._bury(index, FOUR, "taken")
    return folder


def live_after_opening(folder: Path) -> set[bytes]:
    """Tickets that have material still; it is that which was prepared, and nothing is left of others."""
    with Store(folder) as store:
        live = {entry.ticket for entry in store.entries()}
        assert {path.name for path in (folder / store_module.MATERIAL).iterdir()} == {one.hex() for one in live}
        assert live <= {TWO, THREE}
        for ticket in (ONE, FOUR):
            told = refusal(lambda ticket=ticket: store.take(ticket, binding()))
            assert "taken already" in told or (not live and "not in this store" in told)
        for ticket in sorted(live):
            if ticket == THREE:
                growth = store.grow(ticket, binding(), SIZE)
                add_missing(growth, "client")
                growth.finish()
            assert right(store, ticket)
        assert right(store, prepare(store, b"x" * 16))
    return live


def lengths(size: int) -> list[int]:
    chance = random.Random(size)
    return sorted({0, 1, 16, 99, 100, 512, size - 4096, size - 1, *(chance.randrange(size) for _ in range(12))})


def test_an_index_that_is_cut_short_is_not_believed(place, caplog):
    size = (with_all_states(place / "whole") / INDEX).stat().st_size
    assert live_after_opening(place / "whole") == {TWO, THREE}
    assert "the index" not in caplog.text
    for length in lengths(size):
        folder = with_all_states(place / str(length))
        assert (folder / INDEX).stat().st_size == size
        os.truncate(folder / INDEX, length)
        caplog.clear()
        assert live_after_opening(folder) == set(), length
        assert "is damaged or missing: destroyed 3 prepared tickets" in caplog.text


@pytest.mark.parametrize("kind", ["missing", "a block of zeros", "text", "another version"])
def test_an_index_that_is_no_index_is_not_believed(place, caplog, kind):
    folder = with_all_states(place / "store")
    path = folder / INDEX
    if kind == "missing":
        path.unlink()
    elif kind == "text":
        path.write_text("all is well\n" * 1000)
    else:
        content = bytearray(path.read_bytes())
        start, end = {"a block of zeros": (4096, 8192), "another version": (60, 64), "of a newer SQLite": (44, 48)}[
            kind
        ]
        content[start:end] = b"\0" * (end - start - 1) + (b"\0" if end - start > 4 else b"\x09")
        path.write_bytes(content)
    assert live_after_opening(folder) == set()
    assert "is damaged or missing: destroyed 3 prepared tickets" in caplog.text


# Writes pages of the index before its transaction ends, which needs the journal to be whole, and is killed.
HALF_WRITTEN = f"""
import os, signal, sqlite3, sys
index = sqlite3.connect(sys.argv[1], isolation_level=None)
index.execute("PRAGMA cache_size = 1")
index.execute("BEGIN IMMEDIATE")
for ticket in ({TWO!r}, {THREE!r}):
    index.execute("UPDATE tickets SET state = 'taken', binding = zeroblob(20000) WHERE id = ?", (ticket,))
    index.execute("DELETE FROM parts WHERE ticket = ?", (ticket,))
for number in range(200):
    index.execute("INSERT INTO parts VALUES (?, ?, 0, zeroblob(3000))", ({TWO!r}, str(number)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_transaction_that_was_cut_off_is_taken_back_and_its_journal_may_be_cut_short(place, caplog):
    def cut_off(name: str) -> Path:
        folder = with_all_states(place / name)
        ended = subprocess.run([sys.executable, "-c", HALF_WRITTEN, str(folder / INDEX)], check=False)
        assert ended.returncode == -signal.SIGKILL
        return folder

    journal = cut_off("whole") / f"{INDEX}-journal"
    size = journal.stat().st_size
    assert size > 10_000
    assert live_after_opening(place / "whole") == {TWO, THREE}
    outcomes = []
    for length in lengths(size):
        folder = cut_off(str(length))
        os.truncate(folder / f"{INDEX}-journal", length)
        outcomes.append(live_after_opening(folder))
    assert set() in outcomes


# --- Copies -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def both(tmp_path: Path) -> dict[str, Path]:
    """A client's and a server's store with the same ticket; the client's is copied, and then the ticket is used."""
    folders = {side: tmp_path / side for side in ("client", "server")}
    for side, folder in folders.items():
        with Store(folder) as store:
            prepare(store, ONE, side)
    shutil.copytree(folders["client"], tmp_path / "copy")
    for side, folder in folders.items():
        with Store(folder) as store:
            assert right(store, ONE, side)
    return {**folders, "copy": tmp_path / "copy"}


def test_a_restored_copy_is_destroyed_on_opening(both, caplog):
    shutil.rmtree(both["client"])
    shutil.copytree(both["copy"], both["client"])
    with Store(both["client"]) as client:
        assert "missing, changed or restored" in caplog.text
        assert "was destroyed" in refusal(lambda: client.take(ONE, binding()))
    assert files_in(both["client"]) == []


def test_restored_files_alone_and_a_restored_index_alone_are_worth_nothing(both):
    name = store_module.MATERIAL
    shutil.copytree(both["copy"] / name, both["client"] / name, dirs_exist_ok=True)
    with Store(both["client"]) as client:
        assert files_in(both["client"]) == []
        assert "taken already" in refusal(lambda: client.take(ONE, binding()))
    shutil.copy2(both["copy"] / INDEX, both["client"] / INDEX)
    with Store(both["client"]) as client:
        assert "was destroyed" in refusal(lambda: client.take(ONE, binding()))


def test_the_other_side_refuses_what_a_file_system_that_was_set_back_has_again(both, monkeypatch):
    """Such a store cannot know, so that the other side is asked before anything is sent."""
    monkeypatch.setattr(store_module, "is_unchanged", lambda *_: True)
    with Store(both["copy"]) as client, Store(both["server"]) as server:
        accept_as_unchanged(client, ONE)
        assert first_ready(client, binding()) == ONE
        assert "taken already" in refusal(lambda: server.take(ONE, binding("server")))
        assert right(client, ONE)  # it is set back indeed


# --- Several at once, and killed --------------------------------------------------------------------------------------


def walk(what: str, folder: Path, number: int) -> str:
    command = [sys.executable, store_walkers.__file__, what, str(folder), str(number)]
    source = str(Path(store_module.__file__).parents[3])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_two_sides_killed_at_50_moments_use_nothing_twice(place):
    assert int(walk("kills", place, 50)) >= 20


def test_killed_at_many_lines_of_the_store_nothing_is_used_twice(place):
    assert int(walk("every_line", place, 11)) > 300


@pytest.mark.slow
def test_killed_at_every_line_of_the_store_nothing_is_used_twice(place):
    assert int(walk("every_line", place, 1)) > 300


def test_of_four_processes_one_gets_a_ticket(place):
    walk("race", place, 5)


def test_processes_that_open_a_store_do_not_disturb_others(place):
    walk("openers", place, 8)


def test_of_eight_threads_one_gets_a_ticket(place):
    start = threading.Barrier(8)

    def take(store: Store, ticket: bytes) -> str:
        start.wait()
        return refusal(lambda: right(store, ticket) or pytest.fail("wrong material"))

    with Store(place / "store") as one, Store(place / "store") as other, ThreadPoolExecutor(8) as threads:
        for number in range(10):
            ticket = prepare(one, bytes([number]) * 16)
            told = list(threads.map(take, [one, other] * 4, [ticket] * 8))
            assert sorted(told) == [
                "",
                *[f"ticket {ticket.hex()[:8]} was taken already, and its material is used once"] * 7,
            ]


def test_a_damaged_index_that_another_process_has_open_is_left_alone(place, monkeypatch):
    with Store(place / "store") as store:
        prepare(store, ONE)
        content = (place / "store" / INDEX).read_bytes()
        monkeypatch.setattr(index_module, "PATIENCE_SECONDS", 0.05)
        monkeypatch.setattr(index_module.Index, "_sound", lambda _: None)
        with pytest.raises(UserError, match="another process has it open"):
            Store(place / "store")
        assert (place / "store" / INDEX).read_bytes() == content
        assert right(store, ONE)


def test_what_sqlite_refuses_is_one_line(store):
    store._index._connection.execute("DROP TABLE parts")
    prefix = f"cannot use the index {store._folder / INDEX}: "
    assert refusal(lambda: store.take(ONE, binding())) == "ticket 01010101 is not in this store"
    assert refusal(store.entries) == ""
    assert refusal(lambda: store.room_for(1, "")).startswith(prefix)
    store.close()
    assert refusal(store.entries).startswith(prefix)
    with pytest.raises(sqlite3.ProgrammingError):
        store._index._connection.execute("SELECT 1")
