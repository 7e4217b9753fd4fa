"""What machine this is, in words that stand beside every measurement."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name as it tells it, or else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def available_memory() -> int | None:
    """Bytes that a new process could take: what the system counts as available, or the container leaves; None elsewhere
    than on Linux."""
    found: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(limit - used)
    except (OSError, ValueError):  # no such control group, or "max"
        pass
    return min(found, default=None)


def machine() -> str:
    """Cores and processor, such as "2 x AMD EPYC"."""
    return f"{os.cpu_count()} x {processor()}"
