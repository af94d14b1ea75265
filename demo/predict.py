"""Runs classifiers, detectors and segmentors on a picture and annotates it with their predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coma.runtimes.base import Runtime
from coma.runtimes.preprocessing import resize_image, to_input
from demo.reconstruction import run
from demo.render import to_rgb

SHOWN = 900
"""Longer side of an annotated picture in pixels."""
MOST_SHOWN = 24
"""Most annotations of a picture."""
STRENGTH = 0.65
"""Opacity of a mask."""
Annotation = tuple[np.ndarray | tuple[int, int, int, int], str]
"""A mask `[h, w]`, opacities, or the corners x1, y1, x2, y2 of a box; and its label."""


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


def describe_objects(objects: Sequence[Detection], scale: tuple[float, float]) -> list[dict[str, Any]]:
    """Returns class, score and box of every object, for programs.

    Args:
        objects: Objects, in pixels of the picture.
        scale: Width and height of the uploaded picture, divided by those of the picture; boxes are returned
            in pixels of the upload.
    """
    return [
        {"class": each.name, "score": round(each.score, 4),
         "box": [round(v * s, 1) for v, s in zip(each.box, scale * 2, strict=True)]}
        for each in objects
    ]  # fmt: skip


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


def show_objects(objects: Sequence[Detection], height: int, width: int, to: np.ndarray) -> list[Annotation]:
    """Returns the first objects as annotations, named `class score`, of a picture shown at another size.

    Args:
        objects: Objects, in pixels of the picture.
        height: Height of the picture.
        width: Width of the picture.
        to: The picture as it is shown, `[h, w, 3]`.
    """
    h, w = to.shape[:2]
    found: list[Annotation] = []
    for each in objects[:MOST_SHOWN]:
        x1, y1, x2, y2 = (round(v * s) for v, s in zip(each.box, (w / width, h / height) * 2, strict=True))
        part = (min(x1, w - 4), min(y1, h - 4), max(x2, x1 + 4), max(y2, y1 + 4))
        label = _unique(f"{each.name} {each.score:.2f}", found)
        found.append((part if each.mask is None else STRENGTH * _scaled(each.mask, h, w), label))
    return found


def show_classes(classes: np.ndarray, names: tuple[str, ...], to: np.ndarray) -> list[Annotation]:
    """Returns the classes `[H, W]` of a picture as annotations, named `class share`, largest first."""
    return [
        (STRENGTH * _scaled(classes == i, *to.shape[:2]), f"{name} {share:.0%}")
        for i, name, share in shares(classes, names)[:MOST_SHOWN]
    ]


def shown_picture(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels `[H, W, c]` as a picture whose longer side is `SHOWN`, uint8 `[h, w, 3]`."""
    picture = as_picture(pixels)
    scale = SHOWN / max(picture.shape[:2])
    size = (max(round(picture.shape[1] * scale), 8), max(round(picture.shape[0] * scale), 8))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))


def _scaled(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized).astype(np.float32)


def _unique(label: str, among: Sequence[Annotation]) -> str:
    """Returns the label, numbered if there is one like it, by which the page tells annotations apart."""
    number = sum(known == label or known.startswith(f"{label} (") for _, known in among)
    return f"{label} ({number + 1})" if number else label


def segment(runtime: Runtime, pixels: np.ndarray) -> np.ndarray:
    """Returns the class of every pixel of the picture, int64 `[H, W]`."""
    classes = run(runtime, prepare(pixels, runtime))["classes"][0].numpy()
    size = (pixels.shape[1], pixels.shape[0])
    image = Image.fromarray(classes.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(image).astype(np.int64)


def shares(classes: np.ndarray, names: tuple[str, ...]) -> list[tuple[int, str, float]]:
    """Returns index, name and share of every class in the picture, largest first."""
    counts = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    return [(int(i), names[i], float(counts[i])) for i in counts.argsort()[::-1] if counts[i] > 0]


def as_picture(pixels: np.ndarray) -> np.ndarray:
    """Converts pixels `[H, W, c]`, uint8 or float32 in 0..1, to a new uint8 `[H, W, 3]`."""
    scaled = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
    return to_rgb(scaled).copy()
