"""Predicted against metered: bytes, messages and seconds of whole passes, on shapes that no price was measured on.

    python benchmarks/cost_prediction.py [--calibration prices.json] [--small]

Every model is run under CHEETAH, both parties as threads of this process, after the engine's set-up. Bytes and messages
do not depend on the machine; seconds mean something only beside prices of this machine, measured shortly before. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import msgspec
import numpy as np

from entropi.costs.calibration import read, shipped
from entropi.costs.network import NETWORKS
from entropi.costs.prediction import CostModel, Options, Predictor, described
from entropi.model.shape import Shape
from entropi.private.compute.engine import Simulation
from entropi.private.compute.program import forward, warm_up
from entropi.private.compute.settings import CLIENT, SERVER, Settings
from entropi.records import PassCost, StageCommunication

GPT2 = dict(hidden_size=768, num_attention_heads=12, vocab_size=2000, softmax="power-3")
SMALL = dict(hidden_size=256, num_attention_heads=4, vocab_size=1500, softmax="power-3")
# name: shape, tokens
PASSES: dict[str, tuple[dict[str, Any], int]] = {
    "SM+LN+G, width 256, 3 layers, 96 tokens": (dict(SMALL, architecture="SM+LN+G", num_hidden_layers=3), 96),
    "SM(t)+ScFuFFN, width 256, 4 layers, 160 tokens": (
        dict(SMALL, architecture="SM(t)+ScFuFFN", num_hidden_layers=4),
        160,
    ),
    "SM+RMS+SwiGLU, rotary, width 256, 2 layers, 64 tokens": (
        dict(
            SMALL,
            architecture="SM+RMS+SwiGLU",
            num_hidden_layers=2,
            num_key_value_heads=2,
            intermediate_size=700,
            position_embedding="rotary",
        ),
        64,
    ),
    "SM+ScFuFFN, GPT-2 small's width, 2 layers, 128 tokens": (
        dict(GPT2, architecture="SM+ScFuFFN", num_hidden_layers=2),
        128,
    ),
    "SM+LN+R, GPT-2 small's width, 1 layer, 128 tokens": (dict(GPT2, architecture="SM+LN+R", num_hidden_layers=1), 128),
}


def metered(shape: Shape, tokens: int) -> list[StageCommunication]:
    """The pass over a prompt, table public, stage by stage."""
    model = described(shape)
    engine = Simulation("cheetah", Settings())
    random = np.random.default_rng(0)
    for name, size in model.weight_shapes().items():
        engine.hold(name, size[0] ** -0.5 * random.standard_normal(size), SERVER)
    stage, inputs = warm_up()
    for name, (size, owner) in inputs.items():
        engine.hold(name, np.zeros(size), SERVER if owner == "server" else CLIENT)
    engine.run(stage)
    engine.hold("embedded", random.normal(size=(tokens, model.hidden_size)), CLIENT)
    found = []
    for stage in forward(model, tokens, 0, "power-8", embedding="public"):
        found.append(engine.run(stage))
        print(f"\r{stage.name:12s} layer {stage.layer}   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="prices of this machine, by entropi cost --calibrate")
    parser.add_argument("--small", action="store_true", help="only the first pass, of a narrower model")
    options = parser.parse_args()
    prices = read(options.calibration.read_bytes(), str(options.calibration)) if options.calibration else None
    prices = prices or shipped("cheetah")
    print(f"prices of {prices.machine}, {prices.measured}")
    print("| pass | MB | predicted | messages | predicted | seconds | predicted | worst operation, bytes |")
    print("|---|---|---|---|---|---|---|---|")
    results = {}
    for name, (fields, tokens) in list(PASSES.items())[: 1 if options.small else None]:
        shape = Shape(**{**fields, **({"hidden_size": 64} if options.small else {})})
        predictor = Predictor(described(shape), CostModel(prices, NETWORKS["lan"], Options(embedding="public")))
        predictor.set_up()
        guess, stages = predictor.run(tokens), metered(shape, tokens)
        # One process has all shares here, so that none is sent to reveal a result.
        guess = PassCost(operations=[one for one in guess.operations if one.name != "reveal"])
        operations: dict[str, float] = {}
        for stage in stages:
            operations[stage.name] = operations.get(stage.name, 0.0) + stage.bytes
        size, messages, seconds = (
            sum(getattr(stage, what) for stage in stages) for what in ("bytes", "messages", "seconds")
        )
        sums = guess.by_operation()
        errors = {key: sums[key].bytes / value - 1 for key, value in operations.items() if value > 10_000}
        worst = max(errors, key=lambda key: abs(errors[key]))
        print(
            f"| {name} | {size / 1e6:.1f} | {guess.bytes / size - 1:+.2%} "
            f"| {messages:,} | {guess.messages / messages - 1:+.2%} "
            f"| {seconds:.1f} | {guess.seconds / seconds - 1:+.0%} | {worst} {errors[worst]:+.2%} |",
            flush=True,
        )
        results[name] = {
            "bytes": size,
            "predicted_bytes": guess.bytes,
            "messages": messages,
            "predicted_messages": guess.messages,
            "seconds": seconds,
            "predicted_seconds": guess.seconds,
            "operations": {key: {"bytes": operations[key], "predicted": sums[key].bytes} for key in operations},
        }
    print(json.dumps({"prices": msgspec.structs.replace(prices, prices={}).machine, "passes": results}))


if __name__ == "__main__":
    main()
