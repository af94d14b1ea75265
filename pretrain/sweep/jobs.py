"""The processes of a comparison that train: their settings, how they start and resume, and their slots."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from coma.atomic_io import write_json
from coma.config import PretrainConfig
from coma.config.compare import CompareConfig
from coma.config.serialization import flat, to_plain
from coma.data.listing import FLAG
from coma.errors import BadInput
from coma.progress import Progress, clock
from coma.signals import StopRequest
from pretrain.sweep.plan import last_step
from pretrain.sweep.process_pool import Job, ProcessPool
from pretrain.sweep.results import read_trained


def pretraining(comparison: CompareConfig, name: str, config: PretrainConfig, work: float = 1.0) -> Job:
    """Returns the job that trains a run, or resumes it; its settings are kept in `settings/NAME.json`.

    Args:
        comparison: The comparison.
        name: Name of the job.
        config: Settings, with `out` and `steps`.
        work: Amount of work, in a unit that all jobs share.

    Raises:
        BadInput: it was started with other settings.
    """
    settings = comparison.out / "settings" / f"{name}.json"
    _keep_settings(settings, config)
    out, steps = config.run.out, config.optimizer.steps or 0

    def arguments() -> Sequence[object]:
        if (out / "config.json").exists():
            return "pretrain", "--resume", out, *allowed(comparison)
        shutil.rmtree(out, ignore_errors=True)  # killed before it wrote a complete file
        return "pretrain", "--from", settings, "--out", out

    def done() -> bool:
        return read_trained(out / "artifact").get("steps") == steps

    return Job(name, arguments, done, work, lambda: last_step(out) / steps)


def allowed(comparison: CompareConfig) -> Sequence[str]:
    """Returns the flag that lets a run resume on changed images, if the comparison has it."""
    return (FLAG,) if comparison.allow_changed_data else ()


def run_jobs(comparison: CompareConfig, jobs: Sequence[Job], stop: StopRequest) -> ProcessPool:
    """Runs the jobs, with a bar, and a line for every event.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; every process was asked to stop, and has ended.
    """
    total = float(sum(job.work for job in jobs)) or 1.0
    with Progress() as progress:
        bar = progress.bar("work done", total, float(sum(job.work for job in jobs if job.done())))

        def tell(event: str | None, done: float) -> None:
            bar.update(done)
            if event:
                left = "time left unknown" if bar.seconds_left is None else f"{clock(bar.seconds_left)} left"
                progress.say(f"{time.strftime('%H:%M:%S')} {event}  ({done / total:.0%}, {left})")

        pool = ProcessPool(comparison.out, slots(comparison), tell, stop)
        pool.run(jobs)
    return pool


def slots(comparison: CompareConfig) -> list[dict[str, str]]:
    """Returns the environment variables of every job that runs at a time."""
    jobs = comparison.jobs or 1
    if not comparison.gpus:
        return [dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(comparison.threads or 1))] * jobs
    gpus = (comparison.gpus[i % len(comparison.gpus)] for i in range(jobs))
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]


def _keep_settings(path: Path, config: PretrainConfig) -> None:
    """Writes the settings of a run, or checks that it was started with the same ones."""
    plain = to_plain(config)
    if not path.exists():
        write_json(path, plain)
        return
    before, now = flat(json.loads(path.read_text())), flat(json.loads(json.dumps(plain)))
    changed = [
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name != "data.workers"  # workers change no result
    ]
    if changed:
        raise BadInput(
            f"{path}: this run was planned with other settings: {', '.join(changed)}; give the same ones, or "
            "another --out"
        )
