"""A hundred thousand damaged messages: for the decoders alone, and for a server that must not notice."""

import contextlib
import os
import random
import re
import socket
import struct
import threading
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("spu")

import aiohttp

from entropi.chat import ChatForm
from entropi.private.compute.description import Description
from entropi.private.compute.settings import Settings
from entropi.private.wire import messages
from entropi.private.wire.messages import (
    PROTOCOL_VERSION,
    Accepted,
    BadMessage,
    Failed,
    Held,
    Hello,
    Job,
    Linked,
    Next,
    Prepare,
    Proceed,
    Queued,
    Refused,
    Revealed,
    StageDone,
    Start,
    Tickets,
    Welcome,
    encode,
)
from entropi.private.wire.server_channel import Refusal, expect
from entropi.records import StageCommunication
from private_reference import FIELDS
from serving import HANGING, Server, hello, honest_answer, no_parties_left, wait_for

pytest_plugins = ["serving"]  # its fixtures
COUNT = 100_000
CONNECTIONS = 30_000
THREADS = 4

SPECIAL = [
    b"", b"null", b"[]", b"1e999", b"NaN", b"\xff\xfe", b"[" * 4000, b'{"type":"Hello","x":' + b"[" * 3000,
    b'{"type":"Hello","version":' + b"9" * 3000 + b',"engine":"x"}', b'{"a":' * 700, b"x" * 5000, b"\0" * 4096,
    b'{"type":"Start","prompt_length":0,"max_new_tokens":1,"digest":"' + b"0" * 64 + b'"}',
    b'{"type":"Start","prompt_length":"4","max_new_tokens":1,"digest":"' + b"0" * 64 + b'"}',
    b'{"type":"Start","prompt_length":4.5,"max_new_tokens":1,"digest":"' + b"0" * 64 + b'"}',
    b'{"type":"Start","prompt_length":4,"max_new_tokens":-1,"digest":"' + b"0" * 64 + b'"}',
    b'{"type":"Start","prompt_length":4,"max_new_tokens":1,"digest":"' + b"0" * 64 + b'\\n"}',
    b'{"type":"Start","prompt_length":16384,"max_new_tokens":8,"digest":"' + b"0" * 64 + b'"}',
    b'{"type":"Start","prompt_length":4,"max_new_tokens":1,"digest":"' + b"0" * 64 + b'","prompt":[1]}',
    b'{"type":"Next","token":3}', b'{"type":"Next"}{"type":"Next"}', b'{"type":"Nothing"}', b'{"type":["Next"]}',
]  # fmt: skip


def mutated(fixed, message):
    """A message with up to four bytes changed, removed, inserted or doubled."""
    message = bytearray(message)
    for _ in range(fixed.randint(1, 4)):
        place = fixed.randrange(len(message))
        match fixed.randrange(4):
            case 0:
                message[place] = fixed.randrange(256)
            case 1:
                del message[place : place + fixed.randint(1, 8)]
                message = message or bytearray(b"{")
            case 2:
                message[place:place] = fixed.randbytes(fixed.randint(1, 8))
            case 3:
                message = message[: place + 1] * 2
    return bytes(message)


# --- Decoders ---------------------------------------------------------------------------------------------------------


def samples(description):
    """Proper messages of every kind, with their decoder."""
    communication = StageCommunication(
        name="exp", layer=0, token=1, seconds=0.5, sent_bytes=1, received_bytes=2, sent_messages=3, received_messages=4
    )
    settings = Settings(output="top_k")
    job = Job(0, "0" * 32, ("unix:/a", "unix:/b"), description, settings, 3, 2, [1, 2])
    from_client = [Hello(PROTOCOL_VERSION, "spu 1 jax 2"), Start(4, 2, "0" * 64, True, drafts=2), Next(7, 2, 1)]
    from_client += [Start(4, 2, "0" * 64, others=[3, 5]), Next(ended=[0, 2])]
    from_client += [Tickets(["3" * 32, "4" * 32], True), Prepare(4, 2, "0" * 64, "5" * 32, 86_400.0, 3)]
    chat = ChatForm((1, "user: "), (0, "assistant: "), (0, "user: "), ((1,), ("user: ",)), True)
    welcome = Welcome(description, "{}", settings, "1" * 64, chat=chat, conversation_tokens=64, draft_tokens=8)
    welcome.batch_prompts, welcome.batch_tokens = 8, 512
    from_server = [welcome, Queued(3), Accepted("2" * 32, parts=1, expires_in=60.0), Refused("no")]
    from_server += [Held(["ready", "other", "gone", "unknown"]), Held(None)]
    events = [Linked(), StageDone(communication), Revealed(8, [0.5, -1.0], [3, 4]), Failed("why")]
    return (
        [(m, messages.decode_from_client) for m in from_client]
        + [(m, messages.decode_from_server) for m in from_server]
        + [(m, messages.decode_event) for m in events]
        + [
            (job, lambda data: messages.decode(data, Job)),
            (Proceed(3, [5, 6, 7], 2, 1), lambda data: messages.decode(data, Proceed)),
            (Proceed(1, [5, 6], ended=[1]), lambda data: messages.decode(data, Proceed)),
        ]
    )


@pytest.fixture(scope="module")
def a_description():
    """Of a model, as a server would send it; every field differs from its least value where it can."""
    gelu = dict(intermediate_size=64, activation="gelu", softmax="power-4", norm="rms")
    rotary = dict(position_embedding="rotary", rotary_dimensions=2, key_value_heads=2)
    return Description(**{**FIELDS, **gelu, **rotary, "architecture": "SM+LN+G", "end_of_text": 0})


@pytest.mark.parametrize("count", [10_000, pytest.param(COUNT, marks=pytest.mark.slow)])
def test_decoders_take_proper_messages_and_nothing_else(a_description, count):
    """Damage makes a message that is refused in one line, or another proper one; nothing else can come out."""
    fixed, kinds = random.Random(1), samples(a_description)
    encoded, refused, complaints = [], 0, set()
    for message, decode in kinds:
        assert decode(encode(message)) == message
        encoded.append((encode(message), decode, type(message)))
    for number in range(count):
        data, decode, _ = encoded[number % len(encoded)]
        damaged = SPECIAL[number % len(SPECIAL)] if number % 50 == 0 else mutated(fixed, data)
        try:
            found = decode(damaged)
        except BadMessage as error:
            refused += 1
            complaints.add(str(error))
        else:
            assert decode(encode(found)) == found
    print(f"{refused} of {count} refused")
    assert refused > 0.8 * count
    assert not any("\n" in complaint for complaint in complaints)


# --- A server ---------------------------------------------------------------------------------------------------------

UPGRADE = (
    b"GET /v1/session HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
TEXT, BINARY, CLOSE = 0x1, 0x2, 0x8


def frame(kind, data):
    """A final WebSocket frame of a client, with a mask of zeros."""
    size = len(data)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack(">H", size)
    return bytes([0x80 | kind]) + length + bytes(4) + data


def damaged_messages(seed, count):
    """What a client may say that is damaged, and whether it has said a proper Hello before."""
    fixed = random.Random(seed)
    seeds = [hello().encode(), encode(Start(4, 2, "0" * 64)), encode(Next()), encode(Accepted("0" * 32))]
    seeds += [encode(Start(4, 2, "0" * 64, others=[3, 5])), encode(Next(ended=[0, 2]))]
    for number in range(count):
        data = SPECIAL[number % len(SPECIAL)] if number % 20 == 0 else mutated(fixed, fixed.choice(seeds))
        yield data, fixed.random() < 0.5


@pytest.mark.parametrize("count", [10_000, pytest.param(COUNT, marks=pytest.mark.slow)])
def test_a_server_reads_damaged_messages_as_proper_ones_or_refuses_them(count):
    """All that its sessions do with a client's message before they act on it."""
    refused = Counter()
    for data, greeted in damaged_messages(0, count):
        kind = Start if greeted else Hello
        with contextlib.suppress(UnicodeDecodeError):  # which the connection ends for
            text = data.decode()
            try:
                found = expect(aiohttp.WSMessage(aiohttp.WSMsgType.TEXT, text, None), kind)
            except Refusal as refusal:
                refused[str(refusal)] += 1
            else:
                assert type(found) is kind
                assert messages.decode_from_client(encode(found)) == found
    expected = {"that message is not of this protocol", "expected a Hello message", "expected a Start message"}
    assert refused.keys() == expected
    assert refused.total() > 0.4 * count


def conversations(seed, count):
    """All that a client says on one connection: an upgrade, perhaps a proper Hello, something damaged, a good-bye.

    With each, whether its frames are whole: a server may wait for the rest of one that is not.
    """
    fixed, greeting = random.Random(~seed), frame(TEXT, hello().encode())
    for data, greeted in damaged_messages(seed, count):
        said = frame(BINARY if fixed.random() < 0.1 else TEXT, data)
        whole = fixed.random() > 1 / 3
        if not whole:
            said = mutated(fixed, said)
        yield UPGRADE + (greeting if greeted else b"") + said + frame(CLOSE, b"\x03\xe8"), whole


def converse(address, seed, count, endings):
    """Say every conversation on a connection of its own and read until the server ends it."""
    host, port = address.split(":")
    for said, whole in conversations(seed, count):
        with socket.create_connection((host, int(port)), timeout=HANGING) as connection:
            heard = b""
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(said)
                if not whole:
                    connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(1 << 16):
                    heard = (heard + part)[-400:]
            ending = ending_of(heard)
            endings[ending] = endings.get(ending, 0) + 1


def ending_of(heard):
    """The last control message, or else the code with which the server closed, or else "cut"."""
    if kinds := re.findall(rb'"type":"(\w+)"', heard):
        return kinds[-1].decode()
    closed = re.search(rb"\x88[\x02-\x7d](..)[^\x88]*\Z", heard, flags=re.DOTALL)
    return str(struct.unpack(">H", closed[1])[0]) if closed else "cut"


def resources_of(pid):
    """Resident megabytes, open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident, threads = (int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("VmRSS", "Threads"))
    return resident / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads


def bombard(address, seed, count):
    """Many connections at a time."""
    endings = [{} for _ in range(THREADS)]
    threads = [
        threading.Thread(target=converse, args=(address, seed + n, count // THREADS, endings[n]))
        for n in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {kind: sum(found.get(kind, 0) for found in endings) for kind in set().union(*endings)}


@pytest.mark.two_party
def test_a_server_under_fire_stays_as_it_was(folded, model, scratch):
    """A third of the connections carry damaged frames; of damaged messages the decoders have seen many more."""
    serving = Server(folded, scratch / "fuzz.log")
    try:
        address = serving.address()
        bombard(address, 1000, 4000)  # what it allocates once
        wait_for(serving.sessions_closed)
        before = resources_of(serving.process.pid)
        endings = bombard(address, 0, CONNECTIONS)
        print(endings, before, resources_of(serving.process.pid))
        assert sum(endings.values()) == CONNECTIONS
        assert endings["Refused"] > CONNECTIONS / 4  # of those with whole frames three eighths
        # Protocol error, not UTF-8, too long; 1000 and "cut" follow frames that are damaged themselves.
        assert set(endings) <= {"Refused", "Welcome", "1000", "1002", "1007", "1009", "cut"}
        wait_for(serving.sessions_closed)
        after = resources_of(serving.process.pid)
        assert after[0] < before[0] + 50 * CONNECTIONS / 1e6  # fifty bytes a message would be as much
        assert after[1:] == before[1:]
        assert no_parties_left(scratch)
        assert honest_answer(address, model)
        assert re.findall(r"Traceback.*?\n\S.*?\n", serving.log, flags=re.DOTALL) == []
    finally:
        serving.process.kill()
        serving.process.wait()
