"""Data parallelism under ``torchrun``: the same recipe takes the same steps on any number of ranks.

``ddp``: every rank holds the whole model; gradients are summed in fixed buckets once a step, after the last
micro-batch. (``torch.nn.parallel.DistributedDataParallel`` starts reducing inside the last backward and skips a
parameter no rank used there, which loses what earlier micro-batches accumulated for it. Experts are just such
parameters.) ``fsdp``: parameters, gradients and optimiser state are sharded (FSDP2, ``fully_shard``).

On machines without accelerators the ``gloo`` backend carries both.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.core.errors import ConfigError


BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int = 0
    world: int = 1
    kind: Literal["ddp", "fsdp"] = "ddp"

    @property
    def main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of the ``count`` examples of a step."""
        if count % self.world:
            raise ConfigError(
                f"batch_size={count} cannot be shared by {self.world} ranks; choose a multiple of {self.world}"
            )
        part = count // self.world
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def first(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        shared = torch.tensor([value])
        dist.broadcast(shared, 0)
        return int(shared)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def ranks(kind: Literal["ddp", "fsdp"] = "ddp") -> Iterator[Ranks]:
    """Join the run's process group as ``torchrun`` set it up; one rank when there is none."""
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), kind)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), kind)
    finally:
        dist.destroy_process_group()


def reduce_gradients(parameters: Sequence[nn.Parameter], group: Ranks) -> None:
    """Sum gradients over ranks. A parameter unused here counts as zero, so ranks never wait for each other.

    A parameter without gradient on every rank keeps none (the optimiser then leaves it and its state alone, as on one
    rank). Buckets follow the order of ``parameters``, so all ranks add the same numbers in the same order.
    """
    live = [p for p in parameters if p.requires_grad]
    if group.world == 1 or group.kind == "fsdp" or not live:
        return
    used = group.sum(torch.tensor([float(p.grad is not None) for p in live])).tolist()
    live = [p for p, count in zip(live, used, strict=True) if count > 0]
    for bucket in _buckets(live):
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket])
        group.sum(flat)
        at = 0
        for p in bucket:
            part = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
            if p.grad is None:
                p.grad = part.clone()
            else:
                p.grad.copy_(part)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        nbytes = p.numel() * p.element_size()
        if bucket and (size + nbytes > BUCKET_BYTES or p.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += nbytes
    if bucket:
        yield bucket


def broadcast_model(model: nn.Module, group: Ranks) -> None:
    """Give every rank rank 0's weights and buffers."""
    if group.world == 1 or group.kind == "fsdp":
        return
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, 0)


def shard(model: nn.Module, group: Ranks) -> None:
    """Shard a model in place with FSDP2: every block by itself, then the rest.

    Gradients are summed, not averaged: the loop's losses are already divided by the whole step's units.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if group.kind != "fsdp" or group.world == 1:
        return
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList) and not isinstance(module, FSDPModule):
            for block in module:
                if sum(p.numel() for p in block.parameters()) and not isinstance(block, FSDPModule):
                    fully_shard(block)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows plain sums only


def gathered_weights(model: nn.Module, group: Ranks) -> dict[str, Tensor] | None:
    """The whole state dict of a sharded model, on every rank; None for a model that is not sharded."""
    if group.kind != "fsdp" or group.world == 1:
        return None
    whole = {}
    for name, tensor in model.state_dict().items():
        whole[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def settle(model: nn.Module) -> None:
    """Let a sharded model give up what a forward without backward gathered: its parameters are the shards again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """Inside, a sharded model has the class it had before: FSDP2 exchanges it, and saved configs name the class."""
    from torch.distributed.fsdp import FSDPModule

    sharded: Any = type(model)
    if isinstance(model, FSDPModule):
        plain: Any = next(cls for cls in sharded.__mro__[1:] if not issubclass(cls, FSDPModule))
        model.__class__ = plain
    try:
        yield
    finally:
        model.__class__ = sharded


@contextmanager
def synchronised(model: nn.Module, last: bool) -> Iterator[None]:
    """Around one micro-batch: sharded models reduce gradients only in the last one."""
    setter = getattr(model, "set_requires_gradient_sync", None)
    if setter is not None:
        setter(last)
    yield
