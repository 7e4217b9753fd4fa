"""The table of docs/architectures.md: what each architecture costs before and after folding. Arithmetic, no timing.

python benchmarks/architectures.py            # print it for GPT-2 small, T = 128
python benchmarks/architectures.py --write    # and put it into the document
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from entropi.costs.operations import count
from entropi.model.architectures import FURTHER_ARCHITECTURES, PAPER_ARCHITECTURES
from entropi.model.configuration import EntropiConfig
from entropi.records import CountRecord

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
SEQ_LEN = 128
SHORT = {"softmax": "SM", "powers": "Pow", "layernorm": "LN", "rmsnorm": "RMS"} | {
    "gelu": "G",
    "relu": "R",
    "leaky_relu": "LeakyR",
}


def rows() -> list[tuple[str, CountRecord, CountRecord]]:
    """Name, counts before folding and after, GPT-2 small's sizes; weight norms of one kind differ in nothing."""
    found = []
    for name in (*PAPER_ARCHITECTURES, *FURTHER_ARCHITECTURES):
        config = EntropiConfig(architecture=name)
        found.append((name, count(config, SEQ_LEN), count(config, SEQ_LEN, folded=True)))
    return found


def table() -> str:
    """Markdown. Architectures with the same counts share a line."""
    lines: dict[str, list[str]] = {}
    for name, before, after in rows():
        cells = [f"{before.parameters / 1e6:.1f} M", f"{before.ffn_flops / 1e9:.1f}", _operations(before)]
        cells += [f"{after.parameters / 1e6:.1f} M", f"{after.ffn_flops / 1e9:.1f}", _operations(after)]
        cells += [f"{before.attention_flops / 1e9:.1f}"]
        lines.setdefault(" | ".join(cells), []).append(name)
    titles = ("architecture", "parameters", "FFN GFLOPs", "nonlinear")
    titles += ("folded: numbers", "FFN GFLOPs", "nonlinear", "attention GFLOPs")
    head, rule = f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"
    return "\n".join([head, rule, *(f"| {_names(names)} | {cells} |" for cells, names in lines.items())])


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _operations(record: CountRecord) -> str:
    return ", ".join(
        f"{SHORT.get(c.operation, c.operation)} {c.count} x {c.shape[0]}x{c.shape[1]}" for c in record.nonlinear
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table in docs/architectures.md")
    made = table()
    if parser.parse_args().write:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(re.sub(r"\| architecture \|.*?\n\n", lambda _: made + "\n\n", text, flags=re.S), "utf-8")
    print(made)
    print(json.dumps({name: {"before": b.ffn_flops, "after": a.ffn_flops} for name, b, a in rows()}))


if __name__ == "__main__":
    main()
