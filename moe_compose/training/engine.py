"""One process, or several that torchrun or `accelerate launch` started.

Several hold a copy of the model each, through Hugging Face accelerate, or its shards, through
torch's FSDP2 (accelerate has that on accelerators only, and wants the optimizer before there can be
one). One process needs nothing. A tensor of a sharded model is a DTensor; what a process has of it
is `local`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_compose.calibration.ranks import Ranks
from moe_compose.errors import UnsupportedError


class Engine:
    """This process among those that train.

    Args:
        device: where to compute; None: the accelerator if there is one.
        shard: each process holds a part of the model, in place of a copy.

    Attributes:
        ranks: how errors are told to all.
        rank, size: this process, and how many there are.
        device: where it computes.
        sharded: whether each holds only its shards of the model.
    """

    def __init__(self, device: str | None, *, shard: bool = False) -> None:
        self.ranks = Ranks()
        self.rank, self.size = self.ranks.rank, self.ranks.size
        self.device = torch.device(device or self.ranks.device())
        self.sharded = shard and self.size > 1

    def prepare(self, model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
        """The model as it is to be called; before that, what trains must require gradients.

        Args:
            model: the same in every process.
            layers: what is sharded together.
        """
        if self.size == 1:
            return model
        if not self.sharded:
            return _accelerated(model, self)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        common = next(p.dtype for p in layers[-1].parameters() if p.dim() > 1)
        apart = {p for p in model.parameters() if p.dtype != common}  # a group has one dtype
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, ignored_params=apart)
        return model

    def backward(self, loss: Tensor) -> None:
        """Gradients of the sum of all processes' losses."""
        scaled = loss * self.size  # since engines average over processes
        scaled.backward()  # type: ignore[no-untyped-call]

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes, of a tensor without gradients."""
        if self.size > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()


def _accelerated(model: nn.Module, engine: Engine) -> nn.Module:
    """A copy in each process.

    Raises:
        UnsupportedError: accelerate is not there, or sees other processes.
    """
    if find_spec("accelerate") is None:
        raise UnsupportedError(
            "several processes train through accelerate, which is not installed",
            hint="pip install 'moe-compose[train]'",
        )
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=engine.device.type == "cpu")
    if accelerator.num_processes != engine.size:
        raise UnsupportedError(
            f"accelerate sees {accelerator.num_processes} processes, not {engine.size}",
            hint="Start them with torchrun, or set what it sets (RANK, LOCAL_RANK, ...).",
        )
    prepared: nn.Module = accelerator.prepare(model)
    return prepared


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; shares memory with it."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def shared_out(whole: Tensor, like: Tensor) -> Tensor:
    """What this process has of a tensor that is distributed like another one."""
    if not isinstance(like, DTensor):
        return whole
    mesh, placements = like.device_mesh, like.placements
    spread = distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
    return local(spread)


def collected(part: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor that is distributed like another one, from every process's part."""
    if not isinstance(like, DTensor):
        return part
    spread = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    whole: Tensor = spread.full_tensor()
    return whole
