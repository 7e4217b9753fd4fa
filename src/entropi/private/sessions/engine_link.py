"""The sockets between engines: SPU's link over addresses that a tunnel, or a measurement, names.

Beside `compute.engine` and `compute.shares` nothing else imports `spu`. The engine itself only computes over a
link that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spu import libspu

from entropi.private.compute.engine import RECEIVE_TIMEOUT_S, EngineError, one_line, start_log
from entropi.private.wire.link_frames import MAX_PUSH

LINK_TIMEOUT_S = 30  # how long to wait for the other engine to appear


def open_link(rank: int, addresses: Sequence[str], session: str | None = None) -> Any:
    """A link of the engine `rank` to all others, for `Engine` or `Simulation`.

    Args:
        addresses: "host:port" or "unix:PATH" of every engine, by rank.
        session: name of this computation, the same on all sides; messages of another one are not taken for its own.
            Without one SPU's own defaults hold: for measurements.

    Raises:
        EngineError: no link within `LINK_TIMEOUT_S` seconds.
    """
    start_log()  # before anything of SPU has something to say
    desc = libspu.link.Desc()
    for number, address in enumerate(addresses):
        desc.add_party(f"party {number}", address)
    desc.recv_timeout_ms = desc.http_timeout_ms = RECEIVE_TIMEOUT_S * 1000

    if session is not None:
        desc.id = session
        desc.connect_retry_times = LINK_TIMEOUT_S * 5
        desc.connect_retry_interval_ms = 200
        # In one piece: a receiver does not compare the lengths that chunks claim, so `link_frames` refuses them.
        desc.http_max_payload_size = MAX_PUSH

    try:
        return libspu.link.create_brpc(desc, rank)
    except RuntimeError as error:
        raise EngineError(one_line(error, f"no link between {' and '.join(addresses)}")) from None
