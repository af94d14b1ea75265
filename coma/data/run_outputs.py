"""Recognises the folders that this toolkit writes, so that their pictures are never used as data.

They are recognised by their content, whatever their name, including those of earlier versions:

    config.json and other files     runs of pretrain and classify, artifacts
    compare.json                    comparisons
    config.py and mmengine's files  runs of detect and segment
    detections.json, or labels/ and the same pictures or videos/      predictions
    manifest.json                   exports
    pictures/ beside run/           quickstart
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LARGEST_FILE = 1 << 24
_CONFIGS = {
    "a run of coma pretrain": {"data", "model", "objective", "optimizer", "run"},
    "a run of coma classify": {"artifact", "data", "optimizer", "run"},
    "an artifact": {"kind", "model", "image_size", "mean", "std"},
}
"""Keys of `config.json` in each of them."""
_BESIDE_CONFIG = ("metrics.jsonl", "state", "artifact", "reconstructions", "model.safetensors")
"""A run or an artifact has at least one of these beside `config.json`."""


def run_output_at(folder: Path, holds: Callable[[str], bool] | None = None) -> str | None:
    """Returns what this toolkit wrote into a folder, in words; None for any other folder.

    Args:
        folder: Folder to check.
        holds: Returns whether the folder has an entry of a given name; by default the file system is asked.
    """
    holds = holds or (lambda name: os.path.exists(folder / name))
    if holds("config.json") and any(map(holds, _BESIDE_CONFIG)):
        keys = _keys(folder / "config.json")
        for what, needed in _CONFIGS.items():
            if needed <= keys:
                return what
    if holds("compare.json") and {"budget", "test", "device"} <= _keys(folder / "compare.json"):
        return "a comparison of coma compare"
    if holds("manifest.json") and {"format_version", "artifact", "files"} <= _keys(folder / "manifest.json"):
        return "an export of coma export"
    if holds("config.py") and (holds("printed.txt") or holds("last_checkpoint")):
        return "a run of coma detect or segment"
    if (holds("pictures") or holds("videos")) and holds("images.json"):
        if holds("detections.json"):
            return "predictions of coma detect"
        if holds("labels"):
            return "predictions of coma segment"
    if holds("pictures"):
        if (
            holds("labels")
            and len(drawn := _names(folder / "pictures")) > 0
            and drawn == _names(folder / "labels")
        ):
            return "predictions of coma segment"
        if holds("run") and run_output_at(folder / "run"):
            return "a folder of coma quickstart"
    return None


def enclosing_run_output(folder: Path) -> tuple[Path, str] | None:
    """Returns the run output that `folder` is or lies in, and what it is; None if there is none.

    The pictures of a quickstart are data.
    """
    real = folder.resolve()
    for place in (real, *real.parents):
        what = run_output_at(place)
        if what and (place == real or "quickstart" not in what):
            return place, what
    return None


def _keys(path: Path) -> set[str]:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
            return set()
        plain: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return set()
    return set(plain) if isinstance(plain, dict) else set()


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()
