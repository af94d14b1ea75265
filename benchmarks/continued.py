"""Is it worth to start from weights that exist? `coma pretrain --init` against random weights, on a CPU.

    python benchmarks/continued.py --data DATA --pretrain-minutes 5 --jobs 2

DATA holds natural1k, det-bccd and camvid-mini. A DyViT-tiny is pre-trained on natural1k (or --artifact gives
one), which stands for weights that exist. On the training images of each task, without their labels, one more
is then pre-trained from scratch and one from those weights, for the same CPU time (the same number of steps,
which follows from short trials), with every seed. These two, the weights that exist as they are, and random
weights are fine-tuned by `coma detect train` or `coma segment train` with the same settings, and measured
once, at the end, on validation images. Every run is one single-threaded process, `--jobs` of them side by
side; finished ones stay in --work, and the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from machine import describe
from transfer import Task, add_finetuning, coma, finetuning, pretraining, run_all, scores, steps_in, summary

IMAGES = {"general": "natural1k", "detect": "det-bccd/train", "segment": "camvid-mini/img_dir/train"}
INITS = ("random", "general", "scratch", "continued")


def pack(args: argparse.Namespace, part: str) -> Path:
    """The images, short side 256 px, in shards."""
    shards = args.work / f"shards-{part}"
    images = args.data / IMAGES[part]
    run_all(
        [Task(shards.name, coma("pack", images, "--out", shards, "--size", 256, "--workers", 0), shards)], 1
    )
    return shards


def general_artifact(args: argparse.Namespace) -> Path:
    """The weights that exist."""
    if args.artifact:
        return args.artifact
    out, shards = args.work / "pretrain-general", pack(args, "general")
    steps = steps_in(args.general_minutes, args.method, shards, args.work / "trial-general")
    run_all([pretraining(args.method, steps, shards, out)], 1)
    return out / "artifact"


def artifact_of(args: argparse.Namespace, task: str, init: str, seed: int) -> Path:
    """The weights that a fine-tuning starts from."""
    if init == "general":
        return args.artifact or args.work / "pretrain-general" / "artifact"
    return args.work / f"pretrain-{task}-{init}-{seed}" / "artifact"


def pretrain(args: argparse.Namespace, start: Path) -> dict[str, dict[str, float]]:
    """From scratch and from `start`, on the images of every task; steps and CPU minutes of each."""
    tasks: dict[str, tuple[Task, int]] = {}
    for task in args.tasks:
        shards = pack(args, task)
        steps = steps_in(args.pretrain_minutes, args.method, shards, args.work / f"trial-{task}")
        for seed in args.seeds:
            for init, more in (("scratch", []), ("continued", ["--init", start])):
                out = artifact_of(args, task, init, seed).parent
                tasks[out.name] = pretraining(args.method, steps, shards, out, "--seed", seed, *more), steps
    seconds = run_all([task for task, _ in tasks.values()], args.jobs)
    return {name: {"steps": steps, "minutes": seconds[name] / 60} for name, (_, steps) in tasks.items()}


def main() -> None:
    """Pre-train, fine-tune, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="natural1k, det-bccd and camvid-mini lie here"
    )
    parser.add_argument("--work", type=Path, default=Path("benchmarks/runs/continued"))
    parser.add_argument("--artifact", type=Path, help="weights that exist, of DyViT-tiny at 224 px")
    parser.add_argument("--general-minutes", type=float, default=10.0, help="CPU time of those made here")
    parser.add_argument("--pretrain-minutes", type=float, default=5.0, help="CPU time of each pre-training")
    parser.add_argument("--method", default="mae")
    parser.add_argument("--fresh", action="store_true", help="remove what is in --work first")
    parser.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    add_finetuning(parser, segment_steps=750)
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)

    spent = pretrain(args, general_artifact(args))
    runs = [(task, init, seed) for task in args.tasks for seed in args.seeds for init in INITS]
    seconds = run_all([finetuning(args, *run, artifact_of(args, *run)) for run in runs], args.jobs)
    print(f"\n{describe()}; DyViT-tiny, {args.method}, 1 thread a run")
    for task in args.tasks:
        print(f"\n{task}\n\n{summary(args, seconds, task, INITS)}")
    if args.out:
        results = [
            {"task": t, "init": i, "seed": s, "seconds": seconds[f"{t}-{i}-{s}"], **scores(args, t, i, s)}
            for t, i, s in runs
        ]
        settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path | None)}
        record = {"machine": describe(), "settings": settings, "pretraining": spent, "results": results}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
