"""Private inference between two processes: program, engine, sessions; torch is imported nowhere here.

`connect`, `Tls`, `Sampling`, `Privacy` and `Watcher` are what a Python program needs to ask a server; they are imported
when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropi.private.certificates import Tls
    from entropi.private.client import Privacy, Sampling, Watcher, connect

__all__ = ["Privacy", "Sampling", "Tls", "Watcher", "connect"]

_HOMES = {
    "Privacy": "entropi.private.client",
    "Sampling": "entropi.private.client",
    "Tls": "entropi.private.certificates",
    "Watcher": "entropi.private.client",
    "connect": "entropi.private.client",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'entropi.private' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
