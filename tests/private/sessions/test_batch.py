"""Several prompts a session: what is allowed, which share one, and every answer is the one its prompt has alone."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("spu")

from entropi.errors import UserError
from entropi.private import Privacy, Watcher, connect
from entropi.private.admission.limits import Limits
from entropi.private.compute.settings import Settings, trust
from entropi.private.sessions.batch import Batch, BatchSession
from entropi.private.sessions.client import Connection
from entropi.private.sessions.client_session import ClientSession
from entropi.private.sessions.generation import Generation
from entropi.private.sessions.memory import needed_memory
from entropi.private.sessions.sampling import GREEDY
from entropi.private.sessions.server_session import Asking, _check_length
from entropi.private.wire.channel import ServerAddress
from entropi.private.wire.messages import Next, Start, Welcome
from entropi.private.wire.server_channel import Refusal, SessionError
from private_reference import describe
from serving import (
    TOLERANCE,
    Server,
    folded,
    model,
    no_parties_left,
    parties,
    plain_logits,
    run_cli,
    scratch,
    served_cache,
)

__all__ = ["folded", "model", "scratch", "served_cache"]  # fixtures

PROMPTS = ["the keeper lies", "key", "the old stone wall"]
PREFIX, NEW = "The secret garden", 4
DIGEST = "0" * 64


# --- What is allowed --------------------------------------------------------------------------------------------------


def state(prefix=(), **limits):
    welcome = Welcome(describe(), "{}", Settings(), prefix=list(prefix), draft_tokens=8)
    return SimpleNamespace(welcome=welcome, limits=Limits(**limits))


@pytest.mark.parametrize(
    ("start", "complaint"),
    [
        (Start(4, 2, DIGEST, others=[5, 6]), None),
        (Start(4, 2, DIGEST, others=[5, 6, 1]), "at most 3 prompts a session are allowed"),
        (Start(4, 2, DIGEST, others=[17]), "at most 24 tokens of several prompts a session are allowed, not 25"),
        (Start(4, 2, DIGEST, True, others=[5]), "are for one prompt a session"),
        (Start(4, 2, DIGEST, drafts=1, others=[5]), "are for one prompt a session"),
        (Start(4, 2, DIGEST, ticket="1" * 32, others=[5]), "are for one prompt a session"),
        (Start(1, 5, DIGEST, others=[5]), "at most 4 new tokens a session are allowed"),
    ],
)
def test_a_server_allows_so_many_prompts_and_tokens(start, complaint):
    limits = state(batch_prompts=3, batch_tokens=24, max_new_tokens=4)
    if complaint is None:
        _check_length(start, limits)
        return
    with pytest.raises(Refusal, match=complaint):
        _check_length(start, limits)


def test_every_prompt_has_to_fit_the_model():
    _check_length(Start(4, 2, DIGEST, others=[21]), state(prefix=[1, 2]))
    with pytest.raises(Refusal, match="22 prompt tokens and 2 new ones do not fit the 22 positions"):
        _check_length(Start(4, 2, DIGEST, others=[22]), state(prefix=[1, 2]))
    with pytest.raises(Refusal, match="one prompt a session is allowed"):
        _check_length(Start(4, 2, DIGEST, others=[4]), state(batch_prompts=1))


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ([Next(ended=[1]), Next(ended=[0]), Next()], None),
        ([Next(ended=[3])], "1 of 3 prompts"),
        ([Next(ended=[1, 1])], "2 of 3 prompts"),
        ([Next(ended=[0, 1, 2])], "3 of 3 prompts"),
        ([Next(ended=[1]), Next(ended=[2])], "1 of 2 prompts"),
        ([Next(3)], "3 tokens were asked for"),
        ([Next(), Next(), Next(), Next()], "all tokens were asked for"),
    ],
)
def test_a_server_counts_prompts(asked, complaint):
    asking = Asking(left=3, prompts=3)
    if complaint is None:
        assert [asking.count(following) for following in asked] == [0, 0, 0]
        assert (asking.left, asking.prompts) == (0, 1)
        return
    for following in asked[:-1]:
        asking.count(following)
    with pytest.raises(SessionError, match=complaint):
        asking.count(asked[-1])


def test_memory_grows_with_what_prompts_see():
    """Of prompts in the same passes the pairs are those of each, not those of all tokens with each other."""
    long = describe(positions=4096)
    apart, joint = needed_memory(long, 2048, prompts=[256] * 8), needed_memory(long, 2048)
    assert needed_memory(long, 256) < apart < joint


# --- Which prompts share a session ------------------------------------------------------------------------------------


def generations(lengths, new=4, received=()):
    found = []
    for number, length in enumerate(lengths):
        one = Generation("text", new, GREEDY, 0, Watcher())
        one.prompt_ids = [1] * length
        one.new_tokens = [2] * (received[number] if number < len(received) else 0)
        found.append(one)
    return found


@pytest.mark.parametrize(
    ("lengths", "received", "expected"),
    [
        ([3, 9, 2, 5], (), [0, 1, 2]),  # as many prompts as are allowed
        ([3, 20, 2], (), [0]),  # as many tokens
        ([50, 2], (), [0]),  # one may have more than several
        ([3, 4, 5], (2, 2), [0, 1]),  # those that broke off go on together, with as many tokens to come
    ],
)
def test_prompts_share_a_session_as_far_as_it_is_allowed(lengths, received, expected):
    session = BatchSession(SimpleNamespace(name="a server"), None, None, Batch(generations(lengths, 4, received)))
    session.welcome = Welcome(describe(), "{}", Settings(), batch_prompts=3, batch_tokens=30)
    assert session._fitting() == expected


def test_what_the_server_learns_is_said():
    said = trust(Settings(), several=True)
    assert "learns how many prompts share a pass, how many tokens each of them and its answer have, and nothing" in said


# --- Wrong inputs -----------------------------------------------------------------------------------------------------


def test_wrong_batches_are_refused_in_one_line(capfd, tmp_path):
    lines, file = tmp_path / "prompts.jsonl", tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")

    def said(*words):
        return run_cli(capfd, "ask", "--server", "127.0.0.1:1", *words)[1]

    assert "cannot read the prompts" in said("--batch", tmp_path / "none")
    for text, complaint in (
        ("", "there are no prompts"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2 of"),
        ('{"prompt": 3}\n', 'no JSON object with a text "prompt"'),
        ("{\n", "line 1 of"),
    ):
        lines.write_text(text)
        assert complaint in said("--batch", lines)
    for options in (("text",), ("--canary",), ("--draft", "ngram"), ("--material", tmp_path)):
        assert "is for one prompt a session: leave it out, or --batch" in said("--batch", file, *options)
    assert "--logits is for one prompt" in said("--batch", file, "--logits", tmp_path / "a.npy")
    assert "batch_prompts is 65" in run_cli(capfd, "serve", tmp_path, "--batch-prompts", 65)[1]
    assert "batch_tokens is 20000" in run_cli(capfd, "serve", tmp_path, "--batch-tokens", 20_000)[1]


# --- Sessions ---------------------------------------------------------------------------------------------------------


@pytest.mark.two_party
@pytest.mark.slow
def test_each_prompt_has_the_answer_that_it_has_alone(folded, model, scratch, tmp_path, monkeypatch):
    """Two prompts in a session that breaks and goes on in another, where one ends before the other; and a third one.

    The server reveals the three likeliest tokens of each.
    """
    _, plain, tokenizer = model
    prefix = tokenizer.encode(PREFIX).ids
    (tmp_path / "prefix").write_text(PREFIX)
    options = "--batch-prompts", 2, "--prefix-file", tmp_path / "prefix", "--output", "top_k", "--choices", 3
    server = Server(folded, tmp_path / "log", *options)
    expected = {}
    for prompt in PROMPTS:
        ids = [*prefix, *tokenizer.encode(prompt).ids]
        expected[prompt] = [*ids]
        for _ in range(NEW):
            expected[prompt].append(int(plain_logits(plain, expected[prompt]).argmax()))
    ends = tokenizer.id_to_token(expected[PROMPTS[0]][-NEW + 2])  # after three tokens of the first answer, or before
    killed, order, asked = [], [], []

    def kill(done, communication):
        if communication.token == 1 and not killed:
            killed.append(parties(scratch, server.process.pid)[0])
            os.kill(killed[0], signal.SIGKILL)

    say = ClientSession.say

    async def note(self, message):
        asked.append(message)
        await say(self, message)

    monkeypatch.setattr(ClientSession, "say", note)
    found = connect(server.address()).ask_batch(
        PROMPTS,
        NEW,
        watcher=Watcher(stage=kill),
        retries=1,
        privacy=Privacy(stop_tokens=(ends,)),
        answered=lambda place, answer: order.append(place),
    )
    server.process.terminate()
    server.process.wait()
    stop = tokenizer.token_to_id(ends)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids, new = expected[prompt], expected[prompt][-NEW:]
        wanted = new[: new.index(stop) + 1] if stop in new else new
        assert answer.record.new_tokens == wanted
        for number, logits in enumerate(answer.logits):
            likeliest = -np.sort(-plain_logits(plain, ids[: len(ids) - NEW + number]))[:3]
            np.testing.assert_allclose(logits, likeliest, atol=TOLERANCE)
    first, second, third = (answer.record for answer in found)
    assert [first.batch_prompts, second.batch_prompts, third.batch_prompts] == [2, 2, 1]
    assert len(killed) == 1
    assert sorted(order) == [0, 1, 2]
    assert order[-1] == 2
    assert "how many prompts share a pass" in first.trust
    assert "how many prompts share a pass" not in third.trust
    starts = [message for message in asked if isinstance(message, Start)]
    assert [len(start.others) for start in starts] == [1, 1, 0]
    assert starts[1].prompt_length == starts[0].prompt_length + 1  # a token was received before it broke
    assert no_parties_left(scratch)


def test_prompts_that_nobody_can_be_asked_are_told_by_their_place():
    """Before a server is asked."""
    connection = Connection(ServerAddress.at("127.0.0.1:1", None), None)
    with pytest.raises(UserError, match="prompt 2 is not valid Unicode text"):
        connection.ask_batch(["a", "\ud800"], 1)
    with pytest.raises(UserError, match="prompts is one text: give a list"):
        connection.ask_batch("text", 1)
