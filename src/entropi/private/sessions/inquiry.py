"""What a server has of a client's tickets, asked before anything is begun: halves alone are of no use.

Nothing is masked with a ticket before both sides have taken it, in the session that uses it. So a client keeps its half
where the server knows nothing of the ticket or keeps no material, as another one behind the same address may have the
other half. It destroys its own where the server says that the other half is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import aiohttp

from entropi.errors import UserError
from entropi.private.preparation.tickets import State
from entropi.private.sessions.material import Material, Size
from entropi.private.wire.channel import HANDSHAKE_SECONDS, receive
from entropi.private.wire.messages import MAX_INQUIRIES, MAX_TICKETS, Held, Tickets, encode


async def ask_about(
    socket: aiohttp.ClientWebSocketResponse, where: str, tickets: Sequence[str], *, destroy: bool = False
) -> list[State] | None:
    """What the server has of as many of these tickets, from the first on, as may be asked for over one connection.

    Args:
        socket: on which nothing but the handshake has happened.
        destroy: have it destroyed first.

    Returns:
        One state a ticket; None from a server that keeps no material.

    Raises:
        UserError: a server that does not answer, or does not follow the protocol.
    """
    states: list[State] = []
    for first in range(0, min(len(tickets), MAX_INQUIRIES * MAX_TICKETS), MAX_TICKETS):
        asked = list(tickets[first : first + MAX_TICKETS])
        await socket.send_str(encode(Tickets(asked, destroy)).decode())
        held = await receive(socket, where, Held, HANDSHAKE_SECONDS)
        if held.states is None:
            return None
        if len(held.states) != len(asked):
            raise UserError(f"{where} does not follow the protocol")
        states += held.states
    return states


async def usable(
    material: Material,
    socket: aiohttp.ClientWebSocketResponse,
    where: str,
    found: list[tuple[str, Size]],
    status: Callable[[str], None],
) -> list[tuple[str, Size]]:
    """Those of these tickets of which the server has its half ready; `status` hears in one line of the others.

    Raises:
        UserError: as `ask_about`, and what a store refuses.
    """
    if not found:
        return []
    if (states := await ask_about(socket, where, [ticket for ticket, _ in found])) is None:
        status(f"{where} was started without --material: what is prepared is kept here")
        return []

    told = []
    by_state = {state: [one for one, other in zip(found, states) if other == state] for state in set(states)}
    if gone := by_state.get("gone"):
        for ticket, size in gone:  # but not what another session of this user is taking in this moment
            if (claim := await material.claim(ticket, size, where)) is not None:
                try:
                    await material.discard(ticket)
                finally:
                    claim.release()
        told.append(f"{where} has lost its half of {_prepared(gone)}: destroyed here too")
    ready = by_state.get("ready", [])
    if not ready and (other := by_state.get("other")):
        told.append(f"{where} serves other weights or settings than {_prepared(other)} would need: kept here")
    if not ready and (unknown := by_state.get("unknown")):
        told.append(f"{where} does not know {_prepared(unknown)}, which another server may have a half of: kept here")
    if told:
        status("; ".join(told))
    return ready


def _prepared(found: Sequence[object]) -> str:
    return f"{len(found)} prepared session{'s' if len(found) > 1 else ''}"
