"""Bytes, messages and seconds of one private forward pass of GPT-2 small, beside the paper's figures and our goals.

    python benchmarks/private_forward.py --out results [--rows NAME ...] [--seed 0]

Every row is a run of two processes under CHEETAH, bytes of both directions, after a first pass over a small model has
exchanged keys. A row's layers are all executed, except where it says so; weights are random and of the size that
training leaves. Rows already in the --out folder are not run again. The last line is JSON.

The token table costs the same in every architecture and is measured by itself, as rows "embedding"; the table shows
both sums. `straightforward` is one layer written without any of our ways to save: dense softmax with a division,
tanh-GELU, LayerNorm by variance and division, weights in shares, SPU's own settings.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from entropi.machine import machine
from entropi.private.compute.description import FORMAT, Description
from entropi.private.compute.embedding import one_hot
from entropi.private.compute.engine import PARTIES, Engine, Simulation
from entropi.private.compute.folded import load_folded
from entropi.private.compute.program import Stage, forward
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.sessions.engine_link import open_link
from entropi.records import StageCommunication
from entropi.report.communication import by_operation

GPT2 = dict(
    format=FORMAT,
    architecture="",
    layers=12,
    heads=12,
    key_value_heads=12,
    hidden_size=768,
    vocab_size=50257,
    positions=1024,
    intermediate_size=0,
    position_embedding="learned",
    rotary_dimensions=0,
    rotary_base=10000.0,
    temperature=False,
    softmax="power-3",
    norm="none",
    norm_epsilon=1e-5,
    parallel_residual=False,
    activation="identity",
    explicit_ffn=[],
    final_norm="rms",  # the paper's models keep the LayerNorm before the head
    centre=True,
)
LAYER_NORM = dict(norm="rms", intermediate_size=3072, centre=False)  # folding has centred the state
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "SM+ScFuFFN": {},
    "SM(t)+ScFuFFN": dict(temperature=True),
    "polynomial SM(t)+ScFuFFN": dict(softmax="polynomial-1"),
    "Pow+ScFuFFN": dict(softmax="polynomial-1/keys", final_norm="none", centre=False),
    "SM+LN+R": dict(LAYER_NORM, activation="relu"),
    "SM+LN+G": dict(LAYER_NORM, activation="gelu"),
}
# row: architecture, tokens, layers that are executed, the paper's and our goal's GB for all twelve
ROWS: dict[str, tuple[str, int, int, float, float]] = {
    "SM+ScFuFFN T=128": ("SM+ScFuFFN", 128, 12, 6.43, 1.5),
    "SM(t)+ScFuFFN T=128": ("SM(t)+ScFuFFN", 128, 12, 6.43, 1.5),
    "SM+LN+R T=128": ("SM+LN+R", 128, 12, 9.44, 3.5),
    "SM+LN+G T=128": ("SM+LN+G", 128, 12, 25.32, 5.5),
    "SM(t)+ScFuFFN T=256": ("SM(t)+ScFuFFN", 256, 12, 20.72, 4.5),
    "SM(t)+ScFuFFN T=512": ("SM(t)+ScFuFFN", 512, 2, 69.68, 15.0),
    "polynomial SM(t)+ScFuFFN T=128": ("polynomial SM(t)+ScFuFFN", 128, 12, 6.43, 1.5),
    "polynomial SM(t)+ScFuFFN T=256": ("polynomial SM(t)+ScFuFFN", 256, 2, 20.72, 4.5),
    "polynomial SM(t)+ScFuFFN T=512": ("polynomial SM(t)+ScFuFFN", 512, 2, 69.68, 15.0),
}
# These rows also run one token more.
GENERATING = ("SM+ScFuFFN T=128", "SM(t)+ScFuFFN T=128", "polynomial SM(t)+ScFuFFN T=128")


def description(architecture: str, layers: int) -> Description:
    return msgspec.convert(
        {**GPT2, **ARCHITECTURES[architecture], "architecture": architecture.split()[-1], "layers": layers}, Description
    )


def random_weight(name: str, shape: tuple[int, ...], model: Description, random: np.random.Generator) -> np.ndarray:
    """Of the size that training leaves: products keep a row's size, residual branches add a fraction to it."""
    part = name.split(".")[-1]
    size = shape[0] ** -0.5 if len(shape) == 2 else 0.05
    if part == "inverse_temperature":
        return random.uniform(0.5, 2.0, shape).astype(np.float32)
    if part == "offset":  # with scores of two or three units, weights of about 16
        return random.uniform(2.0, 4.0, shape).astype(np.float32)
    if part in ("embedding", "positions"):
        size = 0.5
    if part in ("output", "down"):
        size *= 0.4
    weight = size * random.standard_normal(shape, np.float32)
    if part == "qkv":  # scores of a few units
        weight[:, : model.hidden_size] *= 2 * model.head_size**-0.5
    return weight


# --- Programs: stages of a pass, the private one and the straightforward one ------------------------------------------


def straightforward(model: Description, tokens: int) -> Iterator[Stage]:
    """One layer as it is written for a GPU: what SPU would be given without thinking of it."""
    heads, width = model.heads, model.head_size

    def layer_norm(x: jax.Array) -> jax.Array:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + model.norm_epsilon)

    def project(x: jax.Array, matrix: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
        joint = (x @ matrix + bias).reshape(tokens, 3, heads, width).transpose(1, 2, 0, 3)
        return joint[0], joint[1], joint[2]

    def softmax(logits: jax.Array) -> jax.Array:
        shifted = jnp.maximum(logits - jnp.max(logits, axis=-1, keepdims=True), -100.0)  # SPU's exp needs a limit
        weights = jnp.exp(shifted) * np.tril(np.ones((tokens, tokens), np.float32))
        return weights / jnp.sum(weights, axis=-1, keepdims=True)

    def merge(x: jax.Array, attended: jax.Array, matrix: jax.Array, bias: jax.Array) -> jax.Array:
        return x + attended.transpose(1, 0, 2).reshape(tokens, -1) @ matrix + bias

    def scaled(x: jax.Array, matrix: jax.Array, bias: jax.Array) -> jax.Array:
        return 0.9 * x + (x @ matrix + bias) * 0.8

    normed = model.norm != "none"
    read = "normed" if normed else "state"
    if normed:
        yield Stage("norm", 0, layer_norm, ("state",), ("normed",))
    yield Stage("qkv", 0, project, (read, "0.qkv", "0.qkv_bias"), ("q", "k", "v"))
    if model.temperature:
        yield Stage("temperature", 0, lambda q, t: q * t[:, :tokens, None], ("q", "0.inverse_temperature"), ("q",))
    yield Stage("scores", 0, lambda q, k: q @ k.transpose(0, 2, 1), ("q", "k"), ("scores",))
    yield Stage("softmax", 0, softmax, ("scores",), ("weights",))
    yield Stage("values", 0, jnp.matmul, ("weights", "v"), ("heads",))
    yield Stage("output", 0, merge, ("state", "heads", "0.output", "0.output_bias"), ("state",))
    if not normed:
        yield Stage("ffn", 0, scaled, ("state", "0.ffn", "0.ffn_bias"), ("state",))
        return
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    if model.activation == "gelu":
        activation = partial(jax.nn.gelu, approximate=True)
    yield Stage("norm", 0, layer_norm, ("state",), ("normed",))
    yield Stage("ffn", 0, lambda x, w, b: x @ w + b, ("normed", "0.up", "0.up_bias"), ("hidden",))
    yield Stage("activation", 0, activation, ("hidden",), ("hidden",))
    yield Stage("ffn", 0, lambda s, x, w, b: s + x @ w + b, ("state", "hidden", "0.down", "0.down_bias"), ("state",))


def plain_settings(config: Any) -> None:
    """SPU as it comes, but for the meter."""
    config.fxp_exp_iters = 8
    config.experimental_enable_colocated_optimization = False
    config.cheetah_2pc_config.enable_mul_lsb_error = False
    config.experimental_disable_mmul_split = False


# --- Two processes ----------------------------------------------------------------------------------------------------


class Task(msgspec.Struct, frozen=True):
    """What both parties run: a row's program over `tokens` tokens, then `further` single ones."""

    kind: str  # "forward", "layer" (the first of it), "straightforward" (the same layer), "embedding" or "trained"
    architecture: str
    tokens: int
    layers: int
    seed: int
    further: int = 0
    iterations: int = 3
    folded: str = ""  # folder of a trained model, folded; then `ids` are the tokens, and the table is private
    ids: list[int] = []


def described(task: Task) -> Description:
    """The task's model; its softmax is the power of the task's t, a polynomial keeps its own."""
    model = description(task.architecture, task.layers)
    own = model.softmax.startswith("polynomial")
    return model if own else msgspec.structs.replace(model, softmax=f"power-{task.iterations}")


WARM_UP = 8  # tokens of the pass that exchanges keys


def party(rank: int, links: tuple[str, str], session: str, task: Task, channel: Any) -> None:
    """One of the two processes; puts a word before every pass, every stage's communication, and None into `channel`.

    A trained model's logits stand before the None, at the client.
    """
    trained: dict[str, np.ndarray] = {}
    model = described(task)
    if task.kind == "trained":
        model, trained = load_folded(Path(task.folded))
    plain = task.kind == "straightforward"
    engine = Engine(rank, open_link(rank, links, session), Settings(), plain_settings if plain else None)
    random = np.random.default_rng(task.seed)

    def hold(name: str, shape: tuple[int, ...], owner: int, value: Callable[[], np.ndarray]) -> None:
        engine.hold(name, shape, value() if rank == owner else None)

    shapes = model.weight_shapes()
    if plain:
        width = model.hidden_size
        shapes |= {"0.ffn": (width, width), "0.ffn_bias": (width,)}
    for name, shape in shapes.items():
        if task.kind == "embedding":
            wanted = name in ("embedding", "positions")
        else:
            wanted = name.startswith("0.") if plain else name != "embedding" or task.kind == "trained"
        if wanted:
            value = (
                partial(trained.__getitem__, name) if trained else partial(random_weight, name, shape, model, random)
            )
            hold(name, shape, SERVER, value)

    def run(stages: Iterator[Stage], token: int, counted: bool) -> None:
        for stage in stages:
            communication = engine.run(stage, token)
            if counted:
                channel.put(communication)

    inputs = np.random.default_rng(task.seed + 1)
    if task.kind == "embedding":
        for number, length in enumerate((1, task.tokens, 1)):  # the first exchanges keys
            ids = inputs.integers(0, model.vocab_size, length).tolist()
            shape = (-(-length // 2), model.vocab_size)
            hold("tokens", shape, CLIENT, partial(one_hot, ids, model.vocab_size, paired=True))
            stages = forward(model, length, 0, "power-8", paired=True)
            run((stage for stage in stages if stage.name == "embedding"), number - 1, number > 0)
    elif task.kind == "trained":
        for number, ids in enumerate((task.ids[:WARM_UP], task.ids)):
            hold("tokens", (len(ids), model.vocab_size), CLIENT, partial(one_hot, ids, model.vocab_size))
            channel.put("a pass begins")
            run(forward(model, len(ids), 0, "power-8"), number - 1, number > 0)
        logits, _ = engine.reveal_to_client("logits")
        if rank == CLIENT:
            channel.put(logits)
    else:
        lengths = [(task.tokens, 0)] + [(1, task.tokens + number) for number in range(task.further)]
        state = "state" if plain else "embedded"
        for number, (new, past) in enumerate([(WARM_UP, 0), *lengths]):
            shape = (new, model.hidden_size)
            hold(state, shape, CLIENT, partial(inputs.normal, size=shape))
            stages = straightforward(model, new) if plain else forward(model, new, past, "power-8", embedding="public")
            if task.kind == "layer":
                stages = takewhile(lambda stage: stage.layer <= 0, stages)
            channel.put("a pass begins")
            run(stages, number - 1, number > 0)
    engine.close()
    channel.put(None)


def free_links() -> tuple[str, str]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}", f"127.0.0.1:{other.getsockname()[1]}"


class Turns:
    """Stands between the parties and counts how often the direction of what they say to each other changes.

    Every party opens its own connections, so what is said goes from who connected to who listens; the way back holds
    receipts only. Two conversations at the same time count as more turns than either has: an upper bound of the
    rounds that wait for each other.
    """

    def __init__(self, links: tuple[str, str]) -> None:
        self.count, self._last, self._lock = 0, -1, threading.Lock()
        self.links = [self._listen(rank, links[rank]) for rank in (0, 1)]

    def _listen(self, rank: int, target: str) -> str:
        listener = socket.create_server(("127.0.0.1", 0))

        def accept() -> None:
            while True:
                incoming, _ = listener.accept()
                outgoing = self._connect(target)
                threading.Thread(target=self._pass_on, args=(incoming, outgoing, rank), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(outgoing, incoming, None), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def _connect(self, target: str) -> socket.socket:
        host, port = target.split(":")
        while True:
            try:
                return socket.create_connection((host, int(port)))
            except ConnectionRefusedError:  # that party is still starting
                time.sleep(0.1)

    def _pass_on(self, source: socket.socket, sink: socket.socket, rank: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if rank is not None:
                    with self._lock:
                        self.count += self._last != rank
                        self._last = rank
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def run_two(task: Task, label: str) -> tuple[list[StageCommunication], int, list[float]]:
    """The client's view of a task's stages, the turns of its last pass, and the logits of a trained model."""
    context = multiprocessing.get_context("spawn")
    links, session, channels = free_links(), secrets.token_hex(16), [context.Queue(), context.Queue()]
    turns = Turns(links)
    # Either party listens where it is told and finds the other one behind the counter.
    views = [(links[0], turns.links[1]), (turns.links[0], links[1])]
    processes = [
        context.Process(target=party, args=(rank, views[rank], session, task, channels[rank]), daemon=True)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found: list[StageCommunication] = []
    logits: list[float] = []
    before = 0
    while (communication := take(channels[CLIENT], processes)) is not None:
        if isinstance(communication, str):
            before = turns.count
            continue
        if isinstance(communication, np.ndarray):
            logits = communication[-1].tolist()
            continue
        found.append(communication)
        total = sum(stage.bytes for stage in found)
        where = f"layer {communication.layer} {communication.name}" if communication.layer >= 0 else communication.name
        print(f"\r{label}: {where:20s} {total / 1e6:9.1f} MB", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for process in processes:
        process.join()
    return found, turns.count - before, logits


def take(channel: Any, processes: list[Any]) -> StageCommunication | str | np.ndarray | None:
    """The next reading; fails when a party has died instead of waiting for it."""
    while True:
        try:
            return channel.get(timeout=5)
        except Exception:
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                raise SystemExit("a party ended early; its reason is above") from None


def simulate(protocol: str, task: Task) -> list[StageCommunication]:
    """One layer and the last one under another protocol, all parties in this process."""
    model = described(task)
    engine = Simulation(protocol, Settings())  # type: ignore[arg-type]
    random = np.random.default_rng(task.seed)
    for name, shape in model.weight_shapes().items():
        engine.hold(name, random_weight(name, shape, model, random), SERVER)
    found = []
    for counted, new in ((False, WARM_UP), (True, task.tokens)):
        engine.hold("embedded", random.normal(size=(new, model.hidden_size)), CLIENT)
        communication = [engine.run(stage) for stage in forward(model, new, 0, "power-8", embedding="public")]
        found = communication if counted else []
    return found


# --- Results ----------------------------------------------------------------------------------------------------------


def trained_run(run: Path, out: Path) -> tuple[Result, float, bool]:
    """Two processes over one block of a trained run folder's held-out text, as a session with a private table runs it.

    Returns the readings, the largest error of the last logits against torch, and whether the likeliest token agrees.
    """
    import torch

    model, folded, heldout = opened(run)
    folder = out / f"folded-{run.name}"
    folded.save(folder)
    ids = heldout[0].tolist()
    config = model.config
    task = Task("trained", config.architecture, len(ids), config.num_hidden_layers, 0, folded=str(folder), ids=ids)
    result = measured(out, f"trained {run.name}", task)
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0, -1].double().numpy()
    secure = np.array(result.logits)
    return result, float(np.abs(secure - plain).max()), bool(secure.argmax() == plain.argmax())


@functools.cache
def opened(run: Path) -> tuple[Any, Any, Any]:
    """The model of a run folder, the same folded, and blocks of its held-out text."""
    from entropi.data.prepare import prepare
    from entropi.model.folding import fold
    from entropi.training.loading import open_model

    recipe = msgspec.yaml.decode((run / "config.yaml").read_bytes())
    known = {field: recipe[field] for field in ("corpus", "vocab_size", "context_length")}
    model, _, _ = open_model(run)
    return model, fold(model), prepare(known["corpus"], known["vocab_size"], known["context_length"]).packed.heldout


class Accuracy(msgspec.Struct):
    """Logits of a secure run against the model's own in torch, on held-out text."""

    positions: int
    largest_error: float
    mean_error: float
    same_likeliest: float  # share of the positions
    perplexity: float
    secure_perplexity: float


def accuracy(run: Path, protocol: str, blocks: int) -> Accuracy:
    """Of a trained run folder's model, over all positions of `blocks` blocks of its held-out text."""
    import torch

    model, folded, heldout = opened(run)
    heldout = heldout[:blocks]
    shape = msgspec.convert(folded.description, Description)
    engine = Simulation(protocol, Settings())  # type: ignore[arg-type]
    for name, weight in folded.weights.items():
        engine.hold(name, weight, SERVER)
    errors, same, losses = [], [], []
    for number, block in enumerate(np.asarray(heldout, np.int64)):
        engine.hold("embedded", folded.weights["embedding"][block], CLIENT)
        for stage in forward(shape, len(block), 0, "power-8", embedding="public", every_row=True):
            engine.run(stage)
        secure = engine.reveal("logits").astype(np.float64)
        with torch.no_grad():
            plain = model(torch.from_numpy(block)[None]).logits[0].double().numpy()
        errors.append(np.abs(secure - plain).max(axis=1))
        same.append(secure.argmax(axis=1) == plain.argmax(axis=1))
        for logits in (plain, secure):
            shifted = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
            chosen = shifted[np.arange(len(block) - 1), block[1:]]
            losses.append(np.log(np.exp(shifted).sum(axis=1)).mean() - chosen.mean())
        print(f"\r{protocol}: block {number + 1} of {len(heldout)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return Accuracy(
        positions=sum(map(len, errors)),
        largest_error=float(np.max(errors)),
        mean_error=float(np.mean(errors)),
        same_likeliest=float(np.mean(same)),
        perplexity=float(np.exp(np.mean(losses[::2]))),
        secure_perplexity=float(np.exp(np.mean(losses[1::2]))),
    )


class Result(msgspec.Struct):
    """A task's readings and where they were taken."""

    task: Task
    stages: list[StageCommunication]
    seconds: float
    machine: str
    turns: int = 0  # of the direction between the parties in the last pass: an upper bound of its dependent rounds
    simulated: str | None = None  # the protocol, where the parties were threads of one process
    logits: list[float] = []  # after the last token, of a trained model


def measured(out: Path, label: str, task: Task, protocol: str | None = None) -> Result:
    """The result in the folder, if it is of this task; otherwise the task is run and its result left there."""
    file = out / f"{label.replace(' ', '_').replace('=', '')}.json"
    if file.exists():
        result = msgspec.json.decode(file.read_bytes(), type=Result)
        if result.task == task:
            return result
    started = time.perf_counter()
    stages, turns, logits = run_two(task, label) if protocol is None else (simulate(protocol, task), 0, [])
    result = Result(task, stages, time.perf_counter() - started, machine(), turns, protocol, logits)
    file.write_bytes(msgspec.json.encode(result))
    return result


def whole(stages: list[StageCommunication], layers: int) -> tuple[float, float, float]:
    """GB, messages and seconds of twelve layers: what ran, and the first layer again for every one that did not."""

    def sums(chosen: list[StageCommunication]) -> np.ndarray:
        return np.array([[s.bytes / 1e9, s.messages, s.seconds] for s in chosen if s.token == 0]).sum(axis=0)

    total = sums(stages) + (12 - layers) * sums([stage for stage in stages if stage.layer == 0])
    return tuple(total)


def print_operations(label: str, result: Result) -> None:
    """Where every byte of the prompt's pass went."""
    stages = [stage for stage in result.stages if stage.token == 0]
    print(f"\n{label}, {result.task.layers} layers executed, by operation:")
    for operation in by_operation(stages):
        sums = operation.prompt
        print(f"  {operation.name:12s} {sums.bytes / 1e6:9.2f} MB {sums.messages:7d} messages {sums.seconds:8.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extra = ["embedding", "straightforward", "protocols"]
    parser.add_argument("--out", type=Path, required=True, help="folder of results; what is there is not run again")
    parser.add_argument("--rows", nargs="*", default=[*ROWS, *extra], choices=[*ROWS, *extra], metavar="ROW")
    parser.add_argument(
        "--layers",
        type=int,
        help="execute only so many layers of every row, 2 or more: the last computes one query only",
    )
    parser.add_argument("--iterations", type=int, default=3, help="t of the softmax kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compare",
        nargs="*",
        default=["SM+ScFuFFN"],
        choices=ARCHITECTURES,
        help="architectures of the straightforward layer; those with an FFN take 15 GB of memory",
    )
    parser.add_argument("--pairs", type=int, default=1, help="how often the two layers are run, in turn")
    parser.add_argument("--model", type=Path, help="run folder whose model also runs, and how accurately")
    options = parser.parse_args()
    if options.layers is not None and options.layers < 2:
        parser.error("--layers must be at least 2: a whole one, which stands for those left out, and the last")
    if options.model is not None and not (options.model / "config.yaml").is_file():
        parser.error(f"--model: {options.model} is no run folder")
    options.out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"machine": machine()}

    embeddings = {}
    if "embedding" in options.rows:
        for tokens in sorted({ROWS[row][1] for row in options.rows if row in ROWS} or {128}):
            task = Task("embedding", "SM+ScFuFFN", tokens, 2, options.seed)
            result = measured(options.out, f"embedding T={tokens}", task)
            prompt, token = (sum(s.bytes for s in result.stages if s.token == n) for n in (0, 1))
            seconds = sum(stage.seconds for stage in result.stages if stage.token == 0)
            embeddings[tokens] = prompt / 1e9
            summary[f"embedding T={tokens}"] = {"GB": prompt / 1e9, "seconds": seconds, "token_MB": token / 1e6}
            print(f"private table: {prompt / 1e6:.1f} MB for {tokens} tokens, {token / 1e6:.1f} MB for one more")

    lines = []
    for row in [name for name in ROWS if name in options.rows]:
        architecture, tokens, layers, paper, goal = ROWS[row]
        layers = min(layers, options.layers or layers)
        further = int(row in GENERATING and layers == 12)
        task = Task("forward", architecture, tokens, layers, options.seed, further, options.iterations)
        result = measured(options.out, row, task)
        if further:
            prompt, token = (sum(s.bytes for s in result.stages if s.token == n) / 1e6 for n in (0, 1))
            summary[f"generation {architecture}"] = {"prompt_MB": prompt, "token_MB": token, "ratio": prompt / token}
            print(f"\n{architecture}: prompt of {tokens} tokens {prompt:.1f} MB, one more {token:.1f} MB")
        print_operations(row, result)
        gigabytes, messages, seconds = whole(result.stages, layers)
        with_table = gigabytes + embeddings[tokens] if tokens in embeddings else None
        lines.append(
            f"| {row} | {layers} | {paper} | {goal} | {gigabytes:.3f} | {with_table and round(with_table, 3)} "
            f"| {messages:.0f} | {seconds:.0f} |"
        )
        summary[row] = {
            "layers_executed": layers,
            "paper_GB": paper,
            "goal_GB": goal,
            "GB": gigabytes,
            "GB_with_private_table": with_table,
            "messages": messages,
            "seconds": seconds,
        }
    if lines:
        print("\n| row | layers executed | paper GB | goal GB | GB | with private table | messages | seconds |")
        print("|---|---|---|---|---|---|---|---|", *lines, sep="\n")

    if "straightforward" in options.rows:
        for architecture in options.compare:
            taken: dict[str, list[dict[str, float]]] = {"straightforward": [], "layer": []}
            for pair, kind in itertools.product(range(options.pairs), taken):
                task = Task(kind, architecture, 128, 2, options.seed, iterations=options.iterations)
                result = measured(options.out, f"{kind} {architecture} {pair + 1}", task)
                layer = [stage for stage in result.stages if stage.layer == 0]
                figures = {
                    "MB": sum(stage.bytes for stage in layer) / 1e6,
                    "messages": sum(stage.messages for stage in layer),
                    "turns": result.turns,
                    "seconds": sum(stage.seconds for stage in layer),
                }
                taken[kind].append(figures)
            compared = {
                kind: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
                for kind, runs in taken.items()
            }
            seconds_ratios = [ours["seconds"] / plain["seconds"] for plain, ours in zip(*taken.values())]
            print(f"\none layer of {architecture}, T=128, medians of {options.pairs} runs of each in turn:")
            for kind, figures in compared.items():
                print(f"  {kind:16s}", *(f"{value:10.1f} {name}" for name, value in figures.items()))
            print("  seconds, ours / straightforward:", ", ".join(f"{ratio:.3f}" for ratio in seconds_ratios))
            summary[f"layer {architecture}"] = {**compared, "seconds_ratios": seconds_ratios}

    if "protocols" in options.rows:
        for protocol in ("semi2k", "aby3"):
            task = Task("forward", "SM+ScFuFFN", 128, 2, options.seed, iterations=options.iterations)
            result = measured(options.out, f"protocol {protocol}", task, protocol)
            gigabytes, messages, seconds = whole(result.stages, 2)
            trust = "trusted dealer, online phase" if protocol == "semi2k" else "three parties, honest majority"
            print(f"\n{protocol} ({trust}): {gigabytes:.3f} GB over all {PARTIES[protocol]}, SM+ScFuFFN T=128")  # type: ignore[index]
            summary[protocol] = {"GB": gigabytes, "messages": messages, "seconds": seconds}
    if options.model is not None:
        result, error, agrees = trained_run(options.model, options.out)
        print_operations(options.model.name, result)
        gigabytes = sum(stage.bytes for stage in result.stages) / 1e9
        print(
            f"  {gigabytes * 1e3:.1f} MB in all; largest error of the last logits {error:.4f}, the same token: {agrees}"
        )
        summary["trained"] = {"GB": gigabytes, "largest_error": error, "same_likeliest": agrees}
        for protocol, blocks in (("ref2k", 12), ("cheetah", 1)):
            found = accuracy(options.model, protocol, blocks)
            change = found.secure_perplexity / found.perplexity - 1
            print(f"\n{options.model.name} under {protocol}, {found.positions} held-out positions:")
            print(f"  largest error of a logit {found.largest_error:.4f}, the positions' mean {found.mean_error:.4f}")
            print(f"  the likeliest token the same at {found.same_likeliest:.2%}")
            print(f"  perplexity {found.perplexity:.3f} and {found.secure_perplexity:.3f} ({change:+.3%})")
            summary[f"accuracy {protocol}"] = msgspec.to_builtins(found)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
