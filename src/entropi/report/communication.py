"""Sums over the stages of a private run: by operation and by pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from entropi.records import StageCommunication


@dataclass(frozen=True)
class Communication:
    """Bytes and messages in both directions, and seconds."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        return self.sent_bytes + self.received_bytes

    def __add__(self, other: Communication) -> Communication:
        return Communication(
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
            self.messages + other.messages,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class OperationCommunication:
    """What one operation cost over all layers: in the pass over the prompt, and for all further tokens."""

    name: str
    prompt: Communication
    further: Communication

    @property
    def total(self) -> Communication:
        return self.prompt + self.further


def _communication(stage: StageCommunication) -> Communication:
    return Communication(stage.sent_bytes, stage.received_bytes, stage.messages, stage.seconds)


def by_operation(stages: Iterable[StageCommunication]) -> list[OperationCommunication]:
    """Stages summed over layers and tokens, the operation with most bytes first (then most seconds)."""
    sums: dict[str, list[Communication]] = {}
    for stage in stages:
        pair = sums.setdefault(stage.name, [Communication(), Communication()])
        pair[stage.token > 0] += _communication(stage)
    operations = [OperationCommunication(name, prompt, further) for name, (prompt, further) in sums.items()]
    return sorted(operations, key=lambda o: (o.total.bytes, o.total.seconds), reverse=True)


def by_pass(stages: Iterable[StageCommunication]) -> list[tuple[int, Communication]]:
    """Stages summed over layers and operations: `(token, communication)`, token 0 for the pass over the prompt."""
    sums: dict[int, Communication] = {}
    for stage in stages:
        sums[stage.token] = sums.get(stage.token, Communication()) + _communication(stage)
    return sorted(sums.items())
