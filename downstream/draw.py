"""Draws detected objects and class names on pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from coma.fonts import font_file

Colour = tuple[int, int, int]


def draw_masks(picture: np.ndarray, masks: Iterable[tuple[np.ndarray, Colour]]) -> np.ndarray:
    """Returns the picture, uint8 `[H, W, 3]`, tinted by masks, each bool `[H, W]` with its colour.

    They are drawn one by one, so that they need not all be in memory; the first one is on top.
    """
    tinted, free = picture.copy(), np.ones(picture.shape[:2], dtype=bool)
    for mask, colour in masks:
        tinted[mask & free] = colour
        free &= ~mask
    return ((picture.astype(np.uint16) + tinted) // 2).astype(np.uint8)


def draw_boxes(
    picture: np.ndarray, boxes: Tensor, labels: Sequence[str], colours: Sequence[Colour]
) -> np.ndarray:
    """Returns the picture, uint8 `[H, W, 3]`, with labelled boxes `[n, 4]`, the first one on top."""
    boxes = boxes.clamp(min=0).flip(0)
    drawable = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).tolist()
    if not any(drawable):
        return picture
    ordered = zip(labels[::-1], colours[::-1], drawable, strict=True)
    shown = [(label, colour) for label, colour, there in ordered if there]
    drawn = draw_bounding_boxes(
        _image(picture),
        boxes[torch.tensor(drawable)],
        labels=[label for label, _ in shown],
        colors=[colour for _, colour in shown],
        width=max(2, round(max(picture.shape) / 400)),
        font=font_file(labels),
        font_size=_font_size(picture),
        label_colors=[_readable_on(colour) for _, colour in shown],
        fill_labels=True,
    )
    return drawn.permute(1, 2, 0).numpy()


def draw_labels(picture: np.ndarray, labels: Sequence[str], colours: Sequence[Colour]) -> np.ndarray:
    """Returns the picture, uint8 `[H, W, 3]`, with labels on their colours, from the top left downwards."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    size = _font_size(picture)
    font, line = ImageFont.truetype(font_file(labels), size), round(1.4 * size)
    for number, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        top = number * line
        draw.rectangle((0, top, draw.textlength(label, font) + size, top + line - 1), colour)
        draw.text((size / 2, top + line / 2), label, _readable_on(colour), font, anchor="lm")
    return np.asarray(image)


def _font_size(picture: np.ndarray) -> int:
    return max(11, round(max(picture.shape) / 65))


def _readable_on(colour: Colour) -> str:
    return "white" if sum(colour) < 380 else "black"


def _image(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture).copy()).permute(2, 0, 1)
