"""Windows of large images: every image that is larger than a tile is a number of samples.

Windows stand side by side, `ceil(H / T) x ceil(W / T)` of them for tiles of T pixels; the last ones of a row
and of a column are shifted inside. A side that is not larger than T is taken whole. Frames of a DICOM file
are images of their own. An image of one frame that is no larger than a tile is read as without tiles.

Positions follow from the size of the image, so that only sizes are stored, and a window from its index alone.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from coma.data.decode import naming_errors, quiet
from coma.data.image import DecodedImage, MinSide
from coma.data.sources.base import LocalSource, Source
from coma.data.windows import ImageLayout, Recent, Window, decode_window, image_layout
from coma.errors import BadImage
from coma.messages import abridged, counted

log = logging.getLogger(__name__)

_THREADS = 16
_MANY = 20_000
"""Number of images from which on a line says that their headers are read."""
_MOST_WINDOWS = 10**6
"""Images with more windows are refused: their header is damaged, or tiles are far too small."""
_COSTLY = 8
"""Decoded pixels for one pixel of a window, from which on a note says so."""


class TiledSource(Source):
    """The windows of the images of another source.

    Args:
        source: Image files on a disk.
        side: Side of a tile in pixels.
    """

    def __init__(self, source: LocalSource, side: int) -> None:
        super().__init__(source.location, class_names=source.class_names)
        self._source, self._side, self._recent = source, side, Recent()
        if len(source) >= _MANY:
            log.info(f"{source.location}: reading the sizes of {len(source):,} images, for --tiles {side}")
        with quiet(), ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._layout, range(len(source))))
        self._refused = {i: each for i, each in enumerate(found) if isinstance(each, str)}
        layouts = [ImageLayout(1, 0, 0, (0, 0)) if isinstance(each, str) else each for each in found]
        sizes = np.array([layout[:3] for layout in layouts], np.int64)
        self._sizes = torch.from_numpy(sizes)
        counts = self._counts(sizes)
        self._ends = torch.from_numpy(counts.cumsum())
        self._describe_as(source, np.repeat(np.arange(len(source)), counts))
        self._cut = counted(int((counts > 1).sum()), "image"), int(counts[counts > 1].sum())
        costs = {
            source.describe(i): layout.decoded_pixels(side)
            for i, layout in enumerate(layouts)
            if counts[i] > layout.frames
        }
        if costly := [name for name, cost in costs.items() if cost >= _COSTLY]:
            self.notes = (
                *self.notes,
                f"{counted(len(costly), 'image')} ({abridged(costly, 3)}): not stored in small tiles, so up "
                f"to {max(costs.values()):.0f} times the pixels of a window are decoded for it; `coma pack "
                f"--tiles {side}` decodes them once, and TIFFs can be stored in tiles (gdal_translate -co "
                "TILED=YES IN.tif OUT.tif)",
            )

    def _layout(self, i: int) -> ImageLayout | str:
        """Returns the layout of an image; if it cannot be read, why."""
        path = self._source.path(i)
        try:
            with naming_errors(self._source.describe(i)):
                layout = image_layout(path)
                count = int(self._counts(np.array([layout[:3]]))[0])
                if count > _MOST_WINDOWS:
                    raise BadImage(f"{count:,} windows are more than {_MOST_WINDOWS:,}; give larger --tiles")
                return layout
        except BadImage as error:
            return str(error)

    def _counts(self, sizes: np.ndarray) -> np.ndarray:
        """Returns the number of windows of images of `sizes [n, (frames, height, width)]`."""
        return sizes[:, 0] * np.maximum(-(-sizes[:, 1:] // self._side), 1).prod(axis=1)

    def __len__(self) -> int:
        """Returns the number of windows."""
        return int(self._ends[-1])

    def summary(self) -> str:
        """Returns one line: what the images are, and the number of windows."""
        images, windows = self._cut
        return f"{self._source.summary()}; --tiles {self._side}: {windows:,} windows of {images}, " + (
            f"{len(self) - windows:,} whole"
        )

    def _window(self, i: int) -> tuple[int, Window]:
        """Returns the position of an image, and a window of it."""
        image = int(torch.searchsorted(self._ends, i, right=True))
        number = i - (int(self._ends[image - 1]) if image else 0)
        frames, height, width = self._sizes[image].tolist()
        side = self._side
        down, across = (max(-(-length // side), 1) for length in (height, width))
        frame, number = divmod(number, down * across)
        h, w = min(height, side), min(width, side)
        box = min(number // across * side, height - h), min(number % across * side, width - w), h, w
        return image, Window(frame if frames > 1 else None, None if down * across == 1 else box)

    def describe(self, i: int) -> str:
        """Returns the path of an image and its window, for messages."""
        image, window = self._window(i)
        return f"{self._source.describe(image)}{window}"

    def label_place(self, i: int) -> str:
        """Returns where the label of an image is written; see `Source.label_place`."""
        return self._source.label_place(self._window(i)[0])

    def listing(self) -> tuple[list[str], list[int]]:
        """Returns the names of all windows, and the size of the file of each."""
        names, sizes = self._source.listing()
        windows = [self._window(i) for i in range(len(self))]
        return [f"{names[image]}{window}" for image, window in windows], [
            sizes[image] for image, _ in windows
        ]

    def decode(self, i: int, min_side: MinSide = 0) -> DecodedImage:
        """Returns a decoded window; `min_side` counts only for images that are not cut."""
        image, window = self._window(i)
        if image in self._refused:
            raise BadImage(self._refused[image])
        if not str(window):
            return self._source.decode(image, min_side)
        name = self.describe(i)
        try:
            with open(self._source.path(image), "rb") as file:
                return decode_window(file, window, name, self._recent)
        except OSError as error:
            raise BadImage(f"{name}: cannot be read ({error.strerror})") from None

    def read_bytes(self, i: int) -> bytes | None:
        """Returns the content of an image file that is not cut; None for windows."""
        image, window = self._window(i)
        return None if str(window) or image in self._refused else self._source.read_bytes(image)
