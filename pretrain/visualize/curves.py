"""The loss curve of a run, with its online probe and its learning rate."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coma.contact_sheet import write_png
from coma.errors import BadInput
from coma.fonts import draw_figure
from coma.messages import without_formulas


def loss_curve(metrics: Path, path: Path, *, title: str = "") -> None:
    """Draws a PNG of loss, learning rate and share of time waiting for data over the steps.

    Validations of a classifier and scores of the online probe are drawn as well, where there are any.

    Args:
        metrics: `metrics.jsonl` of a run: one JSON object per line with `step`, `loss`, `lr`, `data_wait`, or
            with `step` and `val_top1` or `test_top1`, or with `step` and what a probe found.
        path: The PNG to write, atomically.
        title: First line of the picture; default: the name of the run directory.

    Raises:
        BadInput: the file is missing, not JSON lines, or holds no finite loss.
    """
    from matplotlib.figure import Figure

    rows, looks = _read_metrics(metrics)
    panels = [(label, known) for label, curves in _PANELS for known in [_known(looks, curves)] if known]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure = Figure(figsize=(9, 6 + 2 * len(panels)), dpi=120, layout="constrained")
    heights = [5, 1.2, 1.2, *[2.4 for _ in panels]]
    top, rate, wait, *below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    top.plot(steps, losses, color="#9db4d6", linewidth=1, marker="o" if len(rows) < 30 else "", markersize=3)
    smooth = _smooth(losses)
    top.plot(steps, smooth, color="#1b4f9c", linewidth=2)
    top.set(ylabel="loss", title=without_formulas(title or metrics.parent.name))
    top.annotate(
        f"{smooth[-1]:.3g}", (steps[-1], smooth[-1]), (6, 0), textcoords="offset points", va="center"
    )
    if min(losses) > 0 and max(losses) > 5 * min(losses):
        top.set_yscale("log")
        top.yaxis.set_major_formatter("{x:g}")
        top.yaxis.set_minor_formatter("{x:g}" if max(losses) < 20 * min(losses) else "")
    for axes, key, label in ((rate, "lr", "learning rate"), (wait, "data_wait", "waiting\nfor data")):
        known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*known, strict=True) if known else ((), ()), color="#b3541e", linewidth=1.5)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    wait.set_ylim(0, 1)
    for axes, (label, known) in zip(below, panels, strict=True):
        for (name, points), color in zip(known.items(), ("#2d7d46", "#7a4fa3"), strict=False):
            values = [value for _, value in points]
            shown = f"{name}: {values[-1]:.3g}" + (f", at best {max(values):.3g}" if len(values) > 1 else "")
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3, label=shown)
        axes.set_ylabel(label)
        axes.legend(loc="lower right", fontsize="small", frameon=False)
    (below or [wait])[-1].set_xlabel("optimizer step")
    for axes in (top, rate, wait, *below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_png(path, draw_figure(figure))


_PANELS: tuple[tuple[str, dict[str, tuple[str, float]]], ...] = (
    ("mAP %", {"validation": ("val_mean_ap", 100), "test": ("test_mean_ap", 100)}),
    ("top-1 %", {"validation": ("val_top1", 100), "test, once, with the chosen weights": ("test_top1", 100)}),
    ("top-1 %\ntest images", {"validation": ("top1", 100)}),  # of versions that chose by the test images
    ("top-1 %\nprobe", {"kNN": ("probe_knn", 100), "linear": ("probe_linear", 100)}),
    ("features'\ndeviation", {"deviation of l2-normalised features x sqrt(d)": ("probe_feature_std", 1)}),
    ("features'\nrank", {"effective rank": ("probe_effective_rank", 1)}),
)
"""Panels below the loss: labels, and curves by their key and factor."""


_LOOKS = {key for _, curves in _PANELS for key, _ in curves.values()} | {"probe_seconds"}
"""Keys of rows that hold an evaluation."""


def _known(
    looks: list[dict[str, Any]], curves: dict[str, tuple[str, float]]
) -> dict[str, list[tuple[int, float]]]:
    """Returns the curves that have a point, as steps and values."""
    found = {
        name: [
            (row.get("chosen_step", row["step"]), factor * row[key])
            for row in looks
            if math.isfinite(row.get(key, math.nan))
        ]
        for name, (key, factor) in curves.items()
    }
    return {name: points for name, points in found.items() if points}


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the log points with a finite loss, and the evaluations (validations and probes)."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill cuts the last one short
        rows = [row for row in whole if "step" in row and math.isfinite(row.get("loss", math.nan))]
        looks = [row for row in whole if "step" in row and _LOOKS & row.keys()]
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give the metrics.jsonl of a run") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise BadInput(f"{path}: not a readable metrics.jsonl ({error})") from None
    if not rows:
        raise BadInput(f"{path}: holds no step with a finite loss yet")
    return rows, looks


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Returns the average over a centred window of a twentieth of the values, cut off at both ends."""
    reach = max(len(values) // 40, 1)
    box = np.ones(2 * reach + 1)
    return np.convolve(values, box)[reach:-reach] / np.convolve(np.ones(len(values)), box)[reach:-reach]
