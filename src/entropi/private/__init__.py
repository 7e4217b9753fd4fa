"""Private inference between two processes: program, engine, sessions; torch is imported nowhere here.

`connect`, `Tls`, `Sampling`, `Privacy` and `Watcher` are what a Python program needs to ask a server, and
`Conversation` is what it gets of one; `prepare` and `Store` make answers fast, and so do drafts, by a model with
`ModelDrafter`. They are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropi.private.preparation.store import Store
    from entropi.private.sessions.client import connect
    from entropi.private.sessions.conversation import Conversation
    from entropi.private.sessions.drafting import ModelDrafter
    from entropi.private.sessions.generation import Watcher
    from entropi.private.sessions.preparing import prepare
    from entropi.private.sessions.privacy import Privacy
    from entropi.private.sessions.sampling import Sampling
    from entropi.private.wire.certificates import Tls

__all__ = ["Conversation", "ModelDrafter", "Privacy", "Sampling", "Store", "Tls", "Watcher", "connect", "prepare"]

_HOMES = {
    "Conversation": "entropi.private.sessions.conversation",
    "ModelDrafter": "entropi.private.sessions.drafting",
    "Privacy": "entropi.private.sessions.client",
    "Sampling": "entropi.private.sessions.client",
    "Store": "entropi.private.preparation.store",
    "Tls": "entropi.private.wire.certificates",
    "Watcher": "entropi.private.sessions.client",
    "connect": "entropi.private.sessions.client",
    "prepare": "entropi.private.sessions.preparing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'entropi.private' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
