"""Uploaded videos: good ones are read evenly, hostile ones refused, and the process of the decoder ends."""

import asyncio
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from video_files import bad_videos, hang, video

from coma.errors import BadImage
from demo import videos
from demo.storage import GONE, Storage
from demo.videos import Clip, read_clip


def read(path: Path) -> Clip:
    return asyncio.run(read_clip(Storage(path.parent), str(path)))


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm"])
def test_frames_are_even_and_those_of_the_first_seconds(tmp_path, suffix):
    short = read(video(tmp_path / f"short{suffix}", frames=30))
    assert short.frames.shape == (30, 240, 320, 3) and short.total == 30 and short.whole
    assert short.seconds == pytest.approx(3, abs=0.2) and short.scale == (1, 1)
    long = read(video(tmp_path / f"long{suffix}", frames=150, width=640, height=480))
    assert long.frames.shape == (30, 384, 512, 3) and long.total == 120 and not long.whole
    assert long.seconds == pytest.approx(12, abs=0.2) and long.scale == (1.25, 1.25)
    assert long.frames[0].mean(axis=(0, 1))[0] > long.frames[0].mean(axis=(0, 1))[2]  # the ball is red: RGB
    balls = np.array([np.flatnonzero(frame[192, :, 0] > 150).mean() for frame in long.frames[8:]])
    assert np.diff(balls) == pytest.approx(13.65, abs=2)  # every fourth frame


def test_bad_videos_are_refused_by_what_they_are(tmp_path):
    for name, path in bad_videos(tmp_path).items():
        with pytest.raises(BadImage) as told:
            read(path)
        assert name.split(":")[0] in str(told.value) and str(tmp_path) not in str(told.value), name
    for path in (tmp_path / "missing.mp4", Path("/etc/passwd")):
        with pytest.raises(BadImage, match=GONE):
            asyncio.run(read_clip(Storage(tmp_path), str(path)))
    with pytest.raises(BadImage, match="Choose a video first"):
        asyncio.run(read_clip(Storage(tmp_path), None))


def test_the_whitelist_is_what_keeps_other_files_out(tmp_path, monkeypatch):
    """The head of a file is checked, too; without both, the neighbour's video would be shown."""
    listed = bad_videos(tmp_path)["not a video: list.mp4"]
    listed.write_bytes(listed.read_bytes().replace(b"good.avi", f"file:{tmp_path}/good.avi".encode()))
    monkeypatch.setattr(videos, "_HEAD", videos.re.compile(b""))
    with pytest.raises(BadImage, match="damaged"):
        read(listed)
    monkeypatch.setitem(videos._OPTIONS, "safe", "0")
    monkeypatch.setitem(videos._OPTIONS, "format_whitelist", f"{videos.CONTAINERS},concat")
    assert read(listed).total == 8


def test_a_decoder_that_hangs_is_ended(tmp_path, monkeypatch):
    path, started = video(tmp_path / "a.mp4", frames=2), hang(monkeypatch)
    monkeypatch.setattr(videos, "WAIT_SECONDS", 0.5)
    with pytest.raises(BadImage, match=r"did not decode within 0\.5 seconds"):
        read(path)
    assert started[0].returncode == -signal.SIGKILL
    monkeypatch.setattr(videos, "WAIT_SECONDS", 60)

    async def give_up() -> None:
        work = asyncio.ensure_future(read_clip(Storage(tmp_path), str(path)))
        while len(started) < 2:
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(give_up())
    assert started[1].returncode == -signal.SIGKILL


def test_memory_and_time_of_the_decoder_are_limited(tmp_path, monkeypatch):
    path = video(tmp_path / "a.avi", frames=40)
    monkeypatch.setattr(videos, "MEMORY", 2**26)
    with pytest.raises(BadImage, match="damaged"):
        read(path)
    monkeypatch.undo()
    monkeypatch.setattr(videos, "DECODE_SECONDS", 0)
    with pytest.raises(BadImage, match="damaged"):  # not one frame
        read(path)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"shape": [0, 8, 8], "count": 0, "seconds": 1, "whole": True},
        {"shape": [2, 8, 8], "count": 2, "seconds": 1, "whole": True},
        {"shape": [1, 1, 64], "count": 1, "seconds": float("nan"), "whole": True},
        {"shape": [1, 1, 64], "count": 0, "seconds": 1, "whole": True},
        {"shape": 3, "count": 1, "seconds": 1, "whole": True},
        *({"size": size} for size in (3, [8], [8, 0], [7, 8], [8, float("nan")], [8, 10**9])),
    ],
)
def test_an_answer_that_cannot_be_is_refused(answer):
    good = {"shape": [1, 8, 8], "size": [12, 16], "count": 1, "seconds": 1, "whole": True}
    answer = good | answer if answer else answer
    with pytest.raises(BadImage, match="damaged"):
        videos._clip(json.dumps(answer).encode() + b"\n" + bytes(192))
    clip = videos._clip(json.dumps(good).encode() + b"\n" + bytes(192))
    assert clip.frames.shape == (1, 8, 8, 3) and clip.scale == (1.5, 2)
