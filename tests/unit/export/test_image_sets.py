"""Images that verify, calibrate or time a model: what is used, what is left out, when too few remain."""

import json
from pathlib import Path

import export_files
import numpy as np
import pytest
from export_files import VIT
from PIL import Image
from skimage import data

from coma.cli import main
from coma.data.sources.base import ArraySource
from coma.errors import BadInput
from export.image_sets import CALIBRATION, TIMING, VERIFICATION, read_image_set
from export.preprocessing import Photographs, open_images

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself


def folder_of(folder: Path, good: int = 0, broken: int = 0, copies: int = 0, plain: int = 0) -> Path:
    """Different crops, files that are no images, copies of the first crop, and images of one colour."""
    folder.mkdir(exist_ok=True)
    crops = [Image.fromarray(data.chelsea()).crop((9 * i, 0, 9 * i + 64, 64)) for i in range(good)]
    for number, crop in enumerate(crops):
        crop.save(folder / f"good{number}.png")
    for number in range(broken):
        (folder / f"broken{number}.png").write_bytes(b"no picture")
    for number in range(copies):
        crops[0].save(folder / f"zcopy{number}.png")
    for number in range(plain):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(folder / f"plain{number}.png")
    return folder


def test_what_adds_nothing_is_left_out_by_name_and_others_take_its_place(tmp_path, caplog):
    source = open_images(folder_of(tmp_path / "a", good=6, broken=2, copies=2, plain=1))
    found = read_image_set(source, 3, 5)
    assert len(found.pictures) == found.selection.used == 5 and found.selection.available == 11
    everything = read_image_set(source, 3, 11)
    reasons = everything.selection.left_out
    assert reasons.keys() == {"broken0.png", "broken1.png", "zcopy0.png", "zcopy1.png", "plain0.png"} or (
        reasons.keys() == {"broken0.png", "broken1.png", "zcopy0.png", "good0.png", "plain0.png"}
    )
    assert reasons["plain0.png"] == "a single colour" and "not an image" in reasons["broken0.png"]
    assert "the same pixels as" in reasons["zcopy0.png"]
    assert "6 images used, 5 left out: " in caplog.text and "broken0.png" in caplog.text


@pytest.mark.parametrize(
    ("content", "most", "message"),
    [
        ({"good": 1, "broken": 3}, 16, r"1 of 4 images can be used, left out are .*broken0.*not an image"),
        ({"good": 1, "copies": 99}, 16, r"1 of 64 images can be used, left out are .*the same pixels as"),
        ({"plain": 9}, 16, r"0 of 9 images can be used, .* and 4 more: a single colour; give 4 diff"),
        ({"good": 3}, 16, r"3 of 3 images can be used; give 4 different images or more with --verify, or a"),
        ({"broken": 1}, 1, r"0 of 1 image can be used, left out are .*; give 1 different image or more"),
    ],
)
def test_too_few_images_verify_nothing(tmp_path, content, most, message):
    with pytest.raises(BadInput, match=message):
        read_image_set(open_images(folder_of(tmp_path / "a", **content)), 3, most)


def test_few_images_are_accepted_when_asked_for_and_said(tmp_path, caplog):
    source = open_images(folder_of(tmp_path / "a", good=9))
    assert len(read_image_set(source, 3, 1).pictures) == 1
    assert "1 image only; at least 4 different ones are advised" in caplog.text
    with pytest.raises(BadInput, match=r"--calibrate .*: 1 of 4 .* accept 1 with --calibrate-images 1"):
        read_image_set(open_images(folder_of(tmp_path / "b", good=1, broken=3)), 3, 64, CALIBRATION)
    read_image_set(source, 3, 64, CALIBRATION)
    assert "9 images only; at least 32 different ones are advised" in caplog.text


def test_bundled_photographs_are_enough_without_a_word(caplog):
    assert str(read_image_set(Photographs(), 3, 16, VERIFICATION).selection) == "6 images of scikit-image"
    assert not caplog.records


def test_timing_takes_any_images_with_their_files(tmp_path):
    found = read_image_set(open_images(folder_of(tmp_path / "a", broken=1, plain=3)), 3, 2, TIMING)
    assert len(found.pictures) == len(found.files) == 2
    arrays = ArraySource([np.zeros((32, 32, 3), np.uint8)])
    assert read_image_set(arrays, 3, 2, TIMING).files == ()
    with pytest.raises(BadInput, match=r"--images array: 0 of 1 image .*5 channels.* with --images$"):
        read_image_set(ArraySource([np.zeros((32, 32, 5), np.uint8)]), 3, 2, TIMING)


def test_manifest_report_and_terminal_count_the_images(tmp_path, capsys, caplog):
    artifact = export_files.classifier(tmp_path / "artifact", VIT)
    verify = folder_of(tmp_path / "verify", good=4, broken=1)
    calibrate = folder_of(tmp_path / "calibrate", good=9, broken=2)
    more = (
        "--precision",
        "int8",
        "--calibrate",
        str(calibrate),
        "--shapes",
        "8x48x48",
        "--benchmark-seconds",
        "0",
    )
    assert main(["export", str(artifact), "--verify", str(verify), *more]) == 0
    assert "over 4 images and 1 shape\n" in capsys.readouterr().err
    assert "4 images used, 1 left out: broken0.png: not an image" in caplog.text
    assert "4 images also in --verify" in caplog.text
    (entry,) = json.loads((tmp_path / "export" / "manifest.json").read_text())["files"]
    assert entry["images"] == f"4 images of {verify}, 1 left out"
    counts = {name: (each["used"], each["available"]) for name, each in entry["image_sets"].items()}
    assert counts == {"verification": (4, 5), "calibration": (9, 11)}
    assert entry["image_sets"]["calibration"]["left_out"].keys() == {"broken0.png", "broken1.png"}
    report = (tmp_path / "export" / "report.md").read_text()
    assert "calibration over 9 images of" in report and "broken1.png: not an image" in report


def test_a_benchmark_says_what_it_could_not_show(tmp_path, capsys, caplog):
    artifact = export_files.backbone(tmp_path / "artifact", VIT)
    images = folder_of(tmp_path / "images", good=1, broken=1)
    more = ("--batch", "2", "--benchmark-seconds", "0.01", "--out", str(tmp_path / "b.json"))
    assert main(["benchmark", str(artifact), "--images", str(images), *more]) == 0
    assert f"1 image of {images}, 1 left out, repeated in larger batches" in capsys.readouterr().out
    assert "1 image used, 1 left out: broken0.png: not an image" in caplog.text
    assert json.loads((tmp_path / "b.json").read_text())["left_out"].keys() == {"broken0.png"}
