"""The prompt owner's side: ask a server, run this side's party, receive logits nobody else can read."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from tokenizers import Tokenizer

from entropi.errors import UserError
from entropi.private.messages import (
    CLIENT,
    MAX_SERVER_MESSAGE,
    PROTOCOL_VERSION,
    TRUST,
    Accepted,
    BadMessage,
    Failed,
    FromServer,
    Hello,
    Job,
    Linked,
    Next,
    Refused,
    Revealed,
    StageDone,
    Start,
    Welcome,
    decode_from_server,
    encode,
)
from entropi.private.program import forward
from entropi.private.session import Party, free_port, parse_address
from entropi.private.versions import engine_version
from entropi.records import PrivateRun, StageTraffic

CONNECT_SECONDS = 10
HANDSHAKE_SECONDS = 15
LINK_SECONDS = 60
HEARTBEAT_SECONDS = 20.0
LAST_WORDS_SECONDS = 1.0


@dataclass
class Answer:
    """A finished generation: the record, and the logits `(V,)` behind every new token."""

    record: PrivateRun
    logits: list[np.ndarray]


@dataclass(frozen=True)
class Watcher:
    """What a caller may want to see while the answer is computed.

    `begin(stages)` is called once with the number of operations if all tokens are generated; `stage(done, record)`
    after every operation; `text(piece)` whenever more of the answer can be shown.
    """

    begin: Callable[[int], None] = field(default=lambda total: None)
    stage: Callable[[int, StageTraffic], None] = field(default=lambda done, traffic: None)
    text: Callable[[str], None] = field(default=lambda piece: None)


def ask(server: str, prompt: str, max_new_tokens: int, watcher: Watcher | None = None) -> Answer:
    """Let a server's model continue `prompt` without showing it; greedy.

    Args:
        server: "HOST:PORT" of a running server.

    Raises:
        UserError: nobody there, not an entropi server, a refusal, a server or link that dies; one line.
    """
    host, port = parse_address(server)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, at least 1 is needed")
    return asyncio.run(_ask(host, port, prompt, max_new_tokens, watcher or Watcher()))


async def _ask(host: str, port: int, prompt: str, max_new_tokens: int, watcher: Watcher) -> Answer:
    where = f"{host}:{port}"
    not_a_server = f"{where} is not an entropi server, or it closed the connection"

    async def refuse_redirect(*_: Any) -> None:  # it could lead to another machine
        raise UserError(not_a_server)

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse_redirect)
    # Time limits are set around the steps; aiohttp's own would end a long generation.
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(), trace_configs=[trace]) as http:
        try:
            socket = await asyncio.wait_for(
                http.ws_connect(
                    f"http://{where}/v1/session",
                    max_msg_size=MAX_SERVER_MESSAGE,
                    heartbeat=HEARTBEAT_SECONDS,
                    timeout=aiohttp.ClientWSTimeout(ws_close=LAST_WORDS_SECONDS),
                ),
                CONNECT_SECONDS,
            )
            try:
                return await _Session(socket, where, prompt, max_new_tokens, watcher).run()
            finally:
                await socket.close()
        except aiohttp.ClientConnectorError as error:
            reason = os.strerror(error.os_error.errno) if error.os_error.errno else str(error)
            raise UserError(f"cannot reach a server at {where}: {reason}") from None
        except asyncio.TimeoutError:
            raise UserError(f"{where} accepts connections but does not answer as an entropi server") from None
        except (aiohttp.ClientError, ConnectionResetError):
            raise UserError(not_a_server) from None


class _Session:
    """One question over an open control channel."""

    def __init__(
        self, socket: aiohttp.ClientWebSocketResponse, where: str, prompt: str, max_new_tokens: int, watcher: Watcher
    ) -> None:
        self.socket, self.where, self.prompt = socket, where, prompt
        self.max_new_tokens, self.watcher = max_new_tokens, watcher
        self.stages: list[StageTraffic] = []
        self.setup: StageTraffic | None = None
        self.new_tokens: list[int] = []
        self.logits: list[np.ndarray] = []
        self.reveal_bytes = 0

    async def run(self) -> Answer:
        started = time.monotonic()
        await self.socket.send_bytes(encode(Hello(PROTOCOL_VERSION, engine_version())))
        welcome = await self._receive(Welcome)
        try:
            tokenizer = Tokenizer.from_str(welcome.tokenizer)
        except Exception:  # tokenizers raises plain Exception for malformed input
            raise UserError(f"{self.where} sent a tokenizer that cannot be read") from None
        prompt_ids = self._encode_prompt(tokenizer, welcome)
        link = f"127.0.0.1:{free_port('127.0.0.1')}"
        await self.socket.send_bytes(encode(Start(len(prompt_ids), self.max_new_tokens, link)))
        accepted = await self._receive(Accepted)
        parse_address(accepted.link)  # a server must not send this side's engine elsewhere

        party = await Party.start(
            Job(
                rank=CLIENT,
                session=accepted.session,
                links=(accepted.link, link),
                description=welcome.description,
                settings=welcome.settings,
                max_new_tokens=self.max_new_tokens,
                prompt_length=len(prompt_ids),
                prompt=prompt_ids,
            )
        )
        work = asyncio.create_task(self._generate(party, tokenizer, welcome, prompt_ids))
        watch = asyncio.create_task(self._watch_server())
        try:
            done, _ = await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work not in done or work.exception() is not None:
                # The server's own words say more about a failure than the broken link they follow from.
                await asyncio.wait({watch}, timeout=LAST_WORDS_SECONDS)
                if watch.done():
                    watch.result()
            work.result()
        finally:
            work.cancel()
            watch.cancel()
            await party.stop()
        return Answer(
            PrivateRun(
                protocol=welcome.settings.protocol,
                trust=TRUST[welcome.settings.protocol],
                server=self.where,
                prompt=self.prompt,
                prompt_tokens=prompt_ids,
                new_tokens=self.new_tokens,
                new_text=tokenizer.decode(self.new_tokens),
                stages=self.stages,
                setup_seconds=self.setup.seconds if self.setup else 0.0,
                setup_bytes=self.setup.bytes if self.setup else 0,
                reveal_bytes=self.reveal_bytes,
                seconds=time.monotonic() - started,
                ring_bits=welcome.settings.ring_bits,
                fraction_bits=welcome.settings.fraction_bits,
                exp_iterations=welcome.settings.exp_iterations,
            ),
            self.logits,
        )

    def _encode_prompt(self, tokenizer: Tokenizer, welcome: Welcome) -> list[int]:
        ids = list(tokenizer.encode(self.prompt, add_special_tokens=False).ids)
        if not ids:
            raise UserError("the prompt is empty")
        if max(ids) >= welcome.description.vocab_size:
            raise UserError(f"{self.where} sent a tokenizer that does not belong to its model")
        room = welcome.description.positions + 1 - self.max_new_tokens
        if len(ids) > room:
            raise UserError(
                f"the prompt has {len(ids)} tokens; with {self.max_new_tokens} new ones the model has room for {room}"
            )
        return ids

    async def _generate(self, party: Party, tokenizer: Tokenizer, welcome: Welcome, prompt_ids: list[int]) -> None:
        self.watcher.begin(self._count_stages(welcome, len(prompt_ids)))
        shown, done = "", 0
        try:
            event = await asyncio.wait_for(party.event(), LINK_SECONDS)
        except asyncio.TimeoutError:
            raise UserError(f"no engine link with {self.where} within {LINK_SECONDS} s") from None
        while event is not None:
            match event:
                case Linked():
                    pass
                case StageDone(traffic):
                    done += 1
                    self._note(traffic)
                    self.watcher.stage(done, traffic)
                case Revealed():
                    token = self._take_logits(event)
                    finished = token == welcome.description.end_of_text or len(self.new_tokens) == self.max_new_tokens
                    text = tokenizer.decode(self.new_tokens)
                    if finished or not text.endswith("\ufffd"):  # half of a character waits for its other bytes
                        self.watcher.text(text[len(shown) :])
                        shown = text
                    if finished:
                        return
                    await self.socket.send_bytes(encode(Next()))
                    await party.proceed(token)
                case Failed(reason):
                    raise UserError(f"the private computation with {self.where} failed: {reason}")
            event = await party.event()
        raise UserError(f"the private computation with {self.where} ended early")

    def _note(self, traffic: StageTraffic) -> None:
        if traffic.name == "setup":
            self.setup = traffic
        else:
            self.stages.append(traffic)

    def _take_logits(self, revealed: Revealed) -> int:
        """Keep the logits of the next token and return the likeliest."""
        assert revealed.logits is not None
        self.reveal_bytes += revealed.bytes
        self.logits.append(np.asarray(revealed.logits))
        token = int(np.argmax(revealed.logits))
        self.new_tokens.append(token)
        return token

    def _count_stages(self, welcome: Welcome, prompt_length: int) -> int:
        """Operations of the whole generation, set-up included, for the progress line."""
        total, past, new = 1, 0, prompt_length
        for _ in range(self.max_new_tokens):
            total += sum(1 for _ in forward(welcome.description, new, past, welcome.settings.exp_iterations))
            past, new = past + new, 1
        return total

    async def _watch_server(self) -> None:
        """Nothing more is expected on the control channel: whatever comes ends the session."""
        message = await self.socket.receive()
        if message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT):
            refused = self._decode(message.data)
            if isinstance(refused, Refused):
                raise UserError(f"{self.where} ended the session: {refused.reason}")
        raise UserError(f"{self.where} went away in the middle of the session")

    async def _receive(self, kind: type):  # type: ignore[no-untyped-def]
        """The next message of the handshake, which must be of `kind`."""
        try:
            message = await asyncio.wait_for(self.socket.receive(), HANDSHAKE_SECONDS)
        except asyncio.TimeoutError:
            raise UserError(f"{self.where} does not answer as an entropi server") from None
        if message.type not in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT):
            raise UserError(f"{self.where} closed the connection during the handshake")
        decoded = self._decode(message.data)
        if isinstance(decoded, Refused):
            raise UserError(f"{self.where} refused: {decoded.reason}")
        if not isinstance(decoded, kind):
            raise UserError(f"{self.where} does not follow the protocol")
        return decoded

    def _decode(self, data: bytes | str) -> FromServer:
        try:
            return decode_from_server(data)
        except BadMessage as error:
            raise UserError(f"{self.where} does not follow the protocol: {error}") from None
