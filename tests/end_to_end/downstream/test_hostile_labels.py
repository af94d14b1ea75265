"""Labels that no tool should write, and names that are not UTF-8: `check` names the file."""

import base64
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from dataset_files import coco, save, write

from coma.cli import main

FOREIGN = os.fsdecode(b"b\xe9.png")
POLYGON = {"label": "cat", "shape_type": "polygon", "points": [[4, 5], [24, 5], [24, 15]]}


def labelme(folder: Path, *shapes: dict[str, Any], images: tuple[str, ...] = ("a.png", "c.png")) -> Path:
    """A dataset without splits, with these shapes in every image."""
    for name in images:
        save(folder / name)
        content = {"shapes": shapes, "imagePath": "", "imageWidth": 40, "imageHeight": 30}
        write((folder / name).with_suffix(".json"), content)
    return folder


def empty_png(width: int, height: int) -> bytes:
    """A PNG with a header but without pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("command", ["detect", "segment"])
def test_the_mask_of_a_labelme_shape_is_too_large(command, tmp_path, capsys):
    mask = base64.b64encode(empty_png(20000, 20000)).decode()
    labelme(tmp_path, {"label": "cat", "shape_type": "mask", "points": [[0, 0], [9, 9]], "mask": mask})
    assert main([command, "check", "--data", str(tmp_path)]) == 2
    assert "a.json shape 1" in capsys.readouterr().err


def test_names_in_any_bytes_are_split(tmp_path, capsys):
    labelme(tmp_path, POLYGON, images=("a.png", FOREIGN, "c.png"))
    assert main(["detect", "check", "--data", str(tmp_path)]) == 0
    assert "no errors found" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(-5, 30), (200_000, 200_000)])
@pytest.mark.parametrize("command", ["detect", "segment"])
def test_the_size_in_the_json_is_not_that_of_the_image(command, size, tmp_path, capsys):
    content = coco()
    content["images"][0] |= dict(zip(("width", "height"), size, strict=True))
    for split in ("train", "val"):
        write(tmp_path / "annotations" / f"{split}.json", content)
        for image in content["images"]:
            save(tmp_path / split / image["file_name"])
    assert main([command, "check", "--data", str(tmp_path)]) == 2
    said = "another size than the json says (1): 1.jpg (image 1): 40 x 30, json {} x {}"
    assert said.format(*size) in capsys.readouterr().err


@pytest.mark.parametrize("labels", ["polygons", "masks"])
def test_segmentors_cannot_be_trained_on_names_that_are_not_utf8(labels, tmp_path, capsys):
    if labels == "polygons":
        labelme(tmp_path, POLYGON, images=("a.png", FOREIGN, "c.png"))
    else:
        for name in ("a.png", FOREIGN, "c.png"):
            save(tmp_path / "images" / name)
            save(tmp_path / "masks" / name)
    write(
        tmp_path / "classes.json",
        json.dumps({"classes": ["cat", "dog"], "palette": [[90, 120, 30], [0, 0, 0]]}),
    )
    assert main(["segment", "check", "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "file name that is not in UTF-8; rename the picture and its label (1): " in said
    assert "b\\udce9.png" in said
