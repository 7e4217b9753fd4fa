"""One run in several processes: who this process is, sums over all of them, and a model sharded between them (FSDP2).

Every function here also serves a run in one process, where it does next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from entropi.errors import UserError
from entropi.model.decoder import EntropiForCausalLM

T = TypeVar("T")


class LostProcess(UserError):
    """Another process of the run has died; this one cannot go on without it."""


def launched() -> int:
    """How many processes the launcher (torchrun, accelerate) started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes() -> int:
    """How many processes are connected."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among those of the run."""
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def is_main() -> bool:
    """Whether this process writes the run folder and speaks."""
    return rank() == 0


@contextmanager
def connected() -> Iterator[None]:
    """Connect the processes of this run: NCCL between GPUs, gloo between CPUs.

    Raises:
        LostProcess: another process died while this one waited for it.
    """
    if launched() == 1:
        yield
        return
    try:
        PartialState(cpu=not torch.cuda.is_available())
        yield
    except RuntimeError as error:  # what torch raises for a broken connection depends on what broke
        reason = " ".join(str(error).split())
        if not any(word in reason for word in ("onnection", "gloo", "NCCL", "eer", "imed out", "imeout")):
            raise
        raise LostProcess(
            f"another process of this run has stopped ({reason[:120]}); what it said is above, and the same command "
            "continues the run after its last checkpoint"
        ) from None
    PartialState().destroy_process_group()


def wait_for_all() -> None:
    """Go on when every process is here."""
    if processes() > 1:
        dist.barrier()


def from_main(value: T) -> T:
    """What the main process has in `value`."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(values: Tensor) -> Tensor:
    """Element by element the sum over all processes."""
    if processes() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def least(values: Tensor) -> Tensor:
    """Element by element the least of all processes."""
    if processes() > 1:
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded as the plain tensor it stands for; all processes have to ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A plain `tensor` sharded as `parameter` is, if it is and has its shape."""
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


def shard(model: EntropiForCausalLM) -> None:
    """Share out the parameters of `model` between the processes (FSDP2): every layer by itself, and the rest.

    The Trainer is told by the two flags with which transformers marks models that it sharded itself: such a model is
    neither wrapped nor sharded again.
    """
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for block in model.model.blocks:
        fully_shard(block)
    fully_shard(model)
    model._is_distributed_loading_by_transformers = True
    model._is_fsdp_managed_module = True


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to it."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole_state(state: Any) -> Any:
    """A nested state with plain tensors instead of sharded ones, on the CPU where it was sharded."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {name: whole_state(value) for name, value in state.items()}
    return [whole_state(value) for value in state] if isinstance(state, list) else state
