"""The runs of a comparison: equal budgets in steps of every method and backbone, and the logs of the runs."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coma.config import PretrainConfig, ProbeConfig
from coma.config.compare import (
    LABEL_SHARES,
    RANDOM_BASELINE,
    CompareConfig,
    Entry,
    Unit,
    finetune_config,
    slug,
)
from coma.errors import BadInput

log = logging.getLogger(__name__)

TRIAL_STEPS = 40
"""Steps of a trial run, which measures the time of a step."""
_WARM_UP = 10
"""First steps of a trial run, which are not measured."""
_END = 16384
"""Bytes at the end of a log that hold its last lines several times over."""


@dataclass(frozen=True)
class Cost:
    """Cost of one training image."""

    parameters: int
    """Parameters of the encoder."""
    views: int
    flops: float | None
    """FLOPs, forward and backward; None where they cannot be counted."""
    seconds: float | None = None
    """Seconds on the budget's clock; None where they were not measured."""


def cost(config: PretrainConfig) -> Cost:
    """Returns the cost that follows from the settings alone; only shapes are computed."""
    import torch

    from coma.models import build_encoder
    from pretrain.training.throughput import flops_per_image, views_per_image

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_encoder(config.model).parameters())
    try:
        flops = flops_per_image(config)
    except RuntimeError:
        flops = None
    return Cost(parameters, views_per_image(config), flops)


def steps_for(unit: Unit, amount: float, batch_size: int, cost: Cost, name: str = "this method") -> int:
    """Returns the number of optimizer steps nearest to the budget.

    Raises:
        BadInput: the unit cannot be counted for this method, or the budget is less than a step.
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


def run_config(entry: Entry, seed: int, steps: int, comparison: CompareConfig) -> PretrainConfig:
    """Returns the settings of one run."""
    probe = ProbeConfig()
    if comparison.probes:
        probe = ProbeConfig(
            comparison.test,
            probe_steps=math.ceil(steps / comparison.probes),
            probe_protocols=comparison.frozen_protocols or ("knn", "linear"),
            probe_train=comparison.probe_train,
            probe_test=comparison.probe_test,
        )
    return replace(
        entry.config,
        optimizer=replace(entry.config.optimizer, steps=steps),
        run=replace(entry.config.run, out=comparison.out / "runs" / f"{entry.name}-{seed}", seed=seed),
        probe=probe,
    )


def short_config(entry: Entry, out: Path, steps: int, log_steps: int) -> PretrainConfig:
    """Returns the settings of a trial run, with the first seed."""
    return replace(
        entry.config,
        optimizer=replace(entry.config.optimizer, steps=steps),
        run=replace(entry.config.run, out=out, seed=entry.seeds[0], log_steps=log_steps),
    )


def metrics_rows(run: Path) -> list[dict[str, Any]]:
    """Returns the log of a run, empty if there is none yet; a line that a kill cut short is left out."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(run: Path) -> int:
    """Returns the last step in the log of a run, 0 if there is none yet; only the last lines are read."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _END, 0))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def step_seconds(row: dict[str, Any], batch_size: int) -> float:
    """Returns the seconds of a step on the budget's clock: CPU time on a CPU, else wall-clock time."""
    return row["cpu_s"] if "cpu_s" in row else batch_size / row["images_per_s"]


def trial_seconds(run: Path, batch_size: int) -> float:
    """Returns the seconds per image of a trial run: the mean over its steps, without the first ones."""
    rows = [row for row in metrics_rows(run) if "loss" in row][_WARM_UP:]
    return statistics.mean(step_seconds(row, batch_size) for row in rows) / batch_size


def check(comparison: CompareConfig) -> None:
    """Checks settings and labelled images before anything runs.

    Raises:
        BadInput: settings that cannot be compared, or labelled images that cannot be used.
    """
    from coma.data import open_source
    from coma.objectives.teachers import with_weights_hash
    from pretrain.evaluate import check_labelled
    from pretrain.training.run_plan import check_shapes, split_batch

    names = [entry.name for entry in comparison.entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        same = ", ".join(dict.fromkeys(repr(e.method) for e in comparison.entries if e.name in twice))
        raise BadInput(
            f"--methods {same}: would share one folder ({', '.join(twice)}); leave one out, or "
            "give it another name in letters: 'NAME: METHOD'"
        )
    models = {slug(entry.model): entry.model for entry in comparison.entries}
    for entry in comparison.entries:
        if entry.config.data.tiles is not None:
            raise BadInput("--tiles: comparisons train on whole images; cut them first (coma pack --tiles)")
        if len(set(entry.seeds)) < len(entry.seeds):
            raise BadInput(f"--seeds {' '.join(map(str, entry.seeds))}: one was given twice; leave it out")
        if slug(entry.method) == RANDOM_BASELINE:
            raise BadInput(f"{entry.method}: is the table's name for untrained weights; choose another name")
        if models[slug(entry.model)] != entry.model:
            both = f"{entry.model!r} and {models[slug(entry.model)]!r}"
            raise BadInput(f"--models {both}: would share one folder; give one a name: 'NAME: {entry.model}'")
    if comparison.reference not in {entry.method for entry in comparison.entries}:
        methods = ", ".join(dict.fromkeys(entry.method for entry in comparison.entries))
        raise BadInput(f"--reference {comparison.reference}: is none of the methods: {methods}")
    if comparison.finetune and not comparison.finetune_protocols:
        log.warning("--finetune: has no effect without --protocols finetune")
    if comparison.finetune_10 and "finetune-10" not in comparison.protocols:
        log.warning("--finetune-10: has no effect without --protocols finetune-10")
    check_labelled(comparison.test, comparison.frozen_protocols)
    _check_hold_out(comparison)
    for entry in comparison.entries:
        check_shapes(entry.config)
        split_batch(entry.config.optimizer, 0, 1)
        with_weights_hash(entry.config)
    open_source(comparison.images)


def _check_hold_out(comparison: CompareConfig) -> None:
    """Refuses labels so few that fine-tuning, which comes after all runs, would fail."""
    from coma.data import align_single_labels, hold_out, open_labelled_splits

    splits = open_labelled_splits(comparison.test)
    labels, _, _ = align_single_labels(splits.train, splits.test)
    for protocol in comparison.finetune_protocols:
        config, share = finetune_config(comparison.finetune_flags_of(protocol)), LABEL_SHARES[protocol]
        used = labels if share == 1 else labels[~hold_out(labels, 1 - share, 0)]
        held_out = config.optimizer.hold_out
        if held_out and not (splits.val or config.val or hold_out(used, held_out, 0).any()):
            flag = protocol.replace("fine", "--fine")
            raise BadInput(
                f"--protocols {protocol}: {comparison.test} leaves every class a single image, so none can "
                f'be held out to choose the checkpoint; take the last one ({flag} "--hold-out 0"), or add a '
                "val split"
            )
