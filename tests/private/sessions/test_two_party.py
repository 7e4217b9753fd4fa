"""Two real processes over loopback: right answers, true meters, nothing readable on the wire, clean ends.

A recording relay stands in the control channel, which carries the engines' link too, so that everything a side
receives can be searched for what it must not learn.
"""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("spu")
import aiohttp
import msgspec
from aiohttp import web
from safetensors.numpy import load_file, save_file
from tokenizers import pre_tokenizers

from entropi import cli, records
from entropi.errors import UserError
from entropi.private.admission.limits import Limits
from entropi.private.compute.description import Description
from entropi.private.compute.program import forward
from entropi.private.compute.settings import Settings
from entropi.private.sessions import client, readiness, server_session
from entropi.private.sessions.generation import Watcher
from entropi.private.sessions.privacy import Privacy
from entropi.private.wire import channel
from entropi.private.wire.link_frames import MAX_PUSH, LinkGuard
from entropi.private.wire.messages import Accepted, Canary, Refused, Start, Welcome, decode_from_server, encode
from entropi.private.wire.server_channel import SessionError
from entropi.private.wire.tunnel import Tunnel
from link_messages import SESSION, place, push, two_chunks
from serving import (
    HANGING,
    MOST_TOKENS,
    POSITIONS,
    PROMPT,
    TEXT,
    TOLERANCE,
    Server,
    ThreadedApp,
    command,
    engine_logs,
    free_port,
    hello,
    honest_answer,
    no_parties_left,
    parties,
    plain_logits,
    run_cli,
    save_model,
    wait_for,
)

pytest_plugins = ["serving"]  # its fixtures

pytestmark = [
    pytest.mark.two_party,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]

NEW_TOKENS = 3
FRACTION_BITS = 18
CANARY = "the key"


# --- The servers most tests ask ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(folded, scratch):
    """The server most tests ask."""
    started = Server(folded, scratch / "server.log", "--max-queue", 1, "--canary", CANARY)
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def more_servers(folded, scratch):
    """Two servers to be ended by a test; started early, so that nobody waits for them."""
    started = [Server(folded, scratch / f"server-{number}.log") for number in range(2)]
    yield started
    for one in started:
        one.process.kill()
        one.process.wait()


# --- A recording relay ------------------------------------------------------------------------------------------------


class Wiretap:
    """Between a client and a server: relays the control channel, and keeps what is said and what the engines send.

    `forth` and `back` hold the engines' bytes, to the server and to the client, of each of their two connections. The
    server is told that the client has left once `before_leaving()` has returned.
    """

    def __init__(self, address, before_next, before_leaving):
        self.server_address, self.before_next, self.before_leaving = address, before_next, before_leaving
        self.client_said, self.server_said = bytearray(), bytearray()
        self.forth, self.back = (bytearray(), bytearray()), (bytearray(), bytearray())
        self.engines_said = []  # (rank of the sender, message), in this order
        self.app = ThreadedApp(self._relay)
        self.address = self.app.address

    async def _relay(self, request):
        near = web.WebSocketResponse(max_msg_size=1 << 25)
        await near.prepare(request)
        self.client_said += b"".join(b"%s: %s\n" % header for header in request.raw_headers) + b"\n"
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"http://{self.server_address}/v1/session", max_msg_size=1 << 25) as far,
        ):
            backward = asyncio.create_task(self._copy(far, near, self.server_said, self.back))
            await self._copy(near, far, self.client_said, self.forth)
            await asyncio.to_thread(self.before_leaving)
            await far.close()
            await backward
        return near

    async def _copy(self, source, sink, said, streams):
        async for message in source:
            if message.type == aiohttp.WSMsgType.TEXT:
                said += message.data.encode() + b"\n"
                if json.loads(message.data)["type"] == "Next":
                    self.before_next()
                await sink.send_str(message.data)
            else:
                streams[message.data[0]].extend(message.data[1:])
                self.engines_said.append((0 if streams is self.back else 1, message.data))
                with contextlib.suppress(ConnectionError):  # the client has left, and the server goes on
                    await sink.send_bytes(message.data)

    @property
    def server_received(self):
        return self.client_said + b"".join(self.forth)

    @property
    def client_received(self):
        return self.server_said + b"".join(self.back)

    def close(self):
        self.app.close()


@pytest.fixture(scope="module")
def listened(running, model, scratch):
    """A whole generation through real commands, with every byte between them recorded, and the engines' logs."""
    logs, address = [], running.address()
    before = running.log.count(": a token, ")

    def all_reported():
        """Wait for the server's party to have reported every token: it gets a second once the client has left."""
        wait_for(lambda: running.log.count(": a token, ") == before + NEW_TOKENS, HANGING)

    wiretap = Wiretap(address, lambda: logs.append(engine_logs(scratch)), all_reported)
    logits = scratch / "logits.npy"
    asked = subprocess.run(
        command(
            "ask", PROMPT, "--server", wiretap.address, "--max-new-tokens", NEW_TOKENS, "--json", "--logits", logits
        ),
        capture_output=True,
        timeout=2 * HANGING,
    )
    assert asked.returncode == 0, asked.stderr
    wait_for(running.sessions_closed)
    wiretap.record = msgspec.json.decode(asked.stdout, type=records.PrivateRun)
    wiretap.logits = np.load(logits)
    wiretap.engine_logs = logs[-1]
    yield wiretap
    wiretap.close()


@pytest.fixture(scope="module")
def stalled_client(running):
    """A client that says hello and nothing more, while others ask; yields what it is told in the end."""
    told = []

    async def stall():
        async with aiohttp.ClientSession() as http, http.ws_connect(f"http://{running.address()}/v1/session") as idle:
            await idle.send_str(hello())
            told.extend([json.loads(message.data) async for message in idle][1:])

    thread = threading.Thread(target=asyncio.run, args=(stall(),))
    thread.start()
    yield told
    thread.join()


@pytest.fixture(scope="module")
def asked_of_silence(scratch):
    """A client of a port that accepts connections and says nothing; it may take its time behind other tests."""
    silent = socket.create_server(("127.0.0.1", 0))
    process = subprocess.Popen(
        command("ask", "hello", "--server", f"127.0.0.1:{silent.getsockname()[1]}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    silent.close()


# --- Right answers, true meters ---------------------------------------------------------------------------------------


def test_private_logits_and_tokens_are_the_models(listened, model, asked_of_silence, more_servers):
    _, plain, tokenizer = model
    record = listened.record
    ids = tokenizer.encode(PROMPT).ids
    assert record.prompt_tokens == ids
    assert listened.logits.shape == (NEW_TOKENS, 300)
    for row, token in zip(listened.logits, record.new_tokens):
        expected = plain_logits(plain, ids)
        assert np.abs(row - expected).max() < TOLERANCE
        assert token == expected.argmax()
        ids.append(token)
    assert record.new_text == tokenizer.decode(record.new_tokens)


def test_meter_names_every_operation_and_agrees_with_the_wire(listened, running, folded):
    record = listened.record
    description = msgspec.json.decode((folded / "folded.json").read_bytes(), type=Description)
    expected, past, new = [], 0, len(record.prompt_tokens)
    for token in range(NEW_TOKENS):
        expected += [(s.name, s.layer, token) for s in forward(description, new, past, "quartic", paired=True)]
        past, new = past + new, 1
    assert [(s.name, s.layer, s.token) for s in record.stages] == expected
    for stage in record.stages:
        assert min(stage.sent_bytes, stage.received_bytes, stage.sent_messages, stage.received_messages) > 0

    # What the client's engine counts as sent, the server's counts as received.
    sent = sum(s.sent_bytes for s in record.stages)
    received = sum(s.received_bytes for s in record.stages)
    server_sent, server_received = (
        int(n) for n in re.findall(r"(\d+) bytes sent, (\d+) received so far", running.log)[-1]
    )
    assert sent + received + record.setup_bytes == server_sent + server_received
    setup_sent, setup_received = server_received - sent, server_sent - received
    assert min(setup_sent, setup_received) > 0

    # The meter counts what the engines say; the wire carries it in frames, and acknowledges every message.
    share_bytes = record.reveal_bytes
    for metered, wire in (
        (server_received, sum(map(len, listened.forth))),
        (server_sent + share_bytes, sum(map(len, listened.back))),
    ):
        print(f"metered {metered}, on the wire {wire}: {1 - metered / wire:.3%} more")
        assert 0.95 * wire < metered < wire

    # A comparison costs about 98 bytes, and two choices that follow from it 32: the row maxima of so short a prompt's
    # pass are that for every pair of a row's logits.
    length = len(record.prompt_tokens)
    maxima = next(s.bytes for s in record.stages if s.name == "max" and s.token == 0)
    assert 50 < maxima / (description.heads * (length + 1) * length * (length - 1) / 6) < 200
    # With keys and values kept, one more token costs less than the prompt did.
    per_token = [sum(s.bytes for s in record.stages if s.token == token) for token in range(NEW_TOKENS)]
    assert max(per_token[1:]) < per_token[0]


@pytest.mark.slow
def test_a_server_tests_itself_first(folded, scratch):
    """In fixed point and with the cryptography, before it listens."""
    started = Server(folded, scratch / "tested.log", "--self-test", "cheetah", "--recheck")
    try:
        wait_for(lambda: "known answers in fixed point" in started.log)
        wait_for(lambda: "known answers in the cryptographic protocol" in started.log)
        started.address()
        said = r"known answers in .*: logits of \d+ tokens and one more are wrong by (\S+)"
        errors = re.findall(said, started.log)
        assert len(errors) == 2
        for error in errors:
            assert 0 < float(error) < TOLERANCE
        assert "300 of 300 tokens were looked at" in started.log
    finally:
        started.process.terminate()
        started.process.wait(HANGING)


def test_a_canary_is_asked_for_and_compared(running, capfd, monkeypatch):
    words = ["ask", "--canary", "--server", running.address()]
    assert cli.main(words) == 0
    said = capfd.readouterr()
    published = client.connect(running.address()).canary
    assert said.err.endswith(f"the canary holds: {len(published.tokens)} tokens as published\n")
    wrong = Canary(published.prompt, published.tokens[:1], [published.logits[0] + 0.5])
    monkeypatch.setattr(client.Connection, "canary", wrong)
    status, line = run_cli(capfd, *words)
    assert status == 2
    assert "the canary does not hold: the logit of token 1 is" in line
    status, line = run_cli(capfd, *words, "more")
    assert status == 2
    assert "either PROMPT or --canary" in line


def embedding_stages(record):
    """How many operations every token's pass needs to look tokens up."""
    stages = [stage.token for stage in record.stages if stage.name == "embedding"]
    return [stages.count(token) for token in range(len(record.new_tokens))]


def without_findings(settings):
    """What a server was told of its settings, without what it found of its model."""
    return msgspec.structs.replace(settings, norm_shifts=(), largest_logit=None, blank_logit=None)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_tokens_are_looked_up_in_pairs(running, model, length):
    """One row, a whole pair, an odd number; then tokens that come one by one."""
    _, plain, tokenizer = model
    ids = tokenizer.encode(TEXT).ids[:length]
    prompt = tokenizer.decode(ids)
    assert tokenizer.encode(prompt).ids == ids
    server = client.connect(running.address())
    assert server.settings.largest_logit > 0
    assert without_findings(server.settings) == Settings(paired=True)
    begun, done = [], []
    answer = server.ask(prompt, 2, watcher=Watcher(begun.append, lambda number, communication: done.append(number)))
    for logits, token in zip(answer.logits, answer.record.new_tokens, strict=True):
        assert np.abs(logits - plain_logits(plain, ids)).max() < TOLERANCE
        ids.append(token)
    assert embedding_stages(answer.record) == [3 if length > 1 else 1, 1]
    assert begun == [len(done)]  # every operation was counted in advance


def test_lengths_need_not_tell_what_a_prompt_and_its_answer_are(running, model):
    """A prompt filled up to eight tokens, and an answer whose end only the client knows."""
    _, plain, tokenizer = model
    ids = [0] * (8 - len(tokenizer.encode(PROMPT).ids)) + tokenizer.encode(PROMPT).ids
    first = tokenizer.id_to_token(int(plain_logits(plain, ids).argmax()))
    privacy = Privacy(pad_to=8, full_length=True, stop_tokens=(first,))
    answer = client.ask(running.address(), PROMPT, 2, privacy=privacy)
    assert len(ids) == 8
    assert answer.record.padding_tokens == 8 - len(answer.record.prompt_tokens) > 0
    assert len(answer.record.new_tokens) == 2
    assert answer.record.new_text == tokenizer.decode(answer.record.new_tokens[:1])
    for row, token in zip(answer.logits, answer.record.new_tokens, strict=True):
        assert np.abs(row - plain_logits(plain, ids)).max() < TOLERANCE
        ids.append(token)
    shorter = client.ask(running.address(), PROMPT, 2, privacy=Privacy(pad_to=8, stop_tokens=(first,)))
    assert shorter.record.new_tokens == answer.record.new_tokens[:1]


def test_what_the_engines_said_passes_once_more_byte_for_byte(listened):
    """A recorded session: it has crossed two guards already, and neither has changed a byte, nor may a fresh one."""
    session = re.search(rb"([0-9a-f]{32}):P2P-1:1->0", listened.forth[1])[1].decode()
    guards = LinkGuard(0, session), LinkGuard(1, session)
    for sender, message in listened.engines_said:
        assert guards[sender].leaves(message[0], message[1:]) == message[1:]
        assert guards[1 - sender].arrives(message[0], message, 1) == message[1:]
    most = [guard.most_unread for guard in guards]
    print(f"{len(listened.engines_said)} messages; at most {most} bytes unread")
    assert all(most)


# --- Nothing readable on the wire -------------------------------------------------------------------------------------


def token_needles(prompt, token_ids, vocab_size):
    """Everything plain that would give a text or its tokens away, by name."""
    encoded = prompt.encode()
    needles = {f"prompt from byte {n}": encoded[n : n + 8] for n in range(len(encoded) - 7)}
    for separator in (",", ", ", " "):
        needles[f"ids joined by {separator!r}"] = separator.join(map(str, token_ids)).encode()
    for kind in ("<i2", "<i4", "<i8", ">i4", ">i8", "<f4", "<f8"):
        needles[f"ids as {kind}"] = np.array(token_ids).astype(kind).tobytes()
    needles["ids in fixed point"] = (np.array(token_ids, np.int64) << FRACTION_BITS).tobytes()
    for token in token_ids:
        row = np.eye(vocab_size)[token]
        for kind in ("<f4", "<f8", "<i8"):
            needles[f"one-hot row of {token} as {kind}"] = row.astype(kind).tobytes()
        needles[f"one-hot row of {token} in fixed point"] = (row.astype(np.int64) << FRACTION_BITS).tobytes()
    return needles


def found_needles(haystack, needles):
    """Names of the needles that occur."""
    return [name for name, needle in needles.items() if needle in haystack]


def windows(matrices):
    """All 16-byte windows, `(n, 16)` uint8, of neighbouring numbers in float32 and in fixed point, both ways round."""
    found = []
    for matrix in matrices:
        for array in {2: (matrix, matrix.T)}.get(matrix.ndim, (matrix.reshape(1, -1),)):
            scaled = array.astype(np.float64) * 2**FRACTION_BITS
            for numbers in (array.astype("<f4"), np.trunc(scaled).astype("<i8"), np.rint(scaled).astype("<i8")):
                step = 16 // numbers.itemsize
                if numbers.shape[1] >= step:
                    runs = np.lib.stride_tricks.sliding_window_view(numbers, step, axis=1).reshape(-1, step)
                    runs = runs[(runs != 0).all(axis=1) & (runs != -1).all(axis=1)]  # zeros are everybody's
                    found.append(np.ascontiguousarray(runs).view(np.uint8))
    return np.unique(np.concatenate(found), axis=0)


PART = 1 << 22


def found_windows(haystack, wanted):
    """How often any of the windows occurs, at any byte."""
    known = {row.tobytes() for row in wanted}
    data = np.frombuffer(bytes(haystack), np.uint8)
    starts = np.zeros(1 << 24, bool)  # the first three bytes sort almost everything out
    starts[wanted[:, 0] | wanted[:, 1].astype(np.uint32) << 8 | wanted[:, 2].astype(np.uint32) << 16] = True
    found = 0
    for begin in range(0, len(data), PART):
        part = data[begin : begin + PART + 15].astype(np.uint32)
        if len(part) >= 16:
            candidates = np.flatnonzero(starts[part[:-15] | part[1:-14] << 8 | part[2:-13] << 16])
            found += sum(data[begin + n : begin + n + 16].tobytes() in known for n in candidates)
    return found


@pytest.fixture(scope="module")
def secrets_of_the_client(listened):
    record = listened.record
    needles = token_needles(PROMPT, record.prompt_tokens, 300)
    needles |= token_needles(PROMPT + record.new_text, record.prompt_tokens + record.new_tokens, 300)
    return needles, windows([listened.logits])


@pytest.fixture(scope="module")
def secrets_of_the_server(model, folded):
    trained = [p.detach().numpy() for p in model[1].parameters()]
    return windows([w for w in [*trained, *load_file(folded / "folded.safetensors").values()] if w.size > 1])


def test_server_receives_and_logs_nothing_of_prompt_and_answer(listened, running, secrets_of_the_client):
    needles, logits = secrets_of_the_client
    received = listened.server_received
    assert b'"Start"' in received  # the relay records what is said, not its WebSocket mask
    assert found_needles(received, needles) == []
    assert found_windows(received, logits) == 0
    assert found_needles(running.log.encode(), needles) == []


def test_client_receives_nothing_of_the_weights(listened, secrets_of_the_server):
    received = listened.client_received
    assert b'"Welcome"' in received
    assert found_windows(received, secrets_of_the_server) == 0


def test_engine_logs_hold_no_value(listened, secrets_of_the_client, secrets_of_the_server):
    assert len(listened.engine_logs) == 2
    needles, logits = secrets_of_the_client
    for log in listened.engine_logs:
        assert b"Link details" in log
        assert found_needles(log, needles) == []
        assert found_windows(log, logits) == found_windows(log, secrets_of_the_server) == 0


def test_a_prompt_may_come_from_standard_input(running, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("wall"))
    assert cli.main(["ask", "-", "--server", running.address(), "--max-new-tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "wall"


def test_the_search_finds_what_is_planted(listened, secrets_of_the_client, secrets_of_the_server):
    needles, logits = secrets_of_the_client
    noise = np.random.default_rng(0).bytes(1 << 20)
    assert found_needles(noise, needles) == []
    for name, needle in needles.items():
        assert found_needles(noise[:777] + needle + noise[777:], {name: needle}) == [name]
    for wanted in (logits, secrets_of_the_server):
        assert found_windows(noise, wanted) == 0
        planted = noise.join(row.tobytes() for row in wanted[:: len(wanted) // 7])  # several parts, at all offsets
        assert found_windows(noise[:3] + planted, wanted) == len(wanted[:: len(wanted) // 7])
    place = PART - 5
    planted = (noise * 5)[:place] + logits[0].tobytes() + (noise * 5)[place:]
    assert found_windows(planted, logits) == 1


LEAK = """
import sys
from spu import libspu
rank, leak = int(sys.argv[1]), open(sys.argv[4], "rb").read()
desc = libspu.link.Desc()
desc.id, desc.http_max_payload_size = sys.argv[5], int(sys.argv[6])
desc.add_party("server", sys.argv[2]); desc.add_party("client", sys.argv[3])
link = libspu.link.create_brpc(desc, rank)
link.send(0, leak) if rank else link.recv(1)
link.stop_link()
"""


async def leak_through_tunnels(leak):
    """Let the client's engine send a file to the server's; the bytes of both connections that reach the server."""
    received, words = (bytearray(), bytearray()), (str(leak), SESSION, str(MAX_PUSH))

    async def to_client(message):
        await client_end.receive(message)

    async def to_server(message):
        received[message[0]].extend(message[1:])
        await server_end.receive(message)

    async with Tunnel(0, SESSION, to_client) as server_end, Tunnel(1, SESSION, to_server) as client_end:
        processes = [
            await asyncio.create_subprocess_exec(sys.executable, "-c", LEAK, str(end.rank), *end.links, *words)
            for end in (server_end, client_end)
        ]
        assert [await asyncio.wait_for(process.wait(), HANGING) for process in processes] == [0, 0]
    return b"".join(received)


def test_a_leak_through_the_engines_link_would_be_found(secrets_of_the_client, secrets_of_the_server, scratch):
    needles, logits = secrets_of_the_client
    noise = np.random.default_rng(1).bytes(1 << 22)  # larger than what the link sends in one piece
    leak = scratch / "leak.bin"
    leak.write_bytes(noise + b"".join(needles.values()) + noise + logits.tobytes())
    received = asyncio.run(leak_through_tunnels(leak))
    assert found_needles(received, needles) == list(needles)
    assert found_windows(received, logits) >= len(logits)
    assert found_windows(received, secrets_of_the_server) == 0


# --- Refused in one line: the client ----------------------------------------------------------------------------------


ILL_FORMED = ["9000", "localhost", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:²", ":1", "", "::1:9000", "a b:1", "/:1"]


@pytest.mark.parametrize("address", ILL_FORMED)
@pytest.mark.parametrize("command", ["ask", "serve"])
def test_ill_formed_addresses(capfd, command, address, folded):
    words = ("ask", "hello", f"--server={address}") if command == "ask" else ("serve", folded, f"--listen={address}")
    status, line = run_cli(capfd, *words)
    assert status == 2
    assert "HOST:PORT" in line


@pytest.mark.parametrize("address", ["8.8.8.8:9000", "0.0.0.0:9000", "example.org:80", "[::]:9000", "192.168.0.1:1"])
@pytest.mark.parametrize("command", ["ask", "serve"])
def test_other_machines_are_refused_without_tls(capfd, command, address, folded):
    words = ("ask", "hello", f"--server={address}") if command == "ask" else ("serve", folded, f"--listen={address}")
    status, line = run_cli(capfd, *words)
    assert status == 2
    assert "loopback" in line
    assert "TLS" in line


def test_nobody_listens(capfd):
    address = f"127.0.0.1:{free_port()}"
    status, line = run_cli(capfd, "ask", "hello", "--server", address)
    assert (status, line) == (2, f"entropi: cannot reach a server at {address}: Connection refused")


def web_page(request):
    return web.Response(text="hello")


def no_room(request):
    raise web.HTTPServiceUnavailable


def redirect(request):
    raise web.HTTPFound("http://127.0.0.1:1/v1/session")


@pytest.mark.parametrize("handler", [web_page, no_room, redirect])
def test_another_kind_of_server(capfd, handler):
    async def answer(request):
        return handler(request)

    app = ThreadedApp(answer)
    try:
        status, line = run_cli(capfd, "ask", "hello", "--server", app.address)
    finally:
        app.close()
    assert status == 2
    assert "is not an entropi server" in line


def test_another_kind_of_program(capfd):
    listener = socket.create_server(("127.0.0.1", 0))

    def greet():
        with listener.accept()[0] as connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            connection.recv(1 << 16)

    thread = threading.Thread(target=greet)
    thread.start()
    status, line = run_cli(capfd, "ask", "hello", "--server", f"127.0.0.1:{listener.getsockname()[1]}")
    thread.join()
    listener.close()
    assert status == 2
    assert "is not an entropi server" in line


def a_welcome(folded, **changes):
    description = msgspec.json.decode((folded / "folded.json").read_bytes(), type=Description)
    tokenizer = (folded / "tokenizer.json").read_text()
    plain = msgspec.to_builtins(Welcome(description, tokenizer, Settings()))
    if len(changes.get("description", {})) > 1:
        changes["description"] = {**plain["description"], **changes["description"]}
    return encode({**plain, **changes})


_BYTES = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
SPELLING = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"Regex": "^h"}, "content": "hhhhhhhhhhhh"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": _BYTES, "merges": []},
    }
)
BAD_SERVERS = {
    "says nothing sensible": ([b"\x00\xff garbage"], "does not follow the protocol"),
    "another message": ([encode(Accepted("0" * 32))], "does not follow the protocol"),
    "a list": ([b"[" * 5000], "does not follow the protocol"),
    "hangs up": ([], "closed the connection"),
    "a bad description": (["description", {"layers": 10**9}], "does not follow the protocol"),
    "a bad tokenizer": (["tokenizer", "{}"], "sent a tokenizer that cannot be read"),
    "a tokenizer that spells out prompts": (["tokenizer", SPELLING], "sent a tokenizer that could change the prompt"),
    "other settings": (["settings", {"protocol": "none"}], "does not follow the protocol"),
    "a huge description": (["description", {"vocab_size": 1 << 20, "hidden_size": 1 << 20}], "more than this client"),
    "an embedding to fetch": (["table", "0" * 64], "does not follow the protocol"),
    "an engine that speaks too early": ([None, b"\0binary"], "does not follow the protocol"),
    "a refusal that writes on the screen": (
        [encode(Refused("\x1b[2J\x1b]0;owned\x07entropi: all is well\x9b1A\u202e"))],
        "refused: \ufffd[2J\ufffd]0;owned\ufffdentropi: all is well\ufffd1A\ufffd",
    ),
    "a name that writes on the screen": (
        ["description", {"architecture": "\x1b[2J", "layers": 2}],
        "follow the protocol",
    ),
    "an engine that attacks": (
        [None, encode(Accepted(SESSION)), b"\0" + b"".join(two_chunks(0))],
        "does not follow the protocol: the engines' link carried a push that is not a key and one whole value",
    ),
    "an engine that floods": (
        [None, encode(Accepted(SESSION)), b"\0" + push(0, 1, place(0, 1, 1), b"x", body=(1 << 31) - 1)],
        "does not follow the protocol: the engines' link carried a frame of 2147483647 bytes",
    ),
    "a refusal": ([b'{"type":"Refused","reason":"not today"}'], "refused: not today"),
    "a refusal too late": (
        [None, encode(Accepted("0" * 32)), b'{"type":"Refused","reason":"not today"}'],
        "ended the session: not today",
    ),
}


@pytest.mark.parametrize("name", BAD_SERVERS)
def test_dishonest_servers(capfd, folded, name, scratch):
    replies, complaint = BAD_SERVERS[name]
    if replies and isinstance(replies[0], str):
        replies = [a_welcome(folded, **{replies[0]: replies[1]})]
    replies = [a_welcome(folded) if reply is None else reply for reply in replies]

    async def answer(request):
        near = web.WebSocketResponse()
        await near.prepare(request)
        for reply in replies:
            if reply is not replies[-1] or len(replies) < 3:
                await near.receive()
            await near.send_frame(reply, aiohttp.WSMsgType.BINARY if reply[:1] == b"\0" else aiohttp.WSMsgType.TEXT)
        if replies:
            await near.receive()
        return near

    app = ThreadedApp(answer)
    try:
        status, line = run_cli(capfd, "ask", "hello", "--server", app.address)
    finally:
        app.close()
    assert status == 2
    assert complaint in line
    assert no_parties_left(scratch)


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        ("", [], "the prompt is empty"),
        ("wall " * 40, [], f"and 8 new ones are asked for, but this server takes at most {POSITIONS + 1} tokens"),
        ("wall", ["--max-new-tokens", "0"], "at least 1"),
        ("wall", ["--tokenizer-sha256", "0" * 64], "sent another tokenizer than the one with the given SHA-256"),
        ("wall", ["--tokenizer-sha256", "0"], "64 hexadecimal digits"),
        ("wall", ["--tokenizer", "/nowhere"], "cannot read the tokenizer /nowhere: No such file"),
        ("wall", ["--stop", "nothing"], "no token 'nothing' to stop at"),
        ("wall", ["--temperature", "nan"], "--temperature: expected a finite number, got nan"),
        ("wall", ["--temperature=-inf"], "--temperature: expected a finite number, got -inf"),
        ("wall", ["--temperature", "-1"], "temperature is -1.0 but must be between 0 and 100"),
        ("wall", ["--memory-gb", "1e300"], "must be between 0 and 1,000,000"),
        ("wall", ["--logits", "/"], "it is a folder"),
        ("wall", ["--pad-to", "64"], "filled up to 64 it leaves no room for 8 new ones"),
        ("x" * (1 << 21), [], "more than 1048576 characters"),
        ("wall", ["--max-new-tokens", str(MOST_TOKENS + 1)], f"at most {MOST_TOKENS} new tokens"),
    ],
)
def test_questions_that_cannot_be_asked(capfd, running, prompt, options, complaint):
    status, line = run_cli(capfd, "ask", prompt, "--server", running.address(), *options)
    assert status == 2
    assert complaint in line


def test_another_protocol_version(capfd, running, monkeypatch):
    monkeypatch.setattr(channel, "PROTOCOL_VERSION", 99)
    status, line = run_cli(capfd, "ask", "hello", "--server", running.address())
    assert status == 2
    assert "versions differ" in line


# --- Refused in one line: the server ----------------------------------------------------------------------------------


def replace_weights(folder, change):
    weights = load_file(folder / "folded.safetensors")
    change(weights)
    save_file(weights, folder / "folded.safetensors")


DAMAGE = {
    "truncated weights": lambda f: os.truncate(f / "folded.safetensors", 500),
    "empty weights": lambda f: os.truncate(f / "folded.safetensors", 0),
    "no weights": lambda f: (f / "folded.safetensors").unlink(),
    "garbage description": lambda f: (f / "folded.json").write_bytes(b"\xff\x00{"),
    "nested description": lambda f: (f / "folded.json").write_text('{"layers":' + "[" * 100_000),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "garbage tokenizer": lambda f: (f / "tokenizer.json").write_text('{"version": 1'),
    "binary tokenizer": lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe\x00"),
    "wrong shape": lambda f: replace_weights(f, lambda w: w.update({"head": w["head"].T.copy()})),
    "missing weight": lambda f: replace_weights(f, lambda w: w.pop("head")),
    "unknown weight": lambda f: replace_weights(f, lambda w: w.update({"more": w["head"]})),
    "NaN": lambda f: replace_weights(f, lambda w: w["1.qkv"].__setitem__((0, 0), np.nan)),
}
COMPLAINTS = {"no weights": "holds no folded model", "no tokenizer": "tokenizer", "binary tokenizer": "tokenizer"}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folded_models(capfd, folded, tmp_path, name):
    for file in folded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    DAMAGE[name](tmp_path)
    status, line = run_cli(capfd, "serve", tmp_path, "--listen", "127.0.0.1:0")
    assert status == 2
    assert COMPLAINTS.get(name, "is damaged") in line


MODEL_DAMAGE = {
    "truncated weights": lambda f: os.truncate(f / "model.safetensors", 2000),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "garbage configuration": lambda f: (f / "config.json").write_text("{]"),
    "no configuration": lambda f: (f / "config.json").unlink(),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("name", MODEL_DAMAGE)
def test_damaged_models(capfd, model, tmp_path, name):
    for file in model[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    MODEL_DAMAGE[name](tmp_path)
    status, line = run_cli(capfd, "serve", tmp_path, "--listen", "127.0.0.1:0")
    assert status == 2
    assert str(tmp_path) in line


def test_no_model_at_all(capfd, tmp_path):
    assert run_cli(capfd, "serve", tmp_path / "nothing")[0] == 2


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("SM+LN+G", {}),
        ("SM(t)+ScFuFFN", dict(softmax="polynomial-1", position_embedding="rotary")),
        ("Pow(t)+ScFuFFN", dict(position_embedding="rotary")),
    ],
    ids=["baseline", "polynomial", "powers"],
)
def test_other_models_are_served(scratch, tmp_path, architecture, options):
    folder = tmp_path / "model"
    served = folder, *save_model(folder, architecture, **options)
    started = Server(folder, scratch / "baseline.log")
    try:
        assert honest_answer(started.address(), served)
    finally:
        started.process.terminate()  # a killed one would leave its folder behind
        started.process.wait()
    assert started.log.endswith("stopped\n")  # and nothing of what Triton and JAX would say of their objects


def enlarge_scores(model, factor):
    model.model.blocks[1].attention.query.weight.mul_(factor)
    model.model.blocks[1].attention.key.weight.mul_(factor)


def test_a_model_that_needs_fewer_fraction_bits_is_given_them(capfd, scratch, tmp_path):
    """What 18 would not hold: refused if they are asked for, otherwise served with those that do, in single rows."""
    folder = tmp_path / "model"
    served = folder, *save_model(folder, change=lambda model: enlarge_scores(model, 5e4))
    status, line = run_cli(capfd, "serve", folder, "--listen", "127.0.0.1:0", "--fraction-bits=18")
    assert status == 2
    found = re.search(
        r"overflow: layer 1 \w+ reaches (\S+), .* with 18 .* below 6\.71e\+07; .* (\d+) fraction bits would", line
    )
    assert found
    assert re.search(r"; comparisons would not hold: layer 1 max compares numbers up to \S+, .* below 2\.62e\+05", line)
    started = Server(folder, scratch / "fewer.log")
    try:
        address = started.address()
        assert f"reaches {found[1]}, " in started.log
        bits = int(
            re.search(r"(\d+) fraction bits, the nearest to 18, because fixed point would overflow", started.log)[1]
        )
        assert bits in (int(found[2]) - 1, int(found[2]))  # a choice leaves room, a given number need not
        assert "one by one: pairs need 18 fraction bits or more" in started.log
        assert without_findings(client.connect(address).settings) == Settings(fraction_bits=bits)
        assert honest_answer(address, served)
    finally:
        started.process.terminate()
        started.process.wait()


def test_models_that_no_fraction_bits_hold_are_refused_with_the_numbers(capfd, tmp_path):
    save_model(tmp_path / "model", change=lambda model: enlarge_scores(model, 1e7))
    status, line = run_cli(capfd, "serve", tmp_path / "model", "--listen", "127.0.0.1:0")
    assert status == 2
    assert re.search(r"overflow: layer 1 \w+ reaches \d\S+, .*; no number of fraction bits, 14 to 22, would do", line)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--softmax=power-99", "--softmax must be quartic or power-1 to power-8, got 'power-99'"),
        ("--fraction-bits=40", "--fraction-bits is 40, expected int <= 22"),
        ("--round-logits=9", "--round-logits is 9, expected int <= 8"),
        ("--choices=0", "--choices is 0, expected int >= 1"),
        ("--memory-gb=1e300", "must not be more than 1,000,000"),
        ("--memory-gb=nan", "--memory-gb: expected a finite number, got nan"),
        ("--max-sessions=0", "max_sessions is 0"),
        ("--max-new-tokens=-1", "max_new_tokens is -1"),
        ("--session-seconds=0", "session_seconds is 0"),
    ],
)
def test_impossible_settings(capfd, folded, option, complaint):
    status, line = run_cli(capfd, "serve", folded, "--listen", "127.0.0.1:0", option)
    assert status == 2
    assert complaint in line


def test_rounding_needs_something_to_round(capfd, folded):
    status, line = run_cli(capfd, "serve", folded, "--listen", "127.0.0.1:0", "--output=argmax", "--round-logits=3")
    assert status == 2
    assert "--round-logits has nothing to round with --output argmax" in line


def test_a_tokenizer_with_tokens_that_the_model_does_not_have(capfd, folded, tmp_path):
    """One beyond the model's rows is refused with its name; rows without a token are what padded checkpoints have."""
    for file in folded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folded / "tokenizer.json").read_bytes())
    added = {**tokenizer["added_tokens"][0], "id": 300, "content": "<pad>"}
    tokenizer["added_tokens"].append(added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    status, line = run_cli(capfd, "serve", tmp_path, "--listen", "127.0.0.1:0")
    assert status == 2
    assert "1 of the tokenizer's 301 tokens have an id that the model, which has 300 rows, does not know" in line
    assert "'<pad>' (300) for example: take them out of tokenizer.json" in line
    description = msgspec.json.decode((folded / "folded.json").read_bytes(), type=Description)
    readiness.check_tokenizer(json.dumps(tokenizer), msgspec.structs.replace(description, vocab_size=384))


def test_port_in_use(capfd, folded, running):
    status, line = run_cli(capfd, "serve", folded, "--listen", running.address())
    assert (status, line) == (2, f"entropi: cannot listen on {running.address()}: Address already in use")


# --- Killed in the middle ---------------------------------------------------------------------------------------------


def ask_and_interrupt(address, interrupt):
    """Ask in this process, `interrupt()` once the prompt's pass has begun, and return the complaint."""
    done = []

    def stage(number, communication):
        if number == 3:
            done.append(interrupt())

    with pytest.raises(UserError) as caught:
        client.ask(address, PROMPT, NEW_TOKENS, Watcher(stage=stage))
    assert len(done) == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kill_parties(mark, parent):
    for pid in parties(mark, parent):
        os.kill(pid, signal.SIGKILL)


def test_servers_party_is_killed(running, scratch, stalled_client):
    address = running.address()
    complaint = ask_and_interrupt(address, lambda: kill_parties(scratch, running.process.pid))
    assert complaint == f"{address} ended the session: the server's party failed"
    assert no_parties_left(scratch)


def test_clients_party_is_killed(running, scratch):
    complaint = ask_and_interrupt(running.address(), lambda: kill_parties(scratch, os.getpid()))
    assert "the party's process ended with status -9" in complaint
    assert no_parties_left(scratch)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_client_is_killed_and_the_server_answers_the_next_one(running, model, scratch, number):
    address = running.address()
    process = subprocess.Popen(
        command("ask", PROMPT, "--server", address, "--max-new-tokens", MOST_TOKENS),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(engine_logs(scratch)) == 2 or process.poll() is not None)
    wait_for(lambda: all(log.count(b"Link details") > 2 for log in engine_logs(scratch)))
    assert len(parties(scratch)) == 2
    process.send_signal(number)
    _, said = process.communicate(timeout=HANGING)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in said
    assert no_parties_left(scratch)
    wait_for(running.sessions_closed)
    if number == signal.SIGKILL:
        assert honest_answer(address, model)


def test_client_that_stalls_takes_no_slot(stalled_client):
    wait_for(lambda: stalled_client)
    reason = f"no Start message within {server_session.START_SECONDS} s"
    assert stalled_client == [{"type": "Refused", "reason": reason}]


def test_server_is_killed(more_servers, scratch):
    doomed = more_servers[0]
    address = doomed.address()
    assert ask_and_interrupt(address, doomed.process.kill) == f"{address} went away in the middle of the session"
    assert no_parties_left(scratch)


def test_sigterm_ends_a_server_in_the_middle_of_a_session(more_servers, scratch):
    stopped = more_servers[1]
    address = stopped.address()
    assert ask_and_interrupt(address, stopped.process.terminate).endswith("the server is stopping")
    assert stopped.process.wait(HANGING) == 0
    assert "Traceback" not in stopped.log
    assert stopped.log.endswith("stopped\n")
    assert no_parties_left(scratch)


# --- The control channel under fire -----------------------------------------------------------------------------------


def test_garbage_that_is_no_websocket(running, model, scratch):
    address = running.address()
    host, port = address.split(":")
    for garbage in (b"\0" * 100_000, b"\x16\x03\x01\x02\x00\x01" * 50, b"GET /" + b"a" * 100_000, b"\0" * 7 + b"\1"):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as raw:
            raw.sendall(garbage)
    wait_for(running.sessions_closed)
    assert no_parties_left(scratch)
    assert honest_answer(address, model)
    assert "Traceback" not in running.log


async def hold_a_session(address, meanwhile):
    """Occupy the server's only slot with an engine that never comes, and run `meanwhile()`."""
    async with aiohttp.ClientSession() as http, http.ws_connect(f"http://{address}/v1/session") as channel:
        await channel.send_str(hello())
        welcome = decode_from_server((await channel.receive(HANGING)).data)
        await channel.send_str(encode(Start(4, 2, welcome.digest())).decode())
        while (answer := json.loads((await channel.receive(HANGING)).data))["type"] == "Queued":
            pass  # the session before is just ending
        assert answer["type"] == "Accepted"
        return await asyncio.to_thread(meanwhile)


def test_busy_server_lets_one_wait_and_refuses_another(running, model, scratch):
    address, happened, answers = running.address(), [], []
    watcher = Watcher(status=happened.append)
    waiting = threading.Thread(target=lambda: answers.append(client.ask(address, PROMPT, 1, watcher)))

    def ask():
        waiting.start()
        wait_for(lambda: len(happened) > 1)
        with pytest.raises(UserError, match="refused: the server is busy"):
            client.ask(address, PROMPT, 1)

    asyncio.run(hold_a_session(address, ask))
    waiting.join(HANGING)
    assert happened[1:] == [f"{address} is busy; waiting in its queue"]
    expected = plain_logits(model[1], model[2].encode(PROMPT).ids)
    assert answers[0].record.new_tokens == [int(expected.argmax())]
    wait_for(running.sessions_closed)
    assert no_parties_left(scratch)


def test_web_pages_may_not_talk_to_the_server(running):
    async def pose_as_a_page():
        async with aiohttp.ClientSession() as http:
            await http.ws_connect(f"http://{running.address()}/v1/session", origin="http://example.org")

    with pytest.raises(aiohttp.WSServerHandshakeError):
        asyncio.run(pose_as_a_page())


def test_sessions_in_which_nothing_happens_end():
    class Stalled:
        async def event(self):
            await asyncio.sleep(HANGING)

    host, progress = SimpleNamespace(limits=Limits(stall_seconds=0.1)), server_session.Progress()
    with pytest.raises(SessionError, match=r"nothing happened for 0\.1 s"):
        asyncio.run(server_session._watch_party(Stalled(), server_session.log, host, None, progress, None, None))


# --- Last: what ran all the time --------------------------------------------------------------------------------------


def test_a_port_that_accepts_and_says_nothing(asked_of_silence):
    _, said = asked_of_silence.communicate(timeout=HANGING)
    assert asked_of_silence.returncode == 2
    assert re.fullmatch(r"entropi: 127\.0\.0\.1:\d+ accepts connections but does not answer .*\n", said)


def test_sigint_ends_the_server_and_nothing_is_left(running, scratch):
    running.address()
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(HANGING) == 0
    assert "Traceback" not in running.log
    assert running.log.endswith("stopped\n")
    assert no_parties_left(scratch)
    assert list(scratch.glob("entropi-engine-*")) == []
    assert len(list(scratch.glob("entropi-serve-*"))) <= 1  # of the server that was killed
