"""What watches a training run: records, progress, updates that are refused, checkpoints that are committed."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropi import record_files, records
from entropi.console import ProgressLine
from entropi.entropy.diagnosis import diagnose
from entropi.entropy.regularizer import maximum_entropy
from entropi.errors import UserError
from entropi.model.attention import EntropiAttention
from entropi.model.qk_clip import clip_query_and_key
from entropi.training.checkpoints import commit, latest_committed, remove_oldest
from entropi.training.distributed import (
    all_reduce_max,
    all_reduce_min,
    all_reduce_sum,
    any_process,
    barrier,
    full_tensor,
    is_main,
    launched,
    world_size,
)

MOST_SKIPPED_IN_A_ROW = 10


class NonFiniteUpdate(UserError):
    """A gradient was not finite; the update was refused, the weights are those of the step before."""


class CollapsedAttention(UserError):
    """The attention of a layer has collapsed, and the recipe says to stop."""


class Diverged(Exception):
    """The run has to go back to a checkpoint; raised in all processes at the same step."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step, self.reason = step, reason


class RunRecorder(TrainerCallback):
    """Collects what `EntropiTrainer.compute_loss` shows it, writes records and drives the progress line."""

    def __init__(
        self, path: Path, progress: ProgressLine, *, log_every: int, entropy_every: int, tokens_per_step: int
    ) -> None:
        self.path, self.progress = path, progress
        self.log_every, self.entropy_every, self.tokens_per_step = log_every, entropy_every, tokens_per_step
        self.entropies: list[Tensor] = []  # (L, H) of every micro-batch of the update in progress
        self._losses: list[tuple[Tensor, Tensor | None]] = []  # cross-entropy, penalty; likewise
        self._refused = False
        # One value for each update since the last record; tensors, so that nothing waits for the device.
        self._cross_entropy: list[Tensor | float] = []
        self._penalty: list[Tensor | float] = []
        self._steps = 0
        self._started = 0.0
        self._status = ""
        self._heads = ""
        self.watchers: list[Callable[[records.Record], None]] = []  # of the records as they are written
        self.on_entropy: Callable[[int, Tensor], None] | None = None  # is told (L, H) nats, and may raise

    def write(self, record: records.Record) -> None:
        """Add a record to the run's, and show it to whoever watches; of several processes, one does."""
        if not is_main():
            return
        try:
            record_files.append(self.path, record)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room, and the same command continues the run"
            ) from None
        for watch in self.watchers:
            watch(record)

    def observe(self, outputs: Any) -> None:
        """Take note of one micro-batch; nothing here waits for the device."""
        penalty = outputs.entropy_penalty
        self._losses.append((outputs.cross_entropy.detach(), None if penalty is None else penalty.detach()))
        with torch.no_grad():
            self.entropies.append(torch.stack([e.detach().mean(dim=(0, 2)) for e in outputs.entropies]))

    def refuse(self) -> None:
        """The update in progress is refused: its losses do not enter the means."""
        self._refused = True

    def losses_are_finite(self) -> bool:
        """Whether the losses of the update in progress are finite, in all processes; waits for the device."""
        losses = torch.stack([loss.float() for loss, _ in self._losses])
        return bool(all_reduce_min(torch.isfinite(losses).all().int()))

    def pending(self) -> dict[str, list[float]]:
        """Losses of the updates since the last record, to be kept with a checkpoint."""
        return {
            "cross_entropy": [float(x) for x in self._cross_entropy],
            "penalty": [float(x) for x in self._penalty],
        }

    def restore(self, pending: dict[str, list[float]]) -> None:
        """Go on from the `pending` of a checkpoint."""
        self._cross_entropy, self._penalty = list(pending["cross_entropy"]), list(pending["penalty"])

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
        step, last = state.global_step, state.global_step >= state.max_steps
        with_entropy = self.records_entropy(state)
        if not self._refused:
            # With losses scaled for accumulation, the micro-batches of an update add up to the update's loss.
            losses = [torch.stack([loss for loss, _ in self._losses]).sum().float()]
            if penalties := [penalty for _, penalty in self._losses if penalty is not None]:
                losses.append(torch.stack(penalties).sum().float())
            sums = all_reduce_sum(torch.stack(losses))
            self._cross_entropy.append(sums[0])
            if penalties:
                self._penalty.append(sums[1])
        if with_entropy:
            self._record_entropy(step, model)
        self._refused, self._losses, self.entropies = False, [], []
        control.should_log = step % self.log_every == 0 or last
        if last:
            control.should_evaluate = False  # all of the held-out text is evaluated right after
        self.progress.update(step, f"{self._status}{self._heads}")

    def records_entropy(self, state: TrainerState) -> bool:
        """Whether the entropies of the update that has ended are recorded."""
        step = state.global_step
        return step % self.entropy_every == 0 or step == 1 or step >= state.max_steps

    def _record_entropy(self, step: int, model: Any) -> None:
        entropy = all_reduce_sum(torch.stack(self.entropies).mean(dim=0)) / world_size()
        model = getattr(model, "module", model)
        threshold = full_tensor(model.entropy_regularizer.threshold) if model.entropy_regularizer is not None else None
        temperatures = [block.attention.temperature for block in model.model.blocks]
        self.write(
            records.EntropySnapshot(
                step=step,
                entropy=entropy.tolist(),
                threshold=None if threshold is None else threshold.detach().tolist(),
                temperature=None
                if temperatures[0] is None
                else [full_tensor(t.values().detach()).mean(dim=1).tolist() for t in temperatures],
            )
        )
        if bool(torch.isfinite(entropy).all()):
            shares = diagnose(entropy).quartile_shares
            self._heads = f"  heads overloaded {shares[3]:.0%}, collapsed {shares[0]:.0%}"
            if self.on_entropy is not None:
                self.on_entropy(step, entropy)

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
        cross_entropy = _mean(self._cross_entropy)
        penalty = _mean(self._penalty) if self._penalty else None
        now = time.monotonic()
        speed = self._steps * self.tokens_per_step / max(now - self._started, 1e-9)
        self.write(
            records.TrainingStep(
                step=state.global_step,
                cross_entropy=cross_entropy,
                entropy_penalty=penalty,
                learning_rate=logs["learning_rate"],
                grad_norm=logs.get("grad_norm"),
                tokens_per_second=speed,
            )
        )
        self._status = f"loss {cross_entropy:.3f}  {speed:,.0f} tokens/s"
        self._cross_entropy, self._penalty, self._steps, self._started = [], [], 0, now

    def pause(self) -> float:
        """Moment at which something other than training begins; hand it to `resume_clock`."""
        return time.monotonic()

    def resume_clock(self, paused_at: float) -> None:
        """Leave the time since `paused_at` out of the tokens per second."""
        self._started += time.monotonic() - paused_at


def _mean(values: list[Tensor | float]) -> float:
    """NaN where there are none: every update since the last record was refused."""
    return sum(map(float, values)) / len(values) if values else math.nan


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
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if bool(torch.isfinite(full_tensor(torch.nn.utils.get_total_norm(gradients.values())))):
            self._in_a_row = 0
            return
        step = state.global_step + 1
        reason = f"step {step}: the gradient is not finite{self._where(gradients)}"
        self._in_a_row += 1
        self.recorder.refuse()
        self.recorder.write(records.SkippedUpdate(step=step, reason=reason))
        # In float16 a gradient overflows whenever the loss scale is too large, as it is at first: no divergence.
        overflow = args.fp16 and self.recorder.losses_are_finite()
        if self.policy == "rollback" and not overflow:
            raise Diverged(step, reason)
        if self.policy == "stop" and not overflow:
            raise NonFiniteUpdate(
                f"{reason}; the update was refused and the run stopped. Start again in another folder with a lower "
                "learning rate or precision fp32, with nonfinite skip to go on past such steps, or nonfinite rollback"
            )
        if self._in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteUpdate(f"{reason}, for the {self._in_a_row}th time in a row: the run has diverged")
        if not args.fp16:  # there the scaler passes over the update, and needs the gradients to lower its scale
            model.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient

    def _where(self, gradients: dict[str, Tensor]) -> str:
        """Where it began, in any process: the first layer with broken attention, the loss, or the last with a broken
        gradient, for gradients are made from the last layer to the first. Where each is finite and their norm is not,
        the parameter with the largest.
        """
        if layers := [(~torch.isfinite(entropy)).any(dim=1) for entropy in self.recorder.entropies]:
            broken = torch.stack(layers).any(dim=0)
            numbers = torch.arange(len(broken), device=broken.device)
            first = int(all_reduce_min(torch.where(broken, numbers, len(broken)).min()))
            if first < len(broken):
                return f", beginning in the attention of layer {first}"
        if not self.recorder.losses_are_finite():
            return ", beginning in the loss"
        largest = {name: float(full_tensor(gradient).abs().max()) for name, gradient in gradients.items()}
        bad = [name for name in gradients if not math.isfinite(largest[name])]
        if of_layers := [layer for name in bad if (layer := _layer_of(name)) is not None]:
            return f", beginning in the gradient of layer {max(of_layers)}"
        if bad:
            return f", beginning in that of {bad[-1]}"
        most = max(largest, key=lambda name: largest[name])
        layer = _layer_of(most)
        where = "" if layer is None else f"in layer {layer}, "
        return f", {where}as the squares of {most} overflow, up to {largest[most]:.0e}"


def _layer_of(name: str) -> int | None:
    """The layer that a parameter of the decoder belongs to."""
    found = re.search(r"\bblocks\.(\d+)\.", name)
    return int(found[1]) if found else None


class CollapseGuard:
    """Watches for layers whose attention has collapsed: mean entropy below a share of what a causal mask allows."""

    def __init__(self, policy: str, below: float, context_length: int) -> None:
        self.policy = policy
        self.allowed = float(maximum_entropy(context_length, "causal").mean())
        self.least = below * self.allowed

    def __call__(self, step: int, entropy: Tensor) -> None:
        """Look at the entropies `(L, H)` of a step.

        Raises:
            CollapsedAttention: a layer has collapsed, and the policy is to stop.
            Diverged: likewise, and the policy is to go back.
        """
        means = entropy.mean(dim=1).tolist()
        collapsed = [layer for layer, mean in enumerate(means) if mean < self.least]
        if not collapsed:
            return
        named = ", ".join(f"{layer} ({means[layer]:.3f} nats)" for layer in collapsed)
        reason = (
            f"step {step}: attention has collapsed, beginning in layer{'s' * (len(collapsed) > 1)} {named}, "
            f"of {self.allowed:.2f} nats that a causal mask allows"
        )
        if self.policy == "rollback":
            raise Diverged(step, reason)
        raise CollapsedAttention(
            f"{reason}; the run stopped. The same command would come here again: start in another folder with a lower "
            "learning rate, the entropy regulariser, or collapse rollback"
        )


class QueryKeyClip(TrainerCallback):
    """QK-clip after every update: heads whose logits exceeded the limit get smaller weights, see `model.qk_clip`."""

    def __init__(self, attentions: list[EntropiAttention], limit: float) -> None:
        self.attentions, self.limit = attentions, limit
        for attention in attentions:
            attention.measure_logits = True

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for attention in self.attentions:
            assert attention.largest_logits is not None
            largest = all_reduce_max(attention.largest_logits)
            attention.largest_logits = None
            clip_query_and_key(attention.query, attention.key, largest, self.limit)


class CheckpointCommit(TrainerCallback):
    """Commits a checkpoint once all its files are written, and only then removes the oldest beyond `keep`."""

    def __init__(self, recorder: RunRecorder, keep: int) -> None:
        self.recorder, self.keep = recorder, keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir))
        barrier()  # every process has a file of its own in the checkpoint
        if is_main():
            path = folder / f"checkpoint-{state.global_step}"
            with removed_on_failure(path):
                commit(path, self.recorder.pending())
            remove_oldest(folder, self.keep)


class SaveOnInterrupt(TrainerCallback):
    """Lets Ctrl-C or SIGTERM end a run after the step in progress, whose state is saved; a second one ends it at once.

    Raised wherever the interpreter happens to be, a KeyboardInterrupt can land in a finalizer, which swallows it: the
    run would go on as if nobody had asked. What a second signal leaves half written is no checkpoint, see
    `checkpoints`. Of several processes, one that was asked is enough.
    """

    def __init__(self) -> None:
        self._asked = False  # this process
        self._agreed = False  # all of them

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the two signals from Python's own handlers; others' handlers, and other threads, are left alone."""
        own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        in_main_thread = threading.current_thread() is threading.main_thread()
        taken = {s: handler for s, handler in own.items() if in_main_thread and signal.getsignal(s) is handler}
        for number in taken:
            signal.signal(number, self._ask)
        try:
            yield
        except Exception:
            # A launcher ends the other processes 0.1 s after one has died: this one still has to say what it saw.
            if launched() > 1 and taken.pop(signal.SIGTERM, None) is not None:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
        finally:
            for number, handler in taken.items():
                signal.signal(number, handler)
        if self._asked:  # after the last step
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: object) -> None:
        if self._asked:
            raise KeyboardInterrupt("the step in progress is lost")
        self._asked = True
        if is_main():
            # Not print: this may come in the middle of another one, which may not be entered twice.
            with suppress(OSError):
                os.write(2, b"\nentropi: the step in progress is finished and saved; a second Ctrl-C gives it up\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._agreed = any_process(self._asked)
        if self._agreed:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Comes after `CheckpointCommit`'s."""
        if not self._agreed:
            return
        barrier()  # a launcher ends all processes as soon as the first one ends, and the main one was still writing
        raise KeyboardInterrupt(f"step {state.global_step} is saved")


@contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """Write the checkpoint `path`; what there is no room for is removed again.

    Raises:
        UserError: it could not be written; says why, and which one the run can be continued from.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:150]
        if not isinstance(error, OSError):  # torch and safetensors have no class of their own for this
            if not re.search(r"PytorchStreamWriter|inline_container|I/?O ?[Ee]rror", reason):
                raise
            reason = f"no room, or a limit on the size of files ({reason})"
        shutil.rmtree(path, ignore_errors=True)
        before = latest_committed(path.parent)
        raise UserError(
            f"{path.name} could not be written to {path.parent}: {reason}; it was removed. Once there is room, "
            f"the same command continues the run from {before or 'its start'}"
        ) from None
