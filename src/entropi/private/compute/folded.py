"""A folded model on disk: its description, and the server's weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from entropi.errors import UserError
from entropi.private.compute.description import FORMAT, Description
from entropi.softmax import from_former

WEIGHTS_FILE = "folded.safetensors"
DESCRIPTION_FILE = "folded.json"


def sha256_of(path: Path) -> str:
    """Of a file's content, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _description(content: bytes) -> Description:
    """The description of a folded model; of format 2, which had two settings for the softmax, as of today's."""
    found = msgspec.json.decode(content)
    if isinstance(found, dict) and found.get("format") == 2:
        try:
            found = {**from_former({"exp_iterations": None, **found}), "format": FORMAT}
        except UserError as error:
            raise msgspec.ValidationError(str(error)) from None
    return msgspec.convert(found, Description)


def load_description(folder: Path) -> Description:
    """The description of a folded model, without its weights.

    Raises:
        UserError: missing or damaged, in one line.
    """
    try:
        return _description((folder / DESCRIPTION_FILE).read_bytes())
    except OSError as error:
        raise UserError(f"{folder} holds no folded model: {error.strerror or error}") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UserError(f"the folded model in {folder} is damaged: {str(error).splitlines()[0]}") from None


def load_folded(folder: Path) -> tuple[Description, dict[str, np.ndarray]]:
    """Description and weights of a folded model.

    Raises:
        UserError: missing or damaged, in one line.
    """
    description = load_description(folder)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except OSError as error:
        raise UserError(f"{folder} holds no folded model: {error.strerror or error}") from None
    except (SafetensorError, AttributeError) as error:
        # AttributeError: a type of number that safetensors knows and NumPy does not
        raise UserError(f"the folded model in {folder} is damaged: {str(error).splitlines()[0]}") from None
    shapes = {name: weight.shape for name, weight in weights.items()}
    if shapes != description.weight_shapes():
        wrong = sorted(set(shapes.items()) ^ set(description.weight_shapes().items()))[0][0]
        raise UserError(f"the folded model in {folder} is damaged: {wrong} does not have the described shape")
    if broken := [name for name, weight in weights.items() if not np.isfinite(weight).all()]:
        raise UserError(f"the folded model in {folder} is damaged: {broken[0]} is not finite")
    return description, weights
