"""`entropi evaluate`: perplexity of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from entropi.commands.common import (
    Command,
    print_json,
    read_given,
    refuse_ignored_softmax,
    secure_engine,
    terminated_like_interrupted,
)
from entropi.console import ProgressLine
from entropi.errors import UserError
from entropi.softmax import USUAL_FOR_EXACT, parse_for_exact
from entropi.temporary import swept_folder

if TYPE_CHECKING:
    import numpy as np

    from entropi.private.compute.accuracy import Accuracy

POSITIONS, LENGTH = 1024, 128  # that --private compares, and tokens a sequence, by default


@dataclass(frozen=True)
class _Text:
    """Which text, and how much of it; as for `run`."""

    corpus: str | None
    packing: Literal["stream", "document"] | None
    sequences: int | None
    context_length: int | None
    whole: bool


@dataclass(frozen=True)
class _Private:
    """What `--private` alone has; as for `run`."""

    softmax: str | None
    protocol: Literal["ref2k", "cheetah"] | None
    positions: int | None
    prefix_file: Path | None
    calibration_text: Path | None


def run(
    model: str,
    corpus: str | None = None,
    packing: Literal["stream", "document"] | None = None,
    batch_size: int = 32,
    softmax: str | None = None,
    sequences: int | None = None,
    context_length: int | None = None,
    private: bool = False,
    protocol: Literal["ref2k", "cheetah"] | None = None,
    positions: int | None = None,
    prefix_file: Path | None = None,
    whole: bool = False,
    calibration_text: Path | None = None,
    json: bool = False,
) -> None:
    """Perplexity of a model on text that it was not trained on.

    Args:
        model: run folder, saved model, the folder or GGUF file of any Hugging Face causal language model, or OWNER/NAME
            on the hub (also hf://OWNER/NAME)
        corpus: "stdlib", a text file or folder, or what else entropi train takes; its held-out part is used, and all of
            a file or folder for models that are not entropi's; by default the run's own, and else stdlib
        packing: cut sequences from one stream of all documents, or from each document; by default as the model of a run
            folder was trained, and else from a stream
        batch_size: sequences at a time
        softmax: exact; power-1 to power-8, the (1 + x/2^t)^(2^t) that private inference evaluates, or polynomial-1 to
            polynomial-8 with or without /keys or a number such as /128; by default what the model was trained with.
            With --private what stands for an exact one: quartic, by default, or power-1 to power-8
        sequences: how many to use; by default all, and for models that are not entropi's 32 of a data set
        context_length: tokens a sequence; by default what the model takes, and for models that are not entropi's at
            most 1024
        private: compare with the same model in the fixed-point numbers of private inference: perplexity, and how often
            the likeliest token is the same; the model is folded first, and softmax is what stands for an exact one
        protocol: of --private: ref2k, the engine's arithmetic in one party, by default; or cheetah, with the
            cryptography, in simulation, many times slower
        positions: of --private: how many tokens are compared at least, 1024 by default, in sequences of 128, or what
            the model takes, if context_length does not say otherwise
        prefix_file: of --private: public text before every sequence, see entropi serve
        calibration_text: of --private: text to choose the fixed-point numbers for, besides what is compared, see
            entropi serve
        whole: all of a text file or folder, not its held-out part, for a model of entropi too: right for one that was
            not trained on it, such as a converted one
        json: print one JSON object
    """
    from entropi.downloads import on_disk
    from entropi.training.loading import evaluate_heldout, open_with_text

    only_private = {
        "--protocol": protocol,
        "--positions": positions,
        "--prefix-file": prefix_file,
        "--calibration-text": calibration_text,
    }
    if ignored := [name for name, value in only_private.items() if value is not None and not private]:
        raise UserError(f"{' and '.join(ignored)} would be ignored without --private")
    if private:
        options = _Private(softmax, protocol, positions, prefix_file, calibration_text)
        _in_private(model, _Text(corpus, packing, sequences, context_length, whole), options, json)
        return

    path = on_disk(model)
    opened = open_with_text(
        path, corpus, softmax, sequences, context_length, packing, all_of_plain_text=True, whole=whole
    )
    result = evaluate_heldout(opened, batch_size, entropies=False)

    length = opened.blocks.shape[1]
    if json:
        print_json(
            {
                "cross_entropy": result.cross_entropy,
                "perplexity": result.perplexity,
                "tokens": result.tokens,
                "corpus": opened.corpus,
                "text": opened.source,
                "context_length": length,
            }
        )
        return
    print(
        f"perplexity {result.perplexity:.3f}, cross-entropy {result.cross_entropy:.4f} nats a token, "
        f"{result.tokens:,} tokens; {opened.source} of {length:,} tokens"
    )


def _in_private(model: str, text: _Text, options: _Private, json: bool) -> None:
    """`--private`; arguments as for `run`."""
    if options.positions is not None and text.sequences is not None:
        raise UserError("--positions and --sequences exclude each other")
    if options.positions is not None and options.positions < 1:
        raise UserError(f"--positions is {options.positions}, at least 1 is needed")
    form = str(parse_for_exact(options.softmax or USUAL_FOR_EXACT, "--softmax"))
    prefix = read_given(options.prefix_file, "the prefix")
    calibration = read_given(options.calibration_text, "the calibration text")
    with secure_engine():
        from entropi.private.compute.folded import load_description
        from entropi.private.compute.settings import Settings
    from entropi.downloads import on_disk
    from entropi.training.loading import open_with_text

    path, protocol = on_disk(model), options.protocol or "ref2k"
    opened = open_with_text(
        path,
        text.corpus,
        None,
        text.sequences,
        text.context_length,
        text.packing,
        all_of_plain_text=True,
        whole=text.whole,
        usual_length=LENGTH,
        tokens=options.positions or POSITIONS,
    )
    blocks, corpus, source = opened.blocks, opened.corpus, opened.source
    length = blocks.shape[1]
    del opened  # gigabytes, of which the private run needs as many again
    with terminated_like_interrupted(), swept_folder("entropi-evaluate-") as temporary:
        _fold(path, temporary)
        refuse_ignored_softmax(options.softmax, load_description(temporary).softmax, "the model")
        wanted = Settings(exact_softmax_as=form, embedding="public")
        settings, found = _measure(temporary, wanted, protocol, blocks, prefix, calibration, quiet=json)

    if json:
        print_json(
            {
                "perplexity": found.plain_perplexity,
                "private_perplexity": found.private_perplexity,
                "change": found.change,
                "same_token": found.same_token,
                "largest_error": found.largest_error,
                "positions": found.positions,
                "protocol": protocol,
                "fraction_bits": settings.fraction_bits,
                "corpus": corpus,
                "text": source,
            }
        )
        return
    how = f"{protocol}, {settings.fraction_bits} fraction bits"
    print(
        f"perplexity {found.private_perplexity:.3f} in private ({how}"
        f") and {found.plain_perplexity:.3f} in float32, {found.change:+.2%}; the likeliest token is the same at "
        f"{found.same_token:.2%} of {found.positions:,} positions, logits differ by at most {found.largest_error:.2g}; "
        f"{source} of {length:,} tokens"
    )


def _fold(path: Path, folder: Path) -> None:
    """Fold a model into a folder, with its tokenizer."""
    import contextlib
    import sys

    from entropi.commands import fold

    with contextlib.redirect_stdout(sys.stderr):
        fold.run(str(path), folder)


def _measure(
    folder: Path,
    wanted: Any,
    protocol: Literal["ref2k", "cheetah"],
    blocks: np.ndarray[Any, Any],
    prefix: str | None,
    calibration: str | None,
    *,
    quiet: bool,
) -> tuple[Any, Accuracy]:
    """The settings that the text allows, and what comes out with them."""
    from entropi.private.compute.accuracy import measure
    from entropi.private.compute.fixed_point import select_fraction_bits
    from entropi.private.compute.folded import load_folded
    from entropi.private.compute.prefix import with_prefix
    from entropi.private.compute.program import compute_on_processor
    from entropi.private.sessions.calibration import calibration_sequences
    from entropi.private.sessions.tokenization import public_ids

    compute_on_processor()
    description, weights = load_folded(folder)
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    ids = public_ids(tokenizer, prefix) if prefix is not None else []
    if len(ids) + blocks.shape[1] > description.positions:
        raise UserError(
            f"{len(ids)} tokens of the prefix and {blocks.shape[1]} more do not fit the model's "
            f"{description.positions} positions"
        )
    text, behind = blocks.tolist(), with_prefix(description, weights, ids)
    looked_at = [*text, *calibration_sequences(tokenizer, description, behind, calibration)]
    settings, _ = select_fraction_bits(description, behind, wanted, looked_at, choose=True)
    del behind
    del weights
    with ProgressLine("in private, %", 100) as line:

        def watch(done: float, so_far: Accuracy | None) -> None:
            found = "" if so_far is None else f"{so_far.same_token:.2%} the same, perplexity {so_far.change:+.2%}"
            line.update(round(100 * done / len(text)), "" if quiet else found)

        return settings, measure(folder, settings, protocol, text, ids, watch)


COMMAND = Command(run, place=3)
