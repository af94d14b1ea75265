"""Training samples per second of one core: this project's loader against torchvision's ImageFolder.

    python benchmarks/loader.py FOLDER                      # images in FOLDER, as they are
    python benchmarks/loader.py FOLDER --short-side 375     # first enlarged to ImageNet's usual size

Every loader produces the samples of MAE (224 px, crops of 20 to 100 % of the area, bicubic, flips), in this
process, on one thread (DALI on one of its own). CPU time is measured, so other programs do not matter.
torchvision's samples are normalised float32; ours are uint8, because pixels are normalised on the device. The
loaders take turns in several rounds, and the median counts. Files are in the page cache: this measures cores,
not disks.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from machine import report
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as T

from coma.cli import main as coma
from coma.config import DataConfig
from coma.data import BatchLayout, open_source, training_batches

SIZE, BATCH = 224, 32


def torchvision_loader(folder: Path, bicubic: bool) -> Iterator[object]:
    """Yields batches of ImageFolder with MAE's transforms, without end."""
    mode = T.InterpolationMode.BICUBIC if bicubic else T.InterpolationMode.BILINEAR
    crop = T.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=mode)
    normalise = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = datasets.ImageFolder(
        str(folder), T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalise])
    )
    loader = DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


def our_loader(path: Path, **settings: Any) -> Iterator[object]:
    """Yields batches of the trainer's loader."""
    data = DataConfig(path, image_size=SIZE, workers=0, **settings)
    return training_batches(open_source(path), data, channels=3, seed=0, batch=BatchLayout(BATCH, BATCH))


def seconds(batches: Iterator[object], count: int) -> float:
    """Returns the CPU seconds of this process for `count` batches."""
    started = time.process_time()
    for _ in islice(batches, count):
        pass
    time.sleep(0.5)  # work done ahead belongs to this turn
    return time.process_time() - started


def prepare(source: Path, work: Path, short_side: int | None) -> tuple[Path, Path]:
    """Returns a folder with one class, as ImageFolder needs it, and the same images as shards."""
    folder, shards = work / "folder", work / "shards"
    (folder / "all").mkdir(parents=True)
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for number, path in enumerate(paths):
        target = folder / "all" / f"{number:06}{path.suffix}"
        if short_side is None:
            target.symlink_to(path.resolve())
            continue
        with Image.open(path) as image:
            factor = short_side / min(image.size)
            size = round(image.width * factor), round(image.height * factor)
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(
                target.with_suffix(".jpg"), quality=90
            )
    if code := coma(["pack", str(folder), "--out", str(shards)]):
        raise SystemExit(code)
    return folder, shards


def main() -> None:
    """Measures, and prints the table; `--out` writes it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="images, searched recursively")
    parser.add_argument("--short-side", type=int, help="enlarge to this many pixels first")
    parser.add_argument("--batches", type=int, default=10, help=f"of {BATCH} images, per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as work:
        folder, shards = prepare(args.folder, Path(work), args.short_side)
        loaders: dict[str, Callable[[], Iterator[object]]] = {
            "torchvision ImageFolder, bicubic": lambda: torchvision_loader(folder, bicubic=True),
            "torchvision ImageFolder, bilinear": lambda: torchvision_loader(folder, bicubic=False),
            "ours, folder": lambda: our_loader(folder),
            "ours, shards of coma pack": lambda: our_loader(shards),
            "ours, folder, repeats 2": lambda: our_loader(folder, aug_repeats=2),
            "ours, shards, repeats 4": lambda: our_loader(shards, aug_repeats=4),
        }
        if find_spec("nvidia") and find_spec("nvidia.dali"):
            loaders["ours, folder, DALI on the CPU"] = lambda: our_loader(folder, loader="dali")
        running = {name: start() for name, start in loaders.items()}
        times: dict[str, list[float]] = {name: [] for name in running}
        for batches in running.values():
            next(batches)
        for _ in range(args.rounds):
            for name, batches in running.items():
                times[name].append(seconds(batches, args.batches))
    speeds = {name: args.batches * BATCH / statistics.median(each) for name, each in times.items()}
    peer = speeds["torchvision ImageFolder, bicubic"]
    rows = [
        {"loader": name, "samples/s per core": f"{speed:.0f}", "times torchvision's": f"{speed / peer:.2f}"}
        for name, speed in speeds.items()
    ]
    how = f"{args.folder.name}, {f'enlarged to {args.short_side} px' if args.short_side else 'as it is'}"
    report(how, rows, args.out)


if __name__ == "__main__":
    main()
