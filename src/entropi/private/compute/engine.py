"""SPU behind one module: a runtime whose variables stay secret-shared, and an always-on meter.

Nothing else in the package imports `spu`, but for `shares`, which reads what a party holds of a value, and
`sessions.engine_link`, which opens the sockets between engines. One engine a process: SPU's logger, which carries the
meter's readings, is global. `Engine` is one party of a real computation; `Simulation` runs all parties of any protocol
as threads, to know what a program computes and costs under it, and protects nothing.
"""

from __future__ import annotations

import functools
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import numpy as np
import spu
from spu import libspu

from entropi.private.compute.compiling import Compiler
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.compute.shares import numbers_of, share_of, share_of_bits, share_of_words
from entropi.records import StageCommunication

# One party may compute locally for minutes while the other waits; a dead peer is noticed on the control channel.
RECEIVE_TIMEOUT_S = 3600

Protocol: TypeAlias = Literal["cheetah", "semi2k", "aby3", "ref2k"]
# Parties of each: REF2K is one that computes in the clear with the same fixed-point numbers, the oracle that separates
# numerics from cryptography; SEMI2K needs a dealer beside its two, whom a simulation plays without counting it.
PARTIES: dict[Protocol, int] = {"cheetah": 2, "semi2k": 2, "aby3": 3, "ref2k": 1}

_LINK_LINE = re.compile(
    rb"Link details: total send bytes (\d+), recv bytes (\d+), send actions (\d+), recv actions (\d+)"
)


class EngineError(Exception):
    """The secure engine failed: no link, a dead peer, or an internal check."""


class Engine:
    """One party's half of the secure computation.

    Args:
        rank: `SERVER` or `CLIENT`.
        link: to the other party's engine, as `sessions.engine_link` opens it.
        configure: changes SPU's configuration, the same on both sides; for measurements of other ways to run it.
    """

    def __init__(
        self, rank: int, link: Any, settings: Settings, configure: Callable[[Any], None] | None = None
    ) -> None:
        self.rank, self._link, self._log = rank, link, start_log()
        self.fraction_bits = settings.fraction_bits
        config = _runtime_config(settings)
        if configure is not None:
            configure(config)
        self._runtime = spu.Runtime(link, config)
        self._io = spu.Io(2, config)
        self.compiler = Compiler()

    def hold(self, name: str, shape: tuple[int, ...], value: np.ndarray | None) -> None:
        """Hold a private value; its owner passes it, the other party None. Nothing is sent."""
        owner = self.rank if value is not None else 1 - self.rank
        array = np.zeros(shape, np.float32) if value is None else np.ascontiguousarray(value, np.float32)
        assert array.shape == shape, (name, array.shape, shape)
        shares = self._io.make_shares(array, libspu.Visibility.VIS_SECRET, owner)
        self._runtime.set_var(name, shares[self.rank])
        self.compiler.note(name, shape)

    def run(self, stage: Stage, token: int) -> StageCommunication:
        """Run one stage on held values, in step with the other party, and say what it cost."""
        executable = self.compiler.compile(stage)
        started = time.perf_counter()
        try:
            self._runtime.run(executable)
        except RuntimeError as error:
            raise EngineError(one_line(error, f"the secure computation failed in {stage.name}")) from None
        seconds = time.perf_counter() - started

        ((sent, received, sent_messages, received_messages),) = _meter(self._log, 1)
        return StageCommunication(
            name=stage.name,
            layer=stage.layer,
            token=token,
            seconds=seconds,
            sent_bytes=sent,
            received_bytes=received,
            sent_messages=sent_messages,
            received_messages=received_messages,
        )

    def reveal_to_client(self, name: str) -> tuple[np.ndarray | None, int]:
        """Send the server's share of a value to the client: the value there, None here, and the bytes sent."""
        share = self._runtime.get_var(name)
        if self.rank == SERVER:
            for chunk in share.share_chunks:
                self._link.send(CLIENT, chunk)
            return None, sum(len(chunk) for chunk in share.share_chunks)

        theirs = libspu.Share()
        theirs.meta = share.meta  # shape and type are the client's own knowledge, only the content is the server's
        chunks = []
        for ours in share.share_chunks:
            chunk = self._link.recv(SERVER)
            if len(chunk) != len(ours):
                raise EngineError(f"the server's share of {name} has {len(chunk)} bytes, expected {len(ours)}")
            chunks.append(chunk)
        theirs.share_chunks = chunks
        value = self._io.reconstruct([theirs, share])
        return np.asarray(value), sum(len(chunk) for chunk in chunks)

    def hold_whole(self, name: str, shape: tuple[int, ...], value: np.ndarray | None) -> None:
        """Hold private whole numbers modulo 2^64, as `hold` does real ones; for stages that are traced with x64."""
        owner = self.rank if value is not None else 1 - self.rank
        array = np.zeros(shape, np.int64) if value is None else np.ascontiguousarray(value).view(np.int64)
        shares = self._io.make_shares(array, libspu.Visibility.VIS_SECRET, owner)
        self._runtime.set_var(name, shares[self.rank])
        self.compiler.note(name, shape, np.int64)

    def numbers(self, name: str) -> np.ndarray:
        """Our share of a value, `uint64`: both parties' sum is the value times 2^`fraction_bits`, modulo 2^64.

        Of words, the sum modulo two of every bit.
        """
        return numbers_of(self._runtime.get_var(name), self.rank)

    def set_numbers(self, name: str, numbers: np.ndarray) -> None:
        """Hold a secret real value of which these are this party's share."""
        self._runtime.set_var(name, share_of(numbers))
        self.compiler.note(name, numbers.shape)

    def set_words(self, name: str, words: np.ndarray) -> None:
        """Hold words whose bits are secret one by one, of which these are this party's share, modulo two."""
        self._runtime.set_var(name, share_of_words(words))
        self.compiler.note(name, words.shape, np.int64)

    def set_bits(self, name: str, bits: np.ndarray) -> None:
        """Hold secret bits, one a number, of which these are this party's share, modulo two."""
        self._runtime.set_var(name, share_of_bits(bits))
        self.compiler.note(name, bits.shape, np.bool_)

    def drop(self, name: str) -> None:
        """Forget a value."""
        self._runtime.del_var(name)
        self.compiler.forget(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a value."""
        return self.compiler.shape(name)

    def send(self, content: bytes) -> None:
        """Send the other party some bytes."""
        self._link.send_async(1 - self.rank, content)

    def receive(self, size: int) -> bytes:
        """What the other party sent, which has to have this size.

        Raises:
            EngineError: another size, or the other party is gone.
        """
        try:
            content: bytes = self._link.recv(1 - self.rank)
        except RuntimeError as error:
            raise EngineError(one_line(error, "nothing came from the other party")) from None
        if len(content) != size:
            raise EngineError(f"the other party sent {len(content)} bytes, expected {size}")
        return content

    def close(self) -> None:
        """Leave the link once the other party has received everything."""
        self._link.stop_link()


class Simulation:
    """All parties of a protocol as threads of this process.

    SEMI2K's dealer is played by the first party, as SPU's default is: its figures are those of the online phase, and
    two real parties must not be run like that.

    Args:
        link: opens the link of a rank, if they are to speak over sockets and not in memory.
    """

    def __init__(self, protocol: Protocol, settings: Settings, link: Callable[[int], Any] | None = None) -> None:
        self._log = start_log()
        config = _runtime_config(settings, protocol)
        self.parties = PARTIES[protocol]
        self._runtimes: list[Any] = [None] * self.parties

        def in_memory(rank: int) -> Any:
            desc = libspu.link.Desc()
            for other in range(self.parties):
                desc.add_party(f"party {other}", f"thread {other}")
            desc.recv_timeout_ms = desc.http_timeout_ms = RECEIVE_TIMEOUT_S * 1000
            return libspu.link.create_mem(desc, rank)

        def join(rank: int) -> None:
            self._runtimes[rank] = spu.Runtime((link or in_memory)(rank), config)

        self._together(join)
        self._io = spu.Io(self.parties, config)
        self._compiler = Compiler()

    def hold(self, name: str, value: np.ndarray, owner: int) -> None:
        """Hold a private value of the party `owner`; where there are fewer parties or more than two, shares of it."""
        array = np.ascontiguousarray(value, np.float32)
        ranks = (owner,) if self.parties == 2 else ()
        shares = self._io.make_shares(array, libspu.Visibility.VIS_SECRET, *ranks)
        for runtime, share in zip(self._runtimes, shares):
            runtime.set_var(name, share)
        self._compiler.note(name, array.shape)

    def hold_words(self, name: str, parts: np.ndarray) -> None:
        """Hold words under CHEETAH whose bits are secret one by one; of `parts` each party has one."""
        for runtime, words in zip(self._runtimes, parts):
            runtime.set_var(name, share_of_words(words))
        self._compiler.note(name, parts.shape[1:], np.int64)

    def run(self, stage: Stage, token: int = 0) -> StageCommunication:
        """Run one stage; the communication is summed over the parties, every byte and message counted once, as sent."""
        executable = self._compiler.compile(stage)
        started = time.perf_counter()
        self._together(lambda rank: self._runtimes[rank].run(executable))
        seconds = time.perf_counter() - started
        readings = _meter(self._log, self.parties)
        return StageCommunication(
            name=stage.name,
            layer=stage.layer,
            token=token,
            seconds=seconds,
            sent_bytes=sum(reading[0] for reading in readings),
            received_bytes=0,
            sent_messages=sum(reading[2] for reading in readings),
            received_messages=0,
        )

    def reveal(self, name: str) -> np.ndarray:
        """A value in the clear."""
        return np.asarray(self._io.reconstruct([runtime.get_var(name) for runtime in self._runtimes]))

    def _together(self, act: Callable[[int], None]) -> None:
        failures: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                act(rank)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(self.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def _meter(log: BinaryIO, parties: int) -> list[tuple[int, ...]]:
    """Bytes sent and received, messages sent and received of the latest run, for every party, from SPU's log."""
    found = _LINK_LINE.findall(log.read())
    if len(found) != parties:
        raise EngineError(f"the engine's log has {len(found)} link lines for one run, expected {parties}")
    return [tuple(int(number) for number in reading) for reading in found]


@functools.cache
def start_log() -> BinaryIO:
    """Let SPU log to a file and return it, open for reading; it holds counts, times and shapes, no value.

    The file has no name any more once this returns, so it goes when the process does, however that ends. SPU takes
    one log file a process.
    """
    with tempfile.TemporaryDirectory(prefix="entropi-engine-") as folder:
        path = Path(folder) / "engine.log"
        path.touch()
        options = libspu.logging.LogOptions()
        options.enable_console_logger = False
        options.system_log_path = str(path)
        libspu.logging.setup_logging(options)
        return open(path, "rb")


def _runtime_config(settings: Settings, protocol: Protocol = "cheetah") -> Any:
    config = libspu.RuntimeConfig(
        protocol=getattr(libspu.ProtocolKind, protocol.upper()),
        field=libspu.FieldType.FM64,
        fxp_fraction_bits=settings.fraction_bits,
    )
    # One squaring an exponential: that is how `functions.square` is computed, and kernels of more are made of it.
    config.fxp_exp_mode = libspu.RuntimeConfig.ExpMode.EXP_TAYLOR
    config.fxp_exp_iters = 1
    # Weights stay the server's plaintext and the prompt the client's, instead of being shared: half the bytes.
    config.experimental_enable_colocated_optimization = True
    # The last bit of a product may be wrong: 168 instead of 221 bytes a multiplication.
    config.cheetah_2pc_config.enable_mul_lsb_error = True
    config.experimental_disable_mmul_split = True  # a product in pieces sends its operand once for each
    config.enable_pphlo_profile = True  # the meter; exact because operations run one after another
    return config


def one_line(error: RuntimeError, what: str) -> str:
    """`what`, and the first line of an SPU error without its stack."""
    first = str(error).strip().splitlines()
    return f"{what}: {first[0][:200]}" if first else what
