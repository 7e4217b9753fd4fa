"""Where somebody listens: HOST:PORT, and whether that leads to this machine alone."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterator

from entropi.errors import UserError


def parse_address(address: str, *, tls: bool = False) -> tuple[str, int]:
    """Host and port of "HOST:PORT", an IPv6 host in brackets.

    Raises:
        UserError: not of that form, or not a loopback address although there is no TLS: the control channel would
            show names and counts, and nobody would know who is at the other end.
    """
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", host) or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise UserError(f"{address!r} is not an address: write HOST:PORT, for example 127.0.0.1:9000")
    if tls:
        return host, int(port)
    host = "127.0.0.1" if host == "localhost" else host
    if not is_loopback(host):
        raise UserError(f"{host} is not a loopback address; other machines need TLS: see `entropi certificates`")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether an address, not a name, leads to this machine and nowhere else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def spelled(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def listening(address: tuple[str, int]) -> Iterator[None]:
    """Around an attempt to listen there: what goes wrong becomes one line."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise UserError(f"cannot listen on {spelled(*address)}: {reason}") from None
