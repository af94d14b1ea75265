"""Runs classifiers, detectors and segmentors on a picture and draws their predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coma.runtimes.base import Runtime
from coma.runtimes.preprocessing import resize_image, to_input
from demo.reconstruction import run
from demo.render import enlarge, to_rgb
from downstream.draw import Colour, draw_boxes, draw_masks


@dataclass(frozen=True)
class Detection:
    """A detected object.

    Attributes:
        name: Name of the class.
        number: Index of the class.
        score: Score, 0 to 1.
        box: Corners x1, y1, x2, y2 in pixels of the picture.
        mask: bool `[H, W]`, for models with masks.
    """

    name: str
    number: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


def prepare(pixels: np.ndarray, runtime: Runtime) -> Tensor:
    """Preprocesses pixels `[H, W, c]` to the model's input `[1, c, h, w]`."""
    about = runtime.spec.preprocessing
    return to_input([resize_image(pixels, about)], about)


def classify(runtime: Runtime, pixels: np.ndarray, names: tuple[str, ...], most: int = 5) -> dict[str, float]:
    """Returns the probabilities of the `most` most probable classes, in descending order."""
    logits = run(runtime, prepare(pixels, runtime))["logits"][0]
    scores, order = runtime.spec.probabilities(logits).sort(descending=True)
    return {names[i]: float(p) for p, i in zip(scores[:most], order[:most].tolist(), strict=True)}


def detect(runtime: Runtime, pixels: np.ndarray, names: tuple[str, ...], score: float) -> list[Detection]:
    """Returns the objects of at least this score, in the runtime's order, in pixels of the picture."""
    images = prepare(pixels, runtime)
    found = run(runtime, images)
    height, width = pixels.shape[:2]
    scale = torch.tensor([width / images.shape[3], height / images.shape[2]] * 2)
    objects = []
    for i in range(found["scores"].shape[1]):
        value, label = float(found["scores"][0, i]), int(found["labels"][0, i])
        if label < 0 or value < score:
            continue
        x1, y1, x2, y2 = (found["boxes"][0, i] * scale).tolist()
        box = (max(x1, 0), max(y1, 0), min(x2, width), min(y2, height))
        mask = paste_mask(found["masks"][0, i].numpy(), box, height, width) if "masks" in found else None
        objects.append(Detection(names[label], label, value, box, mask))
    return objects


def paste_mask(
    mask: np.ndarray, box: tuple[float, float, float, float], height: int, width: int
) -> np.ndarray:
    """Pastes the mask of a box, probabilities `[28, 28]`, into the picture: bool `[height, width]`."""
    whole = np.zeros((height, width), bool)
    x1, y1, x2, y2 = (
        int(np.floor(box[0])),
        int(np.floor(box[1])),
        int(np.ceil(box[2])),
        int(np.ceil(box[3])),
    )
    if x2 <= x1 or y2 <= y1:
        return whole
    size = (x2 - x1, y2 - y1)
    part = np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    whole[y1:y2, x1:x2] = part[: height - y1, : width - x1] >= 0.5
    return whole


def draw_objects(pixels: np.ndarray, objects: Sequence[Detection], colours: Sequence[Colour]) -> np.ndarray:
    """Draws boxes, masks, class names and scores on `[H, W, c]`: uint8 `[H', W', 3]`, enlarged if small."""
    picture = as_picture(pixels)
    chosen = [colours[each.number % len(colours)] for each in objects]
    masks = [torch.from_numpy(each.mask) for each in objects if each.mask is not None]
    if masks:
        picture = draw_masks(picture, torch.stack(masks), chosen)
    large = enlarge(picture, 900)
    boxes = torch.tensor([each.box for each in objects]).view(-1, 4) * (large.shape[1] / picture.shape[1])
    return draw_boxes(large, boxes, [f"{each.name} {each.score:.2f}" for each in objects], chosen)


def segment(runtime: Runtime, pixels: np.ndarray) -> np.ndarray:
    """Returns the class of every pixel of the picture, int64 `[H, W]`."""
    classes = run(runtime, prepare(pixels, runtime))["classes"][0].numpy()
    size = (pixels.shape[1], pixels.shape[0])
    image = Image.fromarray(classes.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(image).astype(np.int64)


def draw_classes(
    pixels: np.ndarray, classes: np.ndarray, colours: Sequence[Colour], strength: float = 0.6
) -> np.ndarray:
    """Overlays the picture `[H, W, c]` with the colours of its classes `[H, W]`: uint8 `[H', W', 3]`."""
    tints = np.array(colours, np.float32)[classes]
    return enlarge((as_picture(pixels) * (1 - strength) + tints * strength).astype(np.uint8), 900)


def shares(classes: np.ndarray, names: tuple[str, ...]) -> list[tuple[int, str, float]]:
    """Returns index, name and share of every class in the picture, largest first."""
    counts = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    return [(int(i), names[i], float(counts[i])) for i in counts.argsort()[::-1] if counts[i] > 0]


def as_picture(pixels: np.ndarray) -> np.ndarray:
    """Converts pixels `[H, W, c]`, uint8 or float32 in 0..1, to a new uint8 `[H, W, 3]`."""
    scaled = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
    return to_rgb(scaled).copy()
