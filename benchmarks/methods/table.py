"""The README's tables of methods, from what `run.py` recorded: one for each data set.

    python benchmarks/methods/table.py benchmarks/results/methods_*.json

Linear-probe accuracy (kNN in brackets), mean and sample deviation over the seeds, under both budgets; of
those with equal time the seconds that were used, on the average; and the computing time of an image relative
to MAE's on the same backbone, as measured in the runs with equal images. Below it CoMA less MAE and less its
control, seed by seed, and the time of an image of the paper's own pair.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

Runs = list[dict[str, Any]]


def select(found: dict[str, Any], unit: str, method: str, backbone: str) -> Runs:
    """All seeds of a row; none where it was not run."""
    runs = found["budgets"].get(unit, {}).get("runs", [])
    return [run for run in runs if (run["method"], run["model"]) == (method, backbone)]


def accuracy(runs: Runs, unit: str) -> str:
    """Linear and kNN, in percent; and seconds."""
    if not runs:
        return ""
    linear, knn = (spread([run["top1"][protocol] for run in runs]) for protocol in ("linear", "knn"))
    used = statistics.mean(run["seconds"] for run in runs)
    return f"{linear} ({knn})" + (f", {used:.0f} s" if unit == "seconds" and used else "")


def spread(values: Sequence[float]) -> str:
    """Mean, and deviation where there are several."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def differences(found: dict[str, Any], of: str, than: str) -> str:
    """Points of `of` above `than`, by budget and backbone, over the seeds that both have."""
    parts = []
    for unit, backbone in product(found["budgets"], found["backbones"]):
        by_seed = [
            {run["seed"]: run["top1"] for run in select(found, unit, each, backbone)} for each in (of, than)
        ]
        seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
        linear, knn = (
            spread([by_seed[0][seed][protocol] - by_seed[1][seed][protocol] for seed in seeds])
            for protocol in ("linear", "knn")
        )
        parts.append(f"equal {unit}, {backbone}: {linear} ({knn})")
    return f"- {of} less {than}: {'; '.join(parts)}"


def pace(runs: Runs, reference: Runs) -> str:
    """Time of an image over the reference's."""
    if not runs or not runs[0]["images"]:
        return ""
    own, other = (
        statistics.mean(run["seconds"] for run in each) / statistics.mean(run["images"] for run in each)
        for each in (runs, reference)
    )
    return f"{own / other:.1f}"


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    runs = found["budgets"]["images"]["runs"]
    methods, backbones = (list(dict.fromkeys(run[key] for run in runs)) for key in ("method", "model"))
    budgets = {unit: f"{budget['amount']:,g} {unit}" for unit, budget in found["budgets"].items()}
    head = ["method"]
    for backbone in backbones:
        head += [f"{backbone}: {text}" for text in budgets.values()] + ["time / MAE"]
    lines = [head, ["---"] * len(head)]
    for method in methods:
        line = [method]
        for backbone in backbones:
            equal = [select(found, unit, method, backbone) for unit in budgets]
            line += [*map(accuracy, equal, budgets), pace(equal[0], select(found, "images", "mae", backbone))]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """One after the other."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for path in map(Path, sys.argv[1:]):
        found = json.loads(path.read_text())
        pair = pace(select(found, "images", "coma", "DyViT"), select(found, "images", "mae", "ViT"))
        print(f"### {found['data']}\n\n{table(found)}\n")
        print(*(differences(found, "coma", than) for than in ("mae", "coma-independent")), sep="\n")
        print(f"- time of an image, coma on DyViT over mae on ViT: {pair}")
        print(f"\n{found['machine']}; teacher: {found['teacher']}\n")


if __name__ == "__main__":
    main()
