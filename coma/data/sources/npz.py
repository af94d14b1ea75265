"""A `.npz` pack: encoded images concatenated in one array, for data sets of many small files.

    data     uint8 [bytes]    the files, concatenated
    offsets  int64 [n + 1]    image i is data[offsets[i] : offsets[i + 1]]
    labels, class_names, file_names    optional: int64 [n], str [k], str [n]

`numpy.savez` stores arrays uncompressed, so images are read from their place in the file and use no memory. A
compressed pack (`savez_compressed`) is decompressed once, into memory that all processes share.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from coma.data.sources.base import EncodedSource, Names, read_at
from coma.errors import BadInput
from coma.messages import printable


class NpzSource(EncodedSource):
    """The images of a pack."""

    def __init__(self, path: Path) -> None:
        """Reads everything except the images.

        Raises:
            BadInput: The file is not such a pack, or its offsets, labels or names do not fit.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as pack:
                missing = {"data", "offsets"} - set(pack.files)
                if missing:
                    raise BadInput(f"{path}: this pack lacks {' and '.join(sorted(missing))}")
                optional = {"labels", "class_names", "file_names"} & set(pack.files)
                extra = {key: pack[key] for key in optional}
                offsets = _offsets(path, pack["offsets"])
                n = len(offsets) - 1
                self._start, length = _place_of_data(path)
                self._data = torch.from_numpy(pack["data"]) if self._start is None else None
                for key, values in extra.items():
                    if values.ndim != 1:
                        shape = list(values.shape)
                        raise BadInput(f"{path}: {key} have the shape {shape}, expected one dimension")
                class_names = tuple(map(str, extra["class_names"])) if "class_names" in extra else None
                self._names = Names(map(str, _of_length(path, "file_names", extra.get("file_names"), n)))
        except BadInput:
            raise
        except Exception as error:  # numpy and zipfile fail with OSError, ValueError, RuntimeError, ...
            raise BadInput(f"{path}: not a readable .npz pack ({error})") from None
        if offsets[-1] > length:
            raise BadInput(f"{path}: offsets end at {offsets[-1]}, beyond the {length} bytes of data")
        super().__init__(path, _labels(path, extra.get("labels"), n, class_names), class_names)
        self._path, self._offsets = path, torch.from_numpy(offsets)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._offsets) - 1

    def describe(self, i: int) -> str:
        """Returns the path of the pack, and the image's file name or number in it."""
        return printable(f"{self.location}[{self._names[i] if len(self._names) else i}]")

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns file names in the pack, or numbers, and sizes in bytes."""
        names = list(self._names) or [str(i) for i in range(len(self))]
        return names, self._offsets.diff().tolist()

    def read_bytes(self, i: int) -> bytes:
        """Returns the content of an image file."""
        start, end = self._offsets[i : i + 2].tolist()
        if self._data is not None:
            return self._data[start:end].numpy().tobytes()
        return read_at(self._path, (self._start or 0) + start, end - start, self.describe(i))


def _place_of_data(path: Path) -> tuple[int | None, int]:
    """Returns the start of `data` in the file (None if it is compressed) and its number of bytes."""
    with zipfile.ZipFile(path) as archive, archive.open("data.npy") as member, open(path, "rb") as raw:
        info = archive.getinfo("data.npy")
        version = np.lib.format.read_magic(member)
        header = np.lib.format
        read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
        shape, _, dtype = read(member)
        if dtype != np.uint8 or len(shape) != 1:
            raise BadInput(f"{path}: data is {dtype} {list(shape)}, expected uint8 [bytes]")
        if info.compress_type != zipfile.ZIP_STORED:
            return None, shape[0]
        raw.seek(info.header_offset + 26)  # ZIP: lengths of the local header's two variable fields
        name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
        start = info.header_offset + 30 + name + extra + member.tell()
        if start + shape[0] > path.stat().st_size:
            raise BadInput(f"{path}: the file is truncated")
        return start, shape[0]


def _offsets(path: Path, offsets: np.ndarray) -> np.ndarray:
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise BadInput(f"{path}: offsets are {offsets.dtype} {list(offsets.shape)}, expected int64 [n + 1]")
    if len(offsets) < 2:
        raise BadInput(f"{path}: this pack has no image")
    offsets = offsets.astype(np.int64)
    if offsets[0] < 0 or (np.diff(offsets) < 0).any():
        raise BadInput(f"{path}: offsets must be >= 0 and must not decrease")
    return offsets


def _labels(
    path: Path, labels: np.ndarray | None, n: int, names: tuple[str, ...] | None
) -> np.ndarray | None:
    if labels is None:
        return None
    _of_length(path, "labels", labels, n)
    if labels.dtype.kind not in "iu":
        raise BadInput(f"{path}: labels are {labels.dtype} {list(labels.shape)}, expected int64 [n]")
    if labels.min() < 0 or (names is not None and labels.max() >= len(names)):
        classes = "" if names is None else f" of {len(names)} classes"
        raise BadInput(f"{path}: labels run from {labels.min()} to {labels.max()}{classes}")
    return labels.astype(np.int64)


def _of_length(path: Path, key: str, values: np.ndarray | None, n: int) -> np.ndarray:
    if values is None:
        return np.empty(0, str)
    if len(values) != n:
        raise BadInput(f"{path}: {len(values)} {key} for {n} images")
    return values
