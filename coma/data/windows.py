"""Windows of large images: reads the part of a file that a window needs, where the format allows that.

    TIFF        the tiles or strips that the window touches (see `decode_tiff`)
    NPY         the rows of the window
    DICOM       one frame
    all others  the whole image; the last one is kept for its next windows

A window of an image is named by a media fragment (W3C, Media Fragments URI 1.0, section 4.2.2), and a frame
likewise: `scan.tif#xywh=512,1024,512,512`, `series.dcm#frame=3`, `series.dcm#frame=3&xywh=0,512,512,512`.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

from coma.data.decode import (
    HEAD,
    decode_content,
    fill_missing,
    image_size,
    is_dicom,
    is_npy,
    is_tiff,
    naming_errors,
    quiet,
)
from coma.data.decode_arrays import npy_layout, to_supported_dtype
from coma.data.decode_dicom import decode_dicom, dicom_size
from coma.data.decode_tiff import decode_tiff_window, read_rows, tiff_layout
from coma.data.image import Box, DecodedImage, check_inside, planes_to_hwc

_CACHE = 1 << 26
"""Bytes of decoded tiles, strips and images that a process keeps; it keeps one image, however large."""

_FRAGMENT = re.compile(r"#(?:frame=(\d{1,9}))?&?(?:xywh=(\d{1,9}),(\d{1,9}),(\d{1,9}),(\d{1,9}))?")


class ImageLayout(NamedTuple):
    """The size of the image in a file, and how windows of it are read."""

    frames: int
    height: int
    width: int
    unit: tuple[int, int]
    """Height and width of the smallest part that is decoded."""

    def decoded_pixels(self, side: int) -> float:
        """Returns how many pixels are decoded for one pixel of a window of this side, at most."""
        (h, w), (rows, columns) = (min(side, self.height), min(side, self.width)), self.unit
        height = min(self.height, (-(-(h - 1) // rows) + 1) * rows)
        width = min(self.width, (-(-(w - 1) // columns) + 1) * columns)
        return height * width / (h * w)


class Window(NamedTuple):
    """A part of the image in a file."""

    frame: int | None
    """Position of the frame, from 0; None for the only one."""
    box: Box | None
    """Top, left, height and width; None for the whole frame."""

    def __str__(self) -> str:
        """Returns the fragment that names it."""
        parts = [] if self.frame is None else [f"frame={self.frame + 1}"]
        if self.box is not None:
            top, left, height, width = self.box
            parts.append(f"xywh={left},{top},{width},{height}")
        return f"#{'&'.join(parts)}" if parts else ""


def parse_window(name: str) -> tuple[str, Window] | None:
    """Returns the name of an image and its window, of a name that ends with one; None for other names."""
    path, mark, fragment = name.rpartition("#")
    found = _FRAGMENT.fullmatch(mark + fragment)
    if not path or found is None or not fragment:
        return None
    frame, *box = (None if each is None else int(each) for each in found.groups())
    left, top, width, height = (each or 0 for each in box)
    return path, Window(None if frame is None else frame - 1, (top, left, height, width) if width else None)


class Recent:
    """Arrays and images that were decoded last, up to a number of bytes. Copies in other processes are empty.

    Args:
        limit: Number of bytes. One item is kept even if it is larger.
    """

    def __init__(self, limit: int = _CACHE) -> None:
        self._limit, self._total = limit, 0
        self._items: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Recent], tuple[int]]:
        return Recent, (self._limit,)

    def get(self, key: Hashable, size: int, decode_item: Callable[[], Any]) -> Any:
        """Returns an item; if it is not kept, makes room for its `size` in bytes and then decodes it."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key][0]
            while self._items and self._total + size > self._limit:
                self._total -= self._items.popitem(last=False)[1][1]
            item = decode_item()
            self._items[key], self._total = (item, size), self._total + size
            return item


def image_layout(path: Path) -> ImageLayout:
    """Reads the header of an image file.

    Raises:
        BadImage: It is damaged, not an image, or too large for reading windows; without the name.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
        file.seek(0)
        if is_dicom(head):
            frames, height, width = dicom_size(file)
            return ImageLayout(frames, height, width, (height, width))
        if is_tiff(head):
            tiff = tiff_layout(file)
            return ImageLayout(1, tiff.height, tiff.width, tiff.segment)
        if is_npy(head):
            (_, height, width, _), _, by_rows = npy_layout(file)
            return ImageLayout(1, height, width, (1, 1) if by_rows else (height, width))
        height, width = image_size(file)
        return ImageLayout(1, height, width, (height, width))


def decode_window(file: BinaryIO, window: Window, name: str, recent: Recent) -> DecodedImage:
    """Decodes a window of an image file.

    Args:
        file: The file, on a disk.
        window: A window inside the image.
        name: Name of the image and the window, for errors.
        recent: Keeps what was decoded.

    Raises:
        BadImage: The file is damaged, or does not have this window.
    """
    with naming_errors(name), quiet():
        return fill_missing(_decode_window(file, window, recent))


def _decode_window(file: BinaryIO, window: Window, recent: Recent) -> DecodedImage:
    status = os.fstat(file.fileno())
    key = status.st_dev, status.st_ino, status.st_mtime_ns
    file.seek(0)
    head = file.read(HEAD)
    file.seek(0)
    if window.box is not None and not is_dicom(head):
        if is_tiff(head):
            image = decode_tiff_window(
                file, window.box, lambda place, size, item: recent.get((key, place), size, item)
            )
            if image is not None:
                return image
        if is_npy(head):
            shape, dtype, by_rows = npy_layout(file)
            if by_rows:
                check_inside(window.box, *shape[1:3])
                pixels = read_rows(file, dtype, shape, file.tell(), window.box)
                return DecodedImage(to_supported_dtype(planes_to_hwc(pixels)))

    def whole() -> DecodedImage:
        file.seek(0)
        return fill_missing(
            decode_dicom(file, window.frame) if is_dicom(head) else decode_content(file.read())
        )

    return _cut(recent.get((key, window.frame), _CACHE, whole), window.box)


def _cut(image: DecodedImage, box: Box | None) -> DecodedImage:
    if box is None:
        return image
    check_inside(box, *image.pixels.shape[:2])
    top, left, height, width = box
    missing = image.missing
    return image._replace(
        pixels=image.pixels[top : top + height, left : left + width],
        missing=None if missing is None else missing[top : top + height, left : left + width],
    )
