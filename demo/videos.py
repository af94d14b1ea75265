"""Reads uploaded videos in a process of its own, which has limits and is ended when they or the event pass.

No decoder of videos is trusted with the page's process. The other one reads a single open file through
FFmpeg, with only the containers of `CONTAINERS` and no other file or address, and answers with raw pixels.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coma.errors import BadImage
from demo.storage import Storage
from demo.upload import MAX_PIXELS
from downstream.frames import VIDEOS, is_video

MOST_FRAMES, VIDEO_SECONDS = 48, 12
"""Most frames of a video that are used, and the seconds from its beginning that they are taken from."""
FRAME_SIDE = 512
"""Longer side that frames are reduced to."""
DECODE_SECONDS, WAIT_SECONDS = 15, 20
"""Seconds of decoding after which the frames so far are used, and after which the process is ended."""
MEMORY = 3 * 2**30
"""Address space of the process in bytes."""
CONTAINERS = "mov,avi,matroska,mpeg,mpegvideo,asf"
"""Names of FFmpeg's readers for the files of `VIDEOS`: none of them opens another file."""
FORMATS = ", ".join(each[1:].upper() for each in VIDEOS)
AVAILABLE = importlib.util.find_spec("cv2") is not None
"""Whether videos are read, which needs OpenCV."""
DECODER = [sys.executable, "-P", str(Path(__file__).with_name("frame_decoder.py"))]
EMPTY = "Choose a video first: upload one, or record one."
_HEAD = re.compile(
    rb".{4}(ftyp|moov|mdat|wide|free|skip)|RIFF.{4}AVI "  # MP4 and MOV; AVI
    rb"|\x1a\x45\xdf\xa3|\x00\x00\x01[\xb3\xba]|\x30\x26\xb2\x75",  # Matroska and WebM; MPEG; WMV
    re.DOTALL,
)
_OPTIONS = {"threads": "1", "protocol_whitelist": "file", "format_whitelist": CONTAINERS}
_NOT_A_VIDEO = f"This file is not a video; please upload one of: {FORMATS}."
_DAMAGED = "This video is damaged or cut short: it does not decode."
_TOO_LARGE = f"This video is too large: at most {MAX_PIXELS // 10**6} megapixels a frame, please."


class Clip(NamedTuple):
    """Frames of the beginning of a video.

    Attributes:
        frames: uint8 `[n, h, w, 3]` in RGB, evenly spaced, at most `MOST_FRAMES`.
        total: Number of frames of that part of the video.
        seconds: Its length.
        whole: Whether that part is the whole video.
        scale: Width and height of the video, divided by those of `frames`.
    """

    frames: np.ndarray
    total: int
    seconds: float
    whole: bool
    scale: tuple[float, float]


async def read_clip(storage: Storage, path: str | None) -> Clip:
    """Decodes the beginning of an uploaded video; a cancelled caller ends the process that does it.

    Raises:
        BadImage: anything wrong with the file, in words for the visitor.
    """
    if not path:
        raise BadImage(EMPTY)
    with storage.open(path) as file:
        if not is_video(Path(path)) or not _HEAD.match(file.read(12)):
            raise BadImage(_NOT_A_VIDEO)
        file.seek(0)  # the other process may share the position
        limits = (MOST_FRAMES, VIDEO_SECONDS, DECODE_SECONDS, FRAME_SIDE, MAX_PIXELS, MEMORY)
        options = "|".join(f"{name};{value}" for name, value in _OPTIONS.items())
        process = subprocess.Popen(
            [*DECODER, str(file.fileno()), *map(str, limits)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[file.fileno()],
            env=os.environ | {"OPENCV_FFMPEG_CAPTURE_OPTIONS": options, "OMP_NUM_THREADS": "1"},
        )
    with process:
        try:
            assert process.stdout
            most = 3 * FRAME_SIDE**2 * MOST_FRAMES + 1000
            answer = await asyncio.wait_for(asyncio.to_thread(process.stdout.read, most), WAIT_SECONDS)
        except TimeoutError:
            text = f"This video did not decode within {WAIT_SECONDS} seconds; please upload a smaller one."
            raise BadImage(text) from None
        finally:
            process.kill()
    return _clip(answer)


def _clip(answer: bytes) -> Clip:
    """Returns the frames of an answer, none of which is believed."""
    line, _, pixels = answer.partition(b"\n")
    try:
        about = json.loads(line[:500])
        if about.get("error") == "large":
            raise BadImage(_TOO_LARGE)
        frames = np.frombuffer(pixels, np.uint8).reshape(*about["shape"], 3)
        count, seconds = int(about["count"]), float(about["seconds"])
        width, height = map(int, about["size"])
        n, h, w = frames.shape[:3]
        fits = 0 < n <= MOST_FRAMES and max(h, w) <= FRAME_SIDE
        fits = fits and h <= height and w <= width and width * height <= MAX_PIXELS
        if not fits or not n <= count < 10**6 or not 0 <= seconds <= VIDEO_SECONDS + 1:
            raise ValueError(line)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise BadImage(_DAMAGED) from None
    return Clip(frames, count, seconds, bool(about["whole"]), (width / w, height / h))
