"""A `.npz` pack: encoded images one after another in one array, for data sets of many small files.

    data     uint8 [bytes]    the files, concatenated
    offsets  int64 [n + 1]    image i is data[offsets[i] : offsets[i + 1]]
    labels, class_names, file_names    optional: int64 [n], str [k], str [n]

`numpy.savez` stores its arrays uncompressed, so `data` is mapped from the file and only the pages that
are read ever take memory; a compressed pack is unpacked once and shared by all processes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.data.source import EncodedSource, Names
from pretrain.errors import BadInput


class NpzSource(EncodedSource):
    """The images of a pack."""

    def __init__(self, path: Path) -> None:
        """Read everything but the images.

        Raises:
            BadInput: not such a pack, or its offsets or labels are out of range.
        """
        try:
            with np.load(path, allow_pickle=False) as pack:
                missing = {"data", "offsets"} - set(pack.files)
                if missing:
                    raise BadInput(f"{path}: this pack lacks {' and '.join(sorted(missing))}")
                optional = {"labels", "class_names", "file_names"} & set(pack.files)
                extra = {key: pack[key] for key in optional}
                offsets = _offsets(path, pack["offsets"])
                self._place = _place_of_data(path)
                self._data = None if self._place else torch.from_numpy(_bytes(path, pack["data"]))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
            raise BadInput(f"{path}: not a readable .npz pack ({error})") from None
        length = self._place[1] if self._place else len(self._data)  # type: ignore[arg-type]
        if offsets[-1] > length:
            raise BadInput(f"{path}: offsets end at {offsets[-1]}, beyond the {length} bytes of data")
        n = len(offsets) - 1
        class_names = tuple(map(str, extra["class_names"])) if "class_names" in extra else None
        super().__init__(path, _labels(path, extra.get("labels"), n, class_names), class_names)
        self._offsets = torch.from_numpy(offsets)
        self._names = Names(map(str, _of_length(path, "file_names", extra.get("file_names"), n)))
        self._map: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the file mapping: every process opens its own."""
        return self.__dict__ | {"_map": None}

    def __len__(self) -> int:
        """Number of images."""
        return len(self._offsets) - 1

    def describe(self, i: int) -> str:
        """The pack and the image's file name in it, or its number."""
        return f"{self.location}[{self._names[i] if len(self._names) else i}]"

    def encoded(self, i: int) -> bytes:
        """The image's file content."""
        start, end = self._offsets[i : i + 2].tolist()
        if self._data is not None:
            return self._data[start:end].numpy().tobytes()
        if self._map is None:
            self._map = np.memmap(self.location, np.uint8, "r", *reversed(self._place))  # type: ignore[misc]
        return self._map[start:end].tobytes()


def _place_of_data(path: Path) -> tuple[int, int] | None:
    """Where the bytes of `data` lie in the file: (start, length); None if they are compressed."""
    with zipfile.ZipFile(path) as archive, archive.open("data.npy") as member, open(path, "rb") as raw:
        info = archive.getinfo("data.npy")
        version = np.lib.format.read_magic(member)
        header = np.lib.format
        read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
        shape, _, dtype = read(member)
        _check_bytes(path, shape, dtype)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        raw.seek(info.header_offset + 26)  # ZIP: lengths of the local header's two variable fields
        name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
        start = info.header_offset + 30 + name + extra + member.tell()
        if start + shape[0] > path.stat().st_size:
            raise BadInput(f"{path}: the file is truncated")
        return start, shape[0]


def _bytes(path: Path, data: np.ndarray) -> np.ndarray:
    _check_bytes(path, data.shape, data.dtype)
    return data


def _check_bytes(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype != np.uint8 or len(shape) != 1:
        raise BadInput(f"{path}: data is {dtype} {list(shape)}, expected uint8 [bytes]")


def _offsets(path: Path, offsets: np.ndarray) -> np.ndarray:
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise BadInput(f"{path}: offsets are {offsets.dtype} {list(offsets.shape)}, expected int64 [n + 1]")
    if len(offsets) < 2:
        raise BadInput(f"{path}: this pack holds no image")
    offsets = offsets.astype(np.int64)
    if offsets[0] < 0 or (np.diff(offsets) < 0).any():
        raise BadInput(f"{path}: offsets must be >= 0 and never fall")
    return offsets


def _labels(
    path: Path, labels: np.ndarray | None, n: int, names: tuple[str, ...] | None
) -> np.ndarray | None:
    if labels is None:
        return None
    _of_length(path, "labels", labels, n)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
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
