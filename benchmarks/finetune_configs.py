"""Stock configurations of MMDetection and MMSegmentation on `tiny-64`: pre-trained against random weights.

    python benchmarks/finetune_configs.py --data DATA --work W --out RESULTS.json --pictures FOLDER

DATA holds det-bccd and camvid-mini. Every configuration of `RUNS` is trained by `coma detect train --config`
or `coma segment train --config` twice with the same settings and steps: on the encoder of `tiny-64`, and on
one of the same shape with random weights. Every run is one single-threaded process, `--jobs` of them side by
side; finished ones stay in --work, and a run that was interrupted starts again. The last measurement on
validation images counts; losses are means of the first and the last tenth of the run. `--pictures` also
draws predictions of the pre-trained models on validation images.

tiny-64 saw the training images of BCCD without their labels, and no image of CamVid. Batches and learning
rates suit a CPU and a short run: these are not the results that the configurations were written for.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe, table
from PIL import Image
from predictions import predict, sheet
from transfer import Task, coma, run_all
from zoo import stock_configs

from coma.artifact import load_artifact, save_artifact
from coma.models import build_encoder
from coma.paths import SHIPPED, artifact_directory

SCORES = {
    "coco/bbox_mAP": ("AP", 100.0),
    "coco/bbox_mAP_50": ("AP50", 100.0),
    "mIoU": ("mIoU", 1.0),
    "aAcc": ("pixel accuracy", 1.0),
}
"""What validation measures: its name in tables, and what makes percent of it."""


@dataclass(frozen=True)
class Run:
    """A configuration, and how it is trained here.

    Attributes:
        name: For files and the table.
        task: "detect" or "segment".
        config: Below the configurations of mmdet or mmseg.
        settings: Flags of `coma detect train` or `coma segment train`.
        score: Least score of a box that is drawn.
    """

    name: str
    task: str
    config: str
    settings: tuple[object, ...]
    score: float = 0.3


RUNS = (
    Run(
        "RTMDet-tiny",
        "detect",
        "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
        ("--epochs", 40, "--batch-size", 8, "--lr", 5e-4, "--cfg-options", "train_cfg.val_interval=10"),
    ),
    Run(
        "Deformable DETR",
        "detect",
        "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
        ("--epochs", 4, "--batch-size", 4, "--lr", 2e-4, "--cfg-options", "train_cfg.val_interval=4"),
        0.15,
    ),
    Run(
        "Mask2Former",
        "segment",
        "mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py",
        ("--steps", 160, "--batch-size", 4, "--lr", 2e-4, "--cfg-options", "train_cfg.val_interval=80"),
    ),
)


def random_twin(folder: Path) -> Path:
    """An artifact like `tiny-64`, its encoder with random weights (seed 0)."""
    if not folder.exists():
        trained = load_artifact(artifact_directory(SHIPPED))
        torch.manual_seed(0)
        fresh = build_encoder(trained.config.model).state_dict()
        encoder = {f"encoder.{name}": tensor for name, tensor in fresh.items()}
        save_artifact(folder, tensors=trained.tensors | encoder, config=trained.config)
    return folder


def task_of(run: Run, init: str, artifact: str | Path, args: argparse.Namespace) -> Task:
    """One process."""
    out = args.work / f"{run.name.replace(' ', '-')}-{init}"
    config = stock_configs({"detect": "mmdet", "segment": "mmseg"}[run.task]) / run.config
    data = args.data / {"detect": "det-bccd", "segment": "camvid-mini"}[run.task]
    common = ("--image-size", args.size, "--workers", 0, "--seed", 0, "--out", out)
    return Task(
        out.name,
        coma(run.task, "train", artifact, "--config", config, "--data", data, *run.settings, *common),
        out,
    )


def result(task: Task, seconds: float) -> dict[str, Any]:
    """Scores, and losses at both ends."""
    logged = "".join(path.read_text() for path in sorted(task.out.glob("*/vis_data/scalars.json")))
    losses = [entry["loss"] for entry in map(json.loads, logged.splitlines()) if "loss" in entry]
    tenth = math.ceil(len(losses) / 10)
    about = json.loads((task.out / "artifact" / "config.json").read_text())["trained"]["scores"]
    return {
        "scores": {named: about[name] * factor for name, (named, factor) in SCORES.items() if name in about},
        "first_loss": statistics.mean(losses[:tenth]),
        "last_loss": statistics.mean(losses[-tenth:]),
        "minutes": seconds / 60,
    }


def draw(run: Run, artifact: Path, args: argparse.Namespace) -> None:
    """Predictions on validation images."""
    place = {"detect": "det-bccd/val", "segment": "camvid-mini/img_dir/val"}[run.task]
    images = sorted((args.data / place).iterdir())[::11][:3]
    options = ("--threshold", str(run.score)) if run.task == "detect" else ()
    folder = args.work / "predicted" / run.name
    shutil.rmtree(folder, ignore_errors=True)
    found = predict(run.task, artifact, images, folder, *options)
    if run.task == "detect":
        rows = [[Image.open(next((out / "pictures").iterdir())) for out in found]]
    else:
        rows = [[Image.open(image) for image in images]]
        rows.append([Image.open(next((out / "labels").iterdir())) for out in found])
    sheet(rows, args.pictures / f"{run.name.replace(' ', '-').lower()}.png")


def main() -> None:
    """Train, print the table, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="det-bccd and camvid-mini lie here")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], metavar="NAME")
    parser.add_argument("--size", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--pictures", type=Path, help="folder for sheets of predictions")
    parser.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    starts = {"pre-trained": SHIPPED, "random": random_twin(args.work / "random-weights")}
    chosen = [run for run in RUNS if not args.only or run.name in args.only]
    tasks = {(run, init): task_of(run, init, start, args) for run in chosen for init, start in starts.items()}
    seconds = run_all(list(tasks.values()), args.jobs)
    rows, record = [], []
    for (run, init), task in tasks.items():
        found = result(task, seconds[task.name])
        record.append({"model": run.name, "config": run.config, "weights": init, **found})
        record[-1] |= {"settings": [str(each) for each in run.settings], "size": args.size}
        scores = {name: f"{value:.1f}" for name, value in found["scores"].items()}
        loss = f"{found['first_loss']:.2f} → {found['last_loss']:.2f}"
        rows.append({"model": run.name, "weights": init, "loss": loss, **scores})
        rows[-1]["CPU minutes"] = f"{found['minutes']:.0f}"
    print(f"\n{describe()}; 1 thread a run, {args.size} px\n\n{table(rows)}")
    if args.out:
        args.out.write_text(json.dumps({"machine": describe(), "results": record}, indent=1) + "\n")
    if args.pictures:
        for run in chosen:
            draw(run, tasks[run, "pre-trained"].out / "artifact", args)


if __name__ == "__main__":
    main()
