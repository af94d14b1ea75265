"""Pictures of a classifier's test: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coma.contact_sheet import write_png
from coma.fonts import draw_figure
from coma.messages import without_formulas

_NUMBERED, _NAMED = 25, 60
"""Most classes whose cells show numbers, and whose names are written at the axes."""


def draw_confusion(path: Path, confusion: list[list[int]], names: tuple[str, ...], title: str) -> None:
    """Draws a confusion matrix: a row for each true class, coloured by the share of its images.

    Args:
        path: PNG to write, atomically.
        confusion: `[classes][classes]` counts; rows are the true classes.
        names: Class names.
        title: First line of the picture.
    """
    from matplotlib.figure import Figure

    counts = np.array(confusion)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = min(max(3.2 + 0.5 * len(names), 5.0), 13.0)
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=without_formulas(title))
    if len(names) <= _NAMED:
        shown = [without_formulas(name if len(name) <= 24 else f"{name[:22]}...") for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), shown)
    if len(names) <= _NUMBERED:
        size = 10 if len(names) <= 12 else 7
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]:,}"
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                color=colour,
                fontsize=size,
            )
    write_png(path, draw_figure(figure))


def draw_reliability(path: Path, calibration: dict[str, Any], title: str) -> None:
    """Draws accuracy against confidence in equally wide bins, and the number of predictions in each.

    Args:
        path: PNG to write, atomically.
        calibration: Plain data of `metrics.Calibration`.
        title: First line of the picture.
    """
    from matplotlib.figure import Figure

    bins = len(calibration["counts"])
    middles, width = (np.arange(bins) + 0.5) / bins, 1 / bins
    figure = Figure(figsize=(5, 6), dpi=100, layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    accuracy = [value or 0 for value in calibration["accuracy"]]
    top.bar(middles, accuracy, width, color="#9db4d6", edgecolor="white", label="accuracy")
    there = [i for i in range(bins) if calibration["counts"][i]]
    top.plot(
        [calibration["confidence"][i] for i in there],
        [calibration["accuracy"][i] for i in there],
        color="#1b4f9c",
        marker="o",
        markersize=4,
        linestyle="",
        label="mean of the bin",
    )
    top.plot([0, 1], [0, 1], color="#b3541e", linestyle="--", label="perfectly calibrated")
    top.set(ylabel="share that is right", ylim=(0, 1), title=without_formulas(title))
    top.legend(loc="upper left", fontsize="small", frameon=False)
    below.bar(middles, calibration["counts"], width, color="#c8c8d0", edgecolor="white")
    below.set(xlabel="confidence", ylabel="predictions", xlim=(0, 1))
    for axes in (top, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_png(path, draw_figure(figure))
