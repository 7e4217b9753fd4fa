"""The network between the parties: a rate, and a delay that every round waits for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from entropi.errors import UserError


@dataclass(frozen=True)
class Network:
    """Bits a second each way, and seconds one way, which are half of a round trip."""

    name: str
    bits_per_second: float
    delay_s: float


NETWORKS = {
    "lan": Network("lan: 1 Gbit/s, 0.5 ms", 1e9, 0.00025),
    "wan": Network("wan: 100 Mbit/s, 80 ms", 100e6, 0.04),
}


def parse_network(text: str) -> Network:
    """A preset, "lan" or "wan", or "RATE,ROUNDTRIP" such as "300Mbps,20ms".

    Raises:
        UserError: neither.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    match = re.fullmatch(r"\s*([0-9.]+)\s*([MG])(?:bps|bit/s)\s*,\s*([0-9.]+)\s*ms\s*", text)
    try:
        rate, delay = (float(match.group(1)), float(match.group(3))) if match else (0.0, 0.0)
    except ValueError:
        rate = 0.0
    if match is None or rate <= 0:
        presets = ", ".join(NETWORKS)
        raise UserError(f"{text!r} is no network: write {presets}, or a rate and a round trip such as 300Mbps,20ms")
    return Network(text, rate * {"M": 1e6, "G": 1e9}[match.group(2)], delay / 2000)
