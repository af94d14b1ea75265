"""`coma detect predict`: pictures, videos and tiles; drawn, and written in every format."""

import json
import os
import signal
from typing import cast

import numpy as np
import pytest
from PIL import Image

from coma.errors import BadInput, Interrupted
from downstream.commands.detect import run

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # mm's packages warn of each other


def test_predictions_are_drawn_and_written_as_coco_does(trained, data, tmp_path, capsys):
    from pycocotools.coco import COCO

    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "images" / name).write_bytes((data / "val" / name).read_bytes())
    (tmp_path / "images" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    out, annotations = tmp_path / "out", data / "annotations" / "val.json"
    arguments = [str(trained / "artifact"), str(tmp_path / "images"), "--out", str(out), "--threshold", "0.0"]
    run(["predict", *arguments, "--annotations", str(annotations)])
    assert "3.png" in capsys.readouterr().err
    pictures = sorted((out / "pictures").glob("*.png"))
    assert [picture.name for picture in pictures] == ["1.png", "2.png"]
    plain = np.asarray(Image.open(data / "val" / "1.png").convert("RGB"), np.int16)
    drawn = np.asarray(Image.open(pictures[0]).convert("RGB"), np.int16)
    assert drawn.shape == plain.shape and (drawn != plain).any()
    truth = COCO(str(annotations))
    results = truth.loadRes(str(out / "detections.json"))
    found = results.loadAnns(results.getAnnIds())
    assert {each["image_id"] for each in found} == {1, 2} and {each["category_id"] for each in found} <= {
        1,
        2,
    }
    for each in cast(list[dict], found):
        x, y, width, height = each["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 96.01 and y + height <= 64.01
        assert each["segmentation"]["size"] == [64, 96]


def test_tiles_videos_and_formats(trained, data, tmp_path, capsys, monkeypatch):
    """A picture no larger than a tile is predicted as without, a larger one in tiles, a video by frames."""
    import cv2

    model, image = str(trained / "artifact"), str(data / "val" / "1.png")
    found = {}
    for name, options in {"plain": [], "one": ["--tile-size", "96"], "many": ["--tile-size", "64"]}.items():
        run(["predict", model, image, "--out", str(tmp_path / name), "--threshold", "0", *options])
        found[name] = json.loads((tmp_path / name / "detections.json").read_text())
    assert found["plain"] == found["one"] != found["many"]
    assert all(each["segmentation"]["size"] == [64, 96] for each in found["many"])
    assert [each["score"] for each in found["many"]] == sorted(
        (e["score"] for e in found["many"]), reverse=True
    )

    run(["predict", model, image, "--out", str(tmp_path / "disc"), "--threshold", "0", "--classes", "disc",
         "--format", "coco,yolo,labelme,csv"])  # fmt: skip
    kept = json.loads((tmp_path / "disc" / "detections.json").read_text())
    assert kept == [each for each in found["plain"] if each["category_id"] == 2]
    assert len((tmp_path / "disc" / "yolo" / "labels" / "1.txt").read_text().splitlines()) == len(kept)
    for options, message in (
        (["--classes", "cat"], "give some of square, disc"),
        (["--format", "voc"], "give some of coco, yolo, labelme, csv"),
        (["--overlap", "0.95"], "overlap"),
        (["--runtime", "onnxruntime"], "coma export"),
    ):
        with pytest.raises(BadInput, match=message):
            run(["predict", model, image, "--out", str(tmp_path / "none"), *options])

    folder = tmp_path / "videos"
    folder.mkdir()
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5, (96, 64))
    for number in (1, 2, 3):
        frame = cv2.imread(str(data / "val" / f"{number}.png"))
        assert frame is not None
        writer.write(frame)
    writer.release()
    (folder / "empty.mp4").write_bytes(b"no video")
    run(["predict", model, str(folder), "--out", str(tmp_path / "clip")])
    assert "empty.mp4: not a video that OpenCV can decode" in capsys.readouterr().err
    listed = json.loads((tmp_path / "clip" / "images.json").read_text())["images"]
    assert [each["file_name"] for each in listed] == [f"clip.mp4/{n:06d}" for n in (1, 2, 3)]
    video = cv2.VideoCapture(str(tmp_path / "clip" / "videos" / "clip.mp4"))
    assert (video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)) == (3, 5)
    video.release()

    from downstream.prediction_files import PredictionFiles

    add = PredictionFiles.add

    def stopped(self, name, *others):
        add(self, name, *others)
        if name.endswith("000002"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(PredictionFiles, "add", stopped)
    with pytest.raises(Interrupted, match="stopped after 2 of 4 images"):
        run(["predict", model, str(folder), "--out", str(tmp_path / "half")])
    assert len(json.loads((tmp_path / "half" / "images.json").read_text())["images"]) == 2
    assert (tmp_path / "half" / "videos" / "clip.mp4").stat().st_size > 100
