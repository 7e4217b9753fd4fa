"""`entropi train`: a training run in a run folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from entropi import record_files, records
from entropi.commands.common import Command, Settings, extra
from entropi.console import make_console
from entropi.training.recipe import Recipe, load_recipe, recipe_of_run


def run(
    run: Path,
    recipe: Recipe,
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none",
    shard: bool = False,
    prepare_only: bool = False,
) -> None:
    """Train a model into the run folder RUN; entropi train RUN continues it after an interruption.

    On several devices: torchrun --nproc-per-node N -m entropi train RUN ...

    Args:
        run: folder of the run: configuration, records, checkpoints, the trained model; of a run that has begun the
            other options are as they were
        recipe: every other option
        shard: share the model out between the processes (FSDP2) instead of giving each a copy (DDP)
        prepare_only: read and tokenise the corpus, say where the tokens are, and train nothing
        report_to: tracker to show the training in while it runs; TensorBoard's files go to the run folder, Trackio's
            stay on this machine
    """
    if prepare_only:
        _prepare(recipe)
        return
    if recipe == Recipe() and recipe_of_run(run) is None:  # a mistyped name, perhaps, or one interrupted too early
        make_console().print(f"there is no run in {run}: this is a new one, with the default settings", markup=False)
    train_and_tell(run, recipe, report_to, shard)


def train_and_tell(
    run: Path, recipe: Recipe, report_to: Literal["none", "tensorboard", "trackio", "wandb"], shard: bool
) -> None:
    """Train, and print how well the model predicts held-out text and where it is."""
    from entropi.training import distributed
    from entropi.training.run import train

    live = None if report_to == "none" else _live(report_to, recipe)
    folder = train(recipe, run, live, shard=shard)
    distributed.disconnect()
    if not distributed.is_main():
        return

    found = [r for r in record_files.read(run / record_files.RECORDS_FILE) if isinstance(r, records.Evaluation)]
    if found:
        print(f"held-out perplexity {found[-1].perplexity:.2f} ({found[-1].cross_entropy:.4f} nats a token)", end="; ")
    print(f"model in {folder}")


def _prepare(recipe: Recipe) -> None:
    """Tokenise the corpus of a recipe, and say where the tokens are."""
    from entropi.training.build import prepare_corpus

    packed = prepare_corpus(recipe, make_console()).packed
    place = packed.train.streams[0].path.parent
    print(
        f"{len(packed.train):,} sequences to train on and {len(packed.heldout):,} held out, of "
        f"{packed.train_tokens + packed.heldout_tokens:,} tokens in {place}"
    )


def _live(report_to: Literal["tensorboard", "trackio", "wandb"], recipe: Recipe) -> Any:
    """What shows the training while it runs."""
    with extra("report"):
        from entropi.report import figures
    from entropi.training.live import Live

    def draw(entropy: records.Matrix) -> Any:
        top = math.log(recipe.context_length)  # the scale of reports
        figure = figures.entropy_heatmap(entropy, top, recipe.architecture, context_length=recipe.context_length)
        return figures.to_pixels(figure)

    return Live(report_to, draw)


def _kept(given: dict[str, Any]) -> Recipe | None:
    """The recipe of a run that has begun."""
    return recipe_of_run(given["run"])


COMMAND = Command(run, place=2, settings=Settings("recipe", Recipe, load_recipe, _kept))
