"""Versions that both parties must share."""

from __future__ import annotations

from importlib import metadata


def engine_version() -> str:
    """Engine and tracer: two parties trace and compile the same program only with the same ones."""
    return f"spu {metadata.version('spu')} jax {metadata.version('jax')}"
