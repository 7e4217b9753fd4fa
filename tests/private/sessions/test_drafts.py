"""Drafts: which are kept, where they come from, and sessions with them, whose answers are those without."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("spu")

from entropi import cli
from entropi.commands import common
from entropi.errors import UserError
from entropi.model.reading import Reader
from entropi.private import Privacy, Sampling, Watcher, connect
from entropi.private.compute.engine import EngineError
from entropi.private.preparation.store import Store
from entropi.private.sessions import client, preparing
from entropi.private.sessions.drafting import NOTHING, Draft, ModelDrafter, NgramDrafter, Window, drafter_of
from entropi.private.sessions.party import _Budget
from entropi.private.sessions.server_session import Asking
from entropi.private.wire.messages import Next, Proceed
from entropi.private.wire.server_channel import SessionError
from serving import Server, plain_logits, run_cli, save_model, scratch, served_cache, wait_for

__all__ = ["scratch", "served_cache"]  # fixtures

PROMPT, NEW = "the keeper lies", 8
TOLERANCE = 0.05


# --- Which drafts are kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "flat"), [(None, True), (3, False)], ids=["flat draft", "sharp draft of few"])
def test_drawn_drafts_leave_the_distribution_as_it_is(top_k, flat):
    """Frequencies of what is taken against the probabilities without drafts, within five standard deviations."""
    random, sampling = np.random.default_rng(0), Sampling(0.8, top_k)
    logits = np.array([1.0, 0.5, -0.3, 2.0, 0.0])
    drawn = Sampling(5.0 if flat else 0.3).probabilities(np.array([0.2, 1.9, 0.1, 1.4, -1.0]))
    wanted, count = sampling.probabilities(logits), 5_000
    taken = np.zeros(len(wanted))
    for _ in range(count):
        draft = Draft([int(random.choice(len(drawn), p=drawn))], [drawn])
        taken[draft.verified(0, logits, sampling, random)] += 1
    assert (np.abs(taken / count - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / count)).all()


def test_a_draft_like_the_answer_always_holds():
    random, sampling, logits = np.random.default_rng(0), Sampling(1.0), np.array([1.0, 0.5, -0.3])
    draft = Draft([2], [sampling.probabilities(logits)])
    assert {draft.verified(0, logits, sampling, random) for _ in range(100)} == {2}


def test_drafts_without_chance_change_no_choice():
    """The seed's tokens are those without drafts: a draft is one of them or not, and nothing else is drawn."""
    sampling, logits = Sampling(1.0), np.random.default_rng(1).normal(size=(50, 4))
    seeds = np.random.default_rng(2), np.random.default_rng(2)
    draft = Draft([1] * 50)
    with_draft = [draft.verified(place, row, sampling, seeds[0]) for place, row in enumerate(logits)]
    assert with_draft == [sampling.choose(row, seeds[1]) for row in logits]
    assert Draft([0], [np.ones(4) / 4]).verified(0, logits[0], Sampling(), seeds[0]) == logits[0].argmax()


def test_probabilities_are_those_of_choices():
    logits = np.array([0.0, 1.0, 3.0])
    np.testing.assert_allclose(Sampling(1.0).probabilities(logits), np.exp(logits) / np.exp(logits).sum())
    assert Sampling(1.0, top_k=2).probabilities(logits)[0] == 0
    assert Sampling().probabilities(logits).tolist() == [0, 0, 1]


# --- Where they come from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1]),
        ([1, 2, 9, 1, 2, 8, 5, 1, 2], [8, 5, 1]),  # the latest
        ([7, 1, 2, 9, 3, 1, 2, 8, 7, 1, 2], [9, 3, 1]),  # the longest
        ([5, 6, 5, 6], [5, 6, 5]),  # goes on into itself
        ([3, 3, 3], [3, 3, 3]),
        ([1, 2, 3], []),
        ([1, 2, 3, 1], []),  # one token is no match
        ([4], []),
        ([], []),
    ],
)
def test_what_followed_before_is_drafted(ids, expected):
    assert NgramDrafter().draft(ids, 3, 10, Sampling(), np.random.default_rng(0)) == Draft(expected)


def test_drafts_are_as_long_as_they_hold():
    window = Window()
    for drafted, held, size in ((8, 2, 3), (3, 3, 6), (6, 0, 1), (0, 0, 1), (1, 1, 2)):
        window.note(drafted, held)
        assert window.size == size


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A model with a chat template and room for drafts, its tokenizer, and the folder it is folded into."""
    folder = tmp_path_factory.mktemp("models") / "talking"
    plain, tokenizer = save_model(folder, positions=96)
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    folded = folder.parent / "folded"
    assert cli.main(["fold", str(folder), str(folded)]) == 0
    return SimpleNamespace(model=plain, tokenizer=tokenizer, folder=folder, folded=folded)


def test_a_model_drafts_what_it_would_answer(talking):
    """Whatever it has read before: its keys and values of the same text are used, and no others."""
    drafter = common.drafter(str(talking.folder))
    drafter.check(talking.tokenizer, "the server")
    ids, random = talking.tokenizer.encode(PROMPT).ids, np.random.default_rng(0)
    vocab_size = talking.tokenizer.get_vocab_size() + 2
    for known in (ids, [*ids, 5, 6], ids, ids[:-1]):
        draft = drafter.draft(known, 3, vocab_size, Sampling(1.0), random)
        assert len(draft.tokens) == 3
        for place, drawn in enumerate(draft.drawn):
            logits = plain_logits(talking.model, [*known, *draft.tokens[:place]])
            np.testing.assert_allclose(drawn[:-2], Sampling(1.0).probabilities(logits), atol=1e-5)
            assert drawn[-2:].tolist() == [0, 0]
    assert drafter.draft([1] * 96, 3, vocab_size, Sampling(), random) is NOTHING
    assert len(drafter.draft([1] * 95, 3, vocab_size, Sampling(), random).tokens) == 1
    with pytest.raises(UserError, match="has other tokens than the model of the server"):
        ModelDrafter(Reader(talking.model, {"a": 0}, "a model")).check(talking.tokenizer, "the server")


# --- Wrong inputs -----------------------------------------------------------------------------------------------------


def test_wrong_drafts_are_refused_in_one_line(capfd, tmp_path):
    with pytest.raises(UserError, match="draft is 'bigram' but must be 'ngram'"):
        drafter_of("bigram")
    with pytest.raises(UserError, match="full_length hides"):
        client.ask("127.0.0.1:1", "text", 2, privacy=Privacy(full_length=True), draft="ngram")
    assert "there is no folder nowhere" in run_cli(capfd, "ask", "text", "--draft", "nowhere")[1]
    assert "no model" in run_cli(capfd, "ask", "text", "--draft", tmp_path)[1]
    assert "draft_tokens is 17" in run_cli(capfd, "serve", tmp_path, "--draft-tokens", 17)[1]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ([Next(3, 3)], "3 tokens were asked for"),
        ([Next(4, 2)], "4 tokens were asked for"),
        ([Next(5, 4)], "4 drafts were asked for"),
        ([Next(9, 3)], "9 tokens were asked for"),
        ([Next(1, 0, 1)], "1 drafts were kept of 0"),
        ([Next(3, 2), Next(1, 0, 3)], "3 drafts were kept of 2"),
        ([Next(4, 3), Next(4, 3), Next(1)], None),
        ([Next(4, 3), Next(4, 3), Next(2, 1)], "1 drafts were asked for"),  # all six were dropped
        ([Next(4, 3, 0), Next(4, 3, 3), Next(1, 0, 3)], "all tokens were asked for"),
    ],
)
def test_a_server_counts_drafts(asked, complaint):
    asking = Asking(left=8, drafts=6, draft_tokens=3)
    if complaint is None:
        assert [asking.count(following) for following in asked] == [0, 3, 3]
        assert (asking.left, asking.drafts) == (5, 0)
        return
    for following in asked[:-1]:
        asking.count(following)
    with pytest.raises(SessionError, match=complaint):
        asking.count(asked[-1])


def test_a_party_counts_drafts_too():
    """Both sides' processes, whose parents tell them the same."""
    budget = _Budget(9, 6)
    for asked in (Proceed(4, None, 3), Proceed(4, None, 3, 3), Proceed(1, None, 0, 3)):
        budget.take(asked)
    assert (budget.left, budget.drafts, budget.drafted) == (5, 0, 0)
    for asked in (Proceed(1, None, 0, 1), Proceed(6), Proceed(2, None, 1), Proceed(1, None, 1)):
        with pytest.raises(EngineError):
            budget.take(asked)
    assert (budget.left, budget.drafts) == (5, 0)


# --- Sessions ---------------------------------------------------------------------------------------------------------


class Scripted:
    """Drafts that the test knows to be right up to a place in each, and wrong from there on."""

    def __init__(self, ids, *right):
        self.ids, self.right, self.vocab = ids, list(right), None

    def check(self, tokenizer, where):
        self.vocab = tokenizer.get_vocab_size()

    def draft(self, ids, most, vocab_size, sampling, random):
        assert list(ids) == self.ids[: len(ids)]
        if not self.right:
            return NOTHING
        right, following = self.right.pop(0), self.ids[len(ids) : len(ids) + min(most, 3)]
        return Draft([t if n < right else (t + 1) % self.vocab for n, t in enumerate(following)])


@pytest.fixture(scope="module")
def running(talking, scratch, tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    server = Server(talking.folded, base / "log", "--embedding", "public", "--material", base / "material")
    yield SimpleNamespace(server=server, address=server.address())
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def answered(talking):
    """The tokens of the prompt, and of the answer that the model gives in plaintext."""
    ids = talking.tokenizer.encode(PROMPT).ids
    for _ in range(NEW):
        ids.append(int(plain_logits(talking.model, ids).argmax()))
    return ids


def right(talking, answer, before=()):
    """Logits behind every new token against the plain model's on the same tokens."""
    ids = [*before, *answer.record.prompt_tokens]
    for logits, token in zip(answer.logits, answer.record.new_tokens, strict=True):
        np.testing.assert_allclose(logits, plain_logits(talking.model, ids), atol=TOLERANCE)
        ids.append(token)
    return ids


@pytest.mark.two_party
@pytest.mark.slow
def test_an_answer_with_drafts_is_the_answer(running, talking, answered):
    """Three of three drafts hold, and one of two, which are as many as are left for a pass."""
    pieces, begun = [], []
    watcher = Watcher(begin=begun.append, text=pieces.append)
    found = client.ask(running.address, PROMPT, NEW, watcher, draft=Scripted(answered, 3, 1))
    assert right(talking, found) == answered
    record = found.record
    assert (record.drafted_tokens, record.held_tokens, record.passes) == (5, 4, 4)
    assert "".join(pieces) == record.new_text
    assert begun[0] > begun[-1] == len(record.stages) + 1
    assert "how many were drafted and held" in record.trust
    assert "4 tokens with drafts" in running.server.log
    wait_for(running.server.sessions_closed)


@pytest.mark.two_party
@pytest.mark.slow
def test_drafts_use_up_what_is_prepared(running, talking, answered, tmp_path):
    """Material has room for four that do not hold: after these there are none, and there is enough for the answer."""
    said = []
    with Store(tmp_path / "material") as store:
        preparing.prepare(running.address, len(answered) - 1, store, new_tokens=NEW, draft_tokens=4)
        found = client.ask(
            running.address, PROMPT, NEW, Watcher(status=said.append), store=store, draft=Scripted(answered, 1, 1, 0)
        )
    assert right(talking, found) == answered
    record = found.record
    assert record.prepared_bytes > 0
    assert (record.drafted_tokens, record.held_tokens, record.passes) == (6, 2, 6)
    assert any("room for 4 drafts that do not hold" in line for line in said)


@pytest.mark.two_party
@pytest.mark.slow
def test_a_model_drafts_for_a_conversation(running, talking, tmp_path):
    """The served model itself: by its own probabilities nearly all drafts hold. One answer is stopped in a pass, of
    which then the first token is taken and no draft behind it; the session goes on there, with what is prepared."""
    drafter = ModelDrafter(Reader(talking.model, talking.tokenizer.get_vocab(), "the model itself"))
    options = dict(sampling=Sampling(1.0, seed=3), draft=drafter)
    with (
        Store(tmp_path / "material") as store,
        connect(running.address).conversation(**options, store=store) as conversation,
    ):
        preparing.prepare(running.address, 64, store, new_tokens=16, draft_tokens=8)

        def stop(done, communication):
            conversation.stop()

        first = conversation.say("the key?", 5)
        before = right(talking, first)
        stopped = conversation.say("and the wall?", 4, Watcher(stage=stop))
        before = right(talking, stopped, before)
        right(talking, conversation.say("and the garden?", 1), before)
    assert len(first.record.new_tokens) == 5 or first.record.new_tokens[-1] == 0  # the end of a text
    assert first.record.held_tokens >= len(first.record.new_tokens) - 2 > 0
    assert first.record.passes <= 2
    assert (len(stopped.record.new_tokens), stopped.record.passes) == (1, 1)
    assert stopped.record.drafted_tokens == 3
    assert first.record.prepared_bytes > 0
    assert stopped.record.setup_seconds == 0  # it is the same session
