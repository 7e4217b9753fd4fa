"""Shapes and folders that costs are predicted for."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

from entropi import record_files, records
from entropi.model.shape import Shape

SMALL = Shape(vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)


GPT2_XL = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25, "n_positions": 1024}


PYTHIA = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
}


LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
}


def written(config: dict, folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_folder(folder: Path, perplexity: float, architecture: str) -> Path:
    """What `entropi cost` reads of a trained run: its model's configuration and its evaluation."""
    (folder / "model").mkdir(parents=True)
    config = {**asdict(replace(SMALL, architecture=architecture)), "model_type": "entropi"}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    entropy = [[1.0] * 4] * 2
    loss = math.log(perplexity)
    evaluation = records.Evaluation(step=1, cross_entropy=loss, perplexity=perplexity, tokens=10, entropy=entropy)
    record_files.append(folder / record_files.RECORDS_FILE, evaluation)
    return folder
