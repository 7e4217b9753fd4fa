"""What a recipe becomes: data, a model, the Trainer's arguments; and what of it cannot be built."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainingArguments, set_seed

from entropi.data.prepare import Prepared, prepare
from entropi.errors import UserError
from entropi.model.architectures import split_training_name
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.tapering import target_of
from entropi.training import distributed
from entropi.training.checkpoints import CHECKPOINTS_FOLDER
from entropi.training.live import Live
from entropi.training.loading import model_folder, open_config
from entropi.training.recipe import Recipe


def prepare_corpus(recipe: Recipe, console: Console, content_hash: str = "") -> Prepared:
    """The data of a recipe: read, tokenised and cut, or found in the cache.

    `content_hash` is that of the corpus of a run that is continued, whose split stays.

    Raises:
        UserError: a corpus or tokenizer that cannot be used, or too little text for one update.
    """
    tapered = recipe.taper_from
    prepared = prepare(
        recipe.corpus,
        recipe.vocab_size,
        recipe.context_length,
        console=console,
        tokenizer=str(model_folder(Path(tapered))) if tapered else recipe.tokenizer,
        per_document=recipe.packing == "document",
        content_hash=content_hash,
    )
    _check_corpus(recipe, prepared)
    return prepared


def _check_corpus(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse a corpus without a single update: the Trainer would end without a step."""
    if not sequences_per_epoch(recipe, prepared):
        raise UserError(
            f"{recipe.corpus} gives {len(prepared.packed.train)} training sequences of {recipe.context_length} tokens, "
            f"one update needs {recipe.batch_size * recipe.gradient_accumulation}: give more text or a smaller "
            "batch_size"
        )


def sequences_per_epoch(recipe: Recipe, prepared: Prepared) -> int:
    """How many training sequences are used: whole updates, as many an epoch in any number of processes."""
    an_update = recipe.batch_size * recipe.gradient_accumulation
    return len(prepared.packed.train) // an_update * an_update


def tokens_per_step(recipe: Recipe) -> int:
    """Tokens of an update, in all processes together."""
    return recipe.batch_size * recipe.gradient_accumulation * recipe.context_length


def model_config(recipe: Recipe, vocab_size: int) -> EntropiConfig:
    """The model that a recipe asks for; of a tapering what is left in the end, which has the teacher's vocabulary.

    Raises:
        UserError: no such model can be built.
    """
    if recipe.taper_from:
        return _tapered_config(recipe)
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
        softmax=recipe.softmax,
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


# Settings of models that are new, and what the teacher's configuration calls them; a tapered one has its teacher's.
_OF_THE_TEACHER = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "position_embedding": "position_embedding",
    "activation_function": "activation_function",
    "leaky_slope": "leaky_slope",
    "leaky_slope_learned": "leaky_slope_learned",
    "log_length_scaling": "log_length_scaling",
}
_OF_ITS_TEMPERATURES = ("temperature_granularity", "temperature_parametrization")  # where it has any
# Those that mean nothing to a model that is there already.
_OF_NEW_MODELS = (
    "tokenizer",
    "initializer_range",
    "initialization",
    "spectral_gain",
    "threshold_init",
    "temperature_init",
)


def _tapered_config(recipe: Recipe) -> EntropiConfig:
    """What the teacher of `recipe` becomes."""
    architecture, regularised = split_training_name(recipe.architecture)
    teacher = open_config(Path(recipe.taper_from))
    chosen = [field.name for field in fields(Recipe) if getattr(recipe, field.name) != field.default]
    fixed = _OF_THE_TEACHER | ({name: name for name in _OF_ITS_TEMPERATURES} if teacher.parts.temperature else {})
    problems = [
        f"{name} is {getattr(recipe, name)}, the teacher has {getattr(teacher, theirs)}"
        for name, theirs in fixed.items()
        if name in chosen and getattr(recipe, name) != getattr(teacher, theirs)
    ]
    problems += [f"{name} is for models that begin anew: leave it out" for name in _OF_NEW_MODELS if name in chosen]
    if regularised:
        problems.append("heads are held near the teacher's entropies with entropy_weight: leave EReg(...) out")
    if recipe.context_length > teacher.max_position_embeddings:
        most = teacher.max_position_embeddings
        asked = f"context_length is {recipe.context_length}"
        problems.append(f"{asked}, the teacher takes {most} tokens: --context-length {most} at most")
    if problems:
        raise UserError(f"{recipe.taper_from} cannot be tapered so: {'; '.join(problems)}")
    return target_of(
        teacher,
        architecture,
        softmax=recipe.softmax,
        final_norm=bool(recipe.final_norm),  # which a recipe has settled
        bias=recipe.bias if "bias" in chosen else None,
        embedding_dropout=recipe.embedding_dropout,
        temperature_granularity=recipe.temperature_granularity,
        temperature_parametrization=recipe.temperature_parametrization,
    )


def check_vocabulary(recipe: Recipe, config: EntropiConfig, prepared: Prepared) -> None:
    """Refuse to taper a model whose tokenizer has tokens that it has no embedding for."""
    if recipe.taper_from and (entries := prepared.tokenizer.get_vocab_size()) > config.vocab_size:
        raise UserError(
            f"the tokenizer of {recipe.taper_from} has {entries} tokens, and the model embeddings for "
            f"{config.vocab_size}: text may hold tokens that it cannot read"
        )


def new_model(recipe: Recipe, prepared: Prepared) -> EntropiForCausalLM:
    """The model before its first step: the same in every process."""
    set_seed(recipe.seed)
    return EntropiForCausalLM(model_config(recipe, prepared.tokenizer.get_vocab_size()))


def check_processes(recipe: Recipe, shard: bool) -> None:
    """Refuse a number of processes that would change the training, or what cannot be sharded."""
    count = distributed.launched()
    if recipe.taper_from and (count > 1 or shard):
        raise UserError("a model is tapered in one process, not sharded: start entropi without torchrun and --shard")
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


def training_arguments(
    recipe: Recipe, folder: Path, live: Live | None = None, factor: float = 1.0
) -> TrainingArguments:
    """What the Trainer is asked for; `factor` is what the recipe's learning rates are multiplied by."""
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
        save_total_limit=None,  # CheckpointCommit removes old ones, after the new one is committed
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # a copy that waits waits for the whole step
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
