"""Two machines that do not trust each other: certificates, limits, broken lines, what a server tells of itself."""

import asyncio
import contextlib
import datetime
import importlib.util
import io
import json
import logging
import os
import re
import shlex
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

pytest.importorskip("spu")
pytest.importorskip("cryptography")
import aiohttp
from aiohttp import web
from cryptography import x509
from rich.console import Console

from entropi import cli, records
from entropi.console import ProgressLine
from entropi.errors import UserError
from entropi.private import connect
from entropi.private.admission import monitoring
from entropi.private.admission.limits import Limits
from entropi.private.admission.logs import JsonLines, PlainLines, SessionLog
from entropi.private.admission.slots import Slots
from entropi.private.compute.description import Description
from entropi.private.compute.folded import load_folded
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.sessions import client
from entropi.private.sessions.generation import Answer, Watcher
from entropi.private.sessions.memory import memory_for, needed_memory, unread_for
from entropi.private.sessions.party_handle import Party
from entropi.private.sessions.sampling import Sampling
from entropi.private.wire import channel
from entropi.private.wire.addresses import parse_address
from entropi.private.wire.authority import issue
from entropi.private.wire.certificates import Tls, tls_files
from entropi.private.wire.link_frames import DEFAULT_UNREAD
from entropi.private.wire.messages import Failed, Job, Start, decode_from_server, encode
from entropi.private.wire.server_channel import ClientLeft, Refusal
from entropi.private.wire.tunnel import Tunnel
from link_messages import SESSION, place, push, two_chunks
from private_reference import FIELDS
from serving import (
    HANGING,
    PROMPT,
    TOLERANCE,
    Server,
    ThreadedApp,
    hello,
    honest_answer,
    no_parties_left,
    parties,
    plain_logits,
    run_cli,
    wait_for,
)

pytest_plugins = ["serving"]  # its fixtures
two_party = pytest.mark.two_party
_spec = importlib.util.spec_from_file_location("network", Path(__file__).parents[3] / "benchmarks" / "network.py")
network = sys.modules["network"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(network)


def files(folder, name):
    """TLS files of one of the certificates in a folder."""
    return Tls(folder / f"{name}.pem", folder / f"{name}-key.pem", folder / "ca.pem")


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """Certificates of a server on this machine and two clients; and of strangers with another authority."""
    folder = tmp_path_factory.mktemp("certificates")
    issue(folder, ["localhost", "127.0.0.1"], ["alice", "bob"], days=2)
    issue(folder, ["elsewhere.example"], [], days=2)
    issue(folder / "strangers", ["127.0.0.1"], ["mallory"], days=2)
    return folder


# --- Certificates -----------------------------------------------------------------------------------------------------


def test_certificates_say_what_they_are_for(tmp_path, capsys):
    words = ["certificates", str(tmp_path), "--server", "gpu.example", "10.1.2.3", "::1", "--client", "a", "b"]
    assert cli.main(words) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(path.name for path in written) == sorted(path.name for path in tmp_path.iterdir())
    for path in written:
        secret = "key" in path.name
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if secret else 0o644)
        assert (b"PRIVATE KEY" in path.read_bytes()) == secret
    loaded = {p.stem: x509.load_pem_x509_certificate(p.read_bytes()) for p in written if "key" not in p.name}
    names = loaded["gpu.example"].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gpu.example"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3", "::1"]
    for name, purpose in (("gpu.example", "serverAuth"), ("a", "clientAuth"), ("b", "clientAuth")):
        usage = loaded[name].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert [use._name for use in usage] == [purpose]
        loaded[name].verify_directly_issued_by(loaded["ca"])
        assert loaded[name].not_valid_after_utc > datetime.datetime.now(datetime.timezone.utc)
    again = tmp_path / "ca.pem"
    before = again.read_bytes()
    assert cli.main(["certificates", str(tmp_path), "--client", "c"]) == 0
    assert again.read_bytes() == before
    x509.load_pem_x509_certificate((tmp_path / "c.pem").read_bytes()).verify_directly_issued_by(loaded["ca"])


def test_impossible_certificates_are_told_all_at_once(tmp_path, capfd):
    issue(tmp_path, [], ["alice"], days=1)
    names = ["--server", "a b", "--client", "../x", "alice", "ca", "y", "y", "--days", "0"]
    status, line = run_cli(capfd, "certificates", tmp_path, *names)
    assert status == 2
    for problem in ("'a b' is no host", "'../x' cannot", "alice.pem exists", "'ca' cannot", "twice", "0 days"):
        assert problem in line
    assert {p.name for p in tmp_path.iterdir()} == {"ca.pem", "ca-key.pem", "alice.pem", "alice-key.pem"}
    assert "neither" in run_cli(capfd, "certificates", tmp_path / "other")[1]
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("damage", ["other key", "garbage", "no key"])
def test_a_damaged_authority(tmp_path, capfd, damage):
    issue(tmp_path, [], ["alice"], days=1)
    key = tmp_path / "ca-key.pem"
    if damage == "other key":
        key.write_bytes((tmp_path / "alice-key.pem").read_bytes())
    elif damage == "garbage":
        key.write_bytes(b"\xff\x00")
    else:
        key.unlink()
    status, line = run_cli(capfd, "certificates", tmp_path, "--client", "bob")
    assert status == 2
    assert "ca-key.pem" in line
    assert not (tmp_path / "bob.pem").exists()


def shake_hands(server_side, client_side, host):
    """A TLS handshake in memory: the error of the client or the server, or the negotiated version."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client_side.wrap_bio(to_client, to_server, server_hostname=host),
        server_side.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):  # the server looks at the client's certificate after the client is done
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return getattr(error, "verify_message", "") or error.reason
    return ends[0].version()


@pytest.mark.parametrize(
    ("servers", "clients", "host", "outcome"),
    [
        ("localhost", "alice", "127.0.0.1", "TLSv1.3"),
        ("localhost", "bob", "localhost", "TLSv1.3"),
        ("localhost", "alice", "other.example", "Hostname mismatch"),
        ("elsewhere.example", "alice", "127.0.0.1", "IP address mismatch"),
        ("strangers/127.0.0.1", "alice", "127.0.0.1", "unable to get local issuer"),
        ("localhost", "strangers/mallory", "127.0.0.1", "unable to get local issuer"),
        ("alice", "bob", "alice", "unsuitable certificate purpose"),  # a client that poses as the server
        ("localhost", "elsewhere.example", "127.0.0.1", "unsuitable certificate purpose"),
    ],
)
def test_who_is_believed(authority, servers, clients, host, outcome):
    own = authority / "ca.pem"  # what both sides believe in
    server_side = Tls(authority / f"{servers}.pem", authority / f"{servers}-key.pem", own).server_context()
    client_side = Tls(authority / f"{clients}.pem", authority / f"{clients}-key.pem", own).client_context()
    assert outcome in shake_hands(server_side, client_side, host)


def test_nobody_is_answered_without_a_certificate_or_on_old_tls(authority):
    server_side = files(authority, "localhost").server_context()
    naked = ssl.create_default_context(cafile=authority / "ca.pem")
    assert shake_hands(server_side, naked, "localhost") == "PEER_DID_NOT_RETURN_A_CERTIFICATE"
    old = files(authority, "alice").client_context()
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    assert "UNSUPPORTED_PROTOCOL" in shake_hands(server_side, old, "localhost")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"--tls-key": None}, "--tls-key is missing"),
        ({"--tls-key": None, "--server-ca": None}, "--tls-key and --server-ca is missing"),
        ({"--tls-cert": "nothing.pem"}, "cannot read"),
        ({"--tls-key": "bob-key.pem"}, "are not a certificate and its private key"),
        ({"--server-ca": "alice-key.pem"}, "holds no certificate of an authority"),
    ],
)
def test_unusable_tls_files(authority, capfd, change, complaint):
    given = {"--tls-cert": "alice.pem", "--tls-key": "alice-key.pem", "--server-ca": "ca.pem", **change}
    words = [word for name, file in given.items() if file for word in (name, authority / file)]
    status, line = run_cli(capfd, "ask", "hello", "--server", "example.org:1", *words)
    assert status == 2
    assert complaint in line


def test_a_key_with_a_password_is_not_waited_for(authority, tmp_path):
    key = serialization.load_pem_private_key((authority / "alice-key.pem").read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(UserError, match="protected by a password"):
        Tls(authority / "alice.pem", locked, authority / "ca.pem").client_context()


def test_addresses():
    assert parse_address("localhost:1") == ("127.0.0.1", 1)
    assert parse_address("[::1]:9000") == ("::1", 9000)
    assert parse_address("gpu.example:9000", tls=True) == ("gpu.example", 9000)
    assert parse_address("localhost:9000", tls=True) == ("localhost", 9000)  # a name the certificate may bear
    assert parse_address("[2001:db8::1]:9000", tls=True) == ("2001:db8::1", 9000)
    for address in ("gpu.example", "http://a:1", "a b:1", "a/b:1", "::1:1", "a:1x", "a\n:1"):
        with pytest.raises(UserError, match="HOST:PORT"):
            parse_address(address, tls=True)
    assert tls_files(None, None, None, "--server-ca") is None


# --- Choosing, counting -----------------------------------------------------------------------------------------------


def test_sampling_follows_the_distribution():
    logits = np.array([0.0, 2.0, 1.0, -1.0])
    random = np.random.default_rng(0)
    assert Sampling().choose(logits, random) == 1
    drawn = [Sampling(temperature=0.5).choose(logits, random) for _ in range(4000)]
    weights = np.exp(logits / 0.5)
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.abs(shares - weights / weights.sum()).max() < 4 * 0.5 / np.sqrt(len(drawn))  # four standard deviations
    assert {Sampling(1.0, top_k=2).choose(logits, random) for _ in range(200)} == {1, 2}
    assert Sampling(1e-300).choose(logits, random) == 1  # no overflow
    first, second = ([Sampling(2.0).choose(logits, r) for _ in range(50)] for r in map(np.random.default_rng, (7, 7)))
    assert first == second


@pytest.mark.parametrize("options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"seed": -1}])
def test_impossible_sampling(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)


class Line:
    """A client in the queue: what it was told, and nothing to say."""

    def __init__(self):
        self.told, self.leaves = [], asyncio.Event()

    async def send_str(self, text):
        self.told.append(json.loads(text)["ahead"])

    async def receive(self):
        await self.leaves.wait()
        return aiohttp.WSMessage(aiohttp.WSMsgType.CLOSED, None, None)


def test_the_queue_is_first_come_first_served(monkeypatch):
    monkeypatch.setattr("entropi.private.admission.slots.QUEUE_SECONDS", 0.01)
    counters = monitoring.Counters()
    order = []

    async def enter(slots, name, line, done):
        async with slots.slot(line):
            order.append(name)
            await done.wait()

    async def scenario():
        slots = Slots(Limits(max_sessions=1, max_queue=2), counters)
        lines, dones = [Line() for _ in range(4)], [asyncio.Event() for _ in range(4)]
        tasks = []
        for index in range(4):
            tasks.append(asyncio.create_task(enter(slots, index, lines[index], dones[index])))
            await asyncio.sleep(0.03)
        assert (counters.sessions, counters.waiting) == (1, 2)
        with pytest.raises(Refusal, match="busy"):
            await tasks[3]
        lines[1].leaves.set()  # the first in the queue gives up
        with pytest.raises(ClientLeft):
            await tasks[1]
        await asyncio.sleep(0.05)
        assert [line.told for line in lines] == [[], [0], [1, 0], []]
        dones[0].set()
        await asyncio.sleep(0.05)
        assert order == [0, 2]
        dones[2].set()
        await asyncio.gather(tasks[0], tasks[2])
        assert (counters.sessions, counters.waiting) == (0, 0)

    asyncio.run(scenario())


def test_waiting_has_an_end():
    async def scenario():
        slots = Slots(Limits(queue_seconds=0.01), monitoring.Counters())
        async with slots.slot(Line()):
            with pytest.raises(Refusal, match="too long"):
                async with slots.slot(Line()):
                    pass
        async with slots.slot(Line()):
            pass

    asyncio.run(scenario())


def metrics_of(text):
    """Name and labels -> value of a Prometheus exposition; every sample has help and a type before it."""
    found, described = {}, set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            described.add(line.split()[2])
        elif not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            assert name.partition("{")[0] in described
            found[name] = float(value)
    assert text.endswith("\n")
    return found


def test_metrics():
    counters = monitoring.Counters(sessions=1, tokens=5, sent_bytes=10**15, session_seconds=1.5)
    counters.endings["failed"] += 2
    found = metrics_of(counters.exposition())
    assert found["entropi_sessions"] == 1
    assert found["entropi_sent_bytes_total"] == 10**15
    assert found["entropi_session_seconds_total"] == 1.5
    assert found['entropi_connections_total{ending="failed"}'] == 2
    assert found['entropi_connections_total{ending="finished"}'] == 0


def test_log_lines_for_programs():
    lines = []

    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(self.format(record))

    logger, handler = logging.Logger("test"), Kept()
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    SessionLog(logger, "ab12", "alice/00ff").info("a %s", "token\n", fields={"sent_bytes": 3})
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logger.exception("failed")
    first, second = map(json.loads, lines)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "message": "session ab12: a token\n",
        "session": "ab12",
        "client": "alice/00ff",
        "sent_bytes": 3,
    }
    assert "boom" in second["trace"]


HOSTILE = "\x1b]0;owned\x07\x9b2J\r\n2026-01-01 INFO stopped\u202e\x7f\ud800"


@pytest.mark.parametrize("formatter", [PlainLines, JsonLines])
def test_names_of_clients_cannot_write_on_the_screen_or_forge_a_line(formatter):
    written = io.StringIO()
    logger, handler = logging.Logger("test"), logging.StreamHandler(written)
    handler.setFormatter(formatter())
    logger.addHandler(handler)
    name = HOSTILE if formatter is PlainLines else HOSTILE[:-1]  # no UTF-8 has a lone surrogate
    SessionLog(logger, "ab12", name).info("opened by %s", name)
    line = written.getvalue()
    assert line.count("\n") == 1
    assert not {*HOSTILE[:1], "\x07", "\x9b", "\r", "\u202e", "\x7f", "\ud800"} & set(line)
    if formatter is JsonLines:
        assert json.loads(line)["client"] == name  # escaped, and complete
    else:
        assert "session ab12: opened by \ufffd]0;owned\ufffd" in line


def test_control_characters_of_answers_stay_off_the_terminal(monkeypatch, capfd):
    """Newline and tab are text; everything else is for programs that read --json."""
    answered = "def f():\n\treturn\x1b[2J\x9b\u2028\r1"
    record = records.PrivateRun(
        protocol="cheetah", trust="", server="x", prompt="p", prompt_tokens=[1], new_tokens=[2], new_text=answered,
        stages=[], setup_seconds=0.0, setup_bytes=0, reveal_bytes=0, seconds=1.0, ring_bits=64, fraction_bits=18,
        softmax="power-8",
    )  # fmt: skip

    def answer(server, prompt, new_tokens, watcher, **options):
        for piece in (answered[:5], answered[5:]):
            watcher.text(piece)
        watcher.status("busy\x1b[2J")
        return Answer(record, [])

    monkeypatch.setattr(client, "ask", answer)
    assert cli.main(["ask", "p", "--server", "127.0.0.1:1"]) == 0
    said = capfd.readouterr()
    assert said.out == "def f():\n\treturn\ufffd[2J\ufffd\ufffd\ufffd1\n"
    assert "busy\ufffd[2J" in said.err
    assert cli.main(["ask", "p", "--server", "127.0.0.1:1", "--json"]) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["new_text"] == answered
    assert not set("\x1b\x9b\u2028\r") & set(said.out)


@pytest.mark.parametrize("name", ["max_queue", "queue_seconds", "stall_seconds", "memory_gb", "client_tokens"])
def test_limits_that_let_nobody_in(name):
    with pytest.raises(UserError, match=name):
        Limits(**{name: -1})


def test_metrics_know_no_certificates_and_stay_at_home(tmp_path, capfd):
    status, line = run_cli(capfd, "serve", tmp_path, "--metrics", "0.0.0.0:9001", "--listen", "127.0.0.1:0")
    assert status == 2
    assert "loopback" in line


# --- A slow line ------------------------------------------------------------------------------------------------------


def test_the_slow_line_is_as_slow_as_it_says():
    payload = os.urandom(1 << 20)

    async def echo(reader, writer):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def measure(address, size):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"x")
        await reader.readexactly(1)
        started = time.perf_counter()
        writer.write(payload[:size])
        assert await reader.readexactly(size) == payload[:size]
        writer.close()
        return time.perf_counter() - started

    async def scenario():
        target = await asyncio.start_server(echo, "127.0.0.1", 0)
        line = network.SlowLine(f"127.0.0.1:{target.sockets[0].getsockname()[1]}", network.Line(40e6, 0.05))
        short, long = await measure(line.address, 1), await measure(line.address, len(payload))
        line.close()
        target.close()
        return short, long

    short, long = asyncio.run(scenario())
    assert 0.1 <= short < 0.4  # a round trip
    assert 0.1 + 8 * len(payload) / 40e6 <= long < 1.5  # both directions carry at the same time


def test_a_tunnel_drops_what_is_no_link(tmp_path):
    async def scenario():
        async def send(message):
            raise AssertionError

        async with Tunnel(SERVER, SESSION, send) as tunnel:
            folder = Path(tunnel.links[0].removeprefix("unix:")).parent
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            for message in (b"", b"\x02x", b"{}", b"\x00an answer to nothing"):
                with pytest.raises(Exception, match=r"no part of|has not spoken"):
                    await tunnel.receive(message)
        assert not folder.exists()

    asyncio.run(scenario())


# --- What a person sees -----------------------------------------------------------------------------------------------


def test_text_stands_above_the_bar_while_it_grows_and_leaves_with_it():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    with ProgressLine("private inference", 10, console=console) as line:
        line.update(3, "token 1, exp")
        line.show("[bold]import")
        line.expect(20)
        line.show("[bold]import os")
        seen = screen.getvalue()
    assert seen.index("[bold]import") < seen.rindex("private inference")  # no markup, and above
    assert "3/20" in seen
    assert "import os" in seen
    assert "import os" not in screen.getvalue()[len(seen) :]  # the caller prints it to where it belongs


# --- The pages --------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def test_commands_of_the_page_parse_and_what_it_links_exists():
    blocks = re.findall(r"```(?:sh|ini)\n(.*?)```", PAGE, flags=re.DOTALL)
    found = [
        match for block in blocks for match in re.findall(r"^(?:.*/bin/)?entropi (.*)$", block, flags=re.MULTILINE)
    ]
    assert {shlex.split(words)[0] for words in found} == {"certificates", "fold", "serve", "ask", "chat"}
    for words in found:
        cli.build_parser().parse_args(cli._with_underscores(shlex.split(words)))
    for page in ("deploy.md", "security.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(((?!http)[^)#]+)", text):
            assert (ROOT / "docs" / target).exists(), target


def test_servers_of_the_examples_have_quotas():
    """What bounds how much of a model its answers give away; a server without would be copied from the page."""
    texts = [(ROOT / "docs" / "deploy.md").read_text(), *(path.read_text() for path in (ROOT / "deploy").iterdir())]
    found = [line for text in texts for line in re.findall(r"^.*entropi serve .*0\.0\.0\.0.*$", text, re.MULTILINE)]
    (pods,) = re.findall(r"command: \[entropi, serve, .*?ports:", "\n".join(texts), re.DOTALL)
    assert len(found) == 2
    for words in (*found, pods):
        for option in ("--client-tokens", "--client-sessions"):
            assert re.search(rf"{option}[= ]\d", words)


def test_options_of_the_pages_exist():
    serving = cli.build_parser().parse_args(["serve", "m"]).serve.as_dict()
    asking = cli.build_parser().parse_args(["ask", "p"]).ask.as_dict()
    certifying = cli.build_parser().parse_args(["certificates", "f"]).certificates.as_dict()
    known = {*serving, *asking, *certifying, "no_deps", "require_hashes", "link"}
    text = PAGE + (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert {option.replace("-", "_") for option in re.findall(r"--([a-z][a-z0-9-]+)", text)} <= known


# --- Two parties over TLS ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secured(folded, scratch, authority):
    """A server with TLS and JSON lines in its log."""
    keys = ["--tls-cert", authority / "localhost.pem", "--tls-key", authority / "localhost-key.pem"]
    limits = ["--max-sessions", 2, "--memory-gb", 12, "--client-tokens", 200]
    options = [*keys, "--clients-ca", authority / "ca.pem", "--log", "json", *limits]
    started = Server(folded, scratch / "secured.log", *options)
    yield started
    started.process.terminate()
    assert started.process.wait(HANGING) == 0


def fetch(secured, path):
    """Status and text of a page of the server's metrics address."""
    address = next(json.loads(line)["message"] for line in secured.log.splitlines() if "metrics on" in line)
    url = address.removeprefix("metrics on ").replace("/metrics", path)

    async def get():
        async with aiohttp.ClientSession() as http, http.get(url) as response:
            return response.status, await response.text()

    return asyncio.run(get())


@two_party
def test_answers_are_the_models_and_sampling_is_the_clients(secured, authority, model, scratch, capsys):
    tls, logits = files(authority, "alice"), scratch / "sampled.npy"
    address = f"localhost:{secured.address().rpartition(':')[2]}"  # the certificate has both names
    words = ["ask", PROMPT, "--server", address, "--max-new-tokens", "3", "--temperature", "0.7", "--seed", "5"]
    words += ["--top-k", "20", "--logits", str(logits), "--json"]
    words += ["--tls-cert", str(tls.cert), "--tls-key", str(tls.key), "--server-ca", str(tls.ca)]
    assert cli.main(words) == 0
    record = json.loads(capsys.readouterr().out)
    random, ids = np.random.default_rng(5), list(record["prompt_tokens"])
    for row, token in zip(np.load(logits), record["new_tokens"], strict=True):
        assert np.abs(row - plain_logits(model[1], ids)).max() < TOLERANCE
        assert token == Sampling(0.7, 20).choose(row, random)
        ids.append(token)


@pytest.fixture(scope="module")
def reticent(folded, scratch):
    """Two servers that reveal less: the four likeliest tokens, with public embeddings, and the likeliest only."""
    options = {
        "top_k": ["--output", "top_k", "--choices", 4, "--embedding", "public"],
        "argmax": ["--output", "argmax"],
    }
    started = {name: Server(folded, scratch / f"{name}.log", *words) for name, words in options.items()}
    yield started
    for one in started.values():
        one.process.kill()
        one.process.wait()


@two_party
def test_a_server_may_reveal_the_likeliest_tokens_only(reticent, model, scratch):
    alike = connect(reticent["top_k"].address())
    assert "the 4 likeliest tokens and their logits" in alike.trust
    assert "embeddings are public" in alike.trust
    happened, stages = [], []
    watcher = Watcher(begin=stages.append, stage=lambda done, _: stages.append(done), status=happened.append)
    answer = alike.ask(PROMPT, 2, watcher=watcher, sampling=Sampling(1.0, seed=3))
    assert happened == ["fetching the public token embeddings"]
    assert stages == [len(stages) - 1, *range(1, len(stages))]  # as many operations as were announced
    ids, random = list(answer.record.prompt_tokens), np.random.default_rng(3)
    for revealed, token in zip(answer.logits, answer.record.new_tokens, strict=True):
        expected = plain_logits(model[1], ids)
        order = np.argsort(-expected)[:4]
        assert np.abs(revealed - expected[order]).max() < TOLERANCE
        choice = Sampling(1.0).choose(revealed, random)
        assert abs(expected[token] - expected[order[choice]]) < 2 * TOLERANCE  # the same one, but for near ties
        ids.append(token)
    assert {stage.bytes for stage in answer.record.stages if stage.name == "embedding"} == {0}
    assert list(scratch.glob("entropi-ask-*")) == []


@two_party
def test_a_server_may_reveal_the_likeliest_token_only(reticent, model, capfd, tmp_path):
    address = reticent["argmax"].address()
    answer = connect(address).ask(PROMPT, 1)
    assert answer.logits == []
    expected = plain_logits(model[1], answer.record.prompt_tokens)
    assert expected.max() - expected[answer.record.new_tokens[0]] < 2 * TOLERANCE
    status, line = run_cli(capfd, "ask", PROMPT, "--server", address, "--temperature", "1")
    assert status == 2
    assert line.endswith("reveals the likeliest token only: there is nothing to sample from")
    assert (
        "takes no drafts, as it reveals likeliest tokens only"
        in run_cli(capfd, "ask", PROMPT, "--server", address, "--draft", "ngram")[1]
    )


@two_party
def test_two_at_once_and_a_stream(secured, authority, model, scratch):
    answers = []

    def ask():
        answers.append(connect(secured.address(), files(authority, "bob")).ask(PROMPT, 1).record)

    other = threading.Thread(target=ask)
    other.start()
    alice = connect(secured.address(), files(authority, "alice"))
    assert alice.description.layers == 2
    assert "semi-honest" in alice.trust
    pieces = list(alice.stream(PROMPT, 1))
    other.join(HANGING)
    assert "".join(pieces) == answers[0].new_text
    stopped = alice.stream(PROMPT, 8)
    next(stopped)
    stopped.close()
    assert no_parties_left(scratch)


@pytest.mark.parametrize(
    ("own", "ca", "complaint"),
    [
        ("strangers/mallory", "ca.pem", "does not accept this client's certificate"),
        ("elsewhere.example", "ca.pem", "does not accept this client's certificate"),
        ("alice", "strangers/ca.pem", "is not who it should be: "),
        (None, None, "is not an entropi server, or it closed the connection; does it want TLS?"),
    ],
)
@two_party
def test_certificates_that_are_not_accepted(secured, authority, capfd, own, ca, complaint):
    words = []
    if own:
        words = ["--tls-cert", authority / f"{own}.pem", "--tls-key", authority / f"{own}-key.pem"]
        words += ["--server-ca", authority / ca]
    started = time.monotonic()
    status, line = run_cli(capfd, "ask", "hello", "--server", secured.address(), *words)
    assert status == 2
    assert complaint in line
    assert time.monotonic() - started < 10


@two_party
def test_a_server_under_another_name(authority, capfd):
    async def nothing(request):
        raise web.HTTPNotFound

    app = ThreadedApp(nothing, files(authority, "elsewhere.example").server_context())
    tls = files(authority, "alice")
    with pytest.raises(UserError, match="is not who it should be: IP address mismatch"):
        connect(app.address, tls)
    app.close()
    plain = ThreadedApp(nothing)
    with pytest.raises(UserError, match=r"does not speak TLS 1\.3"):
        connect(plain.address, tls)
    plain.close()


@two_party
def test_garbage_between_the_engines_costs_one_session(secured, authority, scratch):
    """A client with a good certificate that speaks the protocol, and then nonsense where its engine should."""

    def chunks(session):
        return [b"\x01" + frame for frame in two_chunks(1, session)]

    def wrong_rank(session):
        return [b"\x01" + push(0, 1, place(0, 1, 1, session), b"x")]

    async def attack(messages):
        tls = files(authority, "alice").client_context()
        url = f"https://{secured.address()}/v1/session"
        async with aiohttp.ClientSession() as http, http.ws_connect(url, ssl=tls, max_msg_size=1 << 25) as channel:
            await channel.send_str(hello())
            welcome = decode_from_server((await channel.receive(HANGING)).data)
            await channel.send_str(encode(Start(4, 2, welcome.digest())).decode())
            accepted = json.loads((await channel.receive(HANGING)).data)
            assert accepted["type"] == "Accepted"
            with contextlib.suppress(ConnectionError):  # as soon as it is cut off
                for message in messages(accepted["session"]) if callable(messages) else messages:
                    await channel.send_bytes(message)
            while (answer := await channel.receive(HANGING)).type == aiohttp.WSMsgType.BINARY:
                pass
            return json.loads(answer.data)["reason"] if answer.type == aiohttp.WSMsgType.TEXT else channel.close_code

    assert asyncio.run(attack([b"\x05?"])) == "that message is no part of the engines' link"
    assert asyncio.run(attack([b"\x00?"])) == "an answer to an engine that has not spoken"
    assert (
        asyncio.run(attack([b"\x01" + os.urandom(200_000)] * 3)) == "the engines' link carried bytes that are no frame"
    )
    refused = "the engines' link carried a push that is not a key and one whole value"
    assert asyncio.run(attack(chunks)) == refused
    wait_for(secured.sessions_closed)
    lines = [json.loads(line) for line in secured.log.splitlines()]
    # Twice: the session's line and, without a file of its own, the audit log's.
    assert {line["client"].partition("/")[0] for line in lines if line["message"].endswith(refused)} == {"alice"}
    rank = "the engines' link carried a request that is no push of this session's other engine"
    assert asyncio.run(attack(wrong_rank)) == rank
    cut_off = (aiohttp.WSCloseCode.MESSAGE_TOO_BIG, aiohttp.WSCloseCode.ABNORMAL_CLOSURE)
    assert asyncio.run(attack([b"\x01" + bytes(300_000)])) in cut_off
    assert no_parties_left(scratch)
    answer = connect(secured.address(), files(authority, "bob")).ask(PROMPT, 1)
    assert len(answer.record.new_tokens) == 1


@two_party
def test_a_flood_that_nobody_reads_ends_and_honest_clients_are_answered(folded, model, scratch):
    async def flood(address):
        async with aiohttp.ClientSession() as http, http.ws_connect(f"http://{address}/v1/session") as channel:
            await channel.send_str(hello())
            welcome = decode_from_server((await channel.receive(HANGING)).data)
            await channel.send_str(encode(Start(4, 2, welcome.digest())).decode())
            session = json.loads((await channel.receive(HANGING)).data)["session"]
            value, sent = bytes(250_000), 0
            with contextlib.suppress(ConnectionError):
                while sent < 3000:
                    sent += 1
                    await channel.send_bytes(b"\x01" + push(1, sent, place(1, sent, sent, session), value))
            while (await channel.receive(HANGING)).type == aiohttp.WSMsgType.BINARY:
                pass
            return sent * len(value)

    serving = Server(folded, scratch / "flood.log", "--memory-gb", 2.4)
    try:
        address = serving.address()
        assert "in force for a session's process: no core dumps" in serving.log
        sent = asyncio.run(flood(address))
        wait_for(serving.sessions_closed)
        assert "the engines' link carried more than 600000000 bytes that nobody has read" in serving.log
        assert sent > 600e6
        assert no_parties_left(scratch)
        assert honest_answer(address, model)
    finally:
        serving.process.kill()
        serving.process.wait()


def test_memory_is_limited_to_what_a_model_needs_with_room():
    small = Description(**FIELDS)
    large = Description(**{**FIELDS, "vocab_size": 16_000, "hidden_size": 256, "layers": 2})
    assert 3e9 < memory_for(small, 8, None) < memory_for(small, 500, None) < memory_for(large, 500, None) < 64e9
    assert memory_for(small, 8, 1.5) == 1_500_000_000
    assert memory_for(small, 8, 0) is None
    assert unread_for(memory_for(small, 8, 2.0)) == 500_000_000
    assert unread_for(None) == DEFAULT_UNREAD
    assert Limits(memory_gb=0).memory_gb == 0
    with pytest.raises(UserError, match="memory_gb is -1"):
        Limits(memory_gb=-1)


def test_the_prediction_of_memory_lies_above_what_was_measured(monkeypatch):
    """Of every shape in the table, for both parties, on as many cores as it was measured with."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    table = (ROOT / "benchmarks" / "results" / "party_memory.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    base = dict(layers=2, heads=4, hidden_size=128, vocab_size=2048, positions=512, temperature=True, centre=False)
    gelu = dict(norm="layer", final_norm="layer", activation="gelu", temperature=False)
    assert len(rows) == 11
    for name, tokens, predicted, *measured in rows[1:]:
        changes = {key: int(value) for key, value in re.findall(r"(\w+) (\d+)", name)}
        fields = {**FIELDS, **base, **(gelu if "GELU" in name else {}), **changes}
        needed = needed_memory(Description(**{**fields, "key_value_heads": fields["heads"]}), int(tokens)) / 1e9
        assert f"{needed:.2f}" == predicted
        assert needed > 1.1 * max(map(float, measured[:2]))


@two_party
def test_what_the_server_tells_of_itself(secured):
    wait_for(secured.sessions_closed)
    status, text = fetch(secured, "/health")
    assert (status, json.loads(text)) == (200, {"status": "ok", "sessions": 0, "waiting": 0})
    status, text = fetch(secured, "/metrics")
    found = metrics_of(text)
    lines = [json.loads(line) for line in secured.log.splitlines()]
    endings = [line["ending"] for line in lines if "ending" in line and "event" not in line]
    events = [line for line in lines if line.get("event", "").startswith("session")]  # of the audit
    assert sum(line.get("count", 1) for line in events) == len(endings)
    for ending in ("finished", "left", "refused", "failed"):
        assert found[f'entropi_connections_total{{ending="{ending}"}}'] == endings.count(ending)
    assert endings.count("finished") >= 3
    assert endings.count("failed") >= 2
    assert found["entropi_tokens_total"] == sum("a token" in line["message"] for line in lines)
    assert found["entropi_sent_bytes_total"] >= max(line.get("sent_bytes", 0) for line in lines) > 0
    strangers = {line["client"] for line in lines if line.get("event") == "handshake refused"}
    assert strangers <= {"127.0.0.1"}
    named = {line["client"].partition("/")[0] for line in lines if "client" in line}
    assert named - strangers == {"alice", "bob"}
    assert PROMPT not in secured.log
    assert fetch(secured, "/v1/session")[0] == 404


@two_party
def test_an_answer_is_continued_after_the_line_was_cut(secured, authority, model):
    """The second session's prompt is the first one's with the tokens that were received."""
    line = network.SlowLine(secured.address(), network.Line(1e9, 0.0))
    pieces, happened, cut = [], [], []

    def stage(done, communication):
        if communication.token == 1 and not cut:
            cut.append(line.cut())

    watcher = Watcher(stage=stage, text=pieces.append, status=happened.append)
    answer = connect(line.address, files(authority, "alice")).ask(PROMPT, 3, retries=1, watcher=watcher)
    line.close()
    ids = list(answer.record.prompt_tokens)
    for row, token in zip(answer.logits, answer.record.new_tokens, strict=True):
        assert np.abs(row - plain_logits(model[1], ids)).max() < TOLERANCE
        ids.append(token)
    assert len(answer.record.new_tokens) == 3
    assert len(happened) == 1
    assert "retry 1 of 1" in happened[0]
    assert "".join(pieces) == answer.record.new_text
    assert sorted({stage.token for stage in answer.record.stages}) == [0, 1, 2]


@two_party
def test_a_line_that_goes_silent_is_noticed_by_both(secured, authority, capfd, monkeypatch, scratch):
    line = network.SlowLine(secured.address(), network.Line(1e9, 0.0))
    tls = files(authority, "alice")
    frozen = []

    def stage(done, communication):
        if done == 2:
            frozen.append(time.monotonic())
            line.freeze()

    with pytest.raises(UserError, match=r"went away in the middle|closed the connection") as caught:
        connect(line.address, tls).ask(PROMPT, 2, watcher=Watcher(stage=stage))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - frozen[0] < 2.5 * channel.HEARTBEAT_SECONDS
    assert no_parties_left(scratch)
    line.close()


@two_party
def test_a_description_that_is_not_the_servers(secured, authority, capfd):
    """Somebody who could change what the client reads cannot make the two compute different things."""

    async def relay(request):
        near = web.WebSocketResponse()
        await near.prepare(request)
        tls = files(authority, "alice").client_context()
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"https://{secured.address()}/v1/session", ssl=tls, max_msg_size=1 << 25) as far,
        ):
            await far.send_str((await near.receive()).data)
            said = json.loads((await far.receive()).data)
            said["description"]["positions"] += 1
            await near.send_str(json.dumps(said))
            await far.send_str((await near.receive()).data)
            await near.send_str((await far.receive()).data)
            await near.receive()
        return near

    app = ThreadedApp(relay)
    status, line = run_cli(capfd, "ask", "hello", "--server", app.address)
    app.close()
    assert status == 2
    assert line.endswith("refused: the description of the model that reached the client is not the server's")


@two_party
def test_a_session_that_needs_too_much_memory_fails_alone(folded, scratch):
    async def start():
        description, _ = load_folded(folded)
        async with Tunnel(CLIENT, SESSION, None) as tunnel:
            job = Job(CLIENT, "0" * 32, tunnel.links, description, Settings(), 1, 1, [1])
            party = await Party.start(job, memory_bytes=10_000_000)
            event = await asyncio.wait_for(party.event(), HANGING)
            await party.stop()
        return event

    failed = asyncio.run(start())
    assert isinstance(failed, Failed)
    assert "memory limit of 0.01 GB may be too small" in failed.reason
    needed = needed_memory(load_folded(folded)[0], 2) / 1e9
    assert f"about {needed:.1f} GB are predicted for this model and length (--memory-gb)" in failed.reason
    assert no_parties_left(scratch)


# --- Two machines, as far as one has them -----------------------------------------------------------------------------


def namespaces_work():
    try:
        made = subprocess.run(["ip", "netns", "add", "entropi-probe"], capture_output=True)
        subprocess.run(["ip", "netns", "del", "entropi-probe"], capture_output=True)
    except OSError:
        return False
    return made.returncode == 0


@pytest.fixture
def two_hosts():
    """Two network namespaces with one cable between them, 200 Mbit/s: a prefix to run a command in each."""
    if not namespaces_work():
        pytest.skip("`ip netns` is not there, or not allowed to this user")
    mark, made = f"entropi{os.getpid()}", []
    names = [f"{mark}a", f"{mark}b"]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb", "netns", names[1])
        for name, device, address in ((names[0], "va", "10.77.0.1/24"), (names[1], "vb", "10.77.0.2/24")):
            ip("-n", name, "addr", "add", address, "dev", device)
            ip("-n", name, "link", "set", device, "up")
            shape = ["tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf"]
            subprocess.run([*shape, "rate", "200mbit", "burst", "64kb", "latency", "50ms"], capture_output=True)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@two_party
def test_a_client_on_another_host_that_nobody_can_reach(two_hosts, folded, scratch, tmp_path, model):
    """The client's host has no open port and not even a loopback: everything goes over its own connection."""
    near, far = two_hosts
    issue(tmp_path, ["10.77.0.1"], ["client"], days=1)
    keys = ["--tls-cert", tmp_path / "10.77.0.1.pem", "--tls-key", tmp_path / "10.77.0.1-key.pem"]
    options = ["--listen", "10.77.0.1:9000", *keys, "--clients-ca", tmp_path / "ca.pem"]
    subprocess.run([*near, "ip", "link", "set", "lo", "up"], check=True)  # for the metrics
    serving = Server(folded, scratch / "host.log", *options, prefix=near)
    try:
        words = ["ask", PROMPT, "--server", serving.address(), "--max-new-tokens", "1", "--json"]
        words += ["--tls-cert", tmp_path / "client.pem", "--tls-key", tmp_path / "client-key.pem"]
        words += ["--server-ca", tmp_path / "ca.pem"]
        asked = subprocess.run(
            [*far, sys.executable, "-m", "entropi", *map(str, words)], capture_output=True, timeout=2 * HANGING
        )
        assert asked.returncode == 0, asked.stderr
        record = json.loads(asked.stdout)
        assert record["server"] == "10.77.0.1:9000"
        assert record["new_tokens"] == [int(plain_logits(model[1], record["prompt_tokens"]).argmax())]
    finally:
        serving.process.terminate()
        serving.process.wait(HANGING)
    assert parties(scratch) == []
