"""`entropi study`: a grid of runs, compared."""

from __future__ import annotations

from pathlib import Path

from entropi import records
from entropi.commands.common import Command, extra, print_json, terminated_like_interrupted
from entropi.errors import UserError


def run(file: Path, folder: Path | None = None, parallel: int = 0, json: bool = False) -> None:
    """Train every run of the study FILE and compare them; run it again to continue after an interruption.

    Args:
        file: YAML file with the settings of all runs, the rows to compare and the claims to test
        folder: where the run folders, the tables and the page go; by default runs/NAME for a file NAME.yaml
        parallel: runs at a time, which share the processor's cores or take the GPUs in turn; by default one for each
            GPU, or one
        json: print one JSON object
    """
    with extra("report"):
        from entropi.report.study import in_words, write_study
    from entropi.training.study import load_study, run_study

    if parallel < 0:
        raise UserError(f"parallel is {parallel}, it cannot be negative")
    planned, folder = load_study(file), folder or Path("runs") / file.stem
    try:
        with terminated_like_interrupted():
            found = run_study(planned, folder, parallel)
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


COMMAND = Command(run, place=13)
