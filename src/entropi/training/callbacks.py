"""What watches a training run: records and progress, refusal of non-finite updates, sealed checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropi import records
from entropi.console import ProgressLine
from entropi.entropy.diagnosis import diagnose
from entropi.errors import UserError

SEAL = "complete"  # an empty file, written last: a checkpoint without it was cut short
MOST_SKIPPED_IN_A_ROW = 10


class NonFiniteUpdate(UserError):
    """A gradient was not finite; the update was refused, the weights are those of the step before."""


class RunRecorder(TrainerCallback):
    """Collects what `EntropiTrainer.compute_loss` shows it, writes records and drives the progress line."""

    def __init__(
        self, path: Path, progress: ProgressLine, *, log_every: int, entropy_every: int, tokens_per_step: int
    ) -> None:
        self.path, self.progress = path, progress
        self.log_every, self.entropy_every, self.tokens_per_step = log_every, entropy_every, tokens_per_step
        self._cross_entropy: list[Tensor] = []
        self._penalty: list[Tensor] = []
        self._steps = 0
        self._started = 0.0
        self._status = ""
        self._heads = ""
        self.entropy: Tensor | None = None  # (L, H) of the latest micro-batch

    def observe(self, outputs: Any) -> None:
        """Take note of one micro-batch; nothing here waits for the device."""
        self._cross_entropy.append(outputs.cross_entropy.detach())
        if outputs.entropy_penalty is not None:
            self._penalty.append(outputs.entropy_penalty.detach())
        with torch.no_grad():
            self.entropy = torch.stack([e.detach().mean(dim=(0, 2)) for e in outputs.entropies])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self._steps += 1
        step = state.global_step
        if step % self.entropy_every == 0 or step == 1:
            self._record_entropy(step, model)
        if step % self.log_every == 0:
            control.should_log = True
        self.progress.update(step, f"{self._status}{self._heads}")

    def _record_entropy(self, step: int, model: Any) -> None:
        if self.entropy is None:
            return
        model = getattr(model, "module", model)
        threshold = model.entropy_regularizer.threshold if model.entropy_regularizer is not None else None
        temperatures = [block.attention.temperature for block in model.model.blocks]
        records.append(
            self.path,
            records.EntropySnapshot(
                step=step,
                entropy=self.entropy.tolist(),
                threshold=None if threshold is None else threshold.detach().tolist(),
                temperature=None
                if temperatures[0] is None
                else [t.detach().mean(dim=1).tolist() for t in temperatures],
            ),
        )
        if bool(torch.isfinite(self.entropy).all()):
            shares = diagnose(self.entropy).quartile_shares
            self._heads = f"  heads overloaded {shares[3]:.0%}, collapsed {shares[0]:.0%}"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "learning_rate" not in logs or not self._steps:
            return
        # With losses scaled for accumulation, the micro-batches of a step add up to the step's loss.
        cross_entropy = float(torch.stack(self._cross_entropy).sum()) / self._steps
        penalty = float(torch.stack(self._penalty).sum()) / self._steps if self._penalty else None
        now = time.monotonic()
        speed = self._steps * self.tokens_per_step / max(now - self._started, 1e-9)
        records.append(
            self.path,
            records.TrainingStep(
                step=state.global_step,
                cross_entropy=cross_entropy,
                entropy_penalty=penalty,
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                tokens_per_second=speed,
            ),
        )
        self._status = f"loss {cross_entropy:.3f}  {speed:,.0f} tokens/s"
        self._cross_entropy, self._penalty, self._steps, self._started = [], [], 0, now

    def pause(self) -> float:
        """Moment at which something other than training begins; hand it to `resume_clock`."""
        return time.monotonic()

    def resume_clock(self, paused_at: float) -> None:
        """Leave the time since `paused_at` out of the tokens per second."""
        self._started += time.monotonic() - paused_at


class NonFiniteGuard(TrainerCallback):
    """Refuses an update whose gradients are not finite: stops the run or skips the update, naming the step."""

    def __init__(self, policy: str, recorder: RunRecorder) -> None:
        self.policy, self.recorder = policy, recorder
        self._in_a_row = 0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            self._in_a_row = 0
            return
        step = state.global_step + 1
        reason = f"step {step}: the gradient is not finite{self._where()}"
        self._in_a_row += 1
        records.append(self.recorder.path, records.SkippedUpdate(step=step, reason=reason))
        if self.policy == "stop":
            raise NonFiniteUpdate(
                f"{reason}; the update was refused and the run stopped. Lower the learning rate, use --precision "
                "fp32, or continue past such steps with --nonfinite skip"
            )
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteUpdate(f"{reason}, for the {self._in_a_row}th time in a row: the run has diverged")
        model.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient

    def _where(self) -> str:
        """The first layer whose attention is no longer finite, if that is what happened."""
        if self.recorder.entropy is None:
            return ""
        broken = (~torch.isfinite(self.recorder.entropy)).any(dim=1).nonzero().flatten()
        return f", beginning in the attention of layer {int(broken[0])}" if len(broken) else ""


class CheckpointSeal(TrainerCallback):
    """Marks a checkpoint complete once all its files are written."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if folder.is_dir() and state.is_world_process_zero:
            (folder / SEAL).touch()


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest complete checkpoint below `folder` and its step."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and (path / SEAL).exists():
            found.append((int(number), path))
    if not found:
        return None
    step, path = max(found)
    return path, step
