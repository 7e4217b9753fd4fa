"""What watches a training run: records and progress, refusal of non-finite updates, sealed checkpoints."""

from __future__ import annotations

import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from entropi import record_files, records
from entropi.console import ProgressLine
from entropi.entropy.diagnosis import diagnose
from entropi.entropy.regularizer import maximum_entropy
from entropi.errors import UserError
from entropi.model.attention import EntropiAttention
from entropi.model.qk_clip import clip_query_and_key
from entropi.training.checkpoints import newest_sealed, remove_oldest, seal
from entropi.training.distributed import greatest, is_main, least, processes, total, wait_for_all, whole

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
        return bool(least(torch.isfinite(losses).all().int()))

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
        if not self._refused:
            # With losses scaled for accumulation, the micro-batches of an update add up to the update's loss.
            losses = [torch.stack([loss for loss, _ in self._losses]).sum().float()]
            if penalties := [penalty for _, penalty in self._losses if penalty is not None]:
                losses.append(torch.stack(penalties).sum().float())
            sums = total(torch.stack(losses))
            self._cross_entropy.append(sums[0])
            if penalties:
                self._penalty.append(sums[1])
        if step % self.entropy_every == 0 or step == 1 or last:
            self._record_entropy(step, model)
        self._refused, self._losses, self.entropies = False, [], []
        control.should_log = step % self.log_every == 0 or last
        if last:
            control.should_evaluate = False  # all of the held-out text is evaluated right after
        self.progress.update(step, f"{self._status}{self._heads}")

    def _record_entropy(self, step: int, model: Any) -> None:
        entropy = total(torch.stack(self.entropies).mean(dim=0)) / processes()
        model = getattr(model, "module", model)
        threshold = whole(model.entropy_regularizer.threshold) if model.entropy_regularizer is not None else None
        temperatures = [block.attention.temperature for block in model.model.blocks]
        self.write(
            records.EntropySnapshot(
                step=step,
                entropy=entropy.tolist(),
                threshold=None if threshold is None else threshold.detach().tolist(),
                temperature=None
                if temperatures[0] is None
                else [whole(t.values().detach()).mean(dim=1).tolist() for t in temperatures],
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


Tracker: TypeAlias = Literal["tensorboard", "trackio", "wandb"]


@dataclass(frozen=True)
class Live:
    """Where a training is shown while it runs: a tracker that transformers knows, and how heads become a picture."""

    tracker: Tracker
    draw: Callable[[records.Matrix], np.ndarray]  # (L, H) nats -> (height, width, 3) uint8

    def __post_init__(self) -> None:
        if find_spec(self.tracker) is None:
            wanted = "'entropi[live]'" if self.tracker == "tensorboard" else self.tracker
            raise UserError(f"{self.tracker} is not installed: pip install {wanted}")


class LiveView:
    """Watches the records of a run: a few numbers and one picture of all heads go to the tracker.

    The tracker is opened and closed by the Trainer's own `report_to`, which also sends it loss, learning rate and
    gradient norm. A chart for every head would be 144 charts for the smallest GPT-2.
    """

    def __init__(self, live: Live, trainer: Trainer, folder: Path) -> None:
        self.live = live
        callbacks = trainer.callback_handler.callbacks
        self._board = next((c for c in callbacks if isinstance(c, TensorBoardCallback)), None)
        if self._board is not None and self._board.logging_dir is None:
            self._board.logging_dir = str(folder / "tensorboard")

    def __call__(self, record: records.Record) -> None:
        match record:
            case records.TrainingStep():
                numbers = {"train/cross_entropy": record.cross_entropy}
                if record.entropy_penalty is not None:
                    numbers["train/entropy_penalty"] = record.entropy_penalty
                self._send(record.step, numbers | {"train/tokens_per_second": record.tokens_per_second})
            case records.Evaluation():
                numbers = {"eval/cross_entropy": record.cross_entropy, "eval/perplexity": record.perplexity}
                self._send(record.step, numbers)
            case records.EntropySnapshot():
                entropy = torch.tensor(record.entropy)
                numbers = {"heads/mean_entropy": float(entropy.mean())}
                if bool(torch.isfinite(entropy).all()):
                    shares = diagnose(entropy).quartile_shares
                    numbers |= {"heads/overloaded": shares[3], "heads/collapsed": shares[0]}
                self._send(record.step, numbers, self.live.draw(record.entropy))

    def _send(self, step: int, numbers: dict[str, float], picture: np.ndarray | None = None) -> None:
        if self._board is not None:
            writer = self._board.tb_writer
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            if picture is not None:
                writer.add_image("heads/entropy", picture, step, dataformats="HWC")
            return
        # Both keep one open run a process and have the same two names for these.
        import importlib

        tracker: Any = importlib.import_module(self.live.tracker)
        shown = {} if picture is None else {"heads/entropy": tracker.Image(picture)}
        tracker.log({**numbers, **shown, "train/global_step": step})


class InterruptBetweenSteps(TrainerCallback):
    """Lets Ctrl-C or SIGTERM end a run between two steps; a second one ends it at once.

    Raised wherever the interpreter happens to be, a KeyboardInterrupt can land in a finalizer, which swallows it: the
    run would go on as if nobody had asked.
    """

    def __init__(self) -> None:
        self._asked = False

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
        finally:
            for number, handler in taken.items():
                signal.signal(number, handler)
        if self._asked:  # after the last step
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt


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
        if bool(torch.isfinite(whole(torch.nn.utils.get_total_norm(gradients.values())))):
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
            first = int(least(torch.where(broken, numbers, len(broken)).min()))
            if first < len(broken):
                return f", beginning in the attention of layer {first}"
        if not self.recorder.losses_are_finite():
            return ", beginning in the loss"
        largest = {name: float(whole(gradient).abs().max()) for name, gradient in gradients.items()}
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
            largest = greatest(attention.largest_logits)
            attention.largest_logits = None
            clip_query_and_key(attention.query, attention.key, largest, self.limit)


class CheckpointSeal(TrainerCallback):
    """Seals a checkpoint once all its files are written, and only then removes the oldest beyond `keep`."""

    def __init__(self, recorder: RunRecorder, keep: int) -> None:
        self.recorder, self.keep = recorder, keep

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir))
        wait_for_all()  # every process has a file of its own in the checkpoint
        if is_main():
            path = folder / f"checkpoint-{state.global_step}"
            with or_without_it(path):
                seal(path, self.recorder.pending())
            remove_oldest(folder, self.keep)


@contextmanager
def or_without_it(path: Path) -> Iterator[None]:
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
        before = newest_sealed(path.parent)
        raise UserError(
            f"{path.name} could not be written to {path.parent}: {reason}; it was removed. Once there is room, "
            f"the same command continues the run from {before or 'its start'}"
        ) from None
