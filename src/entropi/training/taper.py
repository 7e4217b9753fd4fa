"""Tapering: a trained model's nonlinear operations leave by a schedule while it is held near what it was.

The student is a `TaperedModel`. In training its loss is

    a CE + b KL(teacher || student) + c D + lambda L_entropy,

with D the mean over layers and tokens of |h - h_t|^2 / |h_t|^2 of hidden states h, and L_entropy the penalty of
Algorithm 1 around the teacher's row entropies on the same text, where the paper has theta * E_max.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropi import records
from entropi.data.shards import file_digest
from entropi.entropy.regularizer import entropy_distance_penalty
from entropi.errors import UserError
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM, EntropiOutput
from entropi.model.tapering import TaperedModel
from entropi.training.callbacks import RunRecorder
from entropi.training.loading import model_folder, open_model
from entropi.training.recipe import Recipe


@dataclass(frozen=True)
class Teacher:
    """A trained model that is to be tapered. No part of checkpoints: a run that goes on opens it again."""

    model: EntropiForCausalLM
    path: str  # as the recipe names it
    digest: str  # SHA-256 over configuration and weights


def open_teacher(path: str) -> Teacher:
    """The model in a folder; raises `UserError` as `open_model`."""
    model, _, _ = open_model(Path(path))
    folder, whole = model_folder(Path(path)), hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        whole.update(f"{file.name} {file_digest(file)}\n".encode())
    return Teacher(model.requires_grad_(False).eval(), path, whole.hexdigest())


def check_teacher(teacher: Teacher, started: records.RunStarted, folder: Path) -> None:
    """Raise `UserError` where the run in `folder` began with another model."""
    if started.teacher_hash != teacher.digest:
        raise UserError(f"the teacher {teacher.path} has changed since {folder} was begun; choose another folder")


def gate(progress: float) -> float:
    """1 before a share of 0 of its time, 0 after a share of 1, half a period of the cosine between."""
    if progress <= 0.0 or progress >= 1.0:
        return float(progress <= 0.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TaperSchedule:
    """Which gates are open when; times are shares of the run's steps."""

    stages: Sequence[str]  # operations that leave, one after the other in equal times
    layers: int
    start: float
    end: float
    order: str  # of layers, as `Recipe.taper_layers`

    def gates(self, time: float) -> dict[str, list[float]]:
        """By operation the gate of every layer; of the final norm one."""
        return {name: self._gates(name, self._progress(place, time)) for place, name in enumerate(self.stages)}

    def stage(self, time: float) -> str:
        """The operation that leaves, "before" the first or "after" the last."""
        for place, name in enumerate(self.stages):
            if (progress := self._progress(place, time)) < 1.0:
                return name if progress > 0.0 or place else "before"
        return "after"

    def _progress(self, place: int, time: float) -> float:
        """The share of its own time that the stage at `place` has had; below 0 before."""
        progress = (time - self.start) / (self.end - self.start) * len(self.stages) - place
        return 1.0 if abs(progress - 1.0) < 1e-9 else progress  # whatever the rounding, a stage ends where it should

    def _gates(self, name: str, progress: float) -> list[float]:
        if name == "final_norm":
            return [gate(progress)]
        if self.order == "together":
            return [gate(progress)] * self.layers
        one_by_one = [gate(progress * self.layers - place) for place in range(self.layers)]
        return one_by_one if self.order == "upwards" else one_by_one[::-1]


def schedule_of(recipe: Recipe, model: TaperedModel) -> TaperSchedule:
    """The schedule of a recipe, for what leaves `model`."""
    stages = [name for name in recipe.stages_of_taper if name in model.gates]
    layers = model.config.num_hidden_layers
    return TaperSchedule(stages, layers, recipe.taper_start, recipe.taper_end, recipe.taper_layers)


@dataclass(frozen=True)
class _Observed:
    """What one micro-batch showed, detached."""

    distance: Tensor  # (L, H)
    divergence: Tensor
    hidden: Tensor | None


class Student(TaperedModel):
    """A `TaperedModel` whose loss in training holds it near its teacher, with the weights of a recipe."""

    def __init__(self, teacher: EntropiForCausalLM, target: EntropiConfig, recipe: Recipe) -> None:
        super().__init__(teacher, target)
        self._teacher = (teacher,)  # in a tuple, so that it is no module of this one: neither trained nor saved
        self.recipe = recipe
        self.observed: list[_Observed] = []  # of every micro-batch of the update in progress

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool = True,
        **options: Any,
    ) -> EntropiOutput:
        """As `EntropiForCausalLM.forward`; in training, with `labels`, the loss is that of tapering.

        Its parts are scaled so that the micro-batches' losses add up to the update's; `entropy_penalty` is
        lambda * L_entropy.
        """
        taught = self.training and labels is not None
        plain: dict[str, Any] = dict(labels=labels, num_items_in_batch=num_items_in_batch)
        if not taught:
            return super().forward(input_ids, **plain, return_logits=return_logits, **options)
        assert labels is not None
        weights = self.recipe
        states = {"output_hidden_states": weights.taper_hidden > 0}
        ours = super().forward(input_ids, **plain, **options, **states)
        with torch.no_grad():
            theirs = self._taught_by()(input_ids, use_cache=False, **states)

        share: Tensor | float = 1.0
        if num_items_in_batch is not None:
            share = (labels[:, 1:] != -100).sum() / num_items_in_batch
        divergence = _divergence(ours.logits[:, :-1], theirs.logits[:, :-1])
        loss = weights.taper_cross_entropy * ours.cross_entropy + share * weights.taper_divergence * divergence
        hidden = penalty = None
        if weights.taper_hidden > 0:
            hidden = _hidden_distance(ours.hidden_states[1:], theirs.hidden_states[1:])
            loss = loss + share * weights.taper_hidden * hidden
        if weights.entropy_weight > 0:
            penalty = share * weights.entropy_weight * self._entropy_penalty(ours.entropies, theirs.entropies)
            loss = loss + penalty
        self._observe(ours.entropies, theirs.entropies, divergence, hidden)
        return EntropiOutput(
            loss=loss,
            cross_entropy=ours.cross_entropy,
            entropy_penalty=penalty,
            logits=ours.logits if return_logits else None,
            entropies=ours.entropies,
        )

    def _taught_by(self) -> EntropiForCausalLM:
        """The teacher, on this model's device."""
        (teacher,) = self._teacher
        return teacher if teacher.device == self.device else teacher.to(self.device)

    def _entropy_penalty(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        recipe = self.recipe
        return entropy_distance_penalty(
            ours,
            theirs,
            margin=recipe.entropy_margin,
            granularity=recipe.entropy_granularity,
            max_entropy=recipe.entropy_maximum,
            reduction=recipe.entropy_reduction,
        )

    @torch.no_grad()
    def _observe(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], divergence: Tensor, hidden: Tensor | None
    ) -> None:
        distance = torch.stack([(a - b).abs().mean(dim=(0, 2)) for a, b in zip(ours, theirs)])
        self.observed.append(_Observed(distance, divergence.detach(), None if hidden is None else hidden.detach()))

    def finished(self) -> EntropiForCausalLM:
        """The plain model of the target architecture, after the last step."""
        self.set_gates({name: [0.0] * len(gates) for name, gates in self.gates.items()})
        return self.merged()


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student) of logits `(B, T, V)`, nats."""
    log_p, log_q = functional.log_softmax(theirs.float(), dim=-1), functional.log_softmax(ours.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def _hidden_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over layers and tokens of |h - h_t|^2 / |h_t|^2 of states `(B, T, d)`: massive ones count as all others."""
    ratios = []
    for one, other in zip(ours, theirs):
        squares = (one.float() - other.float()).square().sum(dim=-1)
        ratios.append((squares / other.float().square().sum(dim=-1).clamp(min=1e-12)).mean())
    return torch.stack(ratios).mean()


class TaperProgress(TrainerCallback):
    """Sets the gates before every update, and records where the tapering stands where entropies are recorded."""

    def __init__(self, model: Student, schedule: TaperSchedule, recorder: RunRecorder) -> None:
        self.model, self.schedule, self.recorder = model, schedule, recorder

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """By the number of the step alone, so that a run which goes on finds the same gates."""
        self.model.set_gates(self.schedule.gates(state.global_step / state.max_steps))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        observed, self.model.observed = self.model.observed, []
        if not self.recorder.records_entropy(state):
            return
        step = state.global_step
        hidden = [float(one.hidden) for one in observed if one.hidden is not None]
        self.recorder.write(
            records.TaperSnapshot(
                step=step,
                stage=self.schedule.stage((step - 1) / state.max_steps),
                gates=dict(self.model.gates),
                distance=torch.stack([one.distance for one in observed]).mean(dim=0).tolist(),
                divergence=sum(float(one.divergence) for one in observed) / len(observed),
                hidden=sum(hidden) / len(hidden) if hidden else None,
            )
        )
