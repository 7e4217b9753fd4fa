"""A trained model under lm-evaluation-harness, offline: a program that knows nothing of this package."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entropi.training.loading import open_model
from entropi.training.recipe import Recipe
from entropi.training.run import train

SOURCES = Path(__file__).parents[2] / "src"
TEXTS = [
    "def area(width, height):\n    return width * height\n",
    "for name in names:\n    print(name, end='\\n')\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n" * 8,  # longer than the context
]
TASK = """\
task: local_code
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
"""


@pytest.mark.slow
def test_perplexity_of_a_local_task(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROPI_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for number in range(12):
        (tmp_path / "corpus" / f"{number}.py").write_text("\n".join(TEXTS) * 30 + f"# {number}\n")
    recipe = Recipe(
        architecture="SM(t)+ScFuFFN",
        corpus=str(tmp_path / "corpus"),
        vocab_size=300,
        context_length=64,
        layers=2,
        heads=2,
        hidden_size=32,
        steps=20,
        batch_size=4,
        precision="fp32",
        softmax="power-4",
    )
    folder = train(recipe, tmp_path / "run")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "local_code.yaml").write_text(TASK.format(file=tmp_path / "text.jsonl"))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "local_code"),
            *("--model_args", f"pretrained={folder},trust_remote_code=True,max_length=64"),
            *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "results")),
            *("--device", "cpu", "--batch_size", "2"),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(SOURCES),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
        },
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "results").rglob("results_*.json")
    measured = json.loads(results.read_text())["results"]["local_code"]["byte_perplexity,none"]
    assert measured == pytest.approx(byte_perplexity(folder), rel=1e-4)


def byte_perplexity(folder: Path) -> float:
    """The same by hand: every token once, the first after the end of text, windows of the context's length."""
    model, tokenizer, _ = open_model(folder)
    nats, length = 0.0, 0
    for text in TEXTS:
        ids = [0, *tokenizer.encode(text).ids]
        length += len(text.encode())
        for start in range(0, len(ids) - 1, 64):
            window = torch.tensor(ids[: start + 65][-65:] if start + 65 > len(ids) else ids[start : start + 65])
            fresh = min(64, len(ids) - 1 - start)  # the last window reaches back to be full; only its end counts
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
            nats += float(losses[-fresh:].double().sum())
    return math.exp(nats / length)
