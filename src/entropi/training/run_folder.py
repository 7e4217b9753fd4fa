"""The folder of a run: begun, locked, recorded in, resumed from, and in the end with a model in it."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from entropi import record_files, records
from entropi.costs.operations import count, parameters
from entropi.data.prepare import Prepared
from entropi.data.shards import Blocks
from entropi.data.tokenizer import end_of_text_id, tokenizer_hash
from entropi.errors import UserError
from entropi.model.architectures import split_training_name
from entropi.model.card import model_card, write_card
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.tapering import TaperedModel
from entropi.training import distributed
from entropi.training.build import tokens_per_step
from entropi.training.callbacks import Diverged
from entropi.training.checkpoints import CHECKPOINTS_FOLDER, Checkpoint, latest_valid
from entropi.training.environment import bf16_is_fast, describe_environment
from entropi.training.evaluation import PATTERN_SEQUENCES, HeldOut, diagnose_heldout, observe_patterns
from entropi.training.loading import model_folder
from entropi.training.recipe import CONFIG_FILE, Recipe, differences, load_recipe, save_recipe
from entropi.training.taper import Teacher, check_teacher

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Copied from a tapered model's teacher, with the chat template and whatever else they hold.
_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
ENVIRONMENT_FILE = "environment.json"
ROLLBACK_FACTOR, MOST_ROLLBACKS = 0.5, 3


def check_folder(recipe: Recipe, folder: Path) -> Recipe:
    """Check that `folder` can hold a run of `recipe`; returns the recipe, as resolved by an earlier start of it."""
    config = folder / CONFIG_FILE
    try:
        if config.exists():
            existing = load_recipe(config)
            if differing := differences(recipe, existing):
                longer = any(text.startswith("steps ") for text in differing)
                why = ": a run cannot be given more steps, as its learning rates depend on their number" * longer
                raise UserError(
                    f"{folder} holds a run of another recipe, which differs in {', '.join(differing)}; choose another "
                    f"folder{why}"
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


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
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


def begin_folder(recipe: Recipe, folder: Path) -> Recipe:
    """Write what a run folder begins with, unless it is there; returns the recipe with the precision resolved."""
    recipe = check_folder(recipe, folder)  # once more: another process may have begun a run since
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


def resume_point(
    recipe: Recipe, folder: Path, prepared: Prepared, console: Console, teacher: Teacher | None = None
) -> Checkpoint | None:
    """The newest valid checkpoint; later records are dropped, checkpoints that are not valid are removed.

    Raises:
        UserError: corpus, tokenizer or teacher are not those that the run began with.
    """
    path = folder / record_files.RECORDS_FILE
    begun = path.exists()
    if begun:
        starts = [r for r in record_files.read(path) if isinstance(r, records.RunStarted)]
        if starts and starts[-1].corpus_hash != prepared.corpus.content_hash:
            raise UserError(f"the corpus {recipe.corpus} has changed since {folder} was begun; choose another folder")
        if starts and starts[-1].tokenizer_hash not in ("", tokenizer_hash(prepared.tokenizer)):
            raise UserError(f"the tokenizer has changed since {folder} was begun; choose another folder")
        if starts and teacher is not None:
            check_teacher(teacher, starts[-1], folder)
    checkpoint = latest_valid(folder / CHECKPOINTS_FOLDER, console)
    if begun:
        step = checkpoint.step if checkpoint else 0
        record_files.forget_after(path, step)
        console.print(f"resuming {folder} after step {step} of {recipe.steps}", markup=False)
    return checkpoint


def record_start(
    recipe: Recipe,
    folder: Path,
    model: EntropiForCausalLM,
    prepared: Prepared,
    checkpoint: Checkpoint | None,
    teacher: Teacher | None = None,
) -> None:
    """Record that the run begins, or goes on from `checkpoint`."""
    architecture, _ = split_training_name(recipe.architecture)
    config = model.target if isinstance(model, TaperedModel) else model.config
    record_files.append(
        folder / record_files.RECORDS_FILE,
        records.RunStarted(
            time=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            name=recipe.architecture,
            architecture=architecture,
            parameters=parameters(config),
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            context_length=recipe.context_length,
            train_tokens=prepared.packed.train.size,
            heldout_tokens=prepared.packed.heldout.size,
            corpus=recipe.corpus,
            corpus_hash=prepared.corpus.content_hash,
            tokenizer_hash=tokenizer_hash(prepared.tokenizer),
            corpus_sources=[records.CorpusSource(s.name, s.licence, s.part) for s in prepared.corpus.sources],
            tokens_per_step=tokens_per_step(recipe),
            total_steps=recipe.steps,
            precision=recipe.precision,
            resumed_at=checkpoint.step if checkpoint else 0,
            teacher=teacher.path if teacher else "",
            teacher_hash=teacher.digest if teacher else "",
        ),
    )


def rate_factor(folder: Path) -> float:
    """What the recipe's learning rates are multiplied by: 1, and less where the run has gone back."""
    back = [r for r in record_files.read(folder / record_files.RECORDS_FILE) if isinstance(r, records.RolledBack)]
    return back[-1].rate_factor if back else 1.0


def go_back(folder: Path, event: Diverged, console: Console) -> Checkpoint | None:
    """The last checkpoint before a divergence, or None for the start; noted in the records.

    Raises:
        UserError: it happened too often.
    """
    path = folder / record_files.RECORDS_FILE
    factor = rate_factor(folder) * ROLLBACK_FACTOR
    if factor < ROLLBACK_FACTOR**MOST_ROLLBACKS:
        raise UserError(f"{event.reason}; the run has gone back {MOST_ROLLBACKS} times already: it has diverged")
    checkpoint = latest_valid(folder / CHECKPOINTS_FOLDER, console)
    step = checkpoint.step if checkpoint else 0
    record_files.forget_after(path, step)
    back = records.RolledBack(step=step, from_step=event.step, reason=event.reason, rate_factor=factor)
    record_files.append(path, back)
    console.print(f"{event.reason}; going back to step {step}, on at {factor:g} of the learning rate", markup=False)
    return checkpoint


def record_result(folder: Path, recipe: Recipe, model: EntropiForCausalLM, result: HeldOut, heldout: Blocks) -> None:
    """Record what the trained model does on `heldout`, and what it costs."""
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


def save_model(model: EntropiForCausalLM, tokenizer: Tokenizer, recipe: Recipe, result: HeldOut, folder: Path) -> None:
    """Save under another name and rename: a model folder that exists is a complete one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.float().save_pretrained(partial)
    tokens = recipe.steps * tokens_per_step(recipe)
    facts = {"tapered from": Path(recipe.taper_from).name} if recipe.taper_from else {}
    facts |= {
        "trained as": f"`{recipe.architecture}`, {recipe.steps:,} updates, {tokens:,} tokens",
        "corpus": Path(recipe.corpus).name,
        "perplexity on held-out text": f"{result.perplexity:.2f} ({result.tokens:,} tokens)",
    }
    write_card(partial, model_card(model.config, model.inference_parameters(), facts))
    _save_tokenizer(tokenizer, recipe, partial)
    os.replace(partial, folder)


def _save_tokenizer(tokenizer: Tokenizer, recipe: Recipe, folder: Path) -> None:
    """Put the tokenizer beside the model that was trained with it."""
    if recipe.taper_from:
        for name in _OF_A_TOKENIZER:
            if (file := model_folder(Path(recipe.taper_from)) / name).is_file():
                shutil.copyfile(file, folder / name)
        return
    end = tokenizer.id_to_token(end_of_text_id(tokenizer))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        bos_token=end,
        model_max_length=recipe.context_length,
    ).save_pretrained(folder)
