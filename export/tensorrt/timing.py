"""The timing cache: how long kernels took, kept in a file, so that the next build need not try them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coma.errors import BadInput


def open_timing_cache(config: Any, path: Path) -> None:
    """Let the build use what the file holds; an empty one where there is none.

    Raises:
        BadInput: the file is not a timing cache, or of another GPU or TensorRT.
    """
    known = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BadInput(
            f"{path}: not a timing cache of this GPU and this TensorRT; give another file, or delete it"
        )


def save_timing_cache(config: Any, path: Path) -> None:
    """Write what was there and what the build measured, and what another build has written meanwhile.

    Raises:
        OSError: the disk is full, or not to be written.
    """
    from coma.atomic_io import write_whole

    cache = config.get_timing_cache()
    if path.exists():
        other = config.create_timing_cache(path.read_bytes())
        if other is not None:
            cache.combine(other, ignore_mismatch=False)
    data = memoryview(cache.serialize()).cast("B")
    write_whole(path, lambda file: file.write(data))
