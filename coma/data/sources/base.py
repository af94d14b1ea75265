"""The interface of all image sources: numbered images with names and, if there are any, labels.

A source is sent to worker processes, so everything that grows with the number of images (names, offsets,
labels) is kept in tensors. These are in memory that all workers share (`worker_pool.SharedPickle`): a million
names are stored once, not once per worker.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coma.data.channels import convert_channels
from coma.data.decode import decode, fill_missing
from coma.data.decode_arrays import to_hwc, to_supported_dtype
from coma.data.image import DecodedImage, MinSide
from coma.data.inventory import Inventory
from coma.data.shuffle import Blocks
from coma.errors import BadImage
from coma.messages import counted, printable
from coma.paths import Location


class Source(ABC):
    """Numbered images; fast to pickle, and safe to read from many processes."""

    location: Location
    """Path that the user gave, or the folder of the split inside it."""
    class_names: tuple[str, ...] | None
    """Class names in the order of the labels; None if unknown."""
    inventory: Inventory
    """Counts of the files that the search for images found and skipped; empty if there was no search."""
    unlabelled_reason: str = ""
    """Why the images have no labels although they seem to: names the file and says what to do."""
    labels_are_stored: bool = True
    """Whether the data store the labels as numbers; False if they are positions of sorted folder names."""
    split: str | None = None
    """train, val or test; None if the images are not those of a split."""
    blocks: Blocks | None = None
    """Images that are read together; None if each is read on its own."""
    index: dict[str, Any] | None = None
    """Remote files: what was found in them, for JSON; see `listing`. None for local ones."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about images that are skipped or may be misread."""

    def __init__(
        self, location: Location, labels: np.ndarray | None = None, class_names: tuple[str, ...] | None = None
    ) -> None:
        self.location = location
        self.class_names = class_names
        self.inventory = Inventory()
        self._labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        self._multi_hot: torch.Tensor | None = None

    def _describe_as(self, source: Source, indices: np.ndarray) -> None:
        """Takes the labels and the description of another source, of which these are the images `indices`."""
        labels, multi_hot = source.labels, source.multi_hot
        self._labels = None if labels is None else torch.from_numpy(labels[indices])
        self._multi_hot = None if multi_hot is None else torch.from_numpy(multi_hot[indices])
        self.unlabelled_reason, self.labels_are_stored = source.unlabelled_reason, source.labels_are_stored
        self.split, self.notes, self.inventory = source.split, source.notes, source.inventory

    @property
    def labels(self) -> np.ndarray | None:
        """Class of every image, int64 `[n]` (a copy); None for unlabelled data."""
        return None if self._labels is None else self._labels.numpy().copy()

    @property
    def multi_hot(self) -> np.ndarray | None:
        """Classes of every image, bool `[n, classes]` (a copy), of data with any number of classes per image.

        None for other data. `labels` is None where this is not.
        """
        return None if self._multi_hot is None else self._multi_hot.numpy().copy()

    def label_place(self, i: int) -> str:
        """Returns where the label of an image is written, for messages; empty if its path says that."""
        return ""

    def label(self, i: int) -> int | None:
        """Returns the class of an image; None for unlabelled data."""
        return None if self._labels is None else int(self._labels[i])

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of images, readable or not; at least 1."""

    def summary(self) -> str:
        """Returns one line: the number of images of each kind, and what was skipped and why."""
        if self.inventory.images:
            return self.inventory.summary(self.location)
        return f"{printable(str(self.location))}: {counted(len(self), 'image')}"

    @abstractmethod
    def describe(self, i: int) -> str:
        """Returns the name of an image, for messages."""

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns the names of the images inside `location`, and their sizes in bytes."""
        return [self.describe(i) for i in range(len(self))], [0] * len(self)

    @abstractmethod
    def decode(self, i: int, min_side: MinSide = 0) -> DecodedImage:
        """Returns a decoded image; for `min_side`, see `decode.decode`.

        Raises:
            BadImage: It cannot be read or decoded.
        """

    def prefetch(self, indices: Sequence[int]) -> None:  # noqa: B027 (most sources need none)
        """Prepares images that are read next, where many at a time are faster than each on its own."""

    def read_bytes(self, i: int) -> bytes | None:
        """Returns the content of an image file; None if the image is not a file.

        Raises:
            BadImage: It cannot be read.
        """
        return None

    def read(self, i: int, channels: int | None = None, min_side: MinSide = 0) -> np.ndarray:
        """Returns pixels `[H, W, C]` uint8, uint16 or float32; C is `channels` if given.

        Raises:
            BadImage: The image cannot be read or decoded, or its channels cannot be converted.
        """
        image = self.decode(i, min_side)
        return image.pixels if channels is None else convert_channels(image, channels, self.describe(i))


class EncodedSource(Source):
    """A source whose images are encoded files, on disk or inside another file."""

    @abstractmethod
    def read_bytes(self, i: int) -> bytes:
        """Returns the content of an image file.

        Raises:
            BadImage: It cannot be read.
        """

    def decode(self, i: int, min_side: MinSide = 0) -> DecodedImage:
        """Returns a decoded image; see `Source.decode`."""
        return decode(self.read_bytes(i), self.describe(i), min_side)


class LocalSource(EncodedSource):
    """A source whose images are files on a disk."""

    @abstractmethod
    def path(self, i: int) -> Path:
        """Returns the path of an image."""


class ArraySource(Source):
    """Arrays in memory, each `[H, W]`, `[H, W, C]` or `[C, H, W]`; for data without files."""

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
        """Returns the number of arrays."""
        return len(self._images)

    def describe(self, i: int) -> str:
        """Returns the position in the list."""
        return f"{self.location}[{i}]"

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns the positions, and the sizes of the arrays in bytes."""
        return [str(i) for i in range(len(self))], [np.asarray(image).nbytes for image in self._images]

    def decode(self, i: int, min_side: MinSide = 0) -> DecodedImage:
        """Returns the array as an image."""
        try:
            return fill_missing(DecodedImage(to_supported_dtype(to_hwc(np.asarray(self._images[i])))))
        except BadImage as error:
            raise BadImage(f"{self.describe(i)}: {error}") from None


class Names(Sequence[str]):
    """Many strings in one byte tensor; file names that are not valid text are kept too."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._ends = torch.from_numpy(ends)
        self._bytes = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), np.uint8))

    def __len__(self) -> int:
        """Returns the number of strings."""
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        """Yields all strings, faster than by index."""
        text, ends = self._bytes.numpy().tobytes(), self._ends.tolist()
        return (os.fsdecode(text[start:end]) for start, end in pairwise(ends))

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        """Returns string i."""
        if i >= len(self):
            raise IndexError(i)  # ends a loop over the names
        start, end = self._ends[i : i + 2].tolist()
        return os.fsdecode(self._bytes[start:end].numpy().tobytes())


def read_at(path: Path | str, start: int, size: int, name: str) -> bytes:
    """Returns `size` bytes of a file from `start`, without keeping the file open.

    Raises:
        BadImage: They cannot be read; the message calls the image `name`.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, start)
    except OSError as error:
        raise BadImage(f"{name}: cannot be read ({error.strerror})") from None
    if len(data) < size:
        raise BadImage(f"{name}: the file became shorter after it was opened")
    return data
