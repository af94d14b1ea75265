"""Files of features: one row per image, and what the features are of.

    .parquet    path: string, feature: fixed-size list of float32; in row groups, read a group at a time
    .npz        path: str [n], feature: float32 [n, ...], metadata: the JSON; read as a whole

Both carry a JSON description (`FeaturesInfo`), in the metadata of the Parquet schema under `coma.features`. A
path is relative to `FeaturesInfo.location`. Nothing in these files is ever unpickled.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coma.atomic_io import write_whole
from coma.config.serialization import from_plain, to_plain
from coma.errors import BadInput
from coma.preflight import check_regular_file, require_packages

FORMAT_VERSION = 1
SUFFIXES = (".parquet", ".npz")
METADATA_KEY = b"coma.features"
_NPZ_ERRORS = (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
_GROUP = 1 << 25
"""Bytes of the features of a row group, about: what a reader needs at a time."""


@dataclass(frozen=True)
class FeatureSpec:
    """What makes features comparable: the model, what it was shown, and what was taken of it."""

    model: str
    """The model as it was given: a path, or `timm:NAME`."""
    sha256: str
    """SHA-256 of its weights; exported files have that of the artifact that they were exported from."""
    image_size: tuple[int, int]
    """Height and width of the images shown to it in pixels."""
    mean: tuple[float, ...]
    """Mean per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]
    """Standard deviation per channel, of pixels scaled to 0..1."""
    stage: int | None
    """Stage whose features these are, counted from 1; None for the model's pooled feature."""
    pooling: str
    """mean: one vector per image. none: a map of features."""
    shape: tuple[int, ...]
    """Shape of a feature: (c,), or (c, h, w) for maps."""
    precision: str | None = None
    """Precision of the model's file, which does not decide what can be compared; None in older files."""

    def difference(self, other: FeatureSpec) -> str:
        """Returns why features of the two cannot be compared; empty if they can."""
        if self.sha256 != other.sha256:
            return f"another model ({self.model} and {other.model} have different weights)"
        names = ("stage", "pooling", "image_size", "mean", "std", "shape")
        found = [name for name in names if getattr(self, name) != getattr(other, name)]
        shown = (f"{name} {_words(getattr(self, name))} and {_words(getattr(other, name))}" for name in found)
        return f"the same model with other settings: {'; '.join(shown)}" if found else ""


@dataclass(frozen=True)
class FeaturesInfo:
    """Description of a file of features."""

    spec: FeatureSpec
    images: str
    """The images as they were given: absolute path."""
    location: str
    """Folder or file that the paths are relative to: `images`, or one of its splits."""
    split: str | None
    """Split of the images that was asked for."""
    listing: str
    """SHA-256 of the names and sizes of all images."""
    count: int
    """Number of images, readable or not."""
    runtime: str
    """Library and device that computed them."""
    versions: dict[str, str]
    """Versions of Python and the libraries."""
    skipped: tuple[str, ...] = ()
    """One line for each image that could not be read."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Rows:
    """Features of some images: their paths, and float32 `[n, *shape]`."""

    paths: list[str]
    values: np.ndarray


class FeaturesFile:
    """A file of features that is open for reading.

    Args:
        path: The file.
        may_be_empty: Whether a file without a row is accepted: a part of a file may have none.

    Raises:
        BadInput: it is missing, damaged, or not a file of `coma embed`; the message says which.
        ModuleNotFoundError: pyarrow is missing; `coma.cli` says what to install.
    """

    def __init__(self, path: Path, *, may_be_empty: bool = False) -> None:
        check_regular_file(path, "give a file that coma embed wrote")
        if path.suffix.lower() not in SUFFIXES:
            raise BadInput(f"{path}: not a file of features; give the .parquet or .npz file of coma embed")
        self.path = path
        self._parquet = self._npz = None
        if path.suffix.lower() == ".parquet":
            require_packages("pyarrow")
            self._parquet, text = _open_parquet(path)
            self.rows = int(self._parquet.metadata.num_rows)
        else:
            self._npz, text = _open_npz(path)
            self.rows = len(self._npz.paths)
        self.info = _parse(text, path)
        _check_shape(self)
        if not (self.rows or may_be_empty):
            raise BadInput(f"{path}: has no image; run coma embed on images that can be read")

    def __len__(self) -> int:
        """Returns the number of images that have features."""
        return self.rows

    def groups(self) -> Iterator[Rows]:
        """Yields all rows in order, a part at a time.

        Raises:
            BadInput: while iterating: the file is damaged.
        """
        if self._npz is not None:
            yield self._npz
            return
        assert self._parquet is not None
        for number in range(self._parquet.num_row_groups):
            yield self._read_group(number)

    def paths(self) -> list[str]:
        """Returns the paths of all rows."""
        if self._npz is not None:
            return self._npz.paths
        assert self._parquet is not None
        try:
            return self._parquet.read(columns=["path"]).column("path").to_pylist()
        except Exception as error:  # pyarrow raises many classes on damaged files
            raise _damaged(self.path, error) from None

    def _read_group(self, number: int) -> Rows:
        assert self._parquet is not None
        try:
            table = self._parquet.read_row_group(number, columns=["path", "feature"])
            return _rows(table, self.info.spec.shape)
        except Exception as error:
            raise _damaged(self.path, error) from None


class OpenParquetWriter:
    """Writes rows to a Parquet file in row groups of a size that is comfortable to read.

    Args:
        file: File object to write to.
        info: Description of the file.
    """

    def __init__(self, file: Any, info: FeaturesInfo) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._shape = info.spec.shape
        self._schema = _schema(info)
        self._writer = pq.ParquetWriter(pa.PythonFile(file, mode="w"), self._schema, write_page_checksum=True)
        self._waiting: list[Rows] = []

    def write(self, rows: Rows) -> None:
        """Adds rows."""
        self._waiting.append(rows)
        if sum(each.values.nbytes for each in self._waiting) >= _GROUP:
            self._flush()

    def close(self) -> None:
        """Writes what waits, and the end of the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            paths = [path for rows in self._waiting for path in rows.paths]
            values = np.concatenate([rows.values for rows in self._waiting])
            self._waiting = []
            self._writer.write_table(
                _table(Rows(paths, values), self._schema), row_group_size=max(len(paths), 1)
            )


def to_bytes(rows: Rows, info: FeaturesInfo) -> bytes:
    """Returns a Parquet file of one row group."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    size = max(len(rows.paths), 1)
    pq.write_table(_table(rows, _schema(info)), file, row_group_size=size, write_page_checksum=True)
    return file.getvalue()


def write_features(path: Path, info: FeaturesInfo, groups: Iterable[Rows], count: int) -> None:
    """Writes a file of features atomically, as its suffix says.

    Args:
        path: A `.parquet` or `.npz` file.
        info: Its description.
        groups: All rows, a part at a time.
        count: Number of rows.

    Raises:
        OSError: the disk is full or not writable; the file is as it was before.
    """
    if path.suffix.lower() == ".npz":
        write_whole(path, lambda file: _write_npz(file, info, groups, count))
        return

    def write(file: Any) -> None:
        writer = OpenParquetWriter(file, info)
        for rows in groups:
            writer.write(rows)
            file.check()  # a full disk, before the rest is computed
        writer.close()

    write_whole(path, write)


def storable(name: str) -> str:
    """Returns a file name as UTF-8 text: bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _write_npz(file: Any, info: FeaturesInfo, groups: Iterable[Rows], count: int) -> None:
    """Writes what `numpy.savez` writes, without all features in memory."""
    paths: list[str] = []
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open("feature.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, *info.spec.shape)}
            np.lib.format.write_array_header_1_0(member, header)
            for rows in groups:
                paths += rows.paths
                member.write(np.ascontiguousarray(rows.values, "<f4").tobytes())
                file.check()
        for name, value in {"path": np.array(paths, np.str_), "metadata": np.array(_text(info))}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, value, allow_pickle=False)


def _text(info: FeaturesInfo) -> str:
    return json.dumps(to_plain(info))


def _schema(info: FeaturesInfo) -> Any:
    import pyarrow as pa

    feature = pa.list_(pa.float32(), math.prod(info.spec.shape))
    fields = [pa.field("path", pa.string(), nullable=False), pa.field("feature", feature, nullable=False)]
    return pa.schema(fields, metadata={METADATA_KEY: _text(info).encode()})


def _table(rows: Rows, schema: Any) -> Any:
    import pyarrow as pa

    feature = schema.field("feature").type
    values = pa.array(np.ascontiguousarray(rows.values, np.float32).reshape(-1))
    columns = [pa.array(rows.paths, pa.string()), pa.FixedSizeListArray.from_arrays(values, type=feature)]
    return pa.Table.from_arrays(columns, schema=schema)


def _rows(table: Any, shape: tuple[int, ...]) -> Rows:
    column = table.column("feature").combine_chunks()
    if column.null_count or table.column("path").null_count:
        raise ValueError("a row has no value")
    values = column.flatten().to_numpy(zero_copy_only=False)
    return Rows(table.column("path").to_pylist(), values.reshape(-1, *shape))


def _open_parquet(path: Path) -> tuple[Any, str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(path, page_checksum_verification=True)
        schema = opened.schema_arrow
    except Exception as error:
        raise _damaged(path, error) from None
    text = (schema.metadata or {}).get(METADATA_KEY)
    types = {name: schema.field(name).type for name in schema.names}
    feature = types.get("feature")
    fits = pa.types.is_fixed_size_list(feature) and feature.value_type == pa.float32() if feature else False
    if text is not None and not (fits and types.get("path") == pa.string()):
        raise BadInput(f"{path}: damaged (its columns are not those of a file of features); make it again")
    return opened, None if text is None else text.decode("utf-8", "replace")


def _open_npz(path: Path) -> tuple[Rows, str | None]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
            if not {"path", "feature", "metadata"} <= set(pack.files):
                raise _foreign(path)
            paths, values, text = pack["path"], pack["feature"], pack["metadata"]
    except (*_NPZ_ERRORS, MemoryError) as error:  # a header may promise anything
        raise _damaged(path, error) from None
    if not (paths.dtype.kind == "U" and paths.ndim == 1 and values.dtype == np.float32 and values.ndim > 1):
        raise BadInput(f"{path}: damaged (its arrays are not those of a file of features); make it again")
    if len(paths) != len(values):
        raise BadInput(f"{path}: damaged ({len(paths)} paths for {len(values)} features); make it again")
    return Rows([str(each) for each in paths], values), str(text)


def _parse(text: str | None, path: Path) -> FeaturesInfo:
    if text is None:
        raise _foreign(path)
    try:
        plain = json.loads(text)
        version = plain["format_version"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise BadInput(f"{path}: damaged (its description is not readable); make it again") from None
    if version != FORMAT_VERSION:
        raise BadInput(f"{path}: format {version!r}, but this version reads {FORMAT_VERSION}; make it again")
    return from_plain(plain, FeaturesInfo, source=str(path))


def _check_shape(file: FeaturesFile) -> None:
    """Refuses files whose features are not what their description says."""
    shape = file.info.spec.shape
    if not shape or min(shape) < 1:
        raise BadInput(f"{file.path}: damaged (features of shape {list(shape)}); make it again")
    if file._npz is not None:
        found = file._npz.values.shape[1:]
    else:
        assert file._parquet is not None
        size = file._parquet.schema_arrow.field("feature").type.list_size
        found = shape if size == math.prod(shape) else (size,)
    if found != shape:
        raise BadInput(
            f"{file.path}: damaged (features of shape {list(found)}, described as {list(shape)}); make it "
            "again"
        )


def _foreign(path: Path) -> BadInput:
    return BadInput(f"{path}: was not written by coma embed; give a file that it wrote")


def _damaged(path: Path, error: Exception) -> BadInput:
    if isinstance(error, BadInput):
        return error
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return BadInput(
        f"{path}: damaged, or not a file of features ({reason[:200]}); make it again with coma embed"
    )


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(f"{each:g}" for each in value)
    return "of the model's own" if value is None else str(value)
