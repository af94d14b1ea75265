"""Videos that are drawn, and files that a page has to refuse."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from coma.errors import BadInput
from demo import videos


def video(path: Path, frames: int = 40, width: int = 320, height: int = 240, rate: float = 10) -> Path:
    """Writes a video of a ball that crosses from left to right, with the codec that the suffix needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = {".mp4": "mp4v", ".avi": "MJPG", ".webm": "VP80"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, (width, height))
    if not writer.isOpened():
        raise BadInput(f"{path}: OpenCV cannot write this; install another build of it")
    for number in range(frames):
        frame = np.full((height, width, 3), 40, np.uint8)
        place = (width * number // frames, height // 2)
        writer.write(cv2.circle(frame, place, height // 5, (20, 40, 250), -1))
    writer.release()
    return path


def bad_videos(folder: Path) -> dict[str, Path]:
    """Files that are refused, by the words that say why."""
    avi, mp4 = (video(folder / name, frames=8).read_bytes() for name in ("good.avi", "good.mp4"))
    # FFmpeg's list of other files, which would show those beside it
    playlist = b"ffconcat version 1.0\nfile 'good.avi'\n"
    at = avi.index(b"strf") + 12  # width, height, planes, bits, codec; MJPG would have another size inside
    large = avi[:at] + struct.pack("<iihhi", 9000, 9000, 1, 24, 0) + avi[at + 16 :]
    header = struct.pack(">I4sI", 24, b"ftyp", 0)
    files = {
        ("not a video", "text.mp4"): b"no video at all\n" * 99,
        ("not a video", "empty.mp4"): b"",
        ("not a video", "list.mp4"): playlist,
        ("not a video", "picture.png"): avi,
        ("damaged", "cut.mp4"): mp4[: len(mp4) // 2],
        ("damaged", "cut.avi"): avi[:400],
        ("damaged", "hidden list.mp4"): header + playlist,
        ("too large", "large.avi"): large.replace(b"vidsMJPG", b"vidsDIB "),
    }
    for (_, name), content in files.items():
        (folder / name).write_bytes(content)
    return {f"{words}: {name}": folder / name for words, name in files}


def hang(patch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """Puts a process that sleeps for a minute in place of the decoder; returns those that are started."""
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    patch.setattr(subprocess, "Popen", Noted)
    patch.setattr(videos, "DECODER", [sys.executable, "-c", "import time; time.sleep(60)"])
    return started
