"""Does pre-training teach anything? CoMA, MAE and a random encoder on CIFAR-10, on a CPU.

    python benchmarks/learns.py --data DATA/class-cifar10 --images 32000 --seeds 0 1 2 --jobs 2

For every seed: CoMA and MAE pre-train the same DyViT-tiny on as many images of the training set (labels
unused), then kNN and linear probe of each and of the encoder before training. Every run is one
single-threaded process, `--jobs` of them side by side; its CPU time is what "equal wall-clock" means here,
since it does not depend on what else the machine does: MAE trains once more, with as many images as fit into
CoMA's CPU time. Runs are resumable; finished ones stay in --work. `--depths` and `--heads` try another shape
of the encoder, `--only CoMA` leaves the other rows out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from machine import describe, table

from coma.artifact import load_encoder
from coma.config import (
    DataConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    dyvit_preset,
    method_preset,
)
from coma.data import open_source
from coma.image_size import ImageSize
from pretrain.evaluate import evaluate, random_encoder
from pretrain.training import pretrain

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10's training set

NAMES = ("CoMA", "MAE, equal images", "random", "MAE, equal wall-clock")


def settings(args: argparse.Namespace, method: str, images: int, seed: int, out: Path) -> PretrainConfig:
    """One pre-training run; the methods differ in their objective only."""
    return PretrainConfig(
        data=DataConfig(
            args.data, image_size=ImageSize.of(32), mean=MEAN, std=STD, crop_scale=(0.4, 1.0), workers=0
        ),
        model=replace(dyvit_preset("tiny", 32), **shape(args)),
        objective=replace(method_preset(method, decoder_dim=128, decoder_depth=2), norm_pix=args.norm_pix),
        optimizer=OptimizerConfig(steps=images // args.batch, batch_size=args.batch, base_lr=args.base_lr),
        run=RunConfig(out, seed=seed, device="cpu", save_minutes=2, reconstruction_every=0),
    )


def shape(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """What of DyViT-tiny's shape was asked to be another."""
    return {name: tuple(getattr(args, name)) for name in ("depths", "heads") if getattr(args, name)}


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


def run_one(args: argparse.Namespace, seed: int, name: str, images: int) -> None:
    """Pre-train and probe; "random" is probed only."""
    torch.set_num_threads(1)
    out = folder(args, seed, name)
    started = time.process_time()
    if name == "random":
        pretrained = folder(args, seed, "CoMA") / "artifact"
        encoder = random_encoder(config := load_encoder(pretrained).artifact, seed)
    else:
        method = "coma" if name == "CoMA" else "mae"
        pretrain(settings(args, method, images, seed, out), resume=(out / "state").exists())
        encoder = load_encoder(out / "artifact")
        config = encoder.artifact
    seconds = time.process_time() - started
    splits = (("train", args.train), ("test", args.test))
    train, test = (open_source(labelled(args.data, args.work, *split)) for split in splits)
    scores = evaluate(encoder, config, train, test, name=name, seed=seed, workers=0)
    result = {"seed": seed, "name": name, "images": images, "seconds": seconds}
    result |= {score.protocol: 100 * score.top1 for score in scores}
    out.with_suffix(".json").write_text(json.dumps(result) + "\n")


def folder(args: argparse.Namespace, seed: int, name: str) -> Path:
    """Run directory of one seed and method; its result lies beside it with the suffix .json."""
    return args.work / f"{name.replace(',', '').replace(' ', '-').lower()}-{seed}"


def run_all(args: argparse.Namespace, tasks: list[tuple[int, str, int]]) -> list[dict]:
    """Run what is not done yet, `--jobs` processes at a time; the results of all."""
    waiting = [t for t in tasks if not folder(args, *t[:2]).with_suffix(".json").exists()]
    running: list[subprocess.Popen] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            seed, name, images = waiting.pop(0)
            command = [sys.executable, *sys.argv, "--one", str(seed), name, str(images)]
            running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        time.sleep(1)
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode:
                raise SystemExit(f"{process.args} failed with exit code {process.returncode}")
    return [json.loads(folder(args, *t[:2]).with_suffix(".json").read_text()) for t in tasks]


def summary(results: list[dict]) -> str:
    """Mean and deviation over the seeds, a row a method."""
    rows = []
    for name in dict.fromkeys(result["name"] for result in results):
        found = [result for result in results if result["name"] == name]
        row = {"encoder": name, "n": str(len(found))}
        row["images seen"] = f"{statistics.mean(f['images'] for f in found):.0f}"
        row["CPU minutes"] = f"{statistics.mean(f['seconds'] for f in found) / 60:.1f}"
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
    parser.add_argument("--images", type=int, default=32_000, help="images that CoMA and MAE see")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--norm-pix", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--base-lr", type=float, default=8e-3, help="per 256 images")
    parser.add_argument("--train", type=int, default=10_000, help="labelled images to probe with")
    parser.add_argument("--test", type=int, default=5_000, help="test images to count on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--depths", type=int, nargs=4, help="blocks a stage; those of tiny by default")
    parser.add_argument("--heads", type=int, nargs=4, help="heads a stage; those of tiny by default")
    parser.add_argument("--only", nargs="+", choices=NAMES[:-1], help="these rows only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.one:
        return run_one(args, int(args.one[0]), args.one[1], int(args.one[2]))

    images = args.images // args.batch * args.batch
    names = [name for name in ("CoMA", "MAE, equal images", "random") if name in (args.only or NAMES)]
    results = run_all(args, [(s, n, 0 if n == "random" else images) for n in names for s in args.seeds])
    cost = {n: sum(r["seconds"] for r in results if r["name"] == n) for n in names}
    if not args.only:
        ratio = cost["CoMA"] / cost["MAE, equal images"]
        more = round(images * ratio / args.batch) * args.batch
        results += run_all(args, [(s, NAMES[-1], more) for s in args.seeds])
        print(f"\nCoMA's CPU time / MAE's for equal images: {ratio:.3f}")
    changed = "".join(f", {name} {value}" for name, value in shape(args).items())
    print(f"\n{describe()}; DyViT-tiny{changed} at 32 px, 1 thread a run")
    print(f"probes on {args.train} / {args.test} images\n\n{summary(results)}")
    if args.out:
        optimizer = asdict(settings(args, "coma", images, 0, Path("run")).optimizer)
        record = {
            "machine": describe(),
            "optimizer": optimizer,
            "norm_pix": args.norm_pix,
            "shape": shape(args),
            "results": results,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
