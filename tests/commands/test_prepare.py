"""`entropi prepare`: what it refuses, and how it keeps sessions ready."""

import time

import numpy as np
import pytest

from entropi.commands import prepare
from entropi.errors import UserError
from entropi.private.preparation.store import Store
from entropi.private.preparation.tickets import Binding


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", 0), "must be at least 1"),
        (("--sessions", 0), "must be at least 1"),
        (("--keep-ready", -1), "in place of --sessions"),
        (("--keep-ready", 2, "--sessions", 2), "in place of --sessions"),
        (("--tokens", 4, "--new-tokens", 5), "5 new tokens of 4"),
        (("--expires-days", 31), "30 days"),
        (("--material-gb", 0), "--material-gb is 0 but must be more than 0 and at most 1,000,000"),
        (("--material-sessions", 1001), "--material-sessions is 1001 but must be between 1 and 1,000"),
        (("--list",), "nothing was prepared"),
        (("--server", "127.0.0.1:9"), "127.0.0.1:9"),
    ],
)
def test_refusals(entropi, tmp_path, words, message):
    done = entropi("prepare", "--material", tmp_path / "material", *words)
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert message in line


def test_as_many_as_wanted_are_kept_ready(monkeypatch, capsys):
    """Two are missing; later one is used, while the server is away for a moment; then somebody interrupts."""
    looks = iter([0, 1, 2, UserError("nobody answers"), 1, 2, KeyboardInterrupt()])
    happened = []

    def ready():
        found = next(looks)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: happened.append("waits"))
    with pytest.raises(KeyboardInterrupt):
        prepare._keep_ready(2, ready, happened.append)
    first, second, *others = happened
    assert [first, second] == ["preparing, 0 of 2 ready", "preparing, 1 of 2 ready"]
    assert others == ["waits", "waits", "waits", "preparing, 1 of 2 ready", "waits"]
    said = capsys.readouterr()
    assert said.err == "nobody answers; trying again in 30 s\n"
    waits = "2 of 2 ready: waiting until one is used"
    assert said.out.splitlines() == ["0 of 2 ready", waits, waits]


def test_what_is_ready_counts(capsys):
    happened = []
    prepare._prepare_missing(3, lambda: 1, happened.append)
    assert happened == ["preparing 2 of 3", "preparing 3 of 3"]
    prepare._prepare_missing(1, lambda: 1, happened.append)
    assert len(happened) == 2
    assert capsys.readouterr().out == "1 ready already: --sessions 2 prepares another one\n"


def test_what_is_kept_is_listed_and_deleted_although_the_server_is_away(entropi, tmp_path):
    folder = tmp_path / "material"
    with Store(folder) as store:
        names = {"model": "0123456789abcdef", "settings": "s", "own": "", "peer": "127.0.0.1:9", "side": "client"}
        growth = store.grow(bytes(16), Binding(**names, tokens=8, passes=2), 8)
        growth.add("0", {"a": np.zeros(1, np.uint64)})
        (entry,) = store.entries()
    listed = entropi("prepare", "--material", folder, "--list").out
    assert "00000000  begun  8 tokens, 2 new  0.0 MB  127.0.0.1:9  model 01234567  expires in 7.0 days" in listed
    deleted = entropi("prepare", "--material", folder, "--delete", "0000")
    assert (deleted.status, deleted.out) == (0, "1 destroyed\n")
    (line,) = deleted.err.splitlines()
    until = time.strftime("%Y-%m-%d", time.localtime(entry.expires))
    assert line.startswith(f"127.0.0.1:9 keeps its half until {until}")
    assert "cannot reach a server" in line
    assert entropi("prepare", "--material", folder, "--list").out.startswith("0 sessions")


def test_a_wrong_address_ends_it():
    def ready():
        raise UserError("nobody answers")

    with pytest.raises(UserError, match="nobody answers"):
        prepare._keep_ready(2, ready, lambda title: None)
