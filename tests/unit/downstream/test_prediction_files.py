"""What models find is written so that the readers of every label format read the same back."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from downstream.datasets import open_coco, open_labels
from downstream.datasets.drawn import mask_box
from downstream.datasets.masks import decode_runs, encode_runs, mask_area
from downstream.prediction_files import FORMATS, PredictionFiles, output_stems

SIZE = (80, 60)
NAMES = ("cat", "dog")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (90, 120, 30)).save(path)
    return path


def blob(left: int, top: int) -> np.ndarray:
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    return (x - left) ** 2 + (y - top) ** 2 < 90


def written(tmp_path: Path, masks: bool) -> Path:
    files = PredictionFiles(tmp_path / "out", FORMATS, NAMES, (3, 7), areas=False)
    for number in (1, 2, 3, 4, 5):
        path = picture(tmp_path / "images" / "sub" / f"{number}.png")
        results = []
        for i, (left, score) in enumerate(((20, 0.9), (50, 0.4), (40, 0.1))):
            mask = blob(left + number, 30)
            x1, y1, x2, y2 = mask_box(mask)
            found = {
                "image_id": number,
                "category_id": (3, 7)[i % 2],
                "score": score,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            results.append(found | ({"segmentation": encode_runs(mask)} if masks else {}))
        files.add(f"sub/{number}.png", f"sub/{number}", path, number, SIZE, results, 0.3)
    files.close()
    return tmp_path / "out"


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_detections_are_read_back(tmp_path, name, masks):
    out = written(tmp_path, masks)
    data = tmp_path / "data"
    shutil.copytree(tmp_path / "images", data / "images")
    if name == "coco":
        (data / "annotations").mkdir()
        shutil.copy(out / "images.json", data / "annotations" / "instances_default.json")
        assert len(json.loads((out / "detections.json").read_text())) == 15  # all, whatever their score
    elif name == "csv":
        shutil.copy(out / "predictions.csv", data)
    else:
        shutil.copytree(out / name, data, dirs_exist_ok=True)
    splits = [json.loads(open_coco(data, s).annotations.read_text()) for s in ("train", "val")]
    images = {i["id"]: Path(i["file_name"]).stem for s in splits[:1] for i in s["images"]}
    assert sorted(len(s["images"]) for s in splits) == [1, 4]
    names = {each["id"]: each["name"] for each in splits[0]["categories"]}
    for each in splits[0]["annotations"]:
        number = int(images[each["image_id"]])
        which = names[each["category_id"]]
        mask = blob({"cat": 20, "dog": 50}[which] + number, 30)
        x1, y1, x2, y2 = mask_box(mask)
        slack = 1.01 if masks and name in ("yolo", "labelme") else 0.01  # outlines run through pixels
        assert each["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=slack)
        assert each["score"] == pytest.approx({"cat": 0.9, "dog": 0.4}[which])
        if masks and name == "coco":
            assert (decode_runs(each["segmentation"]) == mask).all()
    assert len(splits[0]["annotations"]) == 8


@pytest.mark.parametrize("name", ["coco", "labelme", "yolo"])
def test_segmentations_are_read_back_pixel_by_pixel(tmp_path, name):
    rng = np.random.default_rng(0)
    names = ("ground", "cat", "dog")
    files = PredictionFiles(tmp_path / "out", FORMATS, names, (1, 2, 3), areas=True)
    maps = {}
    for number in range(1, 4):
        values = np.zeros(SIZE[::-1], np.int64)
        values[blob(20, 30)], values[blob(50, 20)] = 1, 2
        values[28:33, 17:23] = 0  # a hole, and something in it
        values[30, 20] = 2
        values[rng.integers(0, 60, 9), rng.integers(0, 80, 9)] = 1  # single pixels
        maps[str(number)] = values
        results = []
        for value in range(3):
            mask = values == value
            x1, y1, x2, y2 = mask_box(mask)
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": encode_runs(mask)}
            results.append({"image_id": number, "category_id": value + 1, "score": 1.0, **box})
        path = picture(tmp_path / "data" / "images" / f"{number}.png")
        files.add(f"{number}.png", str(number), path, number, SIZE, results, 0.0)
    files.close()
    data = tmp_path / "data"
    (data / "classes.txt").write_text("\n".join(names))
    if name == "coco":
        (data / "annotations").mkdir()
        shutil.copy(tmp_path / "out" / "images.json", data / "annotations" / "instances_default.json")
    else:
        shutil.copytree(tmp_path / "out" / name, data, dirs_exist_ok=True)
    split = open_labels(data, "train")
    assert split.listing is not None and split.class_names == names
    for stem in split.listing.read_text().split():
        with Image.open(split.labels / f"{stem}.png") as label:
            equal = (np.asarray(label) == maps[Path(stem).name]).mean()
        assert equal == 1 if name == "coco" else equal > 0.99
    rows = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert rows[1] == f"1.png,ground,{(maps['1'] == 0).sum()},{(maps['1'] == 0).mean():.6f}"


@pytest.mark.parametrize("areas", [False, True])
@pytest.mark.parametrize("formats", [("coco", "csv"), ("yolo",)])
def test_what_was_found_is_on_the_disk_before_the_end_and_takes_no_memory(tmp_path, formats, areas):
    out = tmp_path / "out"
    files = PredictionFiles(out, formats, NAMES, (1, 2), areas)
    box = {"image_id": 1, "category_id": 1, "bbox": [4, 5, 20, 10], "segmentation": encode_runs(blob(20, 30))}
    results = [box | {"score": 0.9, "note": "x" * 1000}, box | {"score": 0.1, "note": "x" * 1000}]
    tracemalloc.start()
    for number in range(300):
        files.add("a.jpg", "a", tmp_path / "a.jpg", number, SIZE, results, 0.3)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000
    listed = {each.name.partition(".")[0]: len(each.read_text().splitlines()) for each in out.glob("*.part")}
    coco = formats[0] == "coco"
    wanted = {"images": 300, "annotations": 300} | ({} if areas else {"detections": 600})
    assert listed == (wanted if coco or not areas else {})
    assert not coco or len((out / "predictions.csv").read_text().splitlines()) == 301
    files.close()
    assert not list(out.glob("*.part")) and (out / "images.json").exists() == bool(listed)
    for name in listed:
        content = json.loads(
            (out / ("detections.json" if name == "detections" else "images.json")).read_text()
        )
        assert len(content if name == "detections" else content[name]) == listed[name]


@pytest.mark.parametrize("counts", [[3, 4, 2, 1, 10], "342M8", [0, 20], [20]])
def test_areas_are_counted_without_decoding_the_mask(monkeypatch, counts):
    runs = {"size": [4, 5], "counts": counts}
    wanted = int(decode_runs(runs).sum())
    monkeypatch.setattr(np, "repeat", None)
    assert mask_area(runs) == wanted


def test_no_two_files_share_a_stem():
    assert output_stems(["a.jpg", "sub/a.png", "sub.x/b"]) == {
        "a.jpg": "a",
        "sub/a.png": "sub/a",
        "sub.x/b": "sub.x/b",
    }
    names = ["a.jpg", "a.png", "a.jpg.png", "b.png"]
    assert output_stems(names) == {**{name: name for name in names}, "b.png": "b"}


@pytest.mark.parametrize("name", ["yolo", "labelme", "csv"])
def test_pictures_that_share_a_stem_are_read_back(tmp_path, name):
    data, out = tmp_path / "data", tmp_path / "out"
    files = PredictionFiles(out, FORMATS, NAMES, (1, 2), areas=False)
    stems = output_stems(["a.jpg", "a.png"])
    for number, (image, stem) in enumerate(stems.items(), start=1):
        box = {"image_id": number, "category_id": number, "score": 0.9, "bbox": [4, 5, 20, 10]}
        files.add(image, stem, picture(data / "train" / image), number, SIZE, [box], 0.3)
        picture(data / "val" / image)
    files.close()
    if name == "csv":
        shutil.copy(out / "predictions.csv", data / "train")
    else:
        (data / "classes.txt").write_text("cat\ndog\n")
        shutil.copytree(out / name / ("labels" if name == "yolo" else ""), data / "train", dirs_exist_ok=True)
    found = json.loads(open_coco(data, "train").annotations.read_text())
    names = {each["id"]: each["name"] for each in found["categories"]}
    classes = {each["image_id"]: names[each["category_id"]] for each in found["annotations"]}
    images = {Path(each["file_name"]).name: classes[each["id"]] for each in found["images"]}
    assert images == {"a.jpg": "cat", "a.png": "dog"}
