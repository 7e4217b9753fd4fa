"""Studies: what a file asks for, what runs say together, and the runs themselves, killed, diverged and taken up."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional

from entropi import record_files, records
from entropi.cli import main
from entropi.errors import UserError
from entropi.records import Spread, StudyClaim, StudyRow, StudyRun
from entropi.report import study as report_study
from entropi.report.folder import read_run
from entropi.report.heads import scale_top
from entropi.report.study import StudyResult, _by_layer, markdown, outcome, read_study, tables, with_spread, write_study
from entropi.training import study as study_module
from entropi.training.comparison import compare, sign_flip_p, sign_p, spread, summarise
from entropi.training.recipe import save_recipe
from entropi.training.run import train
from entropi.training.study import load_study, run_study

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


pytestmark = pytest.mark.usefixtures("surroundings")


def grid(corpus: str, **changes: Any) -> dict[str, Any]:
    return {
        "corpus": str(corpus),
        "seed": [0, 1],
        "vocab_size": 300,
        "context_length": 16,
        "layers": 2,
        "heads": 2,
        "hidden_size": 16,
        "steps": 4,
        "batch_size": 4,
        "learning_rate": "1e-2",
        "log_every": 1,
        "entropy_every": 2,
        "evaluate_every": 0,
        "save_every": 2,
    } | changes


def write(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    return lambda **content: write(tmp_path / "grid.yaml", **content)


# --- The file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies(path: Path):
    """Each can be run: several rows, three seeds or more, claims about rows that exist."""
    study = load_study(path)
    assert len(study.rows) > 1
    assert all(len(runs) >= 3 for runs in study.rows.values())
    assert study.claims
    assert len({run.path for run in study.runs}) == len(study.runs)
    assert f"entropi study configs/studies/{path.name}" in path.read_text(encoding="utf-8")


def test_there_are_shipped_studies():
    assert {"laptop", "gamma", "normalisation", "gpt2-small"} <= {path.stem for path in SHIPPED}


def test_lists_make_rows_and_seeds_repeat_them(file: Callable[..., Path]):
    path = file(
        recipe={"seed": [3, 5], "steps": 10, "learning_rate": "1e-3"},
        rows={
            "plain": {"architecture": "SM"},
            "ours": {"architecture": "EReg(SM(t)+ScFuFFN)", "entropy_margin": [0.1, 0.2], "temperature_init": [1, 2]},
        },
        claims=["plain < ours, entropy_margin=0.1, temperature_init=2"],
    )
    study = load_study(path)
    cells = [f"ours, entropy_margin={g}, temperature_init={t}" for g in (0.1, 0.2) for t in (1, 2)]
    assert list(study.rows) == ["plain", *cells]
    assert [(run.row, run.recipe.seed) for run in study.runs[:4]] == [
        ("plain", 3),
        ("plain", 5),
        (cells[0], 3),
        (cells[0], 5),
    ]
    recipe = study.rows[cells[1]][0].recipe
    assert (recipe.entropy_margin, recipe.temperature_init, recipe.steps, recipe.learning_rate) == (0.1, 2.0, 10, 1e-3)
    assert recipe.precision == "fp32"
    assert study.runs[2].path == "ours,entropy_margin=0.1,temperature_init=1/seed-3"
    assert study.claims == [("plain", cells[1])]
    assert study.settings()[cells[0]] == {
        "architecture": "EReg(SM(t)+ScFuFFN)",
        "entropy_margin": "0.1",
        "temperature_init": "1.0",
    }


def test_architectures_alone_are_rows(file: Callable[..., Path]):
    by_list = load_study(file(recipe={}, rows=["SM", "SM+LN+G"]))
    by_setting = load_study(file(recipe={"architecture": ["SM", "SM+LN+G"]}))
    assert list(by_list.rows) == ["SM", "SM+LN+G"]
    assert by_list == by_setting


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"recipe": {"stps": 3}}, "unknown setting stps"),
        ({"recipe": {"steps": 0}}, "steps is 0"),
        ({"recipe": {"steps": []}}, "steps is an empty list"),
        ({"recipe": {"seed": [1, 1]}}, "up to 20 different ones"),
        ({"recipe": {"seed": list(range(21))}}, "up to 20 different ones"),
        ({"recipe": {"precision": "auto"}}, "say bf16, fp16 or fp32"),
        ({"rows": ["SM+XY"]}, "'XY' is unknown"),
        ({"rows": {"a": 3}}, "rows are a list of architectures"),
        ({"rows": {"a b": {}, "a-b": {}}}, "several rows would be kept in a-b/seed-0"),
        ({"runs": []}, "unknown key runs, expected recipe, rows, claims"),
        ({"recipe": 3}, "is not a study"),
        ({"rows": ["SM"], "claims": ["SM > SM"]}, "is not of the form 'A < B'"),
        ({"rows": ["SM"], "claims": ["SM < SM+G"]}, "names 'SM+G', but the rows are SM"),
    ],
)
def test_mistakes_are_named(file: Callable[..., Path], content: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        load_study(file(**content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_named_at_once(file: Callable[..., Path]):
    with pytest.raises(UserError) as caught:
        load_study(file(recipe={"heads": 3}, rows={"a": {"steps": -1}, "b": {"layers": "x"}}, claims=["a"]))
    for part in ("not a multiple of heads", "steps is -1", "layers is 'x'", "'A < B'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["[", "- 1", "3", "\xff"])
def test_what_is_no_study(tmp_path: Path, text: str):
    path = tmp_path / "grid.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"grid\.yaml"):
        load_study(path)


# --- What runs say together -------------------------------------------------------------------------------------------


def run_of(row: str, seed: int, cross_entropy: float) -> StudyRun:
    return StudyRun(
        row=row,
        seed=seed,
        folder=f"{row}/seed-{seed}",
        diverged=math.isnan(cross_entropy),
        step=10,
        cross_entropy=cross_entropy,
        perplexity=math.exp(cross_entropy),
        tokens_per_second=1.0,
    )


def runs_of(**rows: list[float]) -> list[StudyRun]:
    return [run_of(row, seed, value) for row, values in rows.items() for seed, value in enumerate(values)]


def test_the_outcome_of_a_divergence_names_its_layer():
    assert outcome(run_of("a", 0, 1.0)) == "finished"
    diverged = run_of("a", 0, math.nan)
    assert outcome(diverged) == "NaN at step 10"
    diverged.layer = 6
    assert outcome(diverged) == "NaN at step 10, layer 6"


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "benchmarks" / "results" / "studies").iterdir()), ids=lambda f: f.name
)
def test_committed_studies_say_what_their_tables_say(folder: Path):
    """Anybody can draw them again, and every run of them is one that the study's file asks for."""
    study = read_study(folder)
    assert (folder / "tables.md").read_text(encoding="utf-8") == markdown(folder.name, tables(study))
    planned = load_study(ROOT / "configs" / "studies" / f"{folder.name}.yaml")
    assert {(run.row, run.seed) for run in study.runs} <= {(run.row, run.recipe.seed) for run in planned.runs}


def test_three_seeds_cannot_prove_much():
    claim = compare("a", "b", runs_of(a=[1.0, 1.1, 1.2], b=[1.5, 1.7, 1.6]))
    assert claim is not None
    assert claim.differences == pytest.approx([0.5, 0.6, 0.4])
    assert (claim.mean, claim.std) == pytest.approx((0.5, 0.1))
    assert (claim.test, claim.p, claim.least_p) == ("sign flips", 0.125, 0.125)
    reverse = compare("b", "a", runs_of(a=[1.0, 1.1, 1.2], b=[1.5, 1.7, 1.6]))
    assert reverse is not None
    assert reverse.p == 1.0


def test_only_common_seeds_are_paired():
    runs = [run_of("a", 0, 1.0), run_of("a", 2, 1.0), run_of("b", 2, 1.5), run_of("b", 3, 9.0)]
    claim = compare("a", "b", runs)
    assert claim is not None
    assert (claim.seeds, claim.differences) == ([2], [0.5])
    assert math.isnan(claim.std)
    assert compare("a", "c", runs) is None


def test_a_divergence_counts_as_infinitely_high():
    claim = compare("a", "b", runs_of(a=[1.0, 1.0, math.nan, math.nan], b=[math.nan, 1.5, 1.5, math.nan]))
    assert claim is not None
    assert claim.differences == pytest.approx([math.inf, 0.5, -math.inf, math.nan], nan_ok=True)
    assert claim.test == "signs"
    assert claim.p == sum(math.comb(4, k) for k in (2, 3, 4)) / 16
    assert math.isnan(claim.mean)


def test_two_divergences_are_no_draw():
    """A difference of 0 would halve the mean of the other seed."""
    half = compare("a", "b", runs_of(a=[1.0, math.nan], b=[1.5, math.nan]))
    none = compare("a", "b", runs_of(a=[math.nan], b=[math.nan]))
    assert half is not None
    assert none is not None
    assert math.isnan(half.mean)
    assert (half.test, half.p, none.p) == ("signs", 0.75, 1.0)
    assert (report_study._difference(half), report_study._difference(none)) == ("a run diverged", "both diverged")


def test_sign_flips_are_all_enumerated():
    generator = random.Random(0)
    for n in (1, 2, 5, 8):
        differences = [generator.gauss(0.3, 1.0) for _ in range(n)]
        flipped = [
            sum(s * abs(d) for s, d in zip(signs, differences)) for signs in itertools.product((1, -1), repeat=n)
        ]
        expected = sum(total >= sum(differences) - 1e-12 for total in flipped) / 2**n
        assert sign_flip_p(differences) == expected
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_sign_p_is_the_binomial_tail():
    assert sign_p([1.0, 1.0, 1.0, -1.0]) == 5 / 16
    assert sign_p([0.0, -math.inf]) == 1.0


def test_spread():
    assert spread([1.0, 2.0, 3.0]) == Spread(mean=2.0, std=1.0, n=3)
    assert math.isnan(spread([1.0]).std)
    assert math.isnan(spread([]).mean)
    assert with_spread(spread([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert with_spread(spread([1.0])) == "1.00"
    assert with_spread(spread([])) == "–"


# --- Runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> tuple[Path, Path]:
    """A study's file, and its folder with every run trained in this process; the study itself has yet to be run."""
    folder = tmp_path_factory.mktemp("study")
    path = write(
        folder / "grid.yaml",
        recipe=grid(corpus),
        rows={
            "base": {"architecture": "SM+LN+G"},
            "ours": {"architecture": "EReg(SM(t)+ScFuFFN)", "entropy_weight": 0.01, "entropy_margin": [0.0, 0.2]},
        },
        claims=["base < ours, entropy_margin=0.2"],
    )
    for run in load_study(path).runs:
        train(run.recipe, folder / "runs" / run.path)
    return path, folder / "runs"


def no_process(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a run was started")


def test_finished_runs_are_read_and_not_trained_again(trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    path, folder = trained
    monkeypatch.setattr(study_module.subprocess, "Popen", no_process)
    study = load_study(path)
    found = run_study(study, folder)
    read = record_files.read(folder / record_files.STUDY_FILE)
    assert [record_files.encode(record) for record in read] == [record_files.encode(record) for record in found]
    runs, rows, claims = ([r for r in found if isinstance(r, kind)] for kind in (StudyRun, StudyRow, StudyClaim))
    assert [(r.row, r.seed) for r in runs] == [(r.row, r.recipe.seed) for r in study.runs]
    assert [row.name for row in rows] == list(study.rows)
    for row in rows:
        mine = [read_run_folder(folder, run) for run in study.rows[row.name]]
        perplexities = [m["evaluation"].perplexity for m in mine]
        assert row.perplexity.mean == pytest.approx(sum(perplexities) / 2)
        assert row.perplexity.std == pytest.approx(abs(perplexities[0] - perplexities[1]) / 2**0.5)
        assert row.entropy_steps == [1, 2, 4]
        assert row.loss_steps == [1, 2, 3, 4]
        by_layer = [[sum(heads) / 2 for heads in m["snapshot"].entropy] for m in mine]
        assert row.layer_entropy[-1] == pytest.approx([(a + b) / 2 for a, b in zip(*by_layer)])
        assert row.layer_entropy_std[-1] == pytest.approx([abs(a - b) / 2**0.5 for a, b in zip(*by_layer)], abs=1e-9)
        assert sum(share.mean for share in row.quartile_shares) == pytest.approx(1.0)
        assert bool(row.threshold) == ("ours" in row.name)
        assert row.tokens == 4 * 4 * 16
    (claim,) = claims
    assert claim.differences == pytest.approx(
        [runs[4 + seed].cross_entropy - runs[seed].cross_entropy for seed in (0, 1)]
    )


def read_run_folder(folder: Path, run: Any) -> dict[str, Any]:
    found = record_files.read(folder / run.path / record_files.RECORDS_FILE)
    return {
        "evaluation": [r for r in found if isinstance(r, records.Evaluation)][-1],
        "snapshot": [r for r in found if isinstance(r, records.EntropySnapshot)][-1],
    }


@pytest.fixture
def written(tmp_path: Path, trained: tuple[Path, Path]) -> tuple[Path, Path]:
    """A copy of the finished study, to be damaged."""
    folder = Path(shutil.copytree(trained[1], tmp_path / "runs"))
    run_study(load_study(trained[0]), folder)
    return trained[0], folder


def test_a_row_is_priced_also_where_every_run_diverged(written: tuple[Path, Path]):
    """Runs that did left no model whose shape could be read."""
    pytest.importorskip("spu")
    folder = written[1]
    found = [
        r for r in record_files.read(folder / record_files.STUDY_FILE) if isinstance(r, StudyRun) and r.row == "base"
    ]
    whole = summarise("base", {}, found, folder)
    for run in found:
        shutil.rmtree(folder / run.folder / "model")
        run.diverged = True
    row = summarise("base", {}, found, folder)
    assert row.perplexity.n == 0
    assert row.predicted_bytes == whole.predicted_bytes is not None
    assert row.predicted_kernel == whole.predicted_kernel == "quartic (trained exact)"
    table = tables(StudyResult("study", [], [row], []))[0]
    assert f"{row.predicted_bytes / 1e6:,.1f}, quartic (trained exact)" in table.rows[0]
    assert (row.nonlinear, row.ffn_flops, row.folded_ffn_flops) == (
        whole.nonlinear,
        whole.ffn_flops,
        whole.folded_ffn_flops,
    )


def test_how_a_row_collapsed_is_told_where_no_seed_survived(written: tuple[Path, Path]):
    """The picture of the paper that readers look for first."""
    folder = written[1]
    found = [
        r for r in record_files.read(folder / record_files.STUDY_FILE) if isinstance(r, StudyRun) and r.row == "base"
    ]
    survived = summarise("base", {}, found, folder)
    for run in found:
        run.diverged = True
    row = summarise("base", {}, found, folder)
    assert (row.perplexity.n, row.entropy, row.threshold) == (0, [], [])
    assert row.layer_entropy == survived.layer_entropy != []
    assert row.loss == survived.loss
    drawn = {d.name: d.note for d in report_study.draw(report_study.StudyResult("x", found, [row], []))}
    assert drawn.keys() == {"loss", "layers-base"}
    assert drawn["layers-base"].endswith("up to the first divergence.")


def test_layers_of_the_same_share_are_told_together():
    assert (
        _by_layer([1.0, 1.0, 1.0, 0.0, 0.25, 0.5, 0.5])
        == "layers 0 to 2: 100.0 %, layer 4: 25.0 %, layers 5 to 6: 50.0 %"
    )
    assert [_by_layer(shares) for shares in ([0.0, 0.0], [])] == ["none", "–"]


def test_a_study_has_the_scale_of_reports(written: tuple[Path, Path]):
    """Heatmaps of entropies end at log T in both, so that one colour means one entropy."""
    study = read_study(written[1])
    drawn = [d.figure for d in report_study.draw(study) if d.name.startswith("heads-")]
    assert len(drawn) == len(study.rows)
    run = read_run(written[1] / study.runs[0].folder)
    for figure in drawn:
        assert figure.axes[0].images[0].get_clim() == (0, pytest.approx(math.log(16)))
    assert scale_top([run]) == pytest.approx(math.log(16))


@pytest.mark.parametrize(
    ("name", "words"), [("margins", "Study margins"), ("study", "Study"), ("my-study", "My-study")]
)
def test_a_study_is_called_so_once(name: str, words: str):
    assert markdown(name, []).startswith(f"# {words}\n")


@pytest.mark.slow
def test_tables_figures_and_page(written: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    path, folder = written
    assert main(["study", str(path), "--folder", str(folder)]) == 0
    told = capsys.readouterr().out
    study = read_study(folder)
    for row in study.rows:
        assert f"{row.name:{len('ours, entropy_margin=0.2')}}  perplexity {with_spread(row.perplexity)}" in told
    text = (folder / "tables.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    for table in tables(study):
        assert table.title in page
        for cells in table.rows:
            assert f"| {' | '.join(cell.replace(chr(160), ' ') for cell in cells)} |" in text
    names = {picture.stem for picture in (folder / "figures").iterdir()}
    assert {"perplexity", "loss", "quarters", "gamma", "heads-base", "layers-base"} <= names
    assert "thresholds-ours,entropy_margin=0.2" in names
    assert "thresholds-base" not in names
    assert page.count("data:image/png") == len(names)
    assert "<script" not in page
    assert "http://" not in page.replace("http-equiv", "")

    elsewhere = folder.parent / "page.html"
    assert main(["report", str(folder), "--output", str(elsewhere)]) == 0
    assert elsewhere.read_text(encoding="utf-8") == page


def test_the_answer_as_json(written: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    path, folder = written
    assert main(["study", str(path), "--folder", str(folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in answer["rows"]] == list(load_study(path).rows)
    assert answer["claims"][0]["least_p"] == 0.25


def test_a_run_of_another_recipe_is_refused(written: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    path, folder = written
    save_recipe(load_study(path).runs[-1].recipe, folder / "base" / "seed-1" / "config.yaml")
    assert main(["study", str(path), "--folder", str(folder)]) == 2
    assert "another recipe, which differs in architecture" in capsys.readouterr().err


def test_a_study_without_results_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / record_files.STUDY_FILE).touch()
    assert main(["report", str(tmp_path)]) == 2
    assert "no run that has ended" in capsys.readouterr().err


def test_names_cannot_inject_markup(written: tuple[Path, Path]):
    folder = written[1]
    found = record_files.read(folder / record_files.STUDY_FILE)
    for record in found:
        if isinstance(record, StudyRow | StudyRun) and getattr(record, "name", "") == "base":
            record.name = "<script>x</script> | y"
    record_files.rewrite(folder / record_files.STUDY_FILE, found)
    page = write_study(folder).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<script>x</script> \\| y" in (folder / "tables.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_processes_diverge_are_killed_and_go_on(tmp_path: Path, corpus: str):
    """Two at a time: a row that diverges is a result, a killed study continues, and nothing is trained twice."""
    path = write(
        tmp_path / "grid.yaml",
        recipe=grid(corpus, steps=160, save_every=20),
        rows={"base": {"architecture": "SM+LN+G"}, "broken": {"architecture": "SM", "learning_rate": 1e30}},
        claims=["base < broken"],
    )
    words = [sys.executable, "-m", "entropi", "study", str(path), "--folder", str(tmp_path / "runs"), "--parallel", "2"]
    in_background = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]  # as a shell script starts it with &: deaf to Ctrl-C
    first = subprocess.Popen([*in_background, *words], stderr=subprocess.PIPE)
    place = tmp_path / "runs" / "base" / "seed-0"
    wait_until(lambda: (place / "checkpoints" / "checkpoint-40" / "seal.json").exists(), first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 130
    assert not (place / "model").exists()

    second = subprocess.run(words, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    starts = [r for r in record_files.read(place / record_files.RECORDS_FILE) if isinstance(r, records.RunStarted)]
    assert starts[-1].resumed_at >= 40
    found = record_files.read(tmp_path / "runs" / record_files.STUDY_FILE)
    runs = {(r.row, r.seed): r for r in found if isinstance(r, StudyRun)}
    assert [run.diverged for run in runs.values()] == [False, False, True, True]
    assert runs["broken", 0].layer == 0
    assert runs["broken", 0].step < 10
    assert "NaN at step" in (tmp_path / "runs" / "tables.md").read_text(encoding="utf-8")
    (claim,) = (r for r in found if isinstance(r, StudyClaim))
    assert (claim.test, claim.p, claim.least_p) == ("signs", 0.25, 0.25)

    logs = {log: log.read_bytes() for log in (tmp_path / "runs").glob("*/*.log")}
    assert len(logs) == 4
    third = subprocess.run([*words, "--json"], capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert json.loads(third.stdout)["rows"][1]["diverged"] == [0, 1]
    assert {log: log.read_bytes() for log in logs} == logs


def test_progress_is_read_on_where_a_resumed_run_has_replaced_its_records(tmp_path: Path):
    """At any length that the new file may have reached before it is looked at again."""
    path = tmp_path / record_files.RECORDS_FILE

    def write_steps(*steps: int) -> None:
        lines = [f'{{"kind":"skipped","step":{step},"reason":"{"x" * (step % 7)}"}}\n' for step in steps]
        path.write_text("".join(lines), encoding="utf-8")

    for length in range(1, 12):
        run = study_module._Running(planned=None, place=tmp_path, worker=None, slot=0)  # type: ignore[arg-type]
        write_steps(1, 2, 3, 4, 5)
        assert run.progress() == 5
        assert run.progress() == 5
        write_steps(*range(3, 3 + length))
        assert run.progress() == max(5, 2 + length)
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"kind":"skipped","step":40,"reason":""}\n{"kind":"skip')
        assert run.progress() == 40


@pytest.mark.slow
def test_runs_are_trained_one_by_one_and_compared_in_the_end(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As an array of jobs does: none of them writes what all share, and a divergence is found in its log."""
    path = write(
        tmp_path / "grid.yaml",
        recipe=grid(corpus, seed=0),
        rows={"base": {"architecture": "SM+LN+G"}, "broken": {"architecture": "SM", "learning_rate": 1e30}},
    )
    folder = tmp_path / "runs"
    words = ["study", str(path), "--folder", str(folder)]
    assert main([*words, "--run", "1"]) == 0
    assert "broken, seed 0: step " in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"broken"}
    assert main([*words, "--run", "2"]) == 2
    assert "run is 2, and the study's 2 runs are 0 to 1" in capsys.readouterr().err

    study = load_study(path)
    train(study.runs[0].recipe, folder / study.runs[0].path)
    monkeypatch.setattr(study_module.subprocess, "Popen", no_process)
    assert main([*words, "--run", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["perplexity"] > 1
    assert main([*words, "--run", "1"]) == 0
    runs = [r for r in run_study(study, folder) if isinstance(r, StudyRun)]
    assert [(run.row, run.diverged) for run in runs] == [("base", False), ("broken", True)]


def test_only_the_last_line_of_an_error_is_a_divergence(tmp_path: Path, file: Callable[..., Path]):
    """A log may also tell of updates that were skipped or taken back, after which the training went on."""
    run = load_study(file()).runs[0]
    reason = "step 12: the gradient is not finite, from layer 3 on"
    log = tmp_path / "seed-0.log"
    for text, diverged in [
        ("", False),
        (f"entropi: {reason}; see docs\n", True),
        (f"{reason}; going back to step 10\n", False),
        (f"entropi: {reason}\nresuming after step 10\n", False),
    ]:
        log.write_text(text, encoding="utf-8")
        found = study_module._divergence(run, log)
        assert (found is not None) is diverged
        if found:
            assert (found.step, found.layer, found.reason) == (12, 3, reason)
    assert study_module._divergence(run, tmp_path / "none.log") is None


@pytest.mark.slow
def test_a_run_that_fails_is_no_result(tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str]):
    """Too little text for a batch is the user's mistake: the others are trained, and it is said."""
    path = write(
        tmp_path / "grid.yaml",
        recipe=grid(corpus, seed=0),
        rows={"large": {"architecture": "SM", "batch_size": 100000}, "small": {"architecture": "SM"}},
    )
    assert main(["study", str(path), "--folder", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert "1 of 2 runs failed, the same command tries them again: large, seed 0:" in told
    assert "a smaller batch_size" in told
    (row,) = read_study(tmp_path / "runs").rows
    assert row.name == "small"


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else b""
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_the_benchmark_of_speed_trains_both(corpus: str):
    """It measures what it says it does: both loops take all their turns, and the ratio is that of their times."""
    words = ["--layers", "2", "--heads", "2", "--hidden-size", "16", "--length", "16", "--vocab-size", "300"]
    words += ["--batch-size", "4", "--turn", "2", "--turns", "3", "--precision", "fp32", "--corpus", str(corpus)]
    command = [sys.executable, str(ROOT / "benchmarks" / "training_speed.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["ratios"]) == 3
    assert min(found["ratios"]) <= found["ratio"] <= max(found["ratios"])
    assert set(found["tokens_per_second"]) == {"ours", "plain"}
    assert min(found["tokens_per_second"].values()) > 0
    assert done.stderr.count("turn ") == 3


def test_float16_products_round_once(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: float16 factors and results, wide sums; and infinity beyond 65,504, which is how such models end."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from number_formats import WideSums

    torch.manual_seed(0)
    a, b = torch.randn(33, 500).half().requires_grad_(), torch.randn(500, 7).half()
    with WideSums():
        found = functional.linear(a, b.T, bias=torch.ones(7).half())
        huge = torch.full((1, 2), 200.0).half() @ torch.full((2, 1), 200.0).half()
        found.sum().backward()
    exact = a.detach().double() @ b.double() + 1
    assert ((found.double() - exact).abs() <= 1.01 * 2**-11 * exact.abs() + 1e-5).all()
    assert found.dtype == huge.dtype == a.grad.dtype == torch.float16  # type: ignore[union-attr]
    assert torch.allclose(a.grad.double(), b.double().sum(1).expand(33, -1), rtol=2**-10)  # type: ignore[union-attr]
    assert torch.isinf(huge).all()
