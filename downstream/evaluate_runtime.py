"""Measures AP and mIoU of exported models in any runtime.

Preprocessing, test loop and metrics are those of `coma detect test` and `coma segment test`; a wrapper around
the runtime replaces the model. The only difference is that images are not padded to a multiple of the stride.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor

from coma.artifact import ArtifactConfig
from coma.errors import BadInput
from downstream.artifacts import model_settings, read_finetuned, register_modules
from downstream.datasets.coco import CocoSplit, open_coco
from downstream.datasets.labels import open_labels
from downstream.finetune import test_config
from downstream.openmmlab import runner
from downstream.private import paste_masks
from downstream.tasks import detection, segmentation

Run = Callable[[Tensor], dict[str, Tensor]]
"""Maps a normalised float32 image `[1, c, H, W]` on the CPU to named outputs on any device."""
PADDING = ("pad_size_divisor", "test_cfg")
"""Settings of mmdet's and mmseg's data preprocessors that pad test images."""


def measure_detector(directory: Path, data: Path, most: int) -> Callable[[Run], dict[str, float]]:
    """Opens validation images, and returns a function that measures a detector's average precision on them.

    The function takes a runtime. It returns `boxes` `[1, n, 4]` (corners in pixels of the input), `scores`
    `[1, n]` and `labels` `[1, n]` (-1, or a score of 0, for empty places); detectors with masks also return
    `masks` `[1, n, h, w]`, probabilities inside each box.

    Args:
        directory: Artifact of the detector, which defines classes and preprocessing.
        data: Dataset in COCO format.
        most: Largest number of images, evenly spaced over the split.

    Returns:
        A function that returns `AP`, `AP50` and, where the detector and the dataset have masks, `mask AP`; in
        percent, rounded to a tenth by mmdet. It raises BadInput for a dataset that has other classes than the
        artifact, or no object.

    Raises:
        BadArtifact: not an artifact of a detector.
        BadInput: a dataset that cannot be used.
    """
    about = read_finetuned(directory, "detector").config
    split = open_coco(data, "val")

    def measured(run: Run) -> dict[str, float]:
        with runner.scratch_folder() as folder:
            loader, metric = detection.test_settings(about, split)
            some = _part_of(split, most, folder)
            loader["dataset"]["ann_file"] = metric["ann_file"] = str(some)
            scores = _measure(about, loader, metric, folder, _answer(about, run))
        names = {"AP": "bbox_mAP", "AP50": "bbox_mAP_50"}
        if "segm" in metric["metric"]:
            names["mask AP"] = "segm_mAP"
        # a score is missing if there is no box
        found = {name: scores.get(f"coco/{theirs}", 0.0) for name, theirs in names.items()}
        return {name: round(100 * score, 1) for name, score in found.items()}

    return measured


def measure_segmentor(directory: Path, data: Path, most: int) -> Callable[[Run], dict[str, float]]:
    """Opens validation images, and returns a function that measures a segmentor's intersection over union.

    The function takes a runtime. It returns `logits` `[1, classes, H, W]` and `classes` int64 `[1, H, W]`.
    The classes are measured if the input has the image's size; otherwise the logits, resized as in mmseg.

    Args:
        directory: Artifact of the segmentor, which defines classes and preprocessing.
        data: Folder of images and label maps.
        most: Largest number of images, evenly spaced over the split.

    Returns:
        A function that returns `mIoU` and `pixel accuracy`, in percent, rounded to a hundredth by mmseg. It
        raises BadInput for a dataset that has other classes than the artifact, or no labelled pixel.

    Raises:
        BadArtifact: not an artifact of a segmentor.
        BadInput: a dataset that cannot be used.
    """
    about = read_finetuned(directory, "segmentor").config
    split = open_labels(data, "val")

    def measured(run: Run) -> dict[str, float]:
        loader, metric = segmentation.test_settings(about, split)
        loader["dataset"]["indices"] = evenly(split.pairs, most)
        with runner.scratch_folder() as folder:
            scores = _measure(about, loader, metric, folder, _answer(about, run))
        if math.isnan(scores["mIoU"]):
            raise BadInput(f"{data}: no labelled pixel in the measured images; measure more than {most}")
        return {"mIoU": round(scores["mIoU"], 2), "pixel accuracy": round(scores["aAcc"], 2)}

    return measured


def evenly(count: int, most: int) -> list[int]:
    """Returns up to `most` evenly spaced numbers below `count`, with the first and the last.

    Raises:
        BadInput: `most` is less than 1.
    """
    if most < 1:
        raise BadInput(f"{most} images are too few; measure at least 1")
    return torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).round().long().tolist()


@MODELS.register_module()
class RuntimeModel(BaseModel):
    """Replaces the model in mmengine's test loop; `answer` is set after it is built.

    Args:
        data_preprocessor: Settings of the library's data preprocessor.
    """

    answer: Callable[[Tensor, Any], None]
    """Writes predictions for an image `[1, c, H, W]` into its data sample, in pixels of the file."""

    def __init__(self, data_preprocessor: dict[str, Any]) -> None:
        super().__init__(data_preprocessor)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "predict") -> Any:
        """Returns the data samples of images `[b, c, H, W]` with their predictions."""
        for image, sample in zip(inputs.cpu(), data_samples, strict=True):
            self.answer(image[None], sample)
        return data_samples


def runtime_model(about: ArtifactConfig, run: Run) -> RuntimeModel:
    """Returns a model for OpenMMLab that runs an exported file.

    Args:
        about: Configuration of the artifact that was exported.
        run: Runtime; see `measure_detector` and `measure_segmentor`.
    """
    register_modules(about)
    model: Any = MODELS.build({"type": "RuntimeModel", "data_preprocessor": _unpadded(about)})
    model.answer = _answer(about, run)
    return model


def _answer(about: ArtifactConfig, run: Run) -> Callable[[Tensor, Any], None]:
    settings = (about.head or {})["model"]
    if about.kind == "segmentor":
        return partial(_segment, run, bool(settings["decode_head"].get("align_corners", False)))
    tested = (settings.get("test_cfg") or {}).get("rcnn", {})
    return partial(_detect, run, tested.get("mask_thr_binary", 0.5))


def _unpadded(about: ArtifactConfig) -> dict[str, Any]:
    preprocessor = dict(model_settings(about.head or {}).data_preprocessor)
    return {name: value for name, value in preprocessor.items() if name not in PADDING}


def _measure(
    about: ArtifactConfig,
    loader: dict[str, Any],
    metric: dict[str, Any],
    folder: Path,
    answer: Callable[[Tensor, Any], None],
) -> dict[str, float]:
    replacement = {"type": "RuntimeModel", "data_preprocessor": _unpadded(about)}
    config = test_config(about, replacement, loader, metric)

    def prepare(model: Any) -> None:
        model.answer = answer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OpenMMLab's packages warn about torch
        return runner.test(config, folder, prepare, device="cpu", quiet=True)


def _detect(run: Run, threshold: float, image: Tensor, sample: Any) -> None:
    from mmengine.structures import InstanceData

    found = {name: value[0].cpu() for name, value in run(image).items()}
    there = (found["labels"] >= 0) & (found["scores"] > 0)
    scale = torch.tensor(sample.get("scale_factor", (1.0, 1.0))).repeat(2)  # w h w h
    boxes = found["boxes"][there].float() / scale
    answer = InstanceData(bboxes=boxes, scores=found["scores"][there], labels=found["labels"][there])
    if "masks" in found:
        answer.masks = paste_masks(found["masks"][there].float(), boxes, sample.ori_shape, threshold)
    sample.pred_instances = answer


def _segment(run: Run, align_corners: bool, image: Tensor, sample: Any) -> None:
    from mmengine.structures import PixelData

    found, size = run(image), tuple(sample.ori_shape)
    classes, logits = found["classes"], found["logits"].float()
    if tuple(image.shape[2:]) != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
        classes = logits.argmax(dim=1)
    sample.pred_sem_seg = PixelData(data=classes.cpu())
    if tuple(logits.shape[2:]) == size:
        sample.seg_logits = PixelData(data=logits[0].cpu())


def _part_of(split: CocoSplit, most: int, folder: Path) -> Path:
    """Writes the annotations of up to `most` images of a split to `folder`, so that others are not missed.

    Raises:
        BadInput: the images have no object.
    """
    content = json.loads(split.annotations.read_text(encoding="utf-8"))
    images = [content["images"][i] for i in evenly(len(content["images"]), most)]
    ids = {image["id"] for image in images}
    objects = [each for each in content["annotations"] if each["image_id"] in ids]
    if all(each.get("iscrowd", 0) for each in objects):
        raise BadInput(
            f"{split.annotations}: no object in the measured images; measure more than {len(images)}"
        )
    path = folder / "annotations.json"
    path.write_text(json.dumps({**content, "images": images, "annotations": objects}), encoding="utf-8")
    return path
