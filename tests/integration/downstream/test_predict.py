"""Predictions are written under a name of their own for every image and video."""

import os
from pathlib import Path

import numpy as np
import pytest
from export_files import about
from PIL import Image

from coma.errors import BadInput

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # mm's packages warn of each other


def predict_one_object(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the predictions of a detector that finds one object in every image below `folder`."""
    import torch
    from mmengine.structures import BaseDataElement, InstanceData

    from downstream import predict
    from downstream.frames import list_images
    from downstream.prediction_files import FORMATS

    def found(_: np.ndarray) -> BaseDataElement:
        box, first = torch.tensor([[4.0, 5.0, 24.0, 15.0]]), torch.tensor([0])
        return BaseDataElement(
            pred_instances=InstanceData(bboxes=box, labels=first, scores=torch.tensor([0.9]))
        )

    monkeypatch.setattr(predict, "_predictor", lambda *_: found)
    config, choice, paths = about("detector", class_names=("cat",)), predict.Choice(), list_images(folder)
    numbers = predict.assign_image_ids(paths, None)
    every = predict.predict(
        torch.nn.Identity(), config, paths, torch.device("cpu"), numbers, choice, None, folder
    )
    out.mkdir()
    predict.write_predictions(out, every, config, choice, FORMATS, lambda _: None, lambda: False)


def video(path: Path, frames: int) -> None:
    import cv2

    codec = "mp4v" if path.suffix == ".mp4" else "MJPG"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 5, (40, 30))
    for _ in range(frames):
        writer.write(np.zeros((30, 40, 3), np.uint8))
    writer.release()


def test_files_that_share_a_stem_keep_their_suffix(tmp_path, monkeypatch):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "b.png"):
        Image.new("RGB", (40, 30)).save(folder / name)
    for name, frames in (("clip.avi", 2), ("clip.mp4", 3), ("b.mp4", 1)):
        video(folder / name, frames)
    predict_one_object(folder, out, monkeypatch)

    def below(name: str) -> set[str]:
        return {
            path.relative_to(out / name).as_posix() for path in (out / name).rglob("*.*") if path.is_file()
        }

    numbered = (
        "b.mp4/000001",
        *(f"clip.avi/{n:06d}" for n in (1, 2)),
        *(f"clip.mp4/{n:06d}" for n in (1, 2, 3)),
    )
    stems = {"a.jpg", "a.png", "b", *numbered}
    assert below("pictures") == {"a.jpg.png", "a.png.png", "b.png"}
    assert below("videos") == {"clip.avi.mp4", "clip.mp4.mp4", "b.mp4"}
    assert below("yolo/labels") == {f"{stem}.txt" for stem in stems}
    assert below("labelme") == {f"{stem}.json" for stem in stems}
    rows = (out / "predictions.csv").read_text().splitlines()[1:]
    assert {row.partition(",")[0] for row in rows} == stems


def test_names_that_are_not_utf8_are_written_with_escapes(tmp_path, monkeypatch):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    foreign = os.fsdecode(b"b\xe9")
    Image.new("RGB", (40, 30)).save(folder / f"{foreign}.png")
    predict_one_object(folder, out, monkeypatch)
    _, row = (out / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert row.startswith("b\\xe9,")
    for name in ("pictures/{}.png", "yolo/labels/{}.txt", "labelme/{}.json"):
        assert (out / name.format(foreign)).is_file()


def test_videos_whose_names_are_not_utf8_are_refused(tmp_path):
    from downstream.frames import VideoWriter, count_frames, read_frames

    path = tmp_path / os.fsdecode(b"b\xe9.mp4")
    path.write_bytes(b"")
    picture = np.zeros((30, 40, 3), np.uint8)
    for action in (
        lambda: count_frames(path),
        lambda: list(read_frames(path)),
        lambda: VideoWriter(tmp_path / "a.mp4", path),
        lambda: VideoWriter(path, tmp_path / "none.mp4").add(picture),
    ):
        with pytest.raises(BadInput, match=r"b\\udce9\.mp4: its path is not in UTF-8"):
            action()
