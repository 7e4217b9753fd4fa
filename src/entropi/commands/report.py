"""`entropi report`: one page of runs or of a study."""

from __future__ import annotations

from pathlib import Path

from entropi.commands.common import Command, Words, extra


def run(runs: list[Path], output: Path | None = None) -> None:
    """One self-contained HTML page of one or more run folders, or of a study.

    Args:
        runs: run folders, or the folder of one study
        output: file to write; by default report.html in the first folder
    """
    with extra("report"):
        from entropi.report.page import write_report
        from entropi.report.study import is_study, write_study

    if len(runs) == 1 and is_study(runs[0]):
        print(f"report in {write_study(runs[0], output)}")
        return
    path = write_report(runs, output or runs[0] / "report.html")
    print(f"report in {path}")


COMMAND = Command(run, place=14, words={"runs": Words(kind=Path, positional=True)})
