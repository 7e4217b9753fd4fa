"""Models as they lie in a folder: opened or refused in one line, and evaluated on held-out text cut for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from entropi.console import ProgressLine
from entropi.data.packing import heldout_blocks
from entropi.data.tokenizer import end_of_text_id
from entropi.errors import UserError, is_failure
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.training.evaluation import HeldOut, evaluate_blocks
from entropi.training.recipe import CONFIG_FILE, load_recipe

MODEL_FOLDER = "model"  # of a run folder
# Of models that are not ours, which may be large: what is looked at unless more is asked for.
FOREIGN_SEQUENCES = 32
FOREIGN_CONTEXT = 1024
MOST_FOREIGN_LAYERS = 1024
MAX_LOGITS = 2**28  # numbers held at a time, a gigabyte


def open_model(path: Path) -> tuple[EntropiForCausalLM, Tokenizer, Path]:
    """Model, tokenizer and model folder of a run folder or a saved model.

    Raises:
        UserError: nothing there, unfinished, or damaged; one line that says which.
    """
    folder = model_folder(path)
    if not folder.is_dir():
        raise UserError(f"there is no model at {path}" + (": a folder is needed" if folder.exists() else ""))
    if not (folder / "config.json").exists():
        hint = "its training has not finished" if (path / CONFIG_FILE).exists() else "config.json is missing"
        raise UserError(f"{path} holds no model: {hint}")
    try:
        kind = json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"the model in {folder} is damaged: config.json cannot be read") from None
    if kind != EntropiConfig.model_type:
        raise UserError(f"the model in {folder} is of type {kind!r}; only entropi models can be opened here")
    for name in ("model.safetensors", "tokenizer.json"):
        if not (folder / name).exists():
            raise UserError(f"the model in {folder} is damaged: {name} is missing")
    try:
        with quiet_transformers():
            model, loading = EntropiForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # and then refuse them below, by name
                output_loading_info=True,
            )
    except Exception as error:
        # from_pretrained raises whatever its parsers raise; the user needs the folder and the first reason.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the model in {folder} is damaged: {reason}") from None
    # Without this, weights that are not in the file would silently be random ones.
    if astray := sorted(name if isinstance(name, str) else name[0] for names in loading.values() for name in names):
        raise UserError(f"the model in {folder} is damaged: {astray[0]} does not fit its config.json")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except BaseException as error:  # the tokenizers library raises nothing narrower, and panics
        if not is_failure(error):
            raise
        raise UserError(f"the model in {folder} is damaged: tokenizer.json cannot be read: {error}") from None
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise UserError(
            f"the model in {folder} is damaged: its tokenizer has {tokenizer.get_vocab_size()} entries, "
            f"the model {model.config.vocab_size}"
        )
    return model.eval(), tokenizer, folder


def open_causal_lm(path: Path) -> tuple[PreTrainedModel, Tokenizer, int, bool]:
    """Any causal LM that transformers saved in a folder, without running code of the folder's.

    Returns:
        The model in float32, its tokenizer, the id that ends a text, and whether that id also begins every sequence.

    Raises:
        UserError: what cannot be opened, in one line.
    """
    path = model_folder(path)
    _check_depth(path)
    settings: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    opened = []
    for part in ("model", "tokenizer"):
        try:
            with quiet_transformers():
                if part == "model":
                    weights = dict(use_safetensors=True, dtype=torch.float32, output_loading_info=True)
                    opened += AutoModelForCausalLM.from_pretrained(path, **weights, **settings)
                else:
                    opened.append(AutoTokenizer.from_pretrained(path, **settings))
        except Exception as error:  # whatever its parsers raise; the user needs the folder and the reason
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"the {part} in {path} cannot be opened: {reason}") from None
    model, loading, tokenizer = opened
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"the model in {path} is damaged: {missing[0]} is missing")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer in {path} cannot be used: tokenizer.json is missing")
    begins = bool(ids := tokenizer("a").input_ids) and ids[0] == tokenizer.bos_token_id
    end = tokenizer.bos_token_id if begins else tokenizer.eos_token_id
    if end is None:
        raise UserError(f"the tokenizer in {path} cannot be used: it has no token that ends a text")
    entries = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > entries:
        raise UserError(f"the model in {path} is damaged: its tokenizer has {len(tokenizer)} entries, it has {entries}")
    return model.eval(), tokenizer.backend_tokenizer, int(end), begins


def _check_depth(folder: Path) -> None:
    """Raise `UserError` for a config.json with so many layers that building them would take until the memory ends."""
    try:
        parts = [json.loads((folder / "config.json").read_bytes())]
    except (OSError, ValueError, RecursionError):
        return  # whoever reads it next says so
    while parts:
        part = parts.pop()
        if not isinstance(part, dict):
            continue
        parts += part.values()
        for name, value in part.items():
            if "layer" in name and isinstance(value, (int, float)) and value > MOST_FOREIGN_LAYERS:
                raise UserError(
                    f"the model in {folder} is damaged: {name} is {value} in its config.json, more than "
                    f"{MOST_FOREIGN_LAYERS}"
                )


def model_folder(path: Path) -> Path:
    """Where the model of a run folder lies; a saved model is its own."""
    return path / MODEL_FOLDER if (path / MODEL_FOLDER).is_dir() else path


def model_type(path: Path) -> str | None:
    """What kind of model a run folder or a saved model holds, as far as its config.json says."""
    folder = model_folder(path)
    try:
        return str(json.loads((folder / "config.json").read_bytes())["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def open_with_heldout(
    model: Path,
    corpus: str,
    exp_iterations: int | None,
    sequences: int | None = None,
    context_length: int | None = None,
    packing: Literal["stream", "document"] | None = None,
) -> tuple[PreTrainedModel, np.ndarray]:
    """A model, and blocks `(N, T)` of the held-out part of `corpus`, made with its own tokenizer.

    `exp_iterations` is t of the softmax kernel to evaluate with, 0 for the exact softmax, None for the model's own. The
    defaults of the others: of a model that is not ours 32 sequences, of ours all; as many tokens as the model takes, of
    others at most 1024; the packing of a run folder's training, and else a stream.

    Raises:
        UserError: no such model or corpus, or what the model cannot take.
    """
    for name, value, least in (("sequences", sequences, 1), ("context_length", context_length, 3)):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, at least {least} is needed")
    if model_type(model) in (None, "entropi"):
        loaded, tokenizer, _ = open_model(model)
        end, begins = end_of_text_id(tokenizer), False
        longest = usual = loaded.config.max_position_embeddings
        if packing is None and (model / CONFIG_FILE).is_file():  # a run folder
            packing = load_recipe(model / CONFIG_FILE).packing
        if exp_iterations is not None:
            loaded.set_exp_iterations(exp_iterations or None)
    else:
        if exp_iterations is not None:
            raise UserError("exp_iterations is for models of entropi: others have the exact softmax")
        loaded, tokenizer, end, begins = open_causal_lm(model)
        sequences = sequences or FOREIGN_SEQUENCES
        longest = getattr(loaded.config, "max_position_embeddings", None) or FOREIGN_CONTEXT
        usual = min(longest, FOREIGN_CONTEXT)
    length = context_length or usual
    if length > longest:
        raise UserError(f"context_length is {length}, the model takes {longest} tokens at most")
    # Models with a token that begins every text expect it, and many heads rest on it.
    cut = heldout_blocks(corpus, tokenizer, length - begins, end, per_document=packing == "document")[:sequences]
    blocks = np.insert(cut, 0, end, axis=1) if begins else cut
    if not len(blocks):
        raise UserError(f"the held-out part of {corpus} is shorter than one block of {length} tokens")
    return loaded, blocks


def evaluate_heldout(model: PreTrainedModel, blocks: np.ndarray, batch_size: int) -> HeldOut:
    """`evaluate_blocks` of an opened model on `blocks` `(N, T)` where this machine is fastest, with a progress bar.

    Raises:
        UserError: an impossible batch size, or attention that `record_entropy` cannot stand in for.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, at least 1 is needed")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = max(1, min(batch_size, MAX_LOGITS // (blocks.shape[1] * model.config.vocab_size)))
    with ProgressLine("evaluating on held-out text", len(blocks)) as line:
        try:
            return evaluate_blocks(model, blocks, batch_size, line.update)
        except ValueError as error:
            if model.config.model_type == "entropi":
                raise
            raise UserError(str(error)) from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars and advice of transformers; its settings are restored afterwards."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
