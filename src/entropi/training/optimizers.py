"""Muon for the matrices inside the layers together with AdamW for everything else, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer


class BatchedMuon(Muon):
    """torch's `Muon` with one Newton-Schulz iteration, in bfloat16, for all matrices of a shape.

    One matrix after the other, they are too small to keep a GPU busy: a thousand short products an update for twelve
    layers. Matrices of a sharded model are left to torch's own.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        loss: Tensor | float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            if not parameters:
                continue
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            by_shape: dict[torch.Size, list[int]] = {}
            for number, parameter in enumerate(parameters):
                by_shape.setdefault(parameter.shape, []).append(number)
            for shape, numbers in by_shape.items():
                stacked = torch.stack([updates[number] for number in numbers])
                turned = orthogonalised(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))  # "match_rms_adamw"
                torch._foreach_add_(
                    [parameters[number] for number in numbers], list(turned.to(updates[0].dtype)), alpha=-rate
                )
        return loss


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iteration of every matrix of `(N, rows, columns)`, towards U V^T of its U S V^T; bfloat16."""
    a, b, c = coefficients
    x = matrices.bfloat16()
    if flipped := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if flipped else x


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
        on_gpu = all(p.is_cuda for group in [*matrices, *others] for p in group["params"])
        # On a CPU torch's own, whose roundings are those of a sharded model: a run may change its number of processes.
        self._muon = (BatchedMuon if on_gpu else Muon)(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(others, lr=lr, betas=betas, eps=eps, fused=on_gpu or None)
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
