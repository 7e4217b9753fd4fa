"""What runs of a study say together: means and spreads over seeds, and tests of claims."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from entropi import record_files, records
from entropi.costs.operations import count
from entropi.errors import UserError
from entropi.training.recipe import CONFIG_FILE, load_recipe

if TYPE_CHECKING:
    from entropi.model.configuration import EntropiConfig

R = TypeVar("R", bound=records.Base)


def finished_run(row: str, seed: int, folder: Path, path: str) -> records.StudyRun:
    """The result of the finished run in `folder`; a held-out loss that is not finite is a divergence.

    Raises:
        UserError: records that are missing or damaged.
    """
    found = record_files.read(folder / record_files.RECORDS_FILE)
    evaluations = _of_kind(found, records.Evaluation)
    if not evaluations:
        raise UserError(f"{folder} is damaged: its records hold no evaluation")
    last = evaluations[-1]
    diverged = not math.isfinite(last.cross_entropy)
    speeds = [r.tokens_per_second for r in _of_kind(found, records.TrainingStep)]
    return records.StudyRun(
        row=row,
        seed=seed,
        folder=path,
        diverged=diverged,
        reason=f"step {last.step}: the held-out loss is not finite" if diverged else "",
        step=last.step,
        cross_entropy=math.nan if diverged else last.cross_entropy,
        perplexity=math.nan if diverged else last.perplexity,
        tokens_per_second=float(np.median(speeds)) if speeds else math.nan,
    )


def summarise(name: str, settings: dict[str, str], runs: Sequence[records.StudyRun], folder: Path) -> records.StudyRow:
    """The row of all `runs` of one recipe, read from their folders below `folder`; costs are by the recipe."""
    read = {run.seed: record_files.read(folder / run.folder / record_files.RECORDS_FILE) for run in runs}
    started = next(_of_kind(found, records.RunStarted)[-1] for found in read.values())
    finished = [run for run in runs if not run.diverged]  # the others left no model
    whole = [read[run.seed] for run in finished]
    traced = whole or list(read.values())  # how a model collapses is worth a figure where no seed survived
    diagnoses = [r for found in whole for r in _of_kind(found, records.DiagnosisRecord)[-1:]]

    model = _model(folder / runs[0].folder, started.vocab_size)
    costs, folded = (count(model, started.context_length, folded=whether) for whether in (False, True))
    predicted = _prediction(model, started.context_length)

    snapshots = [_of_kind(found, records.EntropySnapshot) for found in traced]
    steps = [_of_kind(found, records.TrainingStep) for found in traced]
    entropy_steps, heads = _series(snapshots, "entropy")
    loss_steps, losses = _series(steps, "cross_entropy")
    layers = heads.mean(axis=-1) if heads.size else heads
    thresholds = [found[-1].threshold for found in snapshots if whole and found and found[-1].threshold is not None]
    evaluated = [_of_kind(found, records.Evaluation)[-1].entropy for found in whole]
    shares = list(zip(*(d.quartile_shares for d in diagnoses)))

    return records.StudyRow(
        name=name,
        settings=settings,
        seeds=[run.seed for run in runs],
        diverged=[run.seed for run in runs if run.diverged],
        cross_entropy=spread([run.cross_entropy for run in finished]),
        perplexity=spread([run.perplexity for run in finished]),
        layers=started.layers,
        heads=started.heads,
        hidden_size=started.hidden_size,
        context_length=started.context_length,
        tokens=started.total_steps * started.tokens_per_step,
        parameters=started.parameters,
        nonlinear=costs.nonlinear,
        ffn_flops=costs.ffn_flops,
        attention_flops=costs.attention_flops,
        quartile_shares=[spread(share) for share in shares],
        overloaded=_by_layer([d.overloaded for d in diagnoses], started),
        collapsed=_by_layer([d.collapsed for d in diagnoses], started),
        entropy=np.mean(evaluated, axis=0).tolist() if evaluated else [],
        threshold=np.mean(thresholds, axis=0).tolist() if thresholds else [],
        entropy_steps=entropy_steps,
        layer_entropy=_mean(layers).tolist(),
        layer_entropy_std=_std(layers).tolist(),
        loss_steps=loss_steps,
        loss=_mean(losses).tolist(),
        loss_std=_std(losses).tolist(),
        folded_ffn_flops=folded.ffn_flops,
        predicted_bytes=None if predicted is None else predicted.prompt.bytes,
        predicted_kernel="" if predicted is None else predicted.kernel_label,
    )


def _model(run: Path, vocab_size: int) -> EntropiConfig:
    """What a run trains, by its recipe: one that diverged left no model."""
    from entropi.training.build import model_config  # which loads torch

    return model_config(load_recipe(run / CONFIG_FILE), vocab_size)


def _prediction(model: EntropiConfig, seq_len: int) -> records.PredictionRecord | None:
    """What a private prompt of `seq_len` tokens costs; None where that cannot be predicted."""
    try:
        from entropi.costs.prediction import CostModel
    except ImportError:  # the extra "private"
        return None
    try:
        return CostModel.shipped("cheetah", "wan").predict(model, seq_len)
    except UserError:
        return None


def compare(lower: str, higher: str, runs: Sequence[records.StudyRun]) -> records.StudyClaim | None:
    """The test of "`lower` has the lower perplexity"; None where the rows have no seed in common."""
    ours = {run.seed: run for run in runs if run.row == lower}
    theirs = {run.seed: run for run in runs if run.row == higher}
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [_difference(ours[seed], theirs[seed]) for seed in seeds]
    finite = all(map(math.isfinite, differences))
    values = spread(differences) if finite else records.Spread(mean=math.nan, std=math.nan, n=len(seeds))
    p = sign_flip_p(differences) if finite else sign_p(differences)
    return records.StudyClaim(
        lower=lower,
        higher=higher,
        seeds=seeds,
        differences=differences,
        mean=values.mean,
        std=values.std,
        test="sign flips" if finite else "signs",
        p=p,
        least_p=0.5 ** len(seeds),
    )


def _difference(ours: records.StudyRun, theirs: records.StudyRun) -> float:
    """Nats by which `ours` is lower; a run that diverged counts as infinitely high, and between two there is none."""
    if ours.diverged and theirs.diverged:
        return math.nan
    if ours.diverged or theirs.diverged:
        return -math.inf if ours.diverged else math.inf
    return theirs.cross_entropy - ours.cross_entropy


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact one-sided p of a mean above 0: the share of all 2^n choices of signs with at least the observed sum.

    It assumes that, if the claim were false, each difference could as well have had the other sign.
    """
    values = np.abs(np.asarray(differences, dtype=float))
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    observed = float(np.sum(differences))
    return float(np.mean(sums >= observed - 1e-12 * values.sum()))


def sign_p(differences: Sequence[float]) -> float:
    """Exact one-sided p of the number of differences above 0, under even odds; zeros and NaN are against the claim."""
    n, wins = len(differences), sum(d > 0 for d in differences)
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n


def spread(values: Sequence[float]) -> records.Spread:
    """Mean and sample standard deviation."""
    n = len(values)
    return records.Spread(
        mean=float(np.mean(values)) if n else math.nan,
        std=float(np.std(values, ddof=1)) if n > 1 else math.nan,
        n=n,
    )


def _series(runs: Sequence[Sequence[Any]], name: str) -> tuple[list[int], np.ndarray]:
    """The steps that all runs have a record of, and its field `name`, `(runs, steps, ...)`."""
    common = sorted(set.intersection(*({r.step for r in found} for found in runs))) if runs else []
    by_step = [{r.step: getattr(r, name) for r in found} for found in runs]
    return common, np.array([[found[step] for step in common] for found in by_step], dtype=float)


def _mean(series: np.ndarray) -> np.ndarray:
    return series.mean(axis=0) if series.size else np.empty(0)


def _std(series: np.ndarray) -> np.ndarray:
    """Over runs; NaN for a single one."""
    if not series.size:
        return np.empty(0)
    return series.std(axis=0, ddof=1) if len(series) > 1 else np.full(series.shape[1:], np.nan)


def _by_layer(heads: Sequence[Sequence[tuple[int, int]]], started: records.RunStarted) -> list[float]:
    """Share of each layer's heads that are among `heads`, mean over runs."""
    if not heads:
        return []
    counts = np.zeros(started.layers)
    for layer, _ in itertools.chain.from_iterable(heads):
        counts[layer] += 1
    return (counts / (len(heads) * started.heads)).tolist()


def _of_kind(found: Sequence[records.Record], kind: type[R]) -> list[R]:
    return [r for r in found if isinstance(r, kind)]
