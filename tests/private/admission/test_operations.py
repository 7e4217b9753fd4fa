"""What runs for long: quotas that outlive a server, certificates that change, several servers behind one address."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

pytest.importorskip("spu")
pytest.importorskip("cryptography")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from safetensors.numpy import load_file, save_file

from entropi import cli
from entropi.commands import fold
from entropi.errors import UserError
from entropi.private import connect
from entropi.private.admission import quota_stores, quotas
from entropi.private.admission.limits import Limits
from entropi.private.compute.folded import load_folded
from entropi.private.compute.settings import Settings
from entropi.private.sessions import client, client_session, findings, readiness, server
from entropi.private.sessions.generation import Watcher
from entropi.private.wire import channel
from entropi.private.wire.authority import issue, revoke
from entropi.private.wire.certificates import Peer, Tls
from entropi.private.wire.messages import Refused, encode
from entropi.private.wire.revocation import Revoked, Watched
from entropi.private.wire.server_channel import Refusal, SessionError
from serving import (
    HANGING,
    PROMPT,
    TOLERANCE,
    Server,
    ThreadedApp,
    free_port,
    no_parties_left,
    parties,
    plain_logits,
    run_cli,
    wait_for,
)

pytest_plugins = ["serving"]  # its fixtures
two_party = pytest.mark.two_party
ROOT = Path(__file__).parents[3]


# --- Quotas -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    """URL of a Redis server of our own."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    pytest.importorskip("redis")
    port, folder = free_port(), tmp_path_factory.mktemp("redis")
    words = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=subprocess.STDOUT)
    wait_for(lambda: b"Ready to accept" in (folder / "log").read_bytes() or process.poll() is not None)
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait(HANGING)


def flush(url):
    import redis

    redis.Redis.from_url(url).flushall()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(quotas, "ENDING_SECONDS", 0.1)


@pytest.fixture(params=["sqlite", "redis"])
def where(request, tmp_path):
    """A place to keep quotas."""
    if request.param == "sqlite":
        return str(tmp_path / "state" / "quotas.sqlite")
    url = request.getfixturevalue("redis_server")
    flush(url)
    return url


@contextlib.asynccontextmanager
async def opened(where, **limits):
    quota = quotas.Quota(Limits(**limits), quota_stores.open_store(where, Limits(**limits)))
    await quota.check()
    try:
        yield quota
    finally:
        await quota.close()


async def spend(quota, client, promised, generated):
    async with quota.session(client, promised) as usage:
        for _ in range(generated):
            await usage.count_token()


async def refused(quota, client, promised):
    """Why the client may not have a session, or None."""
    try:
        async with quota.session(client, promised):
            return None
    except Refusal as error:
        return str(error)


def test_quota_of_a_client(where):
    async def scenario():
        async with opened(where, client_sessions=2, client_tokens=10) as quota:
            async with quota.session("alice", 4) as first, quota.session("alice", 4):
                assert "2 sessions already" in await refused(quota, "alice", 1)
                assert await refused(quota, "bob", 10) is None
                async with quota.session("", 1000), quota.session("", 1000), quota.session("", 1000):
                    pass
                for _ in range(3):
                    await first.count_token()
            assert "7 more tokens" in await refused(quota, "alice", 8)
            assert await refused(quota, "alice", 7) is None

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_restart_forgets_no_token_and_no_session_for_ever(where, monkeypatch):
    async def scenario():
        async with opened(where, client_sessions=1, client_tokens=10) as quota:
            await spend(quota, "alice", 5, 4)
            killed = quota_stores.open_store(where, Limits(client_tokens=10))
            assert await killed.begin("alice", "a" * 32, 6, Limits(client_tokens=10)) is None
            await killed.close()
        async with opened(where, client_sessions=1, client_tokens=10) as quota:
            assert "1 sessions already" in await refused(quota, "alice", 1)
        async with opened(where, client_tokens=10) as quota:
            assert "0 more tokens" in await refused(quota, "alice", 1)

    monkeypatch.setattr(quota_stores, "LEASE_SECONDS", 2.0)
    asyncio.run(scenario())
    time.sleep(3.1)  # Redis counts whole seconds

    async def later():
        async with opened(where, client_sessions=1, client_tokens=10) as quota:
            assert "6 more tokens" in await refused(quota, "alice", 7)
            assert await refused(quota, "alice", 6) is None

    asyncio.run(later())


@pytest.mark.slow
def test_a_long_session_keeps_its_place(where, monkeypatch):
    monkeypatch.setattr(quota_stores, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(quotas, "RENEW_SECONDS", 0.2)

    async def scenario():
        async with opened(where, client_sessions=1) as quota, quota.session("alice", 4):
            await asyncio.sleep(3.2)
            assert "1 sessions already" in await refused(quota, "alice", 1)

    asyncio.run(scenario())


def test_many_at_once_get_no_more_than_there_is(where):
    """Two servers' worth of requests for the same client: what is promised is never more than the limit."""

    async def scenario():
        async with opened(where, client_tokens=10) as one, opened(where, client_tokens=10) as other:
            inside, most = [0], [0]

            async def ask(quota):
                with contextlib.suppress(Refusal):
                    async with quota.session("alice", 3):
                        inside[0] += 3
                        most[0] = max(most[0], inside[0])
                        await asyncio.sleep(0.2)
                        inside[0] -= 3

            await asyncio.gather(*(ask(quota) for quota in (one, other) for _ in range(10)))
            assert most[0] == 9

    asyncio.run(scenario())


def test_a_session_that_is_just_ending_keeps_nobody_out(where, monkeypatch):
    async def scenario():
        async with opened(where, client_sessions=1) as quota:
            async with quota.session("alice", 1):
                following = asyncio.create_task(refused(quota, "alice", 1))
                await asyncio.sleep(0.1)
                assert not following.done()
            assert await following is None

    monkeypatch.setattr(quotas, "ENDING_SECONDS", 2.0)
    asyncio.run(scenario())


def test_tokens_are_forgotten_after_a_day(tmp_path, monkeypatch):
    where = str(tmp_path / "quotas.sqlite")

    async def at(hours, expected):
        now = time.time()
        with monkeypatch.context() as patch:
            patch.setattr(quotas.time, "time", lambda: now + 3600 * hours)
            async with opened(where, client_tokens=1) as quota:
                assert (await refused(quota, "alice", 1) is None) == expected

    async def scenario():
        async with opened(where, client_tokens=1) as quota:
            await spend(quota, "alice", 1, 1)
        for hours, expected in ((0, False), (23.9, False), (24.1, True)):
            await at(hours, expected)

    asyncio.run(scenario())
    (kept,) = sqlite3.connect(where).execute("SELECT COUNT(*) FROM tokens").fetchone()
    assert kept == 0
    assert os.stat(where).st_mode & 0o777 == 0o600


def test_redis_forgets_by_the_minute(redis_server):
    import redis

    flush(redis_server)
    direct = redis.Redis.from_url(redis_server)
    minute = int(time.time()) // 60
    direct.hset("entropi:{alice}:tokens", mapping={minute - 24 * 60 - 1: 5, minute - 24 * 60 + 1: 3})

    async def scenario():
        async with opened(redis_server, client_tokens=10) as quota:
            assert "7 more tokens" in await refused(quota, "alice", 8)
            await spend(quota, "alice", 2, 2)

    asyncio.run(scenario())
    assert sum(map(int, direct.hvals("entropi:{alice}:tokens"))) == 5
    assert 0 < direct.ttl("entropi:{alice}:tokens") <= 90_000


def test_a_store_that_is_gone_lets_nobody_take_more(tmp_path, capfd):
    pytest.importorskip("redis")
    url = f"redis://:secret@127.0.0.1:{free_port()}/0"

    async def scenario():
        quota = quotas.Quota(Limits(client_tokens=1), quota_stores.open_store(url, Limits(client_tokens=1)))
        with pytest.raises(UserError, match="does not answer") as caught:
            await quota.check()
        assert "secret" not in str(caught.value)
        with pytest.raises(Refusal, match="cannot tell"):
            async with quota.session("alice", 1):
                pass
        with pytest.raises(SessionError, match="cannot note"):
            await quotas.Usage(quota._store, "alice", "s").count_token()
        async with quota.session("", 1):
            pass
        await quota.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("redes://:secret@here", "begins with 'redes'"),
        ("sqlite:///quotas", "begins with 'sqlite'"),
        ("redis:/secret", "not followed by //"),
        ("redis://", "no host"),
        ("redis:///0", "no host"),
        ("redis://:secret@here:x/0", "host or port"),
        ("redis://:secret@here:99999/0", "host or port"),
        ("redis://here/secret", "number of a database"),
        ("unix://", "path of a socket"),
        ("unix://here/socket", "path of a socket"),
        ("", "no name"),
    ],
)
@pytest.mark.parametrize("limits", [Limits(), Limits(client_tokens=1)], ids=["free", "limited"])
def test_addresses_of_quota_stores_that_are_none(where, complaint, limits, monkeypatch, tmp_path):
    """Said at once, whether anybody is limited or not, and nothing is made by that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint) as caught:
        quota_stores.open_store(where, limits)
    assert "redis://HOST:PORT/NUMBER" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "where", ["redis://here", "rediss://:secret@here:1/2", "unix:///socket?db=2", "redis://[::1]:1/0"]
)
def test_addresses_of_redis(where):
    pytest.importorskip("redis")
    assert isinstance(quota_stores.open_store(where, Limits(client_tokens=1)), quota_stores.Redis)
    with pytest.raises(UserError, match="unexpected keyword argument 'nothing'"):
        quota_stores.open_store(f"{where.partition('?')[0]}?nothing=1", Limits(client_tokens=1))


def test_files_may_have_a_colon_in_their_name(tmp_path):
    assert not quota_stores.is_url(str(tmp_path / "a:b"))
    assert not quota_stores.is_url("./redis:quotas")


def test_a_password_that_is_on_no_command_line(redis_server, monkeypatch):
    import redis

    flush(redis_server)
    direct = redis.Redis.from_url(redis_server)
    direct.config_set("requirepass", "open sesame")
    try:

        async def scenario():
            async with opened(redis_server, client_tokens=1) as quota:
                assert await refused(quota, "alice", 1) is None

        monkeypatch.setenv("ENTROPI_REDIS_PASSWORD", "open wheat")
        with pytest.raises(UserError, match="does not answer"):
            asyncio.run(scenario())
        monkeypatch.setenv("ENTROPI_REDIS_PASSWORD", "open sesame")
        asyncio.run(scenario())
    finally:
        redis.Redis.from_url(redis_server, password="open sesame").config_set("requirepass", "")


def test_where_quotas_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert quota_stores.default_file() == tmp_path / "entropi" / "quotas.sqlite"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/entropi:/var/lib/other")
    assert quota_stores.default_file() == Path("/var/lib/entropi/quotas.sqlite")
    assert quota_stores.open_store("/nowhere/at/all", Limits()) is None  # nothing is limited
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep quotas"):
        quota_stores.open_store(str(tmp_path / "file" / "quotas.sqlite"), Limits(client_tokens=1))
    (tmp_path / "garbage").write_bytes(b"\xff" * 5000)
    with pytest.raises(UserError, match="cannot keep quotas"):
        quota_stores.open_store(str(tmp_path / "garbage"), Limits(client_tokens=1))


# --- A client that tries again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "retries", "complaint"),
    [
        (["lost", "refused", "lost", "refused"], 3, "refused: later"),
        (["lost", "lost"], 1, "closed the connection"),
        (["refused"], 5, "refused: later"),  # the first refusal is meant
    ],
)
def test_what_is_tried_again(monkeypatch, answers, retries, complaint):
    """A refusal ends a question, but not one that was going on elsewhere: its session may still be counted there."""
    monkeypatch.setattr(client_session, "RETRY_SECONDS", 0.01)
    met = []

    async def handler(request):
        channel = web.WebSocketResponse()
        await channel.prepare(request)
        await channel.receive()
        met.append(answers[len(met)])
        if met[-1] == "refused":
            await channel.send_str(encode(Refused("later")).decode())
        await channel.close()
        return channel

    app = ThreadedApp(handler)
    try:
        with pytest.raises(UserError, match=complaint):
            client.ask(app.address, PROMPT, 1, retries=retries)
    finally:
        app.close()
    assert met == answers


def test_a_server_that_is_too_slow_may_be_tried_again(monkeypatch):
    """A machine that has too much to do cannot be told from another program that says nothing."""
    monkeypatch.setattr(channel, "CONNECT_SECONDS", 0.2)

    async def connect(port):
        async with channel.open_channel(channel.ServerAddress.at(f"127.0.0.1:{port}", None)):
            pass

    class Silent:
        async def receive(self):
            await asyncio.sleep(HANGING)

    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(channel.LostServer):
        asyncio.run(connect(silent.getsockname()[1]))
    with pytest.raises(channel.LostServer):
        asyncio.run(channel.receive(Silent(), "there:1", Refused, 0.01))


# --- Revocation -------------------------------------------------------------------------------------------------------


def files(folder, name):
    return Tls(folder / f"{name}.pem", folder / f"{name}-key.pem", folder / "ca.pem")


def peer(folder, name):
    return Peer.in_certificate(x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes()))


def test_an_authority_revokes(tmp_path, capsys):
    folder = tmp_path / "authority"
    issue(folder, ["127.0.0.1"], ["alice", "bob", "carol"], days=2)
    assert cli.main(["certificates", str(folder), "--revoke", "alice"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "revoked.pem")
    assert cli.main(["certificates", str(folder), "--revoke", "bob", "bob"]) == 0
    listed = Revoked.read(folder / "revoked.pem", folder / "ca.pem")
    assert len(listed) == 2
    assert [peer(folder, name) in listed for name in ("alice", "bob", "carol", "127.0.0.1")] == [
        True,
        True,
        False,
        False,
    ]
    found = x509.load_pem_x509_crl((folder / "revoked.pem").read_bytes())
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    assert found.is_signature_valid(authority.public_key())
    before = (folder / "revoked.pem").read_bytes()
    with pytest.raises(UserError, match=r"cannot read .*dave\.pem"):
        revoke(folder, ["dave"])
    assert (folder / "revoked.pem").read_bytes() == before
    with pytest.raises(UserError, match="'revoked' cannot name"):
        issue(folder, [], ["revoked"], days=1)


def test_lists_of_fingerprints(tmp_path):
    issue(tmp_path, ["127.0.0.1"], ["alice", "bob", "carol"], days=2)
    full, short = peer(tmp_path, "alice").fingerprint, str(peer(tmp_path, "bob")).partition("/")[2]
    colons = ":".join(re.findall("..", full)).upper()
    path = tmp_path / "list.txt"
    path.write_text(f"# left the company\n{colons}  # alice\n\n{short}\n")
    listed = Revoked.read(path, tmp_path / "ca.pem")
    assert [peer(tmp_path, name) in listed for name in ("alice", "bob", "carol")] == [True, True, False]
    revoke(tmp_path, ["carol"])
    path.write_text((tmp_path / "revoked.pem").read_text() + full + "\n")
    listed = Revoked.read(path, tmp_path / "ca.pem")
    assert [peer(tmp_path, name) in listed for name in ("alice", "bob", "carol")] == [True, False, True]


@pytest.mark.parametrize("damage", ["forged", "cut", "name", "binary", "missing"])
def test_lists_that_are_none(tmp_path, damage):
    issue(tmp_path, ["127.0.0.1"], ["alice"], days=2)
    issue(tmp_path / "others", [], ["alice"], days=2)
    path = revoke(tmp_path / "others", ["alice"])
    complaint = "no authority in"
    if damage == "cut":
        path.write_text("".join(path.read_text().splitlines(keepends=True)[i] for i in (0, 1, -1)))
        complaint = "damaged"
    elif damage == "name":
        path.write_text("# who left\nalice\n")
        complaint = "line 2 of"
    elif damage == "binary":
        path.write_bytes(b"\xff\xfe")
        complaint = "no list"
    elif damage == "missing":
        path.unlink()
        complaint = "cannot read"
    with pytest.raises(UserError, match=complaint):
        Revoked.read(path, tmp_path / "ca.pem")


def test_a_list_forged_in_the_authoritys_name(tmp_path):
    """The same issuer, another key: signatures are looked at, not names."""
    issue(tmp_path, [], ["alice"], days=2)
    issue(tmp_path / "others", [], ["alice"], days=2)
    key = serialization.load_pem_private_key((tmp_path / "others" / "ca-key.pem").read_bytes(), None)
    real = x509.load_pem_x509_crl(revoke(tmp_path, ["alice"]).read_bytes())
    forged = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(real.issuer)
        .last_update(real.last_update_utc)
        .next_update(real.next_update_utc)
        .add_revoked_certificate(next(iter(real)))
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "forged.pem"
    path.write_bytes(forged.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(UserError, match="no authority in"):
        Revoked.read(path, tmp_path / "ca.pem")


def test_files_that_change(tmp_path):
    issue(tmp_path, ["127.0.0.1"], ["alice"], days=2)
    listed = tmp_path / "list.txt"
    listed.write_text("")
    watched = Watched(files(tmp_path, "127.0.0.1"), listed)
    first = watched.context
    assert not watched.has_changed()
    listed.write_text(peer(tmp_path, "alice").fingerprint)
    assert watched.has_changed()
    watched.reload()
    assert not watched.has_changed()
    assert peer(tmp_path, "alice") in watched.revoked
    assert watched.context is not first
    (tmp_path / "127.0.0.1-key.pem").write_text("half of a key")
    assert watched.has_changed()
    kept = watched.context
    with pytest.raises(UserError, match="not a certificate and its private key"):
        watched.reload()
    assert watched.context is kept
    assert peer(tmp_path, "alice") in watched.revoked
    assert not watched.has_changed()  # it is not complained about again


# What is wrong, and what is said; the words are made from a folder and from the address of a port in use.
BEFORE_ANYTHING_ELSE = {
    "port": (lambda folder, used: ["--listen", used], "cannot listen on 127.0.0.1:"),
    "metrics": (lambda folder, used: ["--metrics", used], "cannot listen on 127.0.0.1:"),
    "redis": (
        lambda folder, used: ["--client-tokens", 9, "--quota-store", f"redis://127.0.0.1:{free_port()}/0"],
        "the quota store does not answer",
    ),
    "sqlite": (
        lambda folder, used: ["--client-tokens", 9, "--quota-store", written(folder / "quotas", b"\xff" * 5000)],
        "cannot keep quotas in",
    ),
    "address": (lambda folder, used: ["--quota-store", "foo://x"], "begins with 'foo'"),
    "audit log": (lambda folder, used: ["--audit-log", folder], "cannot write"),
    "certificate": (lambda folder, used: keys_of(folder / "nowhere"), "cannot read"),
    "revoked": (lambda folder, used: keys_of(issued(folder), "--revoked", folder / "nothing"), "cannot read"),
    "list": (
        lambda folder, used: keys_of(issued(folder), "--revoked", written(folder / "list", b"hello")),
        "line 1 of",
    ),
}
OF_THE_MODEL = {
    "canary": (["--canary", "x" * 301], "at most 300 are possible"),
    "empty canary": (["--canary", ""], "the canary is empty"),
}


def written(path, content):
    path.write_bytes(content)
    return path


def issued(folder):
    issue(folder, ["127.0.0.1"], [], days=2)
    return folder


def forbidden(*_, **__):
    raise AssertionError("work that takes minutes for a large model had begun")


@pytest.mark.parametrize("mistake", BEFORE_ANYTHING_ELSE)
@pytest.mark.parametrize("kind", ["folded", "model"])
def test_mistakes_around_the_model_are_told_before_it_is_looked_at(
    folded, model, tmp_path, capfd, monkeypatch, mistake, kind
):
    monkeypatch.setattr(readiness, "sweep_vocabulary", forbidden)
    monkeypatch.setattr(fold, "run", forbidden)
    words, complaint = BEFORE_ANYTHING_ELSE[mistake]
    folder = {"folded": folded, "model": model[0]}[kind]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        used = f"127.0.0.1:{listening.getsockname()[1]}"
        given = words(tmp_path, used)
        listen = [] if "--listen" in given else ["--listen", "127.0.0.1:0"]
        status, line = run_cli(capfd, "serve", folder, *listen, *given)
    assert status == 2
    assert complaint in line


@pytest.mark.parametrize("mistake", OF_THE_MODEL)
def test_canaries_that_are_none_are_told_before_the_model_is_looked_at(folded, capfd, monkeypatch, mistake):
    monkeypatch.setattr(readiness, "sweep_vocabulary", forbidden)
    words, complaint = OF_THE_MODEL[mistake]
    status, line = run_cli(capfd, "serve", folded, "--listen", "127.0.0.1:0", *words)
    assert status == 2
    assert complaint in line


def test_revocation_needs_certificates(folded, tmp_path, capfd):
    (tmp_path / "list").write_text("")
    status, line = run_cli(capfd, "serve", folded, "--listen", "127.0.0.1:0", "--revoked", tmp_path / "list")
    assert status == 2
    assert "only be revoked where there are any" in line


# --- What an earlier start has found ----------------------------------------------------------------------------------


SETTINGS = Settings()


@pytest.fixture(scope="module")
def swept(folded):
    return readiness.sweep_vocabulary(*load_folded(folded), SETTINGS)


@pytest.fixture
def starts(folded, swept, tmp_path, monkeypatch):
    """Starts a server that does not listen; what it has done: "sweep", and protocol and tokens of every self-test."""
    done = []

    def sweep(*_):
        done.append("sweep")
        return swept

    def settle(model, weights, settings, sequences, *, choose, sweep):
        assert sweep == swept  # whether it was found now or read
        return settings, []

    def test(folder, settings, protocol, tokens, prefix):
        done.append((protocol, len(tokens)))
        return "passed"

    async def serve(*_):
        pass

    monkeypatch.setenv("ENTROPI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(readiness, "sweep_vocabulary", sweep)
    monkeypatch.setattr(readiness, "select_fraction_bits", settle)
    monkeypatch.setattr(readiness, "self_test", test)
    monkeypatch.setattr(server, "_serve", serve)

    def start(folder=folded, settings=SETTINGS, tests=("ref2k",), **options):
        done.clear()
        tokenizer = (folder / "tokenizer.json").read_text()
        server.serve(folder, tokenizer, "127.0.0.1:0", settings, Limits(), self_tests=tests, **options)
        return list(done)

    return start


def test_a_start_does_not_repeat_what_an_earlier_one_has_found(starts, tmp_path):
    whole = [("ref2k", 32)]  # as many tokens as the model has positions
    assert starts() == ["sweep", *whole]
    (entry,) = (tmp_path / "cache").rglob("*.json")
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert starts() == [("ref2k", readiness.SHORT_TEST_TOKENS)]
    assert starts(tests=()) == []
    assert starts(tests=("ref2k", "cheetah")) == [("ref2k", readiness.SHORT_TEST_TOKENS), ("cheetah", 32)]
    assert starts(tests=("ref2k", "cheetah")) == [("ref2k", readiness.SHORT_TEST_TOKENS)]
    assert starts(recheck=True) == ["sweep", *whole]
    assert starts() == [("ref2k", readiness.SHORT_TEST_TOKENS)]


def test_a_failed_self_test_is_not_kept(starts, monkeypatch):
    def failing(*_):
        raise UserError("wrong")

    with monkeypatch.context() as patch:
        patch.setattr(readiness, "self_test", failing)
        with pytest.raises(UserError, match="wrong"):
            starts()
    assert starts() == ["sweep", ("ref2k", 32)]


def test_what_was_found_of_another_model_is_not_used(starts, folded, tmp_path, monkeypatch):
    assert starts()[0] == "sweep"
    assert starts(settings=Settings(output="argmax"))[0] == "sweep"
    assert starts(choose_fraction_bits=True)[0] == "sweep"  # which may settle on other fraction bits
    assert starts(calibration="def f():\n    return 1\n")[0] == "sweep"
    changed = tmp_path / "changed"
    shutil.copytree(folded, changed)
    weights = load_file(changed / "folded.safetensors")
    weights["0.qkv"][0, 0] = np.nextafter(weights["0.qkv"][0, 0], np.float32(1))
    save_file(weights, changed / "folded.safetensors")
    assert starts(changed)[0] == "sweep"
    assert starts()[0] != "sweep"
    version = findings.metadata.version
    monkeypatch.setattr(findings.metadata, "version", lambda name: f"{version(name)}.1")
    assert starts()[0] == "sweep"


@pytest.mark.parametrize(
    "damage",
    [
        "one bit",
        "mode",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("cut", "link", "other key", "garbage", "folder")),
    ],
)
def test_entries_that_cannot_be_trusted_are_ignored(starts, tmp_path, damage):
    starts()
    (entry,) = (tmp_path / "cache").rglob("*.json")
    content = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(content[:-10])
    elif damage == "one bit":
        entry.write_bytes(content.replace(b'"tokens":300', b'"tokens":301'))
        assert entry.read_bytes() != content
    elif damage == "mode":
        entry.chmod(0o620)
    elif damage == "garbage":
        entry.write_bytes(b"\xff\n")
    elif damage == "link":
        entry.rename(tmp_path / "elsewhere")
        entry.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        starts(settings=Settings(output="argmax"))
        (other,) = set((tmp_path / "cache").rglob("*.json")) - {entry}
        os.replace(other, entry)
    assert starts()[0] == "sweep"
    assert starts()[0] == ("sweep" if damage == "folder" else ("ref2k", readiness.SHORT_TEST_TOKENS))


def test_a_cache_that_cannot_be_written_is_no_obstacle(starts, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENTROPI_CACHE", str(tmp_path / "file"))
    assert starts()[0] == "sweep"
    assert "is not kept for the next start" in caplog.text
    assert starts()[0] == "sweep"


# --- A server whose certificates change -------------------------------------------------------------------------------


def keys_of(folder, *more):
    words = ["--tls-cert", folder / "127.0.0.1.pem", "--tls-key", folder / "127.0.0.1-key.pem"]
    return [*words, "--clients-ca", folder / "ca.pem", *more]


def honest(address, model, tls, tokens=1, **options):
    """An answer that is the model's."""
    answer = connect(address, tls).ask(PROMPT, tokens, **options)
    ids = list(answer.record.prompt_tokens)
    for row, token in zip(answer.logits, answer.record.new_tokens, strict=True):
        assert np.abs(row - plain_logits(model[1], ids)).max() < TOLERANCE
        ids.append(token)
    assert len(answer.record.new_tokens) == tokens
    return answer


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@two_party
def test_who_is_revoked_is_out_at_once_and_a_new_certificate_comes_without_a_restart(folded, scratch, model, tmp_path):
    folder, audit = tmp_path / "authority", scratch / "audit-operations.jsonl"
    issue(folder, ["127.0.0.1"], ["alice", "bob"], days=2)
    revoked = tmp_path / "revoked"
    revoked.write_text("")
    options = keys_of(folder, "--revoked", revoked, "--audit-log", audit, "--client-tokens", 20, "--max-sessions", 2)
    serving = Server(folded, scratch / "operations.log", *options)
    try:
        address = serving.address()
        alice, bob = files(folder, "alice"), files(folder, "bob")
        ended = []

        def stage(done, communication):
            if done == 3:
                revoked.write_text(revoke(folder, ["alice"]).read_text())
                serving.process.send_signal(signal.SIGHUP)

        with pytest.raises(UserError, match="certificate was revoked") as caught:
            connect(address, alice).ask(PROMPT, 8, watcher=Watcher(stage=stage))
        ended.append(str(caught.value))
        with pytest.raises(UserError, match="refused: this client's certificate was revoked"):
            connect(address, alice)
        honest(address, model, bob)
        # A new certificate, found without a signal.
        before = audit.read_text().count("certificates reloaded")
        (folder / "127.0.0.1.pem").unlink()
        (folder / "127.0.0.1-key.pem").unlink()
        issue(folder, ["127.0.0.1"], [], days=3)
        wait_for(lambda: audit.read_text().count("certificates reloaded") > before)
        wait_for(lambda: served_certificate(address, bob) == (folder / "127.0.0.1.pem").read_bytes())
        # Files that cannot be used change nothing.
        revoked.write_bytes(b"\xff\0")
        wait_for(lambda: "what was read before stays in use" in serving.log)
        honest(address, model, bob)
        with pytest.raises(UserError, match="revoked"):
            connect(address, alice)
    finally:
        serving.process.terminate()
        assert serving.process.wait(HANGING) == 0
    found = [line for line in lines_of(audit) if line.get("ending") == "refused"]
    assert {line["client"] for line in found} == {str(peer(folder, "alice"))}
    assert {line["reason"] for line in found} == {"this client's certificate was revoked"}
    over = [line for line in lines_of(audit) if line.get("ending") == "finished"]
    assert [(line["client"].partition("/")[0], line["tokens"]) for line in over] == [("bob", 1), ("bob", 1)]
    assert PROMPT not in audit.read_text()
    assert no_parties_left(scratch)
    # The tokens of these sessions are counted by the next server.
    serving = Server(folded, scratch / "operations-2.log", *keys_of(folder, "--client-tokens", 5))
    try:
        with pytest.raises(UserError, match="may ask for 3 more tokens within 24 hours"):
            connect(serving.address(), bob).ask(PROMPT, 4)
    finally:
        serving.process.kill()
        serving.process.wait()


def served_certificate(address, tls):
    """PEM of what a server shows."""
    host, port = address.split(":")
    context = tls.client_context()
    with socket.create_connection((host, int(port))) as raw, context.wrap_socket(raw, server_hostname=host) as line:
        encoded = line.getpeercert(binary_form=True)
    return x509.load_der_x509_certificate(encoded).public_bytes(serialization.Encoding.PEM)


# --- Two servers behind HAProxy ---------------------------------------------------------------------------------------


@pytest.fixture
def proxy(tmp_path):
    """Starts HAProxy with the page's configuration in front of some addresses: its own address."""
    if shutil.which("haproxy") is None:
        pytest.skip("haproxy is not installed")
    started = []

    def start(*addresses):
        port, path = free_port(), tmp_path / "haproxy.cfg"
        text = (ROOT / "deploy" / "haproxy.cfg").read_text()
        assert "bind :9000" in text
        text = text.replace("bind :9000", f"bind 127.0.0.1:{port}")
        for number, address in enumerate(addresses, start=1):
            text, count = re.subn(rf"server gpu{number} \S+", f"server gpu{number} {address}", text)
            assert count == 1
        path.write_text(text)
        process = subprocess.Popen(["haproxy", "-db", "-f", str(path)], stderr=subprocess.PIPE)
        started.append(process)
        wait_for(lambda: process.poll() is not None or can_connect(port))
        return f"127.0.0.1:{port}"

    yield start
    for process in started:
        process.terminate()
        process.wait(HANGING)


def can_connect(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@two_party
def test_two_servers_behind_one_address_of_which_one_is_killed(folded, scratch, model, tmp_path, redis_server, proxy):
    """The answer goes on at the other server, and both count what the client uses."""
    flush(redis_server)
    folder = tmp_path / "authority"
    issue(folder, ["127.0.0.1"], ["alice"], days=2)
    options = keys_of(folder, "--client-tokens", 6, "--client-sessions", 1, "--quota-store", redis_server)
    servers = [Server(folded, scratch / f"behind-{number}.log", *options) for number in range(2)]
    killed = []
    try:
        address = proxy(*(one.address() for one in servers))
        alice = files(folder, "alice")
        connection = connect(address, alice)

        def stage(done, communication):
            if communication.token == 1 and not killed:  # the first token has come
                (busy,) = (one for one in servers if parties(scratch, one.process.pid))
                busy.process.kill()
                killed.append(busy)

        happened = []
        answer = connection.ask(PROMPT, 3, retries=6, watcher=Watcher(stage=stage, status=happened.append))
        ids = list(answer.record.prompt_tokens)
        for row, token in zip(answer.logits, answer.record.new_tokens, strict=True):
            assert np.abs(row - plain_logits(model[1], ids)).max() < TOLERANCE
            ids.append(token)
        assert len(answer.record.new_tokens) == 3
        assert any("retry" in line for line in happened)
        (other,) = (one for one in servers if one not in killed)
        assert other.log.count("a token") == 2
        with pytest.raises(UserError, match="may ask for 3 more tokens within 24 hours"):
            connection.ask(PROMPT, 4)
        honest(address, model, alice)
    finally:
        for one in servers:
            one.process.kill()
            one.process.wait()
    assert no_parties_left(scratch)
