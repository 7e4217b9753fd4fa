"""What a server allows: how many sessions and connections, how long, how much."""

from __future__ import annotations

from dataclasses import dataclass

from entropi.errors import UserError
from entropi.private.compute.settings import MOST_MEMORY_GB
from entropi.private.wire.messages import MAX_BATCH, MAX_DRAFT, MAX_TOKENS

_MAY_BE_0 = ("max_queue", "memory_gb", "conversation_tokens", "draft_tokens")


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    Attributes:
        max_sessions: computing at a time.
        max_queue: clients waiting for one of these; 0 refuses whoever finds all slots taken.
        queue_seconds: the longest wait.
        max_new_tokens: that a session may ask for.
        session_seconds: from the end of the queue on.
        stall_seconds: that may pass without any operation finished or token asked for.
        conversation_tokens: of messages and answers together, that a conversation may have; 0 for no conversations.
        conversation_seconds: in place of `session_seconds` for these.
        idle_seconds: that may pass between an answer of a conversation and the next message.
        memory_gb: address space that a session's process may write to, in 10^9 bytes; None for what its model and
            length need, with room; 0 for no limit.
        client_sessions: computing or waiting at a time, of one client certificate; None for no limit.
        client_tokens: whose logits a client certificate learns within a day, drafts included; None for no limit.
        max_startups: connections that have no session yet.
        source_startups: of these, of one address or client certificate.
        draft_tokens: that a pass may compute beside its own one, and drop; 0 for no drafts.
        batch_prompts: that may share the passes of a session; 1 for no batches.
        batch_tokens: of these prompts and their answers together.

    Raises:
        UserError: a limit that would let nobody in.
    """

    max_sessions: int = 1
    max_queue: int = 8
    queue_seconds: float = 600.0
    max_new_tokens: int = 64
    session_seconds: float = 3600.0
    stall_seconds: float = 600.0
    conversation_tokens: int = 1024
    conversation_seconds: float = 14_400.0
    idle_seconds: float = 600.0
    memory_gb: float | None = None
    client_sessions: int | None = None
    client_tokens: int | None = None
    max_startups: int = 64
    source_startups: int = 48
    draft_tokens: int = 8
    batch_prompts: int = 8
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (value > 0 or (name in _MAY_BE_0 and value == 0)):
                may = "cannot be negative" if name in _MAY_BE_0 else "must be positive"
                raise UserError(f"{name} is {value} but {may}")
        if self.memory_gb is not None and self.memory_gb > MOST_MEMORY_GB:
            raise UserError(f"memory_gb is {self.memory_gb} but must not be more than {MOST_MEMORY_GB:,}")
        if self.draft_tokens > MAX_DRAFT:
            raise UserError(f"draft_tokens is {self.draft_tokens} but must not be more than {MAX_DRAFT}")
        if self.batch_prompts > MAX_BATCH:
            raise UserError(f"batch_prompts is {self.batch_prompts} but must not be more than {MAX_BATCH}")
        for name in ("conversation_tokens", "batch_tokens"):
            if (tokens := getattr(self, name)) > MAX_TOKENS:
                raise UserError(f"{name} is {tokens} but must not be more than {MAX_TOKENS:,}")
