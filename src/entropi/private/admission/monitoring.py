"""What the model owner may watch: counters for Prometheus, a health check, log lines for programs.

All of it counts and times sessions; prompts, tokens, logits and weights never come here.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from aiohttp import web

from entropi.console import escaped_json, without_controls

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


if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:  # which Python 3.10 cannot subscript
    _Adapter = logging.LoggerAdapter


class SessionLog(_Adapter):
    """Log lines of one session: its name in front, and as fields for `JsonLines`; none below errors while `quiet`."""

    def __init__(self, logger: logging.Logger, session: str, client: str, *, quiet: bool = False) -> None:
        super().__init__(logger, {"session": session, **({"client": client} if client else {})})
        self.session, self.quiet = session, quiet

    def isEnabledFor(self, level: int) -> bool:
        """Whether a line of this level is written."""
        return (not self.quiet or level >= logging.ERROR) and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """Add the session to a line, and move `fields` to where `JsonLines` finds them."""
        fields = {**(self.extra or {}), **kwargs.pop("fields", {})}
        return f"session {fields['session']}: {msg}", {**kwargs, "extra": {"fields": fields}}


class Sparing(logging.Filter):
    """Lets so many lines of a logger pass within a minute, and says with the next one how many it did not.

    Args:
        most: lines within a minute.
    """

    def __init__(self, most: int = 30) -> None:
        super().__init__()
        self._most, self._passed, self._kept, self._began = most, 0, 0, time.monotonic()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        if time.monotonic() - self._began >= 60:
            self._passed, self._began = 0, time.monotonic()
        if self._passed >= self._most:
            self._kept += 1
            return False
        self._passed += 1
        if self._kept:
            record.msg, record.args = f"{record.getMessage()} ({self._kept} lines before were not written)", ()
            self._kept = 0
        return True


class PlainLines(logging.Formatter):
    """One line for people: time, level, message; a traceback below it. Names that clients chose cannot break out."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line itself, without the traceback that may follow."""
        return without_controls(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """A traceback, of several lines."""
        return without_controls(super().formatException(ei), "\n\t")


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, message, and the fields a session's lines carry."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a newline."""
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return escaped_json(msgspec.json.encode(line).decode())
