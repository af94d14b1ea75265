"""What classifiers, detectors and segmentors found, drawn on the picture and as rows of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from coma.runtimes.base import Runtime
from demo.reconstruction import run
from demo.render import enlarge, to_rgb
from export.preprocessing import as_input, resized

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Found:
    """One object.

    Attributes:
        name: Of its class.
        number: Of its class.
        score: 0 to 1.
        box: Corners x1, y1, x2, y2 in pixels of the picture.
        mask: bool `[H, W]` of the picture, where the model has masks.
    """

    name: str
    number: int
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


def prepare(pixels: np.ndarray, runtime: Runtime) -> Tensor:
    """Pixels `[H, W, c]` to the input `[1, c, h, w]` that the model's description asks for."""
    about = runtime.spec.preprocessing
    return as_input([resized(pixels, about)], about)


def classify(runtime: Runtime, pixels: np.ndarray, names: tuple[str, ...], most: int = 5) -> dict[str, float]:
    """Probabilities of the likeliest classes, likeliest first."""
    logits = run(runtime, prepare(pixels, runtime))["logits"][0]
    scores, order = logits.float().softmax(dim=0).sort(descending=True)
    return {names[i]: float(p) for p, i in zip(scores[:most], order[:most].tolist(), strict=True)}


def detect(runtime: Runtime, pixels: np.ndarray, names: tuple[str, ...], score: float) -> list[Found]:
    """Objects of at least this score, likeliest first, in pixels of the picture as it was given."""
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
        objects.append(Found(names[label], label, value, box, mask))
    return objects


def paste_mask(
    mask: np.ndarray, box: tuple[float, float, float, float], height: int, width: int
) -> np.ndarray:
    """A box's mask, probabilities `[28, 28]`, as bool `[height, width]` of the picture."""
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


def draw_objects(pixels: np.ndarray, objects: Sequence[Found], colours: Sequence[Colour]) -> np.ndarray:
    """Boxes, masks, names and scores on the picture `[H, W, c]`: uint8 `[H', W', 3]`, enlarged if small."""
    picture = as_picture(pixels)
    for each in objects:
        if each.mask is not None:
            tint = np.array(colours[each.number % len(colours)], np.float32)
            picture[each.mask] = (picture[each.mask] * 0.5 + tint * 0.5).astype(np.uint8)
    large = enlarge(picture, 900)
    scale = large.shape[1] / picture.shape[1]
    image = Image.fromarray(large)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(max(14, round(max(large.shape) / 60)))
    for each in reversed(objects):
        colour = colours[each.number % len(colours)]
        x1, y1, x2, y2 = (value * scale for value in each.box)
        if x2 <= x1 or y2 <= y1:
            continue
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=3)
        text = f"{each.name} {each.score:.2f}"
        left, top, right, bottom = draw.textbbox((x1, y1), text, font=font)
        up = min(bottom - top + 6, y1)  # above the box where there is room
        draw.rectangle((left - 1, top - up, right + 5, bottom - up + 5), fill=colour)
        dark = sum(colour) < 380
        draw.text((x1 + 2, y1 - up + 1), text, fill=(255, 255, 255) if dark else (0, 0, 0), font=font)
    return np.asarray(image)


def segment(runtime: Runtime, pixels: np.ndarray) -> np.ndarray:
    """Class of every pixel, int64 `[H, W]` of the picture as it was given."""
    classes = run(runtime, prepare(pixels, runtime))["classes"][0].numpy()
    size = (pixels.shape[1], pixels.shape[0])
    image = Image.fromarray(classes.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(image).astype(np.int64)


def draw_classes(
    pixels: np.ndarray, classes: np.ndarray, colours: Sequence[Colour], strength: float = 0.6
) -> np.ndarray:
    """The picture `[H, W, c]` under the colours of its classes `[H, W]`: uint8 `[H', W', 3]`."""
    tints = np.array(colours, np.float32)[classes]
    return enlarge((as_picture(pixels) * (1 - strength) + tints * strength).astype(np.uint8), 900)


def shares(classes: np.ndarray, names: tuple[str, ...]) -> list[tuple[int, str, float]]:
    """Number, name and share of the picture of every class that is there, largest first."""
    counts = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    return [(int(i), names[i], float(counts[i])) for i in counts.argsort()[::-1] if counts[i] > 0]


def as_picture(pixels: np.ndarray) -> np.ndarray:
    """Pixels `[H, W, c]`, uint8 or float32 in 0..1, as uint8 `[H, W, 3]` of its own memory."""
    scaled = pixels.astype(np.float32) / 255 if pixels.dtype == np.uint8 else pixels
    return to_rgb(scaled).copy()
