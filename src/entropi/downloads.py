"""Models of the Hugging Face hub by name, as folders or files.

`hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION`, of GGUF repositories `hf://OWNER/NAME/FILE.gguf`; without `hf://` where
there is no such folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from entropi.errors import UserError

SCHEME = "hf://"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:/([\w./-]+\.gguf))?(?:@([\w./-]+))?")
CONFIG_FILE = "config.json"
CONFIGURATION = (CONFIG_FILE,)
# All that a causal language model and its tokenizer are read from here; no pickled weights, no code.
MODEL = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def on_disk(model: str, files: tuple[str, ...] = MODEL) -> Path:
    """The folder of a model, or its GGUF file: a path as it is; of a name on the hub, the copy in the hub's cache,
    downloaded if need be.

    Only `files` at the repository's root are downloaded, each once. An interrupted download goes on where it was.

    Raises:
        UserError: not a name, no such model or revision, or the hub cannot be reached; one line.
    """
    if not model.startswith(SCHEME):
        if not _may_be_of_the_hub(model):
            return Path(model)
        try:
            return on_disk(SCHEME + model, files)
        except UserError as error:
            raise UserError(f"there is no folder {model}, and as a name on the hub: {error}") from None
    found = _NAME.fullmatch(model.removeprefix(SCHEME))
    if found is None:
        raise UserError(
            f"{model} names no model of the hub: hf://OWNER/NAME or hf://OWNER/NAME@REVISION is needed, or for a GGUF "
            "file hf://OWNER/NAME/FILE.gguf"
        )
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    name, file, revision = found.groups()
    try:
        if file is not None:
            return Path(hf_hub_download(name, file, revision=revision))
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except errors.GatedRepoError:
        raise UserError(f"{name} asks for an agreement: accept it on its page, then hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"the hub has no model {name}, or it is private and needs hf auth login") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision}") from None
    except errors.LocalEntryNotFoundError as error:  # an EntryNotFoundError, but of a hub that was not asked
        reason = " ".join(str(error.__cause__ or "it is not in the cache").split())[:200]
        raise UserError(f"the hub cannot be reached, and {name} is not in its cache: {reason}") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{name} has no file {file}") from None
    except Exception as error:  # the network and the disk raise what they like
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot download {model}: {reason}") from None
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{name} holds no model: {CONFIG_FILE} is missing")
    return folder


def _may_be_of_the_hub(model: str) -> bool:
    """Whether a word without `hf://` may be OWNER/NAME: it has one slash, and does not exist or look like a path."""
    owner, _, name = model.partition("/")
    own = (
        not owner or owner.startswith((".", "~")) or not name or "/" in name or Path(name).suffix in (".json", ".gguf")
    )
    return not own and not Path(owner).exists() and _NAME.fullmatch(model) is not None


def name_of(model: str) -> str:
    """What to call a model: its name on the hub without owner and revision, or its folder's name."""
    if model.startswith(SCHEME):
        model = model.removeprefix(SCHEME).partition("@")[0]
    return Path(model).resolve().name.removesuffix(".gguf")
