"""One process or many: ranks, collective decisions, and the parallel model.

A run has one process, or as many as `torchrun` starts on one machine or several. Process 0 writes and
prints. Two rules keep processes from waiting for each other forever: a decision of one process (to stop, to
save) is a flag that all of them sum in the same step, and an error before the first step on one process is
raised on all of them (`raise_on_all_ranks`).
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

_PATIENCE = timedelta(hours=6)
"""How long the other processes wait while process 0 measures the data, evaluates on all images, or writes to
a slow disk. torchrun notices a process that has ended at once."""


@dataclass(frozen=True)
class Processes:
    """This process among all of them."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """True for the process that writes and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sums `values` over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def share(self, value: T) -> T:
        """Returns the value of process 0, on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Returns the values of all processes by rank, on every process."""
        if self.world == 1:
            return [value]
        boxes = [value] * self.world
        dist.all_gather_object(boxes, value)
        return boxes

    def collect(self, value: T) -> list[T]:
        """Returns the values of all processes by rank on process 0, and nothing on the others."""
        if self.world == 1:
            return [value]
        boxes: list[T] = [value] * self.world if self.main else []
        dist.gather_object(value, boxes or None, dst=0)
        return boxes

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Raises the first rank's error on every rank; the block must not communicate."""
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
        """Returns the name of a process in messages: `process 1 of 2`."""
        return f"process {self.rank if rank is None else rank} of {self.world}"


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Joins the process group that torchrun started, if it did, and shuts it down at the end.

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
    group = Processes(own, rank, world)
    try:
        dist.init_process_group(backend, timeout=_PATIENCE, device_id=own if own.type == "cuda" else None)
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
        raise ComaError(f"{group.name()}: {_reason(error)}") from error
    _leave()


def _leave(error: BaseException | None = None) -> None:
    """Shuts down the process group.

    Sharded parameters keep the connections alive. If they still existed when Python shuts down, the
    connections' threads would sometimes hang or abort the process.
    """
    if error is not None:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _lost_contact(error: RuntimeError) -> bool:
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _reason(error: RuntimeError) -> str:
    """Returns why processes lost contact; NCCL tells all of them alike what it could not do."""
    stopped = "another process stopped; its own message says why"
    if not isinstance(error, dist.DistBackendError):
        return stopped
    said = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
    return (
        f"{stopped}. If none does: {said}; NCCL_DEBUG=INFO says more, and in Docker --ipc=host or "
        "a larger --shm-size may help"
    )


def parallelize(objective: nn.Module, group: Processes, parallel: Literal["ddp", "fsdp"]) -> nn.Module:
    """Returns the module to call in training: a replica per process (DDP), or one sharded over all (FSDP2).

    FSDP2 shards `objective` in place, block by block, so that only one transformer block is gathered at a
    time; parameters keep their names.
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
    """Returns members of module lists, and of sequences called blocks, that hold no list: no stages."""
    named = module.named_modules()
    lists = [part for name, part in named if isinstance(part, nn.ModuleList) or name.endswith("blocks")]
    members = [member for part in lists for member in part.children()]
    return [m for m in members if not any(isinstance(part, nn.ModuleList) for part in m.modules())]


def reducing(model: nn.Module, reduce: bool) -> AbstractContextManager[None]:
    """Context of forward and backward that averages gradients over processes, or only accumulates them."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)
    if isinstance(model, DistributedDataParallel) and not reduce:
        return model.no_sync()
    return nullcontext()
