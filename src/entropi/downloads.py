"""Models of the Hugging Face hub by name, `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`, as folders."""

from __future__ import annotations

import re
from pathlib import Path

from entropi.errors import UserError

SCHEME = "hf://"
CONFIG_FILE = "config.json"
CONFIGURATION = (CONFIG_FILE,)
# All that a causal language model and its tokenizer are read from here; no pickled weights, no code.
MODEL = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def on_disk(model: str, files: tuple[str, ...] = MODEL) -> Path:
    """The folder of a model: a path as it is; of a name on the hub, the copy in the hub's cache, downloaded if need be.

    Only `files` at the repository's root are downloaded, each once. An interrupted download goes on where it was.

    Raises:
        UserError: not a name, no such model or revision, or the hub cannot be reached; one line.
    """
    if not model.startswith(SCHEME):
        return Path(model)
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", model.removeprefix(SCHEME))
    if found is None:
        raise UserError(f"{model} names no model of the hub: hf://OWNER/NAME or hf://OWNER/NAME@REVISION is needed")
    from huggingface_hub import errors, snapshot_download

    name, revision = found.groups()
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise UserError(f"{name} asks for an agreement: accept it on its page, then hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"the hub has no model {name}, or it is private and needs hf auth login") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision}") from None
    except Exception as error:  # the network and the disk raise what they like
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot download {model}: {reason}") from None
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{name} holds no model: {CONFIG_FILE} is missing")
    return folder


def name_of(model: str) -> str:
    """What to call a model: its name on the hub without owner and revision, or its folder's name."""
    if model.startswith(SCHEME):
        return model.removeprefix(SCHEME).partition("@")[0].rpartition("/")[2]
    return Path(model).resolve().name
