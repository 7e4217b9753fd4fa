"""What all sessions of a server share."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from entropi.private.admission.audit import Audit
from entropi.private.admission.limits import Limits
from entropi.private.admission.monitoring import Counters
from entropi.private.admission.quotas import Quota
from entropi.private.admission.slots import Slots
from entropi.private.sessions.material import Material
from entropi.private.wire.certificates import Peer
from entropi.private.wire.messages import (
    Welcome,
)
from entropi.private.wire.revocation import Revoked, Watched


@dataclass(frozen=True)
class ServerState:
    """Everything a session needs of the server."""

    folder: Path
    welcome: Welcome
    digest: str
    limits: Limits
    slots: Slots
    preparing: Slots  # of sessions that prepare, one at a time beside the others
    quota: Quota
    counters: Counters
    table: Path | None  # the token embeddings, where they are public
    prefix: Path | None  # keys and values of the public prefix, where there is one
    audit: Audit
    material: Material | None  # what was prepared, where that is allowed
    watched: Watched | None  # certificates and what is revoked; None without TLS
    ahead: Path | None = None  # matrices that look ahead, see `compute.lookahead`, for what is prepared
    greeting: tuple[bytes, ...] = ()  # the welcome as it goes over every connection
    sockets: dict[web.WebSocketResponse, Peer | None] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=deque)  # when connections had their own log lines

    @property
    def revoked(self) -> Revoked:
        return self.watched.revoked if self.watched is not None else Revoked()
