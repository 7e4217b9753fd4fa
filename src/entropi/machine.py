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


def machine() -> str:
    """Cores and processor, such as "2 x AMD EPYC"."""
    return f"{os.cpu_count()} x {processor()}"
