"""A training run from a recipe to a run folder: start, resume, finish; and how to open what it left."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from entropi import records
from entropi.console import ProgressLine, make_console
from entropi.costs.operations import count
from entropi.data.packing import Prepared, prepare
from entropi.entropy.diagnosis import diagnose
from entropi.errors import UserError
from entropi.model.configuration import EntropiConfig, split_training_name
from entropi.model.decoder import EntropiForCausalLM
from entropi.training.callbacks import SEAL, CheckpointSeal, NonFiniteGuard, RunRecorder, latest_checkpoint
from entropi.training.evaluation import HeldOut, evaluate_blocks
from entropi.training.recipe import CONFIG_FILE, Recipe, differences, load_recipe, save_recipe
from entropi.training.trainer import BlockDataset, EntropiTrainer

MODEL_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"
ENVIRONMENT_FILE = "environment.json"


def train(recipe: Recipe, folder: Path) -> Path:
    """Train as `recipe` says into the run folder `folder`; continue there if it holds an unfinished run of it.

    Returns:
        The folder of the trained model, ready for `from_pretrained`.

    Raises:
        UserError: a recipe that cannot be trained, or a folder that holds something else.
    """
    console = make_console()
    architecture, regularised = split_training_name(recipe.architecture)
    recipe = _open_folder(recipe, folder)
    model_folder = folder / MODEL_FOLDER
    if model_folder.exists():
        console.print(f"{folder} holds the finished run of this recipe; nothing to do.", markup=False)
        return model_folder

    prepared = prepare(recipe.corpus, recipe.vocab_size, recipe.context_length, console=console)
    set_seed(recipe.seed)
    model = EntropiForCausalLM(_model_config(recipe, architecture, regularised, prepared.tokenizer))
    checkpoint, step = _resume_point(recipe, folder, prepared, console)
    _record_start(recipe, folder, model, prepared, architecture, step)

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    tokens_per_step = recipe.batch_size * recipe.gradient_accumulation * recipe.context_length
    progress = ProgressLine(f"training {recipe.architecture}", recipe.steps, done=step, console=console)
    recorder = RunRecorder(
        folder / records.RECORDS_FILE,
        progress,
        log_every=recipe.log_every,
        entropy_every=recipe.entropy_every,
        tokens_per_step=tokens_per_step,
    )
    trainer = EntropiTrainer(
        model=model,
        args=_training_arguments(recipe, folder),
        train_dataset=BlockDataset(prepared.packed.train),
        callbacks=[recorder, NonFiniteGuard(recipe.nonfinite, recorder), CheckpointSeal()],
        eval_dataset=BlockDataset(prepared.packed.heldout[: recipe.evaluation_blocks]),
        recorder=recorder,
    )
    trainer.remove_callback(PrinterCallback)
    with progress:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    heldout = prepared.packed.heldout
    with ProgressLine("evaluating on held-out text", len(heldout), console=console) as line:
        result = evaluate_blocks(model, heldout, recipe.batch_size, line.update)
    _record_result(folder, recipe, model, result)
    _save_model(model, prepared.tokenizer, recipe, model_folder)
    return model_folder


def diagnose_heldout(result: HeldOut, context_length: int) -> records.DiagnosisRecord:
    """The diagnosis of an evaluation."""
    found = diagnose(result.entropy, context_length)
    return records.DiagnosisRecord(
        entropy=found.entropy,
        context_length=context_length,
        max_observed=found.max_observed,
        max_possible=found.max_possible,
        quartile_shares=list(found.quartile_shares),
        overloaded=found.overloaded,
        collapsed=found.collapsed,
        verdict=found.verdict,
    )


def open_model(path: Path) -> tuple[EntropiForCausalLM, Tokenizer, Path]:
    """Model, tokenizer and model folder of a run folder or a saved model.

    Raises:
        UserError: nothing there, unfinished, or damaged; one line that says which.
    """
    folder = path / MODEL_FOLDER if (path / MODEL_FOLDER).is_dir() else path
    if not folder.is_dir():
        raise UserError(f"there is no model at {path}")
    if not (folder / "config.json").exists():
        hint = "its training has not finished" if (path / CONFIG_FILE).exists() else "config.json is missing"
        raise UserError(f"{path} holds no model: {hint}")
    try:
        model = EntropiForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        # from_pretrained raises whatever its parsers raise; the user needs the folder and the first reason.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the model in {folder} is damaged: {reason}") from None
    return model, tokenizer, folder


def _open_folder(recipe: Recipe, folder: Path) -> Recipe:
    """Create the run folder, or check that it belongs to `recipe`; returns the recipe with what was resolved."""
    config = folder / CONFIG_FILE
    if config.exists():
        existing = load_recipe(config)
        if differing := differences(recipe, existing):
            raise UserError(
                f"{folder} holds a run of another recipe, which differs in {', '.join(differing)}; "
                "choose another folder"
            )
        return existing
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not a run folder; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the run folder {folder}: {error.strerror}") from None
    if recipe.precision == "auto":
        recipe = replace(recipe, precision="bf16" if bf16_is_fast(recipe) else "fp32")
    environment = json.dumps(describe_environment(), indent=2)
    (folder / ENVIRONMENT_FILE).write_text(environment + "\n", encoding="utf-8")
    save_recipe(recipe, config)
    return recipe


def _model_config(recipe: Recipe, architecture: str, regularised: bool, tokenizer: Tokenizer) -> EntropiConfig:
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
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.context_length,
        bias=recipe.bias,
        temperature_init=recipe.temperature_init,
        entropy_regularizer=regularizer if regularised else None,
    )


def _resume_point(recipe: Recipe, folder: Path, prepared: Prepared, console: Console) -> tuple[Path | None, int]:
    """The newest complete checkpoint and its step; later records are dropped, cut-short checkpoints removed."""
    checkpoints = folder / CHECKPOINTS_FOLDER
    found = latest_checkpoint(checkpoints)
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / SEAL).exists():
            console.print(f"{path.name} was cut short and is removed", markup=False)
            shutil.rmtree(path)
    step = found[1] if found else 0
    path = folder / records.RECORDS_FILE
    if path.exists():
        starts = [r for r in records.read(path) if isinstance(r, records.RunStarted)]
        if starts and starts[-1].corpus_hash != prepared.corpus.content_hash:
            raise UserError(f"the corpus {recipe.corpus} has changed since {folder} was begun; choose another folder")
        records.forget_after(path, step)
        console.print(f"resuming {folder} after step {step} of {recipe.steps}", markup=False)
    return (found[0] if found else None), step


def _record_start(
    recipe: Recipe, folder: Path, model: EntropiForCausalLM, prepared: Prepared, architecture: str, step: int
) -> None:
    records.append(
        folder / records.RECORDS_FILE,
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
            tokens_per_step=recipe.batch_size * recipe.gradient_accumulation * recipe.context_length,
            total_steps=recipe.steps,
            precision=recipe.precision,
            resumed_at=step,
        ),
    )


def _training_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS_FOLDER),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.999,
        warmup_steps=round(recipe.warmup * recipe.steps),
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
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
        save_total_limit=recipe.keep_checkpoints,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


def _record_result(folder: Path, recipe: Recipe, model: EntropiForCausalLM, result: HeldOut) -> None:
    path = folder / records.RECORDS_FILE
    records.append(
        path,
        records.Evaluation(
            step=recipe.steps,
            cross_entropy=result.cross_entropy,
            perplexity=result.perplexity,
            tokens=result.tokens,
            entropy=result.entropy.tolist(),
        ),
    )
    records.append(path, diagnose_heldout(result, recipe.context_length))
    records.append(path, count(model.config, recipe.context_length))


def _save_model(model: EntropiForCausalLM, tokenizer: Tokenizer, recipe: Recipe, folder: Path) -> None:
    """Save under another name and rename: a model folder that exists is a complete one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.float().save_pretrained(partial)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        model_max_length=recipe.context_length,
    ).save_pretrained(partial)
    os.replace(partial, folder)


def bf16_is_fast(recipe: Recipe) -> bool:
    """Whether bfloat16 matrix products of this model's size run at least 1.5 times as fast as float32 ones here."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    rows = min(recipe.batch_size * recipe.context_length, 4096)

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(rows, recipe.hidden_size, dtype=dtype)
        b = torch.ones(recipe.hidden_size, 4 * recipe.hidden_size, dtype=dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        return float(np.median(times))

    return seconds(torch.bfloat16) * 1.5 < seconds(torch.float32)


def describe_environment() -> dict[str, Any]:
    """Versions, machine and command of this process, for the run folder."""
    versions: dict[str, str | None] = {}
    for package in ("entropi", "torch", "transformers", "accelerate", "tokenizers", "numpy", "jax", "spu"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "command": ["entropi", *sys.argv[1:]],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
