"""Does the data path keep up? Training on images from files against training on one batch over and over.

    python benchmarks/end_to_end.py FOLDER
    python benchmarks/end_to_end.py FOLDER --models base --batch 256 --repeats 2 --loader dali

The trainer's own steps (CoMA, by default bf16 on a GPU and fp32 on a CPU), with its default number of data
workers; stretches of real and synthetic steps take turns, the medians count. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from machine import report, wait

from coma.amp import choose_precision
from coma.config import DataConfig, OptimizerConfig, RunConfig, encoder_preset, method_preset
from coma.data import BatchLayout, open_source, training_batches
from coma.data.worker_pool import default_workers
from coma.image_size import ImageSize
from coma.models import build_encoder
from coma.objectives import build_objective
from pretrain.training.distributed import Processes
from pretrain.training.train_step import TrainStep

SIZE, ROUNDS = 224, 3


def build(model: str, batch: int, device: torch.device, compiled: bool) -> TrainStep:
    """The trainer's train_step."""
    objective = build_objective(method_preset("coma"), build_encoder(encoder_preset(model))).to(device)
    precision = choose_precision("auto", device)
    run, slices = RunConfig(compile=compiled), BatchLayout(batch, batch)
    statistics_ = (0.5,) * 3, (0.3,) * 3
    return TrainStep(objective, OptimizerConfig(), run, Processes(device), slices, precision, *statistics_)


def one_step(train_step: TrainStep, batches: Iterator[Any], device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and how many of them were spent waiting for data."""
    started = time.perf_counter()
    waited = train_step(0, 1e-4, batches).waited
    wait(device)
    return time.perf_counter() - started, waited


def main() -> None:
    """Measure and print the table; `--out` keeps it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["small", "base"] if on_gpu else ["tiny", "small"])
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 16)
    parser.add_argument("--workers", type=int, help="default: as the trainer chooses")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--loader", default="workers", choices=["workers", "dali"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=on_gpu)
    parser.add_argument("--steps", type=int, default=50 if on_gpu else 4, help="of a stretch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = torch.device("cuda" if on_gpu else "cpu")
    rows = []
    for model in args.models:
        train_step = build(model, args.batch, device, args.compile)
        data = DataConfig(
            args.folder,
            image_size=ImageSize.of(SIZE),
            workers=args.workers,
            aug_repeats=args.repeats,
            loader=args.loader,
        )
        slices = BatchLayout(args.batch, args.batch)
        real = training_batches(
            open_source(args.folder), data, channels=3, seed=0, batch=slices, device=device
        )
        same = repeat(next(real))
        taken: dict[str, list[tuple[float, float]]] = {"files": [], "synthetic": []}
        for _ in range(ROUNDS):
            for _ in range(2 + 4 * (default_workers() if args.workers is None else args.workers)):
                one_step(train_step, real, device)  # what the workers had prepared in the meantime
            taken["files"] += [one_step(train_step, real, device) for _ in range(args.steps)]
            taken["synthetic"] += [one_step(train_step, same, device) for _ in range(args.steps)]
        seconds = {name: statistics.median(s for s, _ in each) for name, each in taken.items()}
        waited = sum(w for _, w in taken["files"]) / sum(s for s, _ in taken["files"])
        real.close()  # type: ignore[attr-defined]
        rows.append(
            {
                "model": model,
                "images/s from files": f"{args.batch / seconds['files']:.3g}",
                "synthetic": f"{args.batch / seconds['synthetic']:.3g}",
                "files / synthetic": f"{seconds['synthetic'] / seconds['files']:.3f}",
                "waiting for data": f"{waited:.1%}",
            }
        )
    how = f"CoMA, {SIZE} px, batch {args.batch}, {choose_precision('auto', device)}, {args.folder.name}, "
    workers = "by default" if args.workers is None else args.workers
    how += f"loader {args.loader}, workers {workers}, repeats {args.repeats}, "
    how += "compiled" if args.compile else "eager"
    report(how, rows, args.out)


if __name__ == "__main__":
    main()
