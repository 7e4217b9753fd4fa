"""Models as they lie in a folder: opened or refused in one line, and evaluated on text cut for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from entropi import record_files, records
from entropi.chat import ChatForm
from entropi.console import ProgressLine
from entropi.costs.operations import folded_parameters, parameters
from entropi.data.corpus import STDLIB, as_shown
from entropi.data.hub import NAMED
from entropi.data.prepare import heldout_blocks, is_plain_text
from entropi.data.tokenizer import end_of_text_id
from entropi.errors import UserError, is_failure
from entropi.machine import available_memory
from entropi.model.chat_template import chat_form
from entropi.model.configuration import EntropiConfig
from entropi.model.convert import Weights, options_of
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.gguf import configuration_of, is_gguf, read_once, source_of
from entropi.model.shape import read_shape, refuse_folded, shape_of
from entropi.training.evaluation import HeldOut, evaluate_blocks
from entropi.training.recipe import CONFIG_FILE, load_recipe

MODEL_FOLDER = "model"  # of a run folder
# Of models that are not ours, which may be large: what is looked at unless more is asked for.
FOREIGN_SEQUENCES = 32
FOREIGN_CONTEXT = 1024
MOST_FOREIGN_LAYERS = 1024
# Any of these is a tokenizer that transformers can open.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
MAX_LOGITS = 2**28  # numbers held at a time, a gigabyte


def open_model(path: Path) -> tuple[EntropiForCausalLM, Tokenizer, Path]:
    """Model, tokenizer and model folder of a run folder or a saved model; another family's model is converted.

    The tokenizer may have more entries than the model: a text that uses one of those is what cannot be evaluated.

    Raises:
        UserError: nothing there, unfinished, or damaged; one line that says which.
    """
    if model_type(path) not in (None, EntropiConfig.model_type):
        converted = open_converted(path)
        return converted.model, converted.tokenizer.backend_tokenizer, path
    folder = model_folder(path)
    if not folder.is_dir():
        raise UserError(f"there is no model at {path}" + (": a folder is needed" if folder.exists() else ""))
    if not (folder / "config.json").exists():
        refuse_folded(folder)
        hint = "its training has not finished" if (path / CONFIG_FILE).exists() else "config.json is missing"
        raise UserError(f"{path} holds no model: {hint}")
    try:
        json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"the model in {folder} is damaged: config.json cannot be read") from None
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
    return model.eval(), tokenizer, folder


def open_config(path: Path) -> EntropiConfig:
    """The configuration of what `open_model` opens, without its weights; GGUF files excepted, which have no tokenizer.

    Raises:
        UserError: as `open_model`.
    """
    match model_type(path):
        case "gguf":
            raise UserError(f"{path} has no tokenizer.json: entropi convert makes a folder of it")
        case None:
            return open_model(path)[0].config  # which says what is wrong
        case EntropiConfig.model_type:
            try:
                return EntropiConfig.from_pretrained(model_folder(path), local_files_only=True)
            except Exception as error:  # as in `open_model`
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(f"the model in {model_folder(path)} is damaged: {reason}") from None
        case _:
            return EntropiConfig(**options_of(_configuration(model_folder(path)))[0])


def open_chat_form(path: Path) -> ChatForm | None:
    """What a saved model's chat template puts around messages; None where the model has no template.

    Raises:
        UserError: a template that does something else, or that cannot be read.
    """
    path = model_folder(path)
    if not is_gguf(path) and not any((path / name).is_file() for name in _TEMPLATE_FILES):
        return None
    place, gguf = source_of(path)
    kind = AutoTokenizer if gguf or model_type(path) != EntropiConfig.model_type else PreTrainedTokenizerFast
    try:
        with quiet_transformers():
            tokenizer = kind.from_pretrained(place, local_files_only=True, trust_remote_code=False, **gguf)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the tokenizer in {path} cannot be opened: {reason}") from None
    return chat_form(tokenizer)


def open_reading(path: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Model, in float32, and tokenizer of a folder, ours or another family's, or of a GGUF file.

    Raises:
        UserError: as `open_model` or `open_causal_lm`.
    """
    if model_type(path) in (None, EntropiConfig.model_type):
        return open_model(path)[:2]
    return open_causal_lm(path)[:2]


def open_causal_lm(path: Path) -> tuple[PreTrainedModel, Tokenizer, int, bool]:
    """Any causal LM that transformers saved in a folder, without running code of the folder's.

    The tokenizer may have more entries than the model, as for `open_model`.

    Returns:
        The model in float32, its tokenizer, the id that ends a text, and whether that id also begins every sequence.

    Raises:
        UserError: what cannot be opened, in one line.
    """
    path = model_folder(path)
    with read_once(path):
        model, tokenizer = _open_foreign(path)
    begins = bool(ids := tokenizer("a").input_ids) and ids[0] == tokenizer.bos_token_id
    end = tokenizer.bos_token_id if begins else tokenizer.eos_token_id
    if end is None:
        raise UserError(f"the tokenizer in {path} cannot be used: it has no token that ends a text")
    return model.eval(), tokenizer.backend_tokenizer, int(end), begins


_TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja")  # where a folder's chat template may lie
# Ends of names that older checkpoints have, of numbers that follow from the configuration.
_CONSTANTS = ("inv_freq", "attn.bias", "attention.bias", "masked_bias")


def _open_foreign(path: Path, *, strict: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model, in float32, and tokenizer of a folder that transformers saved or of a GGUF file.

    With `strict` tensors that transformers would leave out are refused.

    Raises:
        UserError: what cannot be opened, in one line.
    """
    place, gguf = source_of(path)
    if not gguf:
        _check_depth(path)
        if path.is_dir() and not any(found for name in TOKENIZER_FILES for found in path.glob(name)):
            raise UserError(f"{path} holds no tokenizer: {TOKENIZER_FILES[0]} is missing; save the model's own there")
    options: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False, **gguf)
    opened: list[Any] = []
    for part in ("tokenizer", "model"):
        try:
            with quiet_transformers():
                if part == "model":
                    weights: dict[str, Any] = dict(dtype=torch.float32, output_loading_info=True)
                    weights |= {} if gguf else {"use_safetensors": True}
                    opened += AutoModelForCausalLM.from_pretrained(place, **weights, **options)
                else:
                    opened.append(AutoTokenizer.from_pretrained(place, **options))
        except Exception as error:  # whatever its parsers raise; the user needs the folder and the reason
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"the {part} in {path} cannot be opened: {reason}") from None
    tokenizer, model, loading = opened
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"the model in {path} is damaged: {missing[0]} is missing")
    if strict and (extra := sorted(name for name in loading["unexpected_keys"] if not name.endswith(_CONSTANTS))):
        raise UserError(f"the model in {path} is damaged: its configuration has no place for the tensor {extra[0]}")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer in {path} cannot be used: tokenizer.json is missing")
    return model, tokenizer


@dataclass(frozen=True)
class Converted:
    """Another family's model as one of ours, its tokenizer, and what is to be said of the conversion."""

    model: EntropiForCausalLM
    tokenizer: PreTrainedTokenizerFast
    notes: list[str]


# Bytes a parameter that converting needs at most: float32 twice, while transformers fills the model from what it read.
CONVERSION_BYTES = 9


def open_converted(path: Path) -> Converted:
    """A checkpoint of another family, converted, with float32 weights.

    Args:
        path: a folder that transformers saved, or a GGUF file.

    Raises:
        UserError: an unknown family, options that entropi models do not have, too little memory, or damaged files.
    """
    path = model_folder(path)
    with read_once(path):
        values = configuration_of(path) if is_gguf(path) else _configuration(path)
        count = parameters(shape_of(values))
        _check_memory(path, count, count * CONVERSION_BYTES, "converting")
        theirs, tokenizer = _open_foreign(path, strict=True)
    notes, generation = list[str](), theirs.generation_config
    stored = values.get("dtype") or values.get("torch_dtype")
    if stored not in (None, "float32"):
        notes.append(f"its weights were {stored} and are float32 now")
    weights = Weights(theirs.state_dict())
    del theirs  # what has been taken over is then held once
    model, more = EntropiForCausalLM.from_weights(values, weights)
    if generation is not None:
        model.generation_config = generation
        if generation.eos_token_id is not None:  # chat models have more than their configuration names
            model.config.eos_token_id = generation.eos_token_id
    return Converted(model.eval(), tokenizer, notes + more)


def _configuration(folder: Path) -> dict[str, Any]:
    """transformers' reading of a `config.json`, with all defaults."""
    try:
        with quiet_transformers():
            values: dict[str, Any] = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
            return values
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"the model in {folder} cannot be opened: {reason}") from None


def check_memory_for_folding(path: Path) -> None:
    """Raise `UserError` where a model cannot be folded in the memory that is left, before it is opened.

    It is held in float32, what is folded in float64, and that as the float32 numbers that are written.
    """
    try:
        shape = read_shape(path)
        count, folded = parameters(shape), folded_parameters(shape)
    except UserError:
        return  # whoever opens it says what is wrong
    _check_memory(path, count, 4 * count + 12 * folded, "folding")


def _check_memory(path: Path, count: int, need: int, doing: str) -> None:
    left = available_memory()
    if left is not None and need > left:
        raise UserError(
            f"the model in {path} has {count:,} parameters, and {doing} it takes {need / 1e9:.3g} GB of memory: "
            f"{left / 1e9:.3g} GB are left on this machine"
        )


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
    """What kind of model a run folder or a saved model holds, as far as its config.json says; "gguf" of such a file."""
    if is_gguf(path):
        return "gguf"
    folder = model_folder(path)
    try:
        return str(json.loads((folder / "config.json").read_bytes())["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def is_run_folder(path: Path) -> bool:
    """Whether a training began there."""
    return (path / CONFIG_FILE).is_file()


def corpus_hash(folder: Path) -> str:
    """The hash of the corpus of the run in `folder`; empty where that is not recorded."""
    path = folder / record_files.RECORDS_FILE
    starts = [r for r in record_files.read(path) if isinstance(r, records.RunStarted)] if path.exists() else []
    return starts[-1].corpus_hash if starts else ""


@dataclass(frozen=True)
class Opened:
    """A model and the text it is to be evaluated on."""

    model: PreTrainedModel
    blocks: np.ndarray  # (N, T) ids of the model's own tokenizer
    corpus: str  # as --corpus names it
    text: str  # what it is, in words
    amount: str  # how much of it is used, in words
    ours: bool

    @property
    def source(self) -> str:
        """The text and how much of it is used, in words."""
        return f"{self.text}, {self.amount}"


def open_with_text(
    model: Path,
    corpus: str | None = None,
    softmax: str | None = None,
    sequences: int | None = None,
    context_length: int | None = None,
    packing: Literal["stream", "document"] | None = None,
    *,
    all_of_plain_text: bool = False,
    whole: bool = False,
    usual_length: int | None = None,
    tokens: int | None = None,
) -> Opened:
    """A model, and blocks `(N, T)` of `corpus`, made with its own tokenizer.

    Of models of ours these are of the held-out part. Other models were trained on none of it: of a text file or folder
    all is used, and of data sets, to compare with ours, the held-out part.

    Args:
        model: run folder, saved model, or any causal LM that transformers saved.
        corpus: by default the run's own, and for what is no run folder "stdlib".
        softmax: form of the softmax to evaluate with, such as "exact" or "power-8"; None for the model's own.
        sequences: how many blocks at most; by default all, of models that are not ours 32.
        context_length: T; by default as many tokens as the model takes, of models that are not ours at most 1024.
        packing: by default that of a run folder's training, and else a stream.
        all_of_plain_text: of a text file or folder all blocks by default, whatever the model.
        whole: of a text file or folder all text, for a model of ours too, which must not have been trained on it.
        usual_length: T by default, where the model takes as many tokens.
        tokens: where no number of sequences is given, as many as have so many tokens.

    Raises:
        UserError: no such model or corpus, what the model cannot take, or a token that it has no embedding for.
    """
    _check_at_least(("sequences", sequences, 1), ("context_length", context_length, 3))
    opened = _open_any(model, softmax)
    recipe = load_recipe(model / CONFIG_FILE) if opened.ours and is_run_folder(model) else None
    if recipe is not None:
        packing = packing or recipe.packing
    of_the_run = corpus is None and recipe is not None
    if corpus is None:
        corpus = recipe.corpus if recipe is not None else STDLIB
    if whole and of_the_run:
        raise UserError("--whole needs --corpus with another text: the run was trained on its own")
    if whole and not is_plain_text(corpus):
        raise UserError(f"--whole needs --corpus with a text file or a folder of texts, not {corpus}")
    plain = (whole or not opened.ours) and is_plain_text(corpus)
    length = context_length or min(usual_length or opened.usual, opened.longest)
    if length > opened.longest:
        raise UserError(f"context_length is {length}, the model takes {opened.longest} tokens at most")

    named = _name(corpus) if plain else f"held-out text of {_name(corpus)}"
    options: dict[str, Any] = dict(per_document=packing == "document", whole=plain)
    if recipe is not None:
        options["content_hash"] = corpus_hash(model)
    try:
        cut = heldout_blocks(corpus, opened.tokenizer, length - opened.begins, opened.end, **options)
    except UserError as error:
        if not of_the_run:
            raise
        raise UserError(f"{error} (this is the corpus of the run; --corpus takes another)") from None
    if not len(cut):
        raise UserError(
            f"{named} is shorter than one block of {length} tokens: give more text or a smaller --context-length"
        )

    if tokens is not None and sequences is None:
        sequences = -(-tokens // length)
    most = sequences or (len(cut) if opened.ours or (plain and all_of_plain_text) else FOREIGN_SEQUENCES)
    # Models with a token that begins every text expect it, and many heads rest on it.
    blocks = np.insert(cut[:most], 0, opened.end, axis=1) if opened.begins else cut[:most]
    _check_embedded(blocks, opened, named, model)
    return Opened(opened.model, blocks, corpus, named, _amount(len(blocks), len(cut)), opened.ours)


@dataclass(frozen=True)
class _AnyModel:
    """A model of ours or of others, with what is needed to cut text for it."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    end: int  # id of the token that ends a text
    begins: bool  # whether that token also begins every sequence
    longest: int  # tokens that the model takes
    usual: int  # tokens a sequence unless told otherwise
    ours: bool


def _open_any(path: Path, softmax: str | None) -> _AnyModel:
    """A run folder, a saved model of ours, or any causal LM; raises `UserError` for what cannot be opened."""
    if model_type(path) in (None, EntropiConfig.model_type):
        model, tokenizer, _ = open_model(path)
        if softmax is not None:
            model.set_softmax(softmax)
        longest, first = model.config.max_position_embeddings, _beginning(tokenizer)
        end = _end_of_text(model, tokenizer) if first is None else first
        return _AnyModel(model, tokenizer, end, first is not None, longest, longest, True)

    if softmax is not None:
        raise UserError("softmax is for models of entropi: others have the exact one")
    foreign, tokenizer, end, begins = open_causal_lm(path)
    longest = getattr(foreign.config.get_text_config(), "max_position_embeddings", None) or FOREIGN_CONTEXT
    return _AnyModel(foreign, tokenizer, end, begins, longest, min(longest, FOREIGN_CONTEXT), False)


def _beginning(tokenizer: Tokenizer) -> int | None:
    """The token that a converted model's tokenizer puts in front of every text; ours put none there."""
    encoded = tokenizer.encode("a")
    return encoded.ids[0] if encoded.special_tokens_mask[:1] == [1] else None


def _end_of_text(model: EntropiForCausalLM, tokenizer: Tokenizer) -> int:
    """The id that ends a text: that of a token known to mean it, and else the one that the model was converted with."""
    try:
        return end_of_text_id(tokenizer)
    except UserError:
        ids = model.config.eos_token_id
        if first := ids if isinstance(ids, int) else next(iter(ids or []), None):
            return int(first)
        raise


def _check_at_least(*numbers: tuple[str, int | None, int]) -> None:
    """Raise `UserError` for one of `(name, value, least)` whose value is given and too small."""
    for name, value, least in numbers:
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, at least {least} is needed")


def _amount(used: int, of: int) -> str:
    part = f" of {of:,}" if used < of else ""
    return f"{used:,}{part} sequence{'s' if of > 1 else ''}"


def _name(corpus: str) -> str:
    return corpus if corpus in NAMED or corpus == STDLIB else as_shown(Path(corpus).expanduser().resolve().name)


def _check_embedded(blocks: np.ndarray, opened: _AnyModel, named: str, path: Path) -> None:
    """Raise `UserError` for a token that the model has no embedding for."""
    entries = _entries(opened.model)
    if (largest := int(blocks.max())) >= entries:
        raise UserError(
            f"{named} has the token {opened.tokenizer.id_to_token(largest)!r}, number {largest}, for which the model "
            f"in {path} has no embedding: it has {entries}"
        )


def _entries(model: PreTrainedModel) -> int:
    """For how many tokens a model has an embedding."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (NotImplementedError, AttributeError):  # not every family says where its embeddings are
        return int(model.config.get_text_config().vocab_size)


def evaluate_heldout(opened: Opened, batch_size: int, *, entropies: bool) -> HeldOut:
    """`evaluate_blocks` of an opened model where this machine is fastest, with a progress bar.

    Raises:
        UserError: an impossible batch size, or a model of others that fails, or whose entropies cannot be recorded.
    """
    model, blocks = opened.model, opened.blocks
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, at least 1 is needed")
    batch_size = max(1, min(batch_size, MAX_LOGITS // (blocks.shape[1] * _entries(model))))
    with (
        failures_in_one_line(opened, "diagnosed" if entropies else "evaluated"),
        ProgressLine(f"evaluating on {opened.text}", len(blocks)) as line,
    ):
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return evaluate_blocks(model, blocks, batch_size, line.update, entropies=entropies)


@contextmanager
def failures_in_one_line(opened: Opened, purpose: str) -> Iterator[None]:
    """Whatever the code of somebody else's model raises becomes a `UserError`; a failure of ours stays what it is."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        if opened.ours or isinstance(error, UserError):
            raise
        name, reason = type(opened.model).__name__, " ".join(str(error).split())[:300] or type(error).__name__
        reason = reason.removeprefix(f"{name} cannot be recorded: ")  # what cannot be recorded cannot be diagnosed
        raise UserError(f"{name} cannot be {purpose}: {reason}") from None


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
