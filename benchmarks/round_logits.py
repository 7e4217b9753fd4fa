"""What rounding the logits that a client learns costs in quality, in bytes, and what it takes from an extraction.

    python benchmarks/round_logits.py RUN --write

RUN is a run folder of a trained model. Quality is measured on held-out text from the rounded logits alone: perplexity
of their softmax, and how often the likeliest token is the right one, or the one it was before rounding. Extraction is
the known attack on full logits (Carlini et al. 2024, arXiv 2403.06634): the logits of many prompts span a space of as
many dimensions as the model is wide, which is the output layer up to a linear map. Bytes and seconds are CHEETAH's,
both parties as threads of this machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from entropi.machine import machine
from entropi.private.compute.engine import Simulation
from entropi.private.compute.layers import rounded
from entropi.private.compute.program import Stage
from entropi.private.compute.settings import Settings
from entropi.training.loading import open_with_text
from entropi.training.recipe import CONFIG_FILE, load_recipe

LEVELS = (None, 8, 6, 5, 4, 3, 2, 1, 0)
RESULTS = Path(__file__).parent / "results" / "round_logits.md"


def heldout_logits(run: Path, sequences: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Logits `(N, V)` float64 of held-out text, the tokens `(N,)` that follow, and the model's width."""
    opened = open_with_text(run, "stdlib", None, sequences)
    model, blocks = opened.model, opened.blocks
    found = []
    with torch.no_grad():
        for block in blocks:
            found.append(model(torch.tensor(block[None]).long()).logits[0, :-1].double().numpy())
    return np.concatenate(found), np.asarray(blocks)[:, 1:].reshape(-1), model.config.hidden_size


def at_level(logits: np.ndarray, bits: int | None) -> np.ndarray:
    """What a client learns of the logits."""
    return logits if bits is None else np.floor(logits * 2.0**bits + 0.5) * 2.0**-bits


def quality(logits: np.ndarray, targets: np.ndarray, exact: np.ndarray) -> tuple[float, float, float, float]:
    """Perplexity; shares of rows whose likeliest token is right, and is that of `exact`; of rows with a tie for it."""
    largest = logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0] - logits[np.arange(len(logits)), targets]
    likeliest = logits.argmax(axis=1)
    ties = (logits == largest).sum(axis=1) > 1
    same = likeliest == exact.argmax(axis=1)
    return float(np.exp(losses.mean())), float((likeliest == targets).mean()), float(same.mean()), float(ties.mean())


def extraction(learned: np.ndarray, exact: np.ndarray, width: int) -> tuple[int, float]:
    """The width that half of the logits suggest, and how far the others lie outside the space that those span.

    The width is where neighbouring singular values differ most; the second figure is the root mean square of what the
    space of the true width misses of the other half's exact logits, relative to them.
    """
    half = len(learned) // 2
    _, values, rows = np.linalg.svd(learned[:half], full_matrices=False)
    guess = int(np.argmax(values[: 2 * width] / np.maximum(values[1 : 2 * width + 1], 1e-9))) + 1
    space = rows[:width]
    missed = exact[half:] - (exact[half:] @ space.T) @ space
    return guess, float(np.sqrt(np.square(missed).mean() / np.square(exact[half:]).mean()))


def price(size: int, bits: int) -> tuple[float, float]:
    """Megabytes and seconds of rounding `size` logits."""
    engine = Simulation("cheetah", Settings())
    engine.hold("server's", np.linspace(-20, 20, size, dtype=np.float32), 0)
    engine.hold("client's", np.zeros(size, np.float32), 1)
    engine.run(Stage("add", -1, lambda a, b: a + b, ("server's", "client's"), ("logits",)))
    stage = Stage("round", -1, lambda x: rounded(x, bits=bits), ("logits",), ("logits",))
    engine.run(stage)  # keys and transfers that later ones need no more
    communication = engine.run(stage)
    return communication.bytes / 1e6, communication.seconds


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--sequences", type=int, default=32, help="of held-out text")
    parser.add_argument("--write", action="store_true", help=f"to {RESULTS}")
    given = parser.parse_args()
    recipe = load_recipe(given.run / CONFIG_FILE)
    exact, targets, width = heldout_logits(given.run, given.sequences)
    lines = [
        "| `--round-logits` | step | perplexity | right token | same token | ties | width found | outside the space |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for bits in LEVELS:
        learned = at_level(exact, bits)
        perplexity, right, same, ties = quality(learned, targets, exact)
        guess, missed = extraction(learned, exact, width)
        name, step = ("none", "-") if bits is None else (str(bits), f"{2.0**-bits:g}")
        lines.append(
            f"| {name} | {step} | {perplexity:.3f} | {right:.2%} | {same:.2%} | {ties:.2%} | {guess} | {missed:.2g} |"
        )
        print(lines[-1], flush=True)
    prices = [(size, *price(size, 3)) for size in (exact.shape[1], 50257)]
    told = "; ".join(
        f"{megabytes:.1f} MB and {seconds:.1f} s for {size:,} logits" for size, megabytes, seconds in prices
    )
    text = "\n".join(
        [
            "# Rounded logits",
            "",
            f"Model: {recipe.architecture}, {recipe.layers} layers, width {width}, {recipe.steps} steps, "
            f"{exact.shape[1]:,} tokens; {len(exact):,} held-out tokens of the standard library's source. "
            f"Machine: {machine()}, other work beside it.",
            "",
            *lines,
            "",
            "Right token: the likeliest one is the text's next. Same token: it is the one without rounding, of several "
            "equal ones the first. Ties: rows with several. Width found: where neighbouring singular values of half of "
            "the logits differ most. Outside the space: what the space of those logits, of the true width, misses of "
            "the exact logits of the other half, relative to these.",
            "",
            f"Rounding under CHEETAH: {told}, every token; "
            "oblivious transfers that have to be made meanwhile included.",
            "",
        ]
    )
    if given.write:
        RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
