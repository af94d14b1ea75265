"""Pack images into shards of reduced images, which any disk reads fast.

Large photographs spend most of their decoding time on pixels that training discards, and many small files
are slow on network disks. Pack once; `coma pretrain SHARDS` then reads the same images in random order.
Shards are ordinary WebDataset tars. An interrupted pack resumes when the command is run again.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from coma.arguments import parse_arguments
from coma.config.pack import PackConfig
from coma.errors import BadInput, ComaError, Interrupted
from coma.messages import counted
from coma.preflight import require_folder

if TYPE_CHECKING:
    from coma.data.pack import PackReport

_NAMED_FAILURES = 10


def run(argv: list[str]) -> None:
    """Parses the arguments, packs, and prints a summary.

    Raises:
        BadInput: There is nothing to pack, the labels of a folder are in a CSV file, or the output folder has
            other files.
        Interrupted: Ctrl-C; finished shards are kept.
    """
    config = parse_arguments(PackConfig, argv, prog="coma pack", description=__doc__)

    from coma.data import open_source
    from coma.data.pack import pack
    from coma.data.sources.label_table import find_table
    from coma.progress import Progress

    require_folder(config.out)
    if isinstance(config.images, Path) and (found := find_table(config.images, config.split)):
        table, split = found
        whole = ", without --split" if split != config.split else ""
        raise BadInput(
            f"{config.images}: a pack of this folder would not have the labels of {table.name}; "
            f"give {table} as the images{whole}, or move it out of the folder"
        )
    source = open_source(config.images, config.split, tiles=config.tiles)
    if source.unlabelled_reason:
        print(f"labels are not packed: {source.unlabelled_reason}")
    started = time.perf_counter()
    with Progress() as progress:
        try:
            report = pack(source, config, lambda done: progress.step("packing", done, len(source)))
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; {config.out} keeps its finished shards; run the same command again to resume"
            ) from None
        except OSError as error:
            where, what = error.filename or config.out, error.strerror or error
            raise ComaError(
                f"{where}: {what}; when this is solved, run the same command again to resume"
            ) from None
    _print_summary(report, len(source), config.out, time.perf_counter() - started)


def _print_summary(report: PackReport, total: int, out: Path, seconds: float) -> None:
    before = _megabytes(sum(shard.bytes_before for shard in report.shards))
    after = _megabytes(sum(shard.bytes for shard in report.shards))
    print(f"{report.images} images in {counted(len(report.shards), 'shard')}: {before} became {after}")
    print(f"{(total - report.resumed) / seconds:.0f} images/s on this run")
    if filled := sum(shard.filled for shard in report.shards):
        print(
            f"{counted(filled, 'image')} had nodata, NaN or infinite values, which were filled with the "
            "mean of their channel"
        )
    if report.failures:
        print(f"{len(report.failures)} skipped, all listed in {out / 'index.json'}:")
        for failure in report.failures[:_NAMED_FAILURES]:
            print(f"  {failure}")
    print(f"next: coma pretrain {shlex.quote(str(out))}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
