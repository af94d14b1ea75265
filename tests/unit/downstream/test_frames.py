"""Annotated videos are written whatever frame rate the original says it has."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from coma.errors import BadInput
from downstream.frames import VideoWriter, writable_rate

PICTURE = np.zeros((48, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("said", "rate"),
    [
        *[(23.976, 23.976), (30000 / 1001, 29.97), (66.123, 66.12), (200.123456, 200.12), (240.0, 240.0)],
        *[(1000.0, 240.0), (65536.0, 240.0), (0.0, 25.0), (float("nan"), 25.0), (float("inf"), 25.0)],
        *[(-1.0, 25.0), (0.5, 0.5), (1e-9, 0.1)],
    ],
)
def test_every_frame_rate_can_be_written(tmp_path, said, rate):
    assert writable_rate(said) == rate
    path = tmp_path / "out.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (64, 48))
    assert writer.isOpened()
    for _ in range(3):
        writer.write(PICTURE)
    writer.release()
    video = cv2.VideoCapture(str(path))
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(rate, rel=1e-3)
    video.release()


def test_writers_take_the_rate_of_odd_videos_and_refuse_frames_of_another_size(tmp_path, monkeypatch):
    class Odd:
        def get(self, _: int) -> float:
            return 65536.0

        def release(self) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(cv2, "VideoCapture", lambda _: Odd())
        writer = VideoWriter(tmp_path / "out.mp4", Path("odd.webm"))
    writer.add(PICTURE)
    with pytest.raises(BadInput, match=r"odd\.webm: a frame has 48 x 64 px, the first one 64 x 48"):
        writer.add(PICTURE.transpose(1, 0, 2))
    writer.add(PICTURE)
    writer.close()
    video = cv2.VideoCapture(str(tmp_path / "out.mp4"))
    assert (video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)) == (2, 240)
    video.release()
