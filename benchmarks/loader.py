"""Training samples per second of one core: this project's loader against torchvision's ImageFolder.

    python benchmarks/loader.py FOLDER                      # images in FOLDER, as they are
    python benchmarks/loader.py FOLDER --short-side 375     # first enlarged to ImageNet's usual size
    python benchmarks/loader.py FOLDER --remote 0 20        # remote files in place of torchvision's loader

Every loader produces the samples of MAE (224 px, crops of 20 to 100 % of the area, bicubic, flips), in this
process, on one thread (DALI on one of its own). CPU time is measured, so other programs do not matter.
torchvision's samples are normalised float32; ours are uint8, because pixels are normalised on the device. The
loaders take turns in several rounds, and the median counts. Files are in the page cache: this measures cores,
not disks.

With --remote, shards and parquet files (the images ten times over, row groups of 100 rows) are read from a
local disk and from web servers of this machine that answer after so many milliseconds, and wall-clock time
counts. The first batch of each loader is not timed, but its bytes count.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
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
from coma.image_size import ImageSize

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


def our_loader(place: Path | str, **settings: Any) -> Iterator[object]:
    """Yields batches of the trainer's loader."""
    data = DataConfig(image_size=ImageSize.of(SIZE), workers=0, **settings)
    return training_batches(open_source(place), data, channels=3, seed=0, batch=BatchLayout(BATCH, BATCH))


def seconds(batches: Iterator[object], count: int, clock: Callable[[], float]) -> float:
    """Returns the seconds for `count` batches: CPU seconds of this process, or wall-clock time."""
    started = clock()
    for _ in islice(batches, count):
        pass
    if clock is time.process_time:
        time.sleep(0.5)  # work done ahead belongs to this turn
    return clock() - started


class Server:
    """A process that serves the files of a folder, each answer `milliseconds` late."""

    def __init__(self, folder: Path, milliseconds: int) -> None:
        script = Path(__file__).parents[1] / "tests" / "helpers" / "remote_files.py"
        command = [sys.executable, str(script), str(folder), str(milliseconds / 1000)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def sent(self) -> int:
        """Returns the bytes of all answers so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._read())

    def stop(self) -> None:
        """Ends the process."""
        self._process.communicate()


def write_parquet(shards: Path, folder: Path) -> Path:
    """Writes the images of shards ten times into parquet files as the library datasets has them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = open_source(shards)
    rows = [{"bytes": source.read_bytes(i), "path": None} for i in range(len(source))]
    folder.mkdir()
    for number in range(10):
        pq.write_table(pa.table({"image": rows}), folder / f"{number}.parquet", row_group_size=100)
    return folder


def measure_remote(shards: Path, work: Path, args: argparse.Namespace) -> list[dict[str, str]]:
    """Returns the table of remote files against the same ones on the local disk."""
    parquet = write_parquet(shards, work / "parquet")
    names = sorted(path.name for path in shards.glob("*.tar"))
    servers = {wait: Server(work, wait) for wait in args.remote}
    loaders = {"shards, local disk": our_loader(shards), "parquet, local disk": our_loader(parquet)}
    for wait, server in servers.items():
        there = f"{server.url}/{shards.name}/"
        loaders[f"shards, {wait} ms"] = our_loader(
            there + (names[0] if len(names) == 1 else f"{{{','.join(names)}}}")
        )
        loaders[f"parquet, {wait} ms"] = our_loader(f"{server.url}/parquet/{{0..9}}.parquet")
    times: dict[str, list[float]] = {name: [] for name in loaders}
    before = {wait: server.sent() for wait, server in servers.items()}
    traffic = dict.fromkeys(loaders, 0)
    for turn in range(args.rounds + 1):
        for name, batches in loaders.items():
            taken = seconds(batches, args.batches if turn else 1, time.perf_counter)
            times[name] += [taken] if turn else []
            for wait, server in servers.items():
                sent = server.sent()
                traffic[name] += sent - before[wait]
                before[wait] = sent
    images = (args.rounds * args.batches + 1) * BATCH
    mean = sum(path.stat().st_size for path in parquet.iterdir()) / len(open_source(parquet))
    rows = []
    for name, each in times.items():
        local = statistics.median(times[f"{name.partition(',')[0]}, local disk"])
        rows.append(
            {
                "loader": name,
                "samples/s": f"{args.batches * BATCH / statistics.median(each):.0f}",
                "times the local disk's": f"{local / statistics.median(each):.2f}",
                "bytes read per image": f"{traffic[name] / images / mean:.2f} images"
                if traffic[name]
                else "-",
            }
        )
    for server in servers.values():
        server.stop()
    return rows


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
    parser.add_argument("--remote", type=int, nargs="+", metavar="MS", help="measure remote files instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as work:
        folder, shards = prepare(args.folder, Path(work), args.short_side)
        if args.remote:
            report(f"{args.folder.name}, remote files", measure_remote(shards, Path(work), args), args.out)
            return
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
                times[name].append(seconds(batches, args.batches, time.process_time))
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
