"""The engines' link: what passes is what two engines say, and nothing else does."""

import contextlib
import random
import socket
import subprocess
import sys
import time

import pytest

from entropi.private.wire import link_frames
from entropi.private.wire.link_frames import MAX_PUSH, PUSH_BYTES, BadFrame, LinkGuard
from link_messages import (
    MARK,
    SESSION,
    Engine,
    answer,
    chunk,
    conversation,
    field,
    frame,
    gathering,
    place,
    push,
    question_of,
    request,
    two_chunks,
    varint,
)

FRAMES = 100_000


def pieces(fixed, data):
    """`data` cut at random."""
    while data:
        size = min(len(data), fixed.choice([1, 2, 11, 60, 200, 5000]))
        yield data[:size]
        data = data[size:]


def after_greetings(unread=1 << 20):
    """The client's guard of a session whose engines have found each other."""
    guard = LinkGuard(1, SESSION, unread)
    for rank in (0, 1):
        carry = guard.arrives if rank == 0 else guard.leaves
        carry(rank, push(rank, 1, b"connect_%d" % rank + MARK + b"0"))
    guard.leaves(0, answer(1))
    guard.arrives(1, answer(1))
    return guard


# --- What passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_an_honest_conversation_passes_unchanged_however_it_is_cut(seed):
    fixed = random.Random(seed)
    guards = LinkGuard(0, SESSION), LinkGuard(1, SESSION)
    engines = Engine(0), Engine(1)
    said, count = list(conversation(seed, 200)), 0
    for sender, stream, data in said:
        if sender == stream:
            engines[sender].asks(question_of(data))
        out = b"".join(bytes(guards[sender].leaves(stream, part)) for part in pieces(fixed, data))
        assert out == data
        came = b"".join(bytes(guards[1 - sender].arrives(stream, b"\1" + part, 1)) for part in pieces(fixed, out))
        assert came == data
        engines[1 - sender].take(stream, came)
        count += 1
    assert engines[0].frames + engines[1].frames == len(said) == count


def test_an_engine_that_pushed_nothing_may_say_so():
    data = push(0, 2, b"FIN" + MARK, b"0")
    assert after_greetings().arrives(0, data) == data


def test_a_value_passes_while_it_arrives_and_a_head_only_whole():
    guard = after_greetings()
    data = push(0, 2, place(0, 1, 1), b"v" * 100_000)
    head = len(data) - 100_000
    assert bytes(guard.arrives(0, data[: head - 1])) == b""
    assert bytes(guard.arrives(0, data[head - 1 : 5000])) == data[:5000]
    assert bytes(guard.arrives(0, data[5000:])) == data[5000:]


# --- What does not ----------------------------------------------------------------------------------------------------

FIRST = place(0, 1, 1)
BAD = {
    "garbage": b"GET /flags HTTP/1.1\r\n\r\n",
    "garbage of one byte": b"?",
    "zeros": bytes(300),
    "the chunks of the attack": b"".join(two_chunks(0)),
    "one chunk that is the whole": chunk(0, 2, FIRST, b"x" * 9, 0, 9),
    "chunk information without chunks": push(0, 2, FIRST, b"x", field(5, b"")),
    "a transport of its own": push(0, 2, FIRST, b"x", field(4, 0)),
    "an unknown field": push(0, 2, FIRST, b"x", field(9, 1)),
    "two values": push(0, 2, FIRST, b"x", field(3, b"y")),
    "this side's rank": push(1, 2, FIRST, b"x"),
    "a third rank": push(2, 2, FIRST, b"x"),
    "a rank that is written although it is zero": request(2, field(1, 0) + field(2, FIRST) + field(3, b"x")),
    "no key": request(2, field(3, b"x")),
    "an empty key": push(0, 2, b"", b"x"),
    "a key without a number": push(0, 2, FIRST[:-3], b"x"),
    "a key with the number zero": push(0, 2, place(0, 1, 0), b"x"),
    "a key of the other direction": push(0, 2, place(1, 1, 1), b"x"),
    "a key of another session": push(0, 2, place(0, 1, 1, "f" * 32), b"x"),
    "a key of another kind": push(0, 2, SESSION.encode() + b":1:BCAST" + MARK + b"1", b"x"),
    "a long key": push(0, 2, FIRST + b"1" * 80, b"x"),
    "a number far ahead": push(0, 2, place(0, 1, 1 << 20), b"x"),
    "a place far ahead": push(0, 2, place(0, 1 << 20, 1), b"x"),
    "a gathering far ahead": push(0, 2, gathering(1 << 20, 1), b"x"),
    "a number twice": push(0, 2, FIRST, b"x") + push(0, 3, place(0, 2, 1), b"x"),
    "a place twice": push(0, 2, FIRST, b"x") + push(0, 3, place(0, 1, 2), b"x"),
    "a question twice": push(0, 2, FIRST, b"x") + push(0, 2, place(0, 2, 2), b"x"),
    "another service": request(2, field(2, FIRST), service=b"org.interconnection.link.ReceiverServicf"),
    "a service of brpc": request(2, b"", service=b"brpc.flags", method=b"default_method"),
    "another method": request(2, field(2, FIRST), method=b"Pull"),
    "a compressed request": frame(b"\x0a\x30" + field(1, b"x") + field(3, 1) + field(4, 2), field(2, FIRST)),
    "an attachment": request(2, field(2, FIRST), more=field(5, 1)),
    "a stream": request(2, field(2, FIRST), more=field(8, b"\x08\x01")),
    "a question of zero": push(0, 0, FIRST, b"x"),
    "a negative question": push(0, (1 << 64) - 2, FIRST, b"x"),
    "an answer where questions are": answer(1),
    "a receipt of nothing": push(0, 2, b"ACK" + MARK, b"1"),
    "a receipt that is no number": push(0, 2, b"ACK" + MARK, b"1x"),
    "a receipt without a number": push(0, 2, b"ACK" + MARK),
    "a receipt with a leading zero": push(0, 2, b"ACK" + MARK, b"01"),
    "a last word before the last push": push(0, 2, FIRST, b"x") + push(0, 3, b"FIN" + MARK, b"0"),
    "two last words": push(0, 2, b"FIN" + MARK, b"0") + push(0, 3, b"FIN" + MARK, b"0"),
    "a push after the last word": push(0, 2, b"FIN" + MARK, b"0") + push(0, 3, FIRST, b"x"),
    "a last word of many digits": push(0, 2, b"FIN" + MARK, b"1" * 40),
    "a greeting with a value": push(0, 2, b"connect_0" + MARK + b"0", b"x"),
    "a greeting of this side": push(0, 2, b"connect_1" + MARK + b"0"),
    "a body that is too long": push(0, 2, FIRST, b"x", body=200),
    "a body that is too short": push(0, 2, FIRST, b"x" * 50, body=130) + bytes(200),
    "a meta that is too long": push(0, 2, FIRST, b"x", meta_size=70),
    "a meta beyond the body": push(0, 2, FIRST, b"x", meta_size=1 << 31),
    "no meta": push(0, 2, FIRST, b"x", meta_size=0),
    "more than a gigabyte": push(0, 2, FIRST, b"x", body=MAX_PUSH + 1000),
    "four gigabytes": push(0, 2, FIRST, b"x", body=(1 << 32) - 1),
    "a length in more bytes than it needs": request(2, field(2, FIRST) + b"\x1a\x81\x00x"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("step", [1, 1 << 20], ids=["bytewise", "at once"])
def test_what_no_engine_says_ends_the_session_and_does_not_reach_the_engine(name, step):
    guard, engine = after_greetings(), Engine(1)
    data = BAD[name] + bytes(1000)  # what is incomplete must not become a frame by what follows

    def deliver():
        for at in range(0, len(data), step):
            engine.take(0, guard.arrives(0, data[at : at + step]))

    with pytest.raises(BadFrame) as caught:
        deliver()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 100
    assert engine.frames <= 1  # of two pushes that do not belong together, the first


@pytest.mark.parametrize(
    "data",
    [answer(2), answer(0), answer(1), answer(9, 1004), push(1, 9, FIRST), frame(b"", b""), answer(9) + answer(9)],
    ids=["not asked", "zero", "answered", "an error", "a push", "nothing", "twice"],
)
def test_answers_that_nobody_waits_for(data):
    guard = after_greetings()
    guard.leaves(1, push(1, 9, place(1, 1, 1), b"x"))
    with pytest.raises(BadFrame):
        guard.arrives(1, data)


def test_receipts_are_given_once_and_only_for_what_was_sent():
    guard = after_greetings()
    guard.leaves(1, push(1, 9, place(1, 1, 1), b"x"))
    guard.arrives(0, push(0, 2, b"ACK" + MARK, b"1"))
    with pytest.raises(BadFrame, match="a receipt for push 1, which does not wait for one"):
        guard.arrives(0, push(0, 3, b"ACK" + MARK, b"1"))


@pytest.mark.parametrize("size", [1, 50_000])
def test_what_is_not_read_is_bounded_and_what_is_read_makes_room(size):
    guard, most = after_greetings(unread=1 << 20), (1 << 20) // (size + PUSH_BYTES)
    value = b"v" * size
    for serial in range(1, 3 * most):
        guard.arrives(0, push(0, serial + 1, place(0, serial, serial), value))
        guard.leaves(0, answer(serial + 1))
        guard.leaves(1, push(1, serial + 1, b"ACK" + MARK, b"%d" % serial))
    assert guard.most_unread == size + PUSH_BYTES
    for serial in range(3 * most, 4 * most):
        guard.arrives(0, push(0, serial + 1, place(0, serial, serial), value))
    with pytest.raises(BadFrame, match="more than 1048576 bytes that nobody has read"):
        guard.arrives(0, push(0, 4 * most + 1, place(0, 4 * most, 4 * most), value))


def test_questions_that_are_not_answered_are_bounded(monkeypatch):
    monkeypatch.setattr(link_frames, "MAX_UNANSWERED", 500)
    guard = after_greetings(unread=1 << 40)
    for serial in range(1, 501):
        guard.arrives(0, push(0, serial + 1, place(0, serial, serial), b"v"))
        guard.leaves(1, push(1, serial + 1, b"ACK" + MARK, b"%d" % serial))
        guard.arrives(1, answer(serial + 1))
    with pytest.raises(BadFrame, match="more than 500 unanswered"):
        guard.arrives(0, push(0, 502, place(0, 501, 501), b"v"))


def test_this_sides_engine_is_read_just_the_same():
    """One that is in somebody else's hands may not attack the other side, nor make this side's books wrong."""
    for data in (two_chunks(1)[0], push(1, 2, b"ACK" + MARK, b"7"), push(0, 2, place(0, 1, 1), b"x")):
        with pytest.raises(BadFrame):
            after_greetings().leaves(1, data)


# --- A hundred thousand damaged frames --------------------------------------------------------------------------------


def damaged(fixed, data):
    """A frame with up to four changes: bytes changed, removed, inserted, a field more; its length mended or not."""
    data = bytearray(data)
    for _ in range(fixed.choice([1, 1, 2, 4])):
        at = fixed.randrange(len(data)) if fixed.random() < 0.5 else fixed.randrange(min(len(data), 160))
        kind = fixed.randrange(6)
        if kind == 0:
            data[at] = fixed.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << fixed.randrange(8)
        elif kind == 2:
            del data[at : at + fixed.randint(1, 4)]
        elif kind == 3:
            data[at:at] = fixed.randbytes(fixed.randint(1, 4))
        elif kind == 4:
            data[at:at] = varint(fixed.choice([0, 1, 127, 128, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1]))
        else:
            data += field(fixed.choice([3, 4, 5, 9]), fixed.choice([0, 1, b"\x08\x40\x10\x80\x01"]))
        if len(data) < 13:
            break
    if fixed.random() < 0.5 and len(data) > 12:
        data[4:8] = (len(data) - 12).to_bytes(4, "big")
    return bytes(data)


def replayed(said, engine=None):
    """The client's guard, and its engine if there is one, after what was said."""
    guard = LinkGuard(1, SESSION)
    for sender, stream, data in said:
        if sender == 1:
            guard.leaves(stream, data)
        else:
            guard.arrives(stream, data)
        if engine is not None and sender == 0:
            engine.take(stream, data)
        elif engine is not None:
            (engine.asks if stream == 1 else engine.answers)(question_of(data))
    return guard


@pytest.mark.slow
def test_damaged_frames_reach_the_engine_well_formed_or_not_at_all():
    """And those that are refused change nothing: the conversation could go on as if they had not been sent."""
    fixed, refused, passed, waiting = random.Random(7), 0, 0, 0
    said = list(conversation(3, 12))
    to_client = [number for number, (sender, _, data) in enumerate(said) if sender == 0 and len(data) < 600]
    for number in to_client:
        before, (_, stream, data) = said[:number], said[number]
        guard = replayed(before)
        for _ in range(FRAMES // len(to_client) + 1):
            changed = damaged(fixed, data)
            try:
                come = guard.arrives(stream, changed)
            except BadFrame:
                refused += 1
                if 12 + int.from_bytes(changed[4:8], "big") < len(changed):  # a frame, perhaps a good one, and more
                    guard = replayed(before)
                continue
            if len(come) < 12:
                waiting += 1  # for the rest of a head
                assert not come
            else:
                passed += 1
                engine = Engine(1)
                replayed(before, engine)
                engine.take(stream, come)
            guard = replayed(before)
        for sender, stream, data in said[number:]:
            carry = guard.leaves if sender == 1 else guard.arrives
            assert bytes(carry(stream, data)) == data
    print(f"{refused} refused, {passed} passed, {waiting} not complete")
    assert refused + passed + waiting >= FRAMES
    assert refused > 0.7 * FRAMES
    assert passed > 100  # values that only engines understand, and other numbers that were free


# --- A real engine ----------------------------------------------------------------------------------------------------

RECEIVER = """
import sys
from spu import libspu
desc = libspu.link.Desc()
desc.id = sys.argv[1]
desc.add_party("server", sys.argv[2]); desc.add_party("client", sys.argv[3])
desc.recv_timeout_ms = 5000
desc.connect_retry_times = 30
link = libspu.link.create_brpc(desc, 1)
"""


@pytest.mark.two_party
def test_the_attack_would_kill_an_engine(tmp_path):
    """Without it the tests above would not show that anything is prevented."""
    pytest.importorskip("spu")
    addresses = [f"unix:{tmp_path}/server", f"unix:{tmp_path}/client"]
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(f"{tmp_path}/server")
    silent.listen()
    process = subprocess.Popen([sys.executable, "-c", RECEIVER, SESSION, *addresses], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    with socket.socket(socket.AF_UNIX) as attacker:
        while True:
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                attacker.connect(f"{tmp_path}/client")
                break
            time.sleep(0.05)
        first, second = two_chunks(0)
        attacker.sendall(first)
        assert attacker.recv(100)  # which order they come in matters
        attacker.sendall(second)
        assert process.wait(60) == -11  # SIGSEGV
    silent.close()
