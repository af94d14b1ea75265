"""Runs a comparison: plans the budget, runs and evaluates everything that is not done yet, writes the report.

out/data.json.gz           names and sizes of the images
out/statistics-N.json      mean and standard deviation of their N channels
out/settings/NAME.json     settings of a run; NAME is method-backbone-seed
out/trials/NAME/           trials: of the time of a step (--budget seconds), of a learning rate (--lr-search)
out/runs/NAME/             run of `coma pretrain`
out/random-baseline/NAME/  artifact of random weights
out/scores/NAME-*/         scores of `coma evaluate`
out/finetuned/NAME/        run of `coma classify train`; finetuned-10 with 10 % of the labels
out/logs, out/locks        one file per process
out/compare.json           budget and other settings; compare.md, compare.csv, compare.png
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from coma.artifact import ArtifactConfig, library_versions, save_artifact
from coma.atomic_io import lies_among, write_json
from coma.config import PretrainConfig
from coma.config.compare import LABEL_SHARES, CompareConfig, Entry, finetune_config
from coma.data import compute_mean_std, open_labelled, open_source
from coma.data.listing import check_listing, list_data, read_listing, write_listing
from coma.errors import BadInput, Interrupted
from coma.signals import StopRequest
from pretrain.evaluate import random_encoder
from pretrain.sweep.jobs import allowed, pretraining, run_jobs
from pretrain.sweep.plan import Cost, check, cost, run_config, steps_for
from pretrain.sweep.process_pool import Job, ProcessPool
from pretrain.sweep.report import write_report
from pretrain.sweep.results import (
    Result,
    classifier_run,
    random_baseline_name,
    read_random_baseline,
    read_result,
    read_scores,
    read_trained,
    score_folder,
)
from pretrain.sweep.trials import timed, with_rates
from pretrain.training.run_plan import initial_statistics

log = logging.getLogger(__name__)

_START_UP = 2e11
"""FLOPs that take about as long as the start of a process; used to estimate the time left."""
_UNKNOWN_FLOPS = 3e8
"""FLOPs assumed for an image where they cannot be counted; used to estimate the time left."""


@dataclass(frozen=True)
class SweepResult:
    """Results of a comparison."""

    comparison: CompareConfig
    results: tuple[Result, ...]
    costs: dict[str, Cost]
    failures: tuple[str, ...]
    table: Path


def compare(comparison: CompareConfig) -> SweepResult:
    """Runs, evaluates and reports; a second call resumes after any interruption.

    Raises:
        BadInput: settings or labelled images that cannot be used, or a directory of another comparison.
        CheckFailed: the time of a step could not be measured, because a trial run failed.
        Interrupted: Ctrl-C or SIGTERM; every run has saved its state.
    """
    check(comparison)
    _open(comparison)
    _check_data(comparison)
    comparison = _with_statistics(comparison)
    with StopRequest() as stop:
        costs = {e.name: cost(e.config) for e in comparison.entries}
        if comparison.unit == "seconds":
            costs = timed(comparison, costs, stop)
        if comparison.lr_search:
            comparison = with_rates(comparison, costs, stop)
        plans = []
        for entry in comparison.entries:
            batch = entry.config.optimizer.batch_size
            steps = steps_for(comparison.unit, comparison.run_amount, batch, costs[entry.name], entry.name)
            plans += [(run_config(entry, seed, steps, comparison), costs[entry.name]) for seed in entry.seeds]
        images = sum(len(open_labelled(comparison.test, split)) for split in ("train", "test"))
        jobs = [job for config, each in plans for job in _jobs(comparison, config, each, images)]
        jobs += _random_baseline_jobs(comparison, costs, images)
        try:
            pool = run_jobs(comparison, jobs, stop)
        except Interrupted:
            write_report(comparison, collect(comparison, costs), costs, ["the comparison was stopped"])
            raise
    results = collect(comparison, costs)
    failures = (*map(str, pool.failures), *_unreadable(comparison, results, pool))
    table = write_report(comparison, results, costs, failures)
    return SweepResult(comparison, results, costs, failures, table)


def collect(comparison: CompareConfig, costs: dict[str, Cost]) -> tuple[Result, ...]:
    """Returns the results of all finished runs."""
    found: list[Result | None] = [
        read_result(comparison, entry, seed, costs[entry.name])
        for entry in comparison.entries
        for seed in entry.seeds
    ]
    if comparison.random_baseline:
        found += [
            read_random_baseline(comparison, entry, seed, costs[entry.name])
            for entry, seed in _random_baselines(comparison)
        ]
    return tuple(result for result in found if result)


def _unreadable(comparison: CompareConfig, results: Sequence[Result], pool: ProcessPool) -> list[str]:
    """Returns a line for every run that is finished and cannot be read, for example after a full disk."""
    there = {(result.method, result.model, result.seed) for result in results if result.top1}
    failed = {failure.name for failure in pool.failures}
    names = [
        f"{entry.name}-{seed}"
        for entry in comparison.entries
        for seed in entry.seeds
        if (entry.method, entry.model, seed) not in there
    ]
    runs = comparison.out / "runs"
    return [
        f"{name}: its log or its scores are incomplete; delete {runs / name} and run the same command again"
        for name in names
        if name not in failed and not any(each.startswith(f"{name}-") for each in failed)
    ]


def _open(comparison: CompareConfig) -> None:
    """Refuses a directory of something else, or of a comparison with another budget or other test images."""
    out = comparison.out
    asked = {
        "budget": list(comparison.budget),
        "test": str(comparison.test),
        "device": comparison.device,
        "threads": comparison.threads if comparison.device == "cpu" else None,
        "probes": [comparison.probes, comparison.probe_train, comparison.probe_test],
        "finetune": list(comparison.finetune_flags_of("finetune")),
    }
    asked |= {"lr_search": list(comparison.lr_search)} if comparison.lr_search else {}
    asked |= {"finetune_10": comparison.finetune_10} if comparison.finetune_10 else {}
    path = out / "compare.json"
    if path.exists():
        before = json.loads(path.read_text())
        if before == asked:
            return
        changed = [
            f"{name} {before.get(name)} -> {asked.get(name)}"
            for name in asked | before
            if before.get(name) != asked.get(name) and name not in _unused(out)
        ]
        if changed and _has_started(out):
            raise BadInput(
                f"{out}: holds a comparison with other settings: {', '.join(changed)}; keep them as they "
                "were (methods, models, seeds and protocols may be added, and flags of fine-tuning changed "
                "when its folders finetuned* are removed), or give another --out"
            )
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise BadInput(f"--out {out}: is not empty and holds no comparison; choose another")
    write_json(path, asked)


def _has_started(out: Path) -> bool:
    """Returns whether a run or trial was planned; until then, all settings may change."""
    return any((out / "settings").glob("*.json"))


def _unused(out: Path) -> set[str]:
    """Returns the settings of fine-tuning that no run has used yet, so that they may still change."""
    tuned, few = (any(out.glob(f"{folder}/*/config.json")) for folder in ("finetuned", "finetuned-10"))
    return set() if few else {"finetune_10"} if tuned else {"finetune", "finetune_10"}


def _check_data(comparison: CompareConfig) -> None:
    """Notes the images of a new comparison, and refuses other images when it is resumed."""
    test = {f"{split} images": open_labelled(comparison.test, split) for split in ("train", "test")}
    now = list_data({"images": open_source(comparison.images)}, labels=False) | list_data(test)
    if _has_started(comparison.out):
        warn = partial(log.warning, "%s")
        check_listing(comparison.out, now, warn, allow=comparison.allow_changed_data)
    else:
        for measured in comparison.out.glob("statistics-*.json"):
            measured.unlink()  # the images may be others since
        for path in dict.fromkeys((comparison.images, comparison.test)):
            if note := lies_among(comparison.out, path):
                log.info(note)
    if read_listing(comparison.out) != now:
        write_listing(comparison.out, now)


def _with_statistics(comparison: CompareConfig) -> CompareConfig:
    """Returns the comparison with the statistics of pixels, measured once for all runs, and workers."""
    source, entries = open_source(comparison.images), []
    for entry in comparison.entries:
        data, channels = entry.config.data, entry.config.model.channels
        if data.mean is None:
            kept = comparison.out / f"statistics-{channels}.json"
            found = initial_statistics(entry.config, source)
            if found is None and not kept.exists():
                write_json(kept, compute_mean_std(source, channels, workers=data.workers))
            mean, std = found or (tuple(values) for values in json.loads(kept.read_text()))
            data = replace(data, mean=mean, std=std)
        if data.workers is None:
            data = replace(data, workers=comparison.workers)
        run = replace(entry.config.run, device=comparison.device)
        entries.append(replace(entry, config=replace(entry.config, data=data, run=run)))
    return replace(comparison, entries=tuple(entries))


def _jobs(comparison: CompareConfig, config: PretrainConfig, cost: Cost, images: int) -> list[Job]:
    """Returns the jobs that train a run and evaluate it."""
    out, optimizer, flops = config.run.out, config.optimizer, cost.flops or _UNKNOWN_FLOPS
    work = _START_UP + flops * (optimizer.steps or 0) * optimizer.batch_size
    train = pretraining(comparison, out.name, config, work)
    seed, artifact = config.run.seed, out / "artifact"
    return [train, *_evaluation_jobs(comparison, out.name, seed, artifact, flops * images, train.name)]


def _evaluation_jobs(
    comparison: CompareConfig, name: str, seed: int, artifact: Path, work: float, after: str | None
) -> list[Job]:
    common = ["--data", comparison.test, "--seed", seed, "--device", comparison.device]
    common += ["--workers", comparison.workers or 0]
    jobs = []
    if comparison.frozen_protocols:
        scores = score_folder(comparison, name)
        protocols = ["--protocols", *comparison.frozen_protocols, "--no-random-baseline"]
        evaluate = ["evaluate", artifact, *common, *protocols, "--out", scores]
        jobs.append(
            Job(
                f"{name}-evaluate",
                lambda: evaluate,
                lambda: bool(read_scores(scores)),
                _START_UP + work / 3,
                after=after,
            )
        )
    for protocol in comparison.finetune_protocols:
        run, share = classifier_run(comparison, name, protocol), LABEL_SHARES[protocol]
        few = ["--label-share", share] if share < 1 else []
        flags = comparison.finetune_flags_of(protocol)
        jobs.append(
            Job(
                f"{name}-{protocol}",
                partial(_finetune_arguments, comparison, artifact, run, [*common, *few, *flags]),
                partial(_is_finetuned, run),
                work * finetune_config(flags).optimizer.epochs * share,
                after=after,
            )
        )
    return jobs


def _finetune_arguments(
    comparison: CompareConfig, artifact: Path, run: Path, settings: Sequence[object]
) -> Sequence[object]:
    if (run / "config.json").exists():
        return "classify", "train", "--resume", run, *allowed(comparison)
    shutil.rmtree(run, ignore_errors=True)
    return "classify", "train", artifact, "--out", run, *settings


def _is_finetuned(run: Path) -> bool:
    return "test_top1" in read_trained(run / "artifact")


def _random_baselines(comparison: CompareConfig) -> list[tuple[Entry, int]]:
    """Returns an entry of every backbone, with every seed that the backbone is trained with."""
    first: dict[str, Entry] = {}
    seeds: dict[str, dict[int, None]] = {}
    for entry in comparison.entries:
        first.setdefault(entry.model, entry)
        seeds.setdefault(entry.model, {}).update(dict.fromkeys(entry.seeds))
    return [(first[model], seed) for model, own in seeds.items() for seed in own]


def _random_baseline_jobs(comparison: CompareConfig, costs: dict[str, Cost], images: int) -> list[Job]:
    jobs = []
    for entry, seed in _random_baselines(comparison) if comparison.random_baseline else ():
        name, config = random_baseline_name(entry, seed), entry.config
        artifact = comparison.out / "random-baseline" / name
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
        work = (costs[entry.name].flops or _UNKNOWN_FLOPS) * images
        jobs += _evaluation_jobs(comparison, name, seed, artifact, work, None)
    return jobs
