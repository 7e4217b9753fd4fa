"""Numbers, sizes and patterns in words, as a page or a terminal shows them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from entropi.records import AttentionPattern, DiagnosisRecord, Matrix

PAPER = "https://arxiv.org/abs/2501.03489"  # "the paper": Entropy-Guided Attention for Private LLMs
NO_BREAK = "\u00a0"  # no line is broken between a number and its unit
MAX_QUOTE = 240  # characters of a prompt or an answer in the summary; the transcript has all


def number(value: float | None, digits: int = 2) -> str:
    """A number with thousands separated, or why there is none."""
    if value is None:
        return "not recorded"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def rounded(value: float) -> str:
    """1,712,345 -> "1.7 M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.1f} {unit}"
    return number(value, 0)


def size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.2f}{NO_BREAK}{unit}"
    return f"{count}{NO_BREAK}B"


def duration(seconds: float) -> str:
    """Seconds, and minutes where that is easier to grasp."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds >= 120:
        return f"{seconds / 60:,.1f}{NO_BREAK}min"
    return f"{seconds:.1f}{NO_BREAK}s" if seconds >= 0.95 else f"{1000 * seconds:.0f}{NO_BREAK}ms"


def percent(part: float, whole: float = 1.0) -> str:
    """A share in percent; with nothing to share, a dash."""
    return f"{100 * part / whole:.1f} %" if whole and math.isfinite(part / whole) else "–"


def counted(count: int, what: str) -> str:
    """1 -> "1 head", 12 -> "12 heads"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def heads(pairs: Sequence[tuple[int, int]]) -> str:
    """[(0, 1), (0, 3)] -> "layer 0: heads 1, 3"."""
    if not pairs:
        return "none"
    layers = itertools.groupby(sorted(pairs), key=lambda pair: pair[0])
    texts = []
    for layer, group in layers:
        members = [str(head) for _, head in group]
        texts.append(f"layer {layer}: head{'s' if len(members) > 1 else ''} {', '.join(members)}")
    return "; ".join(texts)


def quote(text: str) -> str:
    """A text on one line, cut to a length that a sentence can bear; of white space alone, its escapes."""
    line = " ".join(visible(text).split())
    return line if len(line) <= MAX_QUOTE else line[: MAX_QUOTE - 1] + "…"


def visible(text: str) -> str:
    """The text; of white space alone, which nobody would see, its escapes: a line break is shown as \\n."""
    return text if text.strip() else text.encode("unicode_escape").decode().replace(" ", "\\x20")


def sentence(text: str) -> str:
    """The text with a full stop, if it does not end in one."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def even_distance(context_length: int) -> float:
    """Tokens that a head looks back on average if it attends evenly: (T + 1) / 4 over rows 2 to T - 1."""
    return (context_length + 1) / 4


def even_share(context_length: int) -> float:
    """The weight that such a head puts on any one token: the mean of 1 / (i + 1) over rows i = 2 to T - 1."""
    rows = range(2, context_length) or range(context_length)
    return math.fsum(1 / (i + 1) for i in rows) / max(len(rows), 1)


def pattern_in_words(pattern: AttentionPattern) -> str:
    """Where the heads look, in two sentences."""

    def mean(matrix: Matrix) -> float:
        return float(np.mean([value for row in matrix for value in row]))  # rows may differ in length

    sinks = sum(value > 0.5 for row in pattern.on_first for value in row)
    total = sum(len(row) for row in pattern.on_first)
    tokens = pattern.context_length
    return (
        f"On average a head looks {number(mean(pattern.distance), 1)} tokens back (even attention: "
        f"{even_distance(tokens):.1f}) and puts {percent(mean(pattern.on_first))} of its weight on the first token, "
        f"{percent(mean(pattern.on_previous))} on the previous one and {percent(mean(pattern.on_itself))} on its own "
        f"(even attention: {percent(even_share(tokens))} each). "
        f"{sinks} of {total} heads put more than half of their weight on the first token."
    )


def table_of_heads(found: DiagnosisRecord, width: int) -> list[str] | None:
    """Mean entropies as lines of `rich` markup, at most `width` columns wide; None if so many heads do not fit.

    "+" marks an overloaded head, "-" a collapsed one, so that nothing depends on colours.
    """
    layers = found.layers or list(range(len(found.entropy)))
    columns = max(map(len, found.entropy))
    for digits, gap in ((3, 1), (2, 1), (2, 0), (1, 0)):
        heading = max(len("layer"), *(len(str(layer)) for layer in layers)) + (gap == 0)
        cells = [[f"{value:.{digits}f}" for value in row] for row in found.entropy]
        wide = gap + max(len(str(columns - 1)), *(len(cell) for row in cells for cell in row))  # and a mark
        if heading + columns * (wide + 1) <= width:
            break
    else:
        return None
    marks = dict.fromkeys(map(tuple, found.overloaded), ("+", "red"))
    marks |= dict.fromkeys(map(tuple, found.collapsed), ("-", "blue"))
    lines = ["layer".ljust(heading) + "".join(f"{head:{wide}} " for head in range(columns)).rstrip()]
    for layer, row in zip(layers, cells):
        line = str(layer).rjust(heading - (gap == 0)).ljust(heading)
        for head, cell in enumerate(row):
            mark, colour = marks.get((layer, head), (" ", ""))
            text = cell.rjust(wide) + mark
            line += f"[{colour}]{text}[/{colour}]" if colour else text
        lines.append(line.rstrip())
    return lines
