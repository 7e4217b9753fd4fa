"""Where a training is shown while it runs: a tracker gets a few numbers and one picture of all heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from entropi import records
from entropi.entropy.diagnosis import diagnose
from entropi.errors import UserError

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
