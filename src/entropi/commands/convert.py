"""`entropi convert`: a checkpoint of another family as an entropi model."""

from __future__ import annotations

from pathlib import Path

from entropi.commands.common import Command, refuse_unknown_families
from entropi.downloads import on_disk
from entropi.errors import UserError


def run(model: str, output: Path) -> None:
    """Convert a checkpoint of another family: the same logits, from a model that trains, folds and answers in private.

    Args:
        model: a folder that transformers saved, a GGUF file, or OWNER/NAME on the hub (also hf://OWNER/NAME,
            hf://OWNER/NAME/FILE.gguf)
        output: new folder for the model, with its tokenizer, chat template and generation configuration
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists: name a folder that is new or empty")
    path = on_disk(model)
    refuse_unknown_families(path)
    from entropi.training.loading import model_type, open_converted, quiet_transformers

    if (kind := model_type(path)) in (None, "entropi"):
        reason = "is an entropi model already" if kind else "holds no model: config.json is missing or damaged"
        raise UserError(f"{model} {reason}")
    converted = open_converted(path)
    try:
        with quiet_transformers():
            converted.model.save_pretrained(output)
            converted.tokenizer.save_pretrained(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None

    for note in converted.notes:
        print(note)
    config = converted.model.config
    print(f"{config.architecture}, {converted.model.num_parameters():,} parameters in float32, written to {output}")


COMMAND = Command(run, place=6)
