"""Models in one GGUF file, as llama.cpp and its relatives write them, read by transformers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entropi.errors import UserError

SUFFIX = ".gguf"
_NAMES = 1 << 26  # bytes of a file within which all names are


def is_gguf(path: Path) -> bool:
    """Whether a path names such a file."""
    return path.suffix == SUFFIX


def source_of(path: Path) -> tuple[Path, dict[str, str]]:
    """What transformers' `from_pretrained` takes for a folder, or for a GGUF file: the place, and further arguments.

    Raises:
        UserError: a GGUF file that cannot be read, or that transformers would read wrongly or in part.
    """
    if not is_gguf(path):
        return path, {}
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    _check(path)
    return path.parent, {"gguf_file": path.name}


@contextmanager
def read_once(path: Path) -> Iterator[None]:
    """Have transformers look for the fields of the GGUF file at `path` once within this; other paths are as ever.

    It asks the package gguf anew for configuration, tokenizer, weights and chat template, several times for some, and
    the package takes three seconds for a vocabulary of 49,000.
    """
    if not is_gguf(path) or importlib.util.find_spec("gguf") is None:
        yield
        return
    gguf: Any = importlib.import_module("gguf")
    anew = gguf.GGUFReader
    gguf.GGUFReader = functools.lru_cache(maxsize=1)(anew)
    try:
        yield
    finally:
        gguf.GGUFReader = anew


def configuration_of(path: Path) -> dict[str, Any]:
    """transformers' configuration of the model in a GGUF file; weights count as not quantised, as they are when read.

    Raises:
        UserError: as `source_of`, or an architecture that transformers does not read.
    """
    folder, options = source_of(path)
    status = path.stat()
    return dict(_configuration_of(folder, options["gguf_file"], status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _configuration_of(folder: Path, name: str, size: int, changed: int) -> dict[str, Any]:
    """`configuration_of` a file as it is now, read once: its vocabulary takes transformers many seconds."""
    from transformers import AutoConfig

    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(folder, local_files_only=True, gguf_file=name).to_dict()
    except Exception as error:  # whatever its parsers raise; the user needs the file and the reason
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder / name} cannot be read: {reason}") from None
    found.pop("quantization_config", None)
    return found


def _check(path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} needs the package gguf: pip install 'entropi[gguf]'")
    # The package's own reader takes half a minute for a large vocabulary; names of fields and tensors stand in front.
    with path.open("rb") as file:
        names = file.read(_NAMES)
    if names[:4] != b"GGUF":
        raise UserError(f"{path} is no GGUF file")
    if b"tokenizer.ggml.tokens" not in names:
        raise UserError(f"{path} holds no tokenizer: convert a file with one, or a folder of transformers")
    if b"rope_freqs.weight" in names:
        raise UserError(
            f"{path} has rotary frequencies of its own (rope_freqs), which transformers leaves out: convert the folder "
            "of transformers that it was made from"
        )
