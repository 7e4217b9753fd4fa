"""How every figure looks, and how one is written."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, told apart by colour-blind readers; their yellow is left out as too pale for white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")  # beside colours: 28 lines are told apart
MISSING = "#d0d0d0"
MAX_LABELLED_LINES = 12
MAX_NAME = 40

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.color": "#222222",
    "text.parse_math": False,  # a run may be called "$x"
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under our style whatever the user's matplotlibrc says, and leave theirs as it was."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return wrapper


def short_name(text: str) -> str:
    """A name as a label: on one line, not starting with the "_" that legends leave out, and short.

    A long one loses its middle: rows of a study that differ in one setting, "row, setting=value", differ at their ends.
    """
    text = " ".join(text.split())
    if len(text) > MAX_NAME:
        kept = MAX_NAME - 1
        text = f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
    return " " + text if text.startswith("_") else text


def is_dark(colour: Any) -> bool:
    """Whether white reads better on it than black: relative luminance as the Web Content Guidelines 2.2 define it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.179


def ink_on(colour: str) -> str:
    """Black or white, whichever is read better on `colour`."""
    return "#ffffff" if is_dark(matplotlib.colors.to_rgb(colour)) else "#000000"


def colour_scale(steps: int = 64) -> list[str]:
    """The heatmaps' colours from low to high as "#rrggbb"; each step is lighter than the one before it."""
    cmap = matplotlib.colormaps["cividis"]
    return [matplotlib.colors.to_hex(cmap(i / (steps - 1))) for i in range(steps)]


def _save(figure: Figure, file: Any, kind: str, dpi: float) -> None:
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # The same figure is the same file, whenever it is drawn.
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": "entropi"})
        figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)


def write_figure(figure: Figure, path: Path | str, dpi: float = 150) -> None:
    """Write a figure as PNG, or as SVG where the file's name ends so."""
    path = Path(path)
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    buffer = io.BytesIO()
    _save(figure, buffer, kind, dpi)
    path.write_bytes(buffer.getvalue())


def to_data_uri(figure: Figure, dpi: float = 110) -> str:
    """A figure as a `data:` URI, a PNG that an HTML page can hold."""
    buffer = io.BytesIO()
    _save(figure, buffer, "png", dpi)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def to_pixels(figure: Figure, dpi: float = 80) -> np.ndarray:
    """A figure as pixels `(height, width, 3)`, uint8, for a live view."""
    buffer = io.BytesIO()
    _save(figure, buffer, "png", dpi)
    with Image.open(buffer) as picture:
        return np.asarray(picture.convert("RGB"))
