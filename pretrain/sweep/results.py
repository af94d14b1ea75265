"""Results of a comparison: numbers of every run, read from run directories and scores, and their means."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from coma.config.compare import RANDOM_BASELINE, CompareConfig, Entry, slug
from pretrain.sweep.plan import Cost, metrics_rows, step_seconds

TITLES = {"knn": "kNN", "linear": "linear", "finetune": "fine-tuned",
          "finetune-10": "fine-tuned, 10 % of labels"}  # fmt: skip
"""Names of the protocols in tables."""


@dataclass(frozen=True)
class ProbePoint:
    """Accuracy of a probe during training."""

    images: int
    seconds: float
    """Training time before it."""
    top1: dict[str, float]
    """Top-1 by protocol, in percent."""


@dataclass(frozen=True)
class Result:
    """One run with its scores."""

    method: str
    model: str
    seed: int
    parameters: int
    """Parameters of the encoder."""
    steps: int
    images: int
    views: int
    seconds: float
    """Time of training steps on the budget's clock."""
    flops: float | None
    loss: float | None
    top1: dict[str, float]
    """Top-1 on the test images by protocol, in percent."""
    validated: dict[str, float] = field(default_factory=dict)
    """Top-1 on the validation images that chose the fine-tuned checkpoint, by protocol, in percent."""
    curve: tuple[ProbePoint, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Group:
    """The runs of a method on a backbone with all seeds."""

    method: str
    model: str
    runs: tuple[Result, ...]

    def mean(self, name: str) -> float:
        """Returns the mean of a field over the runs."""
        return statistics.mean(getattr(run, name) for run in self.runs)

    def top1(self, protocol: str) -> list[float]:
        """Returns the top-1 of all runs that have this score, in percent."""
        return [run.top1[protocol] for run in self.runs if protocol in run.top1]

    def flops_per_image(self) -> float | None:
        """Returns FLOPs per training image, forward and backward; None if unknown or without training."""
        run = self.runs[0]
        return run.flops / run.images if run.flops and run.images else None

    def seconds_per_image(self) -> float:
        """Returns seconds per training image."""
        return self.mean("seconds") / self.mean("images")


@dataclass(frozen=True)
class TimeToTarget:
    """The first probes of a group's runs that matched the last probe of the reference."""

    target: float
    """The reference's last probe, mean over its seeds, in percent."""
    images: tuple[int, ...]
    """Images up to that probe, of every run that matched the target."""
    seconds: tuple[float, ...]
    """Training time up to that probe, of every run that matched the target."""
    runs: int
    learned: bool
    """Whether the reference's last probe is better than its first by more than two standard errors of
    counting test images; without that, the target means nothing."""


def read_result(comparison: CompareConfig, entry: Entry, seed: int, cost: Cost) -> Result | None:
    """Returns the result of a run, or None if it is not finished."""
    name = f"{entry.name}-{seed}"
    run = comparison.out / "runs" / name
    rows = metrics_rows(run)
    logged = [row for row in rows if "loss" in row]
    steps: int = read_trained(run / "artifact").get("steps", 0)
    if not logged or steps != logged[-1]["step"]:
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
        curve=tuple(
            ProbePoint(
                row["step"] * batch,
                seconds_until(logged, row["step"], batch),
                {name: 100 * row[f"probe_{name}"] for name in ("knn", "linear") if f"probe_{name}" in row},
            )
            for row in rows
            if "probe_seconds" in row
        ),
    )


def read_random_baseline(comparison: CompareConfig, entry: Entry, seed: int, cost: Cost) -> Result | None:
    """Returns the scores of random weights, or None if there are none yet."""
    top1, validated = _scores(comparison, random_baseline_name(entry, seed))
    if not top1:
        return None
    return Result(
        RANDOM_BASELINE, entry.model, seed, cost.parameters, 0, 0, 0, 0.0, 0.0, None, top1, validated
    )


def random_baseline_name(entry: Entry, seed: int) -> str:
    """Returns the name of random weights of an entry's backbone."""
    return f"{RANDOM_BASELINE}-{slug(entry.model)}-{seed}"


def score_folder(comparison: CompareConfig, name: str) -> Path:
    """Returns the folder of the scores of `coma evaluate`."""
    return comparison.out / "scores" / f"{name}-{'-'.join(comparison.frozen_protocols)}"


def classifier_run(comparison: CompareConfig, name: str, protocol: str = "finetune") -> Path:
    """Returns the run directory of `coma classify train`."""
    return comparison.out / protocol.replace("finetune", "finetuned") / name


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """Returns the scores of `coma evaluate` in a folder, none if they are missing or incomplete."""
    try:
        return json.loads((folder / "results.json").read_text())["scores"]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def read_trained(artifact: Path) -> dict[str, Any]:
    """Returns what an artifact says of its training, nothing if there is no artifact."""
    try:
        return json.loads((artifact / "config.json").read_text())["trained"]
    except FileNotFoundError:
        return {}


def _scores(comparison: CompareConfig, name: str) -> tuple[dict[str, float], dict[str, float]]:
    scores = read_scores(score_folder(comparison, name)) if comparison.frozen_protocols else []
    top1 = {score["protocol"]: 100 * score["top1"] for score in scores}
    validated: dict[str, float] = {}
    for protocol in comparison.finetune_protocols:
        trained = read_trained(classifier_run(comparison, name, protocol) / "artifact")
        for found, score in ((top1, "test_top1"), (validated, "val_top1")):
            found.update({protocol: 100 * trained[score]} if score in trained else {})
    return top1, validated


def seconds_until(logged: Sequence[dict[str, Any]], step: int, batch_size: int) -> float:
    """Returns the seconds of the first `step` training steps, from the means of the log points."""
    points = [{"step": 0}, *logged]
    return sum(
        (min(after["step"], step) - before["step"]) * step_seconds(after, batch_size)
        for before, after in pairwise(points)
        if before["step"] < step
    )


def groups(results: Sequence[Result]) -> list[Group]:
    """Returns the runs grouped over the seeds, in order of appearance."""
    keys = dict.fromkeys((result.method, result.model) for result in results)
    return [
        Group(method, model, tuple(r for r in results if (r.method, r.model) == (method, model)))
        for method, model in keys
    ]


def time_to_target(
    group: Group, reference: Group | None, protocol: str, test_images: int
) -> TimeToTarget | None:
    """Returns when the group first matched the reference's last probe, or None without probes.

    It is an upper bound where probes are far apart, and early where they are noisy: one of several probes is
    above the target by chance.
    """
    if reference is None:
        return None
    finals = [run.curve[-1].top1[protocol] for run in reference.runs if _probed(run, protocol)]
    runs = [run for run in group.runs if _probed(run, protocol)]
    if not finals or not runs:
        return None
    target = statistics.mean(finals)
    first = [
        next((point for point in run.curve if point.images and point.top1[protocol] >= target), None)
        for run in runs
    ]
    matched = [point for point in first if point is not None]
    begun = statistics.mean(run.curve[0].top1[protocol] for run in reference.runs if _probed(run, protocol))
    noise = standard_error(target, test_images)
    return TimeToTarget(
        target,
        tuple(point.images for point in matched),
        tuple(point.seconds for point in matched),
        len(runs),
        target > begun + 2 * noise,
    )


def standard_error(percent: float, images: int) -> float:
    """Returns the binomial standard error of an accuracy in percent, counted on so many images."""
    return math.sqrt(max(percent * (100 - percent), 0.0) / images)


def _probed(run: Result, protocol: str) -> bool:
    return bool(run.curve) and protocol in run.curve[-1].top1


def mean_and_std(values: Sequence[float]) -> str:
    """Returns mean, sample standard deviation and number of values as text."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f} (n = 1)"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} (n = {len(values)})"
