"""One answer: what is asked, what of it has been received, what a caller sees meanwhile and gets in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from entropi.errors import UserError
from entropi.private.compute.settings import MOST_MEMORY_GB
from entropi.private.preparation.store import Store
from entropi.private.sessions.drafting import Drafter, Window
from entropi.private.sessions.privacy import USUAL, Privacy
from entropi.private.sessions.sampling import Sampling
from entropi.private.sessions.tokenization import (
    check_prompt,
)
from entropi.records import PrivateRun, StageCommunication


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

    `begin(stages)` is called with the number of operations if all tokens are generated, once for every session, and
    again whenever drafts held, which makes them fewer;
    `stage(done, record)` after every operation, set-up included; `text(piece)` whenever more of the answer can be
    shown; `status(line)` when something else happens: a place in the queue, a retry.
    """

    begin: Callable[[int], None] = field(default=lambda total: None)
    stage: Callable[[int, StageCommunication], None] = field(default=lambda done, communication: None)
    text: Callable[[str], None] = field(default=lambda piece: None)
    status: Callable[[str], None] = field(default=lambda line: None)


@dataclass
class Generation:
    """What is asked, and what of the answer has been received, over as many sessions as it takes.

    In a conversation several of these, each after the tokens of the one before it, may share a session.
    """

    prompt: str
    max_new_tokens: int
    sampling: Sampling
    retries: int
    watcher: Watcher
    privacy: Privacy = USUAL
    memory_gb: float | None = None  # most memory of this side's party: see `memory_for`
    chat: bool = False  # the prompt is a message, around which the model's chat template puts text
    store: Store | None = None  # of prepared material, which is used if the server has its half
    system: str | None = None  # prompt of a conversation that begins with this message
    history: list[int] = field(default_factory=list)  # tokens of the conversation before this message
    drafter: Drafter | None = None  # guesses several tokens a pass
    digest: str | None = None  # of what the server made public when the question was begun
    padding: list[int] = field(default_factory=list)  # before the prompt
    prompt_ids: list[int] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    stages: list[StageCommunication] = field(default_factory=list)
    setup_seconds: float = 0.0
    setup_bytes: int = 0
    reveal_bytes: int = 0
    prepared_bytes: int = 0  # exchanged before, when the material that is used was prepared
    prepared_seconds: float = 0.0
    drafted: int = 0  # tokens that were computed with before it was known whether they are the answer's
    held: int = 0  # of these
    window: Window = field(default_factory=Window)
    done: int = 0  # operations, set-ups included
    shown: str = ""
    stopped: bool = False  # the token that is being computed is to be the last

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}, at least 1 is needed")
        if self.memory_gb is not None and not 0 <= self.memory_gb <= MOST_MEMORY_GB:
            raise UserError(f"memory_gb is {self.memory_gb} but must be between 0 and {MOST_MEMORY_GB:,}")
        if self.drafter is not None and self.privacy.full_length:
            raise UserError("full_length hides where an answer ends, and how many drafts hold may tell: leave one out")
        if self.retries < 0:
            raise UserError(f"retries is {self.retries} but must not be negative")
        check_prompt(self.prompt)
        if self.system is not None:
            check_prompt(self.system)
            if not self.chat:
                raise UserError("a system prompt has its place in a chat only")
        self.random = np.random.default_rng(self.sampling.seed)

    def note(self, communication: StageCommunication) -> None:
        """Count an operation of a pass, or of the set-up."""
        self.done += 1
        if communication.name == "setup":
            self.setup_seconds += communication.seconds
            self.setup_bytes += communication.bytes
        else:
            self.stages.append(communication)

    @property
    def ids(self) -> list[int]:
        """All tokens so far, in order, but for the server's public prefix."""
        return self.history + self.padding + self.prompt_ids + self.new_tokens

    @property
    def left(self) -> int:
        """New tokens that are yet to come, unless the answer ends before."""
        return self.max_new_tokens - len(self.new_tokens)

    @property
    def answer_ids(self) -> list[int]:
        """The new tokens up to the first that ends a text, that one included."""
        ends = [place for place, token in enumerate(self.new_tokens) if token in self.stop_ids]
        return self.new_tokens[: ends[0] + 1] if ends else self.new_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the last token received was the last of all."""
        ended = bool(self.new_tokens) and self.new_tokens[-1] in self.stop_ids and not self.privacy.full_length
        return ended or not self.left or (self.stopped and bool(self.new_tokens))
