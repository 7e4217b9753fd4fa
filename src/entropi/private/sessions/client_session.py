"""A client's sessions: handshake, this side's party, tokens one by one; as many as one answer takes."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropi.chat import ChatForm, ids_of
from entropi.console import without_controls
from entropi.errors import UserError
from entropi.private.compute.folded import sha256_of
from entropi.private.compute.program import stages_of_pass, warms_up
from entropi.private.compute.settings import CLIENT, Settings, trust
from entropi.private.preparation.claims import Claim
from entropi.private.sessions.drafting import NOTHING, Draft
from entropi.private.sessions.generation import Answer, Generation
from entropi.private.sessions.inquiry import usable
from entropi.private.sessions.material import Material, Size, Taken
from entropi.private.sessions.memory import memory_for, unread_for
from entropi.private.sessions.party_handle import Party
from entropi.private.sessions.party_session import LINK_SECONDS, PartySession
from entropi.private.sessions.plausibility import implausible
from entropi.private.sessions.tokenization import (
    Encoder,
)
from entropi.private.wire.channel import (
    HANDSHAKE_SECONDS,
    LostServer,
    RefusedByServer,
    ServerAddress,
    open_channel,
    welcome_from,
)
from entropi.private.wire.messages import (
    MAX_TOKENS,
    Accepted,
    Failed,
    Job,
    Linked,
    Next,
    Revealed,
    StageDone,
    Start,
    Welcome,
)
from entropi.private.wire.tunnel import Tunnel
from entropi.records import PrivateRun, StageCommunication
from entropi.temporary import swept_folder

T = TypeVar("T")
RETRY_SECONDS = 1.0  # before the first retry; doubled before every further one


async def generate(server: ServerAddress, generation: Generation) -> Answer:
    """The answer to one question, in as many sessions as it may take."""
    started = time.monotonic()

    async def ask() -> Answer:
        async with open_channel(server) as (http, socket):
            session = ClientSession(server, http, socket, generation)
            await session.run()
            return session.answer(time.monotonic() - started)

    return await with_retries(generation, ask)


async def with_retries(generation: Generation, ask: Callable[[], Awaitable[T]]) -> T:
    """What `ask` returns, which is called again, as often as the generation says, where a session broke."""
    for attempt in itertools.count():
        try:
            return await ask()
        except (LostServer, RefusedByServer) as error:
            # Another server may still count the session that broke as under way, or be just starting.
            if attempt == generation.retries or (isinstance(error, RefusedByServer) and attempt == 0):
                raise
            generation.watcher.status(f"{error}; retry {attempt + 1} of {generation.retries}")
            await asyncio.sleep(RETRY_SECONDS * 2**attempt)
    raise AssertionError


def _in_words(welcome: Welcome) -> str:
    """What the server would compute with the client, for people: architecture, softmax and precision."""
    settings = welcome.settings
    form = welcome.description.computed_softmax(settings.exact_softmax_as)
    return f"{welcome.description.architecture} with the {form.words} and {settings.fraction_bits} fraction bits"


class Turns(Protocol):
    """What a session asks for the next message of its conversation."""

    max_tokens: int  # that the conversation may have, as far as the server allows it

    async def following(self) -> Generation | None:
        """The next message, `prepare`d, once there is one; None at the end. The one before it is answered."""


class ClientSession(PartySession):
    """As much of a generation as one connection answers; in a conversation, of as many as there are `turns`."""

    def __init__(
        self,
        server: ServerAddress,
        http: aiohttp.ClientSession,
        socket: aiohttp.ClientWebSocketResponse,
        generation: Generation,
        turns: Turns | None = None,
    ) -> None:
        super().__init__(server, socket, generation.watcher.status)
        self.http, self.generation, self.turns = http, generation, turns
        self.read = 0  # tokens whose keys and values the session has
        self.room = 0  # tokens that the server still lets it read or generate
        self.passes: int | None = None  # logits that prepared material is left for
        self.drafts = 0  # tokens that the server still lets it drop
        self.draft, self.held = NOTHING, 0  # of the latest pass, and how many of these tokens held
        self.claim: Claim | None = None  # on the ticket that is offered
        self.welcome: Welcome
        self.tokenizer: Encoder

    async def run(self) -> None:
        """Ask, and receive tokens into the generation until there are no more to come."""
        generation = self.generation
        await self._learn()
        self._check_drafts()
        self.prepare(generation)
        ids, welcome = generation.ids, self.welcome
        most = self._room(generation, len(ids))

        with swept_folder("entropi-ask-") as folder:
            table = await self._fetch_table(folder) if welcome.table is not None else None
            ticket, most, passes = await self._ticket(len(welcome.prefix) + len(ids), most)
            length, drafts = len(welcome.prefix) + len(ids) + most, self.drafts
            used = generation.left if self.turns is not None else most  # passes, at least
            try:
                await self.say(Start(len(ids), most, welcome.digest(), self.turns is not None, ticket, drafts))
                accepted = await self.wait_for_slot()
                taken = await self._material(ticket, Size(length - 1 + drafts, used + drafts), accepted)
            finally:
                if self.claim is not None:
                    self.claim.release()
            memory = memory_for(
                welcome.description,
                length,
                generation.memory_gb,
                taken.nbytes if taken else 0,
                draft_tokens=welcome.draft_tokens if drafts else 0,
            )
            job = self._job(accepted, table, most, ids, len(ids), drafts=drafts)
            self.read, self.room = len(ids), most - 1
            self.passes = passes - 1 if taken is not None else None
            await self._compute(job, memory, taken)

    def _job(
        self, accepted: Accepted, table: Path | None, most: int, tokens: list[int], prompt_length: int, **more: Any
    ) -> Job:
        """This side's part of a session, but for the engine's link; `tokens` are those of all prompts."""
        welcome = self.welcome
        return Job(
            rank=CLIENT,
            session=accepted.session,
            links=("", ""),
            description=welcome.description,
            settings=welcome.settings,
            max_new_tokens=most,
            prompt_length=prompt_length,
            prompt=tokens,
            prefix_length=len(welcome.prefix),
            table=str(table) if table is not None else None,
            **more,
        )

    async def _compute(self, job: Job, memory: int | None, taken: Taken | None = None) -> None:
        """Run this side's party on a job, and carry its engine's link, until everything is received."""
        async with Tunnel(CLIENT, job.session, self.socket.send_bytes, unread_for(memory)) as tunnel:
            party = await Party.start(msgspec.structs.replace(job, links=tunnel.links), memory, taken)
            await self.finish(party, tunnel, self._generate(party))

    async def _learn(self) -> None:
        """Take what the server makes public, and refuse what this client does not accept of it."""
        generation = self.generation
        welcome = self.welcome = await welcome_from(self.socket, self.where)
        if generation.digest not in (None, welcome.digest()):
            raise UserError(f"{self.where} serves another model than when the question was begun")
        if generation.digest is None:
            generation.watcher.status(f"{self.where} proposes {_in_words(welcome)}")
        generation.digest = welcome.digest()
        if generation.sampling.temperature and welcome.settings.output == "argmax":
            raise UserError(f"{self.where} reveals the likeliest token only: there is nothing to sample from")

        self.tokenizer = generation.privacy.encoder(welcome.tokenizer, welcome.description.vocab_size, self.where)
        self._check_prefix()

    async def _ticket(self, known: int, most: int) -> tuple[str | None, int, int]:
        """Prepared material to offer the server, if there is any; how many tokens may follow the `known` ones; passes.

        A conversation takes the largest there is for its next answer, and has as many tokens. How many drafts may be
        dropped is noted: as many as there are new tokens, or what the material has room for.
        """
        self.drafts = most if self.generation.drafter is not None else 0
        if self.generation.store is None:
            return None, most, 0
        self.material = Material(self.generation.store, self.welcome)
        talks = self.turns is not None
        wanted = self.generation.left if talks else most
        size = Size(known + wanted - 1, wanted)
        found = await self.material.fitting(size, self.where)
        if not found:
            if smaller := await self.material.fitting(Size(1, 1), self.where):
                largest = smaller[-1][1]
                self.status(
                    f"what is prepared is too small, for {largest.tokens} tokens and {largest.passes} new ones of "
                    f"these: {size.tokens} and {wanted} are asked for, and everything is computed now"
                )
            return None, most, 0
        if self.drafts and not talks:  # those with room for all drafts that may be dropped come first
            found.sort(key=lambda one: one[1].tokens < size.tokens + wanted or one[1].passes < 2 * wanted)
        said: list[str] = []
        found = await usable(self.material, self.socket, self.where, found[::-1] if talks else found, said.append)
        for line in said:
            self.status(line if found else f"{line}; going on without")
        for ticket, own in found:
            if (claim := await self.material.claim(ticket, own, self.where)) is not None:
                self.claim = claim
                room = own.tokens - known + 1
                self._share_drafts(min(room, own.passes) - wanted, wanted, most)
                return ticket, min(most, room - self.drafts), own.passes
        return None, most, 0

    def _share_drafts(self, spare: int, wanted: int, most: int) -> None:
        """Note how many drafts may be dropped where material has a place for so many tokens beside the wanted ones."""
        if not self.drafts:
            return
        self.drafts = min(spare // 2 if self.turns is not None else spare, most)
        if self.drafts < wanted:
            self.status(
                f"what is prepared has room for {self.drafts} drafts that do not hold, and for {wanted} new tokens as "
                "many may be needed (entropi prepare --draft-tokens): after these there are no more drafts"
            )

    async def _material(self, ticket: str | None, size: Size, accepted: Accepted) -> Taken | None:
        """This side's half of the ticket, if the server has taken its own."""
        if ticket is None:
            if accepted.prepared:
                raise UserError(f"{self.where} does not follow the protocol")
            return None
        if accepted.prepared:
            taken = await self.material.take(ticket, size, self.where)
            self.generation.prepared_bytes += taken.moved
            self.generation.prepared_seconds += taken.seconds
            return taken
        await self.material.discard(ticket)  # which the server had a moment ago, and may have taken
        self.status(f"{self.where} has lost its half of what was prepared: going on without")
        return None

    def prepare(self, generation: Generation) -> None:
        """Encode what is asked, and fill it up to the length that the server is to see.

        Raises:
            UserError: what this model cannot be asked.
        """
        generation.stop_ids = self.tokenizer.ids_of(generation.privacy.stop_tokens)
        if (
            generation.chat
            and generation.privacy.stop_tokens is None
            and (end := self._form(generation).end) is not None
        ):
            generation.stop_ids.append(end)
        generation.prompt_ids = self._encode_prompt(generation)
        generation.padding = self._padding(generation)

    def has_room(self, generation: Generation) -> bool:
        """Whether this session may still read a prepared generation and generate as much as it asks for."""
        if self.passes is not None and generation.left > self.passes:
            return False
        return len(generation.ids) - self.read + generation.left - 1 <= self.room

    def _room(self, generation: Generation, length: int) -> int:
        """Tokens to ask the server for beside the `length` first ones."""
        if self.turns is None:
            return generation.left
        allowed = self.welcome.conversation_tokens
        if not allowed:
            raise UserError(f"{self.where} allows no conversations: use `entropi ask`")
        most = min(allowed, self.turns.max_tokens, self._positions + 1)
        if most - length < generation.left:
            raise UserError(
                f"the conversation has {length} tokens by now and may have {most}, the {generation.left} of the next "
                "answer included: begin another"
            )
        return most - length

    def answer(self, seconds: float) -> Answer:
        """What was received, `seconds` after the question was begun."""
        generation, settings = self.generation, self.welcome.settings
        return Answer(
            PrivateRun(
                protocol=settings.protocol,
                trust=trust(settings, len(self.welcome.prefix), drafts=generation.drafted > 0),
                server=self.where,
                prompt=generation.prompt,
                prompt_tokens=generation.prompt_ids,
                new_tokens=generation.new_tokens,
                new_text=self.tokenizer.decode(generation.answer_ids),
                padding_tokens=len(generation.padding),
                prefix_tokens=len(self.welcome.prefix),
                past_tokens=len(generation.history),
                drafted_tokens=generation.drafted,
                held_tokens=generation.held,
                prepared_bytes=generation.prepared_bytes,
                prepared_seconds=generation.prepared_seconds,
                stages=generation.stages,
                setup_seconds=generation.setup_seconds,
                setup_bytes=generation.setup_bytes,
                reveal_bytes=generation.reveal_bytes,
                seconds=seconds,
                ring_bits=settings.ring_bits,
                fraction_bits=settings.fraction_bits,
                softmax=str(self.welcome.description.computed_softmax(settings.exact_softmax_as)),
            ),
            generation.logits,
        )

    def _encode_prompt(self, generation: Generation) -> list[int]:
        wanted, past = generation.max_new_tokens, len(generation.history)
        most = self._positions + 1  # the last new token is not read again
        if generation.chat:
            ids = self._encode_message(generation, most)
        else:
            ids = self.tokenizer.encode(generation.prompt, most)
        self._check_known(ids)
        if past + len(ids) + wanted > most:
            before = f" after {past} of the conversation" if past else ""
            raise UserError(
                f"the prompt has {len(ids)} tokens{before} and {wanted} new ones are asked for, but this server takes "
                f"at most {most} tokens, the new ones included"
            )
        return ids

    def _encode_message(self, generation: Generation, most: int) -> list[int]:
        """Token ids of a message and of what stands around it, but for what the public prefix says already."""
        last = generation.history[-1] if generation.history else None
        pieces = self._form(generation).turn(generation.prompt, last, begins=not generation.history)
        ids = ids_of(pieces, lambda text: self.tokenizer.encode(text, most))
        prefix = self.welcome.prefix
        said = not generation.history and ids[: len(prefix)] == prefix
        return ids[len(prefix) :] if said else ids

    def _form(self, generation: Generation) -> ChatForm:
        form = self.welcome.chat
        if form is None:
            raise UserError(f"the model of {self.where} has no chat template: it continues text (ask without --chat)")
        # Of a word of answers, an end would tell the server where that word is.
        if not form.special <= self.tokenizer.special_ids():
            raise UserError(f"{self.where} sent a chat template with special tokens that its tokenizer does not have")
        return form if generation.system is None else form.with_system(generation.system)

    @property
    def _positions(self) -> int:
        """Those that the public prefix leaves."""
        return self.welcome.description.positions - len(self.welcome.prefix)

    def _check_drafts(self) -> None:
        """Raise `UserError` if there are to be drafts and this server takes none, or not these."""
        welcome, drafter = self.welcome, self.generation.drafter
        if drafter is None:
            return
        if not welcome.draft_tokens:
            why = "" if welcome.settings.output == "logits" else ", as it reveals likeliest tokens only"
            raise UserError(f"{self.where} takes no drafts{why}: ask without --draft")
        drafter.check(self.tokenizer.tokenizer, self.where)

    def _check_prefix(self) -> None:
        """Say what public text this server puts before every prompt, and raise `UserError` if there must be none."""
        welcome, generation = self.welcome, self.generation
        if not welcome.prefix:
            return
        self._check_known(welcome.prefix)
        text = repr(self.tokenizer.decode(welcome.prefix))
        shown = without_controls(text if len(text) < 200 else f"{text[:200]}...")
        what = f"a public text of {len(welcome.prefix)} tokens before every prompt: {shown}"
        if generation.privacy.no_prefix:
            raise UserError(f"{self.where} puts {what}")
        generation.watcher.status(f"{self.where} puts {what}")

    def _check_known(self, ids: list[int]) -> None:
        """Raise `UserError` for tokens that the model does not have."""
        if max(ids) >= self.welcome.description.vocab_size:
            own = self.generation.privacy.tokenizer is not None
            who = "--tokenizer is one" if own else f"{self.where} sent a tokenizer"
            raise UserError(f"{who} that does not belong to its model: it has a token more than the model's vocabulary")

    def _padding(self, generation: Generation) -> list[int]:
        """What fills a prompt up to the length that the server is to see."""
        length = len(generation.prompt_ids)
        wanted = -length % generation.privacy.pad_to
        if not wanted:
            return []
        if len(generation.history) + length + wanted + generation.max_new_tokens > self._positions + 1:
            raise UserError(
                f"the prompt has {length} tokens, and filled up to {length + wanted} it leaves no room for "
                f"{generation.max_new_tokens} new ones in this model"
            )

        if generation.privacy.pad_text is not None:
            fill = self.tokenizer.encode(generation.privacy.pad_text, MAX_TOKENS)
        else:
            fill = (self.tokenizer.ids_of(None) or generation.stop_ids)[:1]

        if not fill:
            raise UserError("the tokenizer has no token that ends a text: say what to fill up with by --pad-with")
        self._check_known(fill)
        return (fill * -(-wanted // len(fill)))[-wanted:]

    async def _fetch_table(self, folder: Path) -> Path:
        """The public token embeddings, `(V, d)`; all clients fetch the same, whatever they ask."""
        path, shape = folder / "table.safetensors", self.welcome.description.weight_shapes()["embedding"]
        most, received = 4 * shape[0] * shape[1] + (1 << 16), 0
        self.generation.watcher.status("fetching the public token embeddings")
        async with self.http.get(f"{self.server.url}/v1/table", allow_redirects=False) as response:
            with open(path, "wb") as file:
                while part := await asyncio.wait_for(response.content.read(1 << 20), HANDSHAKE_SECONDS):
                    received += len(part)
                    if received > most:
                        break
                    file.write(part)

        try:
            fits = sha256_of(path) == self.welcome.table and load_file(path)["embedding"].shape == shape
        except (SafetensorError, KeyError, AttributeError):
            fits = False

        if not fits:
            raise UserError(f"{self.where} sent token embeddings that do not belong to its model")
        return path

    async def _generate(self, party: Party) -> None:
        self._begin(self.read, set_up=True)
        try:
            event = await asyncio.wait_for(party.event(), LINK_SECONDS)
        except asyncio.TimeoutError:
            raise LostServer(f"no engine link with {self.where} within {LINK_SECONDS} s") from None

        while event is not None:
            match event:
                case Linked():
                    pass
                case StageDone(communication):
                    communication.token = len(self.generation.new_tokens)
                    self._note(communication)
                case Revealed():
                    if not await self._receive(event, party):
                        return
                case Failed(reason):
                    raise LostServer(f"the private computation with {self.where} failed: {reason}")
            event = await party.event()
        raise LostServer(f"the private computation with {self.where} ended early")

    async def _receive(self, revealed: Revealed, party: Party) -> bool:
        """Take what a pass has revealed, and ask for another one; False where there is none to ask for."""
        self._take(revealed, self.welcome.settings)
        self._show()
        if self.generation.is_finished and not await self._is_continued():
            return False
        await self._go_on(party)
        return True

    async def _go_on(self, party: Party) -> None:
        """Ask for the pass over the tokens that were not read yet, and over drafts of those behind them."""
        fresh, dropped = self.generation.ids[self.read :], len(self.draft.tokens) - self.held
        if self.held:
            self._begin(len(fresh))
        kept, self.draft = self.held, await self._drafts()
        drafts = self.draft.tokens
        count = len(fresh) + len(drafts)
        self.read, self.room, self.held = self.read + len(fresh), self.room - count, 0
        if self.passes is not None:
            self.passes -= 1 + len(drafts)
        await self.say(Next(count, len(drafts), kept))
        await party.proceed(count, fresh + drafts, drafts=len(drafts), dropped=dropped)

    async def _drafts(self) -> Draft:
        """A draft for the next pass, as long as the answer, the server and what is prepared leave room for."""
        generation = self.generation
        most = min(self.welcome.draft_tokens, generation.window.size, generation.left - 1, self.drafts)
        if self.passes is not None:
            most = min(most, self.passes - generation.left)
        if generation.drafter is None or most < 1 or generation.stopped:
            return NOTHING
        ids = [*self.welcome.prefix, *generation.ids]
        arguments = ids, most, self.welcome.description.vocab_size, generation.sampling, generation.random
        return await asyncio.to_thread(generation.drafter.draft, *arguments)

    async def _is_continued(self) -> bool:
        """Wait for the next message of a conversation; False where there is none."""
        following = await self.turns.following() if self.turns is not None else None
        if following is None:
            return False
        self.generation = following
        self._begin(len(following.ids) - self.read)
        return True

    def _begin(self, fresh: int, *, set_up: bool = False) -> None:
        """Tell the watcher how many operations are to come, the first pass being over so many tokens."""
        model, generation = self.welcome.description, self.generation
        past, prepared = len(generation.ids) - fresh, self.passes is not None

        def stages(new: int, past: int) -> int:
            return sum(1 for _ in stages_of_pass(model, self.welcome.settings, new, past, prepared=prepared))

        total = (
            int(set_up and warms_up(self.welcome.settings.chooses, prepared=prepared))
            + stages(fresh, past)
            + (generation.left - 1) * stages(1, past + fresh)
        )
        generation.watcher.begin(generation.done + total)

    def _note(self, communication: StageCommunication) -> None:
        generation = self.generation
        generation.note(communication)
        generation.watcher.stage(generation.done, communication)

    def _take(self, revealed: Revealed, settings: Settings) -> None:
        """Choose the next token, and as long as these are the drafts, those after them."""
        generation, drafts = self.generation, self.draft.tokens
        generation.reveal_bytes += revealed.bytes
        logits = None
        if revealed.logits is not None:
            logits = np.asarray(revealed.logits).reshape(1 + len(drafts), -1)
        self.held = 0
        for place in range(1 + len(drafts)):
            self._take_one(place, None if logits is None else logits[place], revealed, settings)
            if place == len(drafts) or generation.new_tokens[-1] != drafts[place]:
                break
            self.held += 1
            if generation.is_finished:
                break
        dropped = len(drafts) - self.held
        self.read, self.room, self.drafts = self.read + self.held, self.room + dropped, self.drafts - dropped
        generation.drafted, generation.held = generation.drafted + len(drafts), generation.held + self.held
        generation.window.note(len(drafts), self.held)

    def _take_one(self, place: int, logits: np.ndarray | None, revealed: Revealed, settings: Settings) -> None:
        """Keep what is revealed of a token, the one after so many drafts, and choose it."""
        generation, vocab_size = self.generation, self.welcome.description.vocab_size
        if logits is not None and (why := implausible(logits, settings)):
            raise UserError(
                f"token {len(generation.new_tokens) + 1} from {self.where} would be nonsense: {why}. A value left the "
                "range of its fixed-point numbers; its owner can prepare for such text with serve --calibration-text"
            )
        if settings.output == "logits":
            assert logits is not None
            token = self.draft.verified(place, logits, generation.sampling, generation.random)
        else:
            assert revealed.tokens is not None
            if not all(0 <= choice < vocab_size for choice in revealed.tokens):
                raise UserError(f"the private computation with {self.where} failed: a token outside the vocabulary")
            token = revealed.tokens[0 if logits is None else generation.sampling.choose(logits, generation.random)]

        if logits is not None:
            generation.logits.append(logits)
        generation.new_tokens.append(token)

    def _show(self) -> None:
        """Pass on what can be shown of the answer by now."""
        generation = self.generation
        text = self.tokenizer.decode(generation.answer_ids)
        if generation.is_finished or not text.endswith("\ufffd"):  # half of a character waits for its other bytes
            generation.watcher.text(text[len(generation.shown) :])
            generation.shown = text
