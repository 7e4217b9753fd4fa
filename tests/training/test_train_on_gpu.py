"""The script that trains rows side by side on a GPU, run dry: it must not turn out to be broken when there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_on_gpu.py"


def ran(*arguments: str | Path) -> dict:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_training_script_runs_dry(tmp_path: Path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text("".join(f"text {number}, line {i * number % 31}\n" for i in range(60)))
    packed = ran("--pack", tmp_path / "tokens.tar.xz", "--corpus", texts, "--vocab-size", "300")
    assert packed["train_tokens"] > packed["heldout_tokens"] > 0

    rows = ["SM+LN+G", "squares of logits", "SM+LN+G, T=1024"]
    options = ["--dry-run", "--compile", "off", "--minutes", "60", "--out", tmp_path / "out.json"]
    results = ran("--tokens", tmp_path / "tokens.tar.xz", *options, "--rows", *rows)
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert [row["row"] for row in results["rows"]] == rows
    trained, squares, timed = results["rows"]
    for row in (trained, squares):
        assert row["heldout_perplexity"] > 1
        assert [step for step, _ in row["curve"]] == [2, 4, 6, 8, 10, 12]
        assert 0 <= row["collapsed"] <= 1
        assert row["refused_updates"] == 0
        assert row["utilisation"] > 0
    assert squares["penalty"]
    assert timed["tokens_per_second"] > 0
    assert "curve" not in timed
