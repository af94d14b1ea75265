"""Settings of `coma pack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from coma.paths import Location
from coma.ranges import PROCESSES, SIDE, TILE, Range, Ranged


@dataclass(frozen=True)
class PackConfig(Ranged):
    """Images to pack, and the format of the shards."""

    images: Annotated[Location, tyro.conf.Positional]
    """Folder of images (searched recursively), .csv file of images and labels, .npz pack, .tar shards,
    .parquet files or a folder of them; shards and parquet files also by their address."""
    out: Path
    """New folder for the shards."""
    size: Annotated[int | None, SIDE] = None
    """Short side in pixels to which larger images are reduced; smaller images keep their size; default: 256,
    or that of --tiles"""
    tiles: Annotated[int | None, TILE] = None
    """Side in pixels of windows that larger images are cut into, each packed as an image; also reads all
    frames of DICOM files; default: no windows"""
    quality: Annotated[int, Range(1, 95)] = 90
    """JPEG quality; 16-bit, transparent and multi-channel images are stored without loss."""
    shard_images: Annotated[int, Range(1, 10**9)] = 2000
    """Images per shard."""
    split: str | None = None
    """Split to pack: train, test or val (default: train, if there are splits)."""
    workers: Annotated[int | None, PROCESSES] = None
    """Worker processes (default: one per core beside this process; 0 on 1 or 2 cores)."""

    @property
    def short_side(self) -> int:
        """Short side in pixels to which larger images are reduced."""
        return self.size or self.tiles or 256
