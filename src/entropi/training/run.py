"""A training run from a recipe to a run folder: start, resume, finish."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_model
from transformers import PrinterCallback, TrainerCallback, set_seed

from entropi import record_files
from entropi.console import ProgressLine, make_console
from entropi.data.prepare import Prepared
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.qk_clip import check_clippable
from entropi.training import distributed
from entropi.training.build import (
    check_processes,
    check_vocabulary,
    model_config,
    new_model,
    prepare_corpus,
    sequences_per_epoch,
    tokens_per_step,
    training_arguments,
)
from entropi.training.callbacks import (
    CheckpointCommit,
    CollapseGuard,
    Diverged,
    NonFiniteGuard,
    QueryKeyClip,
    RunRecorder,
    SaveOnInterrupt,
)
from entropi.training.checkpoints import CHECKPOINTS_FOLDER, Checkpoint
from entropi.training.compilation import compile_parts
from entropi.training.environment import check_precision
from entropi.training.evaluation import evaluate_blocks
from entropi.training.live import Live, LiveView
from entropi.training.loading import MODEL_FOLDER, corpus_hash, quiet_transformers
from entropi.training.recipe import CONFIG_FILE, Recipe
from entropi.training.run_folder import (
    begin_folder,
    check_folder,
    go_back,
    lock_run,
    rate_factor,
    record_result,
    record_start,
    resume_point,
    save_model,
)
from entropi.training.taper import Student, TaperProgress, Teacher, open_teacher, schedule_of
from entropi.training.trainer import BlockDataset, EntropiTrainer


@dataclass(frozen=True)
class _Run:
    """What stays the same from the first step to the last."""

    recipe: Recipe
    folder: Path
    prepared: Prepared
    console: Console
    live: Live | None
    shard: bool
    teacher: Teacher | None  # of a tapering

    def new_model(self) -> EntropiForCausalLM:
        """The model before its first step."""
        if self.teacher is None:
            return new_model(self.recipe, self.prepared)
        student = Student(self.teacher.model, model_config(self.recipe, 0), self.recipe)
        set_seed(self.recipe.seed)
        return student


def train(recipe: Recipe, folder: Path, live: Live | None = None, *, shard: bool = False) -> Path:
    """Train as `recipe` says into the run folder `folder`; continue there if it holds an unfinished run of it.

    The records are written in any case; `live` shows them in a tracker as well. Called in every process that torchrun
    or accelerate started, it is one run on all of them: every process has the model, or with `shard` a part of it
    (FSDP2). A run may be continued with another number of processes, sharded or not. Ctrl-C or SIGTERM saves the state
    after the step in progress.

    Returns:
        The folder of the trained model, ready for `from_pretrained`.

    Raises:
        UserError: a recipe that cannot be trained, a folder that holds something else, or another process that died.
        KeyboardInterrupt: the run was interrupted; says what is saved and how to continue.
    """
    console = make_console() if distributed.is_main() else Console(quiet=True)
    recipe = check_folder(recipe, folder)
    model_folder = folder / MODEL_FOLDER
    if model_folder.exists():
        console.print(
            f"{folder} holds the finished run of this recipe: nothing to do. It cannot go on with more steps, as they "
            "belong to its learning rates: train anew in another folder.",
            markup=False,
        )
        return model_folder

    check_precision(recipe)
    check_processes(recipe, shard)
    config = model_config(recipe, recipe.vocab_size)  # what cannot be built is said at once
    if recipe.qk_clip:
        check_clippable(config)

    with _interrupted_in_words(folder):
        # Before the processes are connected, which would not wait for hours: one of them prepares, the others wait.
        prepared = prepare_corpus(recipe, console, corpus_hash(folder))
        console.print(prepared.parts, markup=False)
        check_vocabulary(recipe, config, prepared)
        with lock_run(folder), quiet_transformers(), distributed.connected():
            recipe = distributed.broadcast(begin_folder(recipe, folder) if distributed.is_main() else recipe)
            teacher = open_teacher(recipe.taper_from) if recipe.taper_from else None
            run = _Run(recipe, folder, prepared, console, live, shard, teacher)
            model = _train_to_the_end(run)
            _finish(run, model.finished() if isinstance(model, Student) else model)
    return model_folder


@contextmanager
def _interrupted_in_words(folder: Path) -> Iterator[None]:
    """Add to an interrupt how the run can be continued."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        also = f" or `entropi train {shlex.quote(str(folder))}`" if (folder / CONFIG_FILE).exists() else ""
        raise KeyboardInterrupt(*interrupt.args, f"the same command{also} continues the run") from None


def _train_to_the_end(run: _Run) -> EntropiForCausalLM:
    """The model after its last step, from the start or a checkpoint, and going back where the recipe says so."""
    main = distributed.is_main()
    checkpoint = distributed.broadcast(
        resume_point(run.recipe, run.folder, run.prepared, run.console, run.teacher) if main else None
    )
    model = run.new_model()
    if main:
        record_start(run.recipe, run.folder, model, run.prepared, checkpoint, run.teacher)

    while True:
        try:
            return _optimize(run, model, checkpoint)
        except Diverged as event:
            checkpoint = distributed.broadcast(go_back(run.folder, event, run.console) if main else None)
            model = run.new_model()


def _optimize(run: _Run, model: EntropiForCausalLM, checkpoint: Checkpoint | None) -> EntropiForCausalLM:
    """The model brought from `checkpoint`, or from the start, to the last step."""
    recipe = run.recipe
    done = checkpoint.step if checkpoint else 0
    if checkpoint and (run.shard or done >= recipe.steps):
        load_model(model, checkpoint.path / "model.safetensors")
    if done >= recipe.steps:  # interrupted in the last evaluation; the Trainer would take a step more
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    scalars = {name for name, p in model.named_parameters() if p.dim() == 0}
    if run.shard:
        distributed.shard(model)

    progress = ProgressLine(f"training {recipe.architecture}", recipe.steps, done=done, console=run.console)
    recorder = _recorder(run, progress, checkpoint)
    if recipe.compile:
        compile_parts(model)
    interrupt = SaveOnInterrupt()
    trainer = _trainer(run, model, recorder, interrupt, scalars)
    with progress, interrupt.listening():
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)

    if run.shard:  # the rest is done with a plain model: that of the last checkpoint
        model = new_model(recipe, run.prepared)
        load_model(model, run.folder / CHECKPOINTS_FOLDER / f"checkpoint-{recipe.steps}" / "model.safetensors")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def _recorder(run: _Run, progress: ProgressLine, checkpoint: Checkpoint | None) -> RunRecorder:
    recipe = run.recipe
    recorder = RunRecorder(
        run.folder / record_files.RECORDS_FILE,
        progress,
        log_every=recipe.log_every,
        entropy_every=recipe.entropy_every,
        tokens_per_step=tokens_per_step(recipe),
    )
    if checkpoint:
        recorder.restore(checkpoint.pending)
    if recipe.collapse != "ignore":
        recorder.on_entropy = CollapseGuard(recipe.collapse, recipe.collapse_below, recipe.context_length)
    return recorder


def _trainer(
    run: _Run, model: EntropiForCausalLM, recorder: RunRecorder, interrupt: SaveOnInterrupt, scalars: set[str]
) -> EntropiTrainer:
    """The Trainer of a run; `scalars` are names of the parameters that were one number before the model was sharded."""
    recipe, packed = run.recipe, run.prepared.packed
    callbacks: list[TrainerCallback] = [recorder, NonFiniteGuard(recipe.nonfinite, recorder)]
    if recipe.qk_clip:
        attentions: list[Any] = [block.attention for block in model.model.blocks]
        callbacks.append(QueryKeyClip(attentions, recipe.qk_clip))
    if isinstance(model, Student):
        callbacks.append(TaperProgress(model, schedule_of(recipe, model), recorder))
    callbacks += [CheckpointCommit(recorder, recipe.keep_checkpoints), interrupt]

    factor = distributed.broadcast(rate_factor(run.folder) if distributed.is_main() else 1.0)
    trainer = EntropiTrainer(
        model=model,
        args=training_arguments(recipe, run.folder, run.live, factor),
        train_dataset=BlockDataset(packed.train, sequences_per_epoch(recipe, run.prepared)),
        eval_dataset=BlockDataset(packed.heldout[: recipe.evaluation_blocks]),
        callbacks=callbacks,
        recorder=recorder,
        muon=recipe.optimizer == "muon",
        scalars=scalars,
    )
    trainer.remove_callback(PrinterCallback)
    if run.live is not None:
        recorder.watchers.append(LiveView(run.live, trainer, run.folder))
    return trainer


def _finish(run: _Run, model: EntropiForCausalLM) -> None:
    """Evaluate the trained model, record what it does, and put it into the run folder."""
    heldout = run.prepared.packed.heldout
    with ProgressLine("evaluating on held-out text", len(heldout), console=run.console) as line:
        result = evaluate_blocks(model, heldout, run.recipe.batch_size, line.update)

    if distributed.is_main():
        record_result(run.folder, run.recipe, model, result, heldout)
        save_model(model, run.prepared.tokenizer, run.recipe, result, run.folder / MODEL_FOLDER)
    distributed.barrier()
