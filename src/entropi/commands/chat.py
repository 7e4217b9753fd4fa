"""`entropi chat`: a conversation with a model that does not see it."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from entropi import record_files
from entropi.commands.answers import ANSWER_CONTROLS, AnswerDisplay, check_run_folder, summary
from entropi.commands.common import Command, Words, drafter, read_given, secure_engine, terminated_like_interrupted
from entropi.console import make_console, without_controls
from entropi.errors import UserError

_HELP = "/exit ends the conversation, /new begins another, /history shows it; Ctrl-C ends an answer early"


def run(
    server: str = "127.0.0.1:9000",
    max_new_tokens: int = 128,
    max_tokens: int | None = None,
    system_prompt: str | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    server_ca: Path | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    tokenizer: Path | None = None,
    tokenizer_sha256: str | None = None,
    pad_to: int = 1,
    pad_with: Path | None = None,
    stop: list[str] | None = None,
    no_prefix: bool = False,
    retries: int = 1,
    material: Path | None = None,
    no_prepared: bool = False,
    draft: str = "off",
    memory_gb: float | None = None,
    record: Path | None = None,
) -> None:
    """Talk with a server's model: it sees neither your messages nor its answers.

    Messages are lines of standard input. The conversation is one session: what was said stays secret-shared between
    both sides, so that a message costs its own tokens and its answer's.

    Args:
        server: HOST:PORT of an `entropi serve`
        max_new_tokens: most tokens of an answer
        max_tokens: most tokens of a session, messages and answers together; by default what the server allows
        system_prompt: what the conversation begins with, as private as the messages; for a server without a public one
        tls_cert: certificate of this client, PEM (see `entropi certificates`); not needed on the server's machine
        tls_key: its private key
        server_ca: certificate of the authority that the server's certificate is from
        temperature: of sampling, which happens here, up to 100; 0 takes the likeliest token
        top_k: sample from so many of the likeliest tokens; by default from all that the server reveals
        seed: of sampling
        tokenizer: tokenizer.json of the model, to use in place of the one that the server sends
        tokenizer_sha256: hash of the tokenizer.json that the server must send (see `entropi ask --help`)
        pad_to: fill every message up, at its front, to a multiple of so many tokens: the server sees that length
        pad_with: file with text to fill up with; by default it is the token that ends a text
        stop: names of the tokens that end an answer; by default those that usually do, and the chat template's
        no_prefix: refuse a server that puts a public text before every conversation; otherwise that text is shown
        retries: how often a broken session is continued in a new one, which reads the conversation again
        material: folder of `entropi prepare`; by default entropi/material in the user's state folder, if it is there
        no_prepared: compute everything now, and keep what was prepared
        draft: off; ngram, what followed the latest words where they occurred before; or the folder of a small model of
            the same tokenizer, which runs here: several tokens are computed in one pass, and those kept that would have
            been chosen anyway; the server learns how many. It pays where waiting dominates (cost --draft-tokens)
        memory_gb: most memory of this side's process, in GB; by default what the model needs, with room; 0: no limit
        record: run folder to add the answers' records to, for its report
    """
    with secure_engine():
        from entropi.private.preparation.store import existing
        from entropi.private.sessions.client import connect
        from entropi.private.sessions.privacy import Privacy
        from entropi.private.sessions.sampling import Sampling
        from entropi.private.wire.certificates import tls_files
        from entropi.private.wire.messages import MAX_TOKENS
        from entropi.private.wire.versions import engine_version

        engine_version()  # the engine itself runs in a process of its own
    own, filling = read_given(tokenizer, "the tokenizer"), read_given(pad_with, "the filling")
    options: dict[str, Any] = dict(
        system=system_prompt,
        max_tokens=MAX_TOKENS if max_tokens is None else max_tokens,
        sampling=Sampling(temperature, top_k, seed),
        retries=retries,
        privacy=Privacy(own, tokenizer_sha256, pad_to, filling, tuple(stop) if stop else None, no_prefix=no_prefix),
        memory_gb=memory_gb,
        draft=drafter(draft),
    )
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}, at least 1 is needed")
    check_run_folder(record)

    connection = connect(server, tls_files(tls_cert, tls_key, server_ca, "--server-ca"))
    connection.check_chat()
    console = make_console()
    console.print(f"{connection.trust}.\n{_HELP}.", markup=False)

    with contextlib.nullcontext() if no_prepared else existing(material) as store, terminated_like_interrupted():
        options["store"] = store
        said: list[tuple[str, str]] = []
        conversation = connection.conversation(**options)
        try:
            for message in _messages():
                if message == "/exit":
                    break
                if message == "/new":
                    conversation.close()
                    conversation, said = connection.conversation(**options), []
                elif message == "/history":
                    for question, answer in said:
                        print(f"> {question}\n{answer}", flush=True)
                elif message.startswith("/"):
                    console.print(_HELP, markup=False)
                else:
                    said += _turn(conversation, message, max_new_tokens, record)
        finally:
            conversation.close()


def _messages() -> Iterator[str]:
    """Lines of standard input that hold something; on a terminal they can be edited, and earlier ones found again."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() uses it; it keeps what was typed in memory only)
    while True:
        try:
            line = input("> ") if terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        except UnicodeError:
            raise UserError("standard input is not UTF-8 text") from None
        if line.strip():
            yield line.strip()


def _turn(conversation: Any, message: str, max_new_tokens: int, record: Path | None) -> list[tuple[str, str]]:
    """Have a message answered and shown; the pair of both, or nothing where that failed."""
    from entropi.private.sessions.generation import Watcher

    display = AnswerDisplay(quiet=False)
    try:
        with display, _interrupted_at_a_token(conversation, display):
            watcher = Watcher(display.begin, display.stage, display.text, display.status)
            answer = conversation.say(message, max_new_tokens, watcher)
            display.finish(answer.record.new_text)
    except UserError as error:
        if not sys.stdin.isatty():
            raise
        display.status(f"entropi: {error}")
        return []
    if record is not None:
        record_files.append(record / record_files.RECORDS_FILE, answer.record)
    display.status(summary(answer.record))
    return [(message, without_controls(answer.record.new_text, ANSWER_CONTROLS))]


@contextlib.contextmanager
def _interrupted_at_a_token(conversation: Any, display: AnswerDisplay) -> Iterator[None]:
    """Let the first Ctrl-C end an answer with the token that is being computed, and only the second the program."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        conversation.stop()
        display.status("the answer ends with the token that is being computed; Ctrl-C once more ends the conversation")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


COMMAND = Command(run, place=11, words={"stop": Words("TOKEN", default=None)})
