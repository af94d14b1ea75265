"""One process or many: who this process is, how processes agree, how the model is spread over them.

Started by hand there is one process; started by `torchrun` there are as many as it says, on one machine or
on several. Process 0 writes and prints. Two rules keep processes from waiting for each other for ever: what
one decides (to stop, to save) is a number that all of them add up in the same step, and what goes wrong
before the first step on one of them is raised on all (`raise_on_all_ranks`).
"""

from __future__ import annotations

import gc
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from coma.devices import pick_device
from coma.errors import ComaError

T = TypeVar("T")

AGREED = "(every process stopped for this reason; process 0 reports it)"
"""Note on an error that all processes raise, so that one of them prints it."""

_PATIENCE = timedelta(minutes=30)
"""For the others while process 0 measures the data or writes to a slow disk."""


@dataclass(frozen=True)
class Processes:
    """This process among all of them."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of all processes' `values`, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: T) -> T:
        """Process 0's value, on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """All processes' values, in order, on every process."""
        if self.world == 1:
            return [value]
        boxes = [value] * self.world
        dist.all_gather_object(boxes, value)
        return boxes

    def collect(self, value: T) -> list[T]:
        """All processes' values, in order, on process 0; nothing on the others."""
        if self.world == 1:
            return [value]
        boxes: list[T] = [value] * self.world if self.main else []
        dist.gather_object(value, boxes or None, dst=0)
        return boxes

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raise on every process the error of the first one that has one; no communication inside."""
        if self.world == 1:
            yield
            return
        error: ComaError | None = None
        try:
            yield
        except ComaError as raised:
            error = raised
        except OSError as raised:
            error = ComaError(f"{raised.filename or 'output'}: {raised.strerror}")
        errors = self.gather(error and (type(error), str(error)))
        for rank, found in enumerate(errors):
            if found:
                kind, message = found
                raise_on_all_ranks = kind(message if rank == 0 else f"{self.name(rank)}: {message}")
                raise_on_all_ranks.add_note(AGREED)
                raise raise_on_all_ranks from error

    def name(self, rank: int | None = None) -> str:
        """How messages call a process."""
        return f"process {self.rank if rank is None else rank} of {self.world}"


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did, and leave them in the end.

    Args:
        device: "auto", "cuda", "mps" or "cpu".

    Raises:
        BadInput: no such device here, or fewer GPUs than processes.
        ComaError: another process has gone; its own message says why.
    """
    world, rank, local = (int(os.environ.get(name, "-1")) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if world <= 1 or min(rank, local) < 0:
        yield Processes(pick_device(device))
        return
    own = pick_device(device, local)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE, device_id=own if own.type == "cuda" else None)
    group = Processes(own, rank, world)
    try:
        yield group
    except ComaError as error:
        if AGREED in getattr(error, "__notes__", ()):
            _leave(error)
            raise
        here = f"{group.name()} on {socket.gethostname()}"
        raise type(error)(f"{here}: {error}") from error  # the others end when this process does
    except RuntimeError as error:
        if not _lost_contact(error):
            raise
        raise ComaError(f"{group.name()}: another process stopped; its own message says why") from error
    _leave()


def _leave(error: BaseException | None = None) -> None:
    """Part in good order.

    Sharded parameters hold on to the connections. If they were still alive when Python shuts down, the
    threads behind the connections would now and then hang or abort the process.
    """
    if error is not None:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _lost_contact(error: RuntimeError) -> bool:
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def parallelize(objective: nn.Module, group: Processes, parallel: Literal["ddp", "fsdp"]) -> nn.Module:
    """The module to call in training: a replica on each process (DDP), or one sharded over all (FSDP2).

    FSDP2 shards `objective` in place, each transformer block for itself, so that one block's weights are
    whole at a time; parameters and their names stay where they were.
    """
    if group.world == 1:
        return objective
    if parallel == "ddp":
        devices = [group.device] if group.device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)
    mesh = init_device_mesh(group.device.type, (group.world,))
    for block in innermost_blocks(objective):
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def innermost_blocks(module: nn.Module) -> list[nn.Module]:
    """Members of module lists that hold no module list themselves: transformer blocks, not stages."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    members = [member for part in lists for member in part]
    return [m for m in members if not any(isinstance(part, nn.ModuleList) for part in m.modules())]


def reducing(model: nn.Module, reduce: bool) -> AbstractContextManager[None]:
    """Around forward and backward: whether gradients are averaged over processes, or still accumulate."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)
    if isinstance(model, DistributedDataParallel) and not reduce:
        return model.no_sync()
    return nullcontext()
