"""Pack images into resized shards, which read fast from any disk.

Decoding large photographs spends most of its time on pixels that training discards, and many small files
are slow on network disks. Pack once; `coma pretrain SHARDS` then reads the same images in random order.
Shards are ordinary WebDataset tars. The same command resumes a pack that was interrupted.
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
    from coma.data.pack import PackReport

_NAMED_FAILURES = 10


@dataclass(frozen=True)
class PackConfig(Ranged):
    """Images to pack, and the format of the shards."""

    images: Annotated[Path, tyro.conf.Positional]
    """Folder of images (searched recursively), .npz pack, .tar shards or a folder of them."""
    out: Path
    """New folder for the shards."""
    size: Annotated[int, SIDE] = 256
    """Short side in pixels to which larger images are reduced; smaller ones keep their size."""
    quality: Annotated[int, Range(1, 95)] = 90
    """JPEG quality; 16-bit, transparent and multi-channel images are stored without loss."""
    shard_images: Annotated[int, Range(1, 10**9)] = 2000
    """Images per shard."""
    split: str | None = None
    """Split to pack: train, test or val; default: train, where there are splits"""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes; default: one per core but one, 0 on two cores"""


def run(argv: list[str]) -> None:
    """Packs and prints a summary.

    Raises:
        BadInput: nothing to pack, or an output folder that holds something else.
        Interrupted: Ctrl-C; finished shards are kept.
    """
    config = parse_arguments(PackConfig, argv, prog="coma pack", description=__doc__)

    from coma.data import open_source
    from coma.data.pack import PackSettings, pack
    from coma.progress import Progress

    require_folder(config.out)
    settings = PackSettings(config.size, config.quality, config.shard_images)
    source = open_source(config.images, config.split)
    if source.unlabelled_reason:
        print(f"labels are not packed: {source.unlabelled_reason}")
    started = time.perf_counter()
    with Progress() as progress:
        try:
            report = pack(
                source,
                config.out,
                settings,
                workers=config.workers,
                progress=lambda done: progress.step("packing", done, len(source)),
            )
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; {config.out} keeps its finished shards; run the same command again to resume"
            ) from None
        except OSError as error:
            where = error.filename or config.out
            raise ComaError(
                f"{where}: {error.strerror}; solve that, then run the same command again"
            ) from None
    _print_summary(report, len(source), config.out, time.perf_counter() - started)


def _print_summary(report: PackReport, total: int, out: Path, seconds: float) -> None:
    before = _megabytes(sum(shard.bytes_before for shard in report.shards))
    after = _megabytes(sum(shard.bytes for shard in report.shards))
    print(f"{report.images} images in {counted(len(report.shards), 'shard')}: {before} became {after}")
    print(f"{(total - report.resumed) / seconds:.0f} images/s on this run")
    if filled := sum(shard.filled for shard in report.shards):
        print(
            f"{counted(filled, 'image')} held nodata, NaN or infinite values, which were filled with the "
            "mean of their channel"
        )
    if report.failures:
        print(f"{len(report.failures)} skipped, all listed in {out / 'index.json'}:")
        for failure in report.failures[:_NAMED_FAILURES]:
            print(f"  {failure}")
    print(f"next: coma pretrain {out}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
