"""Preparing, between two processes: what it saves, that it is used once, and what happens when a side fails."""

import asyncio
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

pytest.importorskip("spu")

from entropi.errors import UserError
from entropi.private import Watcher, connect
from entropi.private.compute import lookahead
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.preparation.growth import Growth
from entropi.private.preparation.material import needs
from entropi.private.preparation.store import DAY_SECONDS, Store
from entropi.private.preparation.tickets import Binding
from entropi.private.sessions import client, client_session, inquiry, party, preparing, server, server_session
from entropi.private.sessions.material import Growing, Material, Size
from entropi.private.sessions.party_handle import Party
from entropi.private.sessions.party_session import PartySession
from entropi.private.wire.channel import LostServer
from entropi.private.wire.messages import Job, part_file
from entropi.private.wire.server_channel import SessionError
from entropi.records import StageCommunication
from private_reference import VARIANTS, describe, random_weights
from serving import (
    HANGING,
    PROMPT,
    Server,
    command,
    folded,
    model,
    no_parties_left,
    plain_logits,
    scratch,
    served_cache,
    wait_for,
)

__all__ = ["folded", "model", "scratch", "served_cache"]  # fixtures
pytestmark = [
    pytest.mark.two_party,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]
TOLERANCE = 0.05
TOKENS = 12


@pytest.fixture(scope="module")
def running(folded, scratch, tmp_path_factory):
    """A server, and the folder where it keeps its halves."""
    base = tmp_path_factory.mktemp("server")
    server = Server(folded, base / "log", "--embedding", "public", "--material", base / "material")
    yield SimpleNamespace(server=server, address=server.address(), material=base / "material")
    server.process.kill()
    server.process.wait()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "material", expires=DAY_SECONDS) as store:  # the server would keep its half for longer
        yield store


def ready(folder):
    with Store(folder) as store:
        return [entry.ticket for entry in store.entries() if entry.state == "ready"]


def files_of(folder, ticket):
    """Of a ticket in the store of this folder."""
    return [path for path in folder.rglob("*") if path.is_file() and ticket in path.parts]


def ask(address, store, tokens=3, **options):
    said = []
    answer = client.ask(address, PROMPT, tokens, Watcher(status=said.append), store=store, **options)
    return answer, said


def right(answer, model, prompt_ids):
    for number, logits in enumerate(answer.logits):
        expected = plain_logits(model[1], prompt_ids + answer.record.new_tokens[:number])
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    return True


def test_what_was_prepared_is_used_once_and_saves_the_products(running, model, store, scratch):
    prompt_ids = model[2].encode(PROMPT).ids
    parts, pieces, said = [], [], []
    watcher = preparing.Watcher(part=lambda n, c: parts.append(c), piece=pieces.append, status=said.append)
    ticket = preparing.prepare(running.address, TOKENS, store, watcher)
    (set_up,) = [piece for piece in pieces if piece.name == "setup"]
    (size,) = [entry.size for entry in store.entries()]
    assert float(said[0].split(" MB will be kept here")[0]) == pytest.approx(size / 1e6, abs=0.1)
    assert [entry.ticket.hex() for entry in store.entries()] == [ticket]
    assert files_of(running.material, ticket)
    assert bytes.fromhex(ticket) in ready(running.material)
    with Store(running.material) as theirs:
        halves = [next(entry for entry in one.entries() if entry.ticket.hex() == ticket) for one in (store, theirs)]
    assert halves[1].expires - halves[1].made == pytest.approx(DAY_SECONDS, abs=HANGING)
    assert halves[0].expires == pytest.approx(halves[1].expires, abs=HANGING)

    assert preparing.ready(running.address, TOKENS, store) == 1
    assert preparing.ready(running.address, TOKENS + 1, store) == 0

    fast, said = ask(running.address, store)
    assert preparing.ready(running.address, TOKENS, store) == 0
    assert right(fast, model, prompt_ids)
    assert not any("going on without" in line for line in said)
    assert not store.entries()
    assert bytes.fromhex(ticket) not in ready(running.material)
    assert not files_of(running.material, ticket)
    record = fast.record
    assert record.prepared_bytes == set_up.bytes + sum(part.bytes for part in parts) > set_up.bytes + 1e6

    slow, _ = ask(running.address, store)
    assert right(slow, model, prompt_ids)
    assert slow.record.prepared_bytes == 0
    assert "Unhandled" not in running.server.log
    moved, before = (sum(stage.bytes for stage in run.record.stages) for run in (fast, slow))
    assert moved < before / 20
    # Then the division is one with "values", and the second layer's queries, keys and values with the first's "output".
    ahead = [stage for stage in slow.record.stages if stage.name == "qkv" and stage.layer > 0]
    assert ahead
    names = [stage.name for stage in slow.record.stages if stage.name != "normalise" and stage not in ahead]
    assert [stage.name for stage in record.stages] == names
    assert no_parties_left(scratch)


def test_what_is_too_small_is_kept(running, store):
    preparing.prepare(running.address, 2, store)
    answer, said = ask(running.address, store, 1)
    assert answer.record.prepared_bytes == 0
    (entry,) = store.entries()
    assert entry.ticket in ready(running.material)
    store.discard(entry.ticket)
    assert preparing.tell_deleted([entry]) == []
    assert entry.ticket not in ready(running.material)
    count = len(answer.record.prompt_tokens)
    assert f"what is prepared is too small, for 2 tokens and 2 new ones of these: {count} and 1 are asked for" in str(
        said
    )


def test_an_interrupted_preparation_is_gone_on_with(running, model, tmp_path, scratch):
    folder = tmp_path / "material"
    words = command("prepare", "--server", running.address, "--tokens", TOKENS, "--material", folder)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = folder / "material"
    wait_for(lambda: process.poll() is not None or sum(path.is_file() for path in parts.rglob("*")) > 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert no_parties_left(scratch)

    begun = []
    with Store(folder) as store:
        (entry,) = store.entries()
        assert entry.state == "growing"
        watcher = preparing.Watcher(begin=lambda total, done: begun.append((total, done)))
        assert preparing.prepare(running.address, TOKENS, store, watcher) == entry.ticket.hex()
        assert 0 < begun[0][1] < begun[0][0]
        answer, _ = ask(running.address, store)
        assert answer.record.prepared_bytes
        assert right(answer, model, model[2].encode(PROMPT).ids)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_client_that_ends_after_the_server_was_ready_goes_on(running, model, store, monkeypatch, lost):
    """Whether it has all parts by then or not the last one, and also where the server's half is gone."""

    async def fail(growing):
        await growing.go_back(growing.total - lost)
        raise UserError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Growing, "finish", fail)
        with pytest.raises(UserError, match="killed"):
            preparing.prepare(running.address, TOKENS, store)
    (entry,) = store.entries()
    assert entry.state == "growing"
    assert entry.ticket in ready(running.material)
    if lost:
        with Store(running.material) as theirs:
            theirs.discard(entry.ticket)

    assert preparing.prepare(running.address, TOKENS, store) == entry.ticket.hex()
    answer, _ = ask(running.address, store)
    assert answer.record.prepared_bytes
    assert right(answer, model, model[2].encode(PROMPT).ids)


@pytest.mark.parametrize("finished", [True, False])
def test_a_slow_disk_does_not_end_a_preparation(finished):
    """A party and its link may be gone long before the last parts are kept; one that hangs is not waited for."""

    async def broken():
        return

    async def watch(watching):
        await asyncio.wait_for(watching, 1)

    tunnel, party = SimpleNamespace(broken=broken), Party(SimpleNamespace(returncode=0 if finished else None))
    client_side = SimpleNamespace(where="a server")
    for watching, error in (
        (PartySession._watch_link(client_side, tunnel, party, 0.0), LostServer),
        (server_session._watch_link(tunnel, party, 0.0), SessionError),
    ):
        with pytest.raises(asyncio.TimeoutError if finished else error):
            asyncio.run(watch(watching))


def test_no_copy_of_a_part_is_left_outside_the_store(store, tmp_path, monkeypatch):
    """Whoever is killed as soon as the store has a part has removed the file in which it came."""
    file, left = tmp_path / part_file(0), []
    save_file({"a": np.zeros(3, np.uint64)}, file)
    binding = Binding(model="", settings="", own="", peer="", side="client", tokens=1, passes=1)
    growing = Growing(store.grow(bytes(16), binding, 1000), 1, Size(1, 1))
    monkeypatch.setattr(Growth, "add", lambda growth, part, arrays: left.append(file.exists()))
    counts = dict(sent_bytes=0, received_bytes=0, sent_messages=0, received_messages=0)
    asyncio.run(growing.add(0, tmp_path, StageCommunication(name="", layer=0, token=0, seconds=0.0, **counts)))
    assert left == [False]


def test_a_client_that_dies_in_the_middle_loses_its_material(running, store, scratch, tmp_path):
    ticket = bytes.fromhex(preparing.prepare(running.address, TOKENS, store))
    words = command(
        "ask", PROMPT, "--server", running.address, "--max-new-tokens", 6, "--material", tmp_path / "material"
    )
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: not store.entries())
    process.kill()
    process.wait()
    assert no_parties_left(scratch)
    assert ticket not in ready(running.material)
    store.sweep()  # what the next command does first
    assert not files_of(tmp_path / "material", ticket.hex())
    assert not files_of(running.material, ticket.hex())
    with pytest.raises(UserError, match="taken already"):
        store.take(ticket, _binding(store, ticket))


def _binding(store, ticket):
    from entropi.private.preparation.tickets import known

    with store._index.transaction() as index:
        return known(index, ticket).binding


def test_a_conversation_takes_the_largest(running, model, store):
    """And has as many tokens as that was prepared for."""
    small, large = (bytes.fromhex(preparing.prepare(running.address, tokens, store)) for tokens in (8, 16))
    with connect(running.address).conversation(chat=False, store=store) as conversation:
        first = conversation.say(PROMPT, 2)
        assert [entry.ticket for entry in store.entries()] == [small]
        assert first.record.prepared_bytes
        second = conversation.say(" the garden", 2)
        assert second.record.prepared_bytes == 0  # the session is the same
    assert len({ticket for ticket in (small, large) if ticket in ready(running.material)}) == 1
    before = model[2].encode(PROMPT).ids
    assert right(first, model, before)
    assert right(second, model, second.record.prompt_tokens and conversation.tokens[: -len(second.record.new_tokens)])


def test_tokens_of_messages_are_no_new_tokens(running, model, store):
    """A conversation has as many answered tokens as were prepared, whatever its messages' lengths, and no more."""
    preparing.prepare(running.address, 30, store, new_tokens=4)
    with connect(running.address).conversation(chat=False, store=store) as conversation:
        said = []
        answers = [conversation.say(text, 2, Watcher(status=said.append)) for text in (PROMPT, " the garden and the")]
        assert not any("used up" in line for line in said)
        again = conversation.say(" house", 1, Watcher(status=said.append))
        assert any("used up" in line for line in said)
    assert answers[0].record.prepared_bytes
    assert answers[1].record.past_tokens
    assert len(answers[1].record.prompt_tokens) + 2 > 4
    assert len(again.record.new_tokens) == 1


def test_without_the_servers_half_everything_is_computed_as_ever(running, model, store, monkeypatch):
    """Which the server had when it was asked, and not any more when it was to take it."""
    preparing.prepare(running.address, TOKENS, store)

    async def usable_until_now(*given):
        found = await inquiry.usable(*given)
        with Store(running.material) as theirs:
            assert theirs.delete([ticket for ticket, _ in found]) == 1
        return found

    monkeypatch.setattr(client_session, "usable", usable_until_now)
    answer, said = ask(running.address, store)
    assert right(answer, model, model[2].encode(PROMPT).ids)
    assert answer.record.prepared_bytes == 0
    assert any("has lost its half of what was prepared: going on without" in line for line in said)
    assert not store.entries()


def test_material_of_other_weights_is_not_used(running, store, tmp_path):
    """What the server made public may be the same: the weights are bound at its side, and only there."""
    welcome = connect(running.address)._welcome
    ticket, size = preparing.prepare(running.address, TOKENS, store), Size(TOKENS, 1)
    with Store(running.material) as theirs:
        for weights in ("0" * 64, "1" * 64):
            with pytest.raises(UserError, match="was prepared for another model"):
                asyncio.run(Material(theirs, welcome, weights).take(ticket, size, ""))
    with pytest.raises(UserError, match="was prepared for"):
        asyncio.run(Material(store, welcome, "0" * 64).take(ticket, size, running.address))
    taken = asyncio.run(Material(store, welcome).take(ticket, size, running.address))
    assert taken.size == Size(TOKENS, TOKENS)


class Held:
    """An engine that keeps what it is told of values."""

    def __init__(self, rank):
        self.rank, self.fraction_bits, self.compiler = rank, 18, self
        self.held, self.noted = {}, {}

    def hold(self, name, shape, value):
        self.held[name] = shape, value

    def note(self, name, shape):
        self.noted[name] = shape


@pytest.mark.parametrize("rank", [SERVER, CLIENT])
def test_matrices_that_look_ahead_are_made_by_the_server_once(rank, tmp_path):
    """A file that its parties read; the engine knows the shapes of matrices alone, which it never multiplies."""
    model, settings = describe(**VARIANTS["powers"]), Settings(embedding="public")
    weights = random_weights(model)
    path = server._write_ahead(tmp_path, model, weights)
    assert load_file(path).keys() == lookahead.shapes(model).keys()
    assert server._write_ahead(tmp_path, describe(layers=1), random_weights(describe(layers=1))) is None

    wanted = needs(model, settings, 3, 3)
    material = {name: np.zeros(shape, np.uint64) for need in wanted for name, shape in need.kept(rank).items()}
    files = {"material": save(material)}
    if rank == SERVER:
        files |= {"weights": save(weights), "ahead": path.read_bytes()}
    job = Job(rank, "0" * 32, ("unix:/a", "unix:/b"), model, settings, material_tokens=3, material_passes=3)
    engine, known = Held(rank), party._weights(files)
    passes = party._prepared_passes(engine, job, files, known)
    assert engine.held.keys() == {"0.ahead_bias", "1.ahead_bias"}
    assert engine.noted == {name: lookahead.shapes(model)[name] for name in ("0.ahead", "1.ahead")}
    assert passes._matrices.keys() == {"0.qkv", "0.ahead", "1.ahead", "2.output", "head"}
    if rank == CLIENT:
        assert (known, set(passes._matrices.values())) == (None, {None})
    else:
        np.testing.assert_array_equal(engine.held["1.ahead_bias"][1], load_file(path)["1.ahead_bias"])


@pytest.mark.parametrize("options", [("--embedding", "private"), ("--embedding", "public", "--output", "top_k")])
def test_other_servers(folded, model, scratch, tmp_path, options):
    """A private token table and a public prefix; fewer logits; and a server that prepares nothing."""
    public = tmp_path / "prefix.txt"
    public.write_text("the secret garden lies ")
    more = ("--prefix-file", public, "--material", tmp_path / "theirs", "--material-days", 0.5)
    server = Server(folded, tmp_path / "log", *options, *more)
    try:
        with Store(tmp_path / "ours") as store:
            said = []
            preparing.prepare(server.address(), TOKENS, store, preparing.Watcher(status=said.append))
            (entry,) = store.entries()
            assert entry.expires - entry.made < 0.5 * DAY_SECONDS + HANGING
            assert f"keeps its half until {preparing.when(entry.expires)[:10]}" in said[1]
            answer, _ = ask(server.address(), store)
            assert answer.record.prepared_bytes
            assert not store.entries()
            if "top_k" not in options:
                ids = model[2].encode(public.read_text()).ids + model[2].encode(PROMPT).ids
                assert right(answer, model, ids)
            else:
                ids = model[2].encode(public.read_text()).ids + model[2].encode(PROMPT).ids
                expected = plain_logits(model[1], ids)
                np.testing.assert_allclose(np.sort(answer.logits[0])[::-1], np.sort(expected)[::-1][:8], atol=TOLERANCE)
    finally:
        server.process.kill()
        server.process.wait()


def test_what_cannot_be_prepared(running, folded, scratch, store, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="takes at most 32"):
        preparing.prepare(running.address, 33, store)
    with pytest.raises(UserError, match="cannot reach a server"):
        preparing.prepare("127.0.0.1:9", 4, store)

    none = Server(folded, tmp_path / "log", "--embedding", "public")
    small = Server(
        folded, tmp_path / "small", "--embedding", "public", "--material", tmp_path / "m", "--material-gb", "1e-5"
    )
    try:
        with pytest.raises(UserError, match="prepares nothing: it was started without --material"):
            preparing.prepare(none.address(), 4, store)
        with pytest.raises(UserError, match="no room for the material of 4 tokens"):
            preparing.prepare(small.address(), 4, store)
        assert not store.entries()
    finally:
        for server in (none, small):
            server.process.kill()
            server.process.wait()
    assert os.path.isdir(tmp_path / "material")
