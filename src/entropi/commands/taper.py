"""`entropi taper`: nonlinear operations leave a trained model, in a run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from entropi.commands.common import Command, Settings
from entropi.commands.train import train_and_tell
from entropi.errors import UserError
from entropi.training.recipe import Recipe, load_recipe, recipe_of_run


def run(
    model: str,
    run: Path,
    recipe: Recipe,
    to: str = "",
    no_final_norm: bool = False,
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none",
) -> None:
    """Take nonlinear operations away from a trained model; entropi train RUN continues it after an interruption.

    The run begins as a copy of MODEL, its teacher. Norms, activations and the exact softmax that the target has not
    fade by a schedule (the settings taper-...), while the model is held near the teacher's predictions, hidden states
    and the entropies of its heads.

    Args:
        model: run folder, saved model, a checkpoint of another family, or OWNER/NAME on the hub (also hf://OWNER/NAME)
        run: folder of the run, as that of entropi train
        recipe: every other option is a setting of entropi train; those of a model's sizes are the teacher's
        to: the architecture that is to be left, in place of --architecture; of a run that has begun it is as it was
        no_final_norm: the norm before the head leaves too
        report_to: tracker to show the training in while it runs
    """
    from entropi.downloads import on_disk

    if not to and not recipe.taper_from:
        raise UserError("--to is missing: an architecture, such as SM(t)+ScFuFFN (see entropi taper --help)")
    recipe = replace(
        recipe,
        taper_from=str(on_disk(model)),
        architecture=to or recipe.architecture,
        final_norm=recipe.final_norm and not no_final_norm,
    )
    train_and_tell(run, recipe, report_to, shard=False)


def _kept(given: dict[str, Any]) -> Recipe | None:
    """The recipe of a run that has begun."""
    return recipe_of_run(given["run"])


COMMAND = Command(run, place=15, settings=Settings("recipe", Recipe, load_recipe, _kept))
