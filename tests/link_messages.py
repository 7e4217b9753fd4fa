"""The engines' link as a test writes and reads it, apart from the package: frames, conversations, an engine's model."""

import random
import struct

SERVICE = b"org.interconnection.link.ReceiverService"
SESSION = "0123456789abcdef" * 2
MARK = b"\x01\x02"


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, content):
    """A protobuf field: an integer, or bytes with their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def frame(meta, payload, body=None, meta_size=None):
    """brpc's: what it says of its lengths may be false."""
    sizes = len(meta) + len(payload) if body is None else body, len(meta) if meta_size is None else meta_size
    return b"PRPC" + struct.pack(">II", *sizes) + meta + payload


def request(question, payload, service=SERVICE, method=b"Push", more=b"", **lengths):
    meta = field(1, field(1, service) + field(2, method)) + field(3, 0) + field(4, question) + more
    return frame(meta, payload, **lengths)


def push(rank, question, key, value=b"", more=b"", **lengths):
    """A push as the engine writes it; `more` are further fields."""
    payload = (field(1, rank) if rank else b"") + field(2, key) + (field(3, value) if value else b"") + more
    return request(question, payload, **lengths)


def chunk(rank, question, key, value, offset, whole):
    """A push of one chunk of a value."""
    return push(rank, question, key, value, field(4, 1) + field(5, field(1, whole) + field(2, offset)))


def answer(question, error=0):
    return frame(field(2, field(1, error)) + field(3, 0) + field(4, question), field(1, b""))


def question_of(data):
    """Correlation id of a request, or of an answer."""
    at, number, shift = 12 + (7 if data[12:13] == b"\x12" else 2 + 2 + 40 + 6 + 2 + 1), 0, 0
    while True:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return number


def place(rank, number, serial, session=SESSION, context=""):
    """Key of a value that one party sends the other."""
    return f"{session}{context}:P2P-{number}:{rank}->{1 - rank}".encode() + MARK + b"%d" % serial


def gathering(number, serial, session=SESSION):
    """Key of a value that all parties send each other."""
    return f"{session}:{number}:ALLGATHER".encode() + MARK + b"%d" % serial


def two_chunks(rank, session=SESSION):
    """An engine that gets these writes 32 bytes 2^40 behind a buffer of 64: it compares with the second one's claim."""
    key = place(rank, 1, 1, session)
    return chunk(rank, 101, key, b"A" * 32, 0, 64), chunk(rank, 102, key, b"B" * 32, 1 << 40, 1 << 41)


def conversation(seed, length=40):
    """`(sender, stream, frame)` as two honest engines would exchange them in this order."""
    fixed = random.Random(seed)
    counts, places, question, unread = [0, 0], [0, 0], [1 << 33, 1 << 33], [[], []]

    def ask(rank, key, value=b""):
        question[rank] += fixed.choice([1, 4, 1 << 32])
        yield rank, rank, push(rank, question[rank], key, value)
        yield 1 - rank, rank, answer(question[rank])

    for rank in (0, 1):
        yield from ask(rank, b"connect_%d" % rank + MARK + b"0")
    for rank in (0, 1):
        counts[rank] += 1
        yield from ask(rank, gathering(1, 1), b"\x02\0\0\0")
        unread[rank].append(1)
    for _ in range(length):
        rank = fixed.randrange(2)
        if unread[1 - rank] and fixed.random() < 0.5:
            yield from ask(rank, b"ACK" + MARK, b"%d" % unread[1 - rank].pop(0))
        else:
            counts[rank] += 1
            places[rank] += 1
            unread[rank].append(counts[rank])
            value = fixed.randbytes(fixed.choice([1, 16, 200, 3000]))
            yield from ask(rank, place(rank, places[rank], counts[rank]), value)
    for rank in (0, 1):
        yield from ask(rank, b"FIN" + MARK, b"%d" % counts[rank])


class Malformed(Exception):
    """An engine got what would not be safe to read."""


def _fields(data):
    at, found = 0, []
    while at < len(data):
        numbers = []
        kind = None
        while len(numbers) < 2:
            number = shift = 0
            while True:
                if at == len(data) or shift > 63:
                    raise Malformed("a number without an end")
                number |= (data[at] & 127) << shift
                at, shift = at + 1, shift + 7
                if data[at - 1] < 128:
                    break
            numbers.append(number)
            kind = numbers[0] & 7
        if kind == 2:
            if at + numbers[1] > len(data):
                raise Malformed("a field beyond the end")
            found.append((numbers[0] >> 3, bytes(data[at : at + numbers[1]])))
            at += numbers[1]
        elif kind == 0:
            found.append((numbers[0] >> 3, numbers[1]))
        else:
            raise Malformed(f"a field of kind {kind}")
    return found


class Engine:
    """What an engine does with the frames of its other side; raises `Malformed` where the real one would be at risk.

    It reads with a decoder of its own, which knows protobuf and nothing of how the guard reads.
    """

    def __init__(self, rank):
        self.other = 1 - rank
        self.buffers = {0: bytearray(), 1: bytearray()}
        self.mailbox, self.serials, self.waiting, self.asked = {}, set(), set(), set()
        self.frames = 0

    def asks(self, question):
        """This engine has asked something on its own connection."""
        self.asked.add(question)

    def answers(self, question):
        """This engine has answered on the other one's connection."""
        self.waiting.discard(question)

    def take(self, stream, data):
        buffer = self.buffers[stream]
        buffer += data
        while len(buffer) >= 12:
            body, meta = struct.unpack(">II", buffer[4:12])
            if buffer[:4] != b"PRPC" or meta > body:
                raise Malformed("no frame")
            if len(buffer) < 12 + body:
                return
            self._frame(stream, dict(_once(buffer[12 : 12 + meta])), bytes(buffer[12 + meta : 12 + body]))
            del buffer[: 12 + body]
            self.frames += 1

    def _frame(self, stream, meta, payload):
        if stream == self.other:
            if set(meta) != {1, 3, 4} or meta[3] or dict(_once(meta[1])) != {1: SERVICE, 2: b"Push"}:
                raise Malformed("another service, or more than a request")
            self._push(meta[4], dict(_once(payload)))
        else:
            if set(meta) != {2, 3, 4} or dict(_once(meta[2])) != {1: 0} or dict(_once(payload)) != {1: b""}:
                raise Malformed("no good answer")
            if meta[4] not in self.asked:
                raise Malformed("an answer to nothing")
            self.asked.remove(meta[4])

    def _push(self, question, parts):
        key, value = parts.pop(2), parts.pop(3, b"")
        if parts != ({1: self.other} if self.other else {}) or question in self.waiting:
            raise Malformed("another sender, chunks, or a question that waits")
        self.waiting.add(question)
        name, mark, serial = key.partition(MARK)
        if not mark or (name in (b"ACK", b"FIN")) != (not serial):
            raise Malformed("no key")
        int(serial or value)
        if serial not in (b"", b"0"):
            if serial in self.serials or name in self.mailbox:
                raise Malformed("twice")
            self.serials.add(serial)
            self.mailbox[name] = value


def _once(data):
    found = _fields(data)
    if len({number for number, _ in found}) != len(found):
        raise Malformed("a field twice")
    return found
