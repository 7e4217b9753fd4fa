"""`entropi fold`: a model with all that is linear folded away."""

from __future__ import annotations

import shutil
from pathlib import Path

from entropi.commands.common import Command, refuse_unknown_families
from entropi.downloads import on_disk


def run(model: str, output: Path) -> None:
    """Fold a model: everything linear disappears into neighbouring matrices.

    Args:
        model: run folder or saved model; or another family's, which is converted first: a folder that transformers
            saved, a GGUF file, or OWNER/NAME on the hub
        output: folder for folded.safetensors and folded.json, readable without torch
    """
    path = on_disk(model)
    refuse_unknown_families(path)
    from entropi.model.folding import fold
    from entropi.training.loading import check_memory_for_folding, open_model

    check_memory_for_folding(path)
    loaded, tokenizer, folder = open_model(path)
    folded = fold(loaded)
    folded.save(output)
    if (folder / "tokenizer.json").is_file():
        shutil.copy(folder / "tokenizer.json", output)
    else:  # of a GGUF file
        tokenizer.save(str(output / "tokenizer.json"))

    explicit = folded.description["explicit_ffn"]
    if not loaded.config.parts.softmax_only:
        kept = "gains, biases and scalings folded away; norms and activations remain"
    elif explicit:
        kept = f"linear feed-forward networks kept in layers {', '.join(map(str, explicit))}, folded away in the others"
    else:
        kept = "every feed-forward network folded away"
    print(f"{kept}; condition numbers up to {max(folded.conditions):.1f}; written to {output}")


COMMAND = Command(run, place=7)
