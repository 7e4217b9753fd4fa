"""Who was refused, who was let in, how it ended: one JSON object a line, and never what was asked or answered.

The first of a kind is written at once. Those that follow within `WINDOW_SECONDS`, of the same event, client and reason,
are counted and written as one line with `count`, so that a flood is recorded in full and in few lines.
"""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import os
import time
from pathlib import Path
from typing import Any

from entropi.errors import UserError
from entropi.private.admission.logs import JsonLines
from entropi.private.admission.monitoring import Counters

WINDOW_SECONDS = 10.0
MOST_KINDS = 200  # lines within a window; beyond, clients are not told apart
OTHERS = "(others)"
log = logging.getLogger("entropi.audit")
log.setLevel(logging.INFO)


class Audit:
    """Writes events and counts refusals.

    Args:
        counters: where refused handshakes are counted by reason.
        path: a file of their own for the events, appended to, readable for its owner only; None for the program's log.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, counters: Counters, path: Path | None = None) -> None:
        self._counters = counters
        self._repeated: dict[tuple[str, str, str], int] = {}  # (event, client, reason) -> since it was written
        self._began = time.monotonic()
        self._handler: logging.Handler | None = None
        if path is not None:
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
                self._handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")  # may be rotated
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror}") from None
            self._handler.setFormatter(JsonLines())
            log.addHandler(self._handler)
            log.propagate = False

    def refused(self, client: str, kind: str, reason: str) -> None:
        """A connection that was ended before it had a session.

        Args:
            client: its address, or the name in its certificate.
            kind: one of `monitoring.HANDSHAKES`.
            reason: a sentence.
        """
        self._counters.handshakes[kind] += 1
        self._write("handshake refused", client, reason, {"kind": kind})

    def session(self, client: str, ending: str, reason: str, fields: dict[str, Any], *, computed: bool) -> None:
        """A session that is over.

        Args:
            client: name and fingerprint of its certificate, without TLS its address.
            reason: why it was refused or failed; "" if it did not.
            fields: its name and address, seconds, tokens.
            computed: it had a slot; these are few, and all of them are written.
        """
        event = "session refused" if ending == "refused" else "session over"
        if computed:
            self._line((event, client, reason), {"ending": ending, **fields})
        else:
            self._write(event, client, reason or ending, {"ending": ending, **fields})

    def happened(self, event: str, reason: str = "") -> None:
        """Something about the server itself: a new list of revoked certificates."""
        self._write(event, "", reason, {})

    def _write(self, event: str, client: str, reason: str, fields: dict[str, Any]) -> None:
        self._turn_over()
        key = (event, client, reason)
        if key not in self._repeated and len(self._repeated) >= MOST_KINDS:
            key, fields = (event, OTHERS, ""), {}
        if key in self._repeated:
            self._repeated[key] += 1
            return
        self._repeated[key] = 0
        self._line(key, fields)

    def _line(self, key: tuple[str, str, str], fields: dict[str, Any]) -> None:
        event, client, reason = key
        words = [event, *([f"of {client}"] if client else [])]
        told = {"event": event, "client": client, "reason": reason, **fields}
        level = logging.WARNING if "refused" in event else logging.INFO
        suffix = f" ({fields['count']} more times)" if "count" in fields else ""
        text = " ".join(words) + (f": {reason}" if reason else "") + suffix
        log.log(level, "%s", text, extra={"fields": told})

    def _turn_over(self, *, force: bool = False) -> None:
        if force or time.monotonic() - self._began >= WINDOW_SECONDS:
            repeated, self._repeated, self._began = self._repeated, {}, time.monotonic()
            for key, count in repeated.items():
                if count:
                    self._line(key, {"count": count})

    async def keep(self) -> None:
        """Write what was counted at the end of every window, until cancelled."""
        try:
            while True:
                await asyncio.sleep(WINDOW_SECONDS)
                self._turn_over()
        finally:
            self._turn_over(force=True)

    def close(self) -> None:
        """Close the file."""
        self._turn_over(force=True)
        if self._handler is not None:
            log.removeHandler(self._handler)
            self._handler.close()
            log.propagate = True
