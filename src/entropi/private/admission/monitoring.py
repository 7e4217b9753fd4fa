"""What the model owner may watch: counters for Prometheus, a health check, log lines for programs.

All of it counts and times sessions; prompts, tokens, logits and weights never come here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from aiohttp import web

Ending = Literal["finished", "left", "refused", "failed"]
# Why a connection was ended before it had a session: no certificate or a wrong one, no TLS 1.3, nothing said in time,
# displaced by others, no descriptor left, something else the system could not do.
HANDSHAKES = ("certificate", "tls", "timeout", "silent", "crowded", "descriptors", "system")


@dataclass
class Counters:
    """Since the server started; what only grows, but for the two that say how things stand."""

    sessions: int = 0  # computing right now
    waiting: int = 0  # in the queue right now
    endings: Counter[Ending] = field(default_factory=Counter)  # connections that are over
    handshakes: Counter[str] = field(default_factory=Counter)  # refused, by `HANDSHAKES`
    revoked: int = 0  # certificates on the list
    prompt_tokens: int = 0  # of sessions that were accepted
    tokens: int = 0  # generated
    sent_bytes: int = 0  # by the server's engines, as their meters count
    received_bytes: int = 0
    session_seconds: float = 0.0  # of sessions that are over
    started: float = field(default_factory=time.time)

    def exposition(self) -> str:
        """The Prometheus text format, version 0.0.4."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        yield from _metric("sessions", "gauge", "Sessions computing now.", self.sessions)
        yield from _metric("waiting", "gauge", "Clients in the queue now.", self.waiting)
        yield "# HELP entropi_connections_total Connections that are over, by how they ended."
        yield "# TYPE entropi_connections_total counter"
        for ending in ("finished", "left", "refused", "failed"):
            yield f'entropi_connections_total{{ending="{ending}"}} {self.endings[ending]}'
        yield "# HELP entropi_refused_handshakes_total Connections that were ended before they had a session."
        yield "# TYPE entropi_refused_handshakes_total counter"
        for kind in HANDSHAKES:
            yield f'entropi_refused_handshakes_total{{kind="{kind}"}} {self.handshakes[kind]}'
        yield from _metric("revoked", "gauge", "Certificates that are revoked.", self.revoked)
        yield from _metric("prompt_tokens_total", "counter", "Lengths of the prompts accepted.", self.prompt_tokens)
        yield from _metric("tokens_total", "counter", "Tokens generated.", self.tokens)
        yield from _metric("sent_bytes_total", "counter", "Bytes the engines sent.", self.sent_bytes)
        yield from _metric("received_bytes_total", "counter", "Bytes the engines received.", self.received_bytes)
        yield from _metric("session_seconds_total", "counter", "Length of past sessions.", self.session_seconds)
        yield from _metric("start_time_seconds", "gauge", "When the server started, Unix time.", self.started)


def _metric(name: str, kind: str, text: str, value: float) -> Iterator[str]:
    yield f"# HELP entropi_{name} {text}"
    yield f"# TYPE entropi_{name} {kind}"
    yield f"entropi_{name} {value:.3f}" if isinstance(value, float) else f"entropi_{name} {value}"


def monitoring_app(counters: Counters) -> web.Application:
    """`/health`, which answers as long as the server takes connections, and `/metrics`."""

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "sessions": counters.sessions, "waiting": counters.waiting})

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(
            body=counters.exposition().encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    return app
