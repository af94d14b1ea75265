"""The picture of the results page: accuracy against training time, of what `optimizers.py` recorded.

    python benchmarks/methods/figure.py benchmarks/results/optimizers_*.json --out docs/optimizers.png

A column for each data set, a row for each protocol. A point is a method with an optimizer at one learning
rate: filled, with bars of the sample deviation over the seeds, where all seeds were run, and hollow where
one was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import groupby
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TITLES = {"class-cifar10": "CIFAR-10, 32 px", "class-tinyimagenet40": "Tiny-ImageNet, 40 classes, 64 px"}
COLORS = {
    **{("mae", "adamw"): "#e0a458", ("mae", "muon"): "#b8501c"},
    **{("coma", "adamw"): "#7fa8dd", ("coma", "muon"): "#1b4f9c"},
}
NAMES = {"mae": "MAE", "coma": "CoMA", "adamw": "AdamW", "muon": "Muon"}


def main() -> None:
    """Draws all files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    figure = Figure(figsize=(4.8 * len(args.results) + 1.5, 6.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(args.results), squeeze=False, sharex="col")
    handles = {}
    for column, path in enumerate(args.results):
        found = json.loads(path.read_text())
        random = [run for run in found["runs"] if run["method"] == "random"]
        trained = [run for run in found["runs"] if run["method"] != "random"]
        minutes = {
            tuple(name.split(", ")[1:]): found["images"] * seconds / 60
            for name, seconds in found["seconds_per_image"].items()
        }
        for line, protocol in enumerate(("linear", "knn")):
            axes = grid[line][column]
            axes.axhline(
                statistics.mean(run["top1"][protocol] for run in random), color="#8a8a94", ls="--", lw=1
            )
            for name, runs in groupby(trained, key=lambda run: run["method"]):
                method, optimizer = name.replace(",", "").split()[:2]
                several = list(runs)
                top1 = [run["top1"][protocol] for run in several]
                color = COLORS[method, optimizer]
                drawn = axes.errorbar(
                    minutes[method, optimizer],
                    statistics.mean(top1),
                    yerr=statistics.stdev(top1) if len(top1) > 1 else None,
                    color=color,
                    markerfacecolor=color if len(top1) > 1 else "none",
                    marker="o",
                    capsize=3,
                    linestyle="",
                )
                if len(top1) > 1:
                    handles[f"{NAMES[method]}, {NAMES[optimizer]}"] = drawn[0]
            axes.set_title(f"{TITLES[found['data']]}: {'linear probe' if protocol == 'linear' else 'kNN'}")
            axes.set_ylabel("top-1 %")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        grid[-1][column].set_xlabel("training time (CPU minutes, one thread)")
        grid[-1][column].set_xlim(left=0)
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
    figure.supxlabel(
        "filled: best learning rate, bars: deviation over seeds; hollow: other rates; dashed: untrained",
        fontsize="small",
        color="#60606c",
    )
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
