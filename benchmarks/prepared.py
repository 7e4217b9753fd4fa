"""Sessions whose products are prepared, metered between two processes, beside their prediction.

    python benchmarks/prepared.py --out FILE [--model "polynomial SM(t)+ScFuFFN" or FOLDER] [--tokens 128]
        [--new-tokens 65] [--prefix-file FILE] [--work FOLDER]
    python benchmarks/prepared.py --out FILE --online [--lines loopback lan wan] [--further 6] [--drafts 0]
        [--model, --tokens]

The first is all of it: a server that keeps its half, `prepare`, and a question over the loopback with TLS. A name is
one of the models of `private_forward.py`, GPT-2 small's shape with random weights; a folder is what `serve` takes. That
takes tens of minutes, nearly all of them before the question.

The second runs the online part alone, between two processes over a line of limited speed and added delay (`SlowLine`),
with material that is drawn at random instead of computed: answers mean nothing, and bytes, rounds and seconds are those
of any session, because nothing that is done depends on values. The first `--further` passes after the prompt's are
shown, of a token or of one and `--drafts` drafts, and their median without the first, whose stages are compiled while
the prompt is answered.

Rows already in FILE are not measured again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
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
from entropi.private.compute import lookahead
from entropi.private.compute.description import Description
from entropi.private.compute.engine import Engine
from entropi.private.compute.folded import DESCRIPTION_FILE, WEIGHTS_FILE, load_description
from entropi.private.compute.program import compute_on_processor, stages_of_pass
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.preparation.material import Material, needs
from entropi.private.preparation.online import PreparedPasses
from entropi.private.preparation.ring import encode, uniform
from entropi.private.sessions.engine_link import open_link
from entropi.private.sessions.party import compile_next
from entropi.private.sessions.preparing import Watcher as PreparingWatcher
from entropi.records import PrivateRun, StageCommunication
from network import LINES, SlowLine, tls_server
from private_forward import ARCHITECTURES, description, free_links, random_weight, take

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


def prompt_of(length: int, model: Path) -> str:
    """Text of so many tokens."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT * (length // 8 + 1), add_special_tokens=False).ids[:length]
    text = str(tokenizer.decode(ids))
    assert len(tokenizer.encode(text, add_special_tokens=False).ids) == length, text
    return text


def mb(*stages: StageCommunication) -> float:
    return sum(stage.bytes for stage in stages) / 1e6


def by_name(stages: list[StageCommunication]) -> dict[str, list[StageCommunication]]:
    """Stages of one pass, in the order of the first of each name."""
    found: dict[str, list[StageCommunication]] = {}
    for stage in stages:
        found.setdefault(stage.name, []).append(stage)
    return found


def by_token(run: PrivateRun) -> list[list[StageCommunication]]:
    """Stages of the prompt, of the first further token, and so on."""
    passes: dict[int, list[StageCommunication]] = {}
    for stage in run.stages:
        passes.setdefault(stage.token, []).append(stage)
    return [passes[token] for token in sorted(passes)]


def whole_session(
    address: str, log: Path, tls: Tls, model: Path, tokens: int, new_tokens: int, store: Store
) -> dict[str, Any]:
    """Prepare, then ask."""
    prompt = prompt_of(tokens, model)
    parts: list[StageCommunication] = []

    def part(done: int, communication: StageCommunication) -> None:
        parts.append(communication)
        print(f"\rpreparing {done} parts, {mb(*parts):.0f} MB", end="", file=sys.stderr, flush=True)

    started = time.monotonic()
    set_up: list[StageCommunication] = []
    watcher = PreparingWatcher(part=part, piece=lambda cost: set_up.append(cost) if cost.name == "setup" else None)
    # The last new token is not computed with.
    prepare(address, tokens + new_tokens - 1, store, watcher, new_tokens=new_tokens, tls=tls, memory_gb=0)
    preparing = time.monotonic() - started
    kept = store.entries()[0].size
    server_kept = sum(path.stat().st_size for path in (log.parent / "server-material").rglob("*") if path.is_file())
    print(f"\nprepared: {mb(*parts):.1f} MB in {preparing:.0f} s", file=sys.stderr)

    ends: dict[int, float] = {}  # of each pass

    def stage(done: int, communication: StageCommunication) -> None:
        ends[communication.token] = time.monotonic()
        print(f"\rtoken {communication.token}", end="", file=sys.stderr, flush=True)

    before = time.monotonic()
    answer = connect(address, tls).ask(prompt, new_tokens, watcher=Watcher(stage=stage), store=store, memory_gb=0)
    print(file=sys.stderr)
    run = answer.record
    assert run.prepared_bytes == sum(stage.bytes for stage in [*set_up, *parts]), (
        "the session did not use what was prepared"
    )
    first, *others = by_token(run)
    return {
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
        "by_stage_mb": {name: mb(*stages) for name, stages in by_name(others[0]).items()},
        "online_mb": run.bytes / 1e6,
        "seconds": run.seconds,
        "ids": run.new_tokens,
    }


# --- The online part alone --------------------------------------------------------------------------------------------


def party(
    rank: int, links: tuple[str, str], model: Description, tokens: int, further: int, drafts: int, channel: Any
) -> None:
    """One of the two processes; the client's puts what every pass took into `channel`. All drafts are kept."""
    compute_on_processor()
    settings, random = Settings(embedding="public"), np.random.default_rng(0)
    engine = Engine(rank, open_link(rank, links), settings)
    each = 1 + drafts
    material = needs(model, settings, tokens + further * each, further * each + 1)
    matrices: dict[str, np.ndarray | None] = {need.matrix: None for need in material if need.matrix}
    for name, shape in (model.weight_shapes() | lookahead.shapes(model)).items():
        if name == "embedding":
            continue
        weight = random_weight(name, shape, model, random) if rank == SERVER else None
        engine.hold(name, shape, weight)
        if name in matrices and weight is not None:
            matrices[name] = encode(weight, settings.fraction_bits)
    arrays = {name: uniform(shape) for need in material for name, shape in need.kept(rank).items()}
    passes = PreparedPasses(engine, Material(material, arrays), settings.fraction_bits, matrices)

    past = 0
    for number, new in enumerate([tokens] + [each] * further):
        rows = random.normal(size=(new, model.hidden_size)) if rank == CLIENT else None
        engine.hold("embedded", (new, model.hidden_size), rows)
        started, keys = time.perf_counter(), past + new
        if number < further:  # as a session does
            compile_next(engine, model, settings, keys, passes, each)
        stages = stages_of_pass(model, settings, new, past, last_rows=each if number else 1, prepared=True)
        costs = [cost for stage in stages for cost in passes.run(stage, number, keys)]
        engine.reveal_to_client("logits")
        if rank == CLIENT:
            channel.put((time.perf_counter() - started, costs))
        past = keys
    engine.close()


def online(model: Description, line: str, tokens: int, further: int, drafts: int) -> dict[str, Any]:
    """The client's view of a prompt's pass and of those of further tokens."""
    context = multiprocessing.get_context("spawn")
    links, channel = free_links(), context.Queue()
    views, lines = [links, links], list[SlowLine]()
    if line != "loopback":
        lines = [SlowLine(link, LINES[line]) for link in links]
        views = [(links[0], lines[1].address), (lines[0].address, links[1])]
    processes = [
        context.Process(target=party, args=(rank, views[rank], model, tokens, further, drafts, channel), daemon=True)
        for rank in (SERVER, CLIENT)
    ]
    for process in processes:
        process.start()
    passes = []
    for number in range(further + 1):
        seconds, costs = take(channel, processes)
        passes.append((seconds, costs))
        print(f"{line}: pass {number}: {seconds:.2f} s, {mb(*costs):.3f} MB", file=sys.stderr, flush=True)
    for process in processes:
        process.join()
    for one in lines:
        one.close()
    (prompt_seconds, prompt), *later = passes
    return {
        "line": line,
        "tokens": tokens,
        "drafts": drafts,
        "prompt_mb": mb(*prompt),
        "prompt_seconds": prompt_seconds,
        "further_mb": [mb(*costs) for _, costs in later],
        "further_seconds": [seconds for seconds, _ in later],
        "median_further_mb": statistics.median(mb(*costs) for _, costs in later[1:]),
        "median_further_seconds": statistics.median(seconds for seconds, _ in later[1:]),
        "seconds_by_stage": {
            name: sum(cost.seconds for cost in costs) for name, costs in by_name(later[-1][1]).items()
        },
    }


# --- Both -------------------------------------------------------------------------------------------------------------


def predicted(
    model: Description, tokens: int, new_tokens: int, line: str, prefix: int, drafts: int = 0
) -> dict[str, float]:
    """What `entropi cost --prepared` says of the session; of further passes those with drafts, if there are any."""
    shipped = CostModel.shipped(network="lan" if line == "loopback" else line)
    options = replace(shipped.options, embedding="public", prefix_tokens=prefix)
    record = predict(replace(shipped, options=options), model, tokens, new_tokens, drafts)
    further = record.drafted or record.further or record.prompt
    waiting = 0 if line == "loopback" else 1
    return {
        "offline_mb": record.totals()["offline"].bytes / 1e6,
        "offline_seconds": record.totals()["offline"].seconds,
        "client_kept_mb": record.client_bytes / 1e6,
        "server_kept_mb": record.server_bytes / 1e6,
        "set_up_mb": record.online_set_up.bytes / 1e6,
        "prompt_mb": record.prompt.bytes / 1e6,
        "prompt_seconds": record.prompt.seconds + waiting * record.prompt.latency,
        "further_mb": further.bytes / 1e6,
        "further_seconds": further.seconds + waiting * further.latency,
        "further_rounds": further.rounds,
        "online_mb": record.totals()["online"].bytes / 1e6,
        "unprepared_mb": record.totals()["unprepared"].bytes / 1e6,
    }


def rows_of(given: argparse.Namespace, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is not in `rows` yet."""

    def there(line: str | None) -> bool:
        wanted = (given.model, line, given.drafts)
        return any((row["model"], row.get("line"), row.get("drafts", 0)) == wanted for row in rows)

    if given.online:
        named = given.model in ARCHITECTURES
        model = description(given.model, 12) if named else load_description(Path(given.model))
        for line in given.lines:
            if not there(line):
                expected = predicted(model, given.tokens, given.further * (1 + given.drafts) + 1, line, 0, given.drafts)
                measured = online(model, line, given.tokens, given.further, given.drafts)
                yield {**measured, "predicted": expected}
        return
    if there(None):
        return
    with contextlib.ExitStack() as stack:
        work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = Path(given.model)
        if given.model in ARCHITECTURES:
            folder = work / "model"
            if not folder.exists():
                random_model(given.model, folder)
        server = work / "server"
        server.mkdir(parents=True, exist_ok=True)
        options: list[object] = ["--embedding", "public", "--material", server / "server-material", "--memory-gb", 0]
        options += ["--max-new-tokens", given.new_tokens, "--session-seconds", 14_400, "--self-test", "none"]
        options += ["--prefix-file", given.prefix_file] if given.prefix_file else []
        serving = tls_server(folder, server, *options, start_seconds=START_SECONDS)
        address, log, tls = stack.enter_context(serving)
        store = stack.enter_context(Store(work / "client"))
        ahead = len(connect(address, tls).prefix)
        expected = predicted(load_description(folder), given.tokens, given.new_tokens, "loopback", ahead)
        measured = whole_session(address, log, tls, folder, given.tokens, given.new_tokens, store)
        yield {**measured, "predicted": expected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="polynomial SM(t)+ScFuFFN")
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=65)
    parser.add_argument("--prefix-file", type=Path)
    parser.add_argument("--work", type=Path, help="folder of the model and both stores; by default a temporary one")
    parser.add_argument("--online", action="store_true", help="the online part alone, with material drawn at random")
    parser.add_argument("--lines", nargs="+", choices=["loopback", *LINES], default=["loopback", *LINES])
    parser.add_argument("--further", type=int, default=6, help="tokens after the prompt, with --online")
    parser.add_argument("--drafts", type=int, default=0, help="of each of these, beside its own row, with --online")
    parser.add_argument("--out", type=Path, required=True, help="file of the rows")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(given.out.read_bytes()) if given.out.exists() else []
    for row in rows_of(given, rows):
        rows.append({"model": given.model, "machine": machine(), **row})
        given.out.write_text(json.dumps(rows, indent=1))
        print(json.dumps({name: value for name, value in row.items() if not isinstance(value, list)}), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
