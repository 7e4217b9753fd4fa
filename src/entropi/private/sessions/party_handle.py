"""The parent's side of a party: starts its process, gives it its job, reads its events, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import save

from entropi.private.sessions.confinement import summary
from entropi.private.sessions.material import Taken
from entropi.private.sessions.memory import needed_memory
from entropi.private.wire.messages import BadMessage, Event, Failed, Job, Proceed, decode, decode_event, encode
from entropi.private.wire.tunnel import Tunnel, link_folder

GRACE_SECONDS = 3.0  # for a party to say why its link broke, or to end
PREPARING_GRACE_SECONDS = 60.0  # for one of low priority, which has computed everything and writes its last part
SUSPENDED_SECONDS = 10.0  # that a party may be stopped by a signal
# Without the working folder in the search path: what lies there is neither imported nor readable to a party.
PARTY_COMMAND = (
    sys.executable,
    "-c",
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from entropi.private.sessions.party_process import main; sys.exit(main())",
)
_KEPT = {"HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV"}
_KEPT_PREFIXES = ("LC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "XLA_")
_LINE_LIMIT = 64 << 20  # a line of logits of the largest vocabulary fits


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
            str(folder),
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


def _nameless(arrays: Mapping[str, np.ndarray]) -> int:
    """Descriptor of a safetensors file in memory, where the system has such files, or else of one that is deleted."""
    if hasattr(os, "memfd_create"):
        held = os.memfd_create("entropi-material")
    else:
        held, name = tempfile.mkstemp(prefix="entropi-material-")
        os.unlink(name)
    with open(held, "wb", closefd=False) as file:
        file.write(save(dict(arrays)))
    return held


def _too_little_memory(job: Job, memory_bytes: int | None) -> str:
    """What to add to a failure of a party whose memory limit is below what it is predicted to need; else ""."""
    lengths = [job.prefix_length + length + job.max_new_tokens for length in (job.prompt_length, *job.others)]
    prompts = lengths if job.others else ()
    needed = needed_memory(job.description, sum(lengths), prompts=prompts)
    if memory_bytes is None or memory_bytes >= needed:
        return ""
    return (
        f"; its memory limit of {memory_bytes / 1e9:.2g} GB may be too small, as about {needed / 1e9:.1f} GB are "
        "predicted for this model and length (--memory-gb)"
    )


class Party:
    """The child process that runs one party of one session."""

    def __init__(self, process: asyncio.subprocess.Process, too_little: str = "") -> None:
        self._process = process
        self._too_little = too_little  # memory, if it is; said of every failure, for each may come from that

    @classmethod
    async def start(cls, job: Job, memory_bytes: int | None = None, material: Taken | None = None) -> Party:
        """Start the process, with a limit to the memory it may write to, and hand it its job by pipe.

        Prepared `material` is handed over in a file without a name, of which nothing is left when the processes end,
        and is emptied here.
        """
        held = None if material is None else await asyncio.to_thread(_nameless, material.arrays)
        if material is not None:
            material.arrays.clear()
        try:
            if held is not None and material is not None:
                job = msgspec.structs.replace(
                    job,
                    material=f"/dev/fd/{held}",
                    material_tokens=material.size.tokens,
                    material_passes=material.size.passes,
                )
            return await cls._start(job, memory_bytes, () if held is None else (held,))
        finally:
            if held is not None:
                os.close(held)

    @classmethod
    async def _start(cls, job: Job, memory_bytes: int | None, files: tuple[int, ...]) -> Party:
        process = await asyncio.create_subprocess_exec(
            *PARTY_COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_LINE_LIMIT,
            pass_fds=files,
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

    async def proceed(
        self,
        count: int = 1,
        tokens: list[int] | None = None,
        *,
        drafts: int = 0,
        dropped: int = 0,
        ended: Sequence[int] = (),
    ) -> None:
        """Let the party run the pass for `count` more tokens; the client's is told which. See `Proceed`."""
        await self._write(encode(Proceed(count, tokens, drafts, dropped, list(ended))))

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

    async def without_link(self, tunnel: Tunnel, grace: float) -> None:
        """Return once the engines' link has been broken for `grace` seconds, unless the process has ended as it should.

        Its parent may take longer than that to keep what was prepared.
        """
        await tunnel.broken()
        await asyncio.sleep(grace)
        if self._process.returncode == 0:
            await asyncio.Event().wait()

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
