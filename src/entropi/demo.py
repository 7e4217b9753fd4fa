"""The demo: the whole way once, at a small size, with nothing faked."""

from __future__ import annotations
