"""Images for detectors and segmentors: found as in pre-training, and refused where their values mislead."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coma.errors import BadImage, BadInput
from downstream.datasets.image_headers import read_header
from downstream.frames import list_images
from downstream.openmmlab.transforms import ReadImage

pytestmark = pytest.mark.openmmlab


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (9, 90, 200)).save(path)
    return path


def test_a_folder_is_searched_as_in_pretraining_and_the_rest_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    wanted = [save(tmp_path / "a.png"), save(tmp_path / "b" / "c.jpg")]
    for name in ("@eaDir/a.png", ".b/d.png", "predictions/pictures/a.png", "predictions/labels/a.png"):
        save(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "film.mp4").touch()
    save(tmp_path / "earlier" / "videos" / "1.mp4.png").rename(tmp_path / "earlier" / "videos" / "1.mp4")
    for name in ("detections.json", "images.json"):
        (tmp_path / "earlier" / name).write_text("[]")
    (tmp_path / "notes.txt").touch()
    assert list_images(tmp_path) == [*wanted, tmp_path / "film.mp4"]
    assert caplog.messages == [
        f"{tmp_path}: 2 images (1 .jpg, 1 .png); skipped: 1 .txt (not read), 1 hidden file or folder (.b), "
        "1 system folder (@eaDir), 1 special file (pipe.png), "
        "2 folders written by coma (earlier/ is predictions of coma detect, predictions/ is predictions of "
        "coma segment); 1 video"
    ]
    with pytest.raises(BadInput, match="predictions: is predictions of coma segment, and its pictures are"):
        list_images(tmp_path / "predictions")


def test_all_splits_of_a_folder_are_predicted(tmp_path):
    wanted = [save(tmp_path / split / "a.png") for split in ("test", "train", "val")]
    assert list_images(tmp_path) == wanted


@pytest.mark.timeout(60)
def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png") == "not a regular file"
    with pytest.raises(BadInput, match=r"a\.png: is neither a folder nor a regular file"):
        list_images(tmp_path / "a.png")


def test_colours_as_floats_of_0_to_255_are_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(BadImage, match=r"a\.npy: float values up to 25\d; colour images are read as"):
        ReadImage(3).transform({"img_path": str(tmp_path / "a.npy")})
    np.save(tmp_path / "a.npy", pixels / 255)
    assert (ReadImage(3).transform({"img_path": str(tmp_path / "a.npy")})["img"] == pixels[..., ::-1]).all()


def test_paths_and_arrays_are_taken_without_a_dictionary(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = ReadImage().transform(str(tmp_path / "a.png"))
    given = ReadImage().transform(np.ascontiguousarray(pixels[..., ::-1]))
    assert (read["img"] == given["img"]).all() and (read["img"] == pixels[..., ::-1]).all()
    assert read["ori_shape"] == given["ori_shape"] == (4, 6)
    assert read["img_path"] == str(tmp_path / "a.png") and given["img_path"] is None
    with pytest.raises(BadImage, match=r"shape \(4, 6, 3\) has 3 channels, not 5"):
        ReadImage(5).transform({"img": pixels})
