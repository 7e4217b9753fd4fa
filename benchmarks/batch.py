"""Several prompts a session against one at a time, over a line of limited speed and added delay: two processes.

    python benchmarks/batch.py [--prompts 8] [--tokens 16] [--new-tokens 5] [--repeats 3] [--line wan] [--write]

A model with random weights, softmax-only with squares of logits, is served with TLS through `SlowLine`. Sessions of one
prompt and of several alternate; medians are told, beside the prediction of `entropi cost` for the same sizes. Answers
have all their tokens, whatever they are. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from entropi.costs.prediction import CostModel
from entropi.machine import machine
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.shape import read_shape
from entropi.private import Privacy, Tls, connect
from entropi.records import PassCost, PrivateRun
from network import LINES, SlowLine, tls_server
from prepared import prompt_of

RESULTS = Path(__file__).parent / "results" / "batch.md"
NAME, LAYERS, WIDTH, HEADS, ENTRIES, POSITIONS = "SM(t)+ScFuFFN", 2, 128, 4, 1000, 128


def random_model(folder: Path) -> None:
    """A model with the weights that training begins with, and a tokenizer of as many entries: a byte is a token."""
    config = EntropiConfig(
        architecture=NAME,
        softmax="polynomial-1",
        vocab_size=ENTRIES,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
    )
    EntropiForCausalLM(config).eval().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = alphabet + [f"<{number}>" for number in range(ENTRIES - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def ask(address: str, tls: Tls, prompts: list[str], new_tokens: int) -> dict[str, float]:
    """One session: its seconds, those of its passes, and what was moved."""
    started = time.monotonic()
    privacy = Privacy(full_length=True)
    answers = connect(address, tls).ask_batch(prompts, new_tokens, privacy=privacy)
    seconds, run = time.monotonic() - started, answers[-1].record
    assert sum(len(answer.record.new_tokens) for answer in answers) == len(prompts) * new_tokens
    further = [stage for stage in run.stages if stage.token]
    return {
        "seconds": seconds,
        "set_up": run.setup_seconds,
        "prompt": sum(stage.seconds for stage in run.stages if not stage.token),
        "further": statistics.median(pass_seconds(run)),
        "prompt_mb": sum(stage.bytes for stage in run.stages if not stage.token) / 1e6,
        "further_mb": sum(stage.bytes for stage in further) / 1e6 / (new_tokens - 1),
        "mb": run.bytes / 1e6,
        "tokens_a_minute": 60 * len(prompts) * new_tokens / seconds,
        "further_tokens_a_minute": 60 * len(prompts) / statistics.median(pass_seconds(run)),
    }


def pass_seconds(run: PrivateRun) -> list[float]:
    """Of every pass over a further token."""
    tokens = sorted({stage.token for stage in run.stages if stage.token})
    return [sum(stage.seconds for stage in run.stages if stage.token == token) for token in tokens]


def sums(cost: PassCost | None) -> dict[str, float]:
    assert cost is not None
    return {name: round(getattr(cost, name), 3) for name in ("bytes", "rounds", "seconds", "latency")}


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Medians of sessions of one prompt and of several, by turns, and the prediction."""
    found: dict[str, list[dict[str, float]]] = {"one": [], "several": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random_model(folder / "model")
        text = prompt_of(given.tokens, folder / "model")
        prompts = [text[number:] + text[:number] for number in range(given.prompts)]  # as many tokens in each
        options = ["--embedding", "public", "--self-test", "none", "--batch-prompts", given.prompts]
        with tls_server(folder / "model", folder, *options) as (address, _, tls):
            line = SlowLine(address, LINES[given.line])
            for number in range(given.repeats):
                for name, asked in (("one", [prompts[number % len(prompts)]]), ("several", prompts)):
                    one = ask(line.address, tls, asked, given.new_tokens)
                    found[name].append(one)
                    print(name, json.dumps({key: round(value, 2) for key, value in one.items()}), flush=True)
            line.close()
        costs = CostModel.shipped(network=given.line)
        costs = replace(costs, options=replace(costs.options, embedding="public"))
        predicted = costs.predict(read_shape(folder / "model"), given.tokens, prompts=given.prompts)
    assert predicted.batch is not None
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }
    return {
        "machine": machine(),
        **{name: getattr(given, name) for name in ("prompts", "tokens", "new_tokens", "repeats", "line")},
        "measured": medians,
        "predicted": {
            "one": {"prompt": sums(predicted.prompt), "further": sums(predicted.further)},
            "several": {"prompt": sums(predicted.batch.prompt), "further": sums(predicted.batch.further)},
        },
    }


def table(result: dict[str, Any]) -> str:
    """Rows of what was measured and predicted."""
    one, several = (result["measured"][name] for name in ("one", "several"))
    guess, count = result["predicted"], result["prompts"]
    rows = [
        f"| | 1 prompt | {count} prompts | by prediction |",
        "|---|---|---|---|",
        f"| set-up, s | {one['set_up']:.1f} | {several['set_up']:.1f} | |",
    ]
    for part, words in (("prompt", "pass over the prompts"), ("further", "a further token of each")):
        seconds = [guess[name][part]["latency"] for name in ("one", "several")]
        size = [guess[name][part]["bytes"] / 1e6 for name in ("one", "several")]
        rows.append(f"| {words}, s | {one[part]:.1f} | {several[part]:.1f} | {seconds[0]:.1f} and {seconds[1]:.1f} |")
        rows.append(
            f"| {words}, MB | {one[part + '_mb']:.2f} | {several[part + '_mb']:.2f} | {size[0]:.2f} and {size[1]:.2f} |"
        )
    rows += [f"| session, s | {one['seconds']:.1f} | {several['seconds']:.1f} | |"]
    for key, words in (("further_tokens_a_minute", "tokens a minute, further ones"), ("tokens_a_minute", "in all")):
        ratio = several[key] / one[key]
        rows.append(f"| {words} | {one[key]:.1f} | {several[key]:.1f} ({ratio:.1f} times) | |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of each prompt")
    parser.add_argument("--new-tokens", type=int, default=5, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--line", choices=LINES, default="wan")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results/batch.md")
    given = parser.parse_args()
    result = measure(given)
    print(table(result))
    if given.write:
        RESULTS.write_text(f"{given.prompts} prompts of {given.tokens} tokens, {machine()}\n\n{table(result)}\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
