"""`entropi ask`: what it prints and writes, with a server's answer put in place of the computation."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from command_line import Done, assert_refused
from entropi import record_files, records
from entropi.commands.answers import AnswerDisplay, AnswerLines
from entropi.commands.ask import read_prompts
from entropi.errors import UserError

pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a server's answer in place of the private computation."""
    pytest.importorskip("spu")
    pytest.importorskip("jax")
    from entropi.private.compute.settings import Settings
    from entropi.private.sessions import client
    from entropi.private.sessions.generation import Answer

    def put(pieces: list[str], new_text: str, output: Literal["logits", "argmax"] = "logits") -> None:
        def ask(server: str, prompt: str, max_new_tokens: int, watcher: Any, **options: Any) -> Any:
            watcher.begin(len(pieces))
            stages = []
            for index, piece in enumerate(pieces):
                stages.append(
                    records.StageCommunication(
                        name="exp",
                        layer=0,
                        token=index,
                        seconds=0.1,
                        sent_bytes=500_000,
                        received_bytes=500_000,
                        sent_messages=1,
                        received_messages=1,
                    )
                )
                watcher.stage(index + 1, stages[-1])
                watcher.text(piece)
            record = records.PrivateRun(
                protocol="cheetah",
                trust="semi-honest",
                server=server,
                prompt=prompt,
                prompt_tokens=[1],
                new_tokens=[2] * len(pieces),
                new_text=new_text,
                stages=stages,
                setup_seconds=0.0,
                setup_bytes=0,
                reveal_bytes=0,
                seconds=1.0,
                ring_bits=64,
                fraction_bits=18,
                softmax="power-8",
            )
            return Answer(record, [np.zeros(4), np.ones(4)] if output == "logits" else [])

        monkeypatch.setattr(client, "ask", ask)
        monkeypatch.setattr(client, "connect", lambda *given: SimpleNamespace(settings=Settings(output=output)))

    return put


class Terminal:
    """Standard output, as far as anybody can tell a terminal."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["a", " b", "\nc"], "a b\nc"),
        (["[bold]", ":smile:"], "[bold]:smile:"),  # no markup
        (["x", ""], "x\ufffd"),  # half of a character at the end is never shown as a piece
        ([""], ""),
    ],
)
def test_ask_prints_the_answer_once(
    entropi: Callable[..., Done],
    answering: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    pieces: list[str],
    text: str,
):
    answering(pieces, text)
    if terminal:
        monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    done = entropi("ask", "hello")
    assert done.out == text + "\n"
    assert f"{len(pieces)} tokens in 1.0 s, {len(pieces)}.0 MB both directions" in done.err


def test_ask_leaves_record_and_logits(entropi: Callable[..., Done], answering: Callable[..., None], tmp_path: Path):
    answering(["a", "b"], "ab")
    done = entropi("ask", "hello", "--json", "--record", tmp_path, "--logits", tmp_path / "logits")
    (recorded,) = record_files.read(tmp_path / "records.jsonl")
    assert json.loads(done.out) == json.loads(record_files.encode(recorded))
    assert done.out.count("\n") == 1
    assert np.load(tmp_path / "logits").shape == (2, 4)  # under the name that was given


def test_a_canary_uses_nothing_that_is_prepared_unless_it_is_said(
    entropi: Callable[..., Done], answering: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    answering(["a", "b"], "ab")
    from entropi.private.preparation.store import Store
    from entropi.private.sessions import client
    from entropi.private.wire.messages import Canary

    stores: list[bool] = []
    ask, serving = client.ask, client.connect("")
    serving.canary = Canary("public", [2, 2], [0.0, 1.0])  # as is answered here
    monkeypatch.setattr(client, "connect", lambda *given: serving)
    monkeypatch.setattr(
        client, "ask", lambda *given, **named: stores.append(bool(named["store"])) or ask(*given, **named)
    )
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "entropi" / "material"
    Store(folder).close()
    for words in (("hello",), ("--canary",), ("--canary", "--material", folder), ("hello", "--no-prepared")):
        assert entropi("ask", *words).status == 0
    assert stores == [True, False, True, False]


@pytest.mark.parametrize("prompt", ["--max-new-tokens", "-x", "null", "3", "[1]", "{a: 1}", "a: b", "", " x ", "--"])
def test_a_prompt_is_text_whatever_it_looks_like(
    entropi: Callable[..., Done], answering: Callable[..., None], tmp_path: Path, prompt: str
):
    answering(["a"], "a")
    assert entropi("ask", "--record", tmp_path, "--", prompt).status == 0
    (recorded,) = record_files.read(tmp_path / "records.jsonl")
    assert isinstance(recorded, records.PrivateRun)
    assert recorded.prompt == prompt


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second in the locale "C"
def test_a_prompt_that_is_no_text(
    entropi: Callable[..., Done], answering: Callable[..., None], monkeypatch: pytest.MonkeyPatch, errors: str
):
    answering(["a"], "a")
    latin = "caf\xe9".encode("latin-1")
    assert_refused(entropi("ask", os.fsdecode(latin)), "the prompt is not UTF-8 text")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(latin), "utf-8", errors))
    assert_refused(entropi("ask", "-"), "standard input is not UTF-8 text")


def test_logits_that_are_not_revealed_are_refused_before_anything_is_computed(
    entropi: Callable[..., Done], answering: Callable[..., None], tmp_path: Path
):
    answering(["a"], "a", output="argmax")
    done = entropi("ask", "hello", "--logits", tmp_path / "logits.npy", "--record", tmp_path)
    assert_refused(done, "127.0.0.1:9000 reveals no logits (it serves with --output argmax): ask without --logits")
    assert list(tmp_path.iterdir()) == []
    assert entropi("ask", "hello").out == "a\n"


@pytest.mark.parametrize("text", ["\n", " \t", ""])
def test_an_answer_that_nobody_sees_is_told_with_escapes(
    entropi: Callable[..., Done], answering: Callable[..., None], text: str
):
    answering([text], text)
    done = entropi("ask", "hello")
    assert done.out == text + "\n"
    assert f"the answer is {text!r}; 1 tokens in 1.0 s" in done.err
    answering(["a"], "a")
    assert "the answer is" not in entropi("ask", "hello").err


# --- Several prompts --------------------------------------------------------------------------------------------------


def answer_to(prompt: str, text: str) -> records.PrivateRun:
    return records.PrivateRun(
        protocol="cheetah",
        trust="semi-honest",
        server="127.0.0.1:9000",
        prompt=prompt,
        prompt_tokens=[1],
        new_tokens=[2, 3],
        new_text=text,
        stages=[],
        setup_seconds=0.0,
        setup_bytes=0,
        reveal_bytes=0,
        seconds=3.0,
        ring_bits=64,
        fraction_bits=18,
        softmax="power-4",
        batch_prompts=3,
        batch_tokens=6,
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_answers_are_written_in_order_and_after_a_failure_all_that_are_there(
    as_json: bool, capsys: pytest.CaptureFixture[str]
):
    texts = {1: "two\\n\nlines\x1b[2J", 0: "", 3: "four"}
    display = AnswerDisplay(quiet=False, lines=True)
    written = []
    with contextlib.suppress(UserError), display, AnswerLines(display.text, json=as_json) as answers:
        for place, text in texts.items():
            answers.add(place, answer_to(f"prompt {place}", text))
            written.append(capsys.readouterr().out)
        raise UserError("the server is gone")
    written.append(capsys.readouterr().out)
    lines = [piece.splitlines() for piece in written]
    if as_json:
        found = [[json.loads(line)["prompt"] for line in piece] for piece in lines]
        assert found == [[], ["prompt 0", "prompt 1"], [], ["prompt 3"]]
        assert json.loads(lines[1][1])["new_text"] == texts[1]
    else:
        assert lines == [[], ["", "two\\\\n\\nlines\ufffd[2J"], [], ["", "four"]]
    assert "3 answers of 6 tokens in 2.0 s, 180.0 tokens a minute, 4.0 MB" in answers.summary(2.0, 4_000_000)


def test_prompts_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines, objects = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_text('one \n\n{"prompt": "two"}\n')
    objects.write_text('{"prompt": "one\\ntwo", "id": 3}\n\n{"prompt": ""}\n')
    assert read_prompts(lines) == ["one ", '{"prompt": "two"}']
    assert read_prompts(objects) == ["one\ntwo", ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb"))
    assert read_prompts(Path("-")) == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(UserError, match="no prompts in standard input"):
        read_prompts(Path("-"))


def test_a_prompt_of_a_file_ends_at_a_line_end_alone(tmp_path: Path):
    """Not at a form feed or at one of Unicode's separators, which JSON texts may have unescaped."""
    lines, objects = tmp_path / "a.txt", tmp_path / "a.jsonl"
    within = "a\x0cb\u2028c\x85d"
    lines.write_bytes(f"\ufeff{within}\r\ntwo\rthree\n".encode())
    objects.write_text(json.dumps({"prompt": within}, ensure_ascii=False) + "\n")
    assert read_prompts(lines) == [within, "two", "three"]
    assert read_prompts(objects) == [within]
