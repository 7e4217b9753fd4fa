"""The heads of several runs, to be looked at one by one: what the page's tables show and its script draws from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from entropi import records
from entropi.bounds import causal_maximum
from entropi.report import figures
from entropi.report.folder import LOOKS, Run, frames
from entropi.report.formatting import even_distance, even_share


def _rounded_matrix(matrix: records.Matrix | None) -> list[list[float | None]] | None:
    """For the page's script: as many digits as it shows, and null for what is not finite."""
    if matrix is None:
        return None
    return [[round(value, 5) if math.isfinite(value) else None for value in row] for row in matrix]


def explorer(runs: Sequence[Run], moments: int) -> dict[str, Any]:
    """What the page's script draws from."""
    described: list[dict[str, Any]] = []
    for run in runs:
        context, pattern = run.context_length, run.pattern
        described.append(
            {
                "name": run.name,
                "maximum": math.log(context) if context else None,
                "ceiling": causal_maximum(context) if context else None,
                "frames": [
                    {
                        "label": frame.label,
                        "step": frame.step,
                        "end": frame.end,
                        "entropy": _rounded_matrix(frame.entropy),
                        "threshold": _rounded_matrix(frame.threshold),
                        "temperature": _rounded_matrix(frame.temperature),
                    }
                    for frame in frames(run, moments)
                ],
                "pattern": None
                if pattern is None
                else {name: _rounded_matrix(getattr(pattern, name)) for name in LOOKS}
                | {
                    "even_distance": f"{even_distance(pattern.context_length):.1f}",  # as the summary spells it
                    "even_share": even_share(pattern.context_length),
                },
            }
        )
    steps = sorted({frame["step"] for run in described for frame in run["frames"] if not frame["end"]})
    colours = figures.colour_scale()
    return {
        "colours": colours,
        "inks": [figures.ink_on(colour) for colour in colours],
        "missing": figures.MISSING,
        "steps": steps,
        "runs": described,
    }


def scale_top(runs: Sequence[Run]) -> float:
    """The end of the colour scale that all heatmaps have: log T, in nats, the largest T where runs differ.

    Where no T is recorded, the largest entropy.
    """
    longest = max((context for run in runs if (context := run.context_length)), default=0)
    if longest:
        return math.log(longest)
    largest = [v for run in runs for f in frames(run) for row in f.entropy for v in row if math.isfinite(v)]
    return max(largest, default=1.0) or 1.0


@dataclass
class Cell:
    """A head in the table of a run, as the page shows it before its script runs."""

    text: str
    colour: str
    ink: str


def cells(run: Run, colours: Sequence[str], top: float) -> list[list[Cell]]:
    """The entropies of a run's last frame, coloured on the scale 0 to `top`."""
    result = []
    for row in frames(run)[-1].entropy if frames(run) else []:
        cells = []
        for value in row:
            finite = math.isfinite(value)
            place = min(max(value / top, 0.0), 1.0) if finite and top > 0 else 0.0
            colour = colours[math.floor(place * (len(colours) - 1) + 0.5)] if finite else figures.MISSING
            cells.append(Cell(f"{value:.2f}" if finite else "n/a", colour, figures.ink_on(colour)))
        result.append(cells)
    return result


def in_script(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
