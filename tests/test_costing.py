"""Shapes of other families, networks, budgets, advice and what the command shows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("jax")

from entropi import costing, record_files, records
from entropi.cli import main
from entropi.costs import advice
from entropi.costs.calibration import Calibration, Price, read, shipped, solve, write
from entropi.costs.operations import parameters
from entropi.costs.prediction import NETWORKS, Network, Options, described, line_of, predict
from entropi.errors import UserError
from entropi.model.architectures import ARCHITECTURES
from entropi.model.shape import Shape, expected_description, read_shape

SMALL = Shape(vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GPT2_XL = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024}
PYTHIA = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
}
LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
}


def written(config: dict, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_shape_has_the_configuration_s_defaults():
    from entropi.model.configuration import EntropiConfig

    config = EntropiConfig()
    for field in fields(Shape):
        assert getattr(Shape(), field.name) == getattr(config, field.name), field.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_expected_of_folding_is_what_it_leaves(architecture: str):
    import torch

    from entropi.model.configuration import EntropiConfig
    from entropi.model.decoder import EntropiForCausalLM
    from entropi.model.folding import fold

    sizes = {name: getattr(SMALL, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = EntropiConfig(architecture=architecture, num_attention_heads=4, max_position_embeddings=64, **sizes)
    model = EntropiForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("temperature.parameter"):
                parameter.add_(torch.rand_like(parameter))
    expected = expected_description(replace(SMALL, architecture=architecture))
    assert expected == fold(model, worst_condition=math.inf).description


@pytest.mark.parametrize(
    ("config", "architecture", "count"),
    [(GPT2_XL, "SM+LN+G", 1_557_611_200), (PYTHIA, "SM+LN+G", 70_426_624), (LLAMA_7B, "SM+RMS+SwiGLU", 6_738_415_616)],
    ids=["GPT-2 XL", "Pythia 70M", "Llama 7B"],
)
def test_other_families_have_their_published_sizes(config: dict, architecture: str, count: int, tmp_path: Path):
    shape = read_shape(written(config, tmp_path))
    assert shape.architecture == architecture
    assert parameters(shape) == count
    assert described(shape).layers == shape.num_hidden_layers


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "family 'bert'; known are entropi, gpt2, gpt_neox, llama"),
        ({"model_type": "gpt2"}, "lacks 'vocab_size'"),
        ({**LLAMA_7B, "head_dim": 256}, "head_dim 256"),
        ({**PYTHIA, "hidden_act": "tanh"}, "'tanh' has no secure form"),
        ({**GPT2_XL, "n_head": 7}, "hidden_size 1600 is no multiple of 7 heads"),
        ({**GPT2_XL, "n_embd": "wide"}, "value of the wrong kind"),
    ],
)
def test_configurations_that_cannot_be_used_say_why(config: dict, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        read_shape(written(config, tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_shape(tmp_path)


def test_networks():
    assert line_of("lan").bits_per_second == 1e9
    assert line_of("300Mbps, 20 ms") == Network("300Mbps, 20 ms", 300e6, 0.01)
    assert line_of("2Gbit/s,1ms").bits_per_second == 2e9
    for wrong in ("", "100Mbps", "0Mbps,1ms", "1.2.3Mbps,1ms", "100,20"):
        with pytest.raises(UserError, match="is no network"):
            line_of(wrong)


def test_latency_is_computing_and_trips_and_carriage():
    line = Network("test", 1e8, 0.04)
    record = predict(SMALL, 16, shipped("cheetah"), line)
    for part in (record.set_up, record.prompt, record.further):
        least = part.seconds + 0.04 * part.trips
        assert least < part.latency <= least + 8 * part.bytes / 1e8 + 1e-9
    everywhere = predict(SMALL, 16, shipped("cheetah"), Network("none", math.inf, 0.0))
    assert everywhere.prompt.latency == pytest.approx(everywhere.prompt.seconds)


def test_the_public_function_counts_and_predicts():
    import entropi

    found = entropi.cost(entropi.EntropiConfig(architecture="SM+LN+R"), 128, network="lan")
    assert (found.counts.ffn_flops, found.counts.folded, found.folded.folded) == (14_495_514_624, False, True)
    assert found.prediction.network.startswith("lan")
    assert found.prediction.seq_len == 128


def test_a_further_token_costs_less_and_is_left_out_at_the_end():
    record = predict(SMALL, 63, shipped("cheetah"), NETWORKS["lan"])
    assert record.further is not None
    assert record.further.bytes < record.prompt.bytes
    assert predict(SMALL, 64, shipped("cheetah"), NETWORKS["lan"]).further is None
    with pytest.raises(UserError, match="64 positions"):
        predict(SMALL, 65, shipped("cheetah"), NETWORKS["lan"])


def test_what_would_help_really_saves():
    calibration, line, options = shipped("cheetah"), NETWORKS["wan"], Options()
    shape = replace(SMALL, hidden_size=128)
    now = predict(shape, 48, calibration, line, options)
    found = advice.changes(shape, 48, calibration, line, options, now)
    assert [change.saved_bytes for change in found] == sorted((c.saved_bytes for c in found), reverse=True)
    words = " ".join(change.words for change in found)
    assert "softmax only" in words
    assert "ReLU in place of GELU" in words
    relu = predict(replace(shape, architecture="SM+LN+R"), 48, calibration, line, options)
    saved = next(change.saved_bytes for change in found if "ReLU" in change.words)
    assert saved == pytest.approx(now.prompt.bytes - relu.prompt.bytes)


def test_the_paper_s_figures_stand_beside_its_configurations():
    assert advice.paper_figures(Shape(architecture="SM+LN+G"), 128) == (25.32, 8.21)
    assert advice.paper_figures(Shape(architecture="SM+LN+R", num_hidden_layers=18), 128) == (13.34, 8.04)
    assert advice.paper_figures(Shape(architecture="SM+LN+G", hidden_size=1024, num_attention_heads=16), 128) is None


def test_budgets(monkeypatch: pytest.MonkeyPatch):
    assert advice.budget("2GB").limit == 2e9
    assert advice.budget("1.5 min").limit == 90
    for wrong in ("2", "GB", "0MB", "2TB"):
        with pytest.raises(UserError, match="is no budget"):
            advice.budget(wrong)
    monkeypatch.setattr(advice, "WIDTHS", (64, 128))
    monkeypatch.setattr(advice, "DEPTHS", (2, 3, 4, 6))
    limit = advice.budget("150MB")
    calibration, options = shipped("semi2k"), Options(embedding="public")
    found = advice.fitting(limit, SMALL, 32, calibration, NETWORKS["lan"], options)
    assert found
    assert [one.parameters for one in found] == sorted((one.parameters for one in found), reverse=True)
    for one in found:
        assert one.prediction.prompt.bytes <= limit.limit
        deeper = [depth for depth in advice.DEPTHS if depth > one.shape.num_hidden_layers]
        if deeper:  # the next depth does not fit
            more = predict(replace(one.shape, num_hidden_layers=deeper[0]), 32, calibration, NETWORKS["lan"], options)
            assert more.prompt.bytes > limit.limit
    assert advice.fitting(advice.budget("1MB"), SMALL, 32, calibration, NETWORKS["lan"], options) == []


def test_prices_are_read_as_they_were_written(tmp_path: Path):
    calibration = shipped("cheetah")
    write(calibration, tmp_path / "prices.json")
    assert read((tmp_path / "prices.json").read_bytes(), "prices.json") == calibration
    for damaged in (b"", b"{}", b'{"format": 2}', b"\xff"):
        with pytest.raises(UserError, match=r"prices\.json is no calibration"):
            read(damaged, "prices.json")
    incomplete = msgspec.structs.replace(calibration, prices={"rotations": Price(1, 1, 1, 1)})
    with pytest.raises(UserError, match="has no price for"):
        predict(SMALL, 8, incomplete, NETWORKS["lan"])


def test_prices_are_found_where_they_explain_everything():
    from collections import Counter

    from entropi.costs.calibration import Reading

    true = {"call": 10.0, "number": 0.25, "unused": 0.0}
    readings = [
        Reading("x", Counter(call=1, number=n, unused=n % 3), round(10 + 0.25 * n), 0, 0.0) for n in (4, 40, 4000, 80)
    ]
    found = solve(readings, [reading.bytes for reading in readings], list(true))
    assert found == pytest.approx(true, abs=1e-6)


def test_shipped_prices_are_of_the_engine_s_protocols():
    for protocol in ("cheetah", "semi2k", "aby3"):
        calibration: Calibration = shipped(protocol)
        assert calibration.protocol == protocol
        assert calibration.machine
        assert all(value >= 0 for price in calibration.prices.values() for value in msgspec.structs.astuple(price))


def test_json_and_tables_say_the_same(capsys: pytest.CaptureFixture[str]):
    calibration, options = shipped("cheetah"), Options()
    found = [
        costing.costed(name, replace(SMALL, architecture=name), 24, calibration, NETWORKS["wan"], options)
        for name in ("SM+LN+G", "SM(t)+ScFuFFN")
    ]
    costing.compare(found)
    table = capsys.readouterr().out
    for one in found:
        data = json.loads(json.dumps(one.to_json()))
        total = data["prediction"]["prompt"]["total"]["bytes"]
        assert total == pytest.approx(sum(o["bytes"] for o in data["prediction"]["prompt"]["operations"]))
        assert f"{total / 1e6:,.1f}" in table
        costing.show(one)
        shown = capsys.readouterr().out
        assert "each further token" in shown
        for operation in one.prediction.prompt.by_operation().values():
            assert f"{operation.bytes / 1e6:,.1f}" in shown
        assert data["changes"] == [asdict(change) for change in one.changes]


def run_folder(folder: Path, perplexity: float, architecture: str) -> Path:
    """What `entropi cost` reads of a trained run: its model's configuration and its evaluation."""
    (folder / "model").mkdir(parents=True)
    config = {**asdict(replace(SMALL, architecture=architecture)), "model_type": "entropi"}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    entropy = [[1.0] * 4] * 2
    loss = math.log(perplexity)
    evaluation = records.Evaluation(step=1, cross_entropy=loss, perplexity=perplexity, tokens=10, entropy=entropy)
    record_files.append(folder / record_files.RECORDS_FILE, evaluation)
    return folder


def test_runs_are_placed_by_cost_and_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    good = run_folder(tmp_path / "good", 20.0, "SM+ScFuFFN")
    dear = run_folder(tmp_path / "dear", 30.0, "SM+LN+G")
    picture = tmp_path / "pareto.png"
    assert main(["cost", "--seq-len", "32", "--runs", str(good), str(dear), "--picture", str(picture), "--json"]) == 0
    found = {one["run"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["good"]["MB"] < found["dear"]["MB"]
    assert found["good"]["kernel"] == "softmax kernel t=8 for a model trained with the exact softmax"
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
    assert f"{prediction.embedding} token table, softmax kernel t=8 for a model trained with the exact softmax" in page


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
    assert shown.count("t=8 (trained exact)") == 4  # a column and a list of bars each
    assert "t=8 (trained exact)" in picture.read_text(encoding="utf-8")
    assert "<svg" in picture.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_calibration_finds_the_shipped_bytes_and_messages(tmp_path: Path):
    pytest.importorskip("spu")
    assert main(["cost", "--protocol", "semi2k", "--calibrate", str(tmp_path / "prices.json")]) == 0
    found, known = read((tmp_path / "prices.json").read_bytes(), "prices.json"), shipped("semi2k")
    assert found.prices.keys() == known.prices.keys()
    for name, price in known.prices.items():
        assert found.prices[name].bytes == pytest.approx(price.bytes, rel=0.01, abs=0.01), name
        assert found.prices[name].messages == pytest.approx(price.messages, rel=0.01, abs=0.01), name
    record = predict(SMALL, 16, found, NETWORKS["lan"], Options(embedding="public"))
    assert record.calibrated_on == found.machine


def test_the_polynomial_kernel_is_priced_shown_and_advised(capsys: pytest.CaptureFixture[str]):
    sizes = ["--layers", "2", "--heads", "4", "--hidden-size", "64", "--vocab-size", "500", "--seq-len", "40"]
    words = ["cost", "--architecture", "SM(t)+ScFuFFN", *sizes]
    assert main([*words, "--exp-iterations", "2"]) == 0
    assert "squares of logits as attention weights" in capsys.readouterr().out
    assert main([*words, "--polynomial"]) == 0
    shown = capsys.readouterr().out
    assert "polynomial kernel t=1" in shown
    assert not any(line.split()[:1] in (["max"], ["exp"], ["temperature"]) for line in shown.splitlines())
    predicted, predictions = [], []
    for more in (["--exp-iterations", "2"], ["--polynomial"], ["--polynomial", "--exp-iterations", "2"]):
        assert main([*words, *more, "--json"]) == 0
        predictions.append(json.loads(capsys.readouterr().out)["prediction"])
        predicted.append(predictions[-1]["prompt"]["total"])
        kernel = predictions[-1]["kernel"]
        assert kernel.startswith("polynomial kernel t=" if "--polynomial" in more else "softmax kernel t=2 for a model")
    softmax, squares, fourth = predicted
    assert squares["bytes"] < fourth["bytes"] < softmax["bytes"]
    assert squares["trips"] < 0.7 * softmax["trips"]
    with pytest.raises(UserError, match="polynomial needs exp_iterations"):
        Shape(polynomial=True)


def test_every_prediction_names_its_kernel(capsys: pytest.CaptureFixture[str]):
    """t=8 and a kernel of the model's own are half as many bytes again apart: a figure without t says little."""
    import entropi

    exact = entropi.cost(entropi.EntropiConfig(), 128).prediction
    own = entropi.cost(entropi.EntropiConfig(exp_iterations=3), 128).prediction
    squares = entropi.cost(entropi.EntropiConfig(exp_iterations=1, polynomial=True), 128).prediction
    assert exact.kernel == "softmax kernel t=8 for a model trained with the exact softmax"
    assert own.kernel == "softmax kernel t=3, the model's own"
    assert squares.kernel == "polynomial kernel t=1, the model's own"
    assert (exact.kernel_label, own.kernel_label) == ("t=8 (trained exact)", "t=3 (its own)")
    older = msgspec.structs.replace(exact, own_kernel=None)
    assert (older.kernel, older.kernel_label) == ("softmax kernel t=8", "t=8")
    sizes = ["--seq-len", "16", "--network", "lan"]
    assert main(["cost", "--architecture", "SM", *sizes]) == 0
    shown = capsys.readouterr().out
    for part in ("softmax kernel t=8 for a model", "by operation, t=8 (trained", "in all; t=8 (trained exact)"):
        assert part in shown


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

    assert f"--polynomial would be ignored, as {llama} brings its own" in refused(
        "--architecture", llama, "--polynomial"
    )
    both = refused("--architecture", llama, "--layers", 3, "--bias", "all")
    assert "--layers and --bias would be ignored" in both
    assert "--hidden-size would be ignored" in refused("--runs", own, "--hidden-size", 64)
    assert "--polynomial would be" in refused("--compare", "SM", own, "--polynomial")  # half of it would be
    assert main(["cost", "--seq-len", "16", "--compare", "SM", str(own), "--layers", "2", "--exp-iterations", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("t=3 (trained exact)") == 4
    config.write_text(json.dumps(json.loads(config.read_text()) | {"exp_iterations": 2}))
    for words in (("--architecture", own), ("--runs", own), ("--compare", "SM", own)):
        assert "--exp-iterations 3 would be ignored: " in refused(*words, "--exp-iterations", 3)
    assert main(["cost", "--seq-len", "16", "--runs", str(own)]) == 0
    assert "MB at t=2 (its own), perplexity 20.00" in capsys.readouterr().out
