"""A client's way to a server: its address, the control channel, the handshake; what goes wrong becomes one line."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from entropi.console import without_controls
from entropi.errors import UserError
from entropi.private.wire.addresses import parse_address
from entropi.private.wire.certificates import Tls
from entropi.private.wire.messages import (
    MAX_SERVER_MESSAGE,
    PROTOCOL_VERSION,
    BadMessage,
    FromServer,
    Hello,
    Refused,
    Welcome,
    decode_from_server,
    encode,
)
from entropi.private.wire.versions import engine_version

CONNECT_SECONDS = 10
HANDSHAKE_SECONDS = 15
HEARTBEAT_SECONDS = 10.0  # a server that says nothing for one and a half of these is gone
LAST_WORDS_SECONDS = 1.0
# Of a description: shares of the weights are this large on the client's side too, eight bytes each.
MAX_PARAMETERS = 1 << 31


class LostServer(UserError):
    """The server or the way to it failed in the middle; the same question may be continued in a new session."""


class RefusedByServer(UserError):
    """The server does not want this session; in the middle of a question it may want it a little later."""


@dataclass(frozen=True)
class ServerAddress:
    """Where a server is, and how to recognise it."""

    name: str  # as the user wrote it
    url: str
    context: ssl.SSLContext | None

    @classmethod
    def at(cls, server: str, tls: Tls | None) -> ServerAddress:
        host, port = parse_address(server, tls=tls is not None)
        spelt = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        context = tls.client_context() if tls is not None else None
        return cls(spelt, f"{'https' if context else 'http'}://{spelt}", context)


@contextlib.asynccontextmanager
async def open_channel(
    server: ServerAddress,
) -> AsyncIterator[tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]]:
    """An open control channel; what goes wrong with it becomes one line."""
    where = server.name
    not_a_server = f"{where} is not an entropi server, or it closed the connection"
    if server.context is None:
        not_a_server += "; does it want TLS?"
    else:
        not_a_server += ", perhaps because it does not accept this client's certificate"

    async def refuse_redirect(*_: Any) -> None:  # it could lead to another machine
        raise UserError(not_a_server)

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse_redirect)

    # Time limits are set around the steps; aiohttp's own would end a long generation.
    connector = aiohttp.TCPConnector(ssl=server.context or True)
    async with aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(), trace_configs=[trace], connector=connector
    ) as http:
        try:
            socket = await asyncio.wait_for(
                http.ws_connect(
                    f"{server.url}/v1/session",
                    max_msg_size=MAX_SERVER_MESSAGE,
                    heartbeat=HEARTBEAT_SECONDS,
                    timeout=aiohttp.ClientWSTimeout(ws_close=LAST_WORDS_SECONDS),
                ),
                CONNECT_SECONDS,
            )
            try:
                yield http, socket
            finally:
                await socket.close()
        except aiohttp.ClientConnectorCertificateError as error:
            raise UserError(_certificate_complaint(where, error.certificate_error)) from None
        except aiohttp.ClientConnectorSSLError as error:
            if isinstance(error.os_error, ssl.SSLCertVerificationError):
                raise UserError(_certificate_complaint(where, error.os_error)) from None
            raise UserError(f"{where} does not speak TLS 1.3") from None
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno
            reason = os.strerror(number) if number and number > 0 else error.os_error.strerror or str(error.os_error)
            raise LostServer(f"cannot reach a server at {where}: {reason}") from None
        except asyncio.TimeoutError:
            raise LostServer(f"{where} accepts connections but does not answer as an entropi server") from None
        except (ssl.SSLError, aiohttp.ClientOSError) as error:
            cause = error if isinstance(error, ssl.SSLError) else error.__cause__ or error
            if "ALERT" in str(cause).upper():  # in TLS 1.3 the server looks at our certificate after the handshake
                raise UserError(f"{where} does not accept this client's certificate") from None
            raise LostServer(not_a_server) from None
        except (aiohttp.ServerDisconnectedError, ConnectionResetError):  # it may be full, or just going
            raise LostServer(not_a_server) from None
        except aiohttp.ClientError:
            raise UserError(not_a_server) from None


def _certificate_complaint(where: str, error: Exception) -> str:
    reason = getattr(error, "verify_message", "") or str(error)
    return f"{where} is not who it should be: {reason}"


async def greet(server: ServerAddress) -> Welcome:
    """What the server makes public, over a connection of its own."""
    async with open_channel(server) as (_, socket):
        return await welcome_from(socket, server.name)


async def welcome_from(socket: aiohttp.ClientWebSocketResponse, where: str) -> Welcome:
    """The handshake: what the server makes public, if this side can use it."""
    await socket.send_str(encode(Hello(PROTOCOL_VERSION, engine_version())).decode())
    welcome = await receive(socket, where, Welcome, HANDSHAKE_SECONDS)

    parameters = sum(int(np.prod(shape, dtype=object)) for shape in welcome.description.weight_shapes().values())
    if parameters > MAX_PARAMETERS:
        raise UserError(
            f"{where} describes a model of {parameters:.2g} parameters, which is more than this client takes"
        )
    if (welcome.table is None) != (welcome.settings.embedding == "private"):
        raise UserError(f"{where} does not follow the protocol: a private embedding is shared, or a public one is not")
    return welcome


async def receive(  # type: ignore[no-untyped-def]
    socket: aiohttp.ClientWebSocketResponse, where: str, kind, timeout: float | None
):
    """The next message of the handshake, which must be of `kind`."""
    try:
        message = await asyncio.wait_for(socket.receive(), timeout)
    except asyncio.TimeoutError:
        raise LostServer(f"{where} does not answer as an entropi server") from None
    if message.type == aiohttp.WSMsgType.BINARY:
        raise UserError(f"{where} does not follow the protocol")
    if message.type != aiohttp.WSMsgType.TEXT:
        raise LostServer(f"{where} closed the connection during the handshake")
    decoded = decode(message.data, where)
    if isinstance(decoded, Refused):
        raise RefusedByServer(f"{where} refused: {without_controls(decoded.reason)}")
    if not isinstance(decoded, kind):
        raise UserError(f"{where} does not follow the protocol")
    return decoded


def decode(data: str, where: str) -> FromServer:
    """A server's message; `UserError` for anything else."""
    try:
        return decode_from_server(data)
    except BadMessage as error:
        raise UserError(f"{where} does not follow the protocol: {without_controls(str(error))}") from None
