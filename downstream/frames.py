"""The images and videos that a model predicts on, and annotated videos."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coma.data.sources.image_folder import find_images
from coma.errors import BadImage, BadInput
from coma.messages import counted, printable
from downstream.datasets.files import DatasetFiles

log = logging.getLogger(__name__)

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
"""Suffixes of files that are read as videos."""

_RATES = (0.1, 240.0)
"""Lowest and highest rate of annotated videos, in frames per second."""


def is_video(path: Path) -> bool:
    """Returns whether a file is read as a video, by its suffix."""
    return path.suffix.lower() in VIDEOS


def list_images(images: Path) -> list[Path]:
    """Returns one image or video, or all below a folder, sorted, of all its splits.

    Raises:
        BadInput: no image, or no such path.
    """
    if images.is_file():
        return [images]
    if not images.exists():
        raise BadInput(f"{images}: no such file or folder")
    if not images.is_dir():
        raise BadInput(f"{images}: is neither a folder nor a regular file")
    names, inventory = find_images(images)
    videos = DatasetFiles(images).ending(*VIDEOS)
    if not names and not videos:
        raise BadInput(f"{images}: no image in this folder; it holds {inventory.skipped() or 'nothing'}")
    for kind in VIDEOS:
        inventory.unread.pop(kind, None)
    more = f"; {counted(len(videos), 'video')}" if videos else ""
    log.info("%s%s", inventory.summary(images), more, extra={"once": True})
    return sorted(images / name for name in [*names, *videos])


def count_frames(path: Path) -> int:
    """Returns the number of frames that a video says it has; 1 for an image.

    Raises:
        BadInput: the path of a video is not in UTF-8.
    """
    if not is_video(path):
        return 1
    import cv2

    video = cv2.VideoCapture(_opencv_path(path))
    found = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 1
    video.release()
    return max(found, 1)


def _opencv_path(path: Path) -> str:
    """Returns a path for OpenCV, which would crash on one that is not in UTF-8.

    Raises:
        BadInput: such a path.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BadInput(f"{printable(str(path))}: its path is not in UTF-8; rename the video") from None
    return str(path)


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Yields the frames of a video, uint8 `[H, W, 3]` in BGR.

    Raises:
        BadImage: it cannot be decoded.
        BadInput: its path is not in UTF-8.
    """
    import cv2

    video = cv2.VideoCapture(_opencv_path(path))
    try:
        there, frame = video.read()
        if not there:
            raise BadImage(f"{path}: not a video that OpenCV can decode; convert it to MP4 (H.264)")
        while there:
            yield frame
            there, frame = video.read()
    finally:
        video.release()


def writable_rate(rate: float) -> float:
    """Returns the nearest frame rate that MP4 files take, or 25 if there is none.

    MPEG-4 stores a fraction with a numerator of 16 bits, so high rates have fewer decimals; WebM files may
    say that they have thousands of frames per second.
    """
    if not 0 < rate < float("inf"):
        return 25.0
    rate = min(max(rate, _RATES[0]), _RATES[1])
    return round(rate, 3 if rate < 65 else 2)


class VideoWriter:
    """Writes annotated frames to an MP4 file with the speed of the original.

    Args:
        path: The file.
        source: The original video.
    """

    def __init__(self, path: Path, source: Path) -> None:
        import cv2

        video = cv2.VideoCapture(_opencv_path(source))
        self._rate = writable_rate(video.get(cv2.CAP_PROP_FPS))
        video.release()
        self.source, self._path, self._writer = source, path, None
        self._size: tuple[int, int] | None = None

    def add(self, picture: np.ndarray) -> None:
        """Adds a frame, uint8 `[H, W, 3]` in RGB.

        Raises:
            BadInput: OpenCV cannot write videos here, the path is not in UTF-8, or the frame has another size
                than the first one, which OpenCV would leave out in silence.
        """
        import cv2

        height, width = picture.shape[:2]
        if self._size not in (None, (width, height)):
            first = "{} x {}".format(*self._size)
            raise BadInput(
                f"{self.source}: a frame has {width} x {height} px, the first one {first}; convert it"
            )
        self._size = width, height
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fourcc: Any = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(_opencv_path(self._path), fourcc, self._rate, self._size)
            if not self._writer.isOpened():
                raise BadInput(
                    f"{self._path}: OpenCV cannot write MP4 files here; install another build of it"
                )
        self._writer.write(np.ascontiguousarray(picture[..., ::-1]))

    def close(self) -> None:
        """Finishes the file."""
        if self._writer is not None:
            self._writer.release()
