"""What `coma info` says of a file of features."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path

from coma.commands.info import Report
from coma.messages import counted
from downstream.features.files import METADATA_KEY, FeaturesFile


def describe(path: Path) -> Report | None:
    """Returns what a file of features holds, .npz or .parquet; None if the file is of another kind.

    Raises:
        BadInput: it is one, and damaged.
    """
    if not _holds_features(path):
        return None
    file = FeaturesFile(path, may_be_empty=True)
    info, spec = file.info, file.info.spec
    shape = " x ".join(map(str, spec.shape))
    stage = "the model's own" if spec.stage is None else f"of stage {spec.stage}, pooling {spec.pooling}"
    facts = {
        "holds": f"{counted(len(file), 'feature')} of {shape} float32 values",
        "features": stage,
        "model": f"{spec.model} (SHA-256 {spec.sha256})",
        "shown at": f"{spec.image_size[0]} x {spec.image_size[1]} px",
        "images": info.images + (f", split {info.split}" if info.split else ""),
        "left out": counted(len(info.skipped), "unreadable image") if info.skipped else "",
        "computed by": info.runtime,
        "versions": ", ".join(f"{name} {version}" for name, version in info.versions.items()),
    }
    there = shlex.quote(str(path))
    return Report("features of `coma embed`", facts, [f"coma search {there} --duplicates 0.98 --out FOLDER"])


def _holds_features(path: Path) -> bool:
    """Returns whether a file says of itself that it holds features; reads no more than that."""
    if path.suffix.lower() == ".npz":
        try:
            with zipfile.ZipFile(path) as archive:
                return {"feature.npy", "metadata.npy"} <= set(archive.namelist())
        except (zipfile.BadZipFile, OSError):
            return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return METADATA_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False
