"""How much memory the two processes of a session need, measured and predicted.

    python benchmarks/party_memory.py [--shape "layers=12,hidden_size=128,..."] [--tokens 128] [--new-tokens 2]

Both parties run on this machine, over the Unix sockets that they have in every session, with random weights, since
values do not decide how much memory is needed. `VmData`, which the limit of a session's process counts, and the
resident memory (`VmHWM`) are read fifty times a second. The prediction is `session.needed_memory`. Without `--shape`
all of `SHAPES` are measured, about a minute each on two cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import secrets
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from entropi.private.compute.description import FORMAT, Description
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.sessions.memory import needed_memory
from entropi.private.sessions.party_handle import Party
from entropi.private.wire.messages import Failed, Job, Revealed
from entropi.private.wire.tunnel import link_folder

BASE = dict(
    format=FORMAT,
    architecture="SM(t)+ScFuFFN",
    layers=2,
    heads=4,
    key_value_heads=4,
    hidden_size=128,
    vocab_size=2048,
    positions=512,
    intermediate_size=0,
    position_embedding="learned",
    rotary_dimensions=0,
    rotary_base=10000.0,
    temperature=True,
    softmax="power-3",
    norm="none",
    norm_epsilon=1e-5,
    parallel_residual=False,
    activation="identity",
    explicit_ffn=[],
    final_norm="rms",
    centre=False,
)
ACTIVATED = dict(norm="layer", final_norm="layer", activation="gelu", temperature=False)
# What differs from BASE, and tokens of the prompt.
SHAPES: list[tuple[dict[str, object], int]] = [
    (dict(hidden_size=16, heads=2, vocab_size=300), 4),
    ({}, 32),
    (dict(layers=12), 32),
    (dict(layers=1, vocab_size=16384), 8),
    (dict(layers=1, vocab_size=50257), 4),
    (dict(layers=1, hidden_size=768, heads=12), 16),
    (dict(layers=1, hidden_size=768, heads=12, vocab_size=300), 64),
    (dict(layers=1), 128),
    (dict(layers=1, hidden_size=256, intermediate_size=1024, **ACTIVATED), 32),
    (dict(layers=1, hidden_size=256, heads=8), 256),
]


async def watch(party: Party, peaks: dict[str, int]) -> None:
    """Keep the largest numbers of a process's `status`, in bytes, until it has gone."""
    while True:
        try:
            status = Path(f"/proc/{party.pid}/status").read_text()
        except OSError:
            return
        for name in ("VmData", "VmHWM"):
            if found := re.search(rf"{name}:\s*(\d+) kB", status):
                peaks[name] = max(peaks.get(name, 0), 1024 * int(found[1]))
        await asyncio.sleep(0.02)


async def measure(
    folder: Path, model: Description, settings: Settings, tokens: int, new: int
) -> dict[int, dict[str, int]]:
    """Peaks of both processes, by rank, in a session of `new` tokens after a prompt of `tokens`."""
    random, weights = np.random.default_rng(0), folder / "weights.safetensors"
    shapes = model.weight_shapes().items()
    save_file({name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes}, weights)
    with link_folder() as sockets:
        common = dict(
            session=secrets.token_hex(16),
            links=tuple(f"unix:{sockets}/{name}" for name in ("server", "client")),
            description=model,
            settings=settings,
            max_new_tokens=new,
            prompt_length=tokens,
        )
        prompt = random.integers(0, model.vocab_size, tokens).tolist()
        jobs = {
            SERVER: Job(rank=SERVER, weights=str(weights), **common),
            CLIENT: Job(rank=CLIENT, prompt=prompt, **common),
        }
        parties = {rank: await Party.start(job) for rank, job in jobs.items()}
        peaks: dict[int, dict[str, int]] = {SERVER: {}, CLIENT: {}}
        watching = [asyncio.create_task(watch(party, peaks[rank])) for rank, party in parties.items()]

        async def follow(party: Party, tokens: list[int] | None) -> None:
            while (event := await party.event()) is not None:
                if isinstance(event, Failed):
                    raise RuntimeError(event.reason)
                if isinstance(event, Revealed):
                    await party.proceed(1, tokens)

        try:
            await asyncio.gather(follow(parties[SERVER], None), follow(parties[CLIENT], [1]))
        finally:
            for party in parties.values():
                await party.stop()
            for task in watching:
                task.cancel()
    return peaks


def main() -> None:
    """Measure one shape or all, and print a table and JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", help="what differs from the base shape, such as layers=12,vocab_size=16384")
    parser.add_argument("--tokens", type=int, default=32, help="of the prompt, with --shape")
    parser.add_argument("--new-tokens", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="shapes to leave out")
    given = parser.parse_args()
    shapes = SHAPES[given.first :]
    if given.shape is not None:
        pairs = (pair.partition("=")[::2] for pair in given.shape.split(",") if pair)
        shapes = [({name: int(value) if value.isdigit() else value for name, value in pairs}, given.tokens)]
    rows = []
    print("| shape | tokens | predicted GB | server GB | client GB | resident, both, GB | seconds |")
    print("|---|---|---|---|---|---|---|")
    for changes, tokens in shapes:
        fields = {**BASE, **changes}
        if "key_value_heads" not in changes:
            fields["key_value_heads"] = fields["heads"]
        model = Description(**fields)  # type: ignore[arg-type]
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            peaks = asyncio.run(measure(Path(folder), model, Settings(paired=True), tokens, given.new_tokens))
        row = {
            "shape": changes,
            "tokens": tokens + given.new_tokens,
            "predicted": needed_memory(model, tokens + given.new_tokens),
            "server": peaks[SERVER],
            "client": peaks[CLIENT],
            "seconds": round(time.monotonic() - started, 1),
        }
        rows.append(row)
        resident = " + ".join(f"{peaks[rank]['VmHWM'] / 1e9:.2f}" for rank in (SERVER, CLIENT))
        written = " | ".join(f"{peaks[rank]['VmData'] / 1e9:.2f}" for rank in (SERVER, CLIENT))
        name = ", ".join(f"{name} {value}" for name, value in changes.items()) or "base"
        predicted = f"{needed_memory(model, tokens + given.new_tokens) / 1e9:.2f}"
        print(
            f"| {name} | {tokens + given.new_tokens} | {predicted} | {written} | {resident} | {row['seconds']} |",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
