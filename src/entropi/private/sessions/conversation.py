"""A conversation: messages and answers in one session, whose keys and values stay shared between them.

A turn then costs its own tokens, and no set-up. When a session ends, because it broke, because a time limit was reached
or because its tokens are used up, the next message opens another, which reads the conversation again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from types import TracebackType

import numpy as np

from entropi.errors import UserError
from entropi.private.preparation.store import Store
from entropi.private.sessions.client_session import ClientSession, with_retries
from entropi.private.sessions.drafting import Drafter, Window, drafter_of
from entropi.private.sessions.generation import Answer, Generation, Watcher
from entropi.private.sessions.privacy import USUAL, Privacy
from entropi.private.sessions.sampling import GREEDY, Sampling
from entropi.private.wire.channel import LostServer, RefusedByServer, ServerAddress, open_channel
from entropi.private.wire.messages import MAX_TOKENS

CLOSING_SECONDS = 5.0  # for a session to end by itself


class Conversation:
    """Messages to a server and its answers, one after the other; use as a context manager, or `close` it.

    Its methods may be called from one thread at a time, but for `stop`, which is for another thread or for a signal.

    Args:
        digest: of what the server made public; a server that serves something else by now is not asked.
        chat: messages are put into the model's chat template; without it, text is continued.
        system: prompt that the conversation begins with, as private as the messages.
        max_tokens: of messages and answers together, in one session, as far as the server allows it.
        retries: so many times an answer whose session broke is continued in a new one.
        draft: "ngram", or another `Drafter`: several tokens of an answer in a pass, see `drafting`.

    Raises:
        UserError: options that have no meaning here.
    """

    def __init__(
        self,
        server: ServerAddress,
        digest: str | None = None,
        *,
        chat: bool = True,
        system: str | None = None,
        max_tokens: int = MAX_TOKENS,
        sampling: Sampling = GREEDY,
        retries: int = 1,
        privacy: Privacy = USUAL,
        memory_gb: float | None = None,
        store: Store | None = None,
        draft: str | Drafter | None = None,
    ) -> None:
        if privacy.full_length:
            raise UserError("full_length has no place in a conversation: what follows an answer's end would be read on")
        if system is not None and not chat:
            raise UserError("a system prompt has its place in a chat template only")
        if not 2 <= max_tokens <= MAX_TOKENS:
            raise UserError(f"max_tokens is {max_tokens} but must be between 2 and {MAX_TOKENS:,}")
        self.max_tokens = max_tokens
        self._server, self._digest, self._chat, self._system = server, digest, chat, system
        self._sampling, self._retries, self._privacy, self._memory_gb = sampling, retries, privacy, memory_gb
        self._store, self._drafter, self._window = store, drafter_of(draft), Window()
        self._random = np.random.default_rng(sampling.seed)  # of all answers
        self._history: list[int] = []
        self._generation: Generation | None = None  # that is being answered
        self._session: ClientSession | None = None
        self._task: asyncio.Task[None] | None = None  # of the session
        self._answered: asyncio.Future[None]
        self._waiting: asyncio.Queue[Generation | None]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def tokens(self) -> list[int]:
        """Ids of all tokens so far, those of the chat template included, without the server's public prefix."""
        return list(self._history)

    def say(self, message: str, max_new_tokens: int = 256, watcher: Watcher | None = None) -> Answer:
        """The answer to a message; the conversation is as it was before if there is none.

        Raises:
            UserError: a refusal, a server or link that dies, a message that does not fit; one line.
        """
        generation = Generation(
            message,
            max_new_tokens,
            self._sampling,
            self._retries,
            watcher or Watcher(),
            self._privacy,
            memory_gb=self._memory_gb,
            digest=self._digest,
            chat=self._chat,
            system=self._system,
            history=self.tokens,
            store=self._store,
            drafter=self._drafter,
            window=self._window,
        )
        generation.random = self._random
        self._generation = generation
        work = asyncio.run_coroutine_threadsafe(self._answer(generation), self._loop)
        try:
            answer = work.result()
        except BaseException:
            work.cancel()
            raise
        finally:
            self._generation = None
        self._digest, self._history = generation.digest, generation.ids
        return answer

    def stop(self) -> None:
        """Let the token that is being computed be the last of the running answer; the conversation goes on."""
        if (generation := self._generation) is not None:
            generation.stopped = True

    def close(self) -> None:
        """End the session, if there is one."""
        if self._thread.is_alive():
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(2 * CLOSING_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def following(self) -> Generation | None:
        """See `Turns`: called by the session that has answered everything so far."""
        self._answered.set_result(None)
        return await self._waiting.get()

    async def _answer(self, generation: Generation) -> Answer:
        started = time.monotonic()

        async def ask() -> Answer:
            try:
                await self._ask(generation)
            except (LostServer, RefusedByServer, asyncio.CancelledError):
                await self._end()  # also where nobody wants this answer, which the session would go on with
                raise
            assert self._session is not None
            return self._session.answer(time.monotonic() - started)

        return await with_retries(generation, ask)

    async def _ask(self, generation: Generation) -> None:
        """Have a generation answered by the session, or by a new one where there is none or where it has no room."""
        if self._task is not None and self._session is not None and not self._task.done():
            self._session.prepare(generation)
            if not self._session.has_room(generation):
                generation.watcher.status("the session's tokens are used up: another one reads the conversation again")
                await self._end()
        elif self._task is not None:
            generation.watcher.status(f"{await self._why_ended()}: another session reads the conversation again")
        self._answered = asyncio.get_running_loop().create_future()
        if self._task is None:
            self._waiting = asyncio.Queue()
            self._task = asyncio.create_task(self._hold(generation))
        else:
            self._waiting.put_nowait(generation)
        await asyncio.wait({self._task, self._answered}, return_when=asyncio.FIRST_COMPLETED)
        if not self._answered.done():
            task, self._task = self._task, None
            task.result()  # raises what ended it

    async def _hold(self, generation: Generation) -> None:
        """A session, from its first message to its end."""
        async with open_channel(self._server) as (http, socket):
            self._session = ClientSession(self._server, http, socket, generation, self)
            await self._session.run()

    async def _why_ended(self) -> str:
        """What a session that nobody waited for ended with."""
        assert self._task is not None
        task, self._task = self._task, None
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        return str(ended) if isinstance(ended, UserError) else "the session ended"

    async def _end(self) -> None:
        """End the session, at once if it is computing."""
        if self._task is None:
            return
        task, self._task = self._task, None
        if self._answered.done():
            self._waiting.put_nowait(None)
            await asyncio.wait({task}, timeout=CLOSING_SECONDS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
