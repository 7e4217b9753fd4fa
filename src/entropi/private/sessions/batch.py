"""Several prompts in the passes of one session: the client's side.

A pass over a token of each of eight prompts waits for the line about as often as a pass over one token. Prompts may
have any lengths, and every answer is the one its prompt has alone. An answer that ends leaves the passes, so that the
server learns of each what it learns where prompts are asked one by one: how many tokens there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import msgspec
import numpy as np

from entropi.errors import UserError
from entropi.private.compute.layout import Layout
from entropi.private.compute.program import stages_of_pass
from entropi.private.compute.settings import trust
from entropi.private.sessions.client_session import ClientSession, with_retries
from entropi.private.sessions.generation import Answer, Generation
from entropi.private.sessions.memory import memory_for
from entropi.private.sessions.party_handle import Party
from entropi.private.wire.channel import ServerAddress, open_channel
from entropi.private.wire.messages import Next, Revealed, Start
from entropi.records import StageCommunication
from entropi.temporary import swept_folder


@dataclass
class Batch:
    """Prompts and what of their answers has been received, over as many sessions as it takes.

    Args:
        generations: alike but for their prompts.
        answered: called with the place of a prompt and its answer, as soon as that is finished.
    """

    generations: Sequence[Generation]
    answered: Callable[[int, Answer], None] = field(default=lambda place, answer: None)
    answers: dict[int, Answer] = field(default_factory=dict)  # by the places of their prompts
    done: int = 0  # operations, set-ups included

    @property
    def open(self) -> list[int]:
        """Places of prompts whose answers are not finished."""
        return [place for place in range(len(self.generations)) if place not in self.answers]

    def finish(self, place: int, answer: Answer) -> None:
        """Keep a finished answer, and pass it on."""
        self.answers[place] = answer
        self.answered(place, answer)


async def generate_all(server: ServerAddress, batch: Batch) -> list[Answer]:
    """All answers, in the order of their prompts."""

    async def ask() -> None:
        async with open_channel(server) as (http, socket):
            await BatchSession(server, http, socket, batch).run()

    while batch.open:
        await with_retries(batch.generations[batch.open[0]], ask)
    return [batch.answers[place] for place in range(len(batch.generations))]


class BatchSession(ClientSession):
    """As many of the prompts whose answers are not finished as the server lets share a session."""

    def __init__(
        self, server: ServerAddress, http: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, batch: Batch
    ) -> None:
        super().__init__(server, http, socket, batch.generations[batch.open[0]])
        self.batch, self.started = batch, time.monotonic()
        self.together: list[int] = []  # places of the prompts that share the next pass
        self.size = self.tokens = 0  # prompts that shared the first pass; new tokens of all of them
        self.layout: Layout

    async def run(self) -> None:
        """Ask, and receive tokens until every answer of this session is finished."""
        await self._learn()
        self._prepare_all()
        self.together = self._fitting()
        self.size = len(self.together)
        asked, welcome = [self.batch.generations[place] for place in self.together], self.welcome
        lengths, most = [len(one.ids) for one in asked], asked[0].left
        self.layout = Layout.first(lengths, len(welcome.prefix))
        with swept_folder("entropi-ask-") as folder:
            table = await self._fetch_table(folder) if welcome.table is not None else None
            await self.say(Start(lengths[0], most, welcome.digest(), others=lengths[1:]))
            accepted = await self.wait_for_slot()
            whole = [len(welcome.prefix) + length + most for length in lengths]
            several = whole if self.size > 1 else ()
            memory = memory_for(welcome.description, sum(whole), asked[0].memory_gb, prompts=several)
            tokens = [token for one in asked for token in one.ids]
            await self._compute(self._job(accepted, table, most, tokens, lengths[0], others=lengths[1:]), memory)

    def _prepare_all(self) -> None:
        """Encode all prompts, so that one that cannot be asked is told before anything is computed."""
        for place in self.batch.open:
            generation = self.batch.generations[place]
            try:
                self.prepare(generation)
            except UserError as error:
                raise UserError(f"prompt {place + 1}: {error}") from None
            generation.digest = self.welcome.digest()

    def _fitting(self) -> list[int]:
        """Places of the first prompts that may share a session: all with as many new tokens to come.

        One of them may be answered whatever it has; the server says what it does not allow.
        """
        found, tokens = list[int](), 0
        for place in self.batch.open:
            one = self.batch.generations[place]
            tokens += len(one.ids) + one.left
            full = len(found) == self.welcome.batch_prompts or tokens > self.welcome.batch_tokens
            if found and (full or one.left != self.batch.generations[found[0]].left):
                break
            found.append(place)
        return found

    def answer(self, seconds: float) -> Answer:
        """What was received of `generation`, beside the figures of all prompts that share the session."""
        found = super().answer(seconds)
        if self.size > 1:
            said = trust(self.welcome.settings, len(self.welcome.prefix), several=True)
            figures = dict(trust=said, batch_prompts=self.size, batch_tokens=self.tokens)
            found.record = msgspec.structs.replace(found.record, **figures)
        return found

    async def _receive(self, revealed: Revealed, party: Party) -> bool:
        """Take a token of each prompt; go on with those whose answers are not finished."""
        rows, logits, tokens = len(self.together), [None] * len(self.together), [None] * len(self.together)
        if revealed.logits is not None:
            logits = list(np.asarray(revealed.logits).reshape(rows, -1))
        if revealed.tokens is not None:
            tokens = np.asarray(revealed.tokens).reshape(rows, -1).tolist()
        for place, row, likeliest in zip(self.together, logits, tokens):
            self.generation = self.batch.generations[place]
            self.generation.reveal_bytes += revealed.bytes
            self._take_one(0, row, msgspec.structs.replace(revealed, tokens=likeliest), self.welcome.settings)
        self.tokens += rows

        ended = [n for n, place in enumerate(self.together) if self.batch.generations[place].is_finished]
        for n in ended:
            self.generation = self.batch.generations[self.together[n]]
            self.batch.finish(self.together[n], self.answer(time.monotonic() - self.started))
        staying = [n for n in range(rows) if n not in ended]
        if not staying:
            return False
        self.together = [self.together[n] for n in staying]
        self.layout = self.layout.of(staying).following()
        self.generation = self.batch.generations[self.together[0]]
        await self.say(Next(ended=ended))
        fresh = [self.batch.generations[place].new_tokens[-1] for place in self.together]
        await party.proceed(tokens=fresh, ended=ended)
        return True

    def _begin(self, fresh: int, *, set_up: bool = False) -> None:
        """Tell the watcher how many operations are to come."""
        model, settings, generation = self.welcome.description, self.welcome.settings, self.generation

        def stages(layout: Layout) -> int:
            return sum(1 for _ in stages_of_pass(model, settings, layout.tokens, layout.before, layout=layout))

        total = int(set_up) + stages(self.layout) + (generation.left - 1) * stages(self.layout.following())
        generation.watcher.begin(self.batch.done + total)

    def _note(self, communication: StageCommunication) -> None:
        """Note an operation for every prompt that shares it; the watcher is told once."""
        for place in self.together:
            self.batch.generations[place].note(communication)
        self.batch.done += 1
        self.generation.watcher.stage(self.batch.done, communication)
