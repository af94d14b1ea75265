"""Parquet files with a column of encoded images, as Hugging Face datasets are stored.

The column holds the bytes of image files, or structs with the fields `bytes` and `path` (the feature "Image"
of the library datasets). A column `label` of whole numbers gives the labels; the class names are those that
datasets stores beside the schema.

Parquet is compressed by row group, so an image is read together with its row group: files have small ones
(100 rows, as datasets writes them), and images are shuffled so that few row groups are read at a time (see
`shuffle.Blocks`). A process keeps row groups of up to `_CACHE` bytes, and no file is read as a whole.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from coma.data.remote import RemoteFile, RemoteReader, check_image_size, describe_files
from coma.data.retries import in_threads
from coma.data.shuffle import Blocks
from coma.data.sources.base import EncodedSource
from coma.errors import BadImage, BadInput
from coma.messages import abridged, counted, printable
from coma.paths import Location

if TYPE_CHECKING:
    import pyarrow

StoredFile = Path | RemoteFile

INSTALL = "pip install 'coma-dyvit[parquet]'"
MAX_ROW_GROUP = 1 << 30
"""Maximum bytes of the images in one row group, which is read as a whole."""
_MAX_FOOTER = 1 << 28
_CACHE = 1 << 28
_FOOTERS = 64
_IMAGE_NAMES, _LABEL_NAMES = ("image", "img"), ("label", "labels")


class NoImageColumn(BadInput):
    """A parquet file without a column of images."""


class _Rows(NamedTuple):
    """The row groups of one file."""

    counts: list[int]
    """Number of rows in each."""
    sizes: list[int]
    """Compressed bytes of the images in each."""


class ParquetSource(EncodedSource):
    """The rows of one or more parquet files, in stored order."""

    def __init__(self, location: Location, files: Sequence[StoredFile], column: str = "") -> None:
        """Reads the footers of the files.

        Args:
            location: Where the files are.
            files: The files, all with the same columns.
            column: Column of images; by default the only one, or the one that is called image.

        Raises:
            NoImageColumn: There is no column of images, or not the requested one.
            BadInput: A file is damaged, its columns differ, there are several columns of images and none is
                called image, a row group is too large, or there is no row.
        """
        super().__init__(location)
        self._unlabelled_reason = ""
        _import_pyarrow()
        self._reader = _Reader(list(files))
        schema = self._reader.open(0).schema_arrow
        self._column, self._is_struct = _image_column(files[0], schema, column)
        self._reader.column = f"{self._column}.bytes" if self._is_struct else self._column
        rows = in_threads(self._rows, range(len(files)))
        counts = np.array([count for each in rows for count in each.counts], np.int64)
        owners = np.repeat(np.arange(len(files)), [len(each.counts) for each in rows])
        numbers = np.array([number for each in rows for number in range(len(each.counts))], np.int64)
        sizes = np.array([size for each in rows for size in each.sizes], np.int64)
        full = counts > 0
        if not full.any():
            raise BadInput(f"{location}: no row in {counted(len(files), 'parquet file')}")
        self.blocks = Blocks(counts[full])
        self._groups = torch.from_numpy(np.stack([owners, numbers, sizes], 1)[full])
        self._label_column, self.class_names = _label_column(schema)
        if remote := [file for file in files if isinstance(file, RemoteFile)]:
            self.index = {**describe_files(location, remote), "column": self._column}

    def __len__(self) -> int:
        """Returns the number of rows."""
        return int(self._sizes.sum())

    @property
    def _sizes(self) -> np.ndarray:
        assert self.blocks is not None
        return self.blocks.sizes

    @property
    def labels(self) -> np.ndarray | None:
        """Class of every image, int64 `[n]`, read when it is first asked for; None for unlabelled data."""
        self._load_labels()
        return super().labels

    def label(self, i: int) -> int | None:
        """Returns the class of an image; None for unlabelled data."""
        self._load_labels()
        return super().label(i)

    @property
    def unlabelled_reason(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Why the images have no labels although there is a column of them, which is read to tell."""
        self._load_labels()
        return self._unlabelled_reason

    def _load_labels(self) -> None:
        if self._labels is None and self._label_column:
            name = self._label_column
            parts = in_threads(lambda k: self._reader.labels(k, name), range(len(self._reader.files)))
            values = np.concatenate(parts)
            if (values < 0).any():
                self._label_column = ""
                empty = int((values < 0).sum())
                has = "has" if empty == 1 else "have"
                self._unlabelled_reason = f"{counted(empty, 'row')} {has} no label in {name!r}"
            elif self.class_names is not None and values.max() >= len(self.class_names):
                named = counted(len(self.class_names), "class", "classes")
                raise BadInput(f"{self.location}: labels run to {values.max()}, but {named} are named")
            else:
                self._labels = torch.from_numpy(values)

    def describe(self, i: int) -> str:
        """Returns the path of the file and the number of the row in it."""
        file, _, _ = self._place(i)
        return printable(f"{self._reader.files[file]}[{i - self._first(file)}]")

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns names as `file.parquet/row`, and the compressed bytes of their row groups."""
        owners = np.repeat(self._groups[:, 0].numpy(), self._sizes)
        firsts = np.searchsorted(owners, owners)
        names = [file.name for file in self._reader.files]
        rows = (np.arange(len(owners)) - firsts).tolist()
        return (
            [f"{names[owner]}/{row}" for owner, row in zip(owners.tolist(), rows, strict=True)],
            np.repeat(self._groups[:, 2].numpy(), self._sizes).tolist(),
        )

    def prefetch(self, indices: Sequence[int]) -> None:
        """Reads the row groups of these images, as far as there is room for them."""
        assert self.blocks is not None
        blocks = np.unique(np.searchsorted(self.blocks.starts, np.asarray(indices), "right") - 1)
        self._reader.load({(file, group): size for file, group, size in self._groups[blocks].tolist()})

    def read_bytes(self, i: int) -> bytes:
        """Returns the content of an image file."""
        file, group, row = self._place(i)
        rows = self._reader.row_group(file, group)
        if isinstance(rows, str):
            raise BadImage(f"{self.describe(i)}: {rows}")
        value = rows[row]
        if not value.is_valid:
            field = f"the field bytes of {self._column!r}" if self._is_struct else f"column {self._column!r}"
            raise BadImage(
                f"{self.describe(i)}: {field} is empty; files outside the parquet file are not read"
            )
        check_image_size(value.as_buffer().size, self.describe(i))
        return value.as_py()

    def _rows(self, number: int) -> _Rows:
        """Returns the row groups of a file, after a check of its columns."""
        file = self._reader.open(number)
        metadata, path = file.metadata, self._reader.column
        columns = [metadata.schema.column(k).path for k in range(metadata.num_columns)]
        if path not in columns:
            raise BadInput(f"{self._reader.files[number]}: lacks the column {path!r} of the other files")
        at = columns.index(path)
        groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
        chunks = [group.column(at) for group in groups]
        largest = max((max(c.total_uncompressed_size, c.total_compressed_size) for c in chunks), default=0)
        if largest > MAX_ROW_GROUP:
            raise BadInput(
                f"{self._reader.files[number]}: a row group holds {largest / 1e9:.1f} GB of images, and is "
                "read as a whole; write the file with smaller ones, such as row_group_size=100 (the limit is "
                f"{MAX_ROW_GROUP / 1e9:.1f} GB)"
            )
        counts = [group.num_rows for group in groups]
        if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
            raise BadInput(f"{self._reader.files[number]}: its row groups do not add up to its rows")
        return _Rows(counts, [chunk.total_compressed_size for chunk in chunks])

    def _place(self, i: int) -> tuple[int, int, int]:
        """Returns file, row group and row of an image."""
        assert self.blocks is not None
        block = int(np.searchsorted(self.blocks.starts, i, "right")) - 1
        file, group, _ = self._groups[block].tolist()
        return file, group, i - int(self.blocks.starts[block])

    def _first(self, file: int) -> int:
        """Returns the first image of a file."""
        assert self.blocks is not None
        return int(self.blocks.starts[int(np.searchsorted(self._groups[:, 0].numpy(), file))])


class _Reader:
    """Reads row groups, and keeps the last ones; sent to another process, it is empty again.

    Threads read at the same time, and pyarrow's ParquetFile is not safe for that: each read has one of its
    own, over the footer that was read once.
    """

    def __init__(self, files: list[StoredFile], column: str = "") -> None:
        self.files, self.column = files, column
        self._footers: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Reader, (self.files, self.column)

    def open(self, number: int) -> Any:
        """Returns a file as a new ParquetFile of pyarrow.

        Raises:
            BadInput: It is not a readable parquet file.
        """
        pyarrow = _import_pyarrow()
        file, footer = self.files[number], self._footers.get(number)
        try:
            source = (
                pyarrow.PythonFile(RemoteReader(file), "r")
                if isinstance(file, RemoteFile)
                else pyarrow.OSFile(str(file))
            )
            if footer is None:
                _check_footer(source)
            opened = pyarrow.parquet.ParquetFile(source, metadata=footer, pre_buffer=True)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise BadInput(f"{file}: not a readable parquet file ({_first_line(error)})") from None
        if footer is None:
            self._footers[number] = opened.metadata
            while len(self._footers) > _FOOTERS:
                self._footers.popitem(last=False)
        return opened

    def row_group(self, file: int, group: int) -> Any:
        """Returns the images of a row group as an Arrow array, or what is wrong with it."""
        key = file, group
        if key not in self._groups:
            self._add(key, self._read(key))
        self._groups.move_to_end(key)
        return self._groups[key]

    def load(self, sizes: dict[tuple[int, int], int]) -> None:
        """Reads row groups at the same time, given their sizes, until the cache is full."""
        wanted, total = [], 0
        for key, size in sizes.items():
            total += size
            if total > _CACHE:
                break
            if key in self._groups:
                self._groups.move_to_end(key)
            else:
                wanted.append(key)
        in_threads(self.open, sorted({file for file, _ in wanted} - self._footers.keys()))
        for key, rows in zip(wanted, in_threads(self._read, wanted), strict=True):
            self._add(key, rows)

    def labels(self, number: int, column: str) -> np.ndarray:
        """Returns a column of whole numbers, int64 `[n]`; -1 for what is empty."""
        pyarrow = _import_pyarrow()
        try:
            values = self.open(number).read(columns=[column]).column(0)
            return values.cast(pyarrow.int64()).fill_null(-1).to_numpy()
        except (pyarrow.ArrowException, OSError) as error:
            what = f"column {column!r} cannot be read ({_first_line(error)})"
            raise BadInput(f"{self.files[number]}: {what}") from None

    def _add(self, key: tuple[int, int], rows: Any) -> None:
        self._groups[key] = rows
        total = sum(_bytes(each) for each in self._groups.values())
        while total > _CACHE and len(self._groups) > 1:
            total -= _bytes(self._groups.popitem(last=False)[1])

    def _read(self, key: tuple[int, int]) -> Any:
        pyarrow = _import_pyarrow()
        opened = self.open(key[0])
        try:
            table = opened.read_row_group(key[1], columns=[self.column], use_threads=False)
            column = table.column(0).combine_chunks()
            if isinstance(column, pyarrow.ChunkedArray):
                column = pyarrow.concat_arrays(column.chunks)
            if self.column.endswith(".bytes") and pyarrow.types.is_struct(column.type):
                column = pyarrow.compute.struct_field(column, "bytes")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            return f"its row group cannot be read ({_first_line(error)})"
        if len(column) != opened.metadata.row_group(key[1]).num_rows:
            return "its row group has another number of rows than the file says"
        return column


def _bytes(rows: Any) -> int:
    return 0 if isinstance(rows, str) else rows.nbytes


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"parquet files need an extra: {INSTALL}") from None
    return pyarrow


def _check_footer(source: Any) -> None:
    """Refuses a footer that is too large to be read; the specification calls it FileMetaData.

    Raises:
        ValueError: The file does not end like a parquet file.
    """
    size = source.size()
    source.seek(max(size - 8, 0))
    tail = source.read(8)
    length = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != b"PAR1" or length > min(size - 12, _MAX_FOOTER):
        raise ValueError("it does not end like one; perhaps it is incomplete")
    source.seek(0)


def _image_column(file: StoredFile, schema: pyarrow.Schema, wanted: str) -> tuple[str, bool]:
    """Returns the name of the column of images, and whether it has structs."""
    kinds = {field.name: _is_image(field.type) for field in schema}
    found = [name for name, is_image in kinds.items() if is_image]
    listed = abridged([f"{field.name}: {field.type}" for field in schema])
    if wanted:
        if wanted not in found:
            raise NoImageColumn(
                f"{file}: {wanted!r} is no column of images; its columns: {printable(listed)}"
            )
        return wanted, kinds[wanted] == "struct"
    if not found:
        raise NoImageColumn(
            f"{file}: has no column of images (binary, or a struct with the field bytes); its columns: "
            f"{printable(listed)}"
        )
    declared = [name for name in found if name in _declared(schema, "Image")] or found
    named = [name for name in _IMAGE_NAMES if name in declared]
    if len(declared) > 1 and not named:
        raise BadInput(
            f"{file}: has several columns of images, {printable(', '.join(declared))}; name one behind the "
            f"path, as in DATA#{declared[0]}"
        )
    name = named[0] if named else declared[0]
    return name, kinds[name] == "struct"


def _is_image(kind: Any) -> str:
    """Returns "binary" or "struct" for the types that hold images; otherwise the empty string."""
    types = _import_pyarrow().types
    if types.is_binary(kind) or types.is_large_binary(kind):
        return "binary"
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return "struct" if _is_image(kind.field("bytes").type) == "binary" else ""
    return ""


def _label_column(schema: pyarrow.Schema) -> tuple[str, tuple[str, ...] | None]:
    """Returns the column of labels (empty if there is none), and the class names."""
    types = _import_pyarrow().types
    declared = _declared(schema, "ClassLabel")
    whole = [field.name for field in schema if types.is_integer(field.type)]
    named = [name for name in _LABEL_NAMES if name in whole]
    if not named:
        named = [name for name in declared if name in whole]
    if not named:
        return "", None
    names = declared.get(named[0], {}).get("names")
    return named[0], tuple(map(str, names)) if isinstance(names, list) and names else None


def _declared(schema: pyarrow.Schema, kind: str) -> dict[str, dict[str, Any]]:
    """Returns the features of a kind that the library datasets stores beside the schema, by column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: each for name, each in features.items() if each.get("_type") == kind}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _first_line(error: BaseException) -> str:
    return printable(str(error).partition("\n")[0][:200]) or type(error).__name__
