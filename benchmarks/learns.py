"""Does pre-training teach anything? CoMA, MAE and a random encoder on CIFAR-10, on a CPU.

    python benchmarks/learns.py --data DATA/class-cifar10 --images 24000 --seeds 0 1 2 --jobs 2

For every seed: CoMA and MAE pre-train the same DyViT-tiny on as many images of the training set (labels
unused); MAE once more with as many images as fit into CoMA's wall-clock; then kNN and linear probe of each
and of the encoder before training. Runs are resumable and finished ones are kept under --work.
The seeds run side by side as single-threaded processes: wall-clocks compare within one table only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from machine import describe, table

from pretrain.artifact import load_encoder
from pretrain.config import (
    DataConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    dyvit_preset,
    method_preset,
)
from pretrain.data import open_source
from pretrain.evaluate import evaluate, random_encoder
from pretrain.training import pretrain

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10's training set


def settings(args: argparse.Namespace, method: str, images: int, seed: int, out: Path) -> PretrainConfig:
    """One pre-training run; the methods differ in their objective only."""
    return PretrainConfig(
        data=DataConfig(args.data, image_size=32, mean=MEAN, std=STD, crop_scale=(0.4, 1.0), workers=0),
        model=dyvit_preset("tiny", 32),
        objective=method_preset(method, decoder_dim=128, decoder_depth=2),
        optimizer=OptimizerConfig(steps=images // args.batch, batch_size=args.batch, base_lr=args.base_lr),
        run=RunConfig(out, seed=seed, device="cpu", save_minutes=2, sheet_steps=0),
    )


def labelled(data: Path, work: Path, split: str, count: int) -> Path:
    """The first `count` images of a split as a pack of their own: probing all of them takes long on a CPU."""
    path = work / f"{split}-{count}.npz"
    if not path.exists():
        with np.load(data / f"{split}.npz", allow_pickle=False) as pack:
            end = pack["offsets"][count]
            part = {"data": pack["data"][:end], "offsets": pack["offsets"][: count + 1]}
            part |= {key: pack[key][:count] for key in ("labels", "file_names")}
            partial = path.with_suffix(f".{os.getpid()}.npz")
            np.savez(partial, class_names=pack["class_names"], **part)
            partial.rename(path)
    return path


def run_seed(args: argparse.Namespace, seed: int) -> None:
    """Everything of one seed; results go to `--work/seed-N.json` as they come."""
    torch.set_num_threads(1)
    results_path = args.work / f"seed-{seed}.json"
    results = json.loads(results_path.read_text()) if results_path.exists() else {}
    sets = [
        open_source(labelled(args.data, args.work, s, n))
        for s, n in (("train", args.train), ("test", args.test))
    ]

    def measured(name: str, encoder: torch.nn.Module, config: object) -> dict[str, float]:
        scores = evaluate(encoder, config, *sets, name=name, seed=seed, workers=0)  # type: ignore
        return {score.protocol: 100 * score.top1 for score in scores}

    def trained(name: str, method: str, images: int) -> None:
        if name in results:
            return
        out = args.work / f"seed-{seed}-{name.replace(' ', '-').replace(',', '')}"
        started = time.monotonic()
        pretrain(settings(args, method, images, seed, out), resume=(out / "state").exists())
        seconds = time.monotonic() - started
        encoder, config = load_encoder(out / "artifact")
        results[name] = {"images": images, "seconds": seconds, **measured(name, encoder, config)}
        if "random" not in results:
            fresh = random_encoder(config, seed)
            results["random"] = {"images": 0, "seconds": 0.0, **measured("random", fresh, config)}
        results_path.write_text(json.dumps(results, indent=1) + "\n")

    whole = args.images // args.batch * args.batch
    trained("CoMA", "coma", whole)
    trained("MAE, equal images", "mae", whole)
    ratio = results["CoMA"]["seconds"] / results["MAE, equal images"]["seconds"]
    trained("MAE, equal wall-clock", "mae", int(whole * ratio) // args.batch * args.batch)


def summary(results: list[dict]) -> str:
    """Mean and deviation over the seeds, a row a method."""
    rows = []
    for name in ("random", "CoMA", "MAE, equal images", "MAE, equal wall-clock"):
        found = [result[name] for result in results if name in result]
        if not found:
            continue
        row = {"encoder": name, "n": str(len(found))}
        row["images seen"] = f"{statistics.mean(f['images'] for f in found):.0f}"
        row["minutes"] = f"{statistics.mean(f['seconds'] for f in found) / 60:.1f}"
        for protocol in ("knn", "linear"):
            values = [f[protocol] for f in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row[f"{protocol} top-1 %"] = f"{statistics.mean(values):.1f} ± {spread:.1f}"
        rows.append(row)
    return table(rows)


def main() -> None:
    """Run all seeds, side by side, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10's train.npz and test.npz"
    )
    parser.add_argument("--work", type=Path, default=Path("benchmarks/runs/learns"))
    parser.add_argument("--images", type=int, default=24_000, help="images that CoMA and MAE see")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--base-lr", type=float, default=4e-3, help="per 256 images")
    parser.add_argument("--train", type=int, default=10_000, help="labelled images to probe with")
    parser.add_argument("--test", type=int, default=5_000, help="test images to count on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.seed is not None:
        return run_seed(args, args.seed)

    waiting, running = list(args.seeds), []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            command = [sys.executable, *sys.argv, "--seed", str(waiting.pop(0))]
            running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        running[0].wait()
        for process in [p for p in running if p.poll() is not None]:
            if process.returncode:
                raise SystemExit(f"{' '.join(process.args)} failed with exit code {process.returncode}")
            running.remove(process)
    paths = [args.work / f"seed-{seed}.json" for seed in args.seeds]
    results = [json.loads(path.read_text()) for path in paths]
    optimizer = settings(args, "coma", args.images, 0, Path("run")).optimizer
    print(
        f"\n{describe()}; DyViT-tiny at 32 px, 1 thread a run; probes on {args.train} / {args.test} images\n"
    )
    print(summary(results))
    if args.out:
        record = {"machine": describe(), "optimizer": asdict(optimizer), "seeds": results}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
