"""What tests of private sessions share: a tiny model, servers of it, and the processes that they leave behind."""

import asyncio
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp import web

from entropi import cli
from entropi.data.corpus import load_corpus
from entropi.data.tokenizer import train_tokenizer
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.private.sessions import client
from entropi.private.wire.messages import PROTOCOL_VERSION, Hello, encode
from entropi.private.wire.versions import engine_version

TEXT = "The secret garden lies behind the old stone wall, and the keeper of the garden has the only key. "
PROMPT = "the keeper lies"
MOST_TOKENS = 8  # the server's limit
POSITIONS = 32
TOLERANCE = 0.05
HANGING = 600  # seconds after which something hangs; everything here takes far less, on a machine with other work too


@pytest.fixture(scope="session")
def served_cache(shared_folder):
    """Of all servers of this run, whichever worker starts them: most serve the same model, which one has looked at."""
    folder = shared_folder / "served-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory, served_cache):
    """Temporary files of all processes; and their environment carries a mark by which they are found."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setenv("LC_ENTROPI_TEST_MARK", str(folder))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("ENTROPI_CACHE", str(served_cache))
        patch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
        yield folder


def save_model(folder, architecture="SM(t)+ScFuFFN", change=None, positions=POSITIONS, **options):
    """A model with random weights and biases, which a training could have left, and a tokenizer of 300 entries."""
    corpus = folder.parent / "corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(8):
        (corpus / f"{number}.txt").write_text(TEXT * 10 + str(number))
    tokenizer = train_tokenizer(load_corpus(str(corpus)), 300)
    torch.manual_seed(3)
    config = EntropiConfig(
        architecture=architecture,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        **options,
    )
    model = EntropiForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if change is not None:
            change(model)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of the model, the model and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "model"
    return folder, *save_model(folder)


@pytest.fixture(scope="module")
def folded(model, tmp_path_factory):
    """Folder of the folded model."""
    folder = tmp_path_factory.mktemp("models") / "folded"
    assert cli.main(["fold", str(model[0]), str(folder)]) == 0
    return folder


def command(*words):
    """The command line of an entropi process."""
    return [sys.executable, "-m", "entropi", *map(str, words)]


class Server:
    """An `entropi serve` process."""

    def __init__(self, folder, log, *options, prefix=()):
        self.log_file = log
        listen = () if "--listen" in options else ("--listen", "127.0.0.1:0")
        tests = () if "--self-test" in options else ("--self-test", "none")  # seconds that few tests need
        words = ("serve", folder, *listen, *tests, "--max-new-tokens", MOST_TOKENS, *options)
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [*prefix, *command(*words)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self):
        return self.log_file.read_text()

    def address(self):
        wait_for(lambda: "listening on" in self.log or self.process.poll() is not None, HANGING)  # it compiles much
        return re.search(r"listening on ([^, ]+:\d+)", self.log)[1]

    def sessions_closed(self):
        return self.log.count(": opened") == self.log.count(": closed")


def hello():
    """A client's first message."""
    return encode(Hello(PROTOCOL_VERSION, engine_version())).decode()


def free_port():
    """A TCP port that nobody uses right now.

    It lies below those that the system gives to connections: other tests, beside this one, make thousands of these.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(condition, seconds=HANGING):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def marked_processes(mark):
    """Process id -> command line of every process with our mark in its environment, living or orphaned."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"LC_ENTROPI_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def parties(mark, parent=None):
    """Ids of party processes; only the children of `parent`, if it is given."""
    return [
        pid
        for pid, command in marked_processes(mark).items()
        if "entropi.private.sessions.party" in command and (parent is None or parent_of(pid) == parent)
    ]


def parent_of(pid):
    with contextlib.suppress(OSError):
        return int(re.search(r"PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    return None


def engine_logs(mark):
    """What the engines of all parties have logged so far, in files without a name."""
    logs = []
    for pid in parties(mark):
        with contextlib.suppress(OSError):
            descriptors = [d for d in Path(f"/proc/{pid}/fd").iterdir() if "engine.log" in os.readlink(d)]
            logs += [descriptor.read_bytes() for descriptor in descriptors[:1]]
    return logs


def no_parties_left(mark):
    """Wait until they are gone."""
    wait_for(lambda: not parties(mark))
    return True


def plain_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().numpy()


def honest_answer(address, model):
    """One token from a server, compared with the model's."""
    _, plain, tokenizer = model
    answer = client.ask(address, PROMPT, 1)
    expected = plain_logits(plain, tokenizer.encode(PROMPT).ids)
    error = np.abs(answer.logits[0] - expected).max()
    assert error < TOLERANCE
    (token,) = answer.record.new_tokens
    assert token == int(answer.logits[0].argmax())
    assert expected[token] >= expected.max() - 2 * error  # nothing else could be ahead of it for as small an error
    return True


def run_cli(capfd, *words):
    """Status of a command in this process, and what it says: one line for a person, never a traceback."""
    capfd.readouterr()
    status = cli.main([str(word) for word in words])
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("entropi: ")]
    assert "Traceback" not in said
    assert len(lines) == 1
    assert said.endswith(lines[0] + "\n")
    return status, lines[0]


class ThreadedApp:
    """An aiohttp application in a thread of its own."""

    def __init__(self, handler, tls=None):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        app = web.Application()
        app.router.add_get("/v1/session", handler)
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self.address = asyncio.run_coroutine_threadsafe(self._start(tls), self.loop).result(HANGING)

    async def _start(self, tls):
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        return f"127.0.0.1:{self.runner.addresses[0][1]}"

    def close(self):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(HANGING)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
