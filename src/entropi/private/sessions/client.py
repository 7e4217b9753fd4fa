"""The prompt owner's side: ask a server, run this side's party, receive what nobody else can read."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from entropi.errors import UserError
from entropi.private.compute.description import Description
from entropi.private.compute.settings import Settings, trust
from entropi.private.preparation.store import Store
from entropi.private.sessions.batch import Batch, generate_all
from entropi.private.sessions.client_session import generate
from entropi.private.sessions.conversation import Conversation
from entropi.private.sessions.drafting import Drafter, drafter_of
from entropi.private.sessions.generation import Answer, Generation, Watcher
from entropi.private.sessions.privacy import USUAL, Privacy
from entropi.private.sessions.sampling import GREEDY, Sampling
from entropi.private.sessions.tokenization import check_prompt
from entropi.private.wire.certificates import Tls
from entropi.private.wire.channel import (
    ServerAddress,
    greet,
)
from entropi.private.wire.messages import (
    MAX_TOKENS,
    Canary,
    Welcome,
)


def connect(server: str, tls: Tls | None = None) -> Connection:
    """Greet a server and learn what it makes public.

    Args:
        server: "HOST:PORT" of a running server.
        tls: this client's files; needed unless the server is on this machine, at a loopback address.

    Raises:
        UserError: nobody there, not an entropi server, a certificate that is not accepted; one line.
    """
    where = ServerAddress.at(server, tls)
    return Connection(where, asyncio.run(greet(where)))


class Connection:
    """A server that can be asked; every question is a session of its own, and every conversation one."""

    def __init__(self, server: ServerAddress, welcome: Welcome) -> None:
        self._server, self._welcome = server, welcome

    @property
    def description(self) -> Description:
        """Architecture and sizes of the model."""
        return self._welcome.description

    @property
    def settings(self) -> Settings:
        """How the engines compute, and what they reveal."""
        return self._welcome.settings

    @property
    def prefix(self) -> list[int]:
        """Public tokens that the server puts before every prompt."""
        return list(self._welcome.prefix)

    @property
    def trust(self) -> str:
        """What each side learns, in words."""
        return trust(self._welcome.settings, len(self._welcome.prefix))

    @property
    def canary(self) -> Canary | None:
        """A public prompt and the answer to it that the owner published; see `canary.complaint`."""
        return self._welcome.canary

    def check_chat(self) -> None:
        """Raise `UserError` unless conversations with this server are possible."""
        if self._welcome.chat is None:
            raise UserError(f"the model of {self._server.name} has no chat template: `entropi ask` continues text")
        if not self._welcome.conversation_tokens:
            raise UserError(f"{self._server.name} allows no conversations: use `entropi ask --chat`")

    def ask(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        retries: int = 0,
        watcher: Watcher | None = None,
        privacy: Privacy = USUAL,
        memory_gb: float | None = None,
        chat: bool = False,
        system: str | None = None,
        store: Store | None = None,
        draft: str | Drafter | None = None,
    ) -> Answer:
        """Let the model continue `prompt` without showing it.

        Args:
            chat: put the prompt into the model's chat template, so that it is answered rather than continued.
            system: prompt that the chat begins with, as private as the other.
            store: of prepared material; used where the server has its half of it.
            draft: "ngram", or another `Drafter`: several tokens of the answer in a pass, see `drafting`.
            retries: so many times a session that broke is continued in a new one, with the tokens received so far
                as part of the prompt; each costs a pass over all of it.
            memory_gb: most memory of this side's party, in 10^9 bytes; by default what the model needs, with room;
                0 for no limit.

        Raises:
            UserError: a refusal, a server or link that dies, a server that serves another model by now; one line.
        """
        generation = Generation(
            prompt,
            max_new_tokens,
            sampling,
            retries,
            watcher or Watcher(),
            privacy,
            memory_gb,
            chat,
            store,
            system,
            drafter=drafter_of(draft),
        )
        generation.digest = self._welcome.digest()
        return asyncio.run(generate(self._server, generation))

    def ask_batch(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        retries: int = 0,
        watcher: Watcher | None = None,
        privacy: Privacy = USUAL,
        memory_gb: float | None = None,
        chat: bool = False,
        system: str | None = None,
        answered: Callable[[int, Answer], None] = lambda place, answer: None,
    ) -> list[Answer]:
        """The answers to several prompts, each the one it would have alone, by passes that they share.

        As many prompts as the server allows share a session, in their order; the others follow in further ones. Stages,
        bytes and seconds of an answer's record are those of all prompts that shared its passes.

        Args:
            prompts: of any lengths, each for as many new tokens.
            answered: called with the place of a prompt and its answer as soon as that is finished; what it was called
                with is not lost where a later session fails.

        Raises:
            UserError: as for `ask`; nothing is computed if one of the prompts cannot be asked.
        """
        if isinstance(prompts, str):  # each of its characters would be a prompt
            raise UserError("prompts is one text: give a list of texts, or use ask")
        for place, prompt in enumerate(prompts):
            check_prompt(prompt, f"prompt {place + 1}")
        generations = [
            Generation(
                prompt,
                max_new_tokens,
                sampling,
                retries,
                watcher or Watcher(),
                privacy,
                memory_gb,
                chat,
                system=system,
                digest=self._welcome.digest(),
            )
            for prompt in prompts
        ]
        return asyncio.run(generate_all(self._server, Batch(generations, answered)))

    def conversation(
        self,
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
    ) -> Conversation:
        """Messages and answers in one session, where a turn costs its own tokens only; see `Conversation`.

        Raises:
            UserError: options that have no meaning there.
        """
        return Conversation(
            self._server,
            self._welcome.digest(),
            chat=chat,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling,
            retries=retries,
            privacy=privacy,
            memory_gb=memory_gb,
            store=store,
            draft=draft,
        )

    def stream(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        retries: int = 0,
        privacy: Privacy = USUAL,
        draft: str | Drafter | None = None,
    ) -> Iterator[str]:
        """The pieces of the answer as they are received; closing the iterator ends the session.

        Raises:
            UserError: as for `ask`, after the pieces that were received.
        """
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        watcher = Watcher(text=pieces.put)
        generation = Generation(prompt, max_new_tokens, sampling, retries, watcher, privacy, drafter=drafter_of(draft))
        generation.digest = self._welcome.digest()
        loop = asyncio.new_event_loop()
        task = loop.create_task(generate(self._server, generation))

        def work() -> None:
            try:
                loop.run_until_complete(task)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)
            finally:
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(task.cancel)
            thread.join()


def ask(
    server: str,
    prompt: str,
    max_new_tokens: int,
    watcher: Watcher | None = None,
    *,
    tls: Tls | None = None,
    sampling: Sampling = GREEDY,
    retries: int = 0,
    privacy: Privacy = USUAL,
    memory_gb: float | None = None,
    chat: bool = False,
    system: str | None = None,
    store: Store | None = None,
    draft: str | Drafter | None = None,
) -> Answer:
    """`connect` and `Connection.ask` in one, over one connection.

    Raises:
        UserError: as for these.
    """
    generation = Generation(
        prompt,
        max_new_tokens,
        sampling,
        retries,
        watcher or Watcher(),
        privacy,
        memory_gb,
        chat,
        store,
        system,
        drafter=drafter_of(draft),
    )
    return asyncio.run(generate(ServerAddress.at(server, tls), generation))
