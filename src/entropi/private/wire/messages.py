"""Everything that crosses a boundary between processes or machines: typed, bounded, validated before use."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec

from entropi.chat import ChatForm
from entropi.private.compute.description import Description, TokenId
from entropi.private.compute.settings import Settings
from entropi.records import StageCommunication

PROTOCOL_VERSION = 10

MAX_CLIENT_MESSAGE = 4 << 10  # bytes; nothing a client says is longer
MAX_SERVER_MESSAGE = 32 << 20  # the tokenizer is the largest thing a server sends
MAX_TOKENS = 1 << 14
MAX_DRAFT = 16  # tokens of one pass
MAX_BATCH = 64  # prompts of one pass
MAX_TICKETS = 50  # in one message, which is shorter than `MAX_CLIENT_MESSAGE` then
MAX_INQUIRIES = 20  # over one connection

Text = Annotated[str, msgspec.Meta(max_length=300)]
Address = Annotated[str, msgspec.Meta(max_length=120)]
SessionId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
TokenCount = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]
PartCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
DraftCount = Annotated[int, msgspec.Meta(ge=0, le=MAX_DRAFT)]
Lengths = Annotated[list[TokenCount], msgspec.Meta(max_length=MAX_BATCH - 1)]
Places = Annotated[list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_BATCH)]], msgspec.Meta(max_length=MAX_BATCH - 1)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=31 * 86_400)]


# Control channel, client to server: text messages of a WebSocket. Its binary messages are the engines' (`tunnel`).


class Hello(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """First message; engines of different versions do not understand each other's ciphertexts."""

    version: int
    engine: Text


class Start(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Ask for a session; `digest` is the client's, of what the server made public.

    In a conversation `max_new_tokens` counts the tokens of later messages too. `ticket` names prepared material that
    the client has its half of. `drafts` are those tokens, over all passes, that may be computed and not kept.
    `others` are the lengths of further prompts that share the passes, each with as many new tokens.
    """

    prompt_length: TokenCount
    max_new_tokens: TokenCount
    digest: Digest
    conversation: bool = False
    ticket: SessionId | None = None
    drafts: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0
    others: Lengths = []


class Prepare(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Ask for a session that prepares material for a later one of at most `tokens` tokens, the public prefix included.

    And of at most so many `passes`: tokens of the answers. `ticket` is the material's name, which the client keeps for
    so many seconds from now on; it has the first `parts` parts of it already.
    """

    tokens: TokenCount
    passes: TokenCount
    digest: Digest
    ticket: SessionId
    expires_in: Seconds
    parts: PartCount = 0


class Tickets(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Ask, before anything is begun, what the server has of these tickets of this client; or to `destroy` it first."""

    tickets: Annotated[list[SessionId], msgspec.Meta(min_length=1, max_length=MAX_TICKETS)]
    destroy: bool = False


class Next(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """Run the pass for so many more tokens: one, or in a conversation those of its next message, and `drafts`.

    Which tokens they are stays with the client, which learns the logits of the token after each draft too. Of the
    drafts of the pass before, the first `kept` stay; keys and values of the others are forgotten before this pass.

    Where several prompts share the passes, each that goes on has one more token; `ended` names the others by their
    places among those of the pass before, and their keys and values are forgotten.
    """

    tokens: TokenCount = 1
    drafts: DraftCount = 0
    kept: DraftCount = 0
    ended: Places = []


FromClient: TypeAlias = Hello | Start | Prepare | Tickets | Next


# Control channel, server to client.


class Canary(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A public prompt and what the model answers to it in plaintext: the likeliest tokens, one by one."""

    prompt: Text
    tokens: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=16)]
    logits: Annotated[list[float], msgspec.Meta(min_length=1, max_length=16)]  # of these tokens


class Welcome(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What the server makes public."""

    description: Description
    tokenizer: Annotated[str, msgspec.Meta(max_length=MAX_SERVER_MESSAGE)]
    settings: Settings
    table: Digest | None = None  # SHA-256 of the file with the token embeddings, where they are public
    canary: Canary | None = None
    prefix: Annotated[list[TokenId], msgspec.Meta(max_length=MAX_TOKENS)] = []  # public tokens that prompts continue
    chat: ChatForm | None = None  # what stands around messages, for a model that is made for conversations
    # Tokens, those of messages and answers together, that a conversation may have; 0 where there are none.
    conversation_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0
    draft_tokens: DraftCount = 0  # that a pass may have; 0 where no drafts are taken
    batch_prompts: Annotated[int, msgspec.Meta(ge=1, le=MAX_BATCH)] = 1  # that may share a pass
    batch_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = (
        0  # that these and their answers may have together
    )

    def digest(self) -> str:
        """SHA-256, hex: both sides must have the same before they compute."""
        return hashlib.sha256(encode(self)).hexdigest()


class Held(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """What the server has of the tickets that were asked for, in their order; None where it keeps no material at all.

    Its half of a ticket is ready to be taken; is for other weights or settings than it serves now; was there, and never
    will be again; or it knows nothing of it, and another server may have it.
    """

    states: Annotated[list[Literal["ready", "other", "gone", "unknown"]], msgspec.Meta(max_length=MAX_TICKETS)] | None


class Queued(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """All slots are taken; so many other clients will be served before this one."""

    ahead: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]


class Accepted(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The session begins; `session` marks the engines' messages.

    `prepared` if the server has taken its half of the ticket that was offered; where material is prepared, `parts` are
    those that both sides have, and the server keeps it for so many seconds from now on, which are no more than the
    client's.
    """

    session: SessionId
    prepared: bool = False
    parts: PartCount = 0
    expires_in: Seconds | None = None


class Prepared(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The server has its half of the material, on the disk."""


class Refused(msgspec.Struct, tag=True, forbid_unknown_fields=True):
    """The session ends, with a reason a person can read."""

    reason: Text


FromServer: TypeAlias = Welcome | Held | Queued | Accepted | Prepared | Refused


# Between a process and the party it started, over pipes.


class Job(msgspec.Struct, forbid_unknown_fields=True):
    """What a party does. The prompt travels by pipe: command lines can be read by other users of a machine."""

    rank: Literal[0, 1]
    session: SessionId
    links: tuple[Address, Address]  # of the engines, by rank, as this one is to know them
    description: Description
    settings: Settings
    max_new_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0  # 0 where material is prepared
    prompt_length: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0
    prompt: list[TokenId] | None = None  # the client's
    weights: str | None = None  # the server's: path of the safetensors file
    ahead: str | None = None  # likewise of the matrices that look ahead, where products are prepared
    prefix_length: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0
    prefix: str | None = None  # the server's: path of a safetensors file with the public prefix's keys and values
    table: str | None = None  # the client's, where the embedding is public: path of a safetensors file that has it
    material: str | None = None  # path of a safetensors file with this side's half of what was prepared
    prepares: bool = False  # material, for another session; otherwise a prompt is answered
    material_tokens: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0  # that it was, or is to be, prepared for
    material_passes: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0
    first_part: PartCount = 0  # of what is to be prepared
    drafts: Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)] = 0  # see `Start`
    others: Lengths = []  # of prompts that share the passes; `prompt` has their tokens behind those of the first


class Proceed(msgspec.Struct, forbid_unknown_fields=True):
    """Run the pass for so many more tokens, `drafts` included; only the client's party is told which.

    Before that forget the last `dropped` tokens of the pass before, drafts that did not hold; or of several prompts
    those that have `ended`, after which there is one token for each of the others. See `Next`.
    """

    count: TokenCount = 1
    tokens: list[TokenId] | None = None
    drafts: DraftCount = 0
    dropped: DraftCount = 0
    ended: Places = []


class Linked(msgspec.Struct, tag=True):
    """Both engines are connected."""


class StageDone(msgspec.Struct, tag=True):
    """One operation has finished."""

    communication: StageCommunication


class PartDone(msgspec.Struct, tag=True):
    """One part of the material lies beside the engine's socket, in the file `part_file` names."""

    number: int
    communication: StageCommunication


class Revealed(msgspec.Struct, tag=True):
    """The client's party holds the logits of the next token; the server's has sent its shares of them.

    After a pass with drafts: also those of the token after each draft, `rows` in all, one row behind the other; after
    one that several prompts share, a row for each prompt.
    """

    bytes: int
    logits: list[float] | None = None  # of the whole vocabulary, or of `tokens`
    tokens: list[int] | None = None  # the likeliest, where that is all the client learns; logits None for arg-max
    rows: int = 1


class Failed(msgspec.Struct, tag=True):
    """The party gives up."""

    reason: str


Event: TypeAlias = Linked | StageDone | PartDone | Revealed | Failed

M = TypeVar("M")


def part_file(number: int) -> str:
    """Name of the file in which a party hands a part of the material to its parent."""
    return f"part-{number}"


_event_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)
_client_decoder: msgspec.json.Decoder[FromClient] = msgspec.json.Decoder(FromClient)
_server_decoder: msgspec.json.Decoder[FromServer] = msgspec.json.Decoder(FromServer)


class BadMessage(Exception):
    """Bytes that are not a message of the expected kind; the text is one line."""


def decode(data: bytes | str, kind: type[M]) -> M:
    """A validated message; `BadMessage` for anything else."""
    return _decode(data, msgspec.json.Decoder(kind))


def decode_event(data: bytes) -> Event:
    """A party's event; `BadMessage` for anything else."""
    return _decode(data, _event_decoder)


def decode_from_client(data: bytes | str) -> FromClient:
    """A client's message; `BadMessage` for anything else."""
    return _decode(data, _client_decoder)


def decode_from_server(data: bytes | str) -> FromServer:
    """A server's message; `BadMessage` for anything else."""
    return _decode(data, _server_decoder)


def _decode(data: bytes | str, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadMessage(" ".join(str(error).split())) from None


def encode(message: object) -> bytes:
    """One line of JSON."""
    return msgspec.json.encode(message)
