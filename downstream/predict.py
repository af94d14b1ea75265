"""Predicts with a detector or segmentor and writes pictures, COCO results and label maps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.utils import import_modules_from_strings
from PIL import Image
from torch import nn

from coma.artifact import ArtifactConfig
from coma.atomic_io import write_json
from coma.data.sources.files import images_below
from coma.errors import BadImage, BadInput
from downstream.artifacts import lists_to_tuples
from downstream.datasets.label_classes import dataset_meta
from downstream.draw import draw_boxes, draw_masks

log = logging.getLogger(__name__)
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image.

    Attributes:
        path: Path of the image.
        number: Id of the image.
        sample: OpenMMLab's data sample, on the CPU, in pixels of the file.
    """

    path: Path
    number: int
    sample: Any


def list_images(images: Path) -> list[Path]:
    """Returns one image, or all images below a folder, sorted, of all its splits.

    Raises:
        BadInput: no image, or no such path.
    """
    if images.is_file():
        return [images]
    if not images.exists():
        raise BadInput(f"{images}: no such file or folder")
    if not images.is_dir():
        raise BadInput(f"{images}: is neither a folder nor a regular file")
    return images_below(images)


def read_image_ids(annotations: Path) -> dict[str, int]:
    """Returns the image ids of a COCO file, by file name.

    Raises:
        BadInput: not a COCO file.
    """
    try:
        images = json.loads(annotations.read_text(encoding="utf-8"))["images"]
        return {str(image["file_name"]): int(image["id"]) for image in images}
    except OSError as error:
        raise BadInput(f"{annotations}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{annotations}: not a COCO annotation file ({type(error).__name__}: {error})"
        ) from None


def assign_image_ids(paths: list[Path], numbers: dict[str, int] | None) -> list[int]:
    """Returns an id for every image: that of the name that its path ends with, or counted from 1.

    Raises:
        BadInput: an image without an id, or two images with the same id.
    """
    if numbers is None:
        return list(range(1, len(paths) + 1))
    found: dict[int, Path] = {}
    for path in paths:
        tails = ["/".join(path.parts[i:]) for i in range(len(path.parts))]
        number = next((numbers[tail] for tail in tails if tail in numbers), None)
        if number is None:
            raise BadInput(f"{path}: the annotations have no image with this name")
        if number in found:
            raise BadInput(f"{path} and {found[number]}: both are image {number} of the annotations")
        found[number] = path
    return list(found)


def predict(
    model: nn.Module,
    config: ArtifactConfig,
    paths: list[Path],
    device: torch.device,
    numbers: list[int],
    skipped: Callable[[str], None] | None = None,
) -> Iterator[Prediction]:
    """Yields one prediction per image; images that cannot be read are skipped.

    Args:
        model: Model of `load_finetuned`.
        config: Artifact configuration of `load_finetuned`.
        paths: Images.
        device: Device to compute on.
        numbers: Ids of the images; see `assign_image_ids`.
        skipped: Called with a message for every skipped image.

    Raises:
        BadInput: no image could be read.
    """
    head = config.head or {}
    module = {"mmdet": "mmdet.datasets.transforms", "mmseg": "mmseg.datasets.transforms"}[head["library"]]
    import_modules_from_strings([module])
    pipeline = Compose(lists_to_tuples(head["pipeline"]))
    model.to(device)
    done = 0
    for path, number in zip(paths, numbers, strict=True):
        try:
            data: Any = pipeline({"img_path": str(path), "img_id": number})
        except BadImage as error:
            if skipped:
                skipped(str(error))
            continue
        with torch.no_grad():
            batch = {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}
            sample = model.test_step(batch)[0]  # pyright: ignore[reportCallIssue]
        done += 1
        yield Prediction(path, number, sample.cpu())
    if not done:
        raise BadInput(f"{paths[0]}: none of {len(paths)} images could be read")


def coco_results(prediction: Prediction, category_ids: list[int]) -> list[dict[str, Any]]:
    """Returns the detections of one image in COCO result format, in order of their scores.

    Boxes are x, y, width, height in pixels; masks are run-length encoded.
    """
    found = prediction.sample.pred_instances
    results = []
    for i in range(len(found)):
        x1, y1, x2, y2 = found.bboxes[i].tolist()
        result: dict[str, Any] = {
            "image_id": prediction.number,
            "category_id": category_ids[int(found.labels[i])],
            "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(float(found.scores[i]), 5),
        }
        if "masks" in found:
            from pycocotools import mask

            runs: Any = mask.encode(np.asfortranarray(found.masks[i].numpy().astype(np.uint8)))
            result["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode("ascii")}
        results.append(result)
    return results


def write_detections(
    out: Path, predictions: Iterator[Prediction], config: ArtifactConfig, score: float, progress: Progress
) -> int:
    """Writes pictures, `detections.json` (COCO results) and `images.json` (the ids of images and classes).

    Args:
        out: Output folder.
        predictions: Predictions of `predict`.
        config: Configuration of the artifact.
        score: Lowest score of objects that are drawn; the files hold all objects.
        progress: Called with the number of finished images.

    Returns:
        The number of detections with at least `score`.
    """
    names = config.class_names or ()
    ids = list((config.head or {}).get("category_ids") or range(1, len(names) + 1))
    meta = dataset_meta(config)
    images, results, shown = [], [], 0
    for count, prediction in enumerate(predictions, start=1):
        found = coco_results(prediction, ids)
        results += found
        shown += sum(each["score"] >= score for each in found)
        pixels = _pixels(prediction.path, config)
        size = {"width": pixels.shape[1], "height": pixels.shape[0]}
        images.append({"id": prediction.number, "file_name": prediction.path.name, **size})
        instances = prediction.sample.pred_instances
        drawn = _draw_detections(pixels, instances[instances.scores >= score], meta)
        Image.fromarray(drawn).save(_picture_path(out, prediction))
        progress(count)
    categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    write_json(out / "detections.json", results, indent=None)
    listed = {"images": images, "categories": categories, "annotations": []}
    write_json(out / "images.json", listed, indent=None)
    return shown


def write_segmentations(
    out: Path, predictions: Iterator[Prediction], config: ArtifactConfig, progress: Progress
) -> None:
    """Writes pictures, and label maps to `labels/` (palette PNG, class numbers from 0)."""
    meta = dataset_meta(config)
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(meta["palette"])] = meta["palette"][:256]
    draw = _segmentation_drawer(meta)
    for count, prediction in enumerate(predictions, start=1):
        classes = prediction.sample.pred_sem_seg.data[0].numpy()
        picture = _picture_path(out, prediction)
        label = out / "labels" / picture.name
        label.parent.mkdir(parents=True, exist_ok=True)
        if len(meta["classes"]) <= 256:
            image = Image.fromarray(classes.astype(np.uint8), mode="P")
            image.putpalette(colours.tobytes())
        else:
            image = Image.fromarray(classes.astype(np.uint16))
        image.save(label)
        draw(picture, _pixels(prediction.path, config), prediction.sample)
        progress(count)


def _draw_detections(pixels: np.ndarray, found: Any, meta: dict[str, Any]) -> np.ndarray:
    labels = [int(label) for label in found.labels]
    colours = [meta["palette"][label] for label in labels]
    if "masks" in found:
        pixels = draw_masks(pixels, found.masks.bool(), colours)
    names = [f"{meta['classes'][i]} {score:.2f}" for i, score in zip(labels, found.scores, strict=True)]
    return draw_boxes(pixels, found.bboxes, names, colours)


def _segmentation_drawer(meta: dict[str, Any]) -> Callable[[Path, np.ndarray, Any], None]:
    from mmseg.visualization import SegLocalVisualizer

    visualizer = SegLocalVisualizer(alpha=0.6)
    visualizer.dataset_meta = meta

    def draw(path: Path, pixels: np.ndarray, sample: Any) -> None:
        visualizer.add_datasample(path.name, pixels, sample, draw_gt=False, out_file=str(path))

    return draw


def _pixels(path: Path, config: ArtifactConfig) -> np.ndarray:
    """Returns the image to draw on, uint8 `[H, W, 3]`: RGB, or the mean of the channels as grey."""
    from downstream.openmmlab.transforms import ReadImage

    pixels = ReadImage(config.model.channels).transform({"img_path": str(path)})["img"]
    if pixels.shape[2] == 3:
        pixels = pixels[..., ::-1]
    else:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    return np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))


def _picture_path(out: Path, prediction: Prediction) -> Path:
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prediction.path.stem}.png"
    return path if not path.exists() else folder / f"{prediction.number:06d}-{prediction.path.stem}.png"
