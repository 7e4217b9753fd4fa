"""Prepared material as the sessions of one model use it: whose it is, and calls that do not block the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from entropi.errors import UserError
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.claims import Claim
from entropi.private.preparation.growth import Growth
from entropi.private.preparation.parts import kept_bytes, parts_for, together
from entropi.private.preparation.ring import Ring
from entropi.private.preparation.store import Store
from entropi.private.preparation.tickets import ID_BYTES, Binding, State
from entropi.private.wire.messages import PROTOCOL_VERSION, Welcome, encode, part_file
from entropi.records import StageCommunication

SWEEP_SECONDS = 600.0
log = logging.getLogger("entropi.server")
_TOLD, _TOLD_BYTES = "told", 32  # of a part, among its arrays: tokens, passes, bytes exchanged, milliseconds


@dataclass(frozen=True)
class Size:
    """Of a session: most tokens, the public prefix included, and most passes."""

    tokens: int
    passes: int


class Material:
    """One side's store, for sessions of the model that `welcome` describes.

    Args:
        weights: at the server the SHA-256 of the model's weights, which the welcome does not tell.
    """

    def __init__(self, store: Store, welcome: Welcome, weights: str | None = None) -> None:
        self._store, self._welcome = store, welcome
        self._rank = CLIENT if weights is None else SERVER
        # Another version may take other random numbers for the same model.
        self._model = hashlib.sha256(f"{PROTOCOL_VERSION} {welcome.digest()} {weights}".encode()).hexdigest()
        self._settings = hashlib.sha256(encode(welcome.settings)).hexdigest()

    def _binding(self, size: Size, peer: str) -> Binding:
        return Binding(
            model=self._model,
            settings=self._settings,
            own="",
            peer=peer,
            side="client" if self._rank == CLIENT else "server",
            tokens=size.tokens,
            passes=size.passes,
        )

    async def grow(self, ticket: str, size: Size, peer: str) -> Growing:
        """At the server: begin to prepare a ticket for sessions of up to this size, or go on with it (`UserError`)."""
        return await asyncio.to_thread(self._grow, bytes.fromhex(ticket), size, peer, None)

    async def begin(self, size: Size, peer: str) -> Growing:
        """At the client: go on with a ticket of exactly this size on which nobody works, or begin one (`UserError`)."""

        def begin() -> Growing:
            binding = self._binding(size, peer)
            begun = self._store.growing(binding)
            new = (secrets.token_bytes(ID_BYTES) for _ in itertools.count())
            for ticket in itertools.chain(begun, new):
                if (claim := self._store.claim(ticket)) is None:
                    continue
                try:
                    if ticket not in begun or ticket in self._store.growing(binding):
                        return self._grow(ticket, size, peer, claim)
                except BaseException:
                    claim.release()
                    raise
                claim.release()  # it was finished meanwhile
            raise AssertionError

        return await asyncio.to_thread(begin)

    def _grow(self, ticket: bytes, size: Size, peer: str, claim: Claim | None) -> Growing:
        parts = parts_for(self._welcome.description, self._welcome.settings, size.tokens, size.passes)
        growth = self._store.grow(
            ticket,
            self._binding(size, peer),
            kept_bytes(parts, self._rank) + _TOLD_BYTES * len(parts),
            reopen=self._rank == SERVER,  # a client that was killed before its own end asks again
        )
        return Growing(growth, len(parts), size, claim)

    async def fitting(self, size: Size, peer: str) -> list[tuple[str, Size]]:
        """Tickets with material for a session of this size, and their own sizes, the smallest first."""
        found = await asyncio.to_thread(self._store.ready, self._binding(size, peer))
        return [(ticket.hex(), Size(binding.tokens, binding.passes)) for binding, ticket in found]

    async def claim(self, ticket: str, size: Size, peer: str) -> Claim | None:
        """Keep other sessions of this user from a ticket that is still ready; None if it is not, or one has it."""

        def claim() -> Claim | None:
            if (found := self._store.claim(bytes.fromhex(ticket))) is None:
                return None
            try:
                if any(one.hex() == ticket for _, one in self._store.ready(self._binding(size, peer))):
                    return found
            except BaseException:
                found.release()
                raise
            found.release()
            return None

        return await asyncio.to_thread(claim)

    async def held(self, tickets: Sequence[str], peer: str) -> list[State]:
        """What a client may count on of its tickets, see `State`."""
        ids = [bytes.fromhex(ticket) for ticket in tickets]
        return await asyncio.to_thread(self._store.states, ids, self._binding(Size(1, 1), peer))

    async def take(self, ticket: str, size: Size, peer: str) -> Taken:
        """The material of a ticket, which from then on is nowhere else (`UserError`)."""

        def taken() -> Taken:
            parts = self._store.take(bytes.fromhex(ticket), self._binding(size, peer))
            told = np.array([parts[name].pop(_TOLD) for name in sorted(parts)])
            arrays = together([parts[name] for name in sorted(parts)])
            prepared = Size(int(told[0, 0]), int(told[0, 1]))
            return Taken(arrays, prepared, int(told[:, 2].sum()), float(told[:, 3].sum()) / 1e3)

        return await asyncio.to_thread(taken)

    async def sweep(self) -> None:
        """Destroy what has expired, again and again."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await asyncio.to_thread(self._store.sweep)
            except UserError as error:
                log.error("expired material could not be destroyed: %s", error)

    async def discard(self, *tickets: str, peer: str | None = None) -> int:
        """Destroy tickets, those of one client alone where its name is given; how many there were."""
        return await asyncio.to_thread(self._store.discard, *map(bytes.fromhex, tickets), peer=peer)


@dataclass(frozen=True)
class Taken:
    """The material of one session, its size, and what preparing took: bytes both ways, seconds of this side's party."""

    arrays: dict[str, Ring]
    size: Size
    moved: int
    seconds: float

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return sum(array.nbytes for array in self.arrays.values())


class Growing:
    """A ticket while its parts are computed, in their order.

    Args:
        claim: on the ticket, at the client; see `release`.
    """

    def __init__(self, growth: Growth, total: int, size: Size, claim: Claim | None = None) -> None:
        self._growth, self._claim, self.total, self.size = growth, claim, total, size
        self._set_up_bytes, self._set_up_seconds = 0, 0.0

    @property
    def ticket(self) -> str:
        return self._growth.ticket.hex()

    def release(self) -> None:
        """Let others of this user go on with the ticket."""
        if self._claim is not None:
            self._claim.release()

    async def expire_within(self, seconds: float) -> float:
        """Let the ticket expire so many seconds from now, if it would later; how many seconds it has then."""
        return await asyncio.to_thread(self._growth.expire_within, seconds)

    def note(self, cost: StageCommunication) -> None:
        """Count an operation with the next part that is added, if it is the set-up and so of no part."""
        if cost.name == "setup":
            self._set_up_bytes += cost.bytes
            self._set_up_seconds += cost.seconds

    async def done(self) -> int:
        """How many parts are there, from the first on without a gap."""
        parts = await asyncio.to_thread(self._growth.parts)
        return next(number for number in range(len(parts) + 1) if _name(number) not in parts)

    async def go_back(self, done: int) -> None:
        """Destroy all but the first parts: the other side has only so many."""
        await asyncio.to_thread(self._growth.keep, [_name(number) for number in range(done)])

    async def add(self, number: int, folder: Path, cost: StageCommunication) -> None:
        """Keep what the party has left in `folder`, on the disk once this returns."""

        def keep() -> None:
            path = folder / part_file(number)
            moved, seconds = cost.bytes + self._set_up_bytes, cost.seconds + self._set_up_seconds
            told = np.array([self.size.tokens, self.size.passes, moved, round(seconds * 1e3)], np.uint64)
            arrays = {**load_file(path), _TOLD: told}
            os.unlink(path)  # first: whoever is killed here leaves no copy of what the store has
            self._growth.add(_name(number), arrays)

        await asyncio.to_thread(keep)
        self._set_up_bytes, self._set_up_seconds = 0, 0.0

    async def finish(self) -> None:
        """All parts are there."""
        if await self.done() != self.total:
            raise UserError("material is missing at the end of its preparation")
        await asyncio.to_thread(self._growth.finish)


def _name(number: int) -> str:
    return f"{number:06d}"
