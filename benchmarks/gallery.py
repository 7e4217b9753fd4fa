"""The pictures of docs/gallery.md, drawn anew from the records beside them, and the document itself.

python benchmarks/gallery.py                  # docs/gallery.md and docs/gallery/*.png
python benchmarks/gallery.py --svg            # and *.svg
python benchmarks/gallery.py --take runs/     # first replace the records by those of these run folders

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from matplotlib.figure import Figure

from entropi import record_files
from entropi.records import DiagnosisRecord, Evaluation, RunStarted
from entropi.report import figures
from entropi.report.folder import Run, read_run
from entropi.report.formatting import pattern_in_words, size
from entropi.report.page import write_report

DOCS = Path(__file__).parents[1] / "docs"
RUNS = ("baseline", "unregularised", "softmax-only")  # shown in full; what else was trained is for the sweep
DIGITS = 5  # significant ones kept in committed records
# Pictures of the page: the head that is pointed at, and the height of the window.
PAGES = {"report.png": (None, 1080), "report-heads.png": ('table[data-run="1"] td[data-layer="3"][data-head="3"]', 660)}

Runs = dict[str, Run]


@dataclass(frozen=True)
class Picture:
    """A figure of the gallery: its file's stem, its heading, what a reader should see in it."""

    name: str
    title: str
    draw: Callable[[Runs], Figure]
    text: Callable[[Runs], str]


def _heads(folder: str) -> Callable[[Runs], Figure]:
    def draw(runs: Runs) -> Figure:
        found = runs[folder].diagnosis
        assert found is not None
        return figures.entropy_heatmap(
            found.entropy, found.max_possible, runs[folder].name, context_length=found.context_length
        )

    return draw


def _verdict(folder: str) -> Callable[[Runs], str]:
    def text(runs: Runs) -> str:
        run = runs[folder]
        assert run.diagnosis is not None
        assert run.pattern is not None
        return f"{run.diagnosis.verdict} {pattern_in_words(run.pattern)}"

    return text


def _shown(runs: Runs) -> dict[str, Run]:
    return {runs[folder].name: runs[folder] for folder in RUNS}


def _quartiles(runs: Runs) -> Figure:
    return figures.quartile_shares(
        {name: r.diagnosis.quartile_shares for name, r in _shown(runs).items() if r.diagnosis}
    )


def _layerwise(folder: str) -> Callable[[Runs], Figure]:
    return lambda runs: figures.layerwise_entropy(runs[folder].snapshots, runs[folder].context_length)


def _losses(runs: Runs) -> Figure:
    shown = _shown(runs)
    return figures.loss_curves(
        {name: run.steps for name, run in shown.items()}, {name: run.evaluations for name, run in shown.items()}
    )


def _thresholds(runs: Runs) -> Figure:
    threshold = runs["softmax-only"].snapshots[-1].threshold
    assert threshold is not None
    return figures.thresholds(threshold)


def _gamma(runs: Runs) -> Figure:
    swept = {run.margin: run for run in runs.values() if run.margin is not None}
    return figures.gamma_sweep(
        {margin: run.diagnosis.quartile_shares for margin, run in swept.items() if run.diagnosis},
        {margin: run.evaluation.perplexity for margin, run in swept.items() if run.evaluation},
    )


def _positions(runs: Runs) -> Figure:
    pattern = runs["softmax-only"].pattern
    assert pattern is not None
    return figures.entropy_by_position(pattern)


def _pareto(runs: Runs) -> Figure:
    points = {}
    for name, run in _shown(runs).items():
        assert run.folded_cost is not None
        assert run.evaluation is not None
        points[name] = (float(run.folded_cost.ffn_flops + run.folded_cost.attention_flops), run.evaluation.perplexity)
    return figures.pareto(points, "one forward pass after folding (FLOPs)")


def _folding(folder: str) -> Callable[[Runs], Figure]:
    def draw(runs: Runs) -> Figure:
        before, after = runs[folder].cost, runs[folder].folded_cost
        assert before is not None
        assert after is not None
        return figures.folding(before, after)

    return draw


def _bytes(runs: Runs) -> Figure:
    private = runs["softmax-only"].private
    assert private is not None
    return figures.bytes_per_operation(private.stages)


def _asked(runs: Runs) -> str:
    private = runs["softmax-only"].private
    assert private is not None
    return (
        f"Generating {len(private.new_tokens)} tokens under {private.protocol} moved {size(private.bytes)} in both "
        f"directions, as the client's engine counted them, with the {private.kernel}."
    )


def _says(text: str) -> Callable[[Runs], str]:
    return lambda runs: text


PICTURES = (
    Picture("heads-baseline", "Every head of the baseline (Fig. 3)", _heads("baseline"), _verdict("baseline")),
    Picture(
        "heads-softmax-only", "Every head of a softmax-only model", _heads("softmax-only"), _verdict("softmax-only")
    ),
    Picture(
        "quartiles",
        "Overload and collapse at a glance (Fig. 2a)",
        _quartiles,
        _says("Share of heads in each quarter of M, the largest entropy observed in a run."),
    ),
    Picture(
        "layerwise-baseline",
        "Entropy of the baseline's layers during training (Fig. 5 and 8)",
        _layerwise("baseline"),
        _says("Mean over the heads of a layer; dashed, the most that a causal mask allows."),
    ),
    Picture(
        "layerwise-softmax-only",
        "The same without LayerNorm and GELU",
        _layerwise("softmax-only"),
        _says("A layer that stays on the dashed line attends evenly: its heads do nothing."),
    ),
    Picture(
        "thresholds",
        "Learned thresholds (Fig. 6)",
        _thresholds,
        _says("What share of the maximum entropy each head has learned to aim for; by layer, mean and spread."),
    ),
    Picture(
        "gamma",
        "The margin of the regulariser (Fig. 7)",
        _gamma,
        _says("Heads by quarter of M, and perplexity, for several tolerated deviations; one seed each."),
    ),
    Picture("losses", "Loss", _losses, _says("Lines: training batches. Points: held-out text.")),
    Picture(
        "positions",
        "Entropy by position",
        _positions,
        _says("Under a causal mask row i cannot exceed log(i + 1), the dashed line."),
    ),
    Picture(
        "pareto",
        "Cost against perplexity",
        _pareto,
        _says("Filled: no other run is both cheaper and better. Nonlinear operations are not in these FLOPs."),
    ),
    Picture(
        "folding",
        "What folding leaves",
        _folding("softmax-only"),
        _says("The linear feed-forward networks disappear into neighbouring matrices before private inference."),
    ),
    Picture("bytes", "Where the bytes of private inference go", _bytes, _asked),
)


def take(source: Path, target: Path) -> None:
    """Replace the committed records by those of the run folders below `source`, shortened."""
    shutil.rmtree(target, ignore_errors=True)
    for run in sorted(path for path in source.iterdir() if (path / record_files.RECORDS_FILE).is_file()):
        folder = target / run.name
        folder.mkdir(parents=True)
        for record in record_files.read(run / record_files.RECORDS_FILE):
            in_sweep_only = run.name not in RUNS
            if in_sweep_only and not isinstance(record, RunStarted | Evaluation | DiagnosisRecord):
                continue
            record_files.append(
                folder / record_files.RECORDS_FILE, msgspec.convert(_short(msgspec.to_builtins(record)), type(record))
            )
        for name in ("config.yaml", "environment.json"):
            shutil.copyfile(run / name, folder / name)


def _short(value: Any) -> Any:
    """Floats with a few significant digits, so that records are small."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, (list, tuple)) else value


def document(runs: Runs) -> str:
    """docs/gallery.md: every picture with its heading and what to see in it."""
    started = runs["softmax-only"].started
    assert started is not None
    commands = "\n".join(run.command or "" for run in runs.values())
    parts = [
        "# Gallery",
        "What `entropi report` and the functions of `entropi.report.figures` draw, from the records of real runs: "
        f"{started.layers} layers, {started.heads} heads, width {started.hidden_size}, {started.context_length} tokens "
        f"of context, {started.total_steps} steps of {started.tokens_per_step:,} tokens of Python's standard library. "
        "Models this small, trained for minutes on one core with one seed, show what the pictures are, and not the "
        "paper's results. `python benchmarks/gallery.py` writes this document and its pictures anew from "
        "`docs/gallery/records`.",
        "## The page",
        "![The report of three runs: a summary of each in words](gallery/report.png)",
        "![The heads of three runs side by side, with a slider over training steps](gallery/report-heads.png)",
        "`entropi report RUN [RUN...]` writes one file that works offline. Point at a head, or move with the arrow "
        "keys, to read what it does; the slider goes through the training.",
    ]
    for picture in PICTURES:
        alt = picture.title.partition(" (")[0]
        parts += [f"## {picture.title}", f"![{alt}](gallery/{picture.name}.png)", picture.text(runs)]
    if (private := runs["softmax-only"].private) is not None:
        prompt = shlex.quote(private.prompt)
        commands += "\nentropi serve runs/softmax-only  # and, beside it:"
        commands += f"\nentropi ask {prompt} --max-new-tokens {len(private.new_tokens)} --record runs/softmax-only"
    parts += ["## How the records were made", f"```sh\n{commands}\n```"]
    return "\n\n".join(parts) + "\n"


def photograph(runs: list[Path], target: Path) -> list[str]:
    """Write the pictures of the page into `target`; their names, none if no browser is installed or if it fails."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from browser import browser_tab, find_browser

    found = find_browser()
    if found is None:
        return []

    async def take(page: Path) -> None:
        async with browser_tab(found) as tab:
            for name, (head, height) in PAGES.items():
                await tab.look(1240, height)
                await tab.open(page)
                if head is not None:
                    await tab.hover(head)
                await tab.screenshot(target / name, whole=False)

    with tempfile.TemporaryDirectory(prefix="entropi-gallery-") as temporary:
        try:
            asyncio.run(take(write_report(runs, Path(temporary) / "report.html")))
        except (OSError, RuntimeError, asyncio.TimeoutError):
            return []
    return list(PAGES)


def read(source: Path) -> Runs:
    """The run folders below `source` by name, those shown in full first."""
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    folders.sort(key=lambda path: RUNS.index(path.name) if path.name in RUNS else len(RUNS))
    return {path.name: read_run(path) for path in folders}


def draw(docs: Path, source: Path, svg: bool = False) -> list[str]:
    """Write the document and its pictures into `docs`; the names of the pictures."""
    runs = read(source)
    (docs / "gallery").mkdir(parents=True, exist_ok=True)
    written = []
    for number, picture in enumerate(PICTURES, start=1):
        print(f"{number}/{len(PICTURES)} {picture.name}", file=sys.stderr)
        for kind in ("png", "svg") if svg else ("png",):
            figures.write_figure(picture.draw(runs), docs / "gallery" / f"{picture.name}.{kind}", dpi=110)
            written.append(f"{picture.name}.{kind}")
    seen = photograph([source / name for name in RUNS], docs / "gallery")
    if not seen:
        print(f"no browser took a picture of the page; {', '.join(PAGES)} stay as they are", file=sys.stderr)
    (docs / "gallery.md").write_text(document(runs), encoding="utf-8")
    return [*seen, *written]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, help="folder of run folders whose records replace the committed ones")
    parser.add_argument("--svg", action="store_true", help="write SVG as well as PNG")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where gallery.md and gallery/ go")
    given = parser.parse_args()
    source = DOCS / "gallery" / "records"
    if given.take is not None:
        take(given.take, source)
    print(json.dumps({"document": str(given.docs / "gallery.md"), "pictures": draw(given.docs, source, given.svg)}))


if __name__ == "__main__":
    main()
