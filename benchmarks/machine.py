"""What every script of this folder shares: the machine in one line, timing in turn, tables."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from coma.devices import processor


def describe() -> str:
    """Machine and versions in one line."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = f"{processor()}, {torch.get_num_threads()} thread(s)"
    packages = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "timm", "coma-dyvit"))
    return f"{device}; Python {platform.python_version()}, {packages}"


def version_of(package: str) -> str:
    """The version that is installed; "not installed" where none is, as of a source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def time_in_turn(
    actions: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm: int = 2
) -> dict[str, float]:
    """Median seconds of every action; round after round, so that a slow minute of the machine hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for name, action in actions.items():
        started = time.perf_counter()
        for _ in range(warm):
            action()
        wait(device)
        print(f"{name}: warm after {time.perf_counter() - started:.0f} s", flush=True)
    for _ in range(rounds):
        for name, action in actions.items():
            wait(device)
            started = time.perf_counter()
            action()
            wait(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(how: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print a table under its machine and circumstances; `out` keeps all of it as JSON."""
    print(f"\n{describe()}; {how}\n\n{table(rows)}")
    if out:
        out.write_text(json.dumps({"machine": describe(), "how": how, "rows": rows}, indent=1) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; what a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
