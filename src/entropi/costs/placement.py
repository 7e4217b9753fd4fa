"""Trained models by what a private prompt is predicted to cost and by their measured perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from entropi.costs.prediction import CostModel
from entropi.model.shape import Shape


@dataclass(frozen=True)
class Placed:
    """A model by its two figures."""

    megabytes: float  # predicted, of the pass over the prompt
    perplexity: float
    kernel: str  # what the prediction is for, in words
    kernel_label: str


def place(models: Mapping[str, tuple[Shape, float]], seq_len: int, costs: CostModel) -> dict[str, Placed]:
    """Shapes and measured perplexities with predicted bytes, by name; a prompt has at most a model's own length."""
    placed = {}
    for name, (shape, perplexity) in models.items():
        prediction = costs.predict(shape, min(seq_len, shape.max_position_embeddings))
        placed[name] = Placed(prediction.prompt.bytes / 1e6, perplexity, prediction.kernel, prediction.kernel_label)
    return placed
