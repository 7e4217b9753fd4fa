"""`entropi study`: a grid of runs, compared."""

from __future__ import annotations

import contextlib
from pathlib import Path

from entropi import records
from entropi.commands.common import Command, extra, print_json, terminated_like_interrupted
from entropi.errors import UserError


def run(
    file: Path,
    folder: Path | None = None,
    parallel: int = 0,
    run: int | None = None,
    ray: str | None = None,
    cpus_per_run: int | None = None,
    gpus_per_run: float | None = None,
    json: bool = False,
) -> None:
    """Train every run of the study FILE and compare them; run it again to continue after an interruption.

    Args:
        file: YAML file with the settings of all runs, the rows to compare and the claims to test
        folder: where the run folders, the tables and the page go; by default runs/NAME for a file NAME.yaml
        parallel: runs at a time, which share the processor's cores or take the GPUs in turn; by default one for each
            GPU, or one; with --ray as many as the cluster has room for
        run: train this run only, counted from 0, and compare nothing; for arrays of jobs on machines that share the
            folder
        ray: train on the Ray cluster with this address, HOST:PORT of its head or auto, whose machines share the folder
        cpus_per_run: with --ray, cores of each run, by default 1
        gpus_per_run: with --ray, GPUs of each run, such as 0.5; by default 1 where the cluster has any
        json: print one JSON object
    """
    with extra("report"):
        from entropi.report.study import in_words, write_study
    from entropi.training.study import Executor, Processes, load_study, run_one, run_study

    _check(parallel, run, ray, cpus_per_run, gpus_per_run)
    planned, folder = load_study(file), folder or Path("runs") / file.stem
    try:
        with contextlib.ExitStack() as stack:
            executor: Executor = Processes(parallel)
            if ray is not None:
                with extra("ray"):
                    from entropi.training.ray_cluster import connected
                executor = stack.enter_context(connected(ray, folder, parallel, cpus_per_run or 1, gpus_per_run))
            stack.enter_context(terminated_like_interrupted())  # after Ray, which has a handler of its own
            if run is not None:
                one = run_one(planned, run, folder)
                if json:
                    print_json({"folder": str(folder), "run": one})
                    return
                print(f"{one.row}, seed {one.seed}: {one.reason or f'held-out perplexity {one.perplexity:.2f}'}")
                return
            found = run_study(planned, folder, executor)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues the study") from None

    page = write_study(folder)
    if json:
        rows = [r for r in found if isinstance(r, records.StudyRow)]
        claims = [r for r in found if isinstance(r, records.StudyClaim)]
        print_json({"folder": str(folder), "rows": rows, "claims": claims})
        return
    print(in_words(found))
    print(f"page in {page}")


def _check(parallel: int, run: int | None, ray: str | None, cpus: int | None, gpus: float | None) -> None:
    """Raise `UserError` for options that are out of range, or that another one would ignore."""
    if parallel < 0:
        raise UserError(f"parallel is {parallel}, it cannot be negative")
    if cpus is not None and cpus < 1:
        raise UserError(f"cpus-per-run is {cpus}, a run needs one or more")
    if gpus is not None and not (0 <= gpus <= 1 or gpus == int(gpus) > 0):
        raise UserError(f"gpus-per-run is {gpus:g}: a part of one GPU or a whole number is possible")
    if ray is None and (cpus is not None or gpus is not None):
        raise UserError("cpus-per-run and gpus-per-run are for --ray: on one machine --parallel shares it out")
    if ray is not None and run is not None:
        raise UserError("--run trains one run on this machine, and --ray all of them on a cluster: use one of the two")


COMMAND = Command(run, place=13)
