"""`entropi serve`: the model owner's side of private inference."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec

from entropi.chat import ChatForm, head_of, ids_of, load_form
from entropi.commands import fold
from entropi.commands.common import (
    Command,
    check_parents,
    read_given,
    refuse_ignored_softmax,
    refuse_unknown_families,
    secure_engine,
    terminated_like_interrupted,
)
from entropi.downloads import on_disk
from entropi.errors import UserError
from entropi.softmax import USUAL_FOR_EXACT, parse_for_exact
from entropi.temporary import swept_folder

_SELF_TESTS: dict[str, tuple[Literal["ref2k", "cheetah"], ...]] = {
    "none": (),
    "ref2k": ("ref2k",),
    "cheetah": ("ref2k", "cheetah"),
}


def run(
    model: str,
    listen: str = "127.0.0.1:9000",
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    clients_ca: Path | None = None,
    metrics: str = "127.0.0.1:0",
    log: Literal["text", "json"] = "text",
    max_sessions: int = 1,
    max_queue: int = 8,
    queue_seconds: float = 600.0,
    max_new_tokens: int = 64,
    session_seconds: float = 3600.0,
    stall_seconds: float = 600.0,
    conversation_tokens: int = 1024,
    conversation_seconds: float = 14_400.0,
    idle_seconds: float = 600.0,
    memory_gb: float | None = None,
    client_sessions: int | None = None,
    client_tokens: int | None = None,
    max_startups: int = 64,
    source_startups: int = 48,
    draft_tokens: int = 8,
    batch_prompts: int = 8,
    batch_tokens: int = 2048,
    revoked: Path | None = None,
    audit_log: Path | None = None,
    quota_store: str | None = None,
    material: Path | None = None,
    material_gb: float = 50.0,
    client_material_gb: float = 10.0,
    client_material_sessions: int = 50,
    material_days: float = 7.0,
    output: Literal["logits", "top_k", "argmax"] = "logits",
    choices: int = 8,
    round_logits: int | None = None,
    embedding: Literal["private", "public"] = "private",
    softmax: str | None = None,
    fraction_bits: int | None = None,
    self_test: Literal["none", "ref2k", "cheetah"] = "ref2k",
    canary: str | None = None,
    prefix_file: Path | None = None,
    chat: bool = False,
    system_prompt: str | None = None,
    calibration_text: Path | None = None,
    recheck: bool = False,
) -> None:
    """Answer prompts without seeing them: the model owner's side.

    Args:
        model: run folder, saved model, or the output of `entropi fold`, of any architecture; or another family's model,
            which is converted first: a folder that transformers saved, a GGUF file, or OWNER/NAME on the hub
        listen: HOST:PORT; anything but a loopback address needs the three TLS files; port 0 takes a free one
        tls_cert: certificate of this server, PEM (see `entropi certificates`)
        tls_key: its private key
        clients_ca: certificate of the authority whose clients are answered
        metrics: HOST:PORT for /health and /metrics, loopback only; port 0 takes a free one, which the log names
        log: lines for people, or JSON objects for programs
        max_sessions: sessions at a time
        max_queue: clients that may wait for one
        queue_seconds: how long they may wait
        max_new_tokens: most tokens a session may ask for
        session_seconds: time limit of a session
        stall_seconds: time limit of a session in which nothing happens
        conversation_tokens: most tokens of a conversation (see `entropi chat`), its messages and answers together; 0
            refuses conversations
        conversation_seconds: time limit of a conversation, in place of --session-seconds
        idle_seconds: time that a conversation may wait for its next message, while it keeps its place
        memory_gb: most memory of a session's process, in GB; by default what the model needs, with room; 0: no limit
        client_sessions: sessions at a time of one client certificate; no limit by default
        client_tokens: tokens within 24 hours of one client certificate, drafts included; no limit by default
        max_startups: connections that have no session yet; beyond these the oldest are ended for new ones
        source_startups: of these, of one address or one client certificate
        draft_tokens: most tokens that a client may draft for one pass, up to 16; it learns the logits after each; 0
            takes no drafts, and nor does an output of likeliest tokens only
        batch_prompts: most prompts that may share the passes of a session (ask --batch), up to 64; 1 takes them one by
            one only
        batch_tokens: most tokens of these prompts and their answers together
        revoked: file of revoked certificates: a revocation list (see `entropi certificates`), fingerprints, or both;
            read again, like the TLS files, when it changes and on SIGHUP
        audit_log: file to add one JSON object to for every refusal and session; by default they go to the log
        quota_store: file, or redis://HOST:PORT/NUMBER for several servers, that keeps what clients use of their two
            limits; by default entropi/quotas.sqlite in the user's state folder
        material: folder for what clients prepare (see `entropi prepare`), as secret as keys; without it nothing is
        material_gb: most of it, in GB
        client_material_gb: most of it for one client
        client_material_sessions: most prepared sessions of one client, up to 1,000
        material_days: after which it is destroyed, used or not, up to 30; earlier if the client keeps its half for less
        output: what the client learns of each token: all logits, the likeliest tokens with theirs, or the likeliest
        choices: how many tokens top_k reveals, 1 to 16
        round_logits: binary places that the logits a client learns are rounded to, 0 to 8: 3 for steps of 1/8
        embedding: public gives the token embeddings to every client and saves their part of the computation
        softmax: what is evaluated for a model trained with the exact softmax: quartic (by default), right to 0.0002, or
            power-1 to power-8, (1 + x/2^t)^(2^t), the larger t, the more bytes and the less error; other models bring
            their own
        fraction_bits: of fixed-point numbers, 12 to 22: more precision, less range; by default chosen for the model,
            otherwise checked, and refused with the numbers if values could overflow or get lost
        self_test: before anybody is answered, compare the program's logits on a known prompt with plaintext's: ref2k in
            the engine's fixed-point numbers, cheetah also with the cryptography
        canary: public prompt whose answer clients are told, so that they can check what they receive (ask --canary)
        prefix_file: public text that every prompt continues, a chat template's header and system prompt for example, in
            which special tokens are spelled out; it is computed once, in the clear, and clients are shown it
        chat: make what the model's chat template begins every conversation with, its own system prompt included, the
            public text that every prompt continues
        system_prompt: the same with this system prompt, which is public
        calibration_text: file of text to find the ranges of the model's values on, of the kind that clients will send;
            by default a page of prose, code and numbers. Up to 2,048 tokens of it are used
        recheck: look at all tokens and run the whole self-test although an earlier start on this machine has done so
            with the same model, settings and versions
    """
    given = locals()  # every limit is an option
    with secure_engine():
        from entropi.private.admission.limits import Limits
        from entropi.private.admission.quota_stores import is_url
        from entropi.private.compute.folded import load_description
        from entropi.private.sessions.readiness import check_surroundings
        from entropi.private.sessions.server import serve
        from entropi.private.sessions.tokenization import public_ids
        from entropi.private.wire.certificates import tls_files

    _log_to_standard_error(log)
    settings = _settings(softmax, embedding, output, choices, round_logits, fraction_bits)
    limits = Limits(**{name: given[name] for name in Limits.__dataclass_fields__})
    prefix = _prefix(prefix_file, chat or system_prompt is not None)
    calibration = read_given(calibration_text, "the calibration text")

    # Mistakes are told before a model is folded, which takes a while.
    tls = tls_files(tls_cert, tls_key, clients_ca, "--clients-ca")
    check_parents(audit_log, None if quota_store is None or is_url(quota_store) else Path(quota_store))
    if not (Path(model) / "folded.json").exists():
        check_surroundings(listen, limits, tls, metrics, revoked, audit_log, quota_store)
    refuse_unknown_families(path := on_disk(model))

    kept = _material(material, material_gb, client_material_gb, client_material_sessions, material_days)
    with terminated_like_interrupted(), kept as store, swept_folder("entropi-serve-") as temporary:
        folder = _folded(path, temporary)
        refuse_ignored_softmax(softmax, load_description(folder).softmax, "the model")
        tokenizer = _tokenizer(folder, path)
        form, begun = _chat(folder, tokenizer, system_prompt, begins=chat or system_prompt is not None)
        serve(
            folder,
            tokenizer,
            listen,
            settings,
            limits,
            tls,
            metrics,
            choose_fraction_bits=fraction_bits is None,
            revoked=revoked,
            audit_log=audit_log,
            quota_store=quota_store,
            self_tests=_SELF_TESTS[self_test],
            canary=canary,
            recheck=recheck,
            prefix=public_ids(tokenizer, prefix) if prefix is not None else begun,
            chat=form,
            calibration=calibration,
            material=store,
        )


def _prefix(file: Path | None, chats: bool) -> str | None:
    """The public text in this file, where there is one, which must not compete with the chat template's."""
    prefix = read_given(file, "the prefix")
    if prefix is not None and chats:
        raise UserError("give --prefix-file, or --chat or --system-prompt, which make a prefix of the chat template")
    return prefix


def _material(folder: Path | None, most: float, most_of_client: float, sessions_of_client: int, days: float) -> Any:
    """The store in `folder` as a context manager, of None where there is none; sizes in GB."""
    from entropi.private.preparation.store import DAY_SECONDS, MOST_GB, Store, quota_for_one

    if folder is None:
        return contextlib.nullcontext()
    if not 0 < most <= MOST_GB:
        raise UserError(f"--material-gb is {most:g} but must be more than 0 and at most {MOST_GB:,.0f}")
    options = "--client-material-gb", "--client-material-sessions"
    quota = msgspec.structs.replace(quota_for_one(most_of_client, sessions_of_client, *options), size=int(most * 1e9))
    return Store(folder, expires=days * DAY_SECONDS, quota=quota)


def _log_to_standard_error(log: Literal["text", "json"]) -> None:
    from entropi.private.admission.logs import JsonLines, PlainLines

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines() if log == "json" else PlainLines())


def _settings(
    softmax: str | None,
    embedding: str,
    output: str,
    choices: int,
    round_logits: int | None,
    fraction_bits: int | None,
) -> Any:
    """What the server decides for every session, checked."""
    from entropi.private.compute.settings import Settings

    if round_logits is not None and output == "argmax":
        raise UserError("--round-logits has nothing to round with --output argmax, which reveals no logits")
    chosen: dict[str, Any] = {
        "exact_softmax_as": str(parse_for_exact(softmax or USUAL_FOR_EXACT, "--softmax")),
        "embedding": embedding,
        "output": output,
        "choices": choices,
        "logit_bits": round_logits,
    }
    if fraction_bits is not None:
        chosen["fraction_bits"] = fraction_bits
    try:
        return msgspec.convert(chosen, Settings)
    except msgspec.ValidationError as error:
        raise UserError(f"these settings are not possible: {_as_option(str(error), chosen)}") from None


def _as_option(complaint: str, given: dict[str, Any]) -> str:
    """A complaint about one of the fields of `Settings`, with the name of its option and what was given for it."""
    found = re.fullmatch(r"Expected (.*) - at `\$\.(\w+)`", complaint)
    if found is None:
        return complaint
    option = {"logit_bits": "round_logits"}.get(found[2], found[2]).replace("_", "-")
    return f"--{option} is {given[found[2]]}, expected {found[1].replace('`', '')}"


def _folded(model: Path, temporary: Path) -> Path:
    """The folder of the folded model: `model` itself, or what it is folded into now."""
    if (model / "folded.json").exists():
        return model
    fold.run(str(model), temporary)
    return temporary


def _chat(
    folder: Path, tokenizer: str, system_prompt: str | None, *, begins: bool
) -> tuple[ChatForm | None, list[int]]:
    """The chat form in a folded model's folder, and where every prompt `begins` with its first tokens, these."""
    from entropi.private.sessions.tokenization import own_tokenizer
    from entropi.private.wire.messages import MAX_TOKENS

    form = load_form(folder)
    if not begins:
        return form, []
    if form is None:
        raise UserError("this model has no chat template, or none that is text around messages: see `entropi fold`")
    # What clients would say before it could only stand behind it.
    form = msgspec.structs.replace(form, system=None) if system_prompt is None else form.with_system(system_prompt)
    encoder = own_tokenizer(tokenizer)
    begun = ids_of(head_of(form.first), lambda text: encoder.encode(text, MAX_TOKENS))
    if not begun:
        raise UserError("this model's chat template begins with no special token: use --prefix-file")
    return form, begun


def _tokenizer(folder: Path, model: Path) -> str:
    """The content of tokenizer.json as it is, for its hash."""
    try:
        return (folder / "tokenizer.json").read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer of {model}: {error}") from None


COMMAND = Command(run, place=8)
