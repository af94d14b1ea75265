"""What is compared with what, and for how long: an equal budget in steps of every method and backbone."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from coma.config import PretrainConfig, ProbeConfig
from coma.errors import BadInput

Unit = Literal["images", "views", "seconds", "flops"]
Protocol = Literal["knn", "linear", "finetune"]

RANDOM_BASELINE = "random"
"""Name of the row without training."""
TRIAL_STEPS = 40
"""Of a run that tells how long a step takes."""
_WARM_UP = 10
"""First steps of it that do not count."""
_END = 16384
"""Bytes that hold the last lines of a log, several times over."""


@dataclass(frozen=True)
class Entry:
    """A method on a backbone."""

    method: str
    """As the table calls it."""
    model: str
    """Likewise."""
    config: PretrainConfig
    """Of all its runs; out, seed, steps and probe are set for each."""
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """For folders."""
        return f"{slug(self.method)}-{slug(self.model)}"


@dataclass(frozen=True)
class Comparison:
    """All that is asked for."""

    entries: tuple[Entry, ...]
    unit: Unit
    """What every run gets the same amount of. images: seen in training, crops counted each time. views:
    encoded of them. seconds: of training steps, without start-up, pictures, probes and saving; on a GPU by
    the clock, on a CPU the computing time of all threads added up. flops: forward and backward."""
    amount: float
    test: Path
    """Labelled images, with train and test."""
    protocols: tuple[Protocol, ...]
    out: Path
    reference: str
    """Method that times and accuracies are put in relation to."""
    device: Literal["cpu", "cuda"]
    jobs: int = 1
    """Processes side by side."""
    threads: int = 1
    """Of each, on a CPU."""
    gpus: tuple[str, ...] = ()
    """Names for CUDA_VISIBLE_DEVICES."""
    workers: int = 0
    """Processes of each that decode images."""
    probes: int = 0
    """Looks at every run on its way; 0: none."""
    probe_limits: tuple[int, int] = (2000, 1000)
    """Labelled training and test images of such a look."""
    random_baseline: bool = True
    """Measure random weights, too."""
    finetune_flags: tuple[str, ...] = ()
    """Of `coma evaluate --protocol finetune`."""
    finetune_epochs: float = 1.0
    """That follow from them; for the estimate of the time that is left."""
    allow_changed_data: bool = False
    """Go on although the images are not those that it was begun with."""


@dataclass(frozen=True)
class Cost:
    """Of one step of an entry, per image."""

    parameters: int
    """Of the encoder."""
    views: int
    flops: float | None
    """Forward and backward; None where they cannot be counted."""
    seconds: float | None = None
    """Of the clock that the budget counts on; None where it was not measured."""


def slug(text: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-")


def cost(config: PretrainConfig, seconds: float | None = None) -> Cost:
    """What follows from the settings alone; nothing is computed, but for shapes.

    Args:
        config: Of a run.
        seconds: Of one image in training, as measured.
    """
    import torch

    from coma.models import build_encoder
    from pretrain.training.throughput import flops_per_image, views_per_image

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_encoder(config.model).parameters())
    try:
        flops = flops_per_image(config)
    except RuntimeError:
        flops = None
    return Cost(parameters, views_per_image(config), flops, seconds)


def steps_for(unit: Unit, amount: float, batch_size: int, cost: Cost, name: str = "this method") -> int:
    """Optimizer steps that come nearest to the budget.

    Raises:
        BadInput: it cannot be counted for this method, or is less than a step.
    """
    per_image = {"images": 1.0, "views": float(cost.views), "seconds": cost.seconds, "flops": cost.flops}[
        unit
    ]
    if not per_image:
        raise BadInput(f"--budget {unit}: cannot be counted for {name}; choose another unit")
    a_step = per_image * batch_size
    if amount < a_step:
        raise BadInput(f"--budget {unit} {amount:g}: is less than a step of {name}, which takes {a_step:.4g}")
    return round(amount / a_step)


def run_config(entry: Entry, seed: int, steps: int, comparison: Comparison) -> PretrainConfig:
    """The settings of one run."""
    probe = ProbeConfig()
    if comparison.probes:
        train, test = comparison.probe_limits
        probe = ProbeConfig(
            comparison.test,
            probe_steps=math.ceil(steps / comparison.probes),
            probe_protocols=frozen_of(comparison.protocols) or ("knn", "linear"),
            probe_train=train,
            probe_test=test,
        )
    return replace(
        entry.config,
        optimizer=replace(entry.config.optimizer, steps=steps),
        run=replace(entry.config.run, out=comparison.out / "runs" / f"{entry.name}-{seed}", seed=seed),
        probe=probe,
    )


def trial_config(entry: Entry, out: Path) -> PretrainConfig:
    """The settings of a short run that tells how long a step takes."""
    return replace(
        entry.config,
        optimizer=replace(entry.config.optimizer, steps=TRIAL_STEPS),
        run=replace(entry.config.run, out=out, log_steps=1, reconstruction_every=0),
    )


def metrics_rows(run: Path) -> list[dict[str, Any]]:
    """The log of a run; nothing where there is none yet. A line that a kill cut short is left out."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run: Path) -> int:
    """Where the log of a run ends, and 0 where there is none yet; its last lines alone are read."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _END, 0))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def step_seconds(row: dict[str, Any], batch_size: int) -> float:
    """Of a step, by the clock that budgets count on: the CPU's where the run was on one, else the wall's."""
    return row["cpu_s"] if "cpu_s" in row else batch_size / row["images_per_s"]


def trial_seconds(run: Path, batch_size: int) -> float:
    """Seconds of training per image: the mean over the trial's steps, without the first."""
    rows = [row for row in metrics_rows(run) if "loss" in row][_WARM_UP:]
    return statistics.mean(step_seconds(row, batch_size) for row in rows) / batch_size


def check(comparison: Comparison) -> None:
    """Refuse what cannot be compared, before anything runs.

    Raises:
        BadInput: settings, or labelled images that do not serve.
    """
    from coma.data import open_source
    from coma.objectives.teachers import with_weights_hash
    from pretrain.evaluate import check_labelled
    from pretrain.training.run_plan import check_shapes, split_batch

    names = [entry.name for entry in comparison.entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(f"{', '.join(twice)}: asked for twice; leave one out")
    for entry in comparison.entries:
        if len(set(entry.seeds)) < len(entry.seeds):
            raise BadInput(f"--seeds {' '.join(map(str, entry.seeds))}: one was given twice; leave it out")
        if slug(entry.method) == RANDOM_BASELINE:
            raise BadInput(f"{entry.method}: the table calls untrained weights so; choose another name")
    models = {slug(entry.model): entry.model for entry in comparison.entries}
    for entry in comparison.entries:
        if models[slug(entry.model)] != entry.model:
            both = f"{entry.model!r} and {models[slug(entry.model)]!r}"
            raise BadInput(f"--models {both}: would share one folder; give one a name: 'NAME: {entry.model}'")
    if comparison.reference not in {entry.method for entry in comparison.entries}:
        methods = ", ".join(dict.fromkeys(entry.method for entry in comparison.entries))
        raise BadInput(f"--reference {comparison.reference}: is none of the methods: {methods}")
    check_labelled(comparison.test, frozen_of(comparison.protocols))
    for entry in comparison.entries:
        config = entry.config
        check_shapes(config)
        split_batch(config.optimizer, 0, 1)
        with_weights_hash(config)
        if config.data.images is None:
            raise BadInput("give the images to train on: coma compare IMAGES ...")
    open_source(comparison.entries[0].config.data.images or Path())


def frozen_of(protocols: Sequence[Protocol]) -> tuple[Literal["knn", "linear"], ...]:
    """Those that measure frozen features."""
    return tuple(name for name in protocols if name != "finetune")
