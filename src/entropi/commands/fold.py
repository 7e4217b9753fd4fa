"""`entropi fold`: a model with all that is linear folded away."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from entropi.chat import FORM_FILE
from entropi.commands.common import Command, refuse_unknown_families
from entropi.downloads import on_disk
from entropi.errors import UserError


def run(model: str, output: Path) -> None:
    """Fold a model: everything linear disappears into neighbouring matrices.

    Args:
        model: run folder or saved model; or another family's, which is converted first: a folder that transformers
            saved, a GGUF file, or OWNER/NAME on the hub
        output: folder for folded.safetensors and folded.json, readable without torch, with tokenizer.json and, for a
            model with a chat template, chat.json
    """
    path = on_disk(model)
    refuse_unknown_families(path)
    from entropi.model.folding import fold
    from entropi.model.gguf import read_once
    from entropi.training.loading import check_memory_for_folding, open_chat_form, open_model

    with read_once(path):
        check_memory_for_folding(path)
        loaded, tokenizer, folder = open_model(path)
        try:
            form = open_chat_form(path)
        except UserError as error:
            form = None
            print(f"no chat with this model: {error}")
    folded = fold(loaded)
    folded.save(output)
    if (folder / "tokenizer.json").is_file():
        shutil.copy(folder / "tokenizer.json", output)
    else:  # of a GGUF file
        tokenizer.save(str(output / "tokenizer.json"))
    (output / FORM_FILE).unlink(missing_ok=True)
    if form is not None:
        (output / FORM_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(form)))

    explicit = folded.description["explicit_ffn"]
    if not loaded.config.parts.softmax_only:
        kept = "gains, biases and scalings folded away; norms and activations remain"
    elif explicit:
        kept = f"linear feed-forward networks kept in layers {', '.join(map(str, explicit))}, folded away in the others"
    else:
        kept = "every feed-forward network folded away"
    print(f"{kept}; condition numbers up to {max(folded.conditions):.1f}; written to {output}")


COMMAND = Command(run, place=7)
