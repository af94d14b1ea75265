"""`compare.png`: accuracy against training time, at the end and during training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from coma.config.compare import RANDOM_BASELINE, CompareConfig
from coma.contact_sheet import write_png
from coma.fonts import draw_figure
from coma.messages import without_formulas
from pretrain.sweep.caption import clock_name, probed_on
from pretrain.sweep.results import TITLES, Group

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_COLORS = (
    *("#1b4f9c", "#d1611f", "#2d7d46", "#7a4fa3", "#c9a227", "#c2305f", "#3a8f98", "#4b4b55", "#7a5230"),
    *("#7fb3e6", "#f2b48a", "#93cf9f", "#c3a6e0", "#e59bb4"),
)


def draw(comparison: CompareConfig, found: Sequence[Group], path: Path) -> None:
    """Draws accuracy against training time: a column per backbone, a row per protocol, a row per probe."""
    from matplotlib.figure import Figure

    measured = [name for name in comparison.protocols if any(group.top1(name) for group in found)]
    rows = [(name, False) for name in measured]
    rows += [(name, True) for name in measured if any(_curves(group, name) for group in found)]
    if not rows:
        return
    models = list(dict.fromkeys(group.model for group in found))
    methods = list(dict.fromkeys(group.method for group in found if group.method != RANDOM_BASELINE))
    colors = dict(zip(methods, cycle(_COLORS), strict=False))
    figure = Figure(figsize=(4.6 * len(models) + 2.4, 3.4 * len(rows)), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), len(models), squeeze=False, sharey="row")
    longest = max(run.seconds for group in found for run in group.runs) / 60 or 1.0  # 0: random weights alone
    handles: dict[str, Artist] = {}
    for line, (protocol, during) in zip(grid, rows, strict=True):
        for axes, model in zip(line, models, strict=True):
            for group in (each for each in found if each.model == model):
                if group.method == RANDOM_BASELINE:
                    if not during and group.top1(protocol):
                        baseline = statistics.mean(group.top1(protocol))
                        axes.axhline(baseline, color="#8a8a94", linestyle="--", linewidth=1)
                elif during:
                    for curve in _curves(group, protocol):
                        axes.plot(*zip(*curve, strict=True), color=colors[group.method], linewidth=1.1)
                elif group.top1(protocol):
                    handles[group.method] = _point(axes, group, protocol, colors[group.method])
            axes.set_title(
                f"{without_formulas(model)}: {TITLES[protocol]}{', during training' if during else ''}"
            )
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlim(0, 1.05 * longest)
        line[0].set_ylabel("top-1 %")
    for axes in grid[-1]:
        axes.set_xlabel(f"training time ({clock_name(comparison)} minutes)")
    figure.legend(
        handles.values(),
        map(without_formulas, handles),
        loc="outside right upper",
        frameon=False,
        fontsize="small",
    )
    notes = "bars: standard deviation over seeds; hollow: a single run; dashed: random weights"
    if comparison.probes:
        notes += "\nduring training: probes on {:,} training and {:,} test images".format(
            *probed_on(comparison)
        )
    figure.supxlabel(notes, fontsize="small", color="#60606c")
    write_png(path, draw_figure(figure))


def _point(axes: Axes, group: Group, protocol: str, color: str) -> Artist:
    """Draws the accuracy at the end of training."""
    values = group.top1(protocol)
    many = len(values) > 1
    return axes.errorbar(
        group.mean("seconds") / 60,
        statistics.mean(values),
        yerr=statistics.stdev(values) if many else None,
        color=color,
        marker="o",
        markersize=6,
        markerfacecolor=color if many else "none",
        capsize=3,
        linestyle="",
    )[0]


def _curves(group: Group, protocol: str) -> list[list[tuple[float, float]]]:
    """Returns minutes and accuracy of every run's probes."""
    return [
        [(point.seconds / 60, point.top1[protocol]) for point in run.curve]
        for run in group.runs
        if run.curve and all(protocol in point.top1 for point in run.curve)
    ]
