"""What may pass between two engines: every byte of their link is read here before the other side's engine gets it.

The engines speak brpc's standard protocol (`baidu_std`) with one service of one method, by which a *push* puts a value
under a key into the other engine's mailbox. All that a session of two honest engines says is

- a push: a request with a correlation id, the sender's rank, a key, and a value that only engines understand;
- an answer to a push: the same correlation id, and "no error";

where the key is a greeting (`connect`), a receipt for a push that was read (`ACK`), the last word (`FIN`), or names the
place of the value in the computation; then it ends in a serial number, which counts the sender's pushes from 1.

`LinkGuard` admits exactly these, byte for byte as the engines' own library writes them, and nothing else: no other
service (the library has some), field, protocol, rank or session; no pushes in several chunks, whose lengths the engine
does not compare; no serial number or place twice or out of reach; no answer to a question that was not asked, no
receipt for what was not sent or was acknowledged already; and no more than a given number of bytes that our engine has
not read, which it tells by its receipts. A value passes while it arrives, so a frame is never held in memory here; its
head passes only whole.

Layouts: brpc's `baidu_rpc_meta.proto` and yacl's `transport.proto`, as SPU 0.9.5 has them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

MAX_PUSH = 1 << 30  # bytes of one value; engines are told to send it in one piece up to here
DEFAULT_UNREAD = 2 << 30  # bytes that our engine has not read
PUSH_BYTES = 4 << 10  # what a push counts for beside its value: more than both processes spend on it
# Engines do not wait for answers or receipts: they send as much as the computation has to say in one direction.
MAX_UNANSWERED = 1 << 16
_REACH = 1 << 16  # how far a number may be ahead of the last one before which none is missing
_MAX_CONTEXTS = 1024  # parts of a computation that count by themselves; SPU makes one for every thread it uses
_MAX_GREETINGS = 1000
_HEAD = struct.Struct(">4sII")
_LONGEST_HEAD = 224  # bytes before a value; the pattern below cannot match more
_SERVICE = b"org.interconnection.link.ReceiverService"

_NUMBER = rb"[1-9][0-9]{0,9}"
_VARINT = rb"[\x80-\xff]{0,%d}[\x01-\x7f]"  # of a positive integer, in as few bytes as it needs
_PUSH = (
    rb"(?s).{12}(\x0a\x30\x0a\x28" + re.escape(_SERVICE) + rb"\x12\x04Push\x18\x00\x20(" + _VARINT % 8 + rb"))"
    rb"%(sender)b\x12(.)(?:(connect)_%(rank)b\x01\x020|(ACK|FIN)\x01\x02|"
    rb"%(session)b((?:-[0-9]{1,4}){0,3}):(?:P2P-(" + _NUMBER + rb"):%(rank)b->%(other)b|(" + _NUMBER + rb"):ALLGATHER)"
    rb"\x01\x02(" + _NUMBER + rb"))"
    rb"(?:\x1a(" + _VARINT % 4 + rb"))?"
)
_ANSWER = re.compile(rb"(?s).{12}(\x12\x02\x08\x00\x18\x00\x20(" + _VARINT % 8 + rb"))\x0a\x00")


class BadFrame(Exception):
    """Bytes that two engines which follow the protocol would not exchange; the text is one line."""


class LinkGuard:
    """Both directions of the link of one session, seen from one side.

    Args:
        rank: of this side's engine.
        session: which the engines' messages bear.
        unread: bytes that this side's engine may leave unread, `PUSH_BYTES` for every push included.
    """

    def __init__(self, rank: int, session: str, unread: int = DEFAULT_UNREAD) -> None:
        theirs, ours = _Sender(unread), _Sender(None)
        asked: tuple[set[bytes], set[bytes]] = set(), set()  # unanswered questions on each engine's connection
        other = 1 - rank
        # On the connection that an engine has opened it asks, and the other one answers.
        self._arriving, self._leaving = {}, {}
        self._arriving[other] = _Frames(_Pushes(other, session, asked[other], theirs, ours).read)
        self._arriving[rank] = _Frames(_Answers(asked[rank]).read)
        self._leaving[rank] = _Frames(_Pushes(rank, session, asked[rank], ours, theirs).read)
        self._leaving[other] = _Frames(_Answers(asked[other]).read)
        self._theirs = theirs

    @property
    def most_unread(self) -> int:
        """Bytes that this side's engine has left unread at most."""
        return self._theirs.most_unread

    def arrives(self, stream: int, data: bytes, start: int = 0) -> memoryview:
        """What our engine may be given, now that `data[start:]` has come on the connection of engine `stream`.

        Raises:
            BadFrame: the other side does not follow the protocol; nothing of `data` may be given to our engine.
        """
        return self._arriving[stream].admit(data, start)

    def leaves(self, stream: int, data: bytes) -> memoryview:
        """The same for what our engine sends: it tells what it has read, and may be in somebody else's hands."""
        return self._leaving[stream].admit(data, 0)


class _Frames:
    """One direction of one connection, cut into frames. A frame that is refused changes nothing.

    Args:
        read: looks at a frame's head, `(data, at, end)` with as much of the frame up to `end` as a head can need;
            returns where the value begins.
    """

    def __init__(self, read: Callable[[bytes, int, int], int]) -> None:
        self._read = read
        self._rest = b""  # what has come of a head that is not complete
        self._left = 0  # bytes of a value that have not come

    def admit(self, data: bytes, start: int) -> memoryview:
        if self._rest:
            data, start, self._rest = self._rest + data[start:], 0, b""
        at, size = start + min(self._left, len(data) - start), len(data)
        self._left -= at - start
        while at < size:
            if size - at < _HEAD.size:
                if not b"PRPC".startswith(data[at : at + 4]):
                    raise BadFrame("bytes that are no frame")
                break
            magic, body, meta = _HEAD.unpack_from(data, at)
            if magic != b"PRPC":
                raise BadFrame("bytes that are no frame")
            if not 0 < meta <= body <= MAX_PUSH + _LONGEST_HEAD:
                raise BadFrame(f"a frame of {body} bytes")
            end = at + _HEAD.size + body
            if size < min(end, at + _LONGEST_HEAD):
                break
            value = self._read(data, at, end)
            at = min(end, size)
            self._left = end - at
            assert value <= end
        self._rest = bytes(data[at:])
        return memoryview(data)[start:at]


class _Answers:
    """Answers on one connection."""

    def __init__(self, asked: set[bytes]) -> None:
        self._asked = asked

    def read(self, data: bytes, at: int, end: int) -> int:
        found = _ANSWER.match(data, at, end)
        if found is None or found.end() != end or len(found[1]) != _meta_size(data, at):
            raise BadFrame("an answer that is none of a push")
        try:
            self._asked.remove(found[2])
        except KeyError:
            raise BadFrame("an answer to what was not asked") from None
        return end


class _Pushes:
    """Requests on one connection.

    Args:
        rank: of the engine that sends them.
        asked: correlation ids of those that are not answered yet.
        sender, receiver: what the two engines have sent so far.
    """

    def __init__(self, rank: int, session: str, asked: set[bytes], sender: _Sender, receiver: _Sender) -> None:
        own, other = b"%d" % rank, b"%d" % (1 - rank)
        prefix = rb"\x08\x01" if rank else b""  # a rank of zero is not written
        self._pattern = re.compile(
            _PUSH % {b"sender": prefix, b"rank": own, b"other": other, b"session": re.escape(session.encode())}
        )
        self._asked, self._sender, self._receiver = asked, sender, receiver

    def read(self, data: bytes, at: int, end: int) -> int:
        found = self._pattern.match(data, at, end)
        if found is None:
            raise BadFrame("a request that is no push of this session's other engine")
        meta, question, length, greeting, control, context, place, gathering, serial, size = found.groups()
        value = found.end()
        key_end = found.start(10) - 1 if size is not None else value
        if len(meta) != _meta_size(data, at) or key_end - found.end(3) != length[0]:
            raise BadFrame("a push whose parts have other lengths than it says")
        bytes_of_value = _integer(size) if size is not None else 0
        if value + bytes_of_value != end:  # among others, all that comes in chunks
            raise BadFrame("a push that is not a key and one whole value")
        if question in self._asked:
            raise BadFrame("a question that was asked before")
        if len(self._asked) >= MAX_UNANSWERED:
            raise BadFrame(f"more than {MAX_UNANSWERED} unanswered questions")
        if serial is not None:
            name = (context, b"P2P" if place is not None else b"ALLGATHER")
            self._sender.push(int(serial), name, int(place if place is not None else gathering), bytes_of_value)
        elif greeting is not None:
            self._sender.greet(bytes_of_value)
        else:
            number = data[value:end] if bytes_of_value <= 10 else b""
            if not number.isdigit() or (number[:1] == b"0" and len(number) > 1):
                raise BadFrame(f"{control.decode()} without a number")
            if control == b"ACK":
                self._receiver.read(int(number))
            else:
                self._sender.finish(int(number))
        self._asked.add(question)
        return value


class _Sender:
    """What one engine has pushed.

    Args:
        unread: bytes that the other engine may leave unread; None for no limit, where the other side sees to it.
    """

    def __init__(self, unread: int | None) -> None:
        self._limit, self.most_unread = unread, 0
        self._serials = _Numbers()
        self._places: dict[tuple[bytes, bytes], _Numbers] = {}
        self._unread: dict[int, int] = {}  # bytes of pushes that were not acknowledged, by serial number
        self._unread_bytes = 0
        self._greetings = 0
        self._last: int | None = None  # serial number, once it is known

    def push(self, serial: int, name: tuple[bytes, bytes], place: int, size: int) -> None:
        if not self._serials.may_take(serial) or (self._last is not None and serial > self._last):
            raise BadFrame(f"a push with the number {serial}, which is not one of those to come")
        places = self._places.get(name)
        if places is None:
            if len(self._places) >= _MAX_CONTEXTS:
                raise BadFrame(f"pushes of more than {_MAX_CONTEXTS} contexts")
            places = _Numbers()
        if not places.may_take(place):
            raise BadFrame("a push for a place in the computation that is taken or out of reach")
        unread = self._unread_bytes + size + PUSH_BYTES
        if self._limit is not None and unread > self._limit:
            raise BadFrame(f"more than {self._limit} bytes that nobody has read")
        self._serials.take(serial)
        places.take(place)
        self._places[name] = places
        self._unread[serial] = size + PUSH_BYTES
        self._unread_bytes = unread
        self.most_unread = max(self.most_unread, unread)

    def read(self, serial: int) -> None:
        """The other engine has read a push."""
        size = self._unread.pop(serial, None)
        if size is None:
            raise BadFrame(f"a receipt for push {serial}, which does not wait for one")
        self._unread_bytes -= size

    def greet(self, size: int) -> None:
        if size or self._greetings >= _MAX_GREETINGS:
            raise BadFrame("a greeting with a value, or one too many")
        self._greetings += 1

    def finish(self, serial: int) -> None:
        if self._last is not None or serial < self._serials.highest:
            raise BadFrame("a second last word, or one before the last push")
        self._last = serial


class _Numbers:
    """Numbers from 1 on, each taken once, in nearly this order."""

    def __init__(self) -> None:
        self._whole = 0  # all up to this one were taken
        self._beyond: set[int] = set()

    @property
    def highest(self) -> int:
        return max(self._beyond, default=self._whole)

    def may_take(self, number: int) -> bool:
        """Whether the number is free and in reach."""
        return self._whole < number <= self._whole + _REACH and number not in self._beyond

    def take(self, number: int) -> None:
        """Take a number that is free."""
        if number > self._whole + 1:
            self._beyond.add(number)
            return
        self._whole = number
        while self._beyond and self._whole + 1 in self._beyond:
            self._whole += 1
            self._beyond.remove(self._whole)


def _meta_size(data: bytes, at: int) -> int:
    size: int = _HEAD.unpack_from(data, at)[2]
    return size


def _integer(varint: bytes) -> int:
    """A protobuf varint."""
    number = 0
    for shift, byte in enumerate(varint):
        number |= (byte & 0x7F) << (7 * shift)
    return number
