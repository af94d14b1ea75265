"""Decodes the first seconds of an uploaded video; `demo.videos` runs this file as a process that it can end.

    python -P frame_decoder.py FILE FRAMES VIDEO_SECONDS SECONDS SIDE PIXELS MEMORY

FILE is the number of an open file, PIXELS the most that a frame may have, SIDE the longer side that frames
are reduced to, MEMORY in bytes. Standard output gets one line of JSON, which is `{"error": "damaged"}`,
`{"error": "large"}`, or `{"shape": [n, h, w], "size": [width, height], "count", "seconds", "whole"}` before
the frames, uint8 `[n, h, w, 3]` in RGB; `size` is that of the video's frames, upright.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from contextlib import suppress
from typing import Any

FASTEST = 120
"""Most frames per second that are read, whatever the file says of its time."""


def limit_process(memory: int, seconds: int) -> None:
    """Limits what this process may use, and forbids it to write files."""
    wanted = {"RLIMIT_AS": memory, "RLIMIT_CPU": seconds, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, value in wanted.items():
        with suppress(ValueError, OSError):  # the system has no such limit, or a lower one
            resource.setrlimit(getattr(resource, name), (value, value))


def decode(file: int, most: int, video_seconds: float, seconds: float, side: int, pixels: int) -> None:
    """Writes the answer to standard output; see the module.

    A file's own count of its frames is not believed: every `step`-th frame is kept, and `step` is doubled
    when there are more than `most`, so that they are even whatever the length. After `seconds` of decoding
    the frames so far are the answer.
    """
    import cv2

    until = time.monotonic() + seconds
    video = cv2.VideoCapture(f"/dev/fd/{file}", cv2.CAP_FFMPEG)
    if not video.isOpened():
        return _answer({"error": "damaged"})
    width, height = (video.get(each) for each in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if not width * height <= pixels:
        return _answer({"error": "large"})
    kept: list[Any] = []
    own, size, step, count, first, last, whole = (0, 0), (0, 0), 1, 0, 0.0, 0.0, True
    while video.grab():
        at = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
        first = at if count == 0 else first
        if not at - first < video_seconds or count >= video_seconds * FASTEST or time.monotonic() > until:
            whole = False
            break
        if count % step == 0:
            there, frame = video.retrieve()
            if not there:
                break
            if not kept:
                own = frame.shape[1::-1]
                size = tuple(max(round(each * min(side / max(own), 1)), 1) for each in own)
            smaller = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            kept.append(cv2.cvtColor(smaller, cv2.COLOR_BGR2RGB))
            if len(kept) > most:
                kept, step = kept[::2], 2 * step
        count, last = count + 1, at
    if not kept:
        return _answer({"error": "damaged"})
    lasts = (last - first) * count / (count - 1) if count > 1 else 0.0
    shape = [len(kept), *size[::-1]]
    _answer({"shape": shape, "size": own, "count": count, "seconds": lasts, "whole": whole}, *kept)


def _answer(about: dict[str, Any], *frames: Any) -> None:
    out = sys.stdout.buffer
    out.write(json.dumps(about).encode() + b"\n")
    for frame in frames:
        out.write(frame.tobytes())
    out.flush()


if __name__ == "__main__":
    own, frames, played, longest, side, pixels, memory = map(int, sys.argv[1:])
    limit_process(memory, longest + 5)
    decode(own, frames, played, longest, side, pixels)
