"""Does pre-training help downstream? CoMA, MAE and random weights under a detector and a segmentor, on a CPU.

    python benchmarks/transfer.py --data DATA --pretrain-minutes 12 --jobs 2

DATA holds natural1k, det-bccd and camvid-mini. One DyViT-tiny each is pre-trained by CoMA and by MAE on all
their training images together (packed once; no labels), both for as many minutes of CPU time: steps follow
from short trials of each. Then every encoder, and random weights, is fine-tuned by `coma detect train` and
`coma segment train`, with the same settings and steps, once for every seed, and measured once, at the end, on
validation images. Every run is one single-threaded process, `--jobs` of them side by side; finished ones stay
in --work, and a run that was interrupted starts again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from machine import describe, table

METHODS = ("coma", "mae")
INITS = (*METHODS, "random")
TRIALS = (2, 12)
"""Steps of two short runs; what the longer one takes longer says how long a step takes."""


@dataclass(frozen=True)
class Task:
    """One process: what it is called, its arguments, and the folder whose existence says it is done."""

    name: str
    arguments: tuple[str, ...]
    out: Path


def coma(*arguments: object) -> tuple[str, ...]:
    """The command line of `coma`."""
    return (sys.executable, "-m", "coma", *map(str, arguments))


def run_all(tasks: list[Task], jobs: int) -> dict[str, float]:
    """Run what is not done yet, `jobs` at a time; CPU seconds of all by name."""
    waiting = [task for task in tasks if not _receipt(task).exists()]
    running: dict[int, Task] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop(0)
            shutil.rmtree(task.out, ignore_errors=True)
            log = task.out.with_suffix(".log").open("w")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            process = subprocess.Popen(
                task.arguments, stdout=log, stderr=log, env=environment, preexec_fn=_die_with_parent
            )
            running[process.pid] = task
            print(f"{time.strftime('%H:%M:%S')} {task.name}", flush=True)
        pid, status, usage = os.wait4(-1, 0)
        task = running.pop(pid)
        if status:
            raise SystemExit(f"{task.name} failed; see {task.out.with_suffix('.log')}")
        _receipt(task).write_text(json.dumps({"seconds": usage.ru_utime + usage.ru_stime}))
    return {task.name: json.loads(_receipt(task).read_text())["seconds"] for task in tasks}


def _die_with_parent() -> None:
    """Makes Linux kill this process with the script: started again, it must not meet the old one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _receipt(task: Task) -> Path:
    return task.out.with_suffix(".json")


def pack(args: argparse.Namespace) -> Path:
    """All training images, short side 256 px, in shards."""
    corpus, shards = args.work / "corpus", args.work / "shards"
    corpus.mkdir(parents=True, exist_ok=True)
    parts = {"natural1k": "natural1k", "bccd": "det-bccd/train", "camvid": "camvid-mini/img_dir/train"}
    for name, place in parts.items():
        link = corpus / name
        if not link.is_symlink():
            link.symlink_to((args.data / place).resolve())
    run_all([Task("pack", coma("pack", corpus, "--out", shards, "--size", 256, "--workers", 0), shards)], 1)
    return shards


def pretraining(method: str, steps: int, images: Path, out: Path, *more: object) -> Task:
    """DyViT-tiny by this method."""
    settings = ["--model", "tiny", "--method", method, "--steps", steps, "--batch-size", 16]
    settings += ["--base-lr", 8e-3, "--workers", 0, "--reconstruction-every", 0, "--device", "cpu", *more]
    return Task(out.name, coma("pretrain", images, "--out", out, *settings), out)


def steps_in(minutes: float, method: str, images: Path, trials: Path) -> int:
    """Steps that take this much CPU time, by two short trials in folders whose names begin like `trials`."""
    tasks = [pretraining(method, n, images, trials.with_name(f"{trials.name}-{n}")) for n in TRIALS]
    short, long = run_all(tasks, 1).values()
    return max(round(minutes * 60 * (TRIALS[1] - TRIALS[0]) / (long - short)), 1)


def pretrain(args: argparse.Namespace, shards: Path) -> dict[str, dict[str, float]]:
    """Both methods for the same CPU time; steps, images and CPU minutes of each."""
    steps = {m: steps_in(args.pretrain_minutes, m, shards, args.work / f"trial-{m}") for m in METHODS}
    seconds = run_all(
        [pretraining(m, steps[m], shards, args.work / f"pretrain-{m}") for m in METHODS], args.jobs
    )
    return {
        m: {"steps": steps[m], "images": 16 * steps[m], "minutes": seconds[f"pretrain-{m}"] / 60}
        for m in METHODS
    }


def finetuning(
    args: argparse.Namespace, task: str, init: str, seed: int, artifact: Path | None = None
) -> Task:
    """A detector or segmentor on these weights: an artifact, by default the one that `pretrain` wrote."""
    out = args.work / f"{task}-{init}-{seed}"
    artifact = artifact or args.work / f"pretrain-{init}" / "artifact"
    source = ["--preset", "tiny"] if init == "random" else [artifact]
    common = ["--out", out, "--seed", seed, "--layer-decay", args.layer_decay]
    common += ["--validations", 1, "--workers", 0]
    if task == "detect":
        own = ["--data", args.data / "det-bccd", "--short-side", 240, "--steps", args.detect_steps]
        own += ["--batch-size", 2, "--head-channels", 64, "--lr", args.detect_lr]
    else:
        own = ["--data", args.data / "camvid-mini", "--short-side", 240, "--crop-size", 192]
        own += ["--steps", args.segment_steps, "--batch-size", 4, "--head-channels", 64]
        own += ["--lr", args.segment_lr]
    return Task(out.name, coma(task, "train", *source, *own, *common), out)


def scores(args: argparse.Namespace, task: str, init: str, seed: int) -> dict[str, float]:
    """What the last validation measured, in percent."""
    about = json.loads((args.work / f"{task}-{init}-{seed}" / "artifact" / "config.json").read_text())
    found = about["trained"]["scores"]  # of the one validation
    if task == "detect":
        return {"AP": 100 * found["coco/bbox_mAP"], "AP50": 100 * found["coco/bbox_mAP_50"]}
    return {"mIoU": found["mIoU"], "pixel accuracy": found["aAcc"]}


def summary(
    args: argparse.Namespace, seconds: dict[str, float], task: str, inits: tuple[str, ...] = INITS
) -> str:
    """Mean and deviation over the seeds, a row an initialisation."""
    rows = []
    for init in inits:
        results = [scores(args, task, init, seed) for seed in args.seeds]
        row = {"encoder": init, "n": str(len(results))}
        for metric in results[0]:
            values = [result[metric] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row[metric] = f"{statistics.mean(values):.1f} ± {spread:.1f}"
        cpu = statistics.mean(seconds[f"{task}-{init}-{seed}"] for seed in args.seeds) / 60
        row["CPU minutes"] = f"{cpu:.1f}"
        rows.append(row)
    return table(rows)


def add_finetuning(parser: argparse.ArgumentParser, segment_steps: int) -> None:
    """Adds the flags of the fine-tuning."""
    parser.add_argument("--detect-steps", type=int, default=320)
    parser.add_argument("--segment-steps", type=int, default=segment_steps)
    parser.add_argument("--detect-lr", type=float, default=5e-4)
    parser.add_argument("--segment-lr", type=float, default=1e-3)
    parser.add_argument("--layer-decay", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tasks", nargs="+", choices=("detect", "segment"), default=["detect", "segment"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)


def main() -> None:
    """Pre-train, fine-tune, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="natural1k, det-bccd and camvid-mini lie here"
    )
    parser.add_argument("--work", type=Path, default=Path("benchmarks/runs/transfer"))
    parser.add_argument("--pretrain-minutes", type=float, default=12.0, help="CPU time of each pre-training")
    add_finetuning(parser, segment_steps=1500)
    parser.add_argument("--pretrain-only", action="store_true", help="stop before fine-tuning")
    parser.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    spent = pretrain(args, pack(args))
    for method, facts in spent.items():
        print(f"{method}: {facts['images']:.0f} images in {facts['minutes']:.1f} CPU minutes", flush=True)
    if args.pretrain_only:
        return
    tasks = [finetuning(args, t, i, s) for t in args.tasks for s in args.seeds for i in INITS]
    seconds = run_all(tasks, args.jobs)
    print(f"\n{describe()}; DyViT-tiny, 1 thread a run")
    for task in args.tasks:
        print(f"\n{task}\n\n{summary(args, seconds, task)}")
    if args.out:
        settings = {
            k: getattr(args, k)
            for k in (
                *("detect_steps", "segment_steps", "detect_lr", "segment_lr"),
                *("layer_decay", "pretrain_minutes"),
            )
        }
        results = [
            {"task": t, "init": i, "seed": s, "seconds": seconds[f"{t}-{i}-{s}"], **scores(args, t, i, s)}
            for t in args.tasks
            for i in INITS
            for s in args.seeds
        ]
        record = {"machine": describe(), "settings": settings, "pretraining": spent, "results": results}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
