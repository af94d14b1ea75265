"""Pack images into resized shards, which read fast from any disk.

Large photographs spend most of their decoding time on pixels that training throws away, and many small
files are slow on network disks. Pack once; `coma pretrain SHARDS` then reads the same images in random
order. Shards are ordinary WebDataset tars. A pack that was interrupted goes on when run again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from coma.arguments import parse_arguments
from coma.errors import ComaError, Interrupted
from coma.messages import counted
from coma.preflight import require_folder
from coma.ranges import PROCESSES, SIDE, Range, Ranged

if TYPE_CHECKING:
    from rich.console import Console

    from coma.data.pack import PackReport

_NAMED_FAILURES = 10


@dataclass(frozen=True)
class PackConfig(Ranged):
    """What to pack, and how."""

    images: Annotated[Path, tyro.conf.Positional]
    """Folder of images (searched recursively), .npz pack, .tar shards or a folder of them."""
    out: Path
    """New folder for the shards."""
    size: Annotated[int, SIDE] = 256
    """Short side in pixels that larger images are reduced to; smaller ones are left as they are."""
    quality: Annotated[int, Range(1, 95)] = 90
    """JPEG quality; 16-bit, transparent and multi-channel images are stored without loss."""
    shard_images: Annotated[int, Range(1, 10**9)] = 2000
    """Images per shard."""
    split: str | None = None
    """Split to pack: train, test or val (default: train, where there are splits)."""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes; default: one per core beside this one (0 on 1 or 2 cores)."""


def run(argv: list[str]) -> None:
    """Parse, pack, print a summary.

    Raises:
        BadInput: nothing to pack, or an output folder that holds something else.
        Interrupted: Ctrl-C; finished shards are kept.
    """
    config = parse_arguments(PackConfig, argv, prog="coma pack", description=__doc__)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from coma.data import open_source
    from coma.data.pack import PackSettings, pack

    require_folder(config.out)
    console = Console()
    settings = PackSettings(config.size, config.quality, config.shard_images)
    source = open_source(config.images, config.split)
    if source.unlabelled_reason:
        console.print(
            f"labels are not packed: {source.unlabelled_reason}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    started = time.perf_counter()
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task("packing", total=len(source))

    def show(done: int) -> None:
        bar.start()  # not before there is something to show: an error stands alone
        bar.update(task, completed=done)

    try:
        report = pack(source, config.out, settings, workers=config.workers, progress=show)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {config.out} keeps its finished shards, run again to go on") from None
    except OSError as error:
        where = error.filename or config.out
        raise ComaError(f"{where}: {error.strerror}; when that is solved, run again to go on") from None
    finally:
        if bar.live.is_started:
            bar.stop()
    _print_summary(console, report, len(source), config.out, time.perf_counter() - started)


def _print_summary(console: Console, report: PackReport, total: int, out: Path, seconds: float) -> None:
    before = _megabytes(sum(shard.bytes_before for shard in report.shards))
    after = _megabytes(sum(shard.bytes for shard in report.shards))
    lines = [
        f"{report.images} images in {counted(len(report.shards), 'shard')}: {before} became {after}",
        f"{(total - report.resumed) / seconds:.0f} images/s on this run",
    ]
    if filled := sum(shard.filled for shard in report.shards):
        lines.append(
            f"{counted(filled, 'image')} held nodata, NaN or infinite values, which were filled with the "
            "mean of their channel"
        )
    if report.failures:
        lines.append(f"{len(report.failures)} left out, all listed in {out / 'index.json'}:")
        lines += [f"  {failure}" for failure in report.failures[:_NAMED_FAILURES]]
    lines.append(f"next: coma pretrain {out}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
