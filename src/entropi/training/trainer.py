"""The transformers Trainer with what entropi models need: entropies observed, scales spared from decay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerControl

from entropi import records
from entropi.training.callbacks import RunRecorder
from entropi.training.evaluation import evaluate_blocks


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Token blocks `(N, T)` as the Trainer wants them; labels are the ids, the model shifts them."""

    def __init__(self, blocks: np.ndarray) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(np.asarray(self.blocks[index], dtype=np.int64))
        return {"input_ids": ids, "labels": ids}


class EntropiTrainer(Trainer):
    """Trains an `EntropiForCausalLM`; its loss already holds the entropy penalty (Algorithm 1)."""

    def __init__(self, *args: Any, recorder: RunRecorder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = recorder

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self.recorder.observe(outputs)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: nothing of ours shows it, and the Trainer would go through all parameters in every step."""
        return 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices only: no decay of biases, gains, slopes, alpha, beta, temperatures and thresholds."""
        spared = {"temperature.parameter", "entropy_regularizer.threshold", "parametrizations.weight.original0"}
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() == 2 and not any(name.endswith(ending) for ending in spared)
        ]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out cross-entropy in float32, recorded with the head entropies."""
        paused_at = self.recorder.pause()
        assert self.model is not None
        assert isinstance(self.eval_dataset, BlockDataset)
        result = evaluate_blocks(self.model, self.eval_dataset.blocks, self.args.per_device_eval_batch_size)
        if self.is_world_process_zero():
            self.recorder.write(
                records.Evaluation(
                    step=self.state.global_step,
                    cross_entropy=result.cross_entropy,
                    perplexity=result.perplexity,
                    tokens=result.tokens,
                    entropy=result.entropy.tolist(),
                )
            )
        self.recorder.resume_clock(paused_at)
        metrics = {"eval_loss": result.cross_entropy, "eval_perplexity": result.perplexity}
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
