"""What a run trains on: the environment that is noted beside its results, and the arithmetic it can have."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entropi.errors import UserError
from entropi.machine import processor
from entropi.training.loading import open_config
from entropi.training.recipe import Recipe


def check_precision(recipe: Recipe) -> None:
    """Refuse arithmetic that this machine does not have."""
    if recipe.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("precision fp16 needs a GPU; use bf16 or fp32")
    if recipe.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("this GPU has no bfloat16; use precision fp16 or fp32")


def bf16_is_fast(recipe: Recipe) -> bool:
    """Whether bfloat16 matrix products of this model's size run at least 1.5 times as fast as float32 ones here."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    width = open_config(Path(recipe.taper_from)).hidden_size if recipe.taper_from else recipe.hidden_size
    rows = min(recipe.batch_size * recipe.context_length, 4096)

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(rows, width, dtype=dtype)
        b = torch.ones(width, 4 * width, dtype=dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        return float(np.median(times))

    return seconds(torch.bfloat16) * 1.5 < seconds(torch.float32)


def describe_environment() -> dict[str, Any]:
    """Versions, machine and command of this process, for the run folder."""
    versions: dict[str, str | None] = {}
    for package in ("entropi", "torch", "transformers", "accelerate", "tokenizers", "numpy", "jax", "spu"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": ["entropi", *sys.argv[1:]],
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, if it does."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None
