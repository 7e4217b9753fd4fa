"""What a server looks at before it listens: its surroundings, its tokenizer, and whether its model fits fixed point."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from entropi.console import without_controls
from entropi.errors import UserError
from entropi.private.admission.audit import Audit
from entropi.private.admission.door import check_free
from entropi.private.admission.limits import Limits
from entropi.private.admission.monitoring import Counters
from entropi.private.admission.quota_stores import open_store
from entropi.private.admission.quotas import Quota
from entropi.private.compute.description import Description
from entropi.private.compute.fixed_point import select_fraction_bits, sweep_vocabulary
from entropi.private.compute.prefix import with_prefix
from entropi.private.compute.program import cached_tokens
from entropi.private.compute.self_test import self_test
from entropi.private.compute.settings import Settings
from entropi.private.sessions import findings
from entropi.private.sessions.calibration import calibration_sequences
from entropi.private.sessions.memory import needed_memory
from entropi.private.sessions.server_session import log
from entropi.private.sessions.tokenization import objections, own_tokenizer, sha256_of_tokenizer, text_ids
from entropi.private.wire.addresses import listening, parse_address
from entropi.private.wire.certificates import Tls
from entropi.private.wire.messages import (
    MAX_SERVER_MESSAGE,
    MAX_TOKENS,
)
from entropi.private.wire.revocation import Watched

PROGRESS_SECONDS = 20.0
PREFIXES_TRIED = 4  # each takes as long as the look at the calibration text
SHORT_TEST_TOKENS = 8  # of the test of known answers, where an earlier start has passed the whole one


def check_surroundings(
    listen: str,
    limits: Limits,
    tls: Tls | None,
    metrics: str,
    revoked: Path | None = None,
    audit_log: Path | None = None,
    quota_store: str | None = None,
) -> tuple[tuple[str, int], tuple[str, int]]:
    """Look at everything that a server needs besides its model, because looking at the model takes minutes.

    Args:
        listen: and the others, see `serve`.

    Returns:
        host and port to listen on, and those for metrics.

    Raises:
        UserError: something cannot be used, in one line.
    """
    address, watched = parse_address(listen, tls=tls is not None), parse_address(metrics)
    if revoked is not None and tls is None:
        raise UserError("certificates can only be revoked where there are any: TLS files are missing")
    if tls is not None:
        Watched(tls, revoked)

    for where in (address, watched):
        with listening(where):
            check_free(*where)
    Audit(Counters(), audit_log).close()

    async def check_store() -> None:
        quota = Quota(limits, open_store(quota_store, limits))
        try:
            await quota.check()
        finally:
            await quota.close()

    asyncio.run(check_store())
    if quota_store is not None and limits.client_sessions is None and limits.client_tokens is None:
        log.warning("the quota store keeps nothing: neither client_sessions nor client_tokens limits anybody")
    return address, watched


def check_tokenizer(tokenizer: str, description: Description) -> None:
    """Raise `UserError` for what every client would refuse."""
    try:
        ids = own_tokenizer(tokenizer).tokenizer.get_vocab(with_added_tokens=True)
    except UserError:
        raise UserError("the model's tokenizer.json is damaged") from None
    # Fewer tokens than rows are usual: many checkpoints are padded to a multiple of 64 or 128 rows.
    if beyond := sorted((number, token) for token, number in ids.items() if number >= description.vocab_size):
        first = without_controls(repr(beyond[0][1][:40]))
        raise UserError(
            f"{len(beyond)} of the tokenizer's {len(ids)} tokens have an id that the model, which has "
            f"{description.vocab_size} rows, does not know, {first} ({beyond[0][0]}) for example: take them out of "
            "tokenizer.json, if they were added to it only, or use the tokenizer that the model was trained with"
        )
    if len(tokenizer.encode()) > MAX_SERVER_MESSAGE // 2:  # the message around it escapes quotes
        raise UserError(f"the model's tokenizer.json is longer than {MAX_SERVER_MESSAGE // 2} bytes")
    log.info("the tokenizer's SHA-256 is %s", sha256_of_tokenizer(tokenizer))
    if found := objections(tokenizer, description.vocab_size):
        log.warning("clients will not apply this tokenizer unless they name its SHA-256: %s", "; ".join(found))


def verified_settings(
    folder: Path,
    description: Description,
    weights: Mapping[str, np.ndarray],
    settings: Settings,
    choose: bool,
    self_tests: Sequence[Literal["ref2k", "cheetah"]],
    *,
    tokenizer: str,
    recheck: bool,
    prefix: Sequence[int] = (),
    calibration: str | None = None,
) -> Settings:
    """The settings that sessions can rely on, once the model has been looked at and its tests are passed.

    Prompts continue the public `prefix`, whose keys and values stand beside the weights. Values are looked at on a text
    for `calibration`, by default the package's own, as the `tokenizer` cuts it.

    What an earlier start has found of the same model is not found out again, which takes minutes for a large one,
    unless `recheck` asks for it. But that was another day, and perhaps another machine with the same cache: so a few
    tokens are computed again in fixed point on every start.
    """
    sequences = calibration_sequences(tokenizer, description, weights, calibration)
    key = findings.key_of(folder, settings, choose, prefix, sequences)
    known = None if recheck else findings.read(key)
    if known is None:
        log.info("looking at the values of all tokens, which takes minutes for a large model")
        sweep, passed = sweep_vocabulary(description, weights, settings, _progress()), list[str]()
    else:
        log.info("an earlier start has looked at the values of this model's tokens; --recheck looks again")
        sweep, passed = known.sweep, list(known.passed)

    started = time.monotonic()
    try:
        settled, reasons = select_fraction_bits(description, weights, settings, sequences, choose=choose, sweep=sweep)
    except UserError as error:
        raise UserError(f"{error}{_prefix_that_would_do(description, weights, settings, tokenizer)}") from None
    log.info("looked at %d tokens of calibration text in %.0f s", sum(map(len, sequences)), time.monotonic() - started)
    for line in reasons:
        log.info("%s", line)

    for protocol in self_tests:
        tokens = sweep.worst
        if protocol in passed:
            log.info("an earlier start has passed the test of known answers (%s)", protocol)
            if protocol != "ref2k":
                continue
            tokens = tokens[:SHORT_TEST_TOKENS]
        log.info("%s", self_test(folder, settled, protocol, tokens, prefix))
        passed += [protocol] if protocol not in passed else []

    if known is None or list(known.passed) != passed:
        findings.keep(findings.Findings(key, sweep, tuple(passed)))
    return settled


def _progress() -> Callable[[int, int], None]:
    """Log how far the look at all tokens has come, and how long it will take, every 20 seconds and at the end."""
    started = told = time.monotonic()

    def watch(tokens: int, of: int) -> None:
        nonlocal told
        now = time.monotonic()
        if tokens < of and now - told < PROGRESS_SECONDS:
            return
        told, left = now, (now - started) * (of - tokens) / tokens
        if tokens < of:
            log.info("%d of %d tokens, about %.0f s more", tokens, of, left)
        elif now - started > PROGRESS_SECONDS:
            log.info("%d tokens looked at in %.0f s", of, now - started)

    return watch


def _prefix_that_would_do(
    description: Description, weights: Mapping[str, np.ndarray], settings: Settings, tokenizer: str
) -> str:
    """What to add to a refusal: the special token behind which values would fit, computed in the clear; or nothing.

    Pretrained models have massive activations in the first token, which then is no part of the secure program.
    """
    if cached_tokens(weights):
        return ""
    front, _, special = text_ids(tokenizer, "a")
    names = own_tokenizer(tokenizer).tokenizer
    for token in dict.fromkeys([*front, *special][:PREFIXES_TRIED]):
        if token >= description.vocab_size or description.positions < 2:
            continue
        behind = with_prefix(description, weights, [token])
        sequences = calibration_sequences(tokenizer, description, behind)
        try:
            select_fraction_bits(description, behind, settings, sequences, choose=True)
        except UserError:
            continue
        name = without_controls(str(names.id_to_token(token)))
        return f"; behind a public prefix of {name} they would fit: write that into a file and name it by --prefix-file"
    return ""


def check_prefix(prefix: Sequence[int], description: Description) -> None:
    """Raise `UserError` for a public prefix that the model cannot read, or that leaves no room for a prompt."""
    if max(prefix, default=0) >= description.vocab_size:
        raise UserError(f"the prefix has a token {max(prefix)}, and the model {description.vocab_size} tokens")
    if len(prefix) >= (most := min(description.positions, MAX_TOKENS)):
        raise UserError(f"the prefix has {len(prefix)} tokens, which leaves no room for a prompt in {most}")


def warn_of_little_memory(limits: Limits, description: Description) -> None:
    """Say in the log if the memory limit is below what the shortest of sessions is predicted to need."""
    least = needed_memory(description, 2)
    if limits.memory_gb and limits.memory_gb * 1e9 < least:
        log.warning(
            "memory_gb %g may be too little: about %.1f GB are predicted for the shortest of sessions",
            limits.memory_gb,
            least / 1e9,
        )
