"""A few training steps of a detector and a segmentor in bf16, on drawn shapes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from gpu_steps.session import ROOT, Session, Skip


def run(session: Session) -> None:
    """`coma detect train` and `coma segment train`."""
    for package in ("mmengine", "mmdet", "mmseg", "mmcv"):
        if find_spec(package) is None:
            raise Skip(f"{package} is not installed")
    sys.path.insert(0, str(ROOT / "tests/helpers"))
    from downstream_data import coco, labelled

    small = session.small
    side, steps, batch = (64, 2, 2) if small else (800, 12, 8)
    count = 4 if small else 24
    kinds: list[tuple[str, Callable[..., Path], list[str]]] = [
        ("detect", coco, ["--short-side", str(side)]),
        ("segment", labelled, ["--crop-size", str(min(side, 512))]),
    ]
    for command, make, flags in kinds:
        name = f"coma {command} train"
        if not session.wants(name, 0.0 if small else 10.0):
            continue
        with session.attempt(name):
            size = (96, 64) if small else (1200, 800)
            data = make(session.folder / f"{command}-data", count, 2, size=size)
            out = session.folder / command
            options = ["--preset", "tiny" if small else "base", "--data", str(data), "--out", str(out)]
            options += ["--steps", str(steps), "--batch-size", str(batch), "--validations", "1", "--workers"]
            options += ["0" if small else "4", "--head-channels", "32" if small else "256"]
            options += ["--precision", "fp32" if small else "bf16", *flags]
            session.run("-m", "coma", command, "train", *options)
            rows = [row for path in out.rglob("scalars.json") for row in map(json.loads, path.open())]
            trained = [row for row in rows if "loss" in row]
            if not trained:
                session.add(name, ok=True, steps=steps, batch=batch, note="trained; no speed in its log")
                continue
            last = trained[-1]
            values = {"steps": steps, "batch": batch, "loss": last["loss"]}
            if last.get("time"):
                values |= {"s/step": last["time"], "images/s": batch / last["time"]}
            if "memory" in last:
                values["GiB"] = last["memory"] / 1024
            session.add(name, values, ok=last["loss"] == last["loss"])  # NaN is not equal to itself
