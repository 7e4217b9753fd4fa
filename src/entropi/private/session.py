"""What server and client share: addresses, folded models, and the child process that is their party."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import socket
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropi.errors import UserError
from entropi.private.messages import BadMessage, Event, Failed, Job, Proceed, decode, decode_event, encode
from entropi.private.program import Description

WEIGHTS_FILE = "folded.safetensors"
DESCRIPTION_FILE = "folded.json"
_LINE_LIMIT = 64 << 20  # a line of logits of the largest vocabulary fits


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT".

    Raises:
        UserError: not of that form, or not a loopback address: without TLS, which this version does not have
            yet, the wire would show what the parties' engines assume to be protected.
    """
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise UserError(f"{address!r} is not an address: write HOST:PORT, for example 127.0.0.1:9000")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        loopback = ipaddress.ip_address(host).is_loopback and ":" not in host
    except ValueError:
        loopback = False
    if not loopback:
        raise UserError(f"{host} is not a loopback IPv4 address; other machines need TLS, which is not supported yet")
    return host, int(port)


def free_port(host: str) -> int:
    """A TCP port of `host` that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def load_folded(folder: Path) -> tuple[Description, dict[str, np.ndarray]]:
    """Description and weights of a folded model.

    Raises:
        UserError: missing or damaged, in one line.
    """
    try:
        description = decode((folder / DESCRIPTION_FILE).read_bytes(), Description)
        weights = load_file(folder / WEIGHTS_FILE)
    except OSError as error:
        raise UserError(f"{folder} holds no folded model: {error.strerror or error}") from None
    except (BadMessage, SafetensorError, AttributeError) as error:
        # AttributeError: a type of number that safetensors knows and NumPy does not
        raise UserError(f"the folded model in {folder} is damaged: {str(error).splitlines()[0]}") from None
    shapes = {name: weight.shape for name, weight in weights.items()}
    if shapes != description.weight_shapes():
        wrong = sorted(set(shapes.items()) ^ set(description.weight_shapes().items()))[0][0]
        raise UserError(f"the folded model in {folder} is damaged: {wrong} does not have the described shape")
    if broken := [name for name, weight in weights.items() if not np.isfinite(weight).all()]:
        raise UserError(f"the folded model in {folder} is damaged: {broken[0]} is not finite")
    return description, weights


class Party:
    """The child process that runs one party of one session."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, job: Job) -> Party:
        """Start the process and hand it its job by pipe."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "entropi.private.party",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_LIMIT,
            start_new_session=True,  # Ctrl-C is for the parent alone, which then ends its party
            env={**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        party = cls(process)
        try:
            await party._write(encode(job))
        except BaseException:  # a session that ends right now
            await party.stop()
            raise
        return party

    async def proceed(self, token: int | None = None) -> None:
        """Let the party run the pass for one more token."""
        await self._write(encode(Proceed(token=token)))

    async def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its events tell why it is gone
            self._process.stdin.write(line + b"\n")
            await self._process.stdin.drain()

    async def event(self) -> Event | None:
        """The next event, None once the process has ended as it should; any other end is a `Failed` event."""
        assert self._process.stdout is not None
        try:
            if line := await self._process.stdout.readline():
                return decode_event(line)
        except (BadMessage, ValueError):  # what a crashing process may leave; too long a line
            return Failed(reason="the party's process wrote something unreadable")
        if status := await self._process.wait():
            return Failed(reason=f"the party's process ended with status {status}")
        return None

    async def stop(self) -> None:
        """End the process, whatever it is doing, and wait until it is gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
