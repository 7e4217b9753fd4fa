"""Sums over the stages of a private run: by operation and by pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from entropi.records import StageTraffic


@dataclass(frozen=True)
class Traffic:
    """Bytes and messages in both directions, and seconds."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages: int = 0
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        return self.sent_bytes + self.received_bytes

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
            self.messages + other.messages,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class OperationTraffic:
    """What one operation cost over all layers: in the pass over the prompt, and for all further tokens."""

    name: str
    prompt: Traffic
    further: Traffic

    @property
    def total(self) -> Traffic:
        return self.prompt + self.further


def _traffic(stage: StageTraffic) -> Traffic:
    return Traffic(stage.sent_bytes, stage.received_bytes, stage.messages, stage.seconds)


def by_operation(stages: Iterable[StageTraffic]) -> list[OperationTraffic]:
    """Stages summed over layers and tokens, the operation with most bytes first (then most seconds)."""
    sums: dict[str, list[Traffic]] = {}
    for stage in stages:
        pair = sums.setdefault(stage.name, [Traffic(), Traffic()])
        pair[stage.token > 0] += _traffic(stage)
    operations = [OperationTraffic(name, prompt, further) for name, (prompt, further) in sums.items()]
    return sorted(operations, key=lambda o: (o.total.bytes, o.total.seconds), reverse=True)


def by_pass(stages: Iterable[StageTraffic]) -> list[tuple[int, Traffic]]:
    """Stages summed over layers and operations: `(token, traffic)`, token 0 for the pass over the prompt."""
    sums: dict[int, Traffic] = {}
    for stage in stages:
        sums[stage.token] = sums.get(stage.token, Traffic()) + _traffic(stage)
    return sorted(sums.items())
