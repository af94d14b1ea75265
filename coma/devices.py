"""Processor and device: the processor's name, usable cores, and the device of a command."""

from __future__ import annotations

import math
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from coma.errors import BadInput

if TYPE_CHECKING:
    import torch


def processor() -> str:
    """Returns the processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use: its affinity, and the CPU quota of its container (cgroup v2)."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return allowed


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """Returns the device called `name`; `auto` picks CUDA, else MPS, else the CPU.

    Raises:
        BadInput: the device is not available.
    """
    import torch

    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and local_rank is None,
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise BadInput(f"--device {name}: not available here; leave the flag out to use what is available")
    if name != "cuda":
        return torch.device(name)
    index, gpus = local_rank or 0, torch.cuda.device_count()
    if index >= gpus:
        raise BadInput(f"this machine has {gpus} GPUs; start torchrun with --nproc-per-node {gpus} or fewer")
    return torch.device("cuda", index)


def current_gpu() -> int:
    """Returns the number of the GPU that this process uses: under torchrun its own, elsewhere the first."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0
