"""A study's folder to tables in Markdown, figures and one HTML page."""

from __future__ import annotations

import base64
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from entropi import record_files, records
from entropi.bounds import causal_maximum
from entropi.errors import UserError
from entropi.records import EntropySnapshot, Spread, StudyClaim, StudyRow, StudyRun, TrainingStep
from entropi.report import figures
from entropi.report.formatting import PAPER, number, percent, rounded

TABLES_FILE = "tables.md"
PAGE_FILE = "report.html"
FIGURES_FOLDER = "figures"
DPI = 110
UNTIL_DIVERGENCE = "where every seed diverged, up to the first divergence"


@dataclass(frozen=True)
class Table:
    """Cells as text, the first column a name."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Drawing:
    """A figure, the name of its file, and what it shows in words."""

    title: str
    name: str
    figure: Any
    note: str


@dataclass(frozen=True)
class StudyResult:
    """What `study.jsonl` holds."""

    name: str
    runs: list[StudyRun]
    rows: list[StudyRow]
    claims: list[StudyClaim]


def is_study(folder: Path) -> bool:
    """Whether a folder is that of a study."""
    return (folder / record_files.STUDY_FILE).is_file()


def read_study(folder: Path) -> StudyResult:
    """Read `study.jsonl` of a study's folder; `UserError` if it is damaged or tells of no run."""
    return _sorted(folder.resolve().name, record_files.read(folder / record_files.STUDY_FILE))


def _sorted(name: str, found: Sequence[records.Record]) -> StudyResult:
    result = StudyResult(
        name,
        [r for r in found if isinstance(r, StudyRun)],
        [r for r in found if isinstance(r, StudyRow)],
        [r for r in found if isinstance(r, StudyClaim)],
    )
    if not result.rows:
        raise UserError(f"the study {name} has no run that has ended")
    return result


def write_study(folder: Path, output: Path | None = None) -> Path:
    """Write tables, figures and the page of a study into its folder; returns where the page is.

    Args:
        output: the page, if it is to be elsewhere.

    Raises:
        UserError: a study that is damaged or has no result, or a file that cannot be written.
    """
    study = read_study(folder)
    output = output or folder / PAGE_FILE
    found = tables(study)
    drawings = draw(study)
    try:
        (folder / FIGURES_FOLDER).mkdir(exist_ok=True)
        pictures = []
        for drawing in drawings:
            path = folder / FIGURES_FOLDER / f"{drawing.name}.png"
            figures.write_figure(drawing.figure, path, DPI)
            pictures.append(base64.b64encode(path.read_bytes()).decode("ascii"))
        (folder / TABLES_FILE).write_text(markdown(study.name, found), encoding="utf-8")
        partial = output.with_name(output.name + ".partial")
        partial.write_text(_page(study, found, drawings, pictures), encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"cannot write the study's report in {folder}: {error.strerror}") from None
    return output


# --- Tables -----------------------------------------------------------------------------------------------------------


def with_spread(value: Spread, digits: int = 2, scale: float = 1.0) -> str:
    """ "12.34 ± 0.56", without the spread for a single seed."""
    if not value.n:
        return "–"
    mean = f"{scale * value.mean:,.{digits}f}"
    return mean if math.isnan(value.std) else f"{mean} ± {scale * value.std:,.{digits}f}"


def _operations(row: StudyRow) -> str:
    return ", ".join(f"{o.operation} {o.count} x R^({o.shape[0]}x{o.shape[1]})" for o in row.nonlinear) or "–"


def _flops(row: StudyRow) -> list[int]:
    """Of the feed-forward networks as trained and as folded, and of attention; empty where nothing is recorded."""
    return [row.ffn_flops, row.folded_ffn_flops, row.attention_flops] if row.nonlinear else []


def _predicted(row: StudyRow) -> str:
    """ "545.1, t=2 (its own)": megabytes, and the softmax kernel that they are predicted for, where it is recorded."""
    if row.predicted_bytes is None:
        return "–"
    return f"{row.predicted_bytes / 1e6:,.1f}" + (f", {row.predicted_kernel}" if row.predicted_kernel else "")


def _perplexity(row: StudyRow) -> str:
    if not row.diverged:
        return with_spread(row.perplexity)
    lost = f"NaN in {len(row.diverged)} of {len(row.seeds)}"
    return f"{with_spread(row.perplexity)}; {lost}" if row.perplexity.n else lost


def _by_layer(shares: Sequence[float]) -> str:
    """ "layers 0 to 4: 75 %, layer 6: 25 %": the layers that have any, neighbours with the same share together."""
    some, place = [], 0
    for text, layers in itertools.groupby(map(percent, shares)):
        last = place + len(list(layers)) - 1
        if any(share > 0 for share in shares[place : last + 1]):
            some.append(f"layer {last}: {text}" if place == last else f"layers {place} to {last}: {text}")
        place = last + 1
    return ", ".join(some) or ("none" if shares else "–")


def tables(study: StudyResult) -> list[Table]:
    """Tables 2, 3, 5 and 6 of the paper in one, the heads, the claims and every run."""
    found = [_costs(study.rows), _heads(study.rows)]
    if study.claims:
        found.append(_claims(study.claims))
    return [*found, _runs(study.runs)]


def _costs(rows: Sequence[StudyRow]) -> Table:
    note = (
        "Held-out perplexity and cross-entropy, mean ± sample standard deviation over the seeds that did not "
        "diverge; nonlinear operations and FLOPs are of one forward pass of the context length, those "
        "of the feed-forward networks before and after folding. MB in private are predicted for a prompt of as "
        f"many tokens, both directions; models trained with the exact softmax are served with {_for_exact(rows)}, "
        "others with their own."
    )
    head = [
        "row",
        "seeds",
        "perplexity",
        "nats",
        "parameters",
        "MB in private",
        "nonlinear operations",
        "FLOPs FFN / folded / attention",
    ]
    cells = [
        [
            row.name,
            str(len(row.seeds)),
            _perplexity(row),
            with_spread(row.cross_entropy, 4),
            rounded(row.parameters),
            _predicted(row),
            _operations(row),
            " / ".join(map(rounded, flops)) if (flops := _flops(row)) else "–",
        ]
        for row in rows
    ]
    return Table("Perplexity and cost", note, head, cells)


def _for_exact(rows: Sequence[StudyRow]) -> str:
    """What predictions have in the exact softmax's place; older records do not say so, and had powers of t=8."""
    ending = " (trained exact)"
    labels = {row.predicted_kernel for row in rows if row.predicted_kernel.endswith(ending)}
    words = {"quartic": "the quartic exponential"}
    known = sorted(label.removesuffix(ending) for label in labels) or ["t=8"]
    return " or ".join(words.get(label, f"the kernel {label}") for label in known)


def _heads(rows: Sequence[StudyRow]) -> Table:
    note = (
        "Share of heads (%) in each quarter of M, the largest entropy observed in a run, mean ± standard deviation "
        "over seeds, and which share of a layer's heads is overloaded (above 3M/4) or collapsed (below M/4) on "
        "held-out text."
    )
    cells = [
        [
            row.name,
            *([with_spread(share, 1, 100) for share in row.quartile_shares] or ["–"] * 4),
            _by_layer(row.overloaded),
            _by_layer(row.collapsed),
        ]
        for row in rows
    ]
    return Table("Where the heads stand", note, ["row", *figures.QUARTERS, "overloaded", "collapsed"], cells)


def _claims(claims: Sequence[StudyClaim]) -> Table:
    least = max(claim.least_p for claim in claims)
    note = (
        "Cross-entropy of the right-hand row minus that of the left-hand row, paired by seed; p is that of an "
        "exact one-sided test. With so few seeds it cannot be below the least p, however clear the difference: "
        f"{least:g} here. No correction is made for testing several claims."
    )
    cells = [
        [
            f"{claim.lower} < {claim.higher}",
            str(len(claim.seeds)),
            _difference(claim),
            f"{sum(d > 0 for d in claim.differences)} of {len(claim.differences)}",
            claim.test,
            f"{claim.p:.3g}",
            f"{claim.least_p:.3g}",
        ]
        for claim in claims
    ]
    head = ["claim: lower < higher", "seeds", "difference, nats", "for it", "test", "p", "least p"]
    return Table("Claims", note, head, cells)


def _runs(runs: Sequence[StudyRun]) -> Table:
    cells = [
        [
            run.row,
            str(run.seed),
            "NaN" if run.diverged else number(run.perplexity),
            str(run.step),
            number(run.tokens_per_second, 0) if math.isfinite(run.tokens_per_second) else "–",
            outcome(run),
        ]
        for run in runs
    ]
    note = "Every run of the study; a divergence stops a run and is its result."
    return Table("Runs", note, ["run", "seed", "perplexity", "last step", "tokens/s", "outcome"], cells)


def _difference(claim: StudyClaim) -> str:
    if math.isfinite(claim.mean):
        return with_spread(Spread(mean=claim.mean, std=claim.std, n=len(claim.seeds)), 4)
    return "both diverged" if all(map(math.isnan, claim.differences)) else "a run diverged"


def outcome(run: StudyRun) -> str:
    """How a run ended: "finished", or where it diverged."""
    if not run.diverged:
        return "finished"
    what = "collapsed" if "collapsed" in run.reason else "NaN"
    return f"{what} at step {run.step}" + ("" if run.layer is None else f", layer {run.layer}")


def markdown(name: str, found: Sequence[Table]) -> str:
    """Tables as a Markdown document."""
    lines = [f"# {heading(name)}", ""]
    for table in found:
        lines += [f"## {table.title}", "", table.note, ""]
        lines.append(f"| {' | '.join(map(_cell, table.head))} |")
        lines.append(f"|{' --- |' * len(table.head)}")
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in table.rows]
        lines.append("")
    return "\n".join(lines)


def heading(name: str) -> str:
    """ "Study of-margins", and no second "study" where the name has one."""
    return name.capitalize() if "study" in name.lower() else f"Study {name}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\u00a0", " ")


def in_words(found: Sequence[records.Record]) -> str:
    """Rows and claims for a terminal."""
    study = _sorted("", found)
    width = max(len(row.name) for row in study.rows)
    lines = [f"{row.name:{width}}  perplexity {_perplexity(row)}" for row in study.rows]
    for claim in study.claims:
        wins = sum(d > 0 for d in claim.differences)
        lines.append(
            f"{claim.lower} < {claim.higher}: {wins} of {len(claim.differences)} seeds, {_difference(claim)} nats, "
            f"p = {claim.p:.3g} (at best {claim.least_p:.3g})"
        )
    return "\n".join(lines)


# --- Figures ----------------------------------------------------------------------------------------------------------


def draw(study: StudyResult) -> list[Drawing]:
    """Figures 2, 3 and 5 to 8 of the paper, as far as the study has data for them."""
    top = max(math.log(max(row.context_length, 2)) for row in study.rows)  # the scale of all heatmaps, as in reports
    return [*_drawings_of_all(study), *(drawing for row in study.rows for drawing in _drawings_of(row, top))]


def _drawings_of_all(study: StudyResult) -> list[Drawing]:
    """Figures that compare the rows."""
    trained = [row for row in study.rows if row.perplexity.n]
    drawings = []
    if values := {row.name: _values(study, row) for row in trained}:
        figure = figures.perplexity_by_row(values)
        drawings.append(Drawing("Perplexity by row", "perplexity", figure, "A ring a seed, a dot the mean."))

    if losses := {row.name: _losses(row) for row in study.rows if row.loss}:
        figure = figures.loss_curves(losses, dict.fromkeys(losses, ()))
        note = f"Training cross-entropy, mean over seeds (Fig. 2b); {UNTIL_DIVERGENCE}."
        drawings.append(Drawing("Loss", "loss", figure, note))

    if shares := {row.name: [share.mean for share in row.quartile_shares] for row in trained if row.quartile_shares}:
        note = "Share of heads in each quarter of M, the largest entropy of a run, mean over seeds (Fig. 2a)."
        drawings.append(Drawing("Where the heads stand", "quarters", figures.quartile_shares(shares), note))

    if sweep := _gamma(trained):
        shares_by_gamma = {gamma: [share.mean for share in row.quartile_shares] for gamma, row in sweep.items()}
        perplexity = {gamma: row.perplexity.mean for gamma, row in sweep.items()}
        figure = figures.gamma_sweep(shares_by_gamma, perplexity)
        note = "Share of heads in each quarter of M, and perplexity, by the tolerated deviation, over seeds (Fig. 7)."
        drawings.append(Drawing("The margin of the regulariser", "gamma", figure, note))
    return drawings


def _drawings_of(row: StudyRow, top: float) -> list[Drawing]:
    """Figures of one row; heatmaps of entropies are on the scale 0 to `top` nats."""
    slug = re.sub(r"[^A-Za-z0-9+().,=_-]+", "-", row.name.replace(", ", ","))
    drawings = []
    if row.entropy:
        figure = figures.entropy_heatmap(row.entropy, top, row.name, context_length=row.context_length)
        ceiling = causal_maximum(row.context_length)
        note = f"Held-out text, mean over seeds (Fig. 3). A causal mask allows at most {ceiling:.2f} nats."
        drawings.append(Drawing(f"Heads of {row.name}", f"heads-{slug}", figure, note))

    if row.layer_entropy:
        # A layer is one column: the figure's mean over heads is then the mean itself.
        snapshots = [
            EntropySnapshot(step=step, entropy=[[value] for value in layers])
            for step, layers in zip(row.entropy_steps, row.layer_entropy)
        ]
        figure = figures.layerwise_entropy(snapshots, row.context_length)
        note = "Training batches, mean over heads and seeds (Fig. 5 and 8)"
        note += "." if row.perplexity.n else f"; {UNTIL_DIVERGENCE}."
        drawings.append(Drawing(f"Entropy by layer, {row.name}", f"layers-{slug}", figure, note))

    if row.threshold:
        note = "Learned theta at the end, mean over seeds (Fig. 6)."
        figure = figures.thresholds(row.threshold)
        drawings.append(Drawing(f"Thresholds of {row.name}", f"thresholds-{slug}", figure, note))
    return drawings


def _values(study: StudyResult, row: StudyRow) -> list[float]:
    return [run.perplexity for run in study.runs if run.row == row.name and not run.diverged]


def _losses(row: StudyRow) -> list[TrainingStep]:
    """The means as the records of a run that had them."""
    return [
        TrainingStep(
            step=step, cross_entropy=loss, entropy_penalty=None, learning_rate=0, grad_norm=None, tokens_per_second=0
        )
        for step, loss in zip(row.loss_steps, row.loss)
    ]


def _gamma(rows: Sequence[StudyRow]) -> dict[float, StudyRow]:
    """Rows by their margin, where it is all that tells some of them apart: the largest such family."""
    families: dict[tuple[tuple[str, str], ...], dict[float, StudyRow]] = {}
    for row in rows:
        rest = dict(row.settings)
        gamma = rest.pop("entropy_margin", None)
        if gamma is not None and row.threshold and row.quartile_shares:
            families.setdefault(tuple(sorted(rest.items())), {})[float(gamma)] = row
    largest = max(families.values(), key=len, default={})
    return largest if len(largest) > 1 else {}


# --- Page -------------------------------------------------------------------------------------------------------------


def _page(study: StudyResult, found: Sequence[Table], drawings: Sequence[Drawing], pictures: Sequence[str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [(d.title, d.note, f"data:image/png;base64,{picture}") for d, picture in zip(drawings, pictures)]
    return environment.get_template("study.html.j2").render(
        study=study, heading=heading(study.name), tables=found, drawings=shown, paper=PAPER
    )
