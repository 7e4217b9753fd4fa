"""A client's sessions: handshake, this side's party, tokens one by one; as many as one answer takes."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import aiohttp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropi.console import without_controls
from entropi.errors import UserError
from entropi.private.compute.folded import sha256_of
from entropi.private.compute.program import stages_of_pass
from entropi.private.compute.settings import CLIENT, Settings, trust
from entropi.private.sessions.generation import Answer, Generation
from entropi.private.sessions.memory import memory_for, unread_for
from entropi.private.sessions.party_handle import Party
from entropi.private.sessions.tokenization import (
    Encoder,
)
from entropi.private.wire.channel import (
    HANDSHAKE_SECONDS,
    LAST_WORDS_SECONDS,
    LostServer,
    RefusedByServer,
    ServerAddress,
    decode,
    open_channel,
    receive,
    welcome_from,
)
from entropi.private.wire.messages import (
    MAX_TOKENS,
    Accepted,
    Failed,
    Job,
    Linked,
    Next,
    Queued,
    Refused,
    Revealed,
    StageDone,
    Start,
    Welcome,
    encode,
)
from entropi.private.wire.tunnel import LinkBroken, Tunnel
from entropi.records import PrivateRun, StageCommunication
from entropi.temporary import swept_folder

LINK_SECONDS = 60
GRACE_SECONDS = 3.0  # for a party to say why its link broke
RETRY_SECONDS = 1.0  # before the first retry; doubled before every further one


async def generate(server: ServerAddress, generation: Generation) -> Answer:
    started = time.monotonic()
    for attempt in itertools.count():
        try:
            async with open_channel(server) as (http, socket):
                session = ClientSession(server, http, socket, generation)
                await session.run()
                return session.answer(time.monotonic() - started)
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


class ClientSession:
    """As much of a generation as one connection answers."""

    def __init__(
        self,
        server: ServerAddress,
        http: aiohttp.ClientSession,
        socket: aiohttp.ClientWebSocketResponse,
        generation: Generation,
    ) -> None:
        self.server, self.where = server, server.name
        self.http, self.socket, self.generation = http, socket, generation
        self.welcome: Welcome
        self.tokenizer: Encoder

    async def run(self) -> None:
        """Ask, and receive tokens into the generation until there are no more to come."""
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
        generation.stop_ids = self.tokenizer.ids_of(generation.privacy.stop_tokens)
        generation.prompt_ids = self._encode_prompt()
        generation.padding = self._padding(len(generation.prompt_ids))

        ids = generation.padding + generation.prompt_ids + generation.new_tokens
        left = generation.max_new_tokens - len(generation.new_tokens)

        with swept_folder("entropi-ask-") as folder:
            table = await self._fetch_table(folder) if welcome.table is not None else None
            await self._say(Start(len(ids), left, welcome.digest()))

            accepted = await self._wait_for_slot()
            length = len(welcome.prefix) + len(ids) + left
            memory = memory_for(welcome.description, length, generation.memory_gb)
            async with Tunnel(CLIENT, accepted.session, self.socket.send_bytes, unread_for(memory)) as tunnel:
                party = await Party.start(
                    Job(
                        rank=CLIENT,
                        session=accepted.session,
                        links=tunnel.links,
                        description=welcome.description,
                        settings=welcome.settings,
                        max_new_tokens=left,
                        prompt_length=len(ids),
                        prompt=ids,
                        prefix_length=len(welcome.prefix),
                        table=str(table) if table is not None else None,
                    ),
                    memory_bytes=memory,
                )
                await self._finish(party, tunnel, len(ids), left)

    async def _finish(self, party: Party, tunnel: Tunnel, length: int, left: int) -> None:
        """Everything from the start of the party on."""
        work = asyncio.create_task(self._generate(party, length, left))
        watch = asyncio.create_task(self._watch_server(tunnel))
        link = asyncio.create_task(self._watch_link(tunnel))
        suspended = asyncio.create_task(party.suspended())
        tasks = {work, watch, link, suspended}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() or work.exception() is not None:
                # The server's own words say more about a failure than the broken link they follow from.
                await asyncio.wait({watch}, timeout=LAST_WORDS_SECONDS)
                if watch.done():
                    watch.result()
            if suspended.done():  # the server's slot is not ours for as long as nothing happens here
                raise UserError("this side's private computation was stopped by somebody")
            if not work.done():
                link.result()
            work.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await party.stop()

    def answer(self, seconds: float) -> Answer:
        """What was received, `seconds` after the question was begun."""
        generation, settings = self.generation, self.welcome.settings
        return Answer(
            PrivateRun(
                protocol=settings.protocol,
                trust=trust(settings, len(self.welcome.prefix)),
                server=self.where,
                prompt=generation.prompt,
                prompt_tokens=generation.prompt_ids,
                new_tokens=generation.new_tokens,
                new_text=self.tokenizer.decode(generation.answer_ids),
                padding_tokens=len(generation.padding),
                prefix_tokens=len(self.welcome.prefix),
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

    def _encode_prompt(self) -> list[int]:
        wanted = self.generation.max_new_tokens
        most = self._positions + 1  # the last new token is not read again
        ids = self.tokenizer.encode(self.generation.prompt, most)
        self._check_known(ids)
        if len(ids) + wanted > most:
            raise UserError(
                f"the prompt has {len(ids)} tokens and {wanted} new ones are asked for, but this server takes at most "
                f"{most} tokens, the new ones included"
            )
        return ids

    @property
    def _positions(self) -> int:
        """Those that the public prefix leaves."""
        return self.welcome.description.positions - len(self.welcome.prefix)

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

    def _padding(self, length: int) -> list[int]:
        """What fills a prompt of this length up to the length that the server is to see."""
        wanted, generation = -length % self.generation.privacy.pad_to, self.generation
        if not wanted:
            return []
        if length + wanted + generation.max_new_tokens > self._positions + 1:
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

    async def _wait_for_slot(self) -> Accepted:
        message = await receive(self.socket, self.where, Queued | Accepted, HANDSHAKE_SECONDS)
        while isinstance(message, Queued):
            before = f", {message.ahead} before this one" if message.ahead else ""
            self.generation.watcher.status(f"{self.where} is busy; waiting in its queue{before}")
            message = await receive(self.socket, self.where, Queued | Accepted, None)
        return message

    async def _generate(self, party: Party, length: int, left: int) -> None:
        generation, settings = self.generation, self.welcome.settings
        generation.watcher.begin(generation.done + self._count_stages(length, left))
        before = len(generation.new_tokens)

        try:
            event = await asyncio.wait_for(party.event(), LINK_SECONDS)
        except asyncio.TimeoutError:
            raise LostServer(f"no engine link with {self.where} within {LINK_SECONDS} s") from None

        while event is not None:
            match event:
                case Linked():
                    pass
                case StageDone(communication):
                    communication.token += before
                    self._note(communication)
                case Revealed():
                    token = self._take(event, settings)
                    self._show()
                    if generation.is_finished:
                        return
                    await self._say(Next())
                    await party.proceed(token)
                case Failed(reason):
                    raise LostServer(f"the private computation with {self.where} failed: {reason}")
            event = await party.event()
        raise LostServer(f"the private computation with {self.where} ended early")

    def _note(self, communication: StageCommunication) -> None:
        generation = self.generation
        generation.done += 1
        if communication.name == "setup":
            generation.setup_seconds += communication.seconds
            generation.setup_bytes += communication.bytes
        else:
            generation.stages.append(communication)
        generation.watcher.stage(generation.done, communication)

    def _take(self, revealed: Revealed, settings: Settings) -> int:
        """Keep what is revealed of the next token, and choose it."""
        generation, vocab_size = self.generation, self.welcome.description.vocab_size
        generation.reveal_bytes += revealed.bytes
        logits = None if revealed.logits is None else np.asarray(revealed.logits)
        if settings.output == "logits":
            assert logits is not None
            token = generation.sampling.choose(logits, generation.random)
        else:
            assert revealed.tokens is not None
            if not all(0 <= choice < vocab_size for choice in revealed.tokens):
                raise UserError(f"the private computation with {self.where} failed: a token outside the vocabulary")
            token = revealed.tokens[0 if logits is None else generation.sampling.choose(logits, generation.random)]

        if logits is not None:
            generation.logits.append(logits)
        generation.new_tokens.append(token)
        return token

    def _show(self) -> None:
        """Pass on what can be shown of the answer by now."""
        generation = self.generation
        text = self.tokenizer.decode(generation.answer_ids)
        if generation.is_finished or not text.endswith("\ufffd"):  # half of a character waits for its other bytes
            generation.watcher.text(text[len(generation.shown) :])
            generation.shown = text

    def _count_stages(self, length: int, left: int) -> int:
        """Operations of a session, set-up included, for the progress line."""
        model, settings = self.welcome.description, self.welcome.settings
        total, past, new = 1, 0, length
        for _ in range(left):
            total += sum(1 for _ in stages_of_pass(model, settings, new, past))
            past, new = past + new, 1
        return total

    async def _say(self, message: Start | Next) -> None:
        await self.socket.send_str(encode(message).decode())

    async def _watch_server(self, tunnel: Tunnel) -> None:
        """Carry the engines' link; any control message ends the session."""
        while True:
            message = await self.socket.receive()
            if message.type != aiohttp.WSMsgType.BINARY:
                break
            try:
                await tunnel.receive(message.data)
            except LinkBroken as error:  # not to be tried again; the server is told why
                await self.socket.close(code=aiohttp.WSCloseCode.POLICY_VIOLATION, message=str(error)[:120].encode())
                raise UserError(f"{self.where} does not follow the protocol: {error}") from None
        if message.type == aiohttp.WSMsgType.TEXT:
            refused = decode(message.data, self.where)
            if isinstance(refused, Refused):
                raise LostServer(f"{self.where} ended the session: {without_controls(refused.reason)}")
            raise UserError(f"{self.where} does not follow the protocol")
        raise LostServer(f"{self.where} went away in the middle of the session")

    async def _watch_link(self, tunnel: Tunnel) -> None:
        """Raise once the engines' link is broken although nobody has finished."""
        await tunnel.broken()
        await asyncio.sleep(GRACE_SECONDS)
        raise LostServer(f"the engines' link with {self.where} broke")
