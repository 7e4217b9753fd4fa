"""The prompt owner's side: ask a server, run this side's party, receive what nobody else can read."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropi.console import without_controls
from entropi.errors import UserError
from entropi.private.admission import MOST_MEMORY_GB
from entropi.private.certificates import Tls
from entropi.private.channel import (
    HANDSHAKE_SECONDS,
    LAST_WORDS_SECONDS,
    LostServer,
    RefusedByServer,
    ServerAddress,
    decode,
    greet,
    open_channel,
    receive,
    welcome_from,
)
from entropi.private.messages import (
    CLIENT,
    MAX_TOKENS,
    Accepted,
    Canary,
    Failed,
    Job,
    Linked,
    Next,
    Queued,
    Refused,
    Revealed,
    Settings,
    StageDone,
    Start,
    Welcome,
    encode,
    trust,
)
from entropi.private.program import Description
from entropi.private.session import Party, memory_for, sha256_of, stages_of_pass, unread_for
from entropi.private.tokenization import (
    Encoder,
    check_prompt,
    own_tokenizer,
    sha256_of_tokenizer,
    tokenizer_of_stranger,
)
from entropi.private.tunnel import LinkBroken, Tunnel
from entropi.records import PrivateRun, StageTraffic
from entropi.temporary import swept_folder

LINK_SECONDS = 60
GRACE_SECONDS = 3.0  # for a party to say why its link broke
RETRY_SECONDS = 1.0  # before the first retry; doubled before every further one


@dataclass
class Answer:
    """A finished generation: the record, and the logits behind every new token.

    `logits` holds one array a token: `(V,)` where the server reveals all, `(k,)` of its likeliest tokens where it
    reveals these, and nothing where it reveals the arg-max only.
    """

    record: PrivateRun
    logits: list[np.ndarray]


@dataclass(frozen=True)
class Watcher:
    """What a caller may want to see while the answer is computed.

    `begin(stages)` is called with the number of operations if all tokens are generated, once for every session;
    `stage(done, record)` after every operation, set-up included; `text(piece)` whenever more of the answer can be
    shown; `status(line)` when something else happens: a place in the queue, a retry.
    """

    begin: Callable[[int], None] = field(default=lambda total: None)
    stage: Callable[[int, StageTraffic], None] = field(default=lambda done, traffic: None)
    text: Callable[[str], None] = field(default=lambda piece: None)
    status: Callable[[str], None] = field(default=lambda line: None)


@dataclass(frozen=True)
class Sampling:
    """How the client chooses a token from what it learns.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens can be chosen; None for all that the client learns.
        seed: the same one makes the same choices from the same logits; None for a fresh one.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature is {self.temperature} but must be between 0 and 100")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k} but must be at least 1")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed is {self.seed} but must not be negative")

    def choose(self, logits: np.ndarray, random: np.random.Generator) -> int:
        """Index of the token taken, from `(n,)` logits."""
        if self.temperature == 0:
            return int(np.argmax(logits))
        kept = np.argsort(-logits, kind="stable")[: self.top_k]
        scaled = (logits[kept] - logits[kept[0]]).astype(np.float64) / self.temperature
        weights = np.exp(scaled)
        return int(random.choice(kept, p=weights / weights.sum()))


GREEDY = Sampling()


@dataclass(frozen=True)
class Privacy:
    """What the client leaves to the server of two things that the server learns: how long prompt and answer are.

    Attributes:
        tokenizer: content of a tokenizer.json of one's own to use in place of the server's.
        tokenizer_sha256: of the tokenizer.json that the server must send; then it is taken whatever its form.
        pad_to: a prompt is filled up at its front to a multiple of so many tokens. The model reads the filling, so this
            changes the answer.
        pad_text: what it is filled up with, from its end backwards and again as long as needed; public text like the
            prompt changes answers least. By default it is the token that ends a text.
        stop_tokens: by name, the tokens that end an answer; by default those that usually end a text. What the server
            says of that is not asked.
        full_length: ask for all tokens whatever comes, and cut the answer afterwards.

    Raises:
        UserError: a value out of range; one's own tokenizer and a hash of the server's at once.
    """

    tokenizer: str | None = None
    tokenizer_sha256: str | None = None
    pad_to: int = 1
    pad_text: str | None = None
    stop_tokens: tuple[str, ...] | None = None
    full_length: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.pad_to <= MAX_TOKENS:
            raise UserError(f"pad_to is {self.pad_to} but must be between 1 and {MAX_TOKENS}")
        if self.pad_text is not None:
            check_prompt(self.pad_text)
        if self.tokenizer is not None and self.tokenizer_sha256 is not None:
            raise UserError("a tokenizer of one's own leaves no use for the hash of the server's: give one of the two")
        if self.tokenizer_sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.tokenizer_sha256):
            raise UserError("tokenizer_sha256 must be 64 hexadecimal digits, as sha256sum writes them")

    def encoder(self, sent: str, vocab_size: int, where: str) -> Encoder:
        """How prompts are encoded, given the tokenizer.json that the server `where` sent.

        Raises:
            UserError: it is none that this client applies; whatever the prompt is.
        """
        try:
            if self.tokenizer is not None:
                return own_tokenizer(self.tokenizer)
            if self.tokenizer_sha256 is None:
                return tokenizer_of_stranger(sent, vocab_size)
            if sha256_of_tokenizer(sent) == self.tokenizer_sha256:
                return own_tokenizer(sent)
        except UserError as error:
            who = "--tokenizer is one" if self.tokenizer is not None else f"{where} sent a tokenizer"
            raise UserError(f"{who} {error}") from None
        raise UserError(f"{where} sent another tokenizer than the one with the given SHA-256")


USUAL = Privacy()


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
    """A server that can be asked; every question is a session of its own."""

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
    def trust(self) -> str:
        """What each side learns, in words."""
        return trust(self._welcome.settings)

    @property
    def canary(self) -> Canary | None:
        """A public prompt and the answer to it that the owner published; see `canary.complaint`."""
        return self._welcome.canary

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
    ) -> Answer:
        """Let the model continue `prompt` without showing it.

        Args:
            retries: so many times a session that broke is continued in a new one, with the tokens received so far
                as part of the prompt; each costs a pass over all of it.
            memory_gb: most memory of this side's party, in 10^9 bytes; by default what the model needs, with room;
                0 for no limit.

        Raises:
            UserError: a refusal, a server or link that dies, a server that serves another model by now; one line.
        """
        question = _Question(prompt, max_new_tokens, sampling, retries, watcher or Watcher(), privacy, memory_gb)
        question.digest = self._welcome.digest()
        return asyncio.run(_ask(self._server, question))

    def stream(
        self,
        prompt: str,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        retries: int = 0,
        privacy: Privacy = USUAL,
    ) -> Iterator[str]:
        """The pieces of the answer as they are received; closing the iterator ends the session.

        Raises:
            UserError: as for `ask`, after the pieces that were received.
        """
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        question = _Question(prompt, max_new_tokens, sampling, retries, Watcher(text=pieces.put), privacy)
        question.digest = self._welcome.digest()
        loop = asyncio.new_event_loop()
        task = loop.create_task(_ask(self._server, question))

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
) -> Answer:
    """`connect` and `Connection.ask` in one, over one connection.

    Raises:
        UserError: as for these.
    """
    question = _Question(prompt, max_new_tokens, sampling, retries, watcher or Watcher(), privacy, memory_gb)
    return asyncio.run(_ask(ServerAddress.at(server, tls), question))


# --- One question -----------------------------------------------------------------------------------------------------


@dataclass
class _Question:
    """What is asked, and what of the answer has been received, over as many sessions as it takes."""

    prompt: str
    max_new_tokens: int
    sampling: Sampling
    retries: int
    watcher: Watcher
    privacy: Privacy = USUAL
    memory_gb: float | None = None  # most memory of this side's party: see `memory_for`
    digest: str | None = None  # of what the server made public when the question was begun
    padding: list[int] = field(default_factory=list)  # before the prompt
    prompt_ids: list[int] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    stages: list[StageTraffic] = field(default_factory=list)
    setup_seconds: float = 0.0
    setup_bytes: int = 0
    reveal_bytes: int = 0
    done: int = 0  # operations, set-ups included
    shown: str = ""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}, at least 1 is needed")
        if self.memory_gb is not None and not 0 <= self.memory_gb <= MOST_MEMORY_GB:
            raise UserError(f"memory_gb is {self.memory_gb} but must be between 0 and {MOST_MEMORY_GB:,}")
        if self.retries < 0:
            raise UserError(f"retries is {self.retries} but must not be negative")
        check_prompt(self.prompt)
        self.random = np.random.default_rng(self.sampling.seed)

    @property
    def answer_ids(self) -> list[int]:
        """The new tokens up to the first that ends a text, that one included."""
        ends = [place for place, token in enumerate(self.new_tokens) if token in self.stop_ids]
        return self.new_tokens[: ends[0] + 1] if ends else self.new_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the last token received was the last of all."""
        ended = bool(self.new_tokens) and self.new_tokens[-1] in self.stop_ids and not self.privacy.full_length
        return ended or len(self.new_tokens) == self.max_new_tokens


async def _ask(server: ServerAddress, question: _Question) -> Answer:
    started = time.monotonic()
    for attempt in itertools.count():
        try:
            async with open_channel(server) as (http, socket):
                session = _Session(server, http, socket, question)
                await session.run()
                return session.answer(time.monotonic() - started)
        except (LostServer, RefusedByServer) as error:
            # Another server may still count the session that broke as under way, or be just starting.
            if attempt == question.retries or (isinstance(error, RefusedByServer) and attempt == 0):
                raise
            question.watcher.status(f"{error}; retry {attempt + 1} of {question.retries}")
            await asyncio.sleep(RETRY_SECONDS * 2**attempt)
    raise AssertionError


class _Session:
    """As much of a question as one connection answers."""

    def __init__(
        self,
        server: ServerAddress,
        http: aiohttp.ClientSession,
        socket: aiohttp.ClientWebSocketResponse,
        question: _Question,
    ) -> None:
        self.server, self.where = server, server.name
        self.http, self.socket, self.question = http, socket, question
        self.welcome: Welcome
        self.tokenizer: Encoder

    async def run(self) -> None:
        """Ask, and receive tokens into the question until there are no more to come."""
        question = self.question
        welcome = self.welcome = await welcome_from(self.socket, self.where)
        if question.digest not in (None, welcome.digest()):
            raise UserError(f"{self.where} serves another model than when the question was begun")
        question.digest = welcome.digest()
        if question.sampling.temperature and welcome.settings.output == "argmax":
            raise UserError(f"{self.where} reveals the likeliest token only: there is nothing to sample from")
        self.tokenizer = question.privacy.encoder(welcome.tokenizer, welcome.description.vocab_size, self.where)
        question.stop_ids = self.tokenizer.ids_of(question.privacy.stop_tokens)
        question.prompt_ids = self._encode_prompt()
        question.padding = self._padding(len(question.prompt_ids))
        ids = question.padding + question.prompt_ids + question.new_tokens
        left = question.max_new_tokens - len(question.new_tokens)
        with swept_folder("entropi-ask-") as folder:
            table = await self._fetch_table(folder) if welcome.table is not None else None
            await self._say(Start(len(ids), left, welcome.digest()))
            accepted = await self._wait_for_slot()
            memory = memory_for(welcome.description, len(ids) + left, question.memory_gb)
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
        question, settings = self.question, self.welcome.settings
        return Answer(
            PrivateRun(
                protocol=settings.protocol,
                trust=trust(settings),
                server=self.where,
                prompt=question.prompt,
                prompt_tokens=question.prompt_ids,
                new_tokens=question.new_tokens,
                new_text=self.tokenizer.decode(question.answer_ids),
                padding_tokens=len(question.padding),
                stages=question.stages,
                setup_seconds=question.setup_seconds,
                setup_bytes=question.setup_bytes,
                reveal_bytes=question.reveal_bytes,
                seconds=seconds,
                ring_bits=settings.ring_bits,
                fraction_bits=settings.fraction_bits,
                exp_iterations=self.welcome.description.exp_iterations or settings.exp_iterations,
            ),
            question.logits,
        )

    def _encode_prompt(self) -> list[int]:
        wanted = self.question.max_new_tokens
        most = self.welcome.description.positions + 1  # the last new token is not read again
        ids = self.tokenizer.encode(self.question.prompt, most)
        self._check_known(ids)
        if len(ids) + wanted > most:
            raise UserError(
                f"the prompt has {len(ids)} tokens and {wanted} new ones are asked for, but this model takes at most "
                f"{most} tokens, the new ones included"
            )
        return ids

    def _check_known(self, ids: list[int]) -> None:
        """Raise `UserError` for tokens that the model does not have."""
        if max(ids) >= self.welcome.description.vocab_size:
            own = self.question.privacy.tokenizer is not None
            who = "--tokenizer is one" if own else f"{self.where} sent a tokenizer"
            raise UserError(f"{who} that does not belong to its model: it has a token more than the model's vocabulary")

    def _padding(self, length: int) -> list[int]:
        """What fills a prompt of this length up to the length that the server is to see."""
        wanted, question = -length % self.question.privacy.pad_to, self.question
        if not wanted:
            return []
        if length + wanted + question.max_new_tokens > self.welcome.description.positions + 1:
            raise UserError(
                f"the prompt has {length} tokens, and filled up to {length + wanted} it leaves no room for "
                f"{question.max_new_tokens} new ones in this model"
            )
        if question.privacy.pad_text is not None:
            fill = self.tokenizer.encode(question.privacy.pad_text, MAX_TOKENS)
        else:
            fill = (self.tokenizer.ids_of(None) or question.stop_ids)[:1]
        if not fill:
            raise UserError("the tokenizer has no token that ends a text: say what to fill up with by --pad-with")
        self._check_known(fill)
        return (fill * -(-wanted // len(fill)))[-wanted:]

    async def _fetch_table(self, folder: Path) -> Path:
        """The public token embeddings, `(V, d)`; all clients fetch the same, whatever they ask."""
        path, shape = folder / "table.safetensors", self.welcome.description.weight_shapes()["embedding"]
        most, received = 4 * shape[0] * shape[1] + (1 << 16), 0
        self.question.watcher.status("fetching the public token embeddings")
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
            self.question.watcher.status(f"{self.where} is busy; waiting in its queue{before}")
            message = await receive(self.socket, self.where, Queued | Accepted, None)
        return message

    async def _generate(self, party: Party, length: int, left: int) -> None:
        question, settings = self.question, self.welcome.settings
        question.watcher.begin(question.done + self._count_stages(length, left))
        before = len(question.new_tokens)
        try:
            event = await asyncio.wait_for(party.event(), LINK_SECONDS)
        except asyncio.TimeoutError:
            raise LostServer(f"no engine link with {self.where} within {LINK_SECONDS} s") from None
        while event is not None:
            match event:
                case Linked():
                    pass
                case StageDone(traffic):
                    traffic.token += before
                    self._note(traffic)
                case Revealed():
                    token = self._take(event, settings)
                    self._show()
                    if question.is_finished:
                        return
                    await self._say(Next())
                    await party.proceed(token)
                case Failed(reason):
                    raise LostServer(f"the private computation with {self.where} failed: {reason}")
            event = await party.event()
        raise LostServer(f"the private computation with {self.where} ended early")

    def _note(self, traffic: StageTraffic) -> None:
        question = self.question
        question.done += 1
        if traffic.name == "setup":
            question.setup_seconds += traffic.seconds
            question.setup_bytes += traffic.bytes
        else:
            question.stages.append(traffic)
        question.watcher.stage(question.done, traffic)

    def _take(self, revealed: Revealed, settings: Settings) -> int:
        """Keep what is revealed of the next token, and choose it."""
        question, vocab_size = self.question, self.welcome.description.vocab_size
        question.reveal_bytes += revealed.bytes
        logits = None if revealed.logits is None else np.asarray(revealed.logits)
        if settings.output == "logits":
            assert logits is not None
            token = question.sampling.choose(logits, question.random)
        else:
            assert revealed.tokens is not None
            if not all(0 <= choice < vocab_size for choice in revealed.tokens):
                raise UserError(f"the private computation with {self.where} failed: a token outside the vocabulary")
            token = revealed.tokens[0 if logits is None else question.sampling.choose(logits, question.random)]
        if logits is not None:
            question.logits.append(logits)
        question.new_tokens.append(token)
        return token

    def _show(self) -> None:
        """Pass on what can be shown of the answer by now."""
        question = self.question
        text = self.tokenizer.decode(question.answer_ids)
        if question.is_finished or not text.endswith("\ufffd"):  # half of a character waits for its other bytes
            question.watcher.text(text[len(question.shown) :])
            question.shown = text

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
