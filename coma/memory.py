"""The free memory, the bytes that a training step keeps for backward, and a stop before they run out."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coma.errors import BadInput

GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
USED = 0.9
"""Share of the free memory that a step may take."""
FLOOR = 0.04
"""Share of the memory that must stay free; below it the system is about to kill processes."""
_LOOK = 2**26
"""Bytes that autograd keeps between two looks at the free memory."""


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that can be allocated on a device; None where that is not known.

    On a CPU these are the system's, or what the container allows (cgroup v2) if that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _meminfo().get("MemAvailable")
    limit, used = _container()
    if limit is not None and used is not None:
        free = min(free, limit - used) if free is not None else limit - used
    return free if device.type == "cpu" else None


def memory_of_process(device: torch.device) -> float | None:
    """Returns the bytes that a step of this process may take; None where that is not known."""
    free = free_memory(device)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return None if free is None else USED * free / sharing


def total_memory() -> int | None:
    """Returns the bytes of the system's memory, or of the container's if that is less; None if unknown."""
    known = [size for size in (_meminfo().get("MemTotal"), _container()[0]) if size is not None]
    return min(known, default=None)


class SavedBytes(saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass inside, in bytes; views of one storage count once.

    Args:
        model: Model whose parameters and buffers do not count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        own = (*model.parameters(), *model.buffers())
        self._known = {StorageWeakRef(each.untyped_storage()) for each in own}
        self.total = 0
        super().__init__(self._add, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:  # type: ignore[override]
        super().__enter__()
        return self

    def _add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference not in self._known:
            self._known.add(reference)
            self.total += storage.nbytes()
        return tensor


class PeakBytes(TorchDispatchMode):
    """Counts the memory of all tensors that are made inside and live at the same time, in bytes at most.

    It also counts tensors that have only shapes, in a `FakeTensorMode`. Views of tensors from
    outside count, except for those of the model in `leave_out`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: set[int] = set()

    def leave_out(self, model: torch.nn.Module) -> None:
        """Does not count parameters and buffers of a model, whatever views of them are made."""
        self._known |= {id(each.untyped_storage()) for each in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes, and counts the results."""
        results = func(*args, **(kwargs or {}))
        for each in tree_leaves(results):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return results

    def _add(self, storage: Any) -> None:
        key = id(storage)  # as long as it lives
        if key not in self._known:
            self._known.add(key)
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


class MemoryGuard(saved_tensors_hooks):
    """Stops a training step on a CPU before the system kills the process for want of memory.

    Inside, the free memory is looked at as autograd keeps tensors; `guarded` knows where that applies.

    Args:
        advice: Returns what to do, for the message.

    Raises:
        BadInput: less than `FLOOR` of the memory is free.
    """

    def __init__(self, advice: Callable[[], str]) -> None:
        self._advice, self._kept = advice, 0
        self._floor = FLOOR * (total_memory() or 0)
        super().__init__(self._look, lambda tensor: tensor)

    def _look(self, tensor: Tensor) -> Tensor:
        self._kept += tensor.nbytes
        if self._kept >= _LOOK:
            self._kept, free = 0, free_memory(tensor.device)
            if free is not None and free < self._floor:
                raise BadInput(
                    f"this training step needs more memory than there is: {free / GIB:.1f} GiB are left; "
                    f"{self._advice()}"
                )
        return tensor.detach()  # an operator that keeps its own result would keep itself


def guarded(device: torch.device, advice: Callable[[], str]) -> AbstractContextManager[object]:
    """Returns a `MemoryGuard` for training on a CPU; other devices raise errors of their own."""
    return MemoryGuard(advice) if device.type == "cpu" else nullcontext()


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _container() -> tuple[int | None, int | None]:
    """Returns the limit and the use of the container's memory in bytes; None without a limit.

    Cached files do not count as use: the system drops them when memory is needed.
    """
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None, None
    cached = {name: int(size) for name, size in (line.split() for line in lines)}
    return limit, used - cached.get("inactive_file", 0) - cached.get("active_file", 0)
