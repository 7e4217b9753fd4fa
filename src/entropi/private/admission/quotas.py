"""Holds clients to the sessions and tokens that their certificates may have, as a `quota_stores.Store` counts them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator

from entropi.errors import UserError
from entropi.private.admission.limits import Limits
from entropi.private.admission.quota_stores import Store, StoreFailed
from entropi.private.wire.server_channel import Refusal, SessionError

RENEW_SECONDS = 5.0
ENDING_SECONDS = 3.0  # for a client's session before, whose answer it has, to end


class Quota:
    """Holds clients to their limits; those without a certificate are on this machine, and free.

    Args:
        limits: `client_sessions` and `client_tokens`.
        store: None where neither limits anybody.
    """

    def __init__(self, limits: Limits, store: Store | None) -> None:
        self._limits, self._store = limits, store

    @contextlib.asynccontextmanager
    async def session(self, client: str, new_tokens: int) -> AsyncIterator[Usage]:
        """Count a session while it waits and computes.

        Raises:
            Refusal: the client has no right to it, or nobody can tell.
        """
        if self._store is None or not client:
            yield Usage(None, client, "")
            return

        session = secrets.token_hex(16)
        deadline = time.monotonic() + ENDING_SECONDS

        while True:
            try:
                denied = await self._store.begin(client, session, new_tokens, self._limits)
            except StoreFailed:
                raise Refusal("the server cannot tell what this client has used; try again later") from None
            if denied is None:
                break
            if not denied.passing or time.monotonic() > deadline:
                raise Refusal(denied.reason)
            await asyncio.sleep(ENDING_SECONDS / 10)

        renewing = asyncio.create_task(self._renew(client, session))
        try:
            yield Usage(self._store, client, session)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            with contextlib.suppress(StoreFailed):  # its lease ends by itself
                await self._store.end(client, session)

    async def _renew(self, client: str, session: str) -> None:
        assert self._store is not None
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            with contextlib.suppress(StoreFailed):  # `count` tells
                await self._store.renew(client, session)

    async def check(self) -> None:
        """Ask the store for something.

        Raises:
            UserError: it does not answer.
        """
        if self._store is not None:
            try:
                await self._store.end("", "")
            except StoreFailed as error:
                raise UserError(f"the quota store does not answer: {error}") from None

    async def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            await self._store.close()


class Usage:
    """One session's part of a quota."""

    def __init__(self, store: Store | None, client: str, session: str) -> None:
        self._store, self._client, self._session = store, client, session

    async def count_token(self) -> None:
        """Note that a token was generated just now.

        Raises:
            SessionError: nobody can note it.
        """
        if self._store is not None:
            try:
                await self._store.count(self._client, self._session)
            except StoreFailed:
                raise SessionError("the server cannot note what this client uses; try again later") from None
