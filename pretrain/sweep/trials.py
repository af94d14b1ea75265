"""Trials before the runs of a comparison: they measure the time of a step, and choose learning rates."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from coma.atomic_io import write_json
from coma.config import PretrainConfig
from coma.config.compare import SEARCH_SHARE, CompareConfig, Entry
from coma.errors import CheckFailed
from coma.signals import StopRequest
from pretrain.sweep.jobs import pretraining, run_jobs
from pretrain.sweep.plan import (
    TRIAL_STEPS,
    Cost,
    metrics_rows,
    short_config,
    steps_for,
    trial_seconds,
)
from pretrain.sweep.process_pool import Job

log = logging.getLogger(__name__)

_LOG_POINTS = 20
"""Log points of a trial of a learning rate; the last quarter of them is its loss."""


def timed(comparison: CompareConfig, costs: Mapping[str, Cost], stop: StopRequest) -> dict[str, Cost]:
    """Returns costs with seconds, measured once in a trial of every entry, as many at a time as later.

    Raises:
        CheckFailed: a trial failed.
        Interrupted: Ctrl-C or SIGTERM.
    """
    outs = {entry.name: comparison.out / "trials" / entry.name for entry in comparison.entries}
    jobs = [
        pretraining(comparison, f"trial-{entry.name}", short_config(entry, outs[entry.name], TRIAL_STEPS, 1))
        for entry in comparison.entries
    ]
    if failures := run_jobs(comparison, jobs, stop).failures:
        raise CheckFailed("; ".join(map(str, failures)))
    batch = {entry.name: entry.config.optimizer.batch_size for entry in comparison.entries}
    return {
        name: replace(known, seconds=trial_seconds(outs[name], batch[name])) for name, known in costs.items()
    }


def with_rates(comparison: CompareConfig, costs: Mapping[str, Cost], stop: StopRequest) -> CompareConfig:
    """Returns the comparison with the learning rates that a search chose, each entry's by itself.

    Every rate is tried with the first seed and SEARCH_SHARE of the budget. The one whose training loss ends
    lowest is chosen, so that no label is used. The choice is kept in `trials/lr-ENTRY.json`: it is not made
    again when the comparison resumes.

    Raises:
        BadInput: that share of the budget is less than a step.
        CheckFailed: the trials of all rates failed.
        Interrupted: Ctrl-C or SIGTERM.
    """
    kept = {e.name: comparison.out / "trials" / f"lr-{e.name}.json" for e in comparison.entries}
    undecided = [entry for entry in comparison.entries if not kept[entry.name].exists()]
    trials = {
        (entry.name, rate): _rate_trial(comparison, entry, rate, costs[entry.name])
        for entry in undecided
        for rate in comparison.lr_search
    }
    pool = run_jobs(comparison, [job for job, _ in trials.values()], stop)
    for failure in pool.failures:
        log.warning("%s; this rate is left out", failure)
    for entry in undecided:
        tried = {rate: trials[entry.name, rate] for rate in comparison.lr_search}
        losses = {rate: _last_loss(config.run.out) for rate, (job, config) in tried.items() if job.done()}
        losses = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        if not losses:
            logs = comparison.out / "logs"
            raise CheckFailed(f"{entry.name}: no rate of --lr-search could be tried; see {logs}")
        best = min(losses, key=losses.__getitem__)
        write_json(kept[entry.name], {"base_lr": best, "losses": losses})
        others = ", ".join(f"{rate:g}: {loss:.4g}" for rate, loss in losses.items())
        log.info("%s on %s: --base-lr %g, by the loss (%s)", entry.method, entry.model, best, others)
    rates = {name: json.loads(path.read_text())["base_lr"] for name, path in kept.items()}
    return replace(comparison, entries=tuple(_with_rate(e, rates[e.name]) for e in comparison.entries))


def _rate_trial(
    comparison: CompareConfig, entry: Entry, rate: float, cost: Cost
) -> tuple[Job, PretrainConfig]:
    """Returns the job of a trial, and its settings."""
    name = f"lr-{entry.name}-{rate:g}"
    batch, share = entry.config.optimizer.batch_size, comparison.amount * SEARCH_SHARE
    steps = steps_for(comparison.unit, share, batch, cost, f"a trial of {entry.name}")
    out = comparison.out / "trials" / name
    config = short_config(_with_rate(entry, rate), out, steps, math.ceil(steps / _LOG_POINTS))
    work = (cost.flops or 1.0) * steps * batch
    return pretraining(comparison, name, config, work), config


def _with_rate(entry: Entry, rate: float) -> Entry:
    optimizer = replace(entry.config.optimizer, base_lr=rate)
    return replace(entry, config=replace(entry.config, optimizer=optimizer))


def _last_loss(run: Path) -> float:
    """Returns the mean loss of the last quarter of the log points; NaN if none was written."""
    losses = [row["loss"] for row in metrics_rows(run) if "loss" in row]
    return statistics.mean(losses[-max(1, len(losses) // 4) :]) if losses else math.nan
