"""One party of one session, in a process of its own (`party_process`).

Takes a `Job` and then a `Proceed` for every further token, writes `Event`s, one JSON line each. Its parent may kill it
at any moment; that ends the session and nothing else. When its standard input ends, the parent is gone, and the party
goes too.
"""

from __future__ import annotations

import contextlib
import os
import queue
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import load, save_file

from entropi.private.compute import lookahead, prefix
from entropi.private.compute.compiling import compile_ahead
from entropi.private.compute.description import Description
from entropi.private.compute.embedding import one_hot
from entropi.private.compute.engine import Engine, EngineError
from entropi.private.compute.layout import Layout
from entropi.private.compute.program import keep_first, keep_prompts, stages_of_pass, warm_up, warms_up
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.private.preparation.dealing import deal
from entropi.private.preparation.material import Material, joined
from entropi.private.preparation.online import PreparedPasses
from entropi.private.preparation.parts import parts_for
from entropi.private.preparation.ring import Ring, encode
from entropi.private.sessions.engine_link import open_link
from entropi.private.wire import messages
from entropi.private.wire.messages import (
    Event,
    Failed,
    Job,
    Linked,
    PartDone,
    Proceed,
    Revealed,
    StageDone,
    decode,
    part_file,
)
from entropi.records import StageCommunication, combined

PREPARING_NICENESS = 10


def run(line: bytes, files: Mapping[str, bytes], lines: queue.SimpleQueue[bytes], events: BinaryIO) -> int:
    """Run a job; the process's status, 1 after a `Failed` event.

    Args:
        line: the encoded `Job`.
        files: contents of those that it names, by the names of its fields.
        lines: what the parent says next.
    """
    try:
        job = decode(line, Job)
        engine = Engine(job.rank, open_link(job.rank, job.links, job.session), job.settings)
        _emit(events, Linked())
        prepared = job.material is not None
        if warms_up(job.settings.chooses, prepared=prepared):
            _warm_up(engine, events, prepared=prepared)
        if job.prepares:
            _prepare(engine, job, files, events)
        else:
            _serve_session(engine, job, files, lines, events)
        engine.close()
    except EngineError as error:
        _emit(events, Failed(reason=str(error)))
        return 1
    except BrokenPipeError:
        return 1  # the parent is gone, and with it the session
    except Exception as error:  # the parent's user reads one line, wherever it comes from
        _emit(events, Failed(reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]))
        return 1
    return 0


def _serve_session(
    engine: Engine, job: Job, files: Mapping[str, bytes], lines: queue.SimpleQueue[bytes], events: BinaryIO
) -> None:
    """Hold what the model has, and run passes over one prompt and its answer, or over several."""
    model, settings = job.description, job.settings
    public = settings.embedding == "public"
    weights = _weights(files)
    table = load(files["table"])["embedding"] if "table" in files and public else None
    if public and job.rank == CLIENT and table is None:
        raise EngineError("the embedding is public, but the client has no copy of it")
    for name, shape in model.weight_shapes().items():
        if name != "embedding" or not public:
            engine.hold(name, shape, weights[name] if weights is not None else None)
    if job.prefix_length:
        known = load(files["prefix"]) if "prefix" in files else None
        for name in prefix.names(model):
            shape = prefix.shape(model, job.prefix_length)
            engine.hold(name, shape, known[name] if known is not None else None)
    if job.others:
        _answer_several(engine, job, table, lines, events)
        return
    prepared = _prepared_passes(engine, job, files, weights) if job.material is not None else None
    _answer_one(engine, job, table, prepared, lines, events)


def _weights(files: Mapping[str, bytes]) -> dict[str, np.ndarray] | None:
    """The server's weights, and the matrices that look ahead where products are prepared; None at the client."""
    if "weights" not in files:
        return None
    return {**load(files["weights"]), **(load(files["ahead"]) if "ahead" in files else {})}


def _answer_one(
    engine: Engine,
    job: Job,
    table: np.ndarray | None,
    prepared: PreparedPasses | None,
    lines: queue.SimpleQueue[bytes],
    events: BinaryIO,
) -> None:
    model, settings = job.description, job.settings
    fresh, count, past = job.prompt, job.prompt_length, job.prefix_length
    number, rows, budget = 0, 1, _Budget(job.max_new_tokens, job.drafts)
    while True:
        _hold_tokens(engine, job, table, fresh, count, paired=settings.paired and prepared is None)
        if budget.left:
            for tokens_before, following in _likely_passes(past, count, rows):
                compile_next(engine, model, settings, tokens_before, prepared, following)
        for stage in stages_of_pass(model, settings, count, past, last_rows=rows, prepared=prepared is not None):
            if prepared is None:
                done = engine.run(stage, number)
            else:
                done = combined(list(prepared.run(stage, number, past + count)))
            _emit(events, StageDone(done))
        _emit(events, _reveal(engine, settings, rows))
        past, number = past + count, number + 1
        if not budget.left and not budget.drafted:
            return
        proceed = decode(lines.get(), Proceed)
        budget.take(proceed)
        if proceed.dropped:
            if prepared is not None:
                prepared.drop(proceed.dropped, past)
            past -= proceed.dropped
            engine.run(keep_first(model, past), number)
        fresh, count, rows = proceed.tokens, proceed.count, proceed.drafts + 1


def _answer_several(
    engine: Engine, job: Job, table: np.ndarray | None, lines: queue.SimpleQueue[bytes], events: BinaryIO
) -> None:
    """Passes that several prompts share, until each has all of its tokens; those that end before leave."""
    model, settings = job.description, job.settings
    layout = Layout.first([job.prompt_length, *job.others], job.prefix_length)
    fresh = job.prompt
    for number in range(job.max_new_tokens):
        if number:
            proceed = decode(lines.get(), Proceed)
            staying = [place for place in range(layout.prompts) if place not in proceed.ended]
            if not staying or proceed.count != 1 or proceed.drafts or proceed.dropped:
                raise EngineError("of several prompts each has one more token, or has ended")
            if proceed.ended:
                engine.run(keep_prompts(model, layout, staying), number)
            layout, fresh = layout.of(staying).following(), proceed.tokens
        if fresh is not None:
            if len(fresh) != layout.tokens:
                raise EngineError(f"there are {len(fresh)} tokens for a pass over {layout.tokens}")
            fresh = [fresh[place] for place in layout.last_rows_last()]
        _hold_tokens(engine, job, table, fresh, layout.tokens, paired=settings.paired)
        if number + 1 < job.max_new_tokens:
            compile_next(engine, model, settings, layout.keys, None, layout.prompts, layout=layout.following())
        for stage in stages_of_pass(model, settings, layout.tokens, layout.before, layout=layout):
            _emit(events, StageDone(engine.run(stage, number)))
        _emit(events, _reveal(engine, settings, layout.prompts))


def _hold_tokens(
    engine: Engine, job: Job, table: np.ndarray | None, fresh: list[int] | None, count: int, *, paired: bool
) -> None:
    """What the client puts into a pass over so many tokens, in the order of states; `fresh` are known to it alone."""
    model = job.description
    if job.settings.embedding == "public":
        engine.hold("embedded", (count, model.hidden_size), None if table is None else table[fresh])
        return
    tokens = None if fresh is None else one_hot(fresh, model.vocab_size, paired, job.settings.fraction_bits)
    engine.hold("tokens", (-(-count // 2) if paired else count, model.vocab_size), tokens)


@dataclass
class _Budget:
    """Tokens that may still be computed and kept, and drafts that may still be dropped."""

    left: int
    drafts: int
    drafted: int = 0  # in the pass before

    def __post_init__(self) -> None:
        self.left -= 1  # the last of all is not computed with

    def take(self, asked: Proceed) -> None:
        """Count a pass, and what of the one before is dropped, or raise `EngineError`."""
        if asked.dropped > self.drafted:
            raise EngineError(f"{asked.dropped} drafts are to be dropped of {self.drafted}")
        left, drafts = self.left + asked.dropped - asked.count, self.drafts - asked.dropped
        if left < 0:
            raise EngineError(f"{asked.count} more tokens were asked for, and {self.left + asked.dropped} are left")
        if not asked.drafts < asked.count or asked.drafts > drafts:
            raise EngineError(f"{asked.drafts} drafts of {asked.count} tokens, and {drafts} may still be dropped")
        self.left, self.drafts, self.drafted = left, drafts, asked.drafts


def _likely_passes(past: int, count: int, rows: int) -> list[tuple[int, int]]:
    """Tokens before the next pass, and its own: after drafts, if all of them hold or none does."""
    if rows == 1:
        return [(past + count, 1)]
    return [(past + count, rows), (past + count - rows + 1, rows), (past + count, 1)]


def compile_next(
    engine: Engine,
    model: Description,
    settings: Settings,
    past: int,
    prepared: PreparedPasses | None,
    new: int = 1,
    *,
    layout: Layout | None = None,
) -> None:
    """Compile the pass over `new` further tokens after `past` ones in a thread; all but one of them are drafts.

    Or with a `layout` each is another prompt's.
    """
    if (past + new if layout is None else max(layout.lengths())) > model.positions:
        return
    compiler = engine.compiler.copy()
    for name in prefix.names(model):
        compiler.note(name, prefix.shape(model, past))
    paired = settings.paired and prepared is None
    if settings.embedding == "public":
        compiler.note("embedded", (new, model.hidden_size))
    else:
        compiler.note("tokens", (-(-new // 2) if paired else new, model.vocab_size))
    last_rows = new if layout is None else 1
    how = dict[str, Any](last_rows=last_rows, prepared=prepared is not None, layout=layout)
    stages = stages_of_pass(model, settings, new, past, **how)
    compile_ahead(stages if prepared is None else prepared.parts(stages, compiler), compiler)


def _prepared_passes(
    engine: Engine, job: Job, files: Mapping[str, bytes], weights: Mapping[str, np.ndarray] | None
) -> PreparedPasses:
    """What runs stages with the material of this session, which exists here alone by now."""
    bits = job.settings.fraction_bits
    for name, shape in lookahead.shapes(job.description).items():
        if len(shape) == 1:
            engine.hold(name, shape, weights[name] if weights is not None else None)
        else:
            engine.compiler.note(name, shape)  # nothing of the engine's multiplies by it
    matrices: dict[str, np.ndarray | None] = {}
    parts = parts_for(job.description, job.settings, job.material_tokens, job.material_passes)
    for part in parts:
        if part.matrix is not None:
            matrices[part.matrix] = encode(weights[part.matrix], bits) if weights is not None else None
    return PreparedPasses(engine, Material(parts, load(files["material"])), bits, matrices)


def _prepare(engine: Engine, job: Job, files: Mapping[str, bytes], events: BinaryIO) -> None:
    """Compute material in step with the other party, and hand every part of it to the parent as it is done.

    At low priority: those who wait for an answer come first.
    """
    with contextlib.suppress(OSError):
        os.nice(PREPARING_NICENESS)
    weights = _weights(files)
    folder = Path(job.links[job.rank].removeprefix("unix:")).parent
    parts = parts_for(job.description, job.settings, job.material_tokens, job.material_passes)
    for number, need in enumerate(parts):
        if number < job.first_part:
            continue
        matrix = None
        if need.matrix is not None and weights is not None:
            matrix = encode(weights[need.matrix], job.settings.fraction_bits)
        pieces, costs = list[dict[str, Ring]](), list[StageCommunication]()
        for piece, cost in deal(engine, need, matrix):
            pieces.append(piece)
            costs.append(cost)
            _emit(events, StageDone(cost))
        save_file(joined(need, pieces), folder / part_file(number))
        _emit(events, PartDone(number, combined(costs)))


def _reveal(engine: Engine, settings: Settings, rows: int) -> Revealed:
    """Send the client its result, and nothing else of the logits."""
    tokens = logits = None
    size = 0
    if settings.output != "logits":
        indices, size = engine.reveal_to_client("tokens_out")
        tokens = None if indices is None else np.rint(indices.reshape(-1)).astype(int).tolist()
    if settings.output != "argmax":
        values, more = engine.reveal_to_client("logits" if settings.output == "logits" else "logits_out")
        size += more
        scale = 1.0 if settings.logit_bits is None else 2.0**-settings.logit_bits
        logits = None if values is None else (values.reshape(-1) * scale).tolist()
    return Revealed(bytes=size, logits=logits, tokens=tokens, rows=rows)


def _warm_up(engine: Engine, events: BinaryIO, *, prepared: bool) -> None:
    """Keys and base oblivious transfers, before anything is counted as the prompt's."""
    stage, shapes = warm_up(prepared=prepared)
    for name, (shape, owner) in shapes.items():
        own = engine.rank == (SERVER if owner == "server" else CLIENT)
        engine.hold(name, shape, np.zeros(shape) if own else None)
    _emit(events, StageDone(engine.run(stage, 0)))


def _emit(events: BinaryIO, event: Event) -> None:
    events.write(messages.encode(event) + b"\n")
    events.flush()
