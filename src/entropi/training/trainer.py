"""The transformers Trainer with what entropi models need: entropies observed, scales spared, states made whole."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerControl

from entropi import records
from entropi.data.shards import Blocks
from entropi.errors import UserError
from entropi.training.callbacks import RunRecorder, removed_on_failure
from entropi.training.distributed import (
    full_optimizer_state,
    full_state_dict,
    full_tensor,
    is_sharded,
    sharded_optimizer_state,
)
from entropi.training.evaluation import evaluate_blocks
from entropi.training.optimizers import MuonWithAdamW

OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"


class BlockDataset(Dataset[dict[str, Tensor]]):
    """The first `length` token blocks `(N, T)` as the Trainer wants them; labels are the ids, the model shifts them."""

    def __init__(self, blocks: Blocks | np.ndarray, length: int | None = None) -> None:
        self.blocks, self.length = blocks, len(blocks) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(np.asarray(self.blocks[index], dtype=np.int64))
        return {"input_ids": ids, "labels": ids}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """A whole batch at once; torch's loader asks for it where a data set has this method."""
        ids = torch.from_numpy(np.stack([self.blocks[index] for index in indices]).astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def _as_made(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `BlockDataset` returns for a batch is one already."""
    return batch


class EntropiTrainer(Trainer):
    """Trains an `EntropiForCausalLM`; its loss already holds the entropy penalty (Algorithm 1).

    Checkpoints are those of a run in one process, whatever the number of processes and whether the model is sharded
    between them: weights and optimizer state whole, in the order of the parameters.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self, *args: Any, recorder: RunRecorder, muon: bool = False, scalars: Collection[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, data_collator=_as_made, **kwargs)
        if self.model is not None and is_sharded(self.model):
            # With this the Trainer neither wraps a model nor shards it again. Set by the model itself it would also
            # make the Trainer refuse checkpoints, which it cannot write of such models; they are written below.
            if not hasattr(self, "is_distributed_loading_by_transformers"):
                raise UserError("this transformers cannot train a model that is sharded already: take a newer one")
            self.is_distributed_loading_by_transformers = True
        self.recorder, self.muon = recorder, muon
        self.scalars = scalars  # names of the parameters that are one number in a model that is not sharded

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if model.training and not return_outputs:  # under autocast accelerate would copy the logits to float32
            inputs = {**inputs, "return_logits": False}
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or Muon for the matrices of the layers; embeddings and what is no matrix stay with AdamW."""
        if not self.muon or self.optimizer is not None:
            return super().create_optimizer(model)
        model = model or self.model
        assert model is not None
        decayed = set(self.get_decay_parameter_names(model))
        hidden = {name for name in decayed if ".blocks." in name}
        named = dict(model.named_parameters())
        matrices = [{"params": [p for n, p in named.items() if n in hidden], "weight_decay": self.args.weight_decay}]
        others = [
            {"params": [p for n, p in named.items() if n in decayed - hidden], "weight_decay": self.args.weight_decay},
            {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        ]
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        made = self.optimizer = MuonWithAdamW(matrices, others, lr=self.args.learning_rate, betas=betas)
        return made

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._norm_of_gradients(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._norm_of_gradients(model) if grad_norm is None else grad_norm

    def _norm_of_gradients(self, model: nn.Module, largest: float | None = None) -> Tensor:
        """The norm of all gradients, which are clipped to `largest`.

        Gradients that are not finite are left as they are, where the Trainer would make all of them NaN: the guard can
        then say where it began.
        """
        self.accelerator.unscale_gradients()
        parameters = [p for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if largest is not None and is_sharded(model):
            if bool(torch.isfinite(full_tensor(norm))):
                torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        elif largest is not None:  # decided on the device, for which nothing has to wait: a norm of 0 changes nothing
            torch.nn.utils.clip_grads_with_norm_(parameters, largest, torch.where(torch.isfinite(norm), norm, 0.0))
        return full_tensor(norm)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with removed_on_failure(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer does; a sharded model is put together first."""
        assert self.model is not None
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        state = full_state_dict(self.model, self.scalars)
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.model is not None
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        names = {id(p): name for name, p in self.model.named_parameters()}
        scalars = [number for number, p in enumerate(self._ordered_parameters()) if names[id(p)] in self.scalars]
        state = full_optimizer_state(self.optimizer.state_dict(), scalars)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_FILE))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_FILE))

    def _ordered_parameters(self) -> list[nn.Parameter]:
        """The parameters in the order in which the optimizer's state numbers them."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self.model is not None
        if not is_sharded(self.model):  # else they were loaded before the model was sharded
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert self.model is not None
        if checkpoint is None:
            return
        if is_sharded(self.model):
            self._load_sharded(checkpoint)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        # The checkpoint has the learning rates of its time; after going back they are lower.
        schedule = self.lr_scheduler
        if schedule.base_lrs[0] != self.args.learning_rate:
            schedule.base_lrs = [self.args.learning_rate for _ in schedule.base_lrs]
            for group, share in zip(self.optimizer.param_groups, schedule.lr_lambdas):
                group["initial_lr"] = self.args.learning_rate
                group["lr"] = self.args.learning_rate * share(schedule.last_epoch)
            schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_sharded(self, checkpoint: str) -> None:
        loaded = torch.load(os.path.join(checkpoint, OPTIMIZER_FILE), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(sharded_optimizer_state(loaded, self._ordered_parameters()))
        schedule = torch.load(os.path.join(checkpoint, SCHEDULER_FILE), map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Sum the gradients of a sharded model once an update, not once a micro-batch."""
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out cross-entropy in float32, recorded with the head entropies."""
        paused_at = self.recorder.pause()
        assert self.model is not None
        assert isinstance(self.eval_dataset, BlockDataset)
        result = evaluate_blocks(self.model, self.eval_dataset.blocks, self.args.per_device_eval_batch_size)
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
