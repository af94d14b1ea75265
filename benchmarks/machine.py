"""What a number was measured on: printed above every table of this folder."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def describe() -> str:
    """Machine and versions in one line."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        device = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "coma-dyvit"))
    return f"{device}; Python {platform.python_version()}, {packages}"


def table(rows: list[dict[str, str]]) -> str:
    """Rows of equal keys as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
