"""Prepared material as the sessions of one model use it: whose it is, and calls that do not block the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from entropi.errors import UserError
from entropi.private.compute.settings import CLIENT, SERVER
from entropi.private.preparation.growth import Growth
from entropi.private.preparation.parts import kept_bytes, parts_for, together
from entropi.private.preparation.ring import Ring
from entropi.private.preparation.store import Store
from entropi.private.preparation.tickets import Binding
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
        """Begin to prepare a ticket for sessions of up to this size, or go on with it (`UserError`)."""

        def begin() -> Growing:
            parts = parts_for(self._welcome.description, self._welcome.settings, size.tokens, size.passes)
            growth = self._store.grow(
                bytes.fromhex(ticket),
                self._binding(size, peer),
                kept_bytes(parts, self._rank) + _TOLD_BYTES * len(parts),
                reopen=self._rank == SERVER,  # a client that was killed before its own end asks again
            )
            return Growing(growth, len(parts), size)

        return await asyncio.to_thread(begin)

    async def unfinished(self, size: Size, peer: str) -> str | None:
        """A ticket that was begun for exactly this size."""
        found = await asyncio.to_thread(self._store.oldest_growing, self._binding(size, peer))
        return None if found is None else found.hex()

    async def fitting(self, size: Size, peer: str, *, largest: bool = False) -> tuple[str, Size] | None:
        """The smallest ticket, or the largest, with material for a session of this size, and its own size."""
        found = await asyncio.to_thread(self._store.ready, self._binding(size, peer))
        if not found:
            return None
        binding, ticket = found[-1 if largest else 0]
        return ticket.hex(), Size(binding.tokens, binding.passes)

    async def count(self, size: Size, peer: str) -> int:
        """How many tickets have material for a session of this size."""
        return len(await asyncio.to_thread(self._store.ready, self._binding(size, peer)))

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

    async def discard(self, ticket: str) -> None:
        """Destroy a ticket whose other half is gone."""
        await asyncio.to_thread(self._store.discard, bytes.fromhex(ticket))


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
    """A ticket while its parts are computed, in their order."""

    def __init__(self, growth: Growth, total: int, size: Size) -> None:
        self._growth, self.total, self.size = growth, total, size

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
            told = np.array([self.size.tokens, self.size.passes, cost.bytes, round(cost.seconds * 1e3)], np.uint64)
            arrays = {**load_file(path), _TOLD: told}
            os.unlink(path)  # first: whoever is killed here leaves no copy of what the store has
            self._growth.add(_name(number), arrays)

        await asyncio.to_thread(keep)

    async def finish(self) -> None:
        """All parts are there."""
        if await self.done() != self.total:
            raise UserError("material is missing at the end of its preparation")
        await asyncio.to_thread(self._growth.finish)


def _name(number: int) -> str:
    return f"{number:06d}"
