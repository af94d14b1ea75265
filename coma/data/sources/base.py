"""What every kind of data looks like from outside: numbered pictures with a name, perhaps labels.

A source travels to worker processes, so whatever grows with the number of images (names, offsets,
labels) is kept in tensors: those travel in memory that all workers share (`workers.SharedPickle`), and a million
names cost once, not once per worker.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from coma.data.channels import convert_channels
from coma.data.decode import decode, fill_missing
from coma.data.decode_arrays import to_hwc, to_supported_dtype
from coma.data.image import DecodedImage, MinSide
from coma.data.inventory import Inventory
from coma.errors import BadImage
from coma.messages import counted, printable


class Source(ABC):
    """Numbered pictures; cheap to pickle, safe to read from many processes."""

    location: Path
    """What the user pointed at, or the split chosen inside it."""
    class_names: tuple[str, ...] | None
    """Names of the labels, where they are known."""
    inventory: Inventory
    """What the search for the images found and left out; empty where there was none."""
    unlabelled_reason: str = ""
    """Why images that seem to have labels have none: names the file and says what to do."""
    labels_are_stored: bool = True
    """Whether the labels' numbers are the data's own, not places in a sorted list of folder names."""
    split: str | None = None
    """train, val or test, where the images are those of a split."""
    notes: tuple[str, ...] = ()
    """What else was left out or might be misread, a sentence each, for people."""

    def __init__(
        self, location: Path, labels: np.ndarray | None = None, class_names: tuple[str, ...] | None = None
    ) -> None:
        self.location = location
        self.class_names = class_names
        self.inventory = Inventory()
        self._labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)

    @property
    def labels(self) -> np.ndarray | None:
        """Class of every image, int64 `[n]`, a copy; None for unlabelled data."""
        return None if self._labels is None else self._labels.numpy().copy()

    def label(self, i: int) -> int | None:
        """Class of one image; None for unlabelled data."""
        return None if self._labels is None else int(self._labels[i])

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, readable or not; at least 1."""

    def summary(self) -> str:
        """Returns one line: how many images of which kinds there are, and what was left out and why."""
        if self.inventory.images:
            return self.inventory.summary(self.location)
        return f"{printable(str(self.location))}: {counted(len(self), 'image')}"

    @abstractmethod
    def describe(self, i: int) -> str:
        """The image's name in messages."""

    def listing(self) -> tuple[list[str], list[int]]:
        """Names of the images inside `location` and their sizes in bytes: what tells them from others."""
        return [self.describe(i) for i in range(len(self))], [0] * len(self)

    @abstractmethod
    def decode(self, i: int, min_side: MinSide = 0) -> DecodedImage:
        """The decoded image; `min_side` as in `decode`.

        Raises:
            BadImage: it cannot be read or decoded.
        """

    def read_bytes(self, i: int) -> bytes | None:
        """The image's file content; None where there is no file.

        Raises:
            BadImage: it cannot be read.
        """
        return None

    def read(self, i: int, channels: int | None = None, min_side: MinSide = 0) -> np.ndarray:
        """Pixels `[H, W, C]` uint8, uint16 or float32, with C = `channels` where given.

        Raises:
            BadImage: it cannot be read or decoded, or its channels do not fit.
        """
        picture = self.decode(i, min_side)
        return picture.pixels if channels is None else convert_channels(picture, channels, self.describe(i))


class EncodedSource(Source):
    """A source whose images are encoded files, wherever they lie."""

    @abstractmethod
    def read_bytes(self, i: int) -> bytes:
        """The image's file content.

        Raises:
            BadImage: it cannot be read.
        """

    def decode(self, i: int, min_side: MinSide = 0) -> DecodedImage:
        """The decoded image; see `Source.decode`."""
        return decode(self.read_bytes(i), self.describe(i), min_side)


class ArraySource(Source):
    """Arrays in memory, each `[H, W]`, `[H, W, C]` or `[C, H, W]`; for data that has no files."""

    def __init__(
        self,
        images: Sequence[np.ndarray],
        labels: np.ndarray | None = None,
        class_names: tuple[str, ...] | None = None,
        location: Path = Path("array"),
    ) -> None:
        super().__init__(location, labels, class_names)
        self._images = images

    def __len__(self) -> int:
        """Number of arrays."""
        return len(self._images)

    def describe(self, i: int) -> str:
        """The position in the list."""
        return f"{self.location}[{i}]"

    def listing(self) -> tuple[list[str], list[int]]:
        """Positions, and bytes of the arrays."""
        return [str(i) for i in range(len(self))], [np.asarray(image).nbytes for image in self._images]

    def decode(self, i: int, min_side: MinSide = 0) -> DecodedImage:
        """The array as it is."""
        try:
            return fill_missing(DecodedImage(to_supported_dtype(to_hwc(np.asarray(self._images[i])))))
        except BadImage as error:
            raise BadImage(f"{self.describe(i)}: {error}") from None


class Names(Sequence[str]):
    """Many strings in one byte tensor; file names that are not text survive the round trip."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._ends = torch.from_numpy(ends)
        self._bytes = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), np.uint8))

    def __len__(self) -> int:
        """Number of strings."""
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        """All strings, faster than one by one."""
        text, ends = self._bytes.numpy().tobytes(), self._ends.tolist()
        return (os.fsdecode(text[start:end]) for start, end in pairwise(ends))

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        """String number i."""
        if i >= len(self):
            raise IndexError(i)  # ends a loop over the names
        start, end = self._ends[i : i + 2].tolist()
        return os.fsdecode(self._bytes[start:end].numpy().tobytes())


def read_at(path: Path | str, start: int, size: int, name: str) -> bytes:
    """A piece of a large file, without keeping it open.

    Raises:
        BadImage: calling the image `name`, if the piece cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, start)
    except OSError as error:
        raise BadImage(f"{name}: cannot be read ({error.strerror})") from None
    if len(data) < size:
        raise BadImage(f"{name}: its file became shorter after it was opened")
    return data
