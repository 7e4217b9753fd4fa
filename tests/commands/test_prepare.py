"""`entropi prepare`: what it refuses, and how it keeps sessions ready."""

import pytest

from entropi.commands import prepare
from entropi.errors import UserError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", 0), "must be at least 1"),
        (("--sessions", 0), "must be at least 1"),
        (("--keep-ready", -1), "in place of --sessions"),
        (("--keep-ready", 2, "--sessions", 2), "in place of --sessions"),
        (("--tokens", 4, "--new-tokens", 5), "5 new tokens of 4"),
        (("--expires-days", 31), "30 days"),
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
    assert capsys.readouterr().err == "nobody answers; trying again in 30 s\n"


def test_a_wrong_address_ends_it():
    def ready():
        raise UserError("nobody answers")

    with pytest.raises(UserError, match="nobody answers"):
        prepare._keep_ready(2, ready, lambda title: None)
