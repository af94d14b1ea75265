"""Pack images into shards of reduced images, which any disk reads fast.

Large photographs spend most of their decoding time on pixels that training discards, and many small files are
slow on network disks. Pack once; `coma pretrain SHARDS` then reads the same images in random order. Shards
are ordinary WebDataset tars. An interrupted pack resumes when the command is run again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from coma.arguments import parse_arguments
from coma.config.pack import PackConfig
from coma.errors import ComaError, Interrupted
from coma.messages import counted
from coma.preflight import require_folder

if TYPE_CHECKING:
    from rich.console import Console

    from coma.data.pack import PackReport

_NAMED_FAILURES = 10


def run(argv: list[str]) -> None:
    """Parses the arguments, packs, and prints a summary.

    Raises:
        BadInput: There is nothing to pack, or the output folder has other files.
        Interrupted: Ctrl-C; finished shards are kept.
    """
    config = parse_arguments(PackConfig, argv, prog="coma pack", description=__doc__)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from coma.data import open_source
    from coma.data.pack import pack

    require_folder(config.out)
    console = Console()
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
        bar.start()  # only now, so that an error before it is printed alone
        bar.update(task, completed=done)

    try:
        report = pack(source, config, show)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; {config.out} keeps its finished shards; run the same command again to resume"
        ) from None
    except OSError as error:
        where = error.filename or config.out
        raise ComaError(
            f"{where}: {error.strerror}; when this is solved, run the same command again to resume"
        ) from None
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
            f"{counted(filled, 'image')} had nodata, NaN or infinite values, which were filled with the "
            "mean of their channel"
        )
    if report.failures:
        lines.append(f"{len(report.failures)} skipped, all listed in {out / 'index.json'}:")
        lines += [f"  {failure}" for failure in report.failures[:_NAMED_FAILURES]]
    lines.append(f"next: coma pretrain {out}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
