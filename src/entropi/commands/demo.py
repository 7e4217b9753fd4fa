"""`entropi demo`: the whole way once, at a small size, with nothing faked.

Trains the baseline and the softmax-only model on the same text, diagnoses both, lets a server process that owns
the weights and a client process that owns the prompt generate under secure two-party computation, compares the
private logits with plaintext ones, and writes the report.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from entropi import record_files, records
from entropi.commands.common import Command, extra, secure_engine
from entropi.console import make_console
from entropi.errors import UserError
from entropi.training.recipe import Recipe

BASELINE = "SM+LN+G"
SOFTMAX_ONLY = "EReg(SM(t)+ScFFN)"  # its two matrices a layer fold away
PROMPT = "    def __init__(self, name, value):\n        self.name ="
NEW_TOKENS = 6
SERVER_START_SECONDS = 120


def recipes(steps: int) -> dict[str, Recipe]:
    """The paper's baseline, and a softmax-only model that is cheap in private.

    It has rotary positions, the softmax kernel of private inference from the start, which is then exact and cheap, and
    a regulariser against collapse alone.
    """
    softmax_only = Recipe(
        architecture=SOFTMAX_ONLY,
        steps=steps,
        position_embedding="rotary",
        softmax="power-2",
        entropy_maximum="causal",
        threshold_init=0.8,
        entropy_weight=4e-5,
    )
    return {BASELINE: Recipe(architecture=BASELINE, steps=steps), SOFTMAX_ONLY: softmax_only}


def run(folder: Path = Path("runs/demo"), steps: int = 600) -> None:
    """Everything once, small and real: train two models, diagnose them, answer a prompt in private, write the report.

    Finished trainings are kept and not repeated.

    Args:
        folder: where the two run folders and the report go
        steps: optimizer updates of each training
    """
    with secure_engine():
        import entropi.private.sessions.client  # noqa: F401
        from entropi.private.wire.versions import engine_version

        engine_version()
    with extra("report"):
        from entropi.report.page import write_report

    console = make_console()
    started = time.monotonic()
    runs = {BASELINE: folder / "baseline", SOFTMAX_ONLY: folder / "softmax-only"}
    for number, (name, recipe) in enumerate(recipes(steps).items(), start=1):
        console.print(f"\n[bold]{number}/4  Train {name}[/bold]")
        _train_and_diagnose(name, recipe, runs[name])

    console.print("\n[bold]3/4  Ask the softmax-only model a question nobody else can read[/bold]")
    answer, comparison = _ask_in_private(runs[SOFTMAX_ONLY])

    console.print("\n[bold]4/4  Report[/bold]")
    report = write_report(list(runs.values()), folder / "report.html")
    _print_summary(runs, answer, comparison, report, time.monotonic() - started)


def _train_and_diagnose(name: str, recipe: Recipe, run: Path) -> None:
    from entropi.report import figures
    from entropi.training.run import train

    train(recipe, run)
    found = last(run, records.DiagnosisRecord)
    figures.write_figure(
        figures.entropy_heatmap(found.entropy, found.max_possible, name, context_length=found.context_length),
        run / "entropy.png",
    )
    perplexity = last(run, records.Evaluation).perplexity
    make_console().print(f"{name}: perplexity {perplexity:.1f}. {found.verdict}", markup=False)


def _ask_in_private(run: Path) -> tuple[records.PrivateRun, records.PlaintextComparison]:
    """Let a server process with the weights and a client process with the prompt generate; compare with plaintext."""
    import numpy as np

    console = make_console()
    logits_file = run / "private_logits.npy"
    console.print("the server's process folds the weights, checks their ranges and starts to listen ...")
    with running_server(run, run / "server.log") as address:
        console.print(f"the client's process asks {address} to continue {PROMPT!r}", markup=False)
        command = ["ask", PROMPT, "--server", address, "--max-new-tokens", str(NEW_TOKENS), "--record", str(run)]
        asked = subprocess.run(
            [sys.executable, "-m", "entropi", *command, "--logits", str(logits_file)], stdout=subprocess.DEVNULL
        )
    if asked.returncode:
        raise UserError(f"the private question failed; the server's log is {run / 'server.log'}")

    answer = last(run, records.PrivateRun)
    comparison = compare_with_plaintext(run, answer, np.load(logits_file))
    record_files.append(run / record_files.RECORDS_FILE, comparison)
    return answer, comparison


def last(run: Path, kind: type[records.R]) -> records.R:
    """The newest record of a kind in a run folder."""
    found = [r for r in record_files.read(run / record_files.RECORDS_FILE) if isinstance(r, kind)]
    if not found:
        raise UserError(f"{run} holds no {kind.__name__} record")
    return found[-1]


@contextlib.contextmanager
def running_server(model: Path, log: Path) -> Iterator[str]:
    """An `entropi serve` process for `model` on a free loopback port; yields its address."""
    with open(log, "wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "entropi", "serve", str(model), "--listen", "127.0.0.1:0"],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        deadline = time.monotonic() + SERVER_START_SECONDS
        while not (match := re.search(r"listening on (\S+:\d+)", log.read_text(encoding="utf-8"))):
            if server.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text(encoding="utf-8").strip().splitlines() or ["no word from it"]
                raise UserError(f"the server did not start: {lines[-1]}")
            time.sleep(0.1)
        yield match[1]
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def compare_with_plaintext(model_path: Path, answer: records.PrivateRun, logits: Any) -> records.PlaintextComparison:
    """Private `logits` (tokens, V) against those of the trained model in the open, on the same tokens."""
    import numpy as np
    import torch

    from entropi.training.loading import open_model

    model, _, _ = open_model(model_path)
    errors, same, plain_tokens = [], [], []
    for index, row in enumerate(logits):
        ids = answer.prompt_tokens + answer.new_tokens[:index]
        with torch.no_grad():
            expected = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        errors.append(float(np.abs(row - expected).max()))
        plain_tokens.append(int(expected.argmax()))
        same.append(plain_tokens[-1] == answer.new_tokens[index])
    return records.PlaintextComparison(max_logit_error=errors, same_top1=same, plaintext_tokens=plain_tokens)


def _print_summary(
    runs: dict[str, Path],
    answer: records.PrivateRun,
    comparison: records.PlaintextComparison,
    report: Path,
    seconds: float,
) -> None:
    print("\nSummary")
    for name, run in runs.items():
        shares = last(run, records.DiagnosisRecord).quartile_shares
        print(
            f"  {name:22} perplexity {last(run, records.Evaluation).perplexity:6.1f}   "
            f"heads overloaded {shares[3]:4.0%}, collapsed {shares[0]:4.0%}"
        )
    agree = sum(comparison.same_top1)
    print(f"  asked in private       {answer.prompt!r}")
    print(f"  answered               {answer.new_text!r}")
    print(
        f"  traffic                {answer.bytes / 1e6:.0f} MB both directions, {answer.messages:,} "
        f"messages, {answer.seconds:.0f} s for {len(answer.new_tokens)} tokens"
    )
    print(
        f"  against plaintext      largest logit error {max(comparison.max_logit_error):.4f}, "
        f"same top token {agree} of {len(comparison.same_top1)}"
    )
    print(f"  report                 {report}   ({seconds:.0f} s in all)")


COMMAND = Command(run, place=1)
