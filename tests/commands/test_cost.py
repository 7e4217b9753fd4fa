"""`entropi cost`: what it shows, writes and refuses."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("jax")

from command_line import Done, assert_refused
from cost_shapes import LLAMA_7B, SMALL, run_folder, written
from entropi import record_files, records
from entropi.cli import main
from entropi.costs import tables
from entropi.costs.prediction import CostModel
from entropi.costs.report import make_report
from entropi.errors import UserError
from entropi.model.shape import Shape

pytestmark = pytest.mark.usefixtures("surroundings")


# Tables 2, 3 and 5 of the paper: nonlinear operations as (count, rows, columns), FLOPs in units of 1e8.
COSTS = [
    ("SM+LN+G", 12, 128, {"softmax": (144, 128, 128), "layernorm": (24, 128, 768), "gelu": (12, 128, 3072)}, 145, 77),
    ("SM+LN+R", 12, 128, {"softmax": (144, 128, 128), "layernorm": (24, 128, 768), "relu": (12, 128, 3072)}, 145, 77),
    ("SM+ScFuFFN", 12, 128, {"softmax": (144, 128, 128)}, 18, 77),
    ("EReg(SM(t)+ScFuFFN)", 12, 128, {"softmax": (144, 128, 128)}, 18, 77),
    ("SM+LN+G", 12, 256, {"softmax": (144, 256, 256), "layernorm": (24, 256, 768), "gelu": (12, 256, 3072)}, 290, 163),
    ("SM+ScFuFFN", 12, 256, {"softmax": (144, 256, 256)}, 36, 163),
    ("SM+LN+G", 18, 128, {"softmax": (216, 128, 128), "layernorm": (36, 128, 768), "gelu": (18, 128, 3072)}, 217, 116),
    ("SM+ScFuFFN", 18, 128, {"softmax": (216, 128, 128)}, 27, 116),
    ("SM+LN+G", 12, 512, {"softmax": (144, 512, 512), "layernorm": (24, 512, 768), "gelu": (12, 512, 3072)}, 580, 362),
    ("SM+ScFuFFN", 12, 512, {"softmax": (144, 512, 512)}, 73, 362),  # 7.25, in the paper 7.3
]


@pytest.mark.parametrize(("architecture", "layers", "length", "nonlinear", "ffn", "attention"), COSTS)
def test_cost_gives_the_numbers_of_the_paper(
    entropi: Callable[..., Done],
    architecture: str,
    layers: int,
    length: int,
    nonlinear: dict[str, tuple[int, int, int]],
    ffn: int,
    attention: int,
):
    words = ["cost", "--architecture", architecture, "--layers", layers, "--seq-len", length]
    found = json.loads(entropi(*words, "--json").out)
    counts = found["counts"]
    assert {n["operation"]: (n["count"], *n["shape"]) for n in counts["nonlinear"]} == nonlinear
    assert counts["ffn_flops"] / 1e8 == pytest.approx(ffn, abs=0.6)
    assert counts["attention_flops"] / 1e8 == pytest.approx(attention, abs=1.0)
    done = entropi(*words)
    assert done.err == ""
    for name, (count, rows, columns) in nonlinear.items():
        assert re.search(rf"{name} +{count} x R\^\({rows} x {columns}\)", done.out)


def test_gpt2_small_has_its_parameters(entropi: Callable[..., Done]):
    found = json.loads(entropi("cost", "--architecture", "SM+LN+G", "--bias", "all", "--seq-len", 1024, "--json").out)
    assert found["counts"]["parameters"] == 124_439_808


def test_json_and_tables_say_the_same(capsys: pytest.CaptureFixture[str]):
    costs = CostModel.shipped()
    found = [make_report(costs, replace(SMALL, architecture=name), 24, name) for name in ("SM+LN+G", "SM(t)+ScFuFFN")]
    tables.compare(found)
    table = capsys.readouterr().out
    for one in found:
        data = json.loads(json.dumps(one.to_json()))
        total = data["prediction"]["prompt"]["total"]["bytes"]
        assert total == pytest.approx(sum(o["bytes"] for o in data["prediction"]["prompt"]["operations"]))
        assert f"{total / 1e6:,.1f}" in table
        tables.show(one)
        shown = capsys.readouterr().out
        assert "each further token" in shown
        for operation in one.prediction.prompt.by_operation().values():
            assert f"{operation.bytes / 1e6:,.1f}" in shown
        assert data["changes"] == [asdict(change) for change in one.changes]


def test_runs_are_placed_by_cost_and_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    good = run_folder(tmp_path / "good", 20.0, "SM+ScFuFFN")
    dear = run_folder(tmp_path / "dear", 30.0, "SM+LN+G")
    picture = tmp_path / "pareto.png"
    assert main(["cost", "--seq-len", "32", "--runs", str(good), str(dear), "--picture", str(picture), "--json"]) == 0
    found = {one["run"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["good"]["MB"] < found["dear"]["MB"]
    assert found["good"]["kernel"] == "quartic exponential for a model trained with the exact softmax"
    assert (found["good"]["on_frontier"], found["dear"]["on_frontier"]) == (True, False)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_recorded_prediction_is_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    run = run_folder(tmp_path / "run", 20.0, "SM+LN+R")
    assert main(["cost", "--architecture", str(run), "--seq-len", "32", "--record"]) == 0
    prediction = record_files.read(run / record_files.RECORDS_FILE)[-1]
    assert isinstance(prediction, records.PredictionRecord)
    assert (prediction.architecture, prediction.seq_len) == ("SM+LN+R", 32)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Predicted private inference" in page
    assert prediction.trust in page
    assert f"{prediction.embedding} token table, quartic exponential for a model trained with the exact softmax" in page


def test_comparing_draws_and_says_what_dominates(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bytes.svg"
    words = [
        "cost",
        "--compare",
        "SM+LN+G",
        "SM+ScFuFFN",
        "--layers",
        "2",
        "--seq-len",
        "32",
        "--picture",
        str(picture),
    ]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "*" in shown
    assert "of the bytes;" in shown
    assert shown.count("quartic (trained exact)") == 4  # a column and a list of bars each
    assert "quartic (trained exact)" in picture.read_text(encoding="utf-8")
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_the_polynomial_kernel_is_priced_shown_and_advised(capsys: pytest.CaptureFixture[str]):
    sizes = ["--layers", "2", "--heads", "4", "--hidden-size", "64", "--vocab-size", "500", "--seq-len", "40"]
    words = ["cost", "--architecture", "SM(t)+ScFuFFN", *sizes]
    assert main([*words, "--softmax", "power-2"]) == 0
    assert "squares of logits as attention weights" in capsys.readouterr().out
    assert main([*words, "--softmax", "polynomial-1"]) == 0
    shown = capsys.readouterr().out
    assert "polynomial kernel t=1" in shown
    assert not any(line.split()[:1] in (["max"], ["exp"], ["temperature"]) for line in shown.splitlines())
    predicted, predictions = [], []
    for softmax in ("power-2", "polynomial-1", "polynomial-2"):
        assert main([*words, "--softmax", softmax, "--json"]) == 0
        predictions.append(json.loads(capsys.readouterr().out)["prediction"])
        predicted.append(predictions[-1]["prompt"]["total"])
        assert predictions[-1]["softmax"] == softmax
        kernel = predictions[-1]["kernel"]
        assert kernel.startswith("softmax kernel t=2 for a model" if softmax == "power-2" else "polynomial kernel t=")
    softmax, squares, fourth = predicted
    assert squares["bytes"] < fourth["bytes"] < softmax["bytes"]
    assert squares["rounds"] < 0.7 * softmax["rounds"]

    assert main([*words, "--softmax", "polynomial-1"]) == 0
    assert "powers of logits over the number of keys (Pow(t)+ScFuFFN): no division" in capsys.readouterr().out
    words[2] = "Pow(t)+ScFuFFN"
    assert main([*words, "--json"]) == 0
    over_keys = json.loads(capsys.readouterr().out)["prediction"]
    names = {operation["name"] for operation in over_keys["prompt"]["operations"]}
    assert names == {
        "embedding",
        "qkv",
        "temperature",
        "scores",
        "power",
        "values",
        "average",
        "output",
        "head",
        "reveal",
    }
    assert over_keys["softmax"] == "polynomial-1/keys"
    assert over_keys["further"]["total"]["rounds"] < 0.5 * predictions[1]["further"]["total"]["rounds"]
    assert main([*words, "--softmax", "polynomial-2/keys"]) == 0
    assert "polynomial kernel t=2 over the number of keys" in capsys.readouterr().out
    words[2] = "Pow+LN+G"
    assert main(words) == 0
    assert "attention only (Pow+ScFuFFN)" in capsys.readouterr().out
    words[2] = "SM(t)+ScFuFFN"
    assert main([*words, "--softmax", "polynomial-1/keys"]) == 2
    assert "softmax polynomial-1/keys is for architectures that begin with Pow" in capsys.readouterr().err
    with pytest.raises(
        UserError,
        match="softmax must be exact, power-1 to power-8 or polynomial-1 to polynomial-8 with or without /keys or a",
    ):
        Shape(softmax="polynomial")


def test_every_prediction_names_its_kernel(capsys: pytest.CaptureFixture[str]):
    """Softmaxes differ by half the bytes: a figure that does not say which one says little."""
    import entropi

    exact = entropi.cost(entropi.EntropiConfig(), 128).prediction
    own = entropi.cost(entropi.EntropiConfig(softmax="power-3"), 128).prediction
    squares = entropi.cost(entropi.EntropiConfig(softmax="polynomial-1"), 128).prediction
    assert exact.kernel == "quartic exponential for a model trained with the exact softmax"
    assert own.kernel == "softmax kernel t=3, the model's own"
    assert squares.kernel == "polynomial kernel t=1, the model's own"
    assert (exact.kernel_label, own.kernel_label) == ("quartic (trained exact)", "t=3 (its own)")
    older = msgspec.structs.replace(exact, own_kernel=None)
    assert (older.kernel, older.kernel_label) == ("quartic exponential", "quartic")
    sizes = ["--seq-len", "16", "--network", "lan"]
    assert main(["cost", "--architecture", "SM", *sizes]) == 0
    shown = capsys.readouterr().out
    for part in (
        "quartic exponential for a model",
        "by operation, quartic (trained",
        "in all; quartic (trained exact)",
    ):
        assert part in shown


def test_a_short_model_is_priced_at_its_own_length(tmp_path: Path, entropi: Callable[..., Done]):
    """The usual prompt is of 128 tokens, which not every model takes."""
    pytest.importorskip("matplotlib")
    own = run_folder(tmp_path / "own", 20.0, "SM+LN+R")
    config = own / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 48}))

    def length(*words: object) -> int:
        return int(json.loads(entropi("cost", "--architecture", own, *words, "--json").out)["prediction"]["seq_len"])

    assert length() == 48
    assert length("--prefix-tokens", 40) == 8
    assert length("--seq-len", 16) == 16
    assert_refused(entropi("cost", "--architecture", own, "--seq-len", 49), "seq_len is 49, but has to be 1 to 48")
    room = entropi("cost", "--architecture", own, "--prefix-tokens", 48)
    assert_refused(room, f"--prefix-tokens 48 leaves no room for a prompt in the 48 tokens that {own} takes")
    both = entropi("cost", "--architecture", own, "--prefix-tokens", 40, "--seq-len", 9)
    assert_refused(both, "--prefix-tokens 40 and --seq-len 9 are together more than the 48 tokens")


def test_options_that_would_be_ignored_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    own = run_folder(tmp_path / "own", 20.0, "SM+LN+R")
    config = own / "model" / "config.json"
    llama = tmp_path / "llama"
    llama.mkdir()
    written(LLAMA_7B, llama)

    def refused(*words: object) -> str:
        assert main(["cost", "--seq-len", "16", *map(str, words)]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        return said.err

    assert f"--softmax polynomial-1 would be ignored, as {llama} brings its own" in refused(
        "--architecture", llama, "--softmax", "polynomial-1"
    )
    both = refused("--architecture", llama, "--layers", 3, "--bias", "all")
    assert "--layers and --bias would be ignored" in both
    assert "--hidden-size would be ignored" in refused("--runs", own, "--hidden-size", 64)
    half = refused("--compare", "SM", own, "--softmax", "polynomial-2")
    assert "--softmax polynomial-2 would be ignored" in half
    assert main(["cost", "--seq-len", "16", "--compare", "SM", str(own), "--layers", "2", "--softmax", "power-3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("t=3 (trained exact)") == 4
    config.write_text(json.dumps(json.loads(config.read_text()) | {"softmax": "power-2"}))
    for words in (("--architecture", own), ("--runs", own), ("--compare", "SM", own)):
        assert "--softmax power-3 would be ignored: " in refused(*words, "--softmax", "power-3")
    assert main(["cost", "--seq-len", "16", "--runs", str(own)]) == 0
    assert "MB at t=2 (its own), perplexity 20.00" in capsys.readouterr().out


SMALL_LLAMA = {
    **LLAMA_7B,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 172,
    "vocab_size": 500,
}


def test_advice_can_be_checked_by_comparing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Advice for a model of other sizes than the named ones, and the comparison that its last line tells."""

    def found(*words: object) -> Any:
        assert main(["cost", "--seq-len", "24", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def total(one: Any) -> dict[str, float]:
        return one["prediction"]["prompt"]["total"]

    model = written(SMALL_LLAMA, tmp_path)
    advised = found("--architecture", model)
    options = advised["size_options"].split()
    assert " ".join(options) == (
        "--layers 2 --heads 8 --key-value-heads 8 --hidden-size 64 --intermediate-size 172 --vocab-size 500 "
        "--position-embedding rotary --bias none"
    )
    assert main(["cost", "--seq-len", "24", "--architecture", str(model)]) == 0
    assert f"--compare 'SM+RMS+SwiGLU' NAME {' '.join(options)}\n" in capsys.readouterr().out

    now, bilinear = found("--compare", "SM+RMS+SwiGLU", "SM+RMS+Bilinear", *options)
    assert total(now) == total(advised)
    changes = {change["words"]: change for change in advised["changes"]}
    change = changes["a bilinear network in place of SwiGLU (SM+RMS+Bilinear)"]
    assert change["saved_bytes"] == pytest.approx(total(now)["bytes"] - total(bilinear)["bytes"])
    assert change["saved_latency"] == pytest.approx(total(now)["latency"] - total(bilinear)["latency"])

    options[options.index("--key-value-heads") + 1] = "2"
    (fewer,) = found("--compare", "SM+RMS+SwiGLU", *options)
    saved = changes["2 heads of keys and values for all queries"]["saved_bytes"]
    assert saved == pytest.approx(total(now)["bytes"] - total(fewer)["bytes"])


def test_sizes_that_no_option_gives_are_not_said_to_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = {**asdict(SMALL), "model_type": "entropi", "parallel_residual": True}
    model = written(config, tmp_path)
    assert main(["cost", "--seq-len", "24", "--architecture", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "What would help" in shown
    assert "Another architecture at these sizes" not in shown


@pytest.mark.parametrize("words", [["--architecture", "SM+LN+G"], ["--compare", "SM+LN+G", "SM(t)+ScFuFFN"]])
def test_every_operation_shown_is_explained(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["cost", "--seq-len", "16", "--layers", "1", *words]) == 0
    shown = capsys.readouterr().out
    assert "A round is one message latency, one way: half a round trip of the network." in shown
    assert re.search(r"\brounds\b", shown)
    assert "trips" not in shown
    legend = shown[shown.index("The operations, as they run:") :]
    predicted = make_report(CostModel.shipped(), Shape(architecture=words[1], num_hidden_layers=1), 16, "").prediction
    for name in predicted.prompt.by_operation():
        assert re.search(rf"^  {name} +\w", legend, re.M), name


def test_every_operation_of_the_program_has_words():
    """Stages are made in the sources of the private program, under the names that tables and records show."""
    named = set()
    for path in (Path(records.__file__).parent / "private").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called, *given = [node.func, *node.args]
                if isinstance(called, ast.Name) and called.id == "partial":
                    called, *given = given
                if isinstance(called, ast.Name) and called.id == "Stage":
                    first = given[0]
                    if isinstance(first, ast.Constant) and first.value:  # a part takes its name from its stage
                        named.add(first.value)
    assert {"norm", "exp", "setup"} <= named
    named.add("reveal")  # which is no computation, and no stage
    assert named == records.OPERATIONS.keys()


def test_a_budget_that_nothing_keeps_tells_the_cheapest(entropi: Callable[..., Done], monkeypatch: pytest.MonkeyPatch):
    from entropi.costs import budget

    monkeypatch.setattr(budget, "WIDTHS", (64,))
    done = entropi("cost", "--budget", "1s", "--seq-len", "16")
    assert done.status == 0
    assert "nothing that was searched answers a prompt of 16 tokens within 1s; the cheapest is SM" in done.out
    assert (
        "searched: SM+LN+G, SM+LN+R, SM+R, SM(t)+ScFuFFN with heads of 64 columns, widths 64 and layers 2, 3"
        in done.out
    )
    found = json.loads(entropi("cost", "--budget", "1s", "--seq-len", "16", "--json").out)
    assert found["fitting"] == []
    seconds = sum(one["latency"] for one in found["cheapest"]["prompt"]["operations"])
    assert f" and {seconds:,.1f} s; " in done.out
    found = json.loads(entropi("cost", "--budget", "100GB", "--seq-len", "16", "--json").out)
    assert {one["layers"] for one in found["fitting"]} == {48}


def test_both_phases_of_a_prepared_session_are_shown_together(capsys: pytest.CaptureFixture[str]):
    """Offline, online, both, and the session without preparation: in the text, side by side, and in JSON."""
    sizes = {"layers": 1, "heads": 2, "hidden-size": 32, "vocab-size": 100, "seq-len": 8, "new-tokens": 3}
    words = [f"--{name}={size}" for name, size in sizes.items()]
    words += ["--softmax", "polynomial-1", "--embedding", "public", "--prepared"]

    def said(*more: str) -> str:
        assert main(["cost", *words, *more]) == 0
        return capsys.readouterr().out

    shown = said("--architecture", "SM+ScFuFFN")
    compared = said("--compare", "SM+ScFuFFN", "SM(t)+ScFuFFN")
    prepared = json.loads(said("--architecture", "SM+ScFuFFN", "--json"))["prediction"]["prepared"]
    assert (prepared["new_tokens"], prepared["tokens"]) == (3, 10)
    assert prepared["totals"].keys() == tables.PHASES.keys()
    for phase, phrase in tables.PHASES.items():
        size = f"{prepared['totals'][phase]['bytes'] / 1e6:,.1f}"
        assert re.search(rf"{phrase} +{re.escape(size)} ", shown), phase
        assert re.search(rf"{phrase}, MB +{re.escape(size)} ", compared), phase
    kinds = {operation["name"] for operation in prepared["offline"]["operations"]}
    assert {"times_matrix", "scores", "mix", "square"} <= kinds <= records.MATERIAL.keys()
    for kind in kinds:
        assert f"offline: {records.MATERIAL[kind]}" in shown
    for side in ("client", "server"):
        assert f"{prepared[f'{side}_bytes'] / 1e6:,.1f} MB at the {side}" in shown
    assert prepared["offline"]["total"]["bytes"] + prepared["set_up"]["total"]["bytes"] == pytest.approx(
        prepared["totals"]["offline"]["bytes"]
    )


def test_several_prompts_make_more_tokens_a_minute(capsys: pytest.CaptureFixture[str]):
    """The sentence's figures are those of JSON; who does not ask is told where it is worth while."""
    sizes = ["--layers=1", "--heads=2", "--hidden-size=32", "--vocab-size=100", "--seq-len=8"]
    assert main(["cost", *sizes, "--batch=4", "--json"]) == 0
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    batch, alone = prediction["batch"], prediction["further"]["total"]
    assert batch["prompts"] == 4
    assert batch["tokens_a_minute"] == pytest.approx(60 * 4 / batch["further"]["total"]["latency"])
    assert alone["rounds"] < batch["further"]["total"]["rounds"] < 2 * alone["rounds"]
    times = batch["tokens_a_minute"] * alone["latency"] / 60
    assert times > 2
    assert main(["cost", *sizes, "--batch=4"]) == 0
    said = f"4 prompts a pass (ask --batch) make {batch['tokens_a_minute']:,.1f} tokens a minute, {times:.1f} times as"
    assert said in " ".join(capsys.readouterr().out.split())
    assert main(["cost", *sizes]) == 0
    assert "8 prompts a pass (ask --batch) make" in capsys.readouterr().out


def test_drafts_pay_from_some_number_on(capsys: pytest.CaptureFixture[str]):
    """The sentence says what the passes do, with and without preparation."""
    sizes = "--layers=1 --heads=2 --hidden-size=32 --vocab-size=100 --seq-len=8 --new-tokens=2 --draft-tokens=4"
    words = f"{sizes} --softmax polynomial-1 --embedding public --prepared --json".split()
    assert main(["cost", *words]) == 0
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    assert main(["cost", *words[:-1]]) == 0
    shown = capsys.readouterr().out
    for passes, before in ((prediction, "\n"), (prediction["prepared"], "\nonline ")):
        drafted, further = passes["drafted"]["total"], passes["further"]["total"]
        held = drafted["latency"] / further["latency"] - 1
        assert f"{before}4 draft tokens a pass save time where more than {held:.1f} of them hold on average" in shown
    assert "online: with 4 draft tokens" in shown


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--draft-tokens 4 --budget 2GB", "--budget knows of no drafts"),
        ("--batch 4 --budget 2GB", "--budget knows of no batches"),
        ("--batch 65", "--batch is 65 but must be between 2 and 64"),
        ("--draft-tokens -1", "--draft-tokens is -1 but must be between 0 and the 895"),
        ("--draft-tokens 900", "--draft-tokens is 900 but must be between 0 and the 895"),
        ("--new-tokens 3", "--new-tokens would be ignored: add --prepared"),
        ("--prepared --protocol aby3", "products are prepared under cheetah alone"),
        ("--prepared --budget 2GB", "--budget knows of no prepared products"),
        ("--prepared --new-tokens 0", "--new-tokens is 0 but must be at least 1"),
        ("--prepared --seq-len 1000 --new-tokens 26", "--new-tokens 26 is more than the 25 that"),
    ],
)
def test_what_does_not_go_with_preparation_is_refused(words: str, reason: str, capsys: pytest.CaptureFixture[str]):
    assert main(["cost", *words.split()]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert reason in said.err
