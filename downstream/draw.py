"""Draws detected objects on pictures with torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

Colour = tuple[int, int, int]


def draw_masks(picture: np.ndarray, masks: Tensor, colours: Sequence[Colour]) -> np.ndarray:
    """Returns the picture, uint8 `[H, W, 3]`, tinted where the masks, bool `[n, H, W]`, are true."""
    if not len(masks):
        return picture
    drawn = draw_segmentation_masks(_image(picture), masks, alpha=0.5, colors=list(colours))
    return drawn.permute(1, 2, 0).numpy()


def draw_boxes(
    picture: np.ndarray, boxes: Tensor, labels: Sequence[str], colours: Sequence[Colour]
) -> np.ndarray:
    """Returns the picture, uint8 `[H, W, 3]`, with labelled boxes `[n, 4]`, the first one on top."""
    import matplotlib

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
        font=str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")),
        font_size=max(11, round(max(picture.shape) / 65)),
        label_colors=["white" if sum(colour) < 380 else "black" for _, colour in shown],
        fill_labels=True,
    )
    return drawn.permute(1, 2, 0).numpy()


def _image(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture).copy()).permute(2, 0, 1)
