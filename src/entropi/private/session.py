"""What server and client share: addresses, folded models, the program, and the child process that is their party."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropi.errors import UserError
from entropi.private.confinement import summary
from entropi.private.functions import CIPHERTEXT, POLYNOMIALS
from entropi.private.link_frames import DEFAULT_UNREAD
from entropi.private.messages import BadMessage, Event, Failed, Job, Proceed, Settings, decode, decode_event, encode
from entropi.private.program import Description, Stage, forward
from entropi.private.tunnel import link_folder

WEIGHTS_FILE = "folded.safetensors"
DESCRIPTION_FILE = "folded.json"
SUSPENDED_SECONDS = 10.0  # that a party may be stopped by a signal
MEMORY_ROOM = 2.0  # times the prediction: a session that honest parties need must not fail for it
# Without the working folder in the search path: what lies there is neither imported nor readable to a party.
PARTY_COMMAND = (
    sys.executable,
    "-c",
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from entropi.private.party_process import main; sys.exit(main())",
)
_KEPT = {"HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV"}
_KEPT_PREFIXES = ("LC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "XLA_")
_LINE_LIMIT = 64 << 20  # a line of logits of the largest vocabulary fits


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


def sha256_of(path: Path) -> str:
    """Of a file's content, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


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


def stages_of_pass(model: Description, settings: Settings, new: int, past: int) -> Iterator[Stage]:
    """`forward` as these settings have it: what both parties run, and what the client counts."""
    return forward(
        model,
        new,
        past,
        settings.exp_iterations,
        embedding=settings.embedding,
        paired=settings.paired,
        fraction_bits=settings.fraction_bits,
        output=settings.output,
        choices=settings.choices,
        logit_bits=settings.logit_bits,
    )


def memory_for(model: Description, tokens: int, memory_gb: float | None) -> int | None:
    """Bytes that a party's process may write to: the limit asked for, or else what a session needs, twice.

    Args:
        tokens: prompt and answer together.
        memory_gb: in 10^9 bytes; None for the prediction, 0 for no limit.
    """
    if memory_gb is not None:
        return int(memory_gb * 1e9) or None
    return int(MEMORY_ROOM * needed_memory(model, tokens))


def needed_memory(model: Description, tokens: int) -> int:
    """Bytes that a party of a session with so many tokens, prompt and answer together, is predicted to write to.

    It lies above `VmData`, which the limit counts, of both parties of ten shapes (benchmarks/results/party_memory.md).
    It has a part of its own (Python, JAX, SPU, tables of oblivious transfer), one for every core's threads, one for the
    weights, their shares and encodings, one for the polynomials of the largest matrix product, and one for the largest
    tensor of which every number takes part in comparisons or polynomials.
    """
    shapes = model.weight_shapes()
    weights = sum(math.prod(shape) for shape in shapes.values())
    # Multiplications of the largest product; larger ones are computed in pieces (`times_matrix`, `times_table`).
    rows, once = min(tokens, 128), ("embedding", "positions", "head")  # the head has one row
    largest = rows * max(math.prod(shape) for name, shape in shapes.items() if name not in once)
    table = min(rows * math.prod(shapes["embedding"]), POLYNOMIALS * CIPHERTEXT)
    wide = max(model.intermediate_size, 3 * model.hidden_size)
    values = tokens * max(model.heads * tokens, wide) + model.vocab_size
    own = 2e9 + 5e7 * (os.cpu_count() or 1)
    return int(own + 150 * weights + 30 * max(largest, table) + 8e3 * values)


def _too_little_memory(job: Job, memory_bytes: int | None) -> str:
    """What to add to a failure of a party whose memory limit is below what it is predicted to need; else ""."""
    needed = needed_memory(job.description, job.prompt_length + job.max_new_tokens)
    if memory_bytes is None or memory_bytes >= needed:
        return ""
    return (
        f"; its memory limit of {memory_bytes / 1e9:.2g} GB may be too small, as about {needed / 1e9:.1f} GB are "
        "predicted for this model and length (--memory-gb)"
    )


def unread_for(memory_bytes: int | None) -> int:
    """Bytes that a party may leave unread, of its memory limit."""
    return DEFAULT_UNREAD if memory_bytes is None else memory_bytes // 4


def _environment() -> dict[str, str]:
    """What a party's process needs to know of this one's environment: no password, no token of anything else."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    return {**kept, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


async def confinement() -> str:
    """What a party's process gives up on this system, in one line; "unknown" if none can be started."""
    with link_folder() as folder:
        process = await asyncio.create_subprocess_exec(
            *PARTY_COMMAND,
            "--confinement",
            folder,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=_environment(),
        )
        said, _ = await process.communicate()
    try:
        return summary(decode(said, list[str]))
    except BadMessage:
        return "unknown"


class Party:
    """The child process that runs one party of one session."""

    def __init__(self, process: asyncio.subprocess.Process, too_little: str = "") -> None:
        self._process = process
        self._too_little = too_little  # memory, if it is; said of every failure, for each may come from that

    @classmethod
    async def start(cls, job: Job, memory_bytes: int | None = None) -> Party:
        """Start the process, with a limit to the memory it may write to, and hand it its job by pipe."""
        process = await asyncio.create_subprocess_exec(
            *PARTY_COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_LIMIT,
            start_new_session=True,  # Ctrl-C is for the parent alone, which then ends its party
            env=_environment(),
        )
        party = cls(process, _too_little_memory(job, memory_bytes))
        try:
            if memory_bytes is not None:
                with contextlib.suppress(ProcessLookupError):  # its events tell why it is gone
                    resource.prlimit(process.pid, resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
            await party._write(encode(job))
        except BaseException:  # a session that ends right now
            await party.stop()
            raise
        return party

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

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
                event = decode_event(line)
                return Failed(reason=event.reason + self._too_little) if isinstance(event, Failed) else event
        except (BadMessage, ValueError):  # what a crashing process may leave; too long a line
            return Failed(reason="the party's process wrote something unreadable" + self._too_little)
        if status := await self._process.wait():
            return Failed(reason=f"the party's process ended with status {status}{self._too_little}")
        return None

    async def suspended(self) -> None:
        """Return once somebody has stopped the process (SIGSTOP) and not let it go on for a while; Linux only.

        Its parent still answers for it on the control channel, so that the other side could not tell it from one that
        computes.
        """
        looks = 0
        while looks < 2:
            await asyncio.sleep(SUSPENDED_SECONDS / 2)
            state = ""
            with contextlib.suppress(OSError, IndexError):  # the name before it, in parentheses, may hold anything
                state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            looks = looks + 1 if state == "T" else 0

    async def stop(self) -> None:
        """End the process, whatever it is doing, and wait until it is gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
