"""A prepared session metered between two processes, beside its prediction: bytes, computing and waiting.

    python benchmarks/prepared.py [--model "polynomial SM(t)+ScFuFFN" or FOLDER] [--tokens 128] [--new-tokens 65]
        [--lines loopback lan wan] [--line-tokens 5] [--prefix-file FILE] [--work FOLDER] --out FILE

A name is one of the models of `private_forward.py`, GPT-2 small's shape with random weights; a folder is what `serve`
takes. A server keeps its half of the material and answers; a client prepares, then asks. The session over the bare
loopback has `--new-tokens` new tokens. Over the other lines, one session of `--line-tokens` new tokens each is prepared
over the loopback too, and asked through a `SlowLine` with TLS. Rows already in FILE are not measured again. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from entropi.costs.prediction import CostModel
from entropi.costs.preparation import predict
from entropi.machine import machine
from entropi.private import Store, Tls, Watcher, connect, prepare
from entropi.private.compute.description import Description
from entropi.private.compute.folded import DESCRIPTION_FILE, WEIGHTS_FILE, load_description
from entropi.private.sessions.preparing import Watcher as PreparingWatcher
from entropi.private.wire.authority import issue
from entropi.records import PrivateRun, StageCommunication
from network import LINES, SlowLine
from private_forward import ARCHITECTURES, description, random_weight

START_SECONDS = 7200  # most of them for looking at every token of a public table
PROMPT = "Before the prompt is known, products of random numbers can be computed; afterwards they are only looked up. "


def random_model(name: str, folder: Path) -> None:
    """A folded model of GPT-2 small's shape, and a tokenizer of as many entries: a byte is a token."""
    folder.mkdir(parents=True)
    model = description(name, 12)
    random = np.random.default_rng(0)
    weights = {part: random_weight(part, shape, model, random) for part, shape in model.weight_shapes().items()}
    save_file(weights, folder / WEIGHTS_FILE)
    (folder / DESCRIPTION_FILE).write_bytes(msgspec.json.encode(model))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = alphabet + [f"<{number}>" for number in range(model.vocab_size - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@contextlib.contextmanager
def serving(model: Path, folder: Path, tokens: int, *options: str) -> Iterator[tuple[str, Path, Tls]]:
    """An `entropi serve` of `model`: its address, its log, and the files of a client."""
    folder.mkdir(parents=True, exist_ok=True)
    issue(folder, ["127.0.0.1"], ["client"], days=1)
    log = folder / "server.log"
    keys = ["--tls-cert", folder / "127.0.0.1.pem", "--tls-key", folder / "127.0.0.1-key.pem"]
    words = ["serve", model, "--listen", "127.0.0.1:0", *keys, "--clients-ca", folder / "ca.pem", "--log", "json"]
    words += ["--embedding", "public", "--material", folder / "server-material", "--max-new-tokens", tokens]
    words += ["--memory-gb", 0, "--session-seconds", 14_400, "--self-test", "none", *options]
    with open(log, "wb") as file:
        server = subprocess.Popen([sys.executable, "-m", "entropi", *map(str, words)], stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (match := re.search(r"listening on ([^, ]+:\d+)", log.read_text())):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(1)
        yield match[1], log, Tls(folder / "client.pem", folder / "client-key.pem", folder / "ca.pem")
    finally:
        server.terminate()
        server.wait()


def prompt_of(length: int, address: str, tls: Tls, model: Path) -> str:
    """Text of so many tokens."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT * (length // 8 + 1), add_special_tokens=False).ids[:length]
    text = str(tokenizer.decode(ids))
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == length, text
    return text


def mb(*stages: StageCommunication) -> float:
    return sum(stage.bytes for stage in stages) / 1e6


def by_token(run: PrivateRun) -> list[list[StageCommunication]]:
    """Stages of the prompt, of the first further token, and so on."""
    passes: dict[int, list[StageCommunication]] = {}
    for stage in run.stages:
        passes.setdefault(stage.token, []).append(stage)
    return [passes[token] for token in sorted(passes)]


def measure(
    address: str, log: Path, tls: Tls, model: Path, tokens: int, new_tokens: int, line: str, store: Store
) -> dict[str, Any]:
    """Prepare over the loopback, ask over the line."""
    prompt = prompt_of(tokens, address, tls, model)
    parts: list[StageCommunication] = []

    def part(done: int, communication: StageCommunication) -> None:
        parts.append(communication)
        print(f"\rpreparing {done} parts, {mb(*parts):.0f} MB", end="", file=sys.stderr, flush=True)

    started = time.monotonic()
    watcher = PreparingWatcher(part=part)
    # The last new token is not computed with.
    prepare(address, tokens + new_tokens - 1, store, watcher, new_tokens=new_tokens, tls=tls, memory_gb=0)
    preparing = time.monotonic() - started
    kept = store.entries()[0].size
    server_kept = sum(path.stat().st_size for path in (log.parent / "server-material").rglob("*") if path.is_file())
    print(f"\nprepared: {mb(*parts):.1f} MB in {preparing:.0f} s", file=sys.stderr)

    slow = None if line == "loopback" else SlowLine(address, LINES[line])
    ends: dict[int, float] = {}  # of each pass

    def stage(done: int, communication: StageCommunication) -> None:
        ends[communication.token] = time.monotonic()
        print(f"\r{line}: token {communication.token}", end="", file=sys.stderr, flush=True)

    before = time.monotonic()
    connection = connect(slow.address if slow else address, tls)
    answer = connection.ask(prompt, new_tokens, watcher=Watcher(stage=stage), store=store, memory_gb=0)
    print(file=sys.stderr)
    if slow:
        slow.close()
    run = answer.record
    assert run.prepared_bytes == sum(stage.bytes for stage in parts), "the session did not use what was prepared"
    first, *others = by_token(run)
    return {
        "line": line,
        "tokens": tokens,
        "new_tokens": new_tokens,
        "offline_mb": mb(*parts),
        "offline_seconds": preparing,
        "client_kept_mb": kept / 1e6,
        "server_kept_mb": server_kept / 1e6,
        "set_up_mb": run.setup_bytes / 1e6,
        "set_up_seconds": run.setup_seconds,
        "prompt_mb": mb(*first),
        "prompt_engine_seconds": sum(stage.seconds for stage in first),
        "first_token_seconds": ends[0] - before,  # set-up included
        "further_mb": [mb(*stages) for stages in others],
        "further_engine_seconds": [sum(stage.seconds for stage in stages) for stages in others],
        "further_seconds": [ends[token + 1] - ends[token] for token in range(len(others))],
        "further_messages": [sum(stage.messages for stage in stages) for stages in others],
        "by_stage_mb": {
            name: mb(*(stage for stage in others[0] if stage.name == name))
            for name in dict.fromkeys(stage.name for stage in others[0])
        },
        "online_mb": run.bytes / 1e6,
        "seconds": run.seconds,
        "ids": run.new_tokens,
    }


def predicted(model: Description, tokens: int, new_tokens: int, line: str, prefix: int) -> dict[str, float]:
    """What `entropi cost --prepared` says of the session."""
    shipped = CostModel.shipped(network="lan" if line == "loopback" else line)
    options = replace(shipped.options, embedding="public", prefix_tokens=prefix)
    record = predict(replace(shipped, options=options), model, tokens, new_tokens)
    further = record.further or record.prompt
    waiting = 0 if line == "loopback" else 1
    return {
        "offline_mb": record.totals()["offline"].bytes / 1e6,
        "offline_seconds": record.totals()["offline"].seconds,
        "client_kept_mb": record.client_bytes / 1e6,
        "server_kept_mb": record.server_bytes / 1e6,
        "set_up_mb": record.set_up.bytes / 1e6,
        "prompt_mb": record.prompt.bytes / 1e6,
        "prompt_seconds": record.prompt.seconds + waiting * record.prompt.latency,
        "further_mb": further.bytes / 1e6,
        "further_seconds": further.seconds + waiting * further.latency,
        "further_rounds": further.rounds,
        "online_mb": record.totals()["online"].bytes / 1e6,
        "unprepared_mb": record.totals()["unprepared"].bytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="polynomial SM(t)+ScFuFFN")
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--lines", nargs="+", choices=["loopback", *LINES], default=["loopback", *LINES])
    parser.add_argument("--line-tokens", type=int, default=5)
    parser.add_argument("--prefix-file", type=Path)
    parser.add_argument("--work", type=Path, help="folder of the model and both stores; by default a temporary one")
    parser.add_argument("--out", type=Path, required=True, help="file of the rows")
    given = parser.parse_args()

    rows: list[dict[str, Any]] = json.loads(given.out.read_bytes()) if given.out.exists() else []
    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = Path(given.model)
        if given.model in ARCHITECTURES:
            model = work / "model"
            if not model.exists():
                random_model(given.model, model)
        prefix = ["--prefix-file", str(given.prefix_file)] if given.prefix_file else []
        found = serving(model, work / "server", given.new_tokens, *prefix)
        address, log, tls = stack.enter_context(found)
        ahead = len(connect(address, tls).prefix) if prefix else 0
        for line in given.lines:
            if any((row["model"], row["line"]) == (given.model, line) for row in rows):
                continue
            new_tokens = given.new_tokens if line == "loopback" else given.line_tokens
            with Store(work / f"client-{line}") as store:
                measured = measure(address, log, tls, model, given.tokens, new_tokens, line, store)
            expected = predicted(load_description(model), given.tokens, new_tokens, line, ahead)
            rows.append({"model": given.model, "machine": machine(), **measured, "predicted": expected})
            given.out.write_text(json.dumps(rows, indent=1))
            print(json.dumps({name: rows[-1][name] for name in ("line", "prompt_mb", "offline_mb", "predicted")}))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
