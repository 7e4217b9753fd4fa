"""torch.compile for the parts of a model that training spends its time in."""

from __future__ import annotations

from typing import Any

import torch

from entropi.model.decoder import EntropiForCausalLM


def compile_parts(model: EntropiForCausalLM, backend: str = "inductor") -> None:
    """Compile every layer, the loss and the regulariser, in place; names of parameters stay.

    All layers have the same code and so share one compiled graph: a model of any depth compiles as fast as one layer.
    Whole graphs only: a part that cannot be compiled in one piece is an error, not a slow run.
    """
    options: dict[str, Any] = {"backend": backend, "dynamic": False, "fullgraph": True}
    for block in model.model.blocks:
        block.compile(**options)
    model.loss_function = torch.compile(model.loss_function, **options)
    if model.entropy_regularizer is not None:
        model.entropy_regularizer.compile(**options)
