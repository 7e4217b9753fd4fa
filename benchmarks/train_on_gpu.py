"""Architectures side by side at GPT-2 small's real shape on one GPU, for so many seconds each: loss, speed, heads.

    python benchmarks/train_on_gpu.py --pack tokens.tar.xz [--corpus site-packages] [--train-tokens 24e6]
    python benchmarks/train_on_gpu.py --tokens tokens.tar.xz [--seconds-per-row 20] [--minutes 4] [--dry-run]

The first command writes a corpus as tokens, or documents from all over it where it is larger than asked for, into one
file that can be taken to a machine without network. The second one trains every row through the product's own
recipes and trainer, 12 layers, 12 heads, width 768, with Muon, and needs torch with CUDA, transformers and msgspec, no
installation. All rows compile side by side before the first is timed (`--no-warm` leaves that to each). A row is timed
for a few steps, without learning, then trained for as many as the seconds allow; a row that diverges says in which
step. Results are written to `--out` after every row, so that nothing is lost when time ends; the last line is JSON.

Model FLOP/s utilisation is tokens/s * (6 N + 6 L T d) / 989e12: N weights of matrix products, the head's included, of
which each costs 6 operations a token forward and backward; the second term is attention's two products under a causal
mask; 989e12 is an H100's peak in dense bfloat16. Muon's own products are not counted.

`--dry-run` does all of it at toy sizes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

import numpy as np  # noqa: E402

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from entropi.data.corpus import Document

PEAK = 989e12
HELDOUT_TOKENS = 400_000
CHARACTERS = 4.0  # a token, about
LEARN_CHARACTERS = 12_000_000  # that the tokenizer is learnt from
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 1, "lc": 0, "lp": 1, "pb": 1}]  # two bytes a token
SECONDS_AROUND = 20  # that a row needs beside its training: timing, held-out text, saving
TRIAL_STEPS = 16
WARM_SECONDS, WARM_AT_ONCE = 100, 6  # as many rows as fit into the GPU's memory

SOFTMAX_ONLY: dict[str, Any] = {  # configs/softmax_only.yaml
    "architecture": "EReg(SM(t)+ScFuFFN)",
    "position_embedding": "rotary",
    "softmax": "power-2",
    "entropy_maximum": "causal",
    "threshold_init": 0.8,
}
# "per" is the batch that the weight of the regulariser's sum over rows belongs to; it is converted.
ROWS: dict[str, dict[str, Any]] = {
    "SM+LN+G": {"architecture": "SM+LN+G"},
    "softmax-only, t=2": {**SOFTMAX_ONLY, "entropy_weight": 8e-5, "per": 16},
    "EReg(SM(t)+ScFuFFN)": {"architecture": "EReg(SM(t)+ScFuFFN)", "entropy_weight": 1e-5, "per": 128},
    "squares of logits": {**SOFTMAX_ONLY, "softmax": "polynomial-1", "entropy_weight": 8e-5, "per": 16},
    "SM, bf16": {"architecture": "SM"},
    "SM, fp16": {"architecture": "SM", "precision": "fp16"},
    "SM+LN+G, T=1024": {"architecture": "SM+LN+G", "context_length": 1024, "speed_only": True},
}


def sample(streams: list[Any], share: float) -> Iterator[tuple[np.ndarray, int]]:
    """That share of the documents, spread over all, and the first; their characters are not known."""
    from entropi.data.shards import open_stream
    from entropi.data.split import position

    number = 0
    for stream in streams:
        ids, start = open_stream(stream.path), 0
        for end in stream.ends.tolist():
            if position(str(number)) < share or number == 0:
                yield np.asarray(ids[start : end + 1]), 0
            start, number = end + 1, number + 1


def write_tokens(
    folder: Path, name: str, source: str, tokenizer: Tokenizer, parts: dict[str, Iterator[tuple[np.ndarray, int]]]
) -> Any:
    """A folder of shards, as `--corpus` takes it, of documents that are tokens already; returns its manifest."""
    from entropi.data import shards
    from entropi.data.prepare import TOKENIZER_FILE
    from entropi.data.tokenizer import end_of_text_id, tokenizer_hash

    folder.mkdir(parents=True)
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8")
    end = end_of_text_id(tokenizer)
    manifest = shards.Manifest(name=name, source=source, tokenizer=tokenizer_hash(tokenizer), end_of_text=end)
    for part, documents in parts.items():
        found = manifest.parts[part] = shards.Part(complete=True)
        while shard := shards.write_shard(folder, f"{part}-{len(found.shards):05}", documents, np.uint16):
            found.shards.append(shard)
    shards.save_manifest(folder, manifest)
    return manifest


def spread(documents: Collection[Document], characters: float, salt: str = "") -> list[Document]:
    """About so many characters of the documents, taken from all over them."""
    from entropi.data.split import position

    share = characters / max(1, sum(len(document.text) for document in documents))
    return [document for document in documents if position(salt + document.path) < share]


def pack(file: Path, corpus: str, vocab_size: int, tokens: float) -> dict[str, Any]:
    """Write about so many tokens of a corpus, and some of its held-out part, into one compressed file."""
    from entropi.console import make_console
    from entropi.data.corpus import Corpus, load_corpus
    from entropi.data.prepare import encoded
    from entropi.data.site_packages import SITE_PACKAGES, load_site_packages
    from entropi.data.tokenizer import train_tokenizer

    texts = load_site_packages(console=make_console()) if corpus == SITE_PACKAGES else load_corpus(corpus)
    train, heldout = spread(texts.train, CHARACTERS * tokens), spread(texts.heldout, CHARACTERS * HELDOUT_TOKENS)
    learnt_from = spread(train, LEARN_CHARACTERS, "tokenizer") or train
    tokenizer = train_tokenizer(Corpus(texts.name, learnt_from, [], ""), vocab_size)
    if tokenizer.get_vocab_size() > 1 << 16:
        raise SystemExit("a token has to fit into two bytes: take a smaller vocabulary")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "tokens")
        parts = {name: encoded(part, tokenizer) for name, part in (("train", train), ("held-out", heldout or train))}
        manifest = write_tokens(folder, texts.name, texts.content_hash, tokenizer, parts)
        with lzma.open(file, "wb", filters=FILTERS) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            tar.add(folder, "tokens")
    return {
        "file": str(file),
        "megabytes": file.stat().st_size / 1e6,
        "vocabulary": tokenizer.get_vocab_size(),
        "characters": sum(len(document.text) for document in train),
        "characters_of_the_corpus": sum(len(document.text) for document in texts.train),
        "train_tokens": manifest.parts["train"].tokens,
        "heldout_tokens": manifest.parts["held-out"].tokens,
    }


def unpack(file: Path, folder: Path) -> None:
    """The tokens of a packed file as `folder/tokens`, and a few of them, for the trials, as `folder/few`."""
    from entropi.data.prepare import prepare

    with tarfile.open(file, "r:xz") as tar:
        tar.extractall(folder, filter="data")
    prepared = prepare(str(folder / "tokens"), 0, 16)
    packed = prepared.packed
    parts = {
        "train": sample(packed.train.streams, 4e6 / packed.train_tokens),
        "held-out": sample(packed.heldout.streams, 0.2),
    }
    write_tokens(folder / "few", prepared.corpus.name, prepared.corpus.content_hash, prepared.tokenizer, parts)


def make_row(name: str, options: argparse.Namespace, tokens: Path) -> tuple[Any, bool]:
    """The recipe of a row but its steps, and whether only its speed is asked for."""
    from entropi.training.recipe import Recipe

    settings = dict(ROWS[name])
    speed_only, per = settings.pop("speed_only", False), settings.pop("per", None)
    if options.dry_run:
        sizes: dict[str, Any] = {"layers": 2, "heads": 2, "hidden_size": 32, "batch_size": 4, "context_length": 16}
        precision = "fp32"  # a CPU has no fp16
        if "context_length" in settings:
            settings["context_length"] = 32
    else:
        length = settings.get("context_length", 128)
        sizes = {"layers": 12, "heads": 12, "hidden_size": 768, "context_length": length}
        sizes["batch_size"] = max(1, options.batch * 128 // length)
        precision = "bf16"
    settings = {"precision": precision, **sizes, **settings}
    if options.dry_run:
        settings["precision"] = precision
    if per is not None:
        settings["entropy_weight"] *= per / settings["batch_size"]
    recipe = Recipe(
        corpus=str(tokens),
        optimizer="muon",
        learning_rate=options.learning_rate,
        warmup=0.1,
        schedule="linear",
        compile=options.compile == "on",
        evaluate_every=0,
        save_every=0,
        steps=TRIAL_STEPS,
        **settings,
    )
    return recipe, speed_only


def read_speed(folder: Path) -> float:
    """Median tokens/s of the later half of a run's records."""
    from entropi import record_files, records

    found = [r for r in record_files.read(folder / record_files.RECORDS_FILE) if isinstance(r, records.TrainingStep)]
    return statistics.median(r.tokens_per_second for r in found[len(found) // 2 :])


def try_row(name: str, options: argparse.Namespace, data: Path, scratch: Path) -> float:
    """Tokens/s of a few steps that change nothing: the row compiles, and its speed becomes known."""
    from entropi.training.run import train

    recipe, _ = make_row(name, options, data / "few")
    folder = Path(tempfile.mkdtemp(dir=scratch)) / "trial"
    train(replace(recipe, learning_rate=1e-9, log_every=4, nonfinite="skip"), folder)
    return read_speed(folder)


def run_row(name: str, options: argparse.Namespace, data: Path, scratch: Path) -> dict[str, Any]:
    """Time a row, train it, and say what came of it."""
    import torch

    from entropi.errors import UserError
    from entropi.training.run import train

    began = time.monotonic()
    speed = try_row(name, options, data, scratch)
    recipe, speed_only = make_row(name, options, data / "tokens")
    a_step = recipe.batch_size * recipe.context_length
    found: dict[str, Any] = {"row": name, "batch": recipe.batch_size, "length": recipe.context_length}
    found |= {"seconds_of_the_trial": time.monotonic() - began, "tokens_per_second": speed}
    if torch.cuda.is_available():
        found["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    if not speed_only:
        steps = max(10, round(options.seconds_per_row * speed / a_step)) if not options.dry_run else 12
        recipe = replace(recipe, steps=steps, log_every=max(2, steps // 40), entropy_every=max(5, steps // 8))
        folder = Path(tempfile.mkdtemp(dir=scratch)) / "run"
        began = time.monotonic()
        try:
            train(recipe, folder)
        except UserError as error:  # it diverged, most likely
            found["stopped"] = str(error)
        found |= {"seconds": time.monotonic() - began, "steps": steps, "tokens": steps * a_step} | outcome(folder)
    weights = matrix_weights(recipe, data)
    attention = 6 * recipe.layers * recipe.context_length * recipe.hidden_size
    found["utilisation"] = found["tokens_per_second"] * (6 * weights + attention) / PEAK
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """What the records of a run say: curve, speed, held-out perplexity, heads, and where it diverged."""
    from entropi import record_files, records

    found: dict[str, Any] = {}
    read = list(record_files.read(folder / record_files.RECORDS_FILE))
    curve = [r for r in read if isinstance(r, records.TrainingStep)]
    found["curve"] = [(r.step, r.cross_entropy) for r in curve]
    found["penalty"] = [(r.step, r.entropy_penalty) for r in curve if r.entropy_penalty is not None]
    if curve:
        found["tokens_per_second"] = read_speed(folder)
    for record in read:
        if isinstance(record, records.Evaluation):
            found |= {"heldout_perplexity": record.perplexity, "heldout_tokens": record.tokens}
        if isinstance(record, records.DiagnosisRecord):
            shares = record.quartile_shares
            found |= {"collapsed": shares[0], "overloaded": shares[3], "verdict": record.verdict}
        if isinstance(record, records.EntropySnapshot):
            found["entropy_of_layers"] = [sum(heads) / len(heads) for heads in record.entropy]
    refused = [r for r in read if isinstance(r, records.SkippedUpdate)]
    found |= {"refused_updates": len(refused), "last_refused": refused[-1].reason if refused else None}
    return found


def matrix_weights(recipe: Any, data: Path) -> int:
    """How many weights take part in matrix products: those of the layers, and the head."""
    import torch

    from entropi.data.tokenizer import load_tokenizer
    from entropi.model.decoder import EntropiForCausalLM
    from entropi.training.build import model_config

    vocabulary = load_tokenizer(str(data / "tokens")).get_vocab_size()
    with torch.device("meta"):
        model = EntropiForCausalLM(model_config(recipe, vocabulary))
    of_layers = {n: p for n, p in model.named_parameters() if ".blocks." in n and n.endswith("weight") and p.dim() == 2}
    return sum(p.numel() for p in of_layers.values()) + vocabulary * recipe.hidden_size


def warm(options: argparse.Namespace, data: Path) -> dict[str, float]:
    """Compile all rows side by side, a process each: what one has compiled, the next finds in the caches on disk."""
    began = time.monotonic()
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "3", "OMP_NUM_THREADS": "2"}
    command = [
        sys.executable,
        __file__,
        "--data",
        str(data),
        "--compile",
        options.compile,
        "--batch",
        str(options.batch),
    ]
    command += ["--dry-run"] * options.dry_run

    def compile_one(name: str) -> float:
        left = max(1.0, WARM_SECONDS - (time.monotonic() - began))
        try:
            done = subprocess.run([*command, "--warm-row", name], env=environment, capture_output=True, timeout=left)
            if done.returncode:
                print(f"{name}, compiling ahead: {done.stderr.decode()[-1500:]}", file=sys.stderr)
        except subprocess.TimeoutExpired:
            print(f"{name}, compiling ahead: took longer than {left:.0f} s", file=sys.stderr)
        return time.monotonic() - began

    with ThreadPoolExecutor(1 if options.dry_run else WARM_AT_ONCE) as workers:
        return dict(zip(options.rows, workers.map(compile_one, options.rows)))


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in found:
        return f"{found['row']:20} FAILED: {found['error'].splitlines()[-1][:200]}"
    cells = [f"{found['tokens_per_second']:10,.0f} tokens/s", f"{found['utilisation']:6.1%}"]
    cells.append(f"{found.get('peak_gigabytes', 0):5.1f} GB")
    if "heldout_perplexity" in found:
        cells.append(f"{found['tokens'] / 1e6:6.1f} M tokens, perplexity {found['heldout_perplexity']:.2f}")
    if "overloaded" in found:
        cells.append(f"collapsed {found['collapsed']:.0%}, overloaded {found['overloaded']:.0%}")
    if "stopped" in found:
        cells.append(found["stopped"].split(";")[0])
    return f"{found['row']:20} {'  '.join(cells)}"


def run_all(options: argparse.Namespace, data: Path, scratch: Path, began: float) -> dict[str, Any]:
    """All rows that time allows, with the results so far in a file after each."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "rows": []}
    results["compile"] = options.compile
    if options.warm:
        results["warm_seconds"] = warm(options, data)
        print(f"compiled ahead in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    for name in options.rows:
        needed = SECONDS_AROUND + options.seconds_per_row * (not ROWS[name].get("speed_only", False))
        if time.monotonic() - began + needed > 60 * options.minutes:
            print(f"{name}: no time left", file=sys.stderr)
            continue
        try:
            found = run_row(name, options, data, scratch)
        except Exception as error:  # whatever it is, the other rows are worth having
            found = {"row": name, "error": f"{type(error).__name__}: {error}"}
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        results["rows"].append(found)
        results["seconds"] = time.monotonic() - began
        print(line(found), flush=True)
        if options.out:
            options.out.write_text(json.dumps(results))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write the tokens of a corpus, and train nothing")
    parser.add_argument("--corpus", default="site-packages")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--train-tokens", type=float, default=24e6, help="of the training part that --pack writes")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="what --pack wrote")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seconds-per-row", type=float, default=20.0)
    parser.add_argument("--minutes", type=float, default=4.0, help="of all rows together")
    parser.add_argument("--batch", type=int, default=256, help="sequences of 128 tokens an update")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--compile", choices=("on", "off"), default="on")
    parser.add_argument("--warm", action=argparse.BooleanOptionalAction, default=True, help="compile all rows ahead")
    parser.add_argument("--out", type=Path, help="a file for the results so far")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--warm-row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    began = time.monotonic()
    if options.pack:
        print(json.dumps(pack(options.pack, options.corpus, options.vocab_size, options.train_tokens)))
        return 0
    if not options.tokens and not options.data:
        parser.error("give --pack FILE or --tokens FILE")
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device: --dry-run checks the script without one", file=sys.stderr)
        return 2
    memory = Path("/dev/shm")  # checkpoints of a gigabyte: a disk would take seconds
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        if options.warm_row:
            try_row(options.warm_row, options, options.data, Path(scratch))
            return 0
        data = Path(scratch)
        unpack(options.tokens, data)
        print(f"unpacked in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        results = run_all(options, data, data, began)
    print("\n".join(["", *map(line, results["rows"])]))
    print(json.dumps(results))
    return int(any("error" in row for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
