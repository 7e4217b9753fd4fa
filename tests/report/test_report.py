"""The report: figures that show something, and one safe, self-contained page about whatever a folder holds."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.colors
import msgspec
import numpy as np
import pytest
from matplotlib import image as png
from rich.text import Text

from entropi import record_files
from entropi.bounds import causal_maximum
from entropi.errors import UserError
from entropi.record_files import RECORDS_FILE, encode
from entropi.records import (
    AttentionPattern,
    CountRecord,
    DiagnosisRecord,
    EntropySnapshot,
    Evaluation,
    OperationCount,
    PlaintextComparison,
    PrivateRun,
    Record,
    RolledBack,
    RunStarted,
    SkippedUpdate,
    StageCommunication,
    TaperSnapshot,
    TrainingStep,
)
from entropi.report import figures
from entropi.report.communication import by_operation, by_pass
from entropi.report.folder import frames, read_run
from entropi.report.formatting import PAPER, even_distance, even_share, quote, table_of_heads
from entropi.report.heads import in_script
from entropi.report.page import MAX_PAGE_BYTES, write_diagnosis, write_report

NAN = math.nan
LAYERS, HEADS, CONTEXT = 6, 4, 128
SCRIPT = "<script>alert('x')</script>"

started = RunStarted(
    time="2026-01-02T03:04:05+00:00",
    name="EReg(SM(t)+ScFuFFN)",
    architecture="SM(t)+ScFuFFN",
    parameters=1_712_345,
    layers=LAYERS,
    heads=HEADS,
    hidden_size=128,
    vocab_size=4096,
    context_length=CONTEXT,
    train_tokens=2_500_000,
    heldout_tokens=120_000,
    corpus="python-stdlib",
    corpus_hash="5f1e",
    tokens_per_step=4096,
    total_steps=600,
    precision="fp32",
)


def renamed(name: str) -> RunStarted:
    return msgspec.structs.replace(started, name=name)


def some_entropy(progress: float = 1.0) -> list[list[float]]:
    ceiling = causal_maximum(CONTEXT)
    falls = np.linspace(0.0, 0.95, LAYERS)[:, None] * np.linspace(0.6, 1.0, HEADS)[None]
    return (ceiling * (1 - progress * falls)).tolist()


def training(scale: float = 1.0, thresholds: bool = True) -> list[Record]:
    result: list[Record] = []
    for step in range(10, 610, 10):
        loss = scale * (4.8 + 3.5 * math.exp(-step / 90) + 0.02 * math.sin(step))
        result.append(
            TrainingStep(
                step=step,
                cross_entropy=loss,
                entropy_penalty=1e-3,
                learning_rate=1e-3,
                grad_norm=0.7,
                tokens_per_second=8123.4,
            )
        )
        if step % 50 == 0:
            threshold = (0.3 + 0.2 * np.random.default_rng(0).random((LAYERS, HEADS))).tolist() if thresholds else None
            result.append(EntropySnapshot(step=step, entropy=some_entropy(step / 600), threshold=threshold))
        if step % 100 == 0:
            result.append(
                Evaluation(
                    step=step,
                    cross_entropy=loss + 0.1,
                    perplexity=math.exp(loss + 0.1),
                    tokens=8192,
                    entropy=some_entropy(step / 600),
                )
            )
    return result


def tapering() -> list[TaperSnapshot]:
    return [
        TaperSnapshot(
            step=step,
            stage="norm" if step < 600 else "after",
            gates={"norm": [1 - step / 600] * LAYERS, "final_norm": [1.0]},
            distance=(step / 600 * np.random.default_rng(0).random((LAYERS, HEADS))).tolist(),
            divergence=0.25,
            hidden=None,
        )
        for step in range(100, 700, 100)
    ]


def diagnosis(shares: Iterable[float] = (0.0417, 0.25, 0.2917, 0.4166), verdict: str = "Entropic overload") -> Record:
    return DiagnosisRecord(
        entropy=some_entropy(),
        context_length=CONTEXT,
        max_observed=3.88,
        max_possible=math.log(CONTEXT),
        quartile_shares=list(shares),
        overloaded=[(0, 0), (0, 1), (1, 3)],
        collapsed=[(5, 3)],
        verdict=verdict,
    )


cost = CountRecord(
    architecture="SM(t)+ScFuFFN",
    seq_len=CONTEXT,
    parameters=1_712_345,
    nonlinear=[OperationCount(operation="softmax", count=24, shape=(128, 128))],
    ffn_flops=25_165_824,
    attention_flops=138_412_032,
)

folded_cost = msgspec.structs.replace(cost, folded=True, ffn_flops=0, parameters=2_345_678)


def pattern(on_first: float = 0.125) -> AttentionPattern:
    even = [[1.0] * HEADS] * LAYERS
    return AttentionPattern(
        sequences=8,
        context_length=CONTEXT,
        distance=(10 * np.array(even) + np.arange(HEADS)).tolist(),
        on_first=(on_first * np.array(even)).tolist(),
        on_previous=(0.25 * np.array(even)).tolist(),
        on_itself=(0.0625 * np.array(even)).tolist(),
        positions=list(range(0, CONTEXT, 2)),
        entropy_by_position=[[math.log(1 + i) / (1 + layer) for i in range(0, CONTEXT, 2)] for layer in range(LAYERS)],
    )


def stages() -> list[StageCommunication]:
    sizes = {"embedding": 3.1, "qkv": 9.7, "scores": 12.4, "exp": 71.0, "normalise": 33.2, "values": 8.8, "ffn": 2.5}
    return [
        StageCommunication(
            name=name,
            layer=-1 if name == "embedding" else layer,
            token=token,
            seconds=0.02 * megabytes / (1 + 4 * token),
            sent_bytes=int(6e5 * megabytes / (1 + 9 * (token > 0))),
            received_bytes=int(4e5 * megabytes / (1 + 9 * (token > 0))),
            sent_messages=40,
            received_messages=38,
        )
        for token in range(4)
        for name, megabytes in sizes.items()
        for layer in range(1 if name == "embedding" else LAYERS)
    ]


def private(prompt: str = "def area(radius):\n    return ", text: str = "radius * radius") -> PrivateRun:
    return PrivateRun(
        protocol="cheetah",
        trust="Two parties, semi-honest: the server learns neither prompt nor answer",
        server="127.0.0.1:9000",
        prompt=prompt,
        prompt_tokens=[17, 4, 255, 31],
        new_tokens=[812, 9, 812, 77],
        new_text=text,
        stages=stages(),
        setup_seconds=1.5,
        setup_bytes=0,
        reveal_bytes=131_072,
        seconds=83.2,
        ring_bits=64,
        fraction_bits=18,
        softmax="power-8",
    )


comparison = PlaintextComparison(
    max_logit_error=[0.0021, 0.0044, 0.0017, 0.0123],
    same_top1=[True, True, False, True],
    plaintext_tokens=[812, 9, 5, 77],
)


def folder(path: Path, contents: Iterable[Record], **files: str) -> Path:
    path.mkdir()
    (path / RECORDS_FILE).touch()
    for record in contents:
        record_files.append(path / RECORDS_FILE, record)
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


def full_folder(path: Path) -> Path:
    return folder(
        path,
        [started, *training(), diagnosis(), pattern(), cost, folded_cost, private(), comparison],
        config_yaml="architecture: EReg(SM(t)+ScFuFFN)\nlearning_rate: 0.001\n",
        environment_json=json.dumps(
            {"versions": {"torch": "2.13.0", "python": "3.11.7"}, "command": ["entropi", "train", "--name", "a b"]}
        ),
    )


class Page(HTMLParser):
    """Tags with attributes, text, headings, and a check that elements close in order."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data

    def data(self) -> dict[str, Any]:
        """What the page's script draws from."""
        return json.loads(self.scripts[0])

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(runs: list[Path], output: Path) -> Page:
    page = Page(write_report(runs, output))
    assert len(page.source.encode()) < MAX_PAGE_BYTES
    assert page.all("script") == [{"type": "application/json", "id": "data"}, {}]  # data, and one script of ours
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}'" in (policy or "")
    assert not page.all("link")
    for attributes in page.all("img"):
        assert attributes["alt"]
        assert (attributes["src"] or "").startswith("data:image/png;base64,")
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data"):
                assert (value or "").startswith(("data:", "#")) or (name, value) == ("href", PAPER)  # nothing is loaded
            assert not name.startswith("on")
    assert "url(" not in page.source
    assert "@import" not in page.source
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [link["href"] or "" for link in page.all("a")]
    assert all(link[1:] in targets for link in links if link != PAPER)
    assert links.count(PAPER) == 1
    assert [link[1:] for link in links if link != PAPER] == [tag["id"] for tag in page.all("h2")]
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    return page


# Figures


def pixels(uri: str) -> np.ndarray:
    return png.imread(io.BytesIO(base64.b64decode(uri.partition(",")[2])), format="png")


def drawings() -> dict[str, Any]:
    snapshots = [record for record in training() if isinstance(record, EntropySnapshot)]
    steps = [record for record in training() if isinstance(record, TrainingStep)]
    evaluations = [record for record in training() if isinstance(record, Evaluation)]
    hole = [[NAN, 1.0], [math.inf, 0.5]]
    nan_step = TrainingStep(
        step=1, cross_entropy=NAN, entropy_penalty=NAN, learning_rate=NAN, grad_norm=None, tokens_per_second=NAN
    )
    zero = StageCommunication(
        name="exp",
        layer=0,
        token=0,
        seconds=0,
        sent_bytes=0,
        received_bytes=0,
        sent_messages=0,
        received_messages=0,
    )
    many = {f"run {i}": [0.1, 0.2, 0.3, 0.4] for i in range(15)}
    return {
        "heatmap": figures.entropy_heatmap(some_entropy(), math.log(CONTEXT), "a $run_ with _marks"),
        "by position": figures.entropy_by_position(pattern()),
        "by one position": figures.entropy_by_position(
            msgspec.structs.replace(pattern(), positions=[0], entropy_by_position=[[NAN], [0.5]])
        ),
        "gamma": figures.gamma_sweep({0.0: [0.1, 0.4, 0.4, 0.1], 0.2: [0, 0.3, 0.6, 0.1]}, {0.0: 3.2, 0.2: 3.1}),
        "gamma with holes": figures.gamma_sweep({0.1: [NAN] * 4}, {0.1: NAN}),
        "pareto": figures.pareto({"a": (1.0, 9.0), "b": (2.0, 8.0), "_c $": (30.0, 8.5)}, "cost"),
        "pareto with holes": figures.pareto({"a": (NAN, 9.0)}, "cost"),
        "folding": figures.folding(cost, folded_cost),
        "large heatmap": figures.entropy_heatmap(np.random.default_rng(0).random((48, 32)).tolist(), 1.0),
        "one head": figures.entropy_heatmap([[0.0]], NAN),
        "holes": figures.entropy_heatmap(hole, math.inf),
        "only holes": figures.entropy_heatmap([[NAN]], NAN),
        "layerwise": figures.layerwise_entropy(snapshots, CONTEXT),
        "one snapshot": figures.layerwise_entropy(snapshots[:1]),
        "many layers": figures.layerwise_entropy(
            [EntropySnapshot(step=s, entropy=[[s * layer, NAN] for layer in range(30)]) for s in (1, 2, 3)]
        ),
        "snapshot with holes": figures.layerwise_entropy([EntropySnapshot(step=1, entropy=[[NAN], [NAN]])]),
        "quartiles": figures.quartile_shares({"SM": [0.33, 0.1, 0.12, 0.45], "_x $": [0, 0, 1, 0]}),
        "many quartiles": figures.quartile_shares(many),
        "quartiles with holes": figures.quartile_shares({"SM": [NAN] * 4}),
        "thresholds": figures.thresholds(np.random.default_rng(0).uniform(0.2, 0.5, (LAYERS, HEADS)).tolist()),
        "untrained thresholds": figures.thresholds([[0.5, 0.5]]),
        "thresholds with holes": figures.thresholds([[NAN, NAN]]),
        "losses": figures.loss_curves({"a": steps}, {"a": evaluations}),
        "many losses": figures.loss_curves({f"_run {i}": steps for i in range(12)}, {"other": evaluations}),
        "diverged": figures.loss_curves({"a": [nan_step]}, {}),
        "no losses": figures.loss_curves({}, {}),
        "bytes": figures.bytes_per_operation(stages()),
        "no bytes": figures.bytes_per_operation([zero]),
        "no stages": figures.bytes_per_operation([]),
        "gates": figures.taper_gates(tapering()),
        "distances": figures.entropy_distance(tapering()[-1].distance),
        "distances with holes": figures.entropy_distance([[NAN, 0.0]]),
    }


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_figure_shows_something(step: int, tmp_path: Path) -> None:
    for name, figure in list(drawings().items())[::step]:
        drawn = pixels(figures.to_data_uri(figure, dpi=50))
        assert drawn[..., :3].var() > 1e-4, name
        assert drawn[0, 0, :3].tolist() == [1, 1, 1], name  # white whatever the page's colour
        assert drawn[..., 3].min() == 1, name
    figures.write_figure(figure, tmp_path / "figure.png", dpi=50)
    assert png.imread(tmp_path / "figure.png").shape == drawn.shape


def test_long_names_that_differ_at_their_ends_stay_apart() -> None:
    """Rows of a study by learning rate were all "squares over their sum, learning_rate=…"."""
    names = [f"squares over their sum, learning_rate={rate}" for rate in ("2e-3", "4e-3")]
    figure = figures.perplexity_by_row({name: [1.0] for name in names})
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == ["squares over their …, learning_rate=2e-3", "squares over their …, learning_rate=4e-3"]


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_legends_say_what_is_needed() -> None:
    """Operations stand in the order in which they leave; "training" only beside what is held out."""
    assert legend_of(figures.taper_gates(tapering())) == ["norm", "final norm"]
    steps = [record for record in training() if isinstance(record, TrainingStep)]
    evaluations = [record for record in training() if isinstance(record, Evaluation)]
    both = figures.loss_curves({"a": steps, "b": steps}, {"a": evaluations})
    assert legend_of(both) == ["a, training", "a, held out", "b, training"]
    plain = figures.loss_curves({"a": steps, "b": steps}, {"a": ()})
    assert legend_of(plain) == ["a", "b"]
    assert len({line.get_linestyle() for line in plain.axes[0].get_lines()}) == 2  # seen though they coincide


def test_a_loss_beyond_all_others_does_not_set_the_scale() -> None:
    """A model without norms had one batch of 1e14 among losses of 4, and recovered."""
    steps = [record for record in training() if isinstance(record, TrainingStep)]
    steps[3] = msgspec.structs.replace(steps[3], cross_entropy=1.4e14)
    axes = figures.loss_curves({"a": steps}, {}).axes[0]
    assert axes.get_ylim()[1] < 20
    assert [text.get_text() for text in axes.texts] == ["1 beyond, up to 1.4e+14"]


def test_heatmap_has_layers_downwards_heads_across_and_a_fixed_scale() -> None:
    marked = figures.entropy_heatmap([[0.0, 1.0]], math.log(128), context_length=128)
    (line,) = marked.axes[1].get_lines()
    assert line.get_ydata()[0] == pytest.approx(causal_maximum(128))
    assert "causal maximum, 3.88" in marked.axes[1].get_ylabel()
    figure = figures.entropy_heatmap([[0.0, 1.0, 2.0], [3.0, 4.0, 4.5]], 4.85)
    assert not figure.axes[1].get_lines()
    axes = figure.axes[0]
    assert axes.images[0].get_array().shape == (2, 3)
    assert axes.images[0].get_clim() == (0.0, 4.85)
    assert axes.get_ylim() == (1.5, -0.5)
    assert [text.get_text() for text in axes.texts] == ["0.00", "1.00", "2.00", "3.00", "4.00", "4.50"]
    assert not figures.entropy_heatmap([[1.0] * 21] * 10, 2.0).axes[0].texts


@pytest.mark.parametrize("values", [[[0.5296, 0.52961], [0.52962, 0.52961]], [[0.2, 0.4], [0.3, 0.5]], [[0.5, 0.5]]])
def test_thresholds_have_one_scale_and_plain_numbers(values: list[list[float]]) -> None:
    """Thresholds that are nearly alike made an axis that read "1e-5+5.296e-1"."""
    figure = figures.thresholds(values)
    figure.draw_without_rendering()
    cells, layers = figure.axes[:2]
    assert layers.get_xlim() == cells.images[0].get_clim()
    assert layers.xaxis.get_offset_text().get_text() == ""
    shown = [float(tick.label1.get_text()) for tick in layers.xaxis.get_major_ticks() if tick.label1.get_text()]
    assert shown == sorted(set(shown))
    assert len(shown) >= 2


def test_heatmap_of_a_model_without_attention_in_some_layers() -> None:
    """Rows are called by the model's own numbers, and heads that a layer does not have stay blank."""
    figure = figures.entropy_heatmap([[2.0, 2.0, 2.0], [1.0]], 2.0, layers=[1, 3])
    axes = figure.axes[0]
    figure.draw_without_rendering()
    labels = {tick.get_loc(): tick.label1.get_text() for tick in axes.yaxis.get_major_ticks()}
    assert (labels[0], labels[1]) == ("1", "3")
    assert [text.get_text() for text in axes.texts] == ["2.00", "2.00", "2.00", "1.00"]
    drawn = figures.to_pixels(figure)
    corner = axes.transData.transform([[1.6, 0.6]])[0] * 80 / figure.dpi
    assert drawn[len(drawn) - 1 - int(corner[1]), int(corner[0])].tolist() == [255, 255, 255]
    by_position = msgspec.structs.replace(pattern(), layers=[2, 3, 5, 7, 11, 13])
    names = [line.get_label() for line in figures.entropy_by_position(by_position).axes[0].lines]
    assert names == [*(f"layer {number}" for number in by_position.layers), "causal maximum"]


def test_bars_of_folding_have_the_numbers_of_both_records() -> None:
    relu = OperationCount(operation="relu", count=2, shape=(128, 512))
    before = msgspec.structs.replace(cost, nonlinear=[*cost.nonlinear, relu])
    axes = figures.folding(before, folded_cost).axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    labels = [text.get_text() for text in axes.texts]
    first, second = labels[: len(names)], labels[len(names) :]
    assert dict(zip(names, zip(first, second))) == {
        "FLOPs, feed-forward": ("25.2 M", "0"),
        "FLOPs, attention": ("138 M", "138 M"),
        "parameters": ("1.71 M", "2.35 M"),
        "softmax, elements": ("393 k", "393 k"),
        "relu, elements": ("131 k", "0"),
    }


def test_the_frontier_is_what_nothing_beats() -> None:
    points = {"dear": (9.0, 1.0), "cheap": (1.0, 9.0), "beaten": (5.0, 6.0), "middle": (4.0, 5.0), "twin": (4.0, 5.0)}
    assert figures.frontier(points) == ["cheap", "middle", "dear"]


def test_the_ceiling_by_position_is_that_of_a_causal_mask() -> None:
    """Drawn over the stretches: an even head, whose rows have entropy log(i + 1), lies on it."""
    stretches = [[(math.log(i + 1) + math.log(i + 2)) / 2 for i in range(0, CONTEXT, 2)]]
    figure = figures.entropy_by_position(msgspec.structs.replace(pattern(), entropy_by_position=stretches))
    layer, ceiling = figure.axes[0].lines
    assert ceiling.get_label() == "causal maximum"
    assert layer.get_ydata() == pytest.approx(ceiling.get_ydata())
    assert layer.get_xdata()[:2].tolist() == [0.5, 2.5]


def test_svg_and_png_are_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        figures.write_figure(figures.entropy_heatmap(some_entropy(), 4.85, "a & <b>"), tmp_path / name)
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    drawing = ElementTree.fromstring((tmp_path / "a.svg").read_text())
    assert drawing.tag.endswith("svg")
    assert len(list(drawing.iter())) > 100
    assert figures.to_pixels(figures.entropy_heatmap([[1.0]], 2.0)).shape[2] == 3


def test_colours_rise_in_lightness() -> None:
    """So that a heatmap reads in print and to colour-blind readers."""
    lightness = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(matplotlib.colors.to_rgb, figures.colour_scale())]
    assert len(lightness) == 64
    assert all(before < after for before, after in itertools.pairwise(lightness))


def contrast(a: str, b: str) -> float:
    """Of two colours, by the Web Content Accessibility Guidelines 2.2: 4.5 is what text needs."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_numbers_on_the_heatmap_can_be_read() -> None:
    assert min(contrast(colour, figures.ink_on(colour)) for colour in figures.colour_scale()) >= 4.5


@pytest.mark.parametrize("matrix", [[], [[]], [[1.0], []]])
def test_figures_refuse_what_is_no_matrix(matrix: list[list[float]]) -> None:
    with pytest.raises(UserError, match="layer"):
        figures.entropy_heatmap(matrix, 1.0)
    with pytest.raises(UserError, match="layer"):
        figures.thresholds([[1.0], [1.0, 2.0]])  # of our models, whose layers are all alike


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31.0}):
        figures.to_data_uri(figures.entropy_heatmap([[1.0]], 2.0), dpi=30)
        assert matplotlib.rcParams["font.size"] == 31.0


def test_causal_maximum() -> None:
    assert causal_maximum(128) == pytest.approx(sum(math.log(i + 1) for i in range(128)) / 128)


def test_communication_sums() -> None:
    operations = by_operation(stages())
    assert [operation.name for operation in operations][:2] == ["exp", "normalise"]
    assert operations[0].prompt.bytes == 71_000_000 * LAYERS
    assert operations[0].further.messages == 3 * 78 * LAYERS
    assert [token for token, _ in by_pass(stages())] == [0, 1, 2, 3]
    total = sum(stage.bytes for stage in stages())
    assert sum(operation.total.bytes for operation in operations) == total
    assert sum(communication.bytes for _, communication in by_pass(stages())) == total


# The page


def test_one_run_with_everything(tmp_path: Path) -> None:
    page = report([full_folder(tmp_path / "run")], tmp_path / "out" / "report.html")
    assert len(page.all("img")) == 7
    last = next(record for record in reversed(training()) if isinstance(record, Evaluation))
    for fact in [
        "EReg(SM(t)+ScFuFFN)",
        f"the perplexity is {last.perplexity:.2f}",
        f"{last.cross_entropy:.3f} nats per token",
        "Entropic overload.",
        "On average a head looks 11.5 tokens back (even attention: 32.2)",
        "12.5 % of its weight on the first token, 25.0 % on the previous one and 6.2 % on its own",
        "0 of 24 heads put more than half of their weight on the first token",
        "held-out text, from the diagnosis",
        "softmax 24 × 128×128",
        "25.2 M / 138.4 M",
        "4 / 25 / 29 / 42 3 / 1",
        "layer 0: heads 0, 1; layer 1: head 3",
        "1,712,345",
        "radius * radius",
        "17 4 255 31",
        "Two parties, semi-honest",
        "1.08 GB",
        "83.2 s",
        "The biggest cost is exp",
        "3 of 4 tokens agree",
        "0.0123",
        "426.00 MB",
        "learning_rate: 0.001",
        "versions.torch",
        "entropi train --name 'a b'",
    ]:
        assert fact in page.text, fact
    assert "not recorded" not in page.text
    order = [
        "Summary",
        "Every head",
        "In numbers",
        "Entropy and training",
        "Private inference",
        "Cost counts",
        "Settings",
    ]
    found = [page.text.index(title, page.text.index("costs. Entropies")) for title in order]
    assert found == sorted(found)


def test_a_tapering_shows_what_leaves_and_how_far_the_heads_are(tmp_path: Path) -> None:
    begun = msgspec.structs.replace(started, teacher="runs/baseline", teacher_hash="ab")
    page = report([folder(tmp_path / "run", [begun, *training(), *tapering()])], tmp_path / "report.html")
    plain = report([folder(tmp_path / "plain", [started, *training()])], tmp_path / "plain.html")
    assert len(page.all("img")) == len(plain.all("img")) + 2
    most = max(map(max, tapering()[-1].distance))
    for fact in [
        "The teacher is runs/baseline, and what leaves it norm, final_norm",
        f"at most {most:.2f} nats",
        "is 0.250 nats",
    ]:
        assert fact in page.text, fact


def test_what_is_not_recorded_is_left_out(tmp_path: Path) -> None:
    page = report([folder(tmp_path / "bare", [])], tmp_path / "report.html")
    assert [tag["id"] for tag in page.all("h2")] == ["summary"]
    assert "Nothing is recorded in this folder yet." in page.text
    begun = [record for record in training() if isinstance(record, TrainingStep)]
    training_only = report([folder(tmp_path / "begun", [started, *begun])], tmp_path / "begun.html")
    assert "it has not been evaluated on held-out text" in training_only.text
    for absent in ("Nothing is recorded", "Every head", "overloaded", "Entropy and training"):
        assert absent not in training_only.text
    assert not page.all("img")
    assert "None" not in page.text


def test_the_page_of_a_foreign_model_has_no_empty_part(tmp_path: Path) -> None:
    """Of a model that was not trained here: its perplexity and its heads, and nothing about what it has not."""
    evaluated = Evaluation(step=0, cross_entropy=9.0, perplexity=8103.08, tokens=1, entropy=some_entropy())
    (tmp_path / "gpt2").mkdir()
    verdict = diagnosis()
    assert isinstance(verdict, DiagnosisRecord)
    verdict.model, verdict.parameters = "GPT2LMHeadModel", 124_439_808
    page = Page(write_diagnosis(tmp_path / "gpt2", [evaluated, verdict, pattern()], tmp_path / "page.html"))
    for fact in ("GPT2LMHeadModel, 124.4 M parameters", "8,103.08", "In numbers", "Where the heads stand"):
        assert fact in page.text
    assert [tag["id"] for tag in page.all("h2")] == ["summary", "heads", "comparison", "runs"]
    for absent in ("ecorded", "Loss", "private inference is", "FLOPs", "regulariser", "entropi cost", "Settings"):
        assert absent not in page.text, absent
    assert 'class="missing"' not in page.source


def test_terms_come_before_their_use(tmp_path: Path) -> None:
    page = report([full_folder(tmp_path / "run")], tmp_path / "report.html")
    defined = page.text.index("M the largest entropy observed in any head")
    assert defined < min(page.text.index(words) for words in ("log T is", "quarter of M", "M/4"))
    assert page.text.index("Entropy-Guided Attention for Private LLMs") < page.text.index("of the paper")


@pytest.mark.parametrize(("count", "words"), [(1, "1 layer, 1 head, width"), (3, "3 layers, 3 heads, width")])
def test_one_head_is_no_heads(tmp_path: Path, count: int, words: str) -> None:
    one = msgspec.structs.replace(started, layers=count, heads=count)
    assert words in report([folder(tmp_path / "run", [one])], tmp_path / "report.html").text


def test_the_table_of_heads_holds_the_last_frame(tmp_path: Path) -> None:
    """For readers without scripts, and for screen readers: headings by row and column, a number in every cell."""
    page = report([full_folder(tmp_path / "run")], tmp_path / "report.html")
    cells = [tag for tag in page.all("td") if "data-layer" in tag]
    assert [(c["data-layer"], c["data-head"]) for c in cells] == [
        (str(layer), str(head)) for layer in range(LAYERS) for head in range(HEADS)
    ]
    words = page.text.partition("layer \\ head")[2].split()
    expected = [str(head) for head in range(HEADS)]
    for layer, row in enumerate(some_entropy()):
        expected += [str(layer), *(f"{value:.2f}" for value in row)]
    assert "".join(words).startswith("".join(expected))


def test_a_model_with_attention_in_some_layers(tmp_path: Path) -> None:
    """Its own numbers of layers everywhere, and layers that differ in their number of heads."""
    rows = [[1.0, 2.0, 3.0], [0.5]]
    verdict = DiagnosisRecord(
        entropy=rows,
        layers=[1, 3],
        context_length=CONTEXT,
        max_observed=3.0,
        max_possible=math.log(CONTEXT),
        quartile_shares=[0.25] * 4,
        overloaded=[(1, 2)],
        collapsed=[(3, 0)],
        verdict="in layers 1 and 3",
    )
    looks = dict.fromkeys(("distance", "on_first", "on_previous", "on_itself"), rows)
    where = AttentionPattern(
        sequences=1, context_length=CONTEXT, layers=[1, 3], positions=[0], entropy_by_position=[[2.0], [0.5]], **looks
    )
    page = report([folder(tmp_path / "run", [verdict, where])], tmp_path / "report.html")
    cells = [(tag["data-layer"], tag["data-head"]) for tag in page.all("td") if "data-layer" in tag]
    assert cells == [("1", "0"), ("1", "1"), ("1", "2"), ("3", "0")]
    words = "".join(page.text.partition("layer \\ head")[2].split())
    assert words.startswith("01211.002.003.0030.50")
    for fact in ("layer 1: head 2", "layer 3: head 0", "3 of 4 heads put more than half", "looks 1.6 tokens back"):
        assert fact in page.text
    assert "at its end layer 1 2.00, layer 3 0.50 nats" in page.source
    for wrong in ([1], [3, 1], [1, 1], [-1, 3]):
        path = folder(tmp_path / f"wrong {wrong}", [msgspec.structs.replace(verdict, layers=wrong)])
        with pytest.raises(UserError, match="damaged"):
            read_run(path)
    with pytest.raises(UserError, match="different layers"):
        read_run(folder(tmp_path / "two", [verdict, msgspec.structs.replace(where, layers=[0, 1])]))


def test_heads_in_a_terminal() -> None:
    def found(layers: int, heads: int, largest: float = 6.5) -> DiagnosisRecord:
        return DiagnosisRecord(
            entropy=[[largest] * heads] * layers,
            context_length=CONTEXT,
            max_observed=3.0,
            max_possible=math.log(CONTEXT),
            quartile_shares=[0.25] * 4,
            overloaded=[(0, 0)],
            collapsed=[(layers - 1, heads - 1)],
            verdict="",
        )

    def shown(record: DiagnosisRecord, width: int = 80) -> list[str]:
        lines = table_of_heads(record, width)
        assert lines is not None
        return [Text.from_markup(line).plain for line in lines]

    assert shown(found(2, 3)) == [
        "layer     0      1      2",
        "    0 6.500+ 6.500  6.500",
        "    1 6.500  6.500  6.500-",
    ]
    for heads in (1, 12, 16):
        assert max(map(len, shown(found(48, heads)))) <= 80, heads
    assert shown(found(1, 12))[1].startswith("    0 6.50+ 6.50")
    assert shown(found(1, 16))[1].startswith("    0 6.5+6.5")
    assert table_of_heads(found(1, 32), 80) is None
    hybrid = msgspec.structs.replace(found(2, 2), layers=[1, 30], overloaded=[(30, 0)], collapsed=[])
    hybrid.entropy[1] = [1.0]
    assert shown(hybrid) == ["layer     0      1", "    1 6.500  6.500", "   30 1.000+"]


def test_the_script_draws_from_the_records(tmp_path: Path) -> None:
    page = report([full_folder(tmp_path / "run")], tmp_path / "report.html")
    (run,) = page.data()["runs"]
    snapshots = [record for record in training() if isinstance(record, EntropySnapshot)]
    assert page.data()["steps"] == [snapshot.step for snapshot in snapshots]
    assert run["maximum"] == pytest.approx(math.log(CONTEXT))
    assert len(run["frames"]) == len(snapshots) + 1
    for frame, snapshot in zip(run["frames"], snapshots):
        assert np.array(frame["entropy"]) == pytest.approx(np.array(snapshot.entropy), abs=1e-5)
        assert np.array(frame["threshold"]) == pytest.approx(np.array(snapshot.threshold), abs=1e-5)
    assert run["frames"][-1]["end"]
    assert run["pattern"]["distance"] == pattern().distance
    assert run["pattern"]["even_distance"] == f"{even_distance(CONTEXT):.1f}"


def test_long_trainings_are_thinned(tmp_path: Path) -> None:
    snapshots = [EntropySnapshot(step=step, entropy=[[float(step)]]) for step in range(1, 1501)]
    run = read_run(folder(tmp_path / "run", [started, *snapshots, pattern()][:-1]))
    steps = [frame.step for frame in frames(run, 100)]
    assert (len(steps), steps[0], steps[-1]) == (100, 1, 1500)
    assert steps == sorted(set(steps))
    assert len(frames(run)) == 1500


def test_even_attention() -> None:
    rows = range(2, 40)
    assert even_distance(40) == pytest.approx(np.mean([np.mean(range(i + 1)) for i in rows]))
    assert even_share(40) == pytest.approx(np.mean([1 / (i + 1) for i in rows]))
    assert even_share(2) > 0


def test_json_cannot_end_its_script_element() -> None:
    evil = {"</script><script>": "<!-- & \u2028\u2029 -->", "ü": [1.5, None]}
    text = in_script(evil)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == evil
    with pytest.raises(ValueError):
        in_script([math.nan])


def test_a_diagnosis_becomes_a_page_and_leaves_its_folder_alone(tmp_path: Path) -> None:
    run = full_folder(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    found = [Evaluation(step=0, cross_entropy=9.0, perplexity=8103.08, tokens=1, entropy=some_entropy())]
    anew = [*found, diagnosis(verdict="Diagnosed anew"), pattern(on_first=0.75)]
    page = Page(write_diagnosis(run, anew, tmp_path / "page.html"))
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert "Diagnosed anew." in page.text
    assert "24 of 24 heads put more than half" in page.text
    assert "8,103" not in page.text  # the run's own evaluation was on all of its text


@pytest.mark.slow
def test_cost_against_perplexity(tmp_path: Path) -> None:
    def run(name: str, *more: Record) -> Path:
        return folder(tmp_path / name, [renamed(name), *training(), *more])

    counted = [run("A", cost, folded_cost), run("B", cost)]
    page = report(counted, tmp_path)
    assert "one forward pass (FLOPs) against perplexity. A: 164 M and" in page.source
    page = report([counted[0], run("C", cost, folded_cost)], tmp_path)
    assert "after folding (FLOPs) against perplexity. A: 138 M and" in page.source
    page = report([run("D", private()), run("E", private()), counted[0]], tmp_path)
    assert "Runs without both figures are left out." in page.text
    assert "(MB a generated token) against perplexity. D: " in page.source
    assert "Cost against perplexity" not in report([counted[0], run("F")], tmp_path).text


def test_runs_that_differ_in_the_margin_are_a_sweep(tmp_path: Path) -> None:
    paths = [
        folder(tmp_path / f"run{gamma}", [started, *training(), diagnosis()], config_yaml=f"entropy_margin: {gamma}\n")
        for gamma in (0.3, 0.1)
    ]
    page = report(paths, tmp_path)
    assert "γ = 0.1: 4.2 %, 25.0 %, 29.2 %, 41.7 %; γ = 0.3: " in page.source
    other = folder(tmp_path / "other", [renamed("EReg(SM)"), diagnosis()], config_yaml="entropy_margin: 0.2\n")
    assert "γ = " not in report([paths[0], other], tmp_path).source


def test_private_run_alone(tmp_path: Path) -> None:
    page = report([folder(tmp_path / "asked", [private()])], tmp_path / "report.html")
    assert "Comparison with plaintext" not in page.text
    assert "exp" in page.text
    assert len(page.all("img")) == 1


def test_a_run_of_several_prompts_says_whose_its_figures_are(tmp_path: Path) -> None:
    run = private()
    run.batch_prompts, run.batch_tokens = 3, 12
    page = report([folder(tmp_path / "asked", [run])], tmp_path / "report.html")
    assert "4 tokens and those of 2 more prompts in the same passes" in page.text
    assert "3 prompts shared these passes: 12 new tokens, 8.7 a minute" in page.text
    alone = report([folder(tmp_path / "alone", [private()])], tmp_path / "alone.html")
    assert "more prompts" not in alone.text


def test_text_cannot_inject_markup(tmp_path: Path) -> None:
    broken = f"\"'>{SCRIPT}<img src=http://example.org/x onerror=alert(1)>{{{{ 7*191 }}}}"
    stage = StageCommunication(
        name=broken,
        layer=0,
        token=0,
        seconds=1,
        sent_bytes=1,
        received_bytes=1,
        sent_messages=1,
        received_messages=1,
    )
    bad = private(prompt=broken, text=broken)
    bad.trust = bad.server = bad.protocol = broken
    bad.stages = [stage]
    path = folder(
        tmp_path / "run",
        [renamed(broken), *training(), diagnosis(verdict=broken), SkippedUpdate(step=3, reason=broken), bad],
        config_yaml=f"# {SCRIPT}\nname: x\n",
        environment_json=json.dumps({SCRIPT: SCRIPT, "command": SCRIPT}),
    )
    page = report([path], tmp_path / "report.html")
    assert SCRIPT in page.text
    assert "&lt;script&gt;" in page.source
    assert page.source.count("<script") == 2
    assert page.data()["runs"][0]["name"] == " ".join(broken.split()) or page.data()["runs"][0]["name"] == broken
    assert "1337" not in page.text


def test_several_runs_are_compared(tmp_path: Path) -> None:
    names = ["SM+LN+G", "SM", "SM"]
    paths = [
        folder(tmp_path / f"run{i}", [renamed(name), *training(1 + i / 10, thresholds=False), diagnosis()])
        for i, name in enumerate(names)
    ]
    page = report(paths, tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert "Comparison of 3 runs" in page.text
    assert "Loss of all runs" in page.text
    assert "SM (run1)" in page.text
    assert "SM (run2)" in page.text
    assert "SM+LN+G (run0)" not in page.text
    assert "Private inference" not in page.text
    assert "Learned entropy thresholds" not in page.text
    again = report([paths[0], paths[0]], tmp_path)
    assert "SM+LN+G (run0), 2" in again.text


def test_last_record_wins(tmp_path: Path) -> None:
    contents = [
        started,
        renamed("resumed"),
        diagnosis(verdict="first verdict"),
        diagnosis(verdict="new verdict"),
        private(text="first answer"),
        private(text="new answer"),
    ]
    page = report([folder(tmp_path / "run", contents)], tmp_path / "report.html")
    assert "resumed" in page.text
    assert "new verdict." in page.text
    assert "new answer" in page.text
    assert "first verdict" not in page.text
    assert "first answer" not in page.text


def test_a_step_evaluated_twice_counts_once(tmp_path: Path) -> None:
    subset = Evaluation(step=600, cross_entropy=5.0, perplexity=148.41, tokens=8_192, entropy=some_entropy())
    whole = Evaluation(step=600, cross_entropy=4.9, perplexity=134.29, tokens=120_000, entropy=some_entropy())
    page = report([folder(tmp_path / "run", [started, subset, whole])], tmp_path / "report.html")
    assert "134.29" in page.text
    assert "148.41" not in page.text
    assert len(read_run(tmp_path / "run").evaluations) == 1


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    holes = [[NAN, math.inf], [-math.inf, NAN]]
    contents: list[Record] = [
        started,
        TrainingStep(
            step=1, cross_entropy=NAN, entropy_penalty=NAN, learning_rate=NAN, grad_norm=math.inf, tokens_per_second=NAN
        ),
        EntropySnapshot(step=1, entropy=holes, threshold=holes, temperature=holes),
        Evaluation(step=1, cross_entropy=NAN, perplexity=math.inf, tokens=1, entropy=holes),
        SkippedUpdate(step=2, reason="the loss is not finite"),
        RolledBack(step=0, from_step=2, reason="<b>the loss</b>", rate_factor=0.5),
        DiagnosisRecord(
            entropy=holes,
            context_length=0,
            max_observed=NAN,
            max_possible=NAN,
            quartile_shares=[NAN] * 4,
            overloaded=[],
            collapsed=[],
            verdict="diverged",
        ),
        private(),
        PlaintextComparison(max_logit_error=[0.1, NAN], same_top1=[], plaintext_tokens=[1]),
    ]
    path = folder(tmp_path / "run", contents)
    lines = (path / RECORDS_FILE).read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert math.isinf(record_files.read(path / RECORDS_FILE)[3].perplexity)  # type: ignore[union-attr]
    page = report([path], tmp_path / "report.html")
    assert "not finite" in page.text
    assert "1 update was refused" in page.text
    assert "It diverged once and went on from a checkpoint, in the end at 50.0 % of the recipe" in page.text
    assert "from step 2 to 0: <b>the loss</b>" in page.text
    assert "nan" not in page.text.lower()


@pytest.mark.slow
def test_many_runs_stay_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "run", [started, *training(), diagnosis()])
    whole = len(write_report([path], tmp_path / "whole.html").read_bytes())
    monkeypatch.setattr("entropi.report.page.MAX_PAGE_BYTES", int(0.7 * whole))
    assert len(write_report([path], tmp_path / "small.html").read_bytes()) < 0.7 * whole
    monkeypatch.setattr("entropi.report.page.MAX_PAGE_BYTES", 1000)
    with pytest.raises(UserError, match="fewer"):
        write_report([path], tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def damage(path: Path, name: str, text: str) -> Path:
    full_folder(path)
    with open(path / name, "a") as file:
        file.write(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (RECORDS_FILE, "{half\n"),
        (RECORDS_FILE, '{"kind":"entropy","step":1,"entropy":[[1],[1,2]]}\n'),
        (RECORDS_FILE, '{"kind":"entropy","step":900,"entropy":[[1,2]]}\n'),
        (RECORDS_FILE, f'{{"kind":"entropy","step":900,"entropy":{[[1.0] * 9] * LAYERS}}}\n'),
        (
            RECORDS_FILE,
            encode(pattern()).decode().replace('"positions":[0,', '"positions":[') + "\n",
        ),
        (
            RECORDS_FILE,
            encode(pattern()).decode().replace('"distance":[[', '"distance":[[1,') + "\n",
        ),
        (RECORDS_FILE, encode(diagnosis([0.5, 0.5])).decode() + "\n"),
        ("config.yaml", "broken: [\n"),
        ("environment.json", "}"),
    ],
)
def test_damage_is_a_user_error_of_one_line(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match="damaged") as caught:
        write_report([damage(tmp_path / "run", name, text)], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_last_line_cut_short_is_forgiven(tmp_path: Path) -> None:
    report([damage(tmp_path / "run", RECORDS_FILE, '{"kind":"st')], tmp_path / "report.html")


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(UserError, match="not a run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="at least one"):
        write_report([], tmp_path / "report.html")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_report([folder(tmp_path / "run", [])], tmp_path / "file" / "report.html")


def test_reporting_needs_neither_torch_nor_pyplot() -> None:
    code = "import sys, entropi.report.page as p; sys.exit(bool({'torch', 'transformers', 'jax', 'matplotlib.pyplot'} & set(sys.modules)))"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("text", "shown"), [("\n", "\\n"), (" \t", "\\x20\\t"), ("a\nb", "a b"), ("", "")])
def test_a_text_of_white_space_is_quoted_by_its_escapes(text: str, shown: str) -> None:
    assert quote(text) == shown


def test_an_answer_that_is_a_line_break_is_seen(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", [started, private(text="\n")])
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<pre class="said answer" dir="auto">\\n</pre>' in page
    assert 'the model answered <q class="said">\\n</q>' in page
