"""Muon for the matrices inside the layers together with AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """torch's `Muon` on `matrices` (2-D, hidden) and torch's `AdamW` on `others`, both lists of parameter groups.

    Muon's updates are scaled to the size of AdamW's ("match_rms_adamw"), so that one learning rate, one schedule and
    one weight decay serve both. Schedulers, clipping and checkpoints see one optimizer: the groups of both, Muon's
    first, and one state.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._muon = Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(others, lr=lr, betas=betas, eps=eps)
        self._of_muon = len(self._muon.param_groups)
        # The very groups of the two: what a scheduler writes into them, they read.
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let the two see this optimizer's groups and state."""
        self._muon.param_groups = self.param_groups[: self._of_muon]
        self._adamw.param_groups = self.param_groups[self._of_muon :]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # replaces groups and state
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss: Tensor | float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss
