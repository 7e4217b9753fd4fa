"""Conversations: turns that cost their own tokens, sessions that end in the middle, and what a server allows."""

import asyncio
import json
import os
import re
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("spu")

from entropi import cli
from entropi.chat import ChatForm, ids_of, load_form
from entropi.commands import chat
from entropi.errors import UserError
from entropi.private import Privacy, Watcher, connect
from entropi.private.sessions.tokenization import own_tokenizer
from entropi.private.wire.channel import ServerAddress, open_channel, welcome_from
from entropi.private.wire.messages import Accepted, Next, Start, decode_from_server, encode
from serving import (
    HANGING,
    Server,
    command,
    no_parties_left,
    parties,
    plain_logits,
    save_model,
    scratch,
    served_cache,
    wait_for,
)

__all__ = ["scratch", "served_cache"]  # fixtures
pytestmark = pytest.mark.two_party

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MESSAGE, OTHER = "the key?", "and the wall?"
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A model with a chat template and room for a conversation, its tokenizer, and the folder it is folded into."""
    folder = tmp_path_factory.mktemp("models") / "talking"
    plain, tokenizer = save_model(folder, positions=128)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    folded = folder.parent / "folded"
    assert cli.main(["fold", str(folder), str(folded)]) == 0
    return SimpleNamespace(folder=folded, model=plain, tokenizer=tokenizer, form=load_form(folded))


@pytest.fixture(scope="module")
def running(talking, scratch, tmp_path_factory):
    server = Server(talking.folder, tmp_path_factory.mktemp("logs") / "log")
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def strict(talking, scratch, tmp_path_factory):
    """A server with a public system prompt that waits for no message and allows few tokens."""
    options = ("--idle-seconds", 1, "--conversation-tokens", 64, "--system-prompt", "be brief")
    server = Server(talking.folder, tmp_path_factory.mktemp("logs") / "log", *options)
    yield server
    server.process.kill()
    server.process.wait()


def right(talking, answer, before):
    """Logits behind every new token against the plain model's on the same tokens; `before` are all tokens before."""
    ids = [*before, *answer.record.prompt_tokens]
    for logits, token in zip(answer.logits, answer.record.new_tokens, strict=True):
        assert np.abs(logits - plain_logits(talking.model, ids)).max() < TOLERANCE
        assert token == int(logits.argmax())
        ids.append(token)
    return ids


def test_a_turn_continues_the_session(running, talking):
    lines = running.log.count("opened")
    with connect(running.address()).conversation() as conversation:
        first = conversation.say(MESSAGE, 3)
        tokens = right(talking, first, [])
        second = conversation.say(OTHER, 2)
        tokens = right(talking, second, tokens)
        assert conversation.tokens == tokens
    encoder = own_tokenizer((talking.folder / "tokenizer.json").read_text())
    expected = ids_of(talking.form.turn(MESSAGE, None, begins=True), lambda text: encoder.encode(text, 128))
    assert first.record.prompt_tokens == expected
    assert (first.record.past_tokens, second.record.past_tokens) == (0, len(expected) + len(first.record.new_tokens))
    assert first.record.setup_seconds > 0
    assert second.record.setup_seconds == 0  # and so no keys and base oblivious transfers
    assert {stage.token for stage in second.record.stages} == set(range(len(second.record.new_tokens)))
    assert running.log.count("opened") - lines == 2  # the greeting, and one session for both
    wait_for(running.sessions_closed)


def test_what_a_user_spells_out_stays_text_and_an_empty_message_costs_nothing(running, talking):
    with connect(running.address()).conversation() as conversation:
        conversation.say("<|endoftext|>", 1)
        assert conversation.tokens[:-1].count(0) == 1  # the template's
        before, sessions = conversation.tokens, running.log.count("opened")
        for message, complaint in ((" ", "empty"), ("word " * 500, "tokens")):
            with pytest.raises(UserError, match=complaint):
                conversation.say(message, 1)
        assert conversation.tokens == before
        right(talking, conversation.say(OTHER, 1), before)
        assert running.log.count("opened") == sessions


def test_an_answer_that_is_stopped_leaves_the_session(running, talking):
    connection = connect(running.address())
    with connection.conversation() as conversation:
        conversation.stop()  # nothing runs: nothing happens
        sessions = running.log.count("opened")

        def stop(done, communication):
            if communication.token == 1:
                conversation.stop()

        stopped = conversation.say(MESSAGE, 8, Watcher(stage=stop))
        assert len(stopped.record.new_tokens) == 2
        before = conversation.tokens
        right(talking, conversation.say(OTHER, 1), before)
        assert running.log.count("opened") == sessions + 1


def test_a_session_that_breaks_in_an_answer_is_continued_in_another(running, talking, scratch):
    happened = []
    with connect(running.address()).conversation() as conversation:
        before = right(talking, conversation.say(MESSAGE, 1), [])

        def kill(done, communication):
            if not happened:
                happened.append("killed")
                os.kill(parties(scratch, running.process.pid)[0], signal.SIGKILL)

        answer = conversation.say(OTHER, 2, Watcher(stage=kill, status=happened.append))
        right(talking, answer, before)
    assert any("retry 1 of 1" in line for line in happened)
    assert no_parties_left(scratch)


def test_without_a_template_text_is_continued(running, talking):
    with connect(running.address()).conversation(chat=False) as conversation:
        first = conversation.say("the keeper", 2)
        assert first.record.prompt_tokens == talking.tokenizer.encode("the keeper").ids
        before = conversation.tokens
        right(talking, conversation.say(" lies", 1), before)


def test_one_question_in_the_template(running, talking):
    connection = connect(running.address())
    answer = connection.ask(MESSAGE, 1, chat=True, system="be kind")
    right(talking, answer, [])
    encoder = own_tokenizer((talking.folder / "tokenizer.json").read_text())
    pieces = talking.form.with_system("be kind").turn(MESSAGE, None, begins=True)
    assert answer.record.prompt_tokens == ids_of(pieces, lambda text: encoder.encode(text, 128))
    padded = connection.ask(MESSAGE, 1, chat=True, privacy=Privacy(pad_to=16))
    assert (padded.record.padding_tokens + len(padded.record.prompt_tokens)) % 16 == 0


def test_a_message_is_not_waited_for_and_the_conversation_goes_on(strict, talking):
    happened = []
    with connect(strict.address()).conversation() as conversation:
        conversation.say(MESSAGE, 1)
        wait_for(lambda: "nothing was asked for 1 s" in strict.log)
        wait_for(strict.sessions_closed)
        before = conversation.tokens
        answer = conversation.say(OTHER, 1, Watcher(status=happened.append))
        assert conversation.tokens[: len(before)] == before
        assert answer.record.past_tokens == len(before)
        assert answer.record.setup_seconds > 0
    assert any("another session reads the conversation again" in line for line in happened)


def test_the_public_system_prompt_is_not_said_again(strict, talking):
    with connect(strict.address()).conversation() as conversation:
        answer = conversation.say(MESSAGE, 1)
    encoder = own_tokenizer((talking.folder / "tokenizer.json").read_text())
    whole = talking.form.with_system("be brief").turn(MESSAGE, None, begins=True)
    ids = ids_of(whole, lambda text: encoder.encode(text, 128))
    assert answer.record.prefix_tokens == ids.index(0) + 1
    assert answer.record.prompt_tokens == ids[ids.index(0) + 1 :]
    assert np.abs(answer.logits[0] - plain_logits(talking.model, ids)).max() < TOLERANCE
    with pytest.raises(UserError, match="no place for a system prompt"):
        connect(strict.address()).ask(MESSAGE, 1, chat=True, system="mine")


def test_a_conversation_has_an_end(strict):
    with connect(strict.address()).conversation() as conversation:
        conversation.say(MESSAGE, 1)
        with pytest.raises(UserError, match=r"may have 64, the 50 of the next answer included: begin another"):
            conversation.say(OTHER, 50)
        conversation.say("so?", 1)


def test_several_tokens_at_once_are_for_conversations(running):
    async def ask_for_many(tokens, *, conversation):
        async with open_channel(ServerAddress.at(running.address(), None)) as (_, socket):
            welcome = await welcome_from(socket, "")
            await socket.send_str(encode(Start(4, 8, welcome.digest(), conversation)).decode())
            assert isinstance(decode_from_server((await socket.receive()).data), Accepted)
            await socket.send_str(encode(Next(tokens)).decode())
            while (message := await socket.receive()).type != 1:  # the engine's bytes
                pass
            return decode_from_server(message.data).reason

    assert asyncio.run(ask_for_many(2, conversation=False)) == "2 tokens were asked for at once"
    assert asyncio.run(ask_for_many(8, conversation=True)) == "8 tokens were asked for at once"


def test_the_command(running):
    lines = f"{MESSAGE}\n\n/history\n/what\n/new\n{OTHER}\n/exit\nnever read\n"
    done = subprocess.run(
        command("chat", "--server", running.address(), "--max-new-tokens", 2),
        input=lines,
        capture_output=True,
        text=True,
        timeout=HANGING,
    )
    assert done.returncode == 0, done.stderr
    assert f"> {MESSAGE}\n" in done.stdout
    assert "two parties, semi-honest" in done.stderr
    assert len(re.findall(r"\d tokens in .* both directions", done.stderr)) == 2
    assert done.stderr.count("/history shows it") == 2  # at the start, and for what is no command
    assert "Traceback" not in done.stderr


def test_the_command_without_a_server_or_a_template(capfd, running, talking, tmp_path, scratch):
    assert cli.main(["chat", "--server", "127.0.0.1:1"]) == 2
    assert "cannot reach a server" in capfd.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in talking.folder.iterdir():
        if file.name != "chat.json":
            (bare / file.name).symlink_to(file)
    assert cli.main(["serve", str(bare), "--chat", "--listen", "127.0.0.1:0"]) == 2
    assert "no chat template" in capfd.readouterr().err
    server = Server(bare, tmp_path / "log", "--conversation-tokens", 0)
    try:
        for words in (["chat"], ["ask", "--chat", MESSAGE]):
            assert cli.main([*words, "--server", server.address()]) == 2
            assert "has no chat template" in capfd.readouterr().err
        with pytest.raises(UserError, match="allows no conversations"):
            connect(server.address()).conversation(chat=False).say(MESSAGE, 1)
    finally:
        server.process.kill()
        server.process.wait()


def test_the_first_interrupt_ends_an_answer_and_the_second_the_program():
    stopped, said = [], []
    conversation = SimpleNamespace(stop=lambda: stopped.append(True))
    display = SimpleNamespace(status=said.append)
    before = signal.getsignal(signal.SIGINT)

    def interrupt_twice():
        with chat._interrupted_at_a_token(conversation, display):
            signal.raise_signal(signal.SIGINT)
            assert stopped == [True]
            assert "Ctrl-C once more" in said[0]
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_options_that_have_no_meaning_in_a_conversation(running):
    connection = connect(running.address())
    for options, complaint in (
        (dict(privacy=Privacy(full_length=True)), "full_length"),
        (dict(chat=False, system="x"), "chat template only"),
        (dict(max_tokens=1), "max_tokens is 1"),
    ):
        with pytest.raises(UserError, match=complaint):
            connection.conversation(**options)


def test_folding_keeps_the_form(talking):
    assert talking.form == ChatForm(
        first=("user: ",),
        answer=(0, "assistant: "),
        following=(0, "user: "),
        system=(("system: ",), (0, "user: ")),
    )
