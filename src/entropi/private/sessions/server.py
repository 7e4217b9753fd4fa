"""The model owner's side: a control channel over WebSocket, and one party process for every session."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from safetensors.numpy import save_file

from entropi.chat import ChatForm
from entropi.errors import UserError
from entropi.private.admission.audit import Audit
from entropi.private.admission.door import Door, cut, startups_that_fit
from entropi.private.admission.limits import Limits
from entropi.private.admission.logs import Sparing
from entropi.private.admission.monitoring import Counters, monitoring_app
from entropi.private.admission.quota_stores import open_store
from entropi.private.admission.quotas import Quota
from entropi.private.admission.slots import Slots
from entropi.private.compute import lookahead
from entropi.private.compute.description import Description
from entropi.private.compute.folded import WEIGHTS_FILE, load_folded, sha256_of
from entropi.private.compute.prefix import names, with_prefix
from entropi.private.compute.program import compute_on_processor
from entropi.private.compute.settings import Settings
from entropi.private.preparation.store import Store
from entropi.private.sessions.canary import make_canary
from entropi.private.sessions.material import Material
from entropi.private.sessions.party_handle import confinement
from entropi.private.sessions.readiness import (
    check_prefix,
    check_surroundings,
    check_tokenizer,
    verified_settings,
    warn_of_little_memory,
)
from entropi.private.sessions.server_session import LEAVE_SECONDS, REVOKED, dismiss, log, run_session
from entropi.private.sessions.server_state import ServerState
from entropi.private.sessions.tokenization import own_tokenizer
from entropi.private.wire.addresses import listening, spelled
from entropi.private.wire.certificates import Peer, Tls
from entropi.private.wire.messages import (
    Welcome,
    encode,
)
from entropi.private.wire.revocation import Watched
from entropi.private.wire.server_channel import (
    SEND_SECONDS,
    text_frames,
)
from entropi.temporary import swept_folder

TABLE_BYTES_PER_SECOND = 50_000  # a client that takes the token embeddings more slowly is not waited for
WATCH_SECONDS = 2.0  # between two looks at files that may be replaced
METRICS_CONNECTIONS = 16
request_log = logging.getLogger("entropi.server.requests")  # aiohttp's, for what is not even HTTP


def serve(
    folder: Path,
    tokenizer: str,
    listen: str,
    settings: Settings,
    limits: Limits,
    tls: Tls | None = None,
    metrics: str = "127.0.0.1:0",
    *,
    choose_fraction_bits: bool = False,
    revoked: Path | None = None,
    audit_log: Path | None = None,
    quota_store: str | None = None,
    self_tests: Sequence[Literal["ref2k", "cheetah"]] = (),
    canary: str | None = None,
    recheck: bool = False,
    prefix: Sequence[int] = (),
    chat: ChatForm | None = None,
    calibration: str | None = None,
    material: Store | None = None,
) -> None:
    """Answer clients until SIGINT or SIGTERM.

    Args:
        folder: of the folded model.
        tokenizer: its JSON; public.
        listen: "HOST:PORT"; port 0 takes a free one, which the log names.
        tls: only clients with a certificate of its authority are answered; needed unless `listen` is loopback.
        metrics: "HOST:PORT" for `/health` and `/metrics`, which know no certificates: loopback only.
        choose_fraction_bits: by the range check, instead of checking those of `settings`.
        revoked: certificates that are refused, see `Revoked.read`; reread like the TLS files when they change.
        audit_log: file for who was refused and who was answered; None for the log.
        quota_store: path or URL, see `open_store`; None for a file of its own.
        self_tests: ways in which the program is run on a known prompt first, see `self_test`.
        canary: a public prompt whose answer clients are told, so that they can ask for it.
        prefix: public token ids that every prompt continues, see `compute.prefix`.
        chat: what stands around the messages of conversations.
        calibration: text on which the model's values are looked at; None for the package's own.
        material: where prepared material is kept; None to prepare nothing.
        recheck: look at all tokens and run the whole tests although an earlier start has done so with this model.

    Raises:
        UserError: an address in use or not allowed, unusable TLS files, a damaged model, or one whose values fixed
            point would not hold; a self-test that fails, or a canary that would prove nothing.
    """
    address, watched = check_surroundings(listen, limits, tls, metrics, revoked, audit_log, quota_store)
    files = Watched(tls, revoked) if tls is not None else None
    limits = replace(limits, max_startups=startups_that_fit(limits))

    description, weights = load_folded(folder)
    check_tokenizer(tokenizer, description)
    if settings.output == "top_k" and settings.choices > description.vocab_size:
        raise UserError(f"{settings.choices} choices are more than the model's {description.vocab_size} tokens")

    compute_on_processor()  # the check is small; looking for accelerators is slow and noisy
    check_prefix(prefix, description)
    weights = with_prefix(description, weights, prefix)
    if prefix:
        log.info("every prompt continues a public prefix of %d tokens", len(prefix))
    published = None
    if canary is not None:
        published = make_canary(canary, own_tokenizer(tokenizer), description, weights, settings, limits.max_new_tokens)
        log.info("the canary is %s", encode(published).decode())
    log.info("the softmax is computed as %s", description.computed_softmax(settings.exact_softmax_as).words)
    warn_of_little_memory(limits, description)
    settings = verified_settings(
        folder,
        description,
        weights,
        settings,
        choose_fraction_bits,
        self_tests,
        tokenizer=tokenizer,
        recheck=recheck,
        prefix=prefix,
        calibration=calibration,
    )

    counters = Counters()
    with swept_folder("entropi-table-") as temporary:
        table, known, ahead = _temporary_files(temporary, description, weights, settings, prefix, material)
        del weights
        table_hash, most = sha256_of(table) if table else None, limits.conversation_tokens
        drafts = limits.draft_tokens if settings.output == "logits" else 0
        batches = limits.batch_prompts, limits.batch_tokens
        welcome = Welcome(
            description, tokenizer, settings, table_hash, published, list(prefix), chat, most, drafts, *batches
        )
        state = ServerState(
            folder=folder,
            material=_kept(material, welcome, folder, ahead),
            welcome=welcome,
            digest=welcome.digest(),
            limits=limits,
            slots=Slots(limits, counters),
            preparing=Slots(replace(limits, max_sessions=1), counters),
            quota=Quota(limits, open_store(quota_store, limits)),
            counters=counters,
            table=table,
            ahead=ahead,
            prefix=known,
            audit=Audit(counters, audit_log),
            watched=files,
            greeting=text_frames(encode(welcome)),
        )
        _run(state, address, watched)
        state.audit.close()
    log.info("stopped")


def _temporary_files(
    folder: Path,
    description: Description,
    weights: Mapping[str, np.ndarray],
    settings: Settings,
    prefix: Sequence[int],
    material: Store | None,
) -> tuple[Path | None, Path | None, Path | None]:
    """Write what clients may have, token embeddings and the prefix, and what parties here look ahead with."""
    table = known = None
    if prefix:
        known = folder / "prefix.safetensors"
        save_file({name: weights[name] for name in names(description)}, known)
    if settings.embedding == "public":
        table = folder / "table.safetensors"
        save_file({"embedding": weights["embedding"]}, table)
    return table, known, _write_ahead(folder, description, weights) if material is not None else None


def _kept(store: Store | None, welcome: Welcome, folder: Path, ahead: Path | None) -> Material | None:
    """What is prepared for this model, for one rounding of the matrices that look ahead; None where nothing may be."""
    if store is None:
        return None
    files = [folder / WEIGHTS_FILE, *([ahead] if ahead is not None else [])]
    return Material(store, welcome, " ".join(map(sha256_of, files)))


def _write_ahead(folder: Path, description: Description, weights: Mapping[str, np.ndarray]) -> Path | None:
    """Write the matrices that look ahead into `folder`, for this server's parties alone; None if there are none."""
    if not (found := lookahead.weights(description, weights)):
        return None
    ahead = folder / "ahead.safetensors"
    save_file(found, ahead)
    return ahead


def _run(state: ServerState, address: tuple[str, int], metrics: tuple[str, int]) -> None:
    """Answer clients at `address` until a signal ends it."""
    # What is here by now stays; the door searches often for what connections leave behind.
    gc.collect()
    gc.freeze()
    try:
        asyncio.run(_serve(state, address, metrics))
    finally:
        gc.unfreeze()  # or what others keep in circles, as Triton does, would count as leaked at the end


async def _serve(state: ServerState, address: tuple[str, int], metrics: tuple[str, int]) -> None:
    request_log.addFilter(_without_trace)
    for strangers in (request_log, logging.getLogger("asyncio")):
        strangers.addFilter(Sparing())

    loop, stopping, again = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    if state.watched is not None:
        loop.add_signal_handler(signal.SIGHUP, again.set)
    log.info("in force for a session's process: %s", await confinement())

    async with contextlib.AsyncExitStack() as closing:
        closing.push_async_callback(state.quota.close)
        await state.quota.check()
        tasks = [loop.create_task(state.audit.keep()), loop.create_task(_watch_files(state, again))]
        if state.material is not None:
            tasks.append(loop.create_task(state.material.sweep()))
        for task in tasks:
            closing.callback(task.cancel)

        entrance = Door(state.watched, state.limits.max_startups, state.limits.source_startups, state.audit)
        port = await _listen(_application(state, entrance), entrance, address, closing)
        log.info(
            "listening on %s, %s, protocol %s, %s",
            spelled(address[0], port),
            state.welcome.description.architecture,
            state.welcome.settings.protocol,
            "TLS 1.3 with client certificates" if state.watched is not None else "no TLS: this machine only",
        )

        side_door = Door(None, METRICS_CONNECTIONS, METRICS_CONNECTIONS, state.audit)
        port = await _listen(monitoring_app(state.counters), side_door, metrics, closing)
        log.info("metrics on http://%s/metrics", spelled(metrics[0], port))

        await stopping.wait()
        log.info("stopping")


class _FileInTime(web.FileResponse):
    """A file whose connection is cut if the client takes it too slowly."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._patience = SEND_SECONDS + path.stat().st_size / TABLE_BYTES_PER_SECOND

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it, as aiohttp asks once the handler has returned."""
        try:
            return await asyncio.wait_for(super().prepare(request), self._patience)
        except asyncio.TimeoutError:
            if request.transport is not None:
                cut(request.transport)
            raise ConnectionResetError from None


def _application(state: ServerState, entrance: Door) -> web.Application:
    """What answers clients: sessions, and the token embeddings where these are public."""

    async def session(request: web.Request) -> web.WebSocketResponse:
        return await run_session(request, state, entrance.guest(request))

    async def table(request: web.Request) -> web.FileResponse:
        assert state.table is not None
        peer = Peer.of(request.transport)
        if peer is not None and peer in state.revoked:
            raise web.HTTPForbidden
        return _FileInTime(state.table)

    async def end_sessions(_: web.Application) -> None:
        await asyncio.gather(*(dismiss(socket, "the server is stopping") for socket in state.sockets))

    app = web.Application()
    app.router.add_get("/v1/session", session)
    if state.table is not None:
        app.router.add_get("/v1/table", table)
    app.on_shutdown.append(end_sessions)
    return app


async def _listen(
    app: web.Application, door: Door, address: tuple[str, int], closing: contextlib.AsyncExitStack
) -> int:
    """Let clients of `app` in by a door, until `closing` ends; the port."""
    app.middlewares.append(door.attend)
    runner = web.AppRunner(app, access_log=None, logger=request_log, shutdown_timeout=LEAVE_SECONDS)
    await runner.setup()
    closing.push_async_callback(runner.cleanup)
    assert runner.server is not None
    closing.callback(door.close)
    with listening(address):
        return door.open(runner.server, *address)


async def _watch_files(state: ServerState, again: asyncio.Event) -> None:
    """Read certificates and revocations again on SIGHUP and when they change, and end sessions of who is revoked."""
    files = state.watched
    state.counters.revoked = len(state.revoked)
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(again.wait(), WATCH_SECONDS)
        if files is None or not (again.is_set() or files.has_changed()):
            again.clear()
            continue

        again.clear()
        try:
            files.reload()
        except Exception as error:  # whatever it is, the next change is to be looked at
            log.error("what was read before stays in use: %s", error)
            state.audit.happened("certificates not reloaded", str(error))
            continue

        state.counters.revoked = len(files.revoked)
        state.audit.happened("certificates reloaded", f"{len(files.revoked)} revoked")
        ended = [socket for socket, peer in state.sockets.items() if peer is not None and peer in files.revoked]
        await asyncio.gather(*(dismiss(socket, REVOKED) for socket in ended))


def _without_trace(record: logging.LogRecord) -> bool:
    """Let a log record pass as one line: what strangers send is not a fault of this program."""
    record.exc_info = record.exc_text = None
    return True
