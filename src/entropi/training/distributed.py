"""One run in several processes: who this process is, sums over all of them, and a model sharded between them (FSDP2).

Every function here also serves a run in one process, where it does next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
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


def world_size() -> int:
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
    """Connect the processes of this run: NCCL between GPUs, gloo between CPUs. They stay so until `disconnect`.

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


def disconnect() -> None:
    """Destroy the process group: for the end of a program, as the processes cannot be connected again."""
    if world_size() > 1:
        PartialState().destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def broadcast(value: T) -> T:
    """What the main process has in `value`, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_sum(values: Tensor) -> Tensor:
    """Element by element the sum over all processes."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_reduce_min(values: Tensor) -> Tensor:
    """Element by element the smallest value of all processes."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Element by element the largest value of all processes."""
    return -all_reduce_min(-values)


def any_process(asked: bool) -> bool:
    """Whether any process has `asked`: all have to say so together."""
    if world_size() == 1:
        return asked
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return bool(all_reduce_max(torch.tensor(int(asked), device=device)))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded as the plain tensor it stands for; all processes have to ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(model: EntropiForCausalLM) -> None:
    """Share out the parameters of `model` between the processes (FSDP2): every layer by itself, and the rest.

    Scalars become vectors of one number, which FSDP2 wants and all arithmetic takes; `full_state_dict` gives them back.
    """
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.dim() == 0:
                setattr(module, name, nn.Parameter(p.detach().reshape(1)))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    for block in model.model.blocks:
        fully_shard(block)
    fully_shard(model)
    model._is_fsdp_managed_module = True  # asked for by the Trainer, see `EntropiTrainer`


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was applied to it."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def full_state_dict(model: nn.Module, scalars: Collection[str]) -> dict[str, Tensor]:
    """The state of a sharded model as that of a plain one, on the CPU; `scalars` are names of what is one number."""
    seen: dict[int, Tensor] = {}  # tied weights stay one tensor
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            plain = full_tensor(value.detach()).cpu()
            seen[id(value)] = plain.reshape(()) if name in scalars else plain
        state[name] = seen[id(value)]
    return state


def full_optimizer_state(state: dict[str, Any], scalars: Collection[int]) -> dict[str, Any]:
    """An optimizer's state over sharded parameters as that over plain ones; `scalars` are numbers of parameters."""

    def plain(number: int, value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        gathered = value.full_tensor().cpu()
        return gathered.reshape(()) if number in scalars else gathered

    entries = {n: {name: plain(n, value) for name, value in of.items()} for n, of in state["state"].items()}
    return {**state, "state": entries}


def sharded_optimizer_state(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The inverse of `full_optimizer_state`; `parameters` in the order of their numbers."""

    def part(name: str, value: Any, parameter: Tensor) -> Any:
        if name == "step" or not isinstance(value, Tensor) or not isinstance(parameter, DTensor):
            return value
        value = value.reshape(parameter.shape).to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)

    entries = {n: {name: part(name, v, parameters[n]) for name, v in of.items()} for n, of in state["state"].items()}
    return {**state, "state": entries}
