"""Deployed detectors and segmentors, measured: against `coma detect|segment test`, and with known answers."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from downstream_data import artifact, coco, labelled
from PIL import Image
from torch import Tensor

from coma.artifact import load_artifact, save_artifact
from coma.errors import BadArtifact, BadInput
from coma.runtimes.pytorch import TorchRuntime
from downstream.commands import detect, segment
from export.graphs.load import load_exportable
from export.verify.task_metrics import open_metric

pytestmark = [pytest.mark.openmmlab, pytest.mark.filterwarnings("ignore")]  # mm's packages warn of each other

SMALL = ["--lr", "3e-3", "--validations", "1", "--head-channels", "32", "--workers", "0"]
ALL = 100
"""More images than there are."""


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    return coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("labelled") / "data")


@pytest.fixture(scope="module")
def detector(objects, once) -> Path:
    """Finds some of the shapes; images come at 5/4 of their size, 80 x 120 px, no multiple of 32."""
    size = ("--steps", "12", "--batch-size", "2", "--short-side", "80")
    return once("evaluated-detector", lambda folder: train(detect, folder, objects, *size)) / "run/artifact"


@pytest.fixture(scope="module")
def segmentor(scenes, once) -> Path:
    size = ("--steps", "40", "--batch-size", "4", "--crop-size", "64")
    return once("evaluated-segmentor", lambda folder: train(segment, folder, scenes, *size)) / "run/artifact"


def train(command: Any, folder: Path, data: Path, *settings: str) -> None:
    backbone = artifact(folder / "backbone")
    command.run(
        ["train", str(backbone), "--data", str(data), "--out", str(folder / "run"), *settings, *SMALL]
    )


@pytest.fixture(scope="module")
def evaluate_runtime() -> Any:
    return importlib.import_module("downstream.evaluate_runtime")  # mmengine warns when it is imported


def doubling(segmentor: Path, to: Path, **preprocessor: Any) -> Path:
    """The same, of images twice as large."""
    found = load_artifact(segmentor)
    head: dict[str, Any] = json.loads(json.dumps(found.config.head))
    head["pipeline"].insert(1, {"type": "Resize", "scale": [192, 128], "keep_ratio": True})
    head["model"]["data_preprocessor"] |= preprocessor
    save_artifact(to, tensors=found.tensors, config=replace(found.config, head=head))
    return to


class Detections:
    """The annotations themselves as a detector's answers, `shift` pixels of the image file to the right."""

    def __init__(self, data: Path, images: tuple[int, ...] = (0, 1, 2), shift: float = 0) -> None:
        content = json.loads((data / "annotations" / "val.json").read_text())
        self.coming = [content["images"][i] for i in images]
        self.annotations, self.shift = content["annotations"], shift

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        assert images.shape == (1, 3, 80, 120) and images.dtype == torch.float32
        number = self.coming.pop(0)["id"]
        found = [each for each in self.annotations if each["image_id"] == number]
        boxes = [each["bbox"] for each in found]
        corners = [(x + self.shift, y, x + self.shift + w, y + h) for x, y, w, h in boxes]
        nowhere, empty = [(0, 0, 60, 60), (9, 9, 70, 70)], ([0.0, 0.9], [1, -1])
        labels = [each["category_id"] - 1 for each in found]
        return {
            "boxes": torch.tensor([*corners, *nowhere])[None] * 1.25,
            "scores": torch.tensor([0.8] * len(found) + empty[0])[None],
            "labels": torch.tensor(labels + empty[1])[None],
            "masks": torch.ones(1, len(found) + 2, 28, 28),
        }


class Classes:
    """The label maps themselves as a segmentor's answers, moved `shift` pixels to the right."""

    def __init__(self, data: Path, shift: int = 0, scale: int = 1) -> None:
        self.coming = sorted((data / "ann_dir" / "val").iterdir())
        self.shift, self.scale, self.seen = shift, scale, []

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.seen.append(images)
        truth = torch.from_numpy(np.array(Image.open(self.coming.pop(0))))[None].long()
        moved = truth.roll(self.shift, dims=2)
        logits = F.one_hot(moved, 3).permute(0, 3, 1, 2).float()
        if self.scale > 1:
            return {"logits": F.interpolate(logits, scale_factor=self.scale), "classes": torch.zeros(0)}
        return {"logits": logits, "classes": moved}


def test_a_detector_in_its_exported_form_scores_what_it_did(detector, objects, tmp_path):
    detect.run(["test", str(detector), "--data", str(objects), "--out", str(tmp_path / "scores")])
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    theirs = {"AP": "bbox_mAP", "AP50": "bbox_mAP_50", "mask AP": "segm_mAP"}
    expected = {name: 100 * scores[f"coco/{metric}"] for name, metric in theirs.items()}
    assert expected["AP50"] > 10
    runtime = TorchRuntime(load_exportable(detector, "detector"))
    assert open_metric("detector", detector, objects, ALL)(runtime) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("resized", [False, True])
def test_a_segmentor_in_its_exported_form_scores_what_it_did(resized, segmentor, scenes, tmp_path):
    path = doubling(segmentor, tmp_path / "a") if resized else segmentor
    segment.run(["test", str(path), "--data", str(scenes), "--out", str(tmp_path / "scores")])
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    expected = {"mIoU": scores["mIoU"], "pixel accuracy": scores["aAcc"]}
    assert resized or expected["mIoU"] > 30  # ground alone: 26
    runtime = TorchRuntime(load_exportable(path, "segmentor"))
    assert open_metric("segmentor", path, scenes, ALL)(runtime) == pytest.approx(expected, abs=0.5)


def test_perfect_detections_score_100_and_moved_ones_less(evaluate_runtime, detector, objects):
    perfect = evaluate_runtime.measure_detector(detector, objects, ALL)(Detections(objects))
    assert perfect == {"AP": 100, "AP50": 100, "mask AP": 100}
    found = Detections(objects, shift=5)  # IoU 0.6 to 0.72
    moved = evaluate_runtime.measure_detector(detector, objects, ALL)(found)
    assert moved["AP50"] == 100 and 20 < moved["AP"] < 60 and 20 < moved["mask AP"] < 60


def test_perfect_classes_score_100_and_moved_ones_less(evaluate_runtime, segmentor, scenes, tmp_path):
    perfect = Classes(scenes)
    assert evaluate_runtime.measure_segmentor(segmentor, scenes, ALL)(perfect) == {
        "mIoU": 100,
        "pixel accuracy": 100,
    }
    pixels = np.asarray(Image.open(scenes / "img_dir" / "val" / "0.png"), np.float32)
    expected = torch.from_numpy((pixels / 255 - 0.4) / 0.2).permute(2, 0, 1)[None]  # rgb
    assert torch.allclose(perfect.seen[0], expected, atol=1e-5)
    padding = doubling(segmentor, tmp_path / "a", test_cfg={"size_divisor": 200})  # mmseg would
    larger = Classes(scenes, scale=2)
    assert evaluate_runtime.measure_segmentor(padding, scenes, ALL)(larger) == {
        "mIoU": 100,
        "pixel accuracy": 100,
    }
    assert larger.seen[0].shape == (1, 3, 128, 192)
    moved = evaluate_runtime.measure_segmentor(segmentor, scenes, ALL)(Classes(scenes, shift=5))
    assert 50 < moved["mIoU"] < 90 and 80 < moved["pixel accuracy"] < 97


def test_no_more_images_than_asked_for_and_no_misses_in_others(
    evaluate_runtime, detector, segmentor, objects, scenes
):
    found = Detections(objects, images=(0, 2))
    assert evaluate_runtime.measure_detector(detector, objects, 2)(found)["AP"] == 100 and not found.coming
    seen = Classes(scenes)
    del seen.coming[1]  # the first and the last of three
    assert (
        evaluate_runtime.measure_segmentor(segmentor, scenes, 2)(seen)["mIoU"] == 100 and len(seen.seen) == 2
    )
    with pytest.raises(BadInput, match="0 images are too few; measure at least 1"):
        evaluate_runtime.measure_detector(detector, objects, 0)(found)


def test_images_are_evenly_spaced(evaluate_runtime):
    assert [evaluate_runtime.evenly(*numbers) for numbers in ((3, 9), (9, 3), (4, 1))] == [
        [0, 1, 2],
        [0, 4, 8],
        [0],
    ]


def test_a_detector_that_finds_nothing_has_no_precision(evaluate_runtime, detector, objects):
    nothing = {"boxes": torch.zeros(1, 4, 4), "scores": torch.zeros(1, 4)}
    nothing |= {"labels": torch.full((1, 4), -1), "masks": torch.zeros(1, 4, 28, 28)}
    scores = evaluate_runtime.measure_detector(detector, objects, ALL)(lambda images: nothing)
    assert scores == {"AP": 0, "AP50": 0, "mask AP": 0}


def test_what_cannot_be_measured_is_refused(evaluate_runtime, detector, segmentor, objects, scenes, tmp_path):
    def never(images: Tensor) -> dict[str, Tensor]:
        raise AssertionError

    other = coco(tmp_path / "other", train=1, val=2)
    annotations = other / "annotations" / "val.json"
    content = json.loads(annotations.read_text())
    alone = [each for each in content["annotations"] if each["image_id"] == 2]
    annotations.write_text(json.dumps({**content, "annotations": alone}))
    with pytest.raises(BadInput, match="no object in the measured images; measure more than 1"):
        evaluate_runtime.measure_detector(detector, other, 1)(never)
    annotations.write_text(json.dumps(content).replace("disc", "ball"))
    with pytest.raises(BadInput, match=r"val\.json: has classes square, ball; the artifact has square, disc"):
        evaluate_runtime.measure_detector(detector, other, ALL)(never)
    other = labelled(tmp_path / "labelled", train=1, val=2)
    Image.new("L", (96, 64), 255).save(other / "ann_dir" / "val" / "0.png")
    with pytest.raises(BadInput, match="no labelled pixel in the measured images; measure more than 1"):
        evaluate_runtime.measure_segmentor(segmentor, other, 1)(Classes(scenes))
    (other / "classes.json").write_text(json.dumps({"classes": ["ground", "square", "ball"]}))
    with pytest.raises(BadInput, match="has classes ground, square, ball; the artifact has"):
        evaluate_runtime.measure_segmentor(segmentor, other, ALL)(never)
    with pytest.raises(BadArtifact, match="its kind is 'segmentor', not 'detector'"):
        evaluate_runtime.measure_detector(segmentor, objects, ALL)(never)
    with pytest.raises(BadInput, match="has classes background, square, disc; the artifact has"):
        evaluate_runtime.measure_segmentor(segmentor, objects, ALL)(never)
