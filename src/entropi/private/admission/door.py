"""The server's door: who has connected and not begun a session yet, and who of them must go when it gets crowded.

Connections are counted from the moment they are accepted, before TLS has said who is there, so that those who never
say anything take a bounded number of descriptors and buffers. Nobody is turned away for being late: a newcomer takes
the place of the oldest connection, the least advanced first, of whoever has the most of them. So a crowd displaces
itself, and a client that goes on with its handshake gets through. A session that computes or waits in the queue is
never displaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import resource
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.typedefs import Handler

from entropi.errors import UserError
from entropi.private.admission.audit import Audit
from entropi.private.admission.limits import Limits
from entropi.private.wire.certificates import Peer
from entropi.private.wire.revocation import Watched

HANDSHAKE_SECONDS = 10  # for TLS, and for a request once it is done
ACCEPTS_AT_ONCE = 4  # before other events, and so the handshakes under way, have their turn
BACKLOG = 512
SEARCH_EVERY = 64  # connections
TICK_SECONDS = 1.0
PAUSE_SECONDS = 0.1  # after the system had no descriptor or memory for a connection
SESSION_DESCRIPTORS = 16  # of one session: its connection, the tunnel, the engine's sockets, the process's pipes
RESERVED_DESCRIPTORS = 96  # for the program itself, the metrics, connections that are just being closed
LEAST_STARTUPS = 8
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
log = logging.getLogger("entropi.server")


@dataclass(eq=False)
class Guest:
    """One connection."""

    source: str  # the client's address, and once it is known the name in its certificate
    address: str
    protocol: web.RequestHandler
    since: float = field(default_factory=time.monotonic)  # its last step
    stage: int = 0  # 1 once TLS is done
    requests: int = 0  # that are being answered
    inside: int = 0  # sessions that compute or wait in the queue
    transport: asyncio.Transport | None = None  # once TLS is done
    task: asyncio.Task[None] | None = None  # until then
    gone: bool = False
    asked: bool = False  # something, at some time

    @property
    def progress(self) -> tuple[int, float]:
        """Whose is least goes first."""
        return (self.stage + (self.requests > 0), self.since)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """While the connection has a session that is bounded by other limits."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def leave(self) -> None:
        """End the connection at once, whatever it is doing."""
        self.gone = True
        if self.transport is not None:
            cut(self.transport)
        elif self.task is not None:
            self.task.cancel()


class Door:
    """Accepts connections for an aiohttp server, whose application has `attend` among its middlewares.

    Args:
        files: whose context is the TLS side of new connections; None for no TLS.
        startups: connections without a session that there may be.
        of_source: of these, of one address or client certificate.
        audit: is told who was refused, and why.
    """

    def __init__(self, files: Watched | None, startups: int, of_source: int, audit: Audit) -> None:
        self._files, self._audit = files, audit
        self._answering: web.Server
        self._startups, self._of_source = startups, of_source
        self._guests: list[Guest] = []
        self._listening: list[socket.socket] = []
        self._spare = -1  # a descriptor to be given up for one connection that must be closed
        self._ticking: asyncio.Task[None] | None = None
        self._entered = 0

    def open(self, answering: web.Server, host: str, port: int) -> int:
        """Listen; the port, which a free one takes the place of 0.

        Args:
            answering: speaks HTTP on connections that came in.

        Raises:
            OSError: the address is in use, unknown or not allowed.
        """
        loop, self._answering = asyncio.get_running_loop(), answering
        for family, kind, protocol, _, where in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            listening = socket.socket(family, kind, protocol)
            self._listening.append(listening)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and len(self._listening) > 1:  # the same one for all addresses of the name
                where = (where[0], self._listening[0].getsockname()[1], *where[2:])
            listening.bind(where)
            listening.listen(BACKLOG)
            listening.setblocking(False)
        for listening in self._listening:
            loop.add_reader(listening, self._accept, listening)
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._ticking = loop.create_task(self._tick())
        return int(self._listening[0].getsockname()[1])

    def close(self) -> None:
        """Let nobody in any more, and end connections that have not got as far as a request."""
        if self._ticking is not None:
            self._ticking.cancel()
        for listening in self._listening:
            asyncio.get_running_loop().remove_reader(listening)
            listening.close()
        for guest in self._guests:
            if guest.transport is None:
                guest.leave()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    @web.middleware
    async def attend(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Know of a request for as long as it is being answered."""
        with self._answer(request):
            return await handler(request)

    def guest(self, request: web.BaseRequest) -> Guest:
        """The connection of a request that is being answered."""
        for guest in self._guests:
            if guest.protocol is request.protocol:
                return guest
        raise web.HTTPServiceUnavailable  # displaced just now

    @contextlib.contextmanager
    def _answer(self, request: web.BaseRequest) -> Iterator[None]:
        guest = self.guest(request)
        guest.requests += 1
        guest.asked = True
        guest.since = time.monotonic()
        try:
            yield
        finally:
            guest.requests -= 1
            guest.since = time.monotonic()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                connection, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._run_short(listening, error)
                return
            connection.setblocking(False)
            self._enter(connection, str(address[0]))

    def _run_short(self, listening: socket.socket, error: OSError) -> None:
        """Make room where the system has no descriptor left; the connection that waits is closed, and not kept."""
        if error.errno not in _FULL:
            self._audit.refused("", "system", error.strerror or str(error))
            return
        self._audit.refused("", "descriptors", "the system has no room for another connection")
        startups = self._outside()
        if startups:
            min(startups, key=lambda guest: guest.progress).leave()
        if self._spare >= 0:
            os.close(self._spare)
            with contextlib.suppress(OSError):
                listening.accept()[0].close()
            try:
                self._spare = os.open(os.devnull, os.O_RDONLY)
            except OSError:
                self._spare = -1
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        loop.call_later(PAUSE_SECONDS, self._resume, listening)

    def _resume(self, listening: socket.socket) -> None:
        if listening.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _enter(self, connection: socket.socket, address: str) -> None:
        source = network_of(address)
        startups = self._outside()
        same = [guest for guest in startups if guest.source == source]
        if len(same) >= self._of_source:
            self._displace(same)
        elif len(startups) >= self._startups:
            ((busiest, _),) = Counter(guest.source for guest in startups).most_common(1)
            self._displace([guest for guest in startups if guest.source == busiest])
        self._entered += 1
        if self._entered % SEARCH_EVERY == 0:
            # asyncio's TLS has buffers of 256 KB for every connection, in a circle of references: what a flood leaves
            # would wait for the collector's own pace, by the hundred.
            gc.collect()
        protocol = self._answering()
        guest = Guest(source, address, protocol)
        self._guests.append(guest)
        guest.task = asyncio.get_running_loop().create_task(self._shake_hands(guest, connection))

    def _displace(self, crowd: list[Guest]) -> None:
        guest = min(crowd, key=lambda guest: guest.progress)
        self._audit.refused(guest.source, "crowded", "too many connections that have not begun a session")
        guest.leave()

    def _outside(self) -> list[Guest]:
        """Connections without a session; those that have ended are forgotten."""
        connected = set(self._answering.connections)
        self._guests = [
            guest
            for guest in self._guests
            if not guest.gone and (guest.transport is None or guest.protocol in connected)
        ]
        return [guest for guest in self._guests if not guest.inside]

    async def _shake_hands(self, guest: Guest, connection: socket.socket) -> None:
        context = self._files.context if self._files is not None else None
        patience = HANDSHAKE_SECONDS if context is not None else None
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                lambda: guest.protocol, connection, ssl=context, ssl_handshake_timeout=patience
            )
        except asyncio.CancelledError:  # displaced
            guest.gone = True
            raise
        except OSError as error:
            guest.gone = True
            kind, reason = _complaint(error)
            if kind:
                self._audit.refused(guest.source, kind, reason)
            return
        guest.transport, guest.task = transport, None
        guest.stage, guest.since = 1, time.monotonic()
        try:
            peer = Peer.of(transport)
        except ValueError:  # OpenSSL reads more than the parser does
            self._audit.refused(guest.source, "certificate", "a certificate that cannot be read")
            guest.leave()
            return
        if peer is not None:
            guest.source = f"client {peer.name}"

    async def _tick(self) -> None:
        """End connections that have had the time of a handshake and are not asking for anything."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            late = time.monotonic() - HANDSHAKE_SECONDS
            for guest in self._outside():
                if guest.transport is not None and not guest.requests and guest.since < late:
                    if not guest.asked:
                        self._audit.refused(guest.source, "silent", f"no request within {HANDSHAKE_SECONDS} s")
                    guest.leave()


def check_free(host: str, port: int) -> None:
    """Listen on an address for a moment, to see whether that is possible.

    Raises:
        OSError: as for `Door.open`.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, where in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(where)
            probe.listen(1)


def cut(transport: asyncio.Transport) -> None:
    """End a connection at once, and with it what the system still holds for a peer that does not read."""
    with contextlib.suppress(OSError, AttributeError):  # it has ended already
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def _complaint(error: OSError) -> tuple[str, str]:
    """Why a TLS handshake failed: a word for counting, a sentence; "" for a peer that only went away."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return "certificate", error.verify_message
    if isinstance(error, ssl.SSLError):
        missing = error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
        return "certificate" if missing else "tls", (error.reason or "TLS failed").replace("_", " ").lower()
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return "", ""
    if isinstance(error, ConnectionAbortedError):  # as asyncio reports its own time limit
        return "timeout", f"no TLS handshake within {HANDSHAKE_SECONDS} s"
    return "system", error.strerror or str(error)


def network_of(address: str) -> str:
    """What one subscriber has: an IPv4 address, or the /64 network of an IPv6 address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        if not found.is_loopback:
            return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def startups_that_fit(limits: Limits) -> int:
    """`max_startups`, or fewer where the process may not open so many descriptors besides those of its sessions.

    Raises:
        UserError: not even the sessions and a few more connections fit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.max_sessions * SESSION_DESCRIPTORS + limits.max_queue + RESERVED_DESCRIPTORS
    wanted = needed + limits.max_startups
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits.max_startups
    if soft - needed < LEAST_STARTUPS:
        raise UserError(
            f"this process may open {soft} files, but {limits.max_sessions} sessions and a queue of {limits.max_queue} "
            f"need {needed + LEAST_STARTUPS}: see `ulimit -n`"
        )
    log.warning("only %d of max_startups %d fit: this process may open %d files", soft - needed, wanted - needed, soft)
    return soft - needed
