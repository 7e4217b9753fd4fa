"""Runs of a study as tasks on a Ray cluster, whose machines share the disk that the study's folder is on.

Nothing that is slow to import may be imported here: Ray says how many threads a task may have only when it begins.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from entropi import __version__
from entropi.console import make_console
from entropi.errors import UserError

RETRIES = 20  # of a run whose node was lost or whose process died; it resumes from its last checkpoint every time
CONNECT_SECONDS = 10.0
# A file server keeps the locks of a machine that is gone for a while, 90 s by NFS's usual lease; and a process that has
# lost its node's manager may take a moment to end.
LOCK_SECONDS = 120.0


@contextmanager
def connected(
    address: str, folder: Path, parallel: int = 0, cpus: int = 1, gpus: float | None = None
) -> Iterator[Cluster]:
    """The cluster at `address`, as an executor of the study in `folder`.

    Args:
        address: "auto", or HOST:PORT of the head; this machine is one of the cluster.
        parallel: runs at a time; 0 is as many as there is room for.
        cpus, gpus: what each run needs; of a GPU it may be a part, and None is one where the cluster has any.

    Raises:
        UserError: the address answers nothing, or it is no cluster that this Ray can work with.
    """
    with redirect_stdout(sys.stderr):  # where Ray tells of lost nodes: standard output is for results
        _connect(address)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix=".shared-", dir=folder) as marker:  # of a name that is nowhere else
                yield Cluster(Path(marker.name).absolute(), parallel, cpus, gpus)
        finally:
            ray.shutdown()


def _connect(address: str) -> None:
    match = re.fullmatch(r"auto|([^/]+):(\d+)", address)
    if match is None:
        raise UserError(f"--ray is {address!r}: auto, or HOST:PORT of the head of a cluster that this machine is in")
    try:
        if match[1]:  # Ray itself would try for a minute
            socket.create_connection((match[1], int(match[2])), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RayError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(
            f"no Ray cluster answers at {address}: {reason}; start one with `ray start --head`, and join it from this "
            "and every other machine with `ray start --address HOST:PORT`"
        ) from None


class Cluster:
    """Trains each run in a task with resources of its own (an `Executor`). Ray lets those wait that have no room yet.

    Args:
        marker: a file in the study's folder, by which tasks see that they share it.
    """

    def __init__(self, marker: Path, parallel: int, cpus: int, gpus: float | None) -> None:
        self.slots = parallel or sys.maxsize
        self._marker = marker
        if gpus is None:
            gpus = min(ray.cluster_resources().get("GPU", 0), 1)
        # A process of its own for each: a model's threads and memory, and where output goes, are a process's.
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_calls": 1, "max_retries": RETRIES}
        self._train = ray.remote(**options)(train_here)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            room = f"CPUs: {cpus}, GPUs: {gpus:g}"
            make_console().print(f"no node has room for a run ({room}): waiting until one joins", markup=False)

    def start(self, place: Path, recipe: Path, log: Path, slot: int) -> Task:
        """Hand a run to the cluster."""
        paths = [str(path.absolute()) for path in (self._marker, place, recipe, log)]
        return Task(self._train.remote(__version__, os.getcwd(), *paths), log)


class Task:
    """A run on the cluster, with the face of a process (a `Worker`)."""

    def __init__(self, ref: Any, log: Path) -> None:
        self._ref, self._log = ref, log
        self.returncode: int | None = None
        self._problem = ""

    def poll(self) -> int | None:
        """See `Worker`.

        Raises:
            UserError: the run's node does not share the folder, or has no entropi of this version.
        """
        self._look(0)
        if self._problem:
            raise UserError(self._problem)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """See `Worker`."""
        self._look(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("ray task", timeout or 0)
        return self.returncode

    def terminate(self) -> None:
        """See `Worker`."""
        ray.cancel(self._ref)

    def kill(self) -> None:
        """See `Worker`."""
        ray.cancel(self._ref, force=True)

    def _look(self, timeout: float | None) -> None:
        """Wait for the task's end, and take its result."""
        if self.returncode is None and ray.wait([self._ref], timeout=timeout)[0]:
            self.returncode, self._problem = self._result()

    def _result(self) -> tuple[int, str]:
        """The status of a task that has ended, and what is wrong with its node."""
        try:
            status, problem = ray.get(self._ref)
            return status, problem
        except TaskCancelledError:
            return 130, ""
        except RayTaskError as error:  # before training began: see `train_here`
            last = (str(error.cause).strip().splitlines() or [""])[-1]  # of a traceback, where there is one
            return 1, f"a node cannot train, does it have entropi {__version__}? {type(error.cause).__name__}: {last}"
        except RayError as error:  # its nodes were lost, or its process died, more often than it was tried
            with open(self._log, "a", encoding="utf-8") as log:
                print(f"entropi: {' '.join(str(error).split())[:200]}", file=log)
            return 1, ""


def train_here(version: str, cwd: str, marker: str, place: str, recipe: str, log: str) -> tuple[int, str]:
    """What a task does: `entropi train` in the task's own process.

    An interrupt saves the step in progress, as Ctrl-C does.

    Returns:
        The status, and if this machine is not fit to train the run, why.
    """
    if version != __version__:
        return 2, f"{socket.gethostname()} has entropi {__version__}, and this is {version}: install the same"
    if not os.path.exists(marker):
        folder = os.path.dirname(marker)
        return 2, f"{socket.gethostname()} does not see {folder}: give --folder on a disk that all nodes share"
    if os.path.isdir(cwd):  # what a recipe names may be relative to it
        os.chdir(cwd)
    with open(log, "a", buffering=1, encoding="utf-8") as output, redirect_stdout(output), redirect_stderr(output):
        os.dup2(output.fileno(), 1)  # for what compiled code prints
        os.dup2(output.fileno(), 2)
        _wait_for_lock(Path(place))
        sys.argv = ["entropi", "train", place, "--config", recipe]
        try:
            runpy.run_module("entropi", run_name="__main__")  # which says with which status it exits
        except SystemExit as end:
            return int(end.code or 0), ""
        except Exception:
            traceback.print_exc()
        return 1, ""


def _wait_for_lock(place: Path) -> None:
    """Wait until nobody trains in the run folder `place`; where that takes too long, training will say so."""
    from entropi.training.run_folder import lock_run

    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            with lock_run(place):
                return
        except UserError:
            time.sleep(1)
