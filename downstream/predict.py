"""Predicts with a detector or segmentor on images and videos, and writes pictures, videos and label files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.structures import PixelData
from mmengine.utils import import_modules_from_strings
from PIL import Image
from torch import nn

from coma.artifact import ArtifactConfig
from coma.errors import BadImage, BadInput
from downstream.artifacts import lists_to_tuples
from downstream.datasets.drawn import mask_box
from downstream.datasets.label_classes import dataset_meta
from downstream.datasets.masks import encode_runs
from downstream.draw import draw_boxes, draw_masks
from downstream.frames import VideoWriter, is_video, read_frames
from downstream.placed_masks import cut
from downstream.prediction_files import PredictionFiles, output_stems
from downstream.tiles import predict_tiles

log = logging.getLogger(__name__)
Progress = Callable[[int], None]
UNSURE = 255
"""Value of pixels below the threshold or of classes that were not asked for, in label maps."""


@dataclass(frozen=True)
class Choice:
    """What of the predictions is shown and written.

    Attributes:
        threshold: Least score of objects, or least probability of a pixel's class.
        classes: Numbers of the classes; None for all.
        tile_size: Side of the tiles of larger pictures in pixels; None: pictures are taken whole.
        overlap: Share of a tile that also lies in the next one.
    """

    threshold: float = 0.0
    classes: frozenset[int] | None = None
    tile_size: int | None = None
    overlap: float = 0.2


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image, or one frame of a video.

    Attributes:
        path: Path of the image or video.
        name: Path relative to the folder; `clip.mp4/000012` for a frame.
        stem: Relative path of the drawn image or video, without suffix; see `output_stems`.
        number: Id of the image.
        pixels: `[H, W, c]`, as OpenMMLab loads it.
        sample: OpenMMLab's data sample, on the CPU, in pixels of the file.
    """

    path: Path
    name: str
    stem: str
    number: int
    pixels: np.ndarray
    sample: Any


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
    choice: Choice,
    skipped: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> Iterator[Prediction]:
    """Yields one prediction per image and frame; files that cannot be read are skipped.

    Args:
        model: Model of `load_finetuned`, or one that runs an exported file.
        config: Artifact configuration.
        paths: Images and videos.
        device: Device to compute on.
        numbers: Ids of the images; see `assign_image_ids`. Frames are numbered from 1 if there is a video.
        choice: Objects that are kept, and the tiles that large pictures are cut into.
        skipped: Called with a message for every skipped file.
        folder: Folder that names are relative to.

    Raises:
        BadInput: no image could be read.
    """
    predict_one = _predictor(model, config, device)
    done = 0
    videos = any(map(is_video, paths))
    names = [
        path.relative_to(folder).as_posix() if folder and folder in path.parents else path.name
        for path in paths
    ]
    stems: dict[str, str] = {}
    for filmed in (False, True):  # they go to folders of their own
        stems |= output_stems([n for n, path in zip(names, paths, strict=True) if is_video(path) == filmed])
    for path, name, number in zip(paths, names, numbers, strict=True):
        try:
            for frame, pixels in enumerate(_pixels_of(path, config), start=1):
                sample = predict_tiles(predict_one, pixels, choice.tile_size, choice.overlap)
                done += 1
                own = f"{name}/{frame:06d}" if is_video(path) else name
                yield Prediction(
                    path, own, stems[name], done if videos else number, pixels, _kept(sample, choice)
                )
        except BadImage as error:
            if skipped:
                skipped(str(error))
    if not done:
        raise BadInput(f"{paths[0]}: none of {len(paths)} images could be read")


def _predictor(model: nn.Module, config: ArtifactConfig, device: torch.device) -> Callable[[np.ndarray], Any]:
    """Returns a function from pixels `[H, W, c]` to OpenMMLab's data sample."""
    head = config.head or {}
    module = {"mmdet": "mmdet.datasets.transforms", "mmseg": "mmseg.datasets.transforms"}[head["library"]]
    import_modules_from_strings([module])
    _, *steps = Compose(lists_to_tuples(head["pipeline"])).transforms
    model.to(device)

    def predict_one(pixels: np.ndarray) -> Any:
        size = pixels.shape[:2]
        data: Any = {"img": np.ascontiguousarray(pixels), "img_shape": size, "ori_shape": size}
        data |= {"img_path": None, "img_id": 0}
        for step in steps:
            data = step(data)
        with torch.no_grad():
            batch = {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}
            sample = model.test_step(batch)[0].cpu()  # pyright: ignore[reportCallIssue]
        if "seg_logits" in sample:
            logits = sample.seg_logits.data.float()
            best = logits.softmax(dim=0).amax(dim=0, keepdim=True) if len(logits) > 1 else logits.sigmoid()
            sample.confidence = PixelData(data=best)
            del sample.seg_logits
        if "masks" in sample.get("pred_instances", ()):
            found = sample.pred_instances
            found.masks = [cut(np.asarray(mask, dtype=bool)) for mask in found.masks]
        return sample

    return predict_one


def _pixels_of(path: Path, config: ArtifactConfig) -> Iterator[np.ndarray]:
    """Yields the picture of an image, or the frames of a video, as the model's pipeline loads them."""
    from downstream.openmmlab.transforms import ReadImage

    channels = config.model.channels
    if not is_video(path):
        yield ReadImage(channels).transform({"img_path": str(path)})["img"]
        return
    if channels != 3:
        raise BadImage(f"{path}: a video has 3 channels, the model takes {channels}")
    yield from read_frames(path)


def _kept(sample: Any, choice: Choice) -> Any:
    """Returns a sample with the chosen classes alone; pixels below the threshold are `UNSURE`."""
    if "pred_instances" in sample:
        if choice.classes is not None:
            wanted = torch.tensor(sorted(choice.classes))
            sample.pred_instances = sample.pred_instances[torch.isin(sample.pred_instances.labels, wanted)]
        return sample
    classes = sample.pred_sem_seg.data.clone()
    if choice.classes is not None:
        classes[~torch.isin(classes, torch.tensor(sorted(choice.classes)))] = UNSURE
    if choice.threshold:
        classes[sample.confidence.data < choice.threshold] = UNSURE
    sample.pred_sem_seg = PixelData(data=classes)
    return sample


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

            whole = found.masks[i].whole(*prediction.pixels.shape[:2])
            runs: Any = mask.encode(np.asfortranarray(whole.astype(np.uint8)))
            result["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode("ascii")}
        results.append(result)
    return results


def class_areas(prediction: Prediction, category_ids: list[int]) -> list[dict[str, Any]]:
    """Returns the classes of a segmented picture in COCO result format, with their mean probabilities."""
    classes = prediction.sample.pred_sem_seg.data[0].numpy()
    sure = prediction.sample.confidence.data[0].numpy() if "confidence" in prediction.sample else None
    results = []
    for value in np.unique(classes).tolist():
        if value >= len(category_ids):
            continue
        mask = classes == value
        x1, y1, x2, y2 = mask_box(mask)
        score = 1.0 if sure is None else round(float(sure[mask].mean()), 5)
        results.append({
            "image_id": prediction.number, "category_id": category_ids[value], "score": score,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": encode_runs(mask),
        })  # fmt: skip
    return results


def write_predictions(
    out: Path,
    predictions: Iterator[Prediction],
    config: ArtifactConfig,
    choice: Choice,
    formats: tuple[str, ...],
    progress: Progress,
    stop: Callable[[], bool],
) -> tuple[int, int]:
    """Writes pictures or videos, label maps of segmentors, and label files; see `prediction_files`.

    Args:
        out: Output folder.
        predictions: Predictions of `predict`.
        config: Configuration of the artifact.
        choice: Objects with at least its threshold are drawn and written; detections.json holds all.
        formats: Formats of the label files.
        progress: Called with the number of finished images and frames.
        stop: Asked after every image whether to finish the files and end.

    Returns:
        The numbers of images, and of objects with at least the threshold.
    """
    names = config.class_names or ()
    ids = list((config.head or {}).get("category_ids") or range(1, len(names) + 1))
    areas = config.kind == "segmentor"
    files = PredictionFiles(out, formats, names, ids, areas)
    meta = dataset_meta(config)
    draw, video = _drawer(config, meta), None
    done = shown = 0
    try:
        for done, prediction in enumerate(predictions, start=1):
            results = class_areas(prediction, ids) if areas else coco_results(prediction, ids)
            least = 0.0 if areas else choice.threshold
            shown += sum(each["score"] >= least for each in results)
            height, width = prediction.pixels.shape[:2]
            filmed = is_video(prediction.path)
            stem = prediction.name if filmed else prediction.stem
            files.add(
                prediction.name, stem, prediction.path, prediction.number, (width, height), results, least
            )
            if areas:
                _write_map(_picture_path(out / "labels", stem), prediction, meta)
            picture = draw(prediction, choice.threshold)
            if filmed:
                if video is None or video.source != prediction.path:
                    if video:
                        video.close()
                    video = VideoWriter(out / "videos" / f"{prediction.stem}.mp4", prediction.path)
                video.add(picture)
            else:
                Image.fromarray(picture).save(_picture_path(out / "pictures", stem))
            progress(done)
            if stop():
                break
    finally:
        if video:
            video.close()
        files.close()
    return done, shown


def _write_map(path: Path, prediction: Prediction, meta: dict[str, Any]) -> None:
    """Writes a label map: palette PNG, class numbers from 0."""
    classes = prediction.sample.pred_sem_seg.data[0].numpy()
    if len(meta["classes"]) <= 256:
        colours = np.zeros((256, 3), np.uint8)
        colours[: len(meta["palette"])] = meta["palette"][:256]
        image = Image.fromarray(classes.astype(np.uint8), mode="P")
        image.putpalette(colours.tobytes())
    else:
        image = Image.fromarray(classes.astype(np.uint16))
    image.save(path)


def _drawer(config: ArtifactConfig, meta: dict[str, Any]) -> Callable[[Prediction, float], np.ndarray]:
    """Returns a function that draws a prediction on its picture, uint8 `[H, W, 3]`."""
    if config.kind == "detector":

        def draw_objects(prediction: Prediction, threshold: float) -> np.ndarray:
            found = prediction.sample.pred_instances
            return _draw_detections(_shown(prediction.pixels), found[found.scores >= threshold], meta)

        return draw_objects
    from mmseg.visualization import SegLocalVisualizer

    visualizer = SegLocalVisualizer(alpha=0.6)
    visualizer.dataset_meta = meta

    def draw_classes(prediction: Prediction, _: float) -> np.ndarray:
        visualizer.add_datasample("picture", _shown(prediction.pixels), prediction.sample, draw_gt=False)
        return visualizer.get_image()

    return draw_classes


def _draw_detections(pixels: np.ndarray, found: Any, meta: dict[str, Any]) -> np.ndarray:
    labels = [int(label) for label in found.labels]
    colours = [meta["palette"][label] for label in labels]
    if "masks" in found:
        masks = (mask.whole(*pixels.shape[:2]) for mask in found.masks)
        pixels = draw_masks(pixels, zip(masks, colours, strict=True))
    names = [f"{meta['classes'][i]} {score:.2f}" for i, score in zip(labels, found.scores, strict=True)]
    return draw_boxes(pixels, found.bboxes, names, colours)


def _shown(pixels: np.ndarray) -> np.ndarray:
    """Returns the image to draw on, uint8 `[H, W, 3]`: RGB, or the mean of the channels as grey."""
    if pixels.shape[2] == 3:
        pixels = pixels[..., ::-1]
    else:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    return np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))


def _picture_path(folder: Path, stem: str) -> Path:
    path = folder / f"{stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
