"""`entropi fold`: a model with all that is linear folded away."""

from __future__ import annotations

import shutil
from pathlib import Path

from entropi.commands.common import Command, refuse_other_families


def run(model: Path, output: Path) -> None:
    """Fold a model: everything linear disappears into neighbouring matrices.

    Args:
        model: run folder or saved model
        output: folder for folded.safetensors and folded.json, readable without torch
    """
    refuse_other_families(model, "what can be folded")
    from entropi.model.folding import fold
    from entropi.training.loading import open_model

    loaded, _, folder = open_model(model)
    folded = fold(loaded)
    folded.save(output)
    shutil.copy(folder / "tokenizer.json", output)

    explicit = folded.description["explicit_ffn"]
    if not loaded.config.parts.softmax_only:
        kept = "gains, biases and scalings folded away; norms and activations remain"
    elif explicit:
        kept = f"linear feed-forward networks kept in layers {', '.join(map(str, explicit))}, folded away in the others"
    else:
        kept = "every feed-forward network folded away"
    print(f"{kept}; condition numbers up to {max(folded.conditions):.1f}; written to {output}")


COMMAND = Command(run, place=6)
