"""A server's log lines, for people and for programs: each names its session; what strangers wrote cannot break out."""

from __future__ import annotations

import datetime
import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec

from entropi.console import escaped_json, without_controls

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
