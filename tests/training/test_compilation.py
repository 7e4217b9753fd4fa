"""torch.compile for training: one graph for all layers, the same training, and nothing compiled for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from entropi import record_files, records
from entropi.model.decoder import EntropiForCausalLM
from entropi.training import build, run
from entropi.training.compilation import compile_parts
from entropi.training.evaluation import evaluate_blocks
from entropi.training.recipe import Recipe

SETTINGS: dict[str, dict[str, Any]] = {
    "SM+LN+G": {"architecture": "SM+LN+G"},
    "regularised": {},
    "rotary, t=2": {"position_embedding": "rotary", "softmax": "power-2"},
    "squares": {"softmax": "polynomial-1"},
}


def a_step(model: EntropiForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, num_items_in_batch=torch.tensor(ids[:, 1:].numel()), return_logits=False).loss
    loss.backward()
    return loss.detach()


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_model_of_any_depth_is_a_few_whole_graphs(settings: dict[str, Any]):
    recipe = Recipe(layers=3, hidden_size=32, heads=2, context_length=16, **settings)
    torch._dynamo.reset()
    counters.clear()
    ids = torch.arange(64).reshape(4, 16)
    model = EntropiForCausalLM(build.model_config(recipe, 300)).train()
    plain = EntropiForCausalLM(model.config).train()
    plain.load_state_dict(model.state_dict())
    compile_parts(model, "aot_eager")
    losses = [a_step(model, ids) for _ in range(2)]
    # The layer, the loss, and the regulariser where there is one; whole, or there would have been an error.
    assert counters["stats"]["unique_graphs"] == 2 + (model.entropy_regularizer is not None)
    torch.testing.assert_close(losses[0], a_step(plain, ids), rtol=1e-3, atol=0)
    assert all(
        torch.allclose(p.grad, 2 * q.grad, rtol=0.05, atol=0.05 * float(q.grad.abs().max()))
        for p, q in zip(model.parameters(), plain.parameters())
        if p.grad is not None and q.grad is not None
    )
    evaluate_blocks(model, ids.numpy())
    assert counters["stats"]["unique_graphs"] == 2 + (model.entropy_regularizer is not None)


@pytest.mark.slow
def test_compiled_training_is_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = "".join(f"line {i} says {i * i % 97}\n" for i in range(2000))
    (tmp_path / "text.txt").write_text(text)
    monkeypatch.setattr(run, "compile_parts", lambda model: compile_parts(model, "aot_eager"))
    torch._dynamo.reset()
    curves = []
    for compiled in (False, True):
        recipe = Recipe(
            corpus=str(tmp_path / "text.txt"),
            vocab_size=300,
            context_length=16,
            layers=2,
            heads=2,
            hidden_size=16,
            batch_size=4,
            steps=4,
            log_every=1,
            save_every=2,
            precision="fp32",
            compile=compiled,
        )
        folder = tmp_path / str(compiled)
        run.train(recipe, folder)
        found = [r for r in record_files.read(folder / "records.jsonl") if isinstance(r, records.TrainingStep)]
        curves.append([r.cross_entropy for r in found])
    assert len(curves[0]) == 4
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
