"""From run directories and scores to rows and their means: every number of the table, none from memory."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pretrain.sweep.plan import RANDOM_BASELINE, Comparison, Cost, Entry, metrics_rows, slug, step_seconds

TITLES = {"knn": "kNN", "linear": "linear", "finetune": "fine-tuned"}
"""Protocols as tables call them."""


@dataclass(frozen=True)
class Look:
    """A probe on the way."""

    images: int
    seconds: float
    """Of training before it."""
    top1: dict[str, float]
    """By protocol, in percent."""


@dataclass(frozen=True)
class Result:
    """One run, measured."""

    method: str
    model: str
    seed: int
    parameters: int
    """Of the encoder."""
    steps: int
    images: int
    views: int
    seconds: float
    """Of training steps, by the clock of the budget."""
    flops: float | None
    loss: float | None
    top1: dict[str, float]
    """Top-1 on the test images by protocol, in percent."""
    validated: float | None = None
    """Top-1 on the validation images that chose the fine-tuned checkpoint, in percent."""
    looks: tuple[Look, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Group:
    """The runs of a method on a backbone, over all seeds."""

    method: str
    model: str
    runs: tuple[Result, ...]

    def mean(self, name: str) -> float:
        """Of a number of every run."""
        return statistics.mean(getattr(run, name) for run in self.runs)

    def top1(self, protocol: str) -> list[float]:
        """Of all runs that were measured so, in percent."""
        return [run.top1[protocol] for run in self.runs if protocol in run.top1]

    def flops_per_image(self) -> float | None:
        """Of training, forward and backward; None where they cannot be counted, or there was none."""
        run = self.runs[0]
        return run.flops / run.images if run.flops and run.images else None

    def seconds_per_image(self) -> float:
        """Of training."""
        return self.mean("seconds") / self.mean("images")


@dataclass(frozen=True)
class Reach:
    """When the runs of a group first did as well on the way as the reference did in the end."""

    target: float
    """The reference's last probe, mean over its seeds, in percent."""
    images: tuple[int, ...]
    """Of every run that got there, up to that probe."""
    seconds: tuple[float, ...]
    """Likewise, of training."""
    runs: int
    learned: bool
    """Whether the reference ended better than it began, by more than two standard errors of counting test
    images; else there is nothing to reach."""


def read_result(comparison: Comparison, entry: Entry, seed: int, cost: Cost) -> Result | None:
    """What a run left; None where it is not done."""
    name = f"{entry.name}-{seed}"
    run = comparison.out / "runs" / name
    rows = metrics_rows(run)
    logged = [row for row in rows if "loss" in row]
    if not logged or not (run / "artifact" / "config.json").exists():
        return None
    steps = json.loads((run / "artifact" / "config.json").read_text())["trained"]["steps"]
    if steps != logged[-1]["step"]:
        return None
    top1, validated = _scores(comparison, name)
    batch = entry.config.optimizer.batch_size
    images = steps * batch
    return Result(
        method=entry.method,
        model=entry.model,
        seed=seed,
        parameters=cost.parameters,
        steps=steps,
        images=images,
        views=images * cost.views,
        seconds=seconds_until(logged, steps, batch),
        flops=cost.flops and cost.flops * images,
        loss=logged[-1]["loss"],
        top1=top1,
        validated=validated,
        looks=tuple(
            Look(
                row["step"] * batch,
                seconds_until(logged, row["step"], batch),
                {name: 100 * row[f"probe_{name}"] for name in ("knn", "linear") if f"probe_{name}" in row},
            )
            for row in rows
            if "probe_seconds" in row
        ),
    )


def read_floor(comparison: Comparison, entry: Entry, seed: int, cost: Cost) -> Result | None:
    """The scores of random weights; None where there is none."""
    top1, validated = _scores(comparison, floor_name(entry, seed))
    if not top1:
        return None
    return Result(
        RANDOM_BASELINE, entry.model, seed, cost.parameters, 0, 0, 0, 0.0, 0.0, None, top1, validated
    )


def floor_name(entry: Entry, seed: int) -> str:
    """Of random weights like those of an entry."""
    return f"{RANDOM_BASELINE}-{slug(entry.model)}-{seed}"


def score_file(comparison: Comparison, name: str, protocol: str) -> Path:
    """Where `coma evaluate` leaves the scores of a run; the frozen protocols share one."""
    if protocol != "finetune":
        protocol = "-".join(each for each in comparison.protocols if each != "finetune")
    return comparison.out / "scores" / f"{name}-{protocol}.json"


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The scores in such a file; none where it is not there or not whole."""
    try:
        return json.loads(path.read_text())["scores"]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def _scores(comparison: Comparison, name: str) -> tuple[dict[str, float], float | None]:
    top1: dict[str, float] = {}
    validated = None
    for path in dict.fromkeys(score_file(comparison, name, each) for each in comparison.protocols):
        for score in read_scores(path):
            settings = score["settings"]
            top1[score["protocol"]] = 100 * settings.get("last_top1", score["top1"])
            if "val_top1" in settings:
                validated = 100 * settings["val_top1"]
    return top1, validated


def tuned_by_earlier_version(comparison: Comparison) -> int:
    """Returns how many fine-tuned scores are of a last step: earlier versions chose by the test images."""
    files = (comparison.out / "scores").glob("*-finetune.json")
    return sum("last_top1" in score["settings"] for path in files for score in read_scores(path))


def seconds_until(logged: Sequence[dict[str, Any]], step: int, batch_size: int) -> float:
    """Seconds of the first `step` training steps, from the log points' means."""
    points = [{"step": 0}, *logged]
    return sum(
        (min(after["step"], step) - before["step"]) * step_seconds(after, batch_size)
        for before, after in pairwise(points)
        if before["step"] < step
    )


def groups(results: Sequence[Result]) -> list[Group]:
    """Runs put together over the seeds, in order of appearance."""
    keys = dict.fromkeys((result.method, result.model) for result in results)
    return [
        Group(method, model, tuple(r for r in results if (r.method, r.model) == (method, model)))
        for method, model in keys
    ]


def reach(group: Group, reference: Group | None, protocol: str, test_images: int) -> Reach | None:
    """When the group first did as well as the reference did in the end; None without probes.

    An upper bound where probes are far apart, and an early one where they are noisy: of several looks, one
    is above by chance.
    """
    if reference is None:
        return None
    finals = [run.looks[-1].top1[protocol] for run in reference.runs if _probed(run, protocol)]
    runs = [run for run in group.runs if _probed(run, protocol)]
    if not finals or not runs:
        return None
    target = statistics.mean(finals)
    first = [
        next((look for look in run.looks if look.images and look.top1[protocol] >= target), None)
        for run in runs
    ]
    there = [look for look in first if look is not None]
    begun = statistics.mean(run.looks[0].top1[protocol] for run in reference.runs if _probed(run, protocol))
    noise = standard_error(target, test_images)
    return Reach(
        target,
        tuple(look.images for look in there),
        tuple(look.seconds for look in there),
        len(runs),
        target > begun + 2 * noise,
    )


def standard_error(percent: float, images: int) -> float:
    """Of an accuracy that was counted on so many images, in percent (binomial)."""
    return math.sqrt(max(percent * (100 - percent), 0.0) / images)


def _probed(run: Result, protocol: str) -> bool:
    return bool(run.looks) and protocol in run.looks[-1].top1


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean, sample deviation and number of values."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f} (n = 1)"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} (n = {len(values)})"
