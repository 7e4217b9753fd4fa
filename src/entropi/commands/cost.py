"""`entropi cost`: what a model costs, before it is trained or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from entropi import record_files
from entropi.commands.common import (
    Command,
    Words,
    check_parents,
    extra,
    print_json,
    refuse_ignored_softmax,
    secure_engine,
)
from entropi.console import ProgressLine
from entropi.downloads import CONFIGURATION, SCHEME, name_of, on_disk
from entropi.errors import UserError
from entropi.model.architectures import split_training_name
from entropi.model.shape import Shape, read_shape
from entropi.private.wire.messages import MAX_BATCH
from entropi.softmax import USUAL_FOR_EXACT, SoftmaxForm, parse_in_private

USUAL_LENGTH = 128  # tokens of the prompt, unless told otherwise
USUAL_NEW_TOKENS = 64  # of the answer, for a session whose products are prepared


def run(
    architecture: str | None = None,
    compare: list[str] | None = None,
    seq_len: int | None = None,
    prefix_tokens: int = 0,
    layers: int | None = None,
    heads: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    key_value_heads: int | None = None,
    vocab_size: int | None = None,
    position_embedding: Literal["learned", "rotary"] | None = None,
    bias: Literal["qk", "qkv", "attention", "ffn", "all", "none"] | None = None,
    protocol: Literal["cheetah", "semi2k", "aby3"] = "cheetah",
    network: str = "wan",
    embedding: Literal["private", "public"] = "private",
    softmax: str | None = None,
    prepared: bool = False,
    new_tokens: int | None = None,
    draft_tokens: int = 0,
    batch: int = 0,
    budget: str | None = None,
    runs: list[Path] | None = None,
    picture: Path | None = None,
    calibration: Path | None = None,
    calibrate: Path | None = None,
    record: bool = False,
    json: bool = False,
) -> None:
    """What a model costs: its operations exactly, and the bytes and time of its private inference predicted.

    Nothing is run. The defaults are GPT-2 small's sizes.

    Args:
        architecture: one of the paper's names, SM(t)+ScFuFFN by default; or what brings its own sizes: the config.json
            of an entropi model or of a family that can be converted, its folder, a GGUF file, or OWNER/NAME on the hub
        compare: several of these side by side
        seq_len: tokens of the prompt, T; by default 128, and fewer for a model that takes fewer
        prefix_tokens: public tokens that the prompt continues, computed in the clear (serve --prefix-file)
        layers: number of layers, L; 12 by default
        heads: attention heads a layer, H; 12 by default
        hidden_size: width of the model, d; 768 by default
        intermediate_size: width of the feed-forward networks, m; four times the model's by default
        key_value_heads: heads of keys and values, fewer than heads for grouped queries; as many by default
        vocab_size: entries of the tokenizer, V; 50257 by default
        position_embedding: learned positions or rotary ones; learned by default
        bias: linear layers with a bias; those of queries and keys, qk, by default
        protocol: cheetah (two parties), semi2k (two and a trusted dealer) or aby3 (three parties)
        network: lan (1 Gbit/s, 0.5 ms), wan (100 Mbit/s, 80 ms), or a rate and a round trip such as 300Mbps,20ms
        embedding: token table private to the server, or public
        softmax: quartic or power-1 to power-8, what is evaluated for models that were trained with the exact softmax,
            by default quartic; or polynomial-1 to polynomial-8, weights of (1 + s/2^t)^(2^t) of the logits s, with
            which a model has to be trained; or polynomial-1/keys to polynomial-8/keys, or with a number such as 128 in
            the place of keys, for architectures of powers (Pow), which have the first of these by default
        prepared: price a session whose products are prepared before its prompt is known (entropi prepare), offline and
            online, and what each side stores, beside the same session without preparation
        new_tokens: tokens of the answer in this session, by default 64, and fewer for a model that takes fewer
        draft_tokens: price also a pass with so many drafts (ask --draft), and say from how many that hold it saves time
        batch: price also passes that so many prompts of this length share (ask --batch), and their tokens a minute
            beside one at a time
        budget: list what answers the prompt within so much, such as 2GB or 30s, or the cheapest if nothing does
        runs: run folders with measured perplexities, to set predicted cost against perplexity
        picture: write a picture (PNG, SVG or PDF): bytes by operation, or cost against perplexity with --runs
        calibration: file of prices measured by --calibrate, in place of those that come with the package
        calibrate: measure this machine's prices (some minutes) and write them to this file
        record: add the prediction to the records of the run folder that --architecture names, for its report
        json: print one JSON object
    """
    check_parents(picture, calibrate)
    _refuse_several({"--architecture": architecture, "--compare": compare, "--budget": budget, "--runs": runs})
    recorded = Path(architecture or "") / record_files.RECORDS_FILE
    if record and (architecture is None or not recorded.is_file()):
        raise UserError("--record needs --architecture with one run folder, to whose records the prediction is added")
    if budget is not None and picture is not None:
        raise UserError("--picture has nothing to draw with --budget")
    _refuse_ignored_preparation(
        prepared, new_tokens, protocol, {"--budget": budget, "--runs": runs, "--picture": picture}
    )
    _refuse_ignored_passes(draft_tokens, batch, {"--budget": budget, "--runs": runs, "--compare": compare})
    with extra("private"):
        from entropi.costs import calibration as prices
        from entropi.costs.network import parse_network
        from entropi.costs.prediction import CostModel, Options
    if calibrate is not None:
        _calibrate(protocol, calibrate)
        return

    # What the shapes by name are given; of these, what was asked for must not be ignored.
    sizes = {
        "layers": layers,
        "heads": heads,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "key_value_heads": key_value_heads,
        "vocab_size": vocab_size,
        "position_embedding": position_embedding,
        "bias": bias,
    }
    asked = {name: value for name, value in sizes.items() if value is not None}
    words = [str(run) for run in runs] if runs else compare or [architecture or "SM(t)+ScFuFFN"]
    for_exact, trained_with = _softmax(softmax)
    _refuse_ignored(words, list(asked), trained_with, searching=budget is not None)
    base = _base(asked, prefix_tokens + (seq_len or USUAL_LENGTH), trained_with)

    network_chosen = parse_network(network)
    chosen = prices.shipped(protocol) if calibration is None else _read_prices(calibration, protocol)
    if prefix_tokens < 0:
        raise UserError(f"--prefix-tokens is {prefix_tokens} but must not be negative")
    options = Options(
        embedding=embedding,
        exact_softmax_as=for_exact,
        fraction_bits=chosen.fraction_bits,
        prefix_tokens=prefix_tokens,
    )
    costs = CostModel(chosen, network_chosen, options)

    if runs:
        _place_runs(runs, seq_len, costs, softmax, picture, json=json)
    elif budget is not None:
        _search(budget, base, seq_len or USUAL_LENGTH, costs, json=json)
    else:
        shapes = [_shape_of(word, base) for word in words]
        _refuse_other_softmax(shapes, softmax)
        length = _length(seq_len, prefix_tokens, shapes)
        new = _new_tokens(new_tokens, prefix_tokens + length, shapes) if prepared else None
        into = recorded if record else None
        _refuse_drafts(draft_tokens, prefix_tokens + length, shapes)
        beside = dict[str, Any](new_tokens=new, drafts=draft_tokens, prompts=batch)
        _report(shapes, length, costs, beside, picture, into, comparing=bool(compare), json=json)


# --- What is asked for ------------------------------------------------------------------------------------------------


def _refuse_several(modes: Mapping[str, object]) -> None:
    given = [name for name, value in modes.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other")


def _refuse_ignored_preparation(
    prepared: bool, new_tokens: int | None, protocol: str, modes: Mapping[str, object]
) -> None:
    """Refuse what does not know of prepared products beside --prepared, and what would be ignored without it."""
    if not prepared and new_tokens is not None:
        raise UserError("--new-tokens would be ignored: add --prepared")
    if prepared and protocol != "cheetah":
        raise UserError(f"products are prepared under cheetah alone: --prepared does not go with --protocol {protocol}")
    if prepared:
        _refuse_beside("--prepared", "prepared products", modes)


def _refuse_ignored_passes(draft_tokens: int, batch: int, modes: Mapping[str, object]) -> None:
    """Refuse what knows of no other passes beside those with drafts or of several prompts, and impossible batches."""
    if draft_tokens:
        _refuse_beside("--draft-tokens", "drafts", modes)
    if batch:
        _refuse_beside("--batch", "batches", modes)
        if not 2 <= batch <= MAX_BATCH:
            raise UserError(f"--batch is {batch} but must be between 2 and {MAX_BATCH}")


def _refuse_beside(option: str, what: str, modes: Mapping[str, object]) -> None:
    """Refuse what does not know of `what`, which `option` asks for."""
    for name, value in modes.items():
        if value is not None:
            raise UserError(f"{name} knows of no {what}: leave out {option}")


def _brings_its_own(model: str) -> bool:
    """Whether a word names a model with sizes of its own, and not an architecture."""
    path = Path(model)
    return path.exists() or path.suffix in (".json", ".gguf") or "/" in model or model.startswith(".")


def _refuse_ignored(models: Sequence[str], sizes: Sequence[str], trained_with: str, *, searching: bool) -> None:
    """Refuse options that would do nothing because `models` bring their own, or a search tries several."""
    searched = [name for name in sizes if name not in ("vocab_size", "bias", "position_embedding")]
    if searching and searched:
        options = ", ".join(_option(name) for name in searched)
        raise UserError(f"{options} would be ignored: --budget searches for the sizes")

    own = [model for model in models if _brings_its_own(model)]
    ignored = [_option(name) for name in sizes if len(own) == len(models)]
    ignored += [f"--softmax {trained_with}"] * (trained_with != "exact" and bool(own))
    if ignored:
        raise UserError(
            f"{' and '.join(ignored)} would be ignored, as {own[0]} brings its own: leave out, or name an architecture"
        )


def _length(asked: int | None, prefix_tokens: int, shapes: Sequence[tuple[str, Shape]]) -> int:
    """Tokens of the prompt: as asked, and else the usual number, or fewer where a model takes fewer.

    Raises:
        UserError: a model that does not take so many after the prefix.
    """
    name, shape = min(shapes, key=lambda named: named[1].max_position_embeddings)
    left = shape.max_position_embeddings - prefix_tokens
    takes = f"the {shape.max_position_embeddings:,} tokens that {name} takes"
    if left < 1:
        raise UserError(f"--prefix-tokens {prefix_tokens:,} leaves no room for a prompt in {takes}")
    if asked is not None and prefix_tokens > 0 and asked > left:
        raise UserError(f"--prefix-tokens {prefix_tokens:,} and --seq-len {asked:,} are together more than {takes}")
    return min(USUAL_LENGTH, left) if asked is None else asked


def _new_tokens(asked: int | None, before: int, shapes: Sequence[tuple[str, Shape]]) -> int:
    """Tokens of the answer: as asked, and else the usual number, or fewer where a model takes fewer after `before`.

    The last one is not computed with.

    Raises:
        UserError: none, or more than a model takes.
    """
    name, shape = min(shapes, key=lambda named: named[1].max_position_embeddings)
    most = shape.max_position_embeddings - before + 1
    if asked is None:
        return min(USUAL_NEW_TOKENS, most)
    if asked < 1:
        raise UserError(f"--new-tokens is {asked} but must be at least 1")
    if asked > most:
        raise UserError(f"--new-tokens {asked:,} is more than the {most:,} that {name} has positions for")
    return asked


def _refuse_drafts(asked: int, before: int, shapes: Sequence[tuple[str, Shape]]) -> None:
    """Raise `UserError` for fewer drafts than none, or more than a model takes after `before` tokens and a further."""
    name, shape = min(shapes, key=lambda named: named[1].max_position_embeddings)
    most = max(shape.max_position_embeddings - before - 1, 0)
    if not 0 <= asked <= most:
        raise UserError(f"--draft-tokens is {asked} but must be between 0 and the {most:,} that {name} takes")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_other_softmax(shapes: Sequence[tuple[str, Shape]], asked: str | None) -> None:
    """Refuse a softmax for models that have another of their own."""
    for name, shape in shapes:
        refuse_ignored_softmax(asked, shape.softmax, name)


def _softmax(asked: str | None) -> tuple[str, str]:
    """What stands for the exact softmax in private, and what architectures by name are trained with."""
    if asked is None:
        return USUAL_FOR_EXACT, "exact"
    if asked == "exact":
        raise UserError("--softmax exact has no private counterpart: say what stands for it, such as quartic")
    form = parse_in_private(asked, "--softmax")
    return (str(form), "exact") if form.stands_for_exact else (USUAL_FOR_EXACT, str(form))


def _base(asked: Mapping[str, Any], positions: int, trained_with: str) -> Shape:
    """The sizes of architectures by name."""
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "key_value_heads": "num_key_value_heads"}
    for name in ("intermediate_size", "key_value_heads"):
        if asked.get(name, 1) < 1:
            raise UserError(f"{name} is {asked[name]}, at least 1 is needed")
    powers = SoftmaxForm.parse(trained_with).public_divisor
    return Shape(
        architecture="Pow" if powers else "SM",  # those by name take its place
        **{names.get(name, name): value for name, value in asked.items()},
        max_position_embeddings=max(positions, 1024),
        softmax=trained_with,
    )


def _shape_of(model: str, otherwise: Shape) -> tuple[str, Shape]:
    """Name and shape of what a word names: an architecture with the sizes of `otherwise`, or a file, a folder or a
    model of the hub with a config.json."""
    if model.startswith(SCHEME):
        return name_of(model), read_shape(on_disk(model, CONFIGURATION))
    if _brings_its_own(model):
        return model, read_shape(on_disk(model, CONFIGURATION))
    return model, replace(otherwise, architecture=split_training_name(model)[0], final_norm=None)


def _read_prices(path: Path, protocol: str) -> Any:
    from entropi.costs import calibration as prices

    found = prices.read(path.read_bytes(), str(path))
    if found.protocol != protocol:
        raise UserError(f"{path} holds prices of {found.protocol}, not of {protocol}")
    return found


# --- What is answered; `costs` is the `CostModel` ---------------------------------------------------------------------


def _calibrate(protocol: Literal["cheetah", "semi2k", "aby3"], path: Path) -> None:
    from entropi.costs import calibration as prices

    with secure_engine():
        from entropi.private.wire.versions import engine_version

        engine_version()  # all else here needs JAX alone
    with ProgressLine(f"measuring {protocol}", 100) as progress:
        measured = prices.calibrate(protocol, progress=lambda share: progress.update(round(100 * share), ""))
    prices.write(measured, path)
    print(f"prices of {measured.protocol} on {measured.machine} in {path}")


def _report(
    shapes: Sequence[tuple[str, Shape]],
    seq_len: int,
    costs: Any,
    beside: Mapping[str, Any],
    picture: Path | None,
    recorded: Path | None,
    *,
    comparing: bool,
    json: bool,
) -> None:
    """One configuration, or several side by side; what is priced `beside` it, see `make_report`."""
    from entropi.costs import tables
    from entropi.costs.report import make_report

    found = [make_report(costs, shape, seq_len, name, **beside) for name, shape in shapes]
    if recorded is not None:
        record_files.append(recorded, found[0].prediction)
    if picture is not None:
        with extra("report"):
            from entropi.report import figures
        figures.write_figure(figures.predicted_bytes({one.name: one.prediction for one in found}), picture)

    if json:
        print_json([one.to_json() for one in found] if comparing else found[0].to_json())
        return
    if comparing:
        tables.compare(found)
    else:
        tables.show(found[0])
    if picture is not None:
        print(f"picture in {picture}")


def _search(text: str, base: Shape, seq_len: int, costs: Any, *, json: bool) -> None:
    """What fits a budget."""
    from entropi.costs import tables
    from entropi.costs.budget import SEARCHED, WIDTHS, Candidate, parse_budget, search

    budget = parse_budget(text)
    with ProgressLine("searching", len(SEARCHED) * len(WIDTHS)) as progress:
        found = search(budget, base, seq_len, costs, lambda done, _: progress.update(done, ""))
    if not json:
        tables.show_search(found, text, seq_len)
        return

    def plain(one: Candidate) -> dict[str, Any]:
        return {
            **msgspec.to_builtins(one.prediction),
            "kernel": one.prediction.kernel,
            "parameters": one.parameters,
        }

    print_json({"fitting": [plain(one) for one in found.fitting], "cheapest": plain(found.cheapest)})


def _measured(runs: Sequence[Path], softmax: str | None) -> dict[str, tuple[Shape, float]]:
    """Shapes and measured perplexities of run folders, by name."""
    from entropi.report.folder import read_run

    found: dict[str, tuple[Shape, float]] = {}
    for folder in runs:
        run = read_run(folder)
        if run.evaluation is None:
            raise UserError(f"{folder} has no evaluation on held-out text: see entropi evaluate")
        shape = read_shape(folder)
        _refuse_other_softmax([(str(folder), shape)], softmax)
        found[run.name if run.name not in found else str(folder)] = shape, run.evaluation.perplexity
    return found


def _place_runs(
    runs: Sequence[Path], seq_len: int | None, costs: Any, softmax: str | None, picture: Path | None, *, json: bool
) -> None:
    """Predicted cost of runs against their measured perplexity."""
    from entropi.costs.placement import place

    with extra("report"):
        from entropi.report import figures

        measured = _measured(runs, softmax)
    shapes = [(name, shape) for name, (shape, _) in measured.items()]
    placed = place(measured, _length(seq_len, costs.options.prefix_tokens, shapes), costs)
    points = {name: (one.megabytes, one.perplexity) for name, one in placed.items()}
    best = figures.frontier(points)
    if picture is not None:
        labels = {name: one.kernel_label for name, one in placed.items()}
        axis = "predicted bytes of the prompt's pass (MB)"
        figures.write_figure(figures.pareto(points, axis, labels), picture)

    if json:
        rows = [
            {
                "run": name,
                "MB": one.megabytes,
                "kernel": one.kernel,
                "perplexity": one.perplexity,
                "on_frontier": name in best,
            }
            for name, one in placed.items()
        ]
        print_json(rows)
        return
    for name, one in sorted(placed.items(), key=lambda item: points[item[0]]):
        remark = "" if name in best else ", another is better"
        print(f"{name}: {one.megabytes:,.1f} MB at {one.kernel_label}, perplexity {one.perplexity:.2f}{remark}")
    if picture is not None:
        print(f"picture in {picture}")


COMMAND = Command(run, place=5, words={"compare": Words("MODEL"), "runs": Words("RUN", Path)})
