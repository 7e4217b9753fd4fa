"""`entropi diagnose`: the attention heads of a model."""

from __future__ import annotations

from pathlib import Path

import msgspec

from entropi import records
from entropi.bounds import causal_maximum
from entropi.commands.common import Command, check_parents, extra, print_json
from entropi.console import ProgressLine, make_console


def run(
    model: str,
    corpus: str | None = None,
    batch_size: int = 32,
    softmax: str | None = None,
    sequences: int | None = None,
    context_length: int | None = None,
    heatmap: Path | None = None,
    html: Path | None = None,
    json: bool = False,
) -> None:
    """Where the attention heads of a model stand between collapse and overload, and where they look.

    Args:
        model: run folder, saved model, the folder or GGUF file of any Hugging Face causal language model, or OWNER/NAME
            on the hub (also hf://OWNER/NAME)
        corpus: "stdlib", a text file or folder, or what else entropi train takes; its held-out part is used, and all of
            a file or folder for models that are not entropi's; by default the run's own, and else stdlib
        batch_size: sequences at a time
        softmax: exact, power-1 to power-8 or polynomial-1 to polynomial-8 with or without /keys or a number such as
            /128, which private inference evaluates; by default the model's own
        sequences: how many to use; by default all, and 32 for models that are not entropi's
        context_length: tokens a sequence; by default what the model takes, and for models that are not entropi's at
            most 1024
        heatmap: PNG or SVG to write; by default NAME-entropy.png in the working folder
        html: page to write, with everything that entropi report shows of a run
        json: print one JSON object
    """
    with extra("report"):
        from entropi.report import figures
        from entropi.report.page import write_diagnosis
    from entropi.downloads import name_of, on_disk
    from entropi.training.evaluation import PATTERN_SEQUENCES, diagnose_heldout, observe_patterns
    from entropi.training.loading import evaluate_heldout, failures_in_one_line, open_with_text

    check_parents(heatmap, html)
    folder, name = on_disk(model), name_of(model)
    picture = heatmap or Path(f"{name}-entropy.png")
    opened = open_with_text(folder, corpus, softmax, sequences, context_length)
    loaded, blocks = opened.model, opened.blocks

    result = evaluate_heldout(opened, batch_size, entropies=True)
    found = diagnose_heldout(result, blocks.shape[1], opened.source)
    found.model, found.parameters = type(loaded).__name__, loaded.num_parameters()
    figure = figures.entropy_heatmap(found.entropy, found.max_possible, name, found.layers, found.context_length)
    figures.write_figure(figure, picture)
    with (
        failures_in_one_line(opened, "diagnosed"),
        ProgressLine("looking where the heads look", min(len(blocks), PATTERN_SEQUENCES)) as line,
    ):
        pattern = observe_patterns(loaded, blocks[:PATTERN_SEQUENCES], line.update)

    evaluation = records.Evaluation(
        step=0,
        cross_entropy=result.cross_entropy,
        perplexity=result.perplexity,
        tokens=result.tokens,
        entropy=found.entropy,
    )
    if html is not None:
        write_diagnosis(folder, [evaluation, found, pattern], html, name)
    if json:
        _print_json(found, pattern, evaluation, opened.corpus)
    else:
        _print(found, pattern)
        print(f"heatmap in {picture}" + (f", page in {html}" if html is not None else ""))


def _print_json(
    found: records.DiagnosisRecord, pattern: records.AttentionPattern, evaluation: records.Evaluation, corpus: str
) -> None:
    """All that was computed: the diagnosis, the evaluation, and under "attention" where the heads look."""
    more = {
        "max_causal": causal_maximum(found.context_length),
        "corpus": corpus,
        "cross_entropy": evaluation.cross_entropy,
        "perplexity": evaluation.perplexity,
        "tokens": evaluation.tokens,
        "attention": msgspec.to_builtins(pattern),
    }
    print_json(msgspec.to_builtins(found) | more)


def _print(found: records.DiagnosisRecord, pattern: records.AttentionPattern) -> None:
    from entropi.report.formatting import pattern_in_words, table_of_heads

    console = make_console()
    if (lines := table_of_heads(found, console.width)) is None:
        console.print(
            f"{max(map(len, found.entropy))} heads a layer do not fit {console.width} columns: the picture and --json "
            "have them all"
        )
    else:
        console.print("mean entropy of every head in nats, by layer (+ overloaded, - collapsed)", *lines, sep="\n")

    print(f"measured on {found.source} of {found.context_length:,} tokens")
    print(
        f"the largest, M, is {found.max_observed:.3f} nats; a causal mask over {found.context_length:,} tokens allows "
        f"{causal_maximum(found.context_length):.3f}, log T is {found.max_possible:.3f}"
    )
    shares = " / ".join(f"{share:.0%}" for share in found.quartile_shares)
    print(f"heads by quarter of M, lowest first: {shares}")
    print(found.verdict)
    print(pattern_in_words(pattern))


COMMAND = Command(run, place=4)
