"""`entropi ask`: the prompt owner's side of private inference."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from json import loads as parse_json
from pathlib import Path
from typing import Any

from entropi import record_files
from entropi.commands.answers import AnswerDisplay, AnswerLines, check_run_folder, summary
from entropi.commands.common import (
    Command,
    Words,
    check_parents,
    drafter,
    print_json,
    read_given,
    read_text,
    secure_engine,
    terminated_like_interrupted,
)
from entropi.errors import UserError


def run(
    prompt: str | None = None,
    batch: Path | None = None,
    server: str = "127.0.0.1:9000",
    max_new_tokens: int = 8,
    chat: bool = False,
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
    full_length: bool = False,
    no_prefix: bool = False,
    canary: bool = False,
    retries: int = 0,
    material: Path | None = None,
    no_prepared: bool = False,
    draft: str = "off",
    memory_gb: float | None = None,
    json: bool = False,
    record: Path | None = None,
    logits: Path | None = None,
) -> None:
    """Let a server's model continue PROMPT without showing it the prompt or the answer.

    Args:
        prompt: text to continue, or - for standard input (the list of processes shows command lines to other users
            of this machine); it does not leave this machine in readable form
        batch: file with several prompts, one a line, or in a .jsonl file one JSON object with "prompt" a line; - for
            lines on standard input. Empty lines are left out. The prompts share passes, as many as the server allows,
            and each answer is the one its prompt has alone. Answers are written one a line, in the file's order; with
            --json the records. The server learns how many share a pass, and how many tokens each has
        server: HOST:PORT of an `entropi serve`
        max_new_tokens: tokens to generate
        chat: put PROMPT into the model's chat template, so that it is answered; otherwise it is continued
        system_prompt: what the chat begins with, as private as PROMPT; for a server without a public one
        tls_cert: certificate of this client, PEM (see `entropi certificates`); not needed on the server's machine
        tls_key: its private key
        server_ca: certificate of the authority that the server's certificate is from
        temperature: of sampling, which happens here, up to 100; 0 takes the likeliest token
        top_k: sample from so many of the likeliest tokens; by default from all that the server reveals
        seed: of sampling
        tokenizer: tokenizer.json of the model, to use in place of the one that the server sends
        tokenizer_sha256: hash of the tokenizer.json that the server must send; without one of these two options only
            tokenizers are applied that give every prompt back unchanged and whose vocabulary alone the server can
            choose: with it, it can still make the number of tokens tell whether certain words occur (docs/security.md)
        pad_to: fill the prompt up, at its front, to a multiple of so many tokens: the server sees that length; the
            model reads the filling, which changes the answer
        pad_with: file with text to fill up with; public text of the prompt's kind changes answers least, and by default
            it is the token that ends a text
        stop: names of the tokens that end an answer; by default those that usually end a text
        full_length: ask for all tokens and cut the answer afterwards, so that its length tells the server nothing
        no_prefix: refuse a server that puts a public text before every prompt; otherwise that text is shown
        canary: ask the public prompt that the server names, and compare the answer with the one it published; it uses
            nothing that is prepared, unless --material says from where
        retries: how often a broken session is continued in a new one, which costs a pass over prompt and answer so far
        material: folder of `entropi prepare`; by default entropi/material in the user's state folder, if it is there
        no_prepared: compute everything now, and keep what was prepared
        draft: off; ngram, what followed the latest words where they occurred before; or the folder of a small model of
            the same tokenizer, which runs here: several tokens are computed in one pass, and those kept that would have
            been chosen anyway; the server learns how many. It pays where waiting dominates (cost --draft-tokens)
        memory_gb: most memory of this side's process, in GB; by default what the model needs, with room; 0: no limit
        json: print the whole record as one JSON object instead of the text
        record: run folder to add the record to, for its report
        logits: .npy file for the logits (tokens, V)
    """
    with secure_engine():
        from entropi.private.preparation.store import existing
        from entropi.private.sessions.client import ask
        from entropi.private.sessions.generation import Watcher
        from entropi.private.sessions.privacy import Privacy
        from entropi.private.sessions.sampling import Sampling
        from entropi.private.wire.certificates import tls_files
        from entropi.private.wire.versions import engine_version

        engine_version()  # the engine itself runs in a process of its own
    sampling = Sampling(temperature, top_k, seed)
    own, filling = read_given(tokenizer, "the tokenizer"), read_given(pad_with, "the filling")
    privacy = Privacy(own, tokenizer_sha256, pad_to, filling, tuple(stop) if stop else None, full_length, no_prefix)
    tls = tls_files(tls_cert, tls_key, server_ca, "--server-ca")
    check_parents(logits)
    check_run_folder(record)
    check, chat = None, chat or system_prompt is not None
    how: dict[str, Any] = dict(retries=retries, memory_gb=memory_gb, chat=chat, system=system_prompt)
    if batch is not None:
        _refuse_beside_batch(prompt, canary, draft, material, logits)
        how |= dict(sampling=sampling, privacy=privacy)
        _ask_batch(server, tls, read_prompts(batch), max_new_tokens, record, how, json=json, unprepared=no_prepared)
        return

    if canary and (chat or draft != "off"):
        raise UserError(f"the canary's prompt is no chat: give either --canary or {'--chat' if chat else '--draft'}")
    if canary:
        if prompt is not None:
            raise UserError("the canary's prompt is the server's: give either PROMPT or --canary")
        check = _CanaryCheck(server, tls)
        prompt, max_new_tokens = check.published.prompt, len(check.published.tokens)
        sampling, privacy = Sampling(), replace(privacy, pad_to=1, full_length=True)
    text, drafts = _prompt(prompt), drafter(draft)
    if logits is not None:
        _refuse_without_logits(server, tls)

    display = AnswerDisplay(quiet=json)
    # Preparing takes minutes and is for prompts; who wants to check that way as well says so.
    unprepared = no_prepared or (canary and material is None)
    kept = contextlib.nullcontext() if unprepared else existing(material)
    with kept as store, display, terminated_like_interrupted():  # nothing stays in the temporary folder
        watcher = Watcher(display.begin, display.stage, display.text, display.status)
        how |= dict(sampling=sampling, privacy=privacy, store=store, draft=drafts)
        answer = ask(server, text, max_new_tokens, watcher, tls=tls, **how)
        display.finish(answer.record.new_text)

    if check is not None:
        check.compare(answer)
    if record is not None:
        record_files.append(record / record_files.RECORDS_FILE, answer.record)
    if logits is not None:
        _write_logits(logits, answer.logits, server)
    if json:
        print_json(answer.record)
        return
    display.status(summary(answer.record))
    if check is not None:
        display.status(f"the canary holds: {len(check.published.tokens)} tokens as published")


def _refuse_beside_batch(
    prompt: str | None, canary: bool, draft: str, material: Path | None, logits: Path | None
) -> None:
    """Refuse what is for one prompt a session."""
    others = {
        "PROMPT": prompt is not None,
        "--canary": canary,
        "--draft": draft != "off",
        "--material": material is not None,
        "--logits": logits is not None,
    }
    for name, given in others.items():
        if given:
            raise UserError(f"{name} is for one prompt a session: leave it out, or --batch")


def _ask_batch(
    server: str,
    tls: Any,
    prompts: list[str],
    max_new_tokens: int,
    record: Path | None,
    options: dict[str, Any],
    *,
    json: bool,
    unprepared: bool,
) -> None:
    """Ask several prompts; answers are written as soon as those before them are, and after a failure all there are."""
    from entropi.private.preparation.store import default_folder
    from entropi.private.sessions.client import connect
    from entropi.private.sessions.generation import Watcher

    display, started = AnswerDisplay(quiet=False, lines=True), time.monotonic()
    answers = AnswerLines(display.text, json=json)
    with display, answers, terminated_like_interrupted():
        if default_folder().is_dir() and not unprepared:
            display.status("what is prepared is for one prompt a session and is kept: everything is computed now")

        def answered(place: int, answer: Any) -> None:
            if record is not None:
                record_files.append(record / record_files.RECORDS_FILE, answer.record)
            answers.add(place, answer.record)

        watcher = Watcher(display.begin, display.stage, status=display.status)
        connect(server, tls).ask_batch(prompts, max_new_tokens, watcher=watcher, answered=answered, **options)
    if not json:
        display.status(answers.summary(time.monotonic() - started, display.moved))


def read_prompts(file: Path) -> list[str]:
    """The prompts in a file, or on standard input for "-".

    Raises:
        UserError: none, no UTF-8 text, or a line of JSON without a prompt.
    """
    if str(file) == "-":
        try:
            text = sys.stdin.read()
            text.encode()
        except UnicodeError:
            raise UserError("standard input is not UTF-8 text") from None
    else:
        text = read_text(file, "the prompts")
    # `splitlines` would also part a prompt, or a JSON text, at a form feed or another of Unicode's line ends in it.
    ends = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = [(number, line) for number, line in enumerate(ends, 1) if line.strip()]
    if not lines:
        raise UserError(f"there are no prompts in {'standard input' if str(file) == '-' else file}")
    if file.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_prompt_in(line, f"line {number} of {file}") for number, line in lines]


def _prompt_in(line: str, where: str) -> str:
    try:
        found = parse_json(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is no JSON") from None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise UserError(f'{where} is no JSON object with a text "prompt"')
    return str(found["prompt"])


class _CanaryCheck:
    """The public prompt and answer that a server publishes, for comparison with the answer that it gives."""

    def __init__(self, server: str, tls: Any) -> None:
        from entropi.private.sessions.client import connect

        serving = connect(server, tls)
        if serving.canary is None:
            raise UserError(f"{server} has published no canary")
        self.published, self._settings = serving.canary, serving.settings

    def compare(self, answer: Any) -> None:
        from entropi.private.sessions.canary import complaint

        if (difference := complaint(self.published, answer, self._settings)) is not None:
            raise UserError(f"the canary does not hold: {difference}; do not rely on this server's answers")


def _prompt(prompt: str | None) -> str:
    """The text to continue, from standard input for "-"."""
    from entropi.private.sessions.tokenization import MAX_PROMPT

    if prompt is None:
        raise UserError("PROMPT is missing (see entropi ask --help)")
    source = "standard input" if prompt == "-" else "the prompt"
    try:
        text = sys.stdin.read(MAX_PROMPT + 1) if prompt == "-" else prompt  # more is refused, whatever it is
        text.encode()  # bytes that could not be decoded may have arrived as lone surrogates
    except UnicodeError:
        raise UserError(f"{source} is not UTF-8 text") from None
    return text


def _refuse_without_logits(server: str, tls: Any) -> None:
    """Refuse to ask for logits that the server does not reveal, before the answer is computed."""
    from entropi.private.sessions.client import connect

    if connect(server, tls).settings.output == "argmax":
        raise UserError(
            f"{server} reveals no logits (it serves with --output argmax): ask without --logits, or have it serve "
            "with --output logits or top_k"
        )


def _write_logits(path: Path, logits: list[Any], server: str) -> None:
    import numpy as np

    if not logits:  # the server was started anew with other settings meanwhile
        raise UserError(f"{server} reveals no logits")
    with open(path, "wb") as file:
        np.save(file, np.stack(logits))


COMMAND = Command(
    run,
    place=9,
    words={"prompt": Words(nargs="?", positional=True), "stop": Words("TOKEN", default=None)},
)
