"""`compare`: settle the budget, run and measure everything that is not done yet, write the report.

out/data.json.gz           names and sizes of the images
out/settings/NAME.json     settings of a run; NAME is method-backbone-seed
out/trials/ENTRY/          the short run that told how long a step takes (--budget seconds)
out/runs/NAME/             the run, as `coma pretrain` leaves it
out/floor/NAME/            random weights as an artifact
out/scores/NAME-*.json     what `coma evaluate` measured
out/finetuned/NAME/        the fine-tuning run
out/logs, out/locks        of every process
out/compare.json           what was asked for; compare.md, compare.csv, compare.png
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from coma.artifact import ArtifactConfig, library_versions, save_artifact
from coma.atomic_io import lies_among, write_whole
from coma.config import PretrainConfig
from coma.config.serialization import flat, to_plain
from coma.data import measure, open_source
from coma.data.identity import FLAG, check_listing, list_data, read_listing, write_listing
from coma.errors import BadInput, CheckFailed, Interrupted
from coma.signals import StopRequest
from pretrain.evaluate import random_encoder
from pretrain.sweep.plan import (
    TRIAL_STEPS,
    Comparison,
    Cost,
    Entry,
    check,
    cost,
    frozen_of,
    last_step,
    run_config,
    steps_for,
    trial_config,
    trial_seconds,
)
from pretrain.sweep.process_pool import Job, Runner
from pretrain.sweep.progress import Progress
from pretrain.sweep.report import write_report
from pretrain.sweep.results import Result, floor_name, read_floor, read_result, read_scores, score_file

log = logging.getLogger(__name__)

_START_UP = 2e11
"""FLOPs that could be done while a process starts, roughly; for the estimate of the time that is left."""
_ANY = 3e8
"""Of an image, where they cannot be counted; for the same."""


@dataclass(frozen=True)
class Compared:
    """What came out."""

    comparison: Comparison
    results: tuple[Result, ...]
    costs: dict[str, Cost]
    failures: tuple[str, ...]
    table: Path


def compare(comparison: Comparison) -> Compared:
    """Run, measure and report; called again after any interruption, it goes on.

    Raises:
        BadInput: settings or labelled images that cannot be used, or a directory of another comparison.
        CheckFailed: no trial run of a method could tell how long a step takes.
        Interrupted: Ctrl-C or SIGTERM; every run has saved its state.
    """
    check(comparison)
    _open(comparison)
    _check_data(comparison)
    comparison = _with_statistics(comparison)
    with StopRequest() as stop, closing(Progress()) as progress:
        runner = Runner(comparison.out, _slots(comparison), progress.tell, stop)
        costs = {e.name: cost(e.config) for e in comparison.entries}
        if comparison.unit == "seconds":
            costs = _timed(comparison, costs, runner, progress)
        plans = []
        for entry in comparison.entries:
            batch = entry.config.optimizer.batch_size
            steps = steps_for(comparison.unit, comparison.amount, batch, costs[entry.name], entry.name)
            plans += [(entry, seed, run_config(entry, seed, steps, comparison)) for seed in entry.seeds]
        for _, _, config in plans:
            _keep_settings(comparison, config)
        images = sum(len(open_source(comparison.test, split)) for split in ("train", "test"))
        jobs = [
            job
            for entry, seed, config in plans
            for job in _jobs(comparison, entry, seed, config, costs[entry.name], images)
        ]
        jobs += _floor_jobs(comparison, costs, images)
        progress.start(jobs)
        try:
            runner.run(jobs)
        except Interrupted:
            write_report(comparison, collect(comparison, costs), costs, ["the comparison was stopped"])
            raise
    results = collect(comparison, costs)
    failures = (*map(str, runner.failures), *_missing(comparison, results, runner))
    return Compared(comparison, results, costs, failures, write_report(comparison, results, costs, failures))


def collect(comparison: Comparison, costs: dict[str, Cost]) -> tuple[Result, ...]:
    """All results that are there."""
    found: list[Result | None] = [
        read_result(comparison, entry, seed, costs[entry.name])
        for entry in comparison.entries
        for seed in entry.seeds
    ]
    if comparison.random_baseline:
        found += [read_floor(comparison, *each, costs[each[0].name]) for each in _floors(comparison)]
    return tuple(result for result in found if result)


def _missing(comparison: Comparison, results: Sequence[Result], runner: Runner) -> list[str]:
    """Runs that say that they are done, and cannot be read: cut short by a full disk, say."""
    there = {(result.method, result.model, result.seed) for result in results if result.top1}
    failed = {failure.name for failure in runner.failures}
    names = [
        f"{entry.name}-{seed}"
        for entry in comparison.entries
        for seed in entry.seeds
        if (entry.method, entry.model, seed) not in there
    ]
    runs = comparison.out / "runs"
    return [
        f"{name}: its log or its scores are not whole; delete {runs / name} and start again"
        for name in names
        if name not in failed and not any(each.startswith(f"{name}-") for each in failed)
    ]


def _open(comparison: Comparison) -> None:
    """Refuse a directory of something else, or of a comparison with another budget or other test images."""
    out = comparison.out
    asked = {
        "budget": [comparison.unit, comparison.amount],
        "test": str(comparison.test),
        "device": comparison.device,
        "threads": comparison.threads if comparison.device == "cpu" else None,
        "probes": [comparison.probes, *comparison.probe_limits],
        "finetune": list(comparison.finetune_flags),
    }
    path = out / "compare.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [
            f"{name} {before[name]} -> {asked[name]}" for name in asked if before.get(name) != asked[name]
        ]
        if changed:
            raise BadInput(
                f"{out}: holds a comparison with other settings: {', '.join(changed)}; leave them as they "
                "were (methods, models, seeds and protocols may be added), or give another --out"
            )
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise BadInput(f"--out {out}: is not empty and holds no comparison; choose another")
    text = json.dumps(asked, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def _check_data(comparison: Comparison) -> None:
    """Note which images are compared on, or refuse others than the comparison was begun with."""
    images = comparison.entries[0].config.data.images
    test = {f"{split} images": open_source(comparison.test, split) for split in ("train", "test")}
    now = list_data({"images": open_source(images or Path())}, labels=False) | list_data(test)
    begun = any((comparison.out / "settings").glob("*.json"))
    if not begun:
        notes = (lies_among(comparison.out, path) for path in dict.fromkeys((images, comparison.test)))
        for note in filter(None, notes):
            log.info(note)
    if begun:
        warn = partial(log.warning, "%s")
        check_listing(comparison.out, now, warn, allow=comparison.allow_changed_data)
    if not begun or read_listing(comparison.out) != now:
        write_listing(comparison.out, now)


def _with_statistics(comparison: Comparison) -> Comparison:
    """Mean and deviation of the images, measured once for all runs and kept; and who decodes for them."""
    kept = comparison.out / "statistics.json"
    entries = []
    for entry in comparison.entries:
        data = entry.config.data
        if data.mean is None and data.images is not None:
            if not kept.exists():
                found = measure(open_source(data.images), entry.config.model.channels, workers=data.workers)
                text = json.dumps(found)
                write_whole(kept, lambda file, text=text: file.write(text.encode()))
            mean, std = (tuple(values) for values in json.loads(kept.read_text()))
            data = replace(data, mean=mean, std=std)
        if data.workers is None:
            data = replace(data, workers=comparison.workers)
        run = replace(entry.config.run, device=comparison.device)
        entries.append(replace(entry, config=replace(entry.config, data=data, run=run)))
    return replace(comparison, entries=tuple(entries))


def _slots(comparison: Comparison) -> list[dict[str, str]]:
    threads = {name: str(comparison.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if not comparison.gpus:
        return [threads] * comparison.jobs
    gpus = (comparison.gpus[i % len(comparison.gpus)] for i in range(comparison.jobs))
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]


def _timed(
    comparison: Comparison, costs: dict[str, Cost], runner: Runner, progress: Progress
) -> dict[str, Cost]:
    """Costs with seconds, from a short run of every entry, side by side as later; measured once."""

    def trial(entry: Entry) -> Job:
        out = comparison.out / "trials" / entry.name
        settings = _settings(comparison, f"trial-{entry.name}")
        _write_json(settings, to_plain(trial_config(entry, out)))
        return Job(
            f"trial-{entry.name}",
            lambda: _started(comparison, settings, out),
            lambda: _is_trained(out, TRIAL_STEPS),
            1,
        )

    jobs = [trial(entry) for entry in comparison.entries]
    progress.start(jobs)
    trials = Runner(comparison.out, _slots(comparison), progress.tell, runner.stop)
    trials.run(jobs)
    if trials.failures:
        raise CheckFailed("; ".join(map(str, trials.failures)))
    batch = {entry.name: entry.config.optimizer.batch_size for entry in comparison.entries}
    return {
        name: replace(known, seconds=trial_seconds(comparison.out / "trials" / name, batch[name]))
        for name, known in costs.items()
    }


def _keep_settings(comparison: Comparison, config: PretrainConfig) -> None:
    """Write the settings of a run, or make sure that they are the ones that it was started with.

    Raises:
        BadInput: they are not.
    """
    path, plain = _settings(comparison, config.run.out.name), to_plain(config)
    if not path.exists():
        _write_json(path, plain)
        return
    before, now = flat(json.loads(path.read_text())), flat(json.loads(json.dumps(plain)))
    changed = [
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name != "data.workers"  # who decodes changes no result
    ]
    if changed:
        raise BadInput(
            f"{path}: this run was planned with other settings: {', '.join(changed)}; give the same ones, or "
            "another --out"
        )


def _settings(comparison: Comparison, name: str) -> Path:
    return comparison.out / "settings" / f"{name}.json"


def _write_json(path: Path, plain: Any) -> None:
    write_whole(path, lambda file: file.write((json.dumps(plain, indent=2) + "\n").encode()))


def _started(comparison: Comparison, settings: Path, out: Path) -> Sequence[object]:
    """Begin a run, or go on with it."""
    if (out / "config.json").exists():
        return "pretrain", "--resume", out, *_allowed(comparison)
    shutil.rmtree(out, ignore_errors=True)  # killed before it had written anything whole
    return "pretrain", "--from", settings, "--out", out


def _allowed(comparison: Comparison) -> Sequence[str]:
    return (FLAG,) if comparison.allow_changed_data else ()


def _is_trained(run: Path, steps: int) -> bool:
    path = run / "artifact" / "config.json"
    return path.exists() and json.loads(path.read_text())["trained"]["steps"] == steps


def _jobs(
    comparison: Comparison, entry: Entry, seed: int, config: PretrainConfig, cost: Cost, images: int
) -> list[Job]:
    """Train a run, then measure it."""
    out, steps = config.run.out, config.optimizer.steps or 0

    flops = cost.flops or _ANY
    work = _START_UP + flops * steps * config.optimizer.batch_size
    settings = _settings(comparison, out.name)
    train = Job(
        out.name,
        lambda: _started(comparison, settings, out),
        lambda: _is_trained(out, steps),
        work,
        lambda: last_step(out) / steps,
    )
    return [train, *_measuring(comparison, out.name, seed, out / "artifact", flops * images, train.name)]


def _measuring(
    comparison: Comparison, name: str, seed: int, artifact: Path, work: float, after: str | None
) -> list[Job]:
    common = ["evaluate", artifact, "--data", comparison.test, "--seed", seed, "--device", comparison.device]
    common += ["--workers", comparison.workers]
    jobs = []
    frozen = frozen_of(comparison.protocols)
    if frozen:
        path = score_file(comparison, name, frozen[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments = [*common, "--no-reference", "--out", path, "--protocol", *frozen]
        jobs.append(
            Job(
                f"{name}-evaluate",
                lambda: arguments,
                lambda: bool(read_scores(path)),
                _START_UP + work / 3,
                after=after,
            )
        )
    if "finetune" in comparison.protocols:
        tuned, scores = comparison.out / "finetuned" / name, score_file(comparison, name, "finetune")
        scores.parent.mkdir(parents=True, exist_ok=True)
        flags = ["--protocol", "finetune", "--run", tuned, *comparison.finetune_flags]

        def finetune() -> Sequence[object]:
            if (tuned / "config.json").exists():
                return "evaluate", "--resume", tuned, "--out", scores, *_allowed(comparison)
            shutil.rmtree(tuned, ignore_errors=True)
            return *common, "--out", scores, *flags

        epochs = comparison.finetune_epochs
        jobs.append(
            Job(f"{name}-finetune", finetune, lambda: bool(read_scores(scores)), work * epochs, after=after)
        )
    return jobs


def _floors(comparison: Comparison) -> list[tuple[Entry, int]]:
    """An entry of every backbone, and every seed that it is trained with."""
    first: dict[str, Entry] = {}
    seeds: dict[str, dict[int, None]] = {}
    for entry in comparison.entries:
        first.setdefault(entry.model, entry)
        seeds.setdefault(entry.model, {}).update(dict.fromkeys(entry.seeds))
    return [(first[model], seed) for model, own in seeds.items() for seed in own]


def _floor_jobs(comparison: Comparison, costs: dict[str, Cost], images: int) -> list[Job]:
    if not comparison.random_baseline:
        return []
    jobs = []
    for entry, seed in _floors(comparison):
        name = floor_name(entry, seed)
        artifact = comparison.out / "floor" / name
        config = entry.config
        about = ArtifactConfig(
            kind="backbone",
            model=config.model,
            objective=None,
            image_size=config.data.image_size,
            mean=config.data.mean or (),
            std=config.data.std or (),
            class_names=None,
            trained={"steps": 0, "seed": seed},
            versions=library_versions(),
        )
        if not artifact.exists():
            save_artifact(artifact, tensors=random_encoder(about, seed).state_dict(), config=about)
        work = (costs[entry.name].flops or _ANY) * images
        jobs += _measuring(comparison, name, seed, artifact, work, None)
    return jobs
