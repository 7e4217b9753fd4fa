"""A training run from a recipe to a run folder: start, resume, finish."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_model
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainingArguments, set_seed

from entropi import record_files, records
from entropi.console import ProgressLine, make_console
from entropi.costs.operations import count
from entropi.data.packing import Prepared, prepare
from entropi.data.shards import Blocks
from entropi.data.tokenizer import end_of_text_id, tokenizer_hash
from entropi.errors import UserError
from entropi.model.architectures import split_training_name
from entropi.model.card import model_card, write_card
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.qk_clip import check_clippable
from entropi.training import distributed
from entropi.training.callbacks import (
    CheckpointSeal,
    CollapseGuard,
    Diverged,
    InterruptBetweenSteps,
    Live,
    LiveView,
    NonFiniteGuard,
    QueryKeyClip,
    RunRecorder,
)
from entropi.training.checkpoints import Checkpoint, newest_whole
from entropi.training.environment import bf16_is_fast, check_precision, describe_environment
from entropi.training.evaluation import (
    PATTERN_SEQUENCES,
    HeldOut,
    diagnose_heldout,
    evaluate_blocks,
    observe_patterns,
)
from entropi.training.recipe import CONFIG_FILE, Recipe, differences, load_recipe, save_recipe
from entropi.training.saved import MODEL_FOLDER, quiet_transformers
from entropi.training.trainer import BlockDataset, EntropiTrainer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHECKPOINTS_FOLDER = "checkpoints"
ENVIRONMENT_FILE = "environment.json"
ROLLBACK_FACTOR, MOST_ROLLBACKS = 0.5, 3


def train(recipe: Recipe, folder: Path, live: Live | None = None, *, shard: bool = False) -> Path:
    """Train as `recipe` says into the run folder `folder`; continue there if it holds an unfinished run of it.

    The records are written in any case; `live` shows them in a tracker as well. Called in every process that torchrun
    or accelerate started, it is one run on all of them: every process has the model, or with `shard` a part of it
    (FSDP2). A run may be continued with another number of processes, sharded or not.

    Returns:
        The folder of the trained model, ready for `from_pretrained`.

    Raises:
        UserError: a recipe that cannot be trained, a folder that holds something else, or another process that died.
    """
    console = make_console() if distributed.is_main() else Console(quiet=True)
    architecture, _ = split_training_name(recipe.architecture)
    recipe = _check_folder(recipe, folder)
    model_folder = folder / MODEL_FOLDER
    if model_folder.exists():
        console.print(f"{folder} holds the finished run of this recipe; nothing to do.", markup=False)
        return model_folder
    check_precision(recipe)
    _check_processes(recipe, shard)
    config = model_config(recipe, recipe.vocab_size)  # what cannot be built is said at once
    if recipe.qk_clip:
        check_clippable(config)
    # Before the processes are connected, which would not wait for hours: one of them prepares, the others wait for it.
    prepared = prepare_corpus(recipe, console)
    with alone_in(folder), quiet_transformers(), distributed.connected():
        recipe = distributed.from_main(_begin_folder(recipe, folder) if distributed.is_main() else recipe)
        checkpoint = distributed.from_main(
            _resume_point(recipe, folder, prepared, console) if distributed.is_main() else None
        )
        model = _new_model(recipe, prepared)
        if distributed.is_main():
            _record_start(recipe, folder, model, prepared, architecture, checkpoint)
        while True:
            try:
                model = _optimize(recipe, folder, model, prepared, checkpoint, console, live, shard)
                break
            except Diverged as event:
                checkpoint = distributed.from_main(_go_back(folder, event, console) if distributed.is_main() else None)
                model = _new_model(recipe, prepared)

        heldout = prepared.packed.heldout
        with ProgressLine("evaluating on held-out text", len(heldout), console=console) as line:
            result = evaluate_blocks(model, heldout, recipe.batch_size, line.update)
        if distributed.is_main():
            _record_result(folder, recipe, model, result, heldout)
            _save_model(model, prepared.tokenizer, recipe, result, model_folder)
        distributed.wait_for_all()
    return model_folder


def prepare_corpus(recipe: Recipe, console: Console) -> Prepared:
    """The data of a recipe: read, tokenised and cut, or found in the cache.

    Raises:
        UserError: a corpus or tokenizer that cannot be used, or too little text for one update.
    """
    prepared = prepare(
        recipe.corpus,
        recipe.vocab_size,
        recipe.context_length,
        console=console,
        tokenizer=recipe.tokenizer,
        per_document=recipe.packing == "document",
    )
    _check_corpus(recipe, prepared)
    return prepared


def _new_model(recipe: Recipe, prepared: Prepared) -> EntropiForCausalLM:
    """The model before its first step: the same in every process."""
    set_seed(recipe.seed)
    return EntropiForCausalLM(model_config(recipe, prepared.tokenizer.get_vocab_size()))


def _go_back(folder: Path, event: Diverged, console: Console) -> Checkpoint | None:
    """The last checkpoint before a divergence, or None for the start; noted in the records.

    Raises:
        UserError: it happened too often.
    """
    path = folder / record_files.RECORDS_FILE
    factor = _rate_factor(folder) * ROLLBACK_FACTOR
    if factor < ROLLBACK_FACTOR**MOST_ROLLBACKS:
        raise UserError(f"{event.reason}; the run has gone back {MOST_ROLLBACKS} times already: it has diverged")
    checkpoint = newest_whole(folder / CHECKPOINTS_FOLDER, console)
    step = checkpoint.step if checkpoint else 0
    record_files.forget_after(path, step)
    back = records.RolledBack(step=step, from_step=event.step, reason=event.reason, rate_factor=factor)
    record_files.append(path, back)
    console.print(f"{event.reason}; going back to step {step}, on at {factor:g} of the learning rate", markup=False)
    return checkpoint


def _rate_factor(folder: Path) -> float:
    """What the recipe's learning rates are multiplied by: 1, and less where the run has gone back."""
    back = [r for r in record_files.read(folder / record_files.RECORDS_FILE) if isinstance(r, records.RolledBack)]
    return back[-1].rate_factor if back else 1.0


def _optimize(
    recipe: Recipe,
    folder: Path,
    model: EntropiForCausalLM,
    prepared: Prepared,
    checkpoint: Checkpoint | None,
    console: Console,
    live: Live | None,
    shard: bool,
) -> EntropiForCausalLM:
    """The model brought from `checkpoint`, or from the start, to the last step."""
    done = checkpoint.step if checkpoint else 0
    if checkpoint and (shard or done >= recipe.steps):
        load_model(model, checkpoint.path / "model.safetensors")
    if done >= recipe.steps:  # interrupted in the last evaluation; the Trainer would take a step more
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    scalars = {name for name, p in model.named_parameters() if p.dim() == 0}
    if shard:
        distributed.shard(model)
    progress = ProgressLine(f"training {recipe.architecture}", recipe.steps, done=done, console=console)
    recorder = RunRecorder(
        folder / record_files.RECORDS_FILE,
        progress,
        log_every=recipe.log_every,
        entropy_every=recipe.entropy_every,
        tokens_per_step=_tokens_per_step(recipe),
    )
    if checkpoint:
        recorder.restore(checkpoint.pending)
    if recipe.collapse != "ignore":
        recorder.on_entropy = CollapseGuard(recipe.collapse, recipe.collapse_below, recipe.context_length)
    factor = distributed.from_main(_rate_factor(folder) if distributed.is_main() else 1.0)
    interrupt = InterruptBetweenSteps()
    attentions: list[Any] = [block.attention for block in model.model.blocks]
    clips = [QueryKeyClip(attentions, recipe.qk_clip)] if recipe.qk_clip else []
    trainer = EntropiTrainer(
        model=model,
        args=_training_arguments(recipe, folder, live, factor),
        train_dataset=BlockDataset(prepared.packed.train, _sequences_per_epoch(recipe, prepared)),
        callbacks=[
            recorder,
            NonFiniteGuard(recipe.nonfinite, recorder),
            *clips,
            CheckpointSeal(recorder, recipe.keep_checkpoints),
            interrupt,
        ],
        eval_dataset=BlockDataset(prepared.packed.heldout[: recipe.evaluation_blocks]),
        recorder=recorder,
        muon=recipe.optimizer == "muon",
        scalars=scalars,
    )
    trainer.remove_callback(PrinterCallback)
    if live is not None:
        recorder.watchers.append(LiveView(live, trainer, folder))
    with progress, interrupt.listening():
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    if shard:  # the rest is done with a plain model: that of the last checkpoint
        model = _new_model(recipe, prepared)
        load_model(model, folder / CHECKPOINTS_FOLDER / f"checkpoint-{recipe.steps}" / "model.safetensors")
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def _check_folder(recipe: Recipe, folder: Path) -> Recipe:
    """Check that `folder` can hold a run of `recipe`; returns the recipe, as resolved by an earlier start of it."""
    config = folder / CONFIG_FILE
    try:
        if config.exists():
            existing = load_recipe(config)
            if differing := differences(recipe, existing):
                raise UserError(
                    f"{folder} holds a run of another recipe, which differs in {', '.join(differing)}; "
                    "choose another folder"
                )
            recipe = existing
        elif folder.exists() and (not folder.is_dir() or any(p.suffix != ".partial" for p in folder.iterdir())):
            raise UserError(f"{folder} exists and is not a run folder; choose another folder")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise UserError(f"cannot open the run folder {folder}: {error.strerror}") from None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {there}: choose another run folder")
    return recipe


def _check_processes(recipe: Recipe, shard: bool) -> None:
    """Refuse a number of processes that would change the training, or what cannot be sharded."""
    count = distributed.launched()
    if recipe.gradient_accumulation % count:
        raise UserError(
            f"{count} processes share out the micro-batches of an update, and gradient_accumulation is "
            f"{recipe.gradient_accumulation}: a multiple of {count} is needed (and batch_size smaller by as much)"
        )
    if shard and count == 1:
        raise UserError("one process has nothing to shard: start several, torchrun --nproc-per-node 2 -m entropi train")
    if shard and recipe.qk_clip:
        raise UserError("qk_clip scales rows of whole matrices, which a sharded model does not have: leave one out")
    if shard and recipe.precision == "fp16":
        raise UserError("a sharded model cannot be trained in fp16: use bf16 or fp32")


def _sequences_per_epoch(recipe: Recipe, prepared: Prepared) -> int:
    """Whole updates only, so that an epoch has as many of them in any number of processes."""
    an_update = recipe.batch_size * recipe.gradient_accumulation
    return len(prepared.packed.train) // an_update * an_update


def _check_corpus(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse a corpus without a single update: the Trainer would end without a step."""
    if not _sequences_per_epoch(recipe, prepared):
        raise UserError(
            f"{recipe.corpus} gives {len(prepared.packed.train)} training sequences of {recipe.context_length} tokens, "
            f"one update needs {recipe.batch_size * recipe.gradient_accumulation}: give more text or a smaller "
            "batch_size"
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Create and hold the run folder; a second run in it would remove the first one's unfinished checkpoint.

    Of several processes of one run, the main one holds it.

    Raises:
        UserError: it cannot be created, or another process holds it.
    """
    if not distributed.is_main():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the run folder {folder}: {error.strerror}") from None
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {folder}") from None
        except OSError:  # some network file systems have no locks
            pass
        yield
    finally:
        os.close(handle)


def _begin_folder(recipe: Recipe, folder: Path) -> Recipe:
    """Write what a run folder begins with, unless it is there; returns the recipe with the precision resolved."""
    recipe = _check_folder(recipe, folder)  # once more: another process may have begun a run since
    if recipe.precision == "auto":
        recipe = replace(recipe, precision="bf16" if bf16_is_fast(recipe) else "fp32")
    try:
        if not (folder / CONFIG_FILE).exists():
            save_recipe(recipe, folder / CONFIG_FILE)
        if not (folder / ENVIRONMENT_FILE).exists():
            environment = json.dumps(describe_environment(), indent=2)
            (folder / ENVIRONMENT_FILE).write_text(environment + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder}: {error.strerror}") from None
    return recipe


def model_config(recipe: Recipe, vocab_size: int) -> EntropiConfig:
    """The model that a recipe asks for.

    Raises:
        UserError: no such model can be built.
    """
    architecture, regularised = split_training_name(recipe.architecture)
    regularizer = {
        "weight": recipe.entropy_weight,
        "margin": recipe.entropy_margin,
        "granularity": recipe.entropy_granularity,
        "max_entropy": recipe.entropy_maximum,
        "reduction": recipe.entropy_reduction,
        "threshold_init": recipe.threshold_init,
    }
    return EntropiConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads or None,
        intermediate_size=recipe.intermediate_size or None,
        max_position_embeddings=recipe.context_length,
        position_embedding=recipe.position_embedding,
        final_norm=recipe.final_norm,
        exp_iterations=recipe.exp_iterations or None,
        polynomial=recipe.polynomial,
        activation_function=recipe.activation_function,
        leaky_slope=recipe.leaky_slope,
        leaky_slope_learned=recipe.leaky_slope_learned,
        bias=recipe.bias,
        initializer_range=recipe.initializer_range or None,
        initialization=recipe.initialization,
        spectral_gain=recipe.spectral_gain,
        log_length_scaling=recipe.log_length_scaling,
        embedding_dropout=recipe.embedding_dropout,
        temperature_init=recipe.temperature_init,
        temperature_granularity=recipe.temperature_granularity,
        temperature_parametrization=recipe.temperature_parametrization,
        entropy_regularizer=regularizer if regularised else None,
    )


def _resume_point(recipe: Recipe, folder: Path, prepared: Prepared, console: Console) -> Checkpoint | None:
    """The newest whole checkpoint; later records are dropped, checkpoints that are not whole are removed."""
    path = folder / record_files.RECORDS_FILE
    begun = path.exists()
    if begun:
        starts = [r for r in record_files.read(path) if isinstance(r, records.RunStarted)]
        if starts and starts[-1].corpus_hash != prepared.corpus.content_hash:
            raise UserError(f"the corpus {recipe.corpus} has changed since {folder} was begun; choose another folder")
        if starts and starts[-1].tokenizer_hash not in ("", tokenizer_hash(prepared.tokenizer)):
            raise UserError(f"the tokenizer has changed since {folder} was begun; choose another folder")
    checkpoint = newest_whole(folder / CHECKPOINTS_FOLDER, console)
    if begun:
        step = checkpoint.step if checkpoint else 0
        record_files.forget_after(path, step)
        console.print(f"resuming {folder} after step {step} of {recipe.steps}", markup=False)
    return checkpoint


def _record_start(
    recipe: Recipe,
    folder: Path,
    model: EntropiForCausalLM,
    prepared: Prepared,
    architecture: str,
    checkpoint: Checkpoint | None,
) -> None:
    record_files.append(
        folder / record_files.RECORDS_FILE,
        records.RunStarted(
            time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            name=recipe.architecture,
            architecture=architecture,
            parameters=model.inference_parameters(),
            layers=recipe.layers,
            heads=recipe.heads,
            hidden_size=recipe.hidden_size,
            vocab_size=model.config.vocab_size,
            context_length=recipe.context_length,
            train_tokens=prepared.packed.train.size,
            heldout_tokens=prepared.packed.heldout.size,
            corpus=recipe.corpus,
            corpus_hash=prepared.corpus.content_hash,
            tokenizer_hash=tokenizer_hash(prepared.tokenizer),
            tokens_per_step=_tokens_per_step(recipe),
            total_steps=recipe.steps,
            precision=recipe.precision,
            resumed_at=checkpoint.step if checkpoint else 0,
        ),
    )


def _tokens_per_step(recipe: Recipe) -> int:
    return recipe.batch_size * recipe.gradient_accumulation * recipe.context_length


def _training_arguments(
    recipe: Recipe, folder: Path, live: Live | None = None, factor: float = 1.0
) -> TrainingArguments:
    # A tracker's own names, as far as this version of transformers knows them; nothing is ever put on a public page.
    tracking = {"project": "entropi", "trackio_space_id": None, "trackio_static_space_id": False}
    known = {field.name for field in fields(TrainingArguments)}
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS_FOLDER),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation // distributed.launched(),
        learning_rate=recipe.learning_rate * factor,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        warmup_steps=round(recipe.warmup * recipe.steps),
        **_schedule(recipe, factor),
        max_grad_norm=recipe.gradient_clip,
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_strategy="no",  # RunRecorder asks for logs
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.evaluate_every else "no",
        eval_steps=recipe.evaluate_every or None,
        save_strategy="steps",
        save_steps=recipe.save_every or recipe.steps,
        save_total_limit=None,  # CheckpointSeal removes old ones, after the new one is sealed
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[live.tracker] if live is not None else "none",
        run_name=folder.resolve().name,
        **{name: value for name, value in tracking.items() if name in known},
        disable_tqdm=True,
    )


def _schedule(recipe: Recipe, factor: float) -> dict[str, Any]:
    """The names under which transformers knows a schedule with a warm-up and a floor."""
    floor = recipe.learning_rate_floor * factor
    match recipe.schedule:
        case "linear" if floor:
            return {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 1.0, "lr_end": floor}}
        case "cosine" if floor:
            return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": floor}}
        case "constant":
            return {"lr_scheduler_type": "constant_with_warmup"}
    return {"lr_scheduler_type": recipe.schedule}


def _record_result(folder: Path, recipe: Recipe, model: EntropiForCausalLM, result: HeldOut, heldout: Blocks) -> None:
    path = folder / record_files.RECORDS_FILE
    record_files.append(
        path,
        records.Evaluation(
            step=recipe.steps,
            cross_entropy=result.cross_entropy,
            perplexity=result.perplexity,
            tokens=result.tokens,
            entropy=result.entropy.tolist(),
        ),
    )
    if bool(torch.isfinite(result.entropy).all()):  # a model that diverged in its last step has no diagnosis
        source = f"held-out text of {Path(recipe.corpus).name}, {len(heldout):,} sequences"
        record_files.append(path, diagnose_heldout(result, recipe.context_length, source))
        record_files.append(path, observe_patterns(model, heldout[:PATTERN_SEQUENCES]))
    for folded in (False, True):
        record_files.append(path, count(model.config, recipe.context_length, folded=folded))


def _save_model(model: EntropiForCausalLM, tokenizer: Tokenizer, recipe: Recipe, result: HeldOut, folder: Path) -> None:
    """Save under another name and rename: a model folder that exists is a complete one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.float().save_pretrained(partial)
    tokens = recipe.steps * _tokens_per_step(recipe)
    facts = {
        "trained as": f"`{recipe.architecture}`, {recipe.steps:,} updates, {tokens:,} tokens",
        "corpus": Path(recipe.corpus).name,
        "perplexity on held-out text": f"{result.perplexity:.2f} ({result.tokens:,} tokens)",
    }
    write_card(partial, model_card(model.config, model.inference_parameters(), facts))
    end = tokenizer.id_to_token(end_of_text_id(tokenizer))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token=end,
        model_max_length=recipe.context_length,
    ).save_pretrained(partial)
    os.replace(partial, folder)
