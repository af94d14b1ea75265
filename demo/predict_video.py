"""Predicts on the frames of a video, and writes them with their predictions as an animation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import GraphKind
from demo.models import Model
from demo.predict import MOST_SHOWN, classify, describe_objects, detect, segment, shares
from demo.upload import to_channels
from downstream.draw import draw_boxes, draw_labels, draw_masks

MOST_LABELS = 8
"""Most classes of a segmented frame that are named on it."""
AMOUNTS: dict[GraphKind, str] = {
    "classifier": "mean probability",
    "detector": "objects",
    "segmentor": "mean share",
}
"""What the amounts of a class come to over the frames that show it."""


@dataclass(frozen=True)
class FramePrediction:
    """The prediction of one frame.

    Attributes:
        drawn: The frame with it, uint8 `[H, W, 3]`.
        amounts: Probability, number of objects or share of the frame, by class.
        facts: The prediction, for programs.
    """

    drawn: np.ndarray
    amounts: Mapping[str, float]
    facts: Any


def predict_frame(
    model: Model,
    runtime: Runtime,
    form: GraphKind,
    frame: np.ndarray,
    score: float,
    scale: tuple[float, float],
) -> FramePrediction:
    """Predicts on a frame.

    Args:
        model: Model that predicts.
        runtime: Its runtime.
        form: Kind of its graph.
        frame: uint8 `[H, W, 3]`.
        score: Lowest score of an object.
        scale: Width and height of the video, divided by those of the frame; the boxes of `facts` are in
            pixels of the video.
    """
    pixels = to_channels(frame, len(runtime.spec.preprocessing.mean))
    return _PREDICT[form](runtime, pixels, frame, model, score, scale)


def _classify(
    runtime: Runtime, pixels: np.ndarray, frame: np.ndarray, model: Model, *_: Any
) -> FramePrediction:
    names = model.class_names()
    found = classify(runtime, pixels, names)
    name, probability = next(iter(found.items()))
    colour = model.palette()[names.index(name)]
    drawn = draw_labels(frame, [f"{name} {probability:.0%}"], [colour])
    return FramePrediction(drawn, {name: probability}, {name: round(p, 4) for name, p in found.items()})


def _detect(
    runtime: Runtime,
    pixels: np.ndarray,
    frame: np.ndarray,
    model: Model,
    score: float,
    scale: tuple[float, float],
) -> FramePrediction:
    found, colours = detect(runtime, pixels, model.class_names(), score), model.palette()
    masks = [(each.mask, colours[each.number]) for each in found[:MOST_SHOWN] if each.mask is not None]
    drawn = draw_masks(frame, masks)
    if first := found[:MOST_SHOWN]:
        boxes, labels = torch.tensor([each.box for each in first]), [f"{e.name} {e.score:.2f}" for e in first]
        drawn = draw_boxes(drawn, boxes, labels, [colours[each.number] for each in first])
    return FramePrediction(drawn, Counter(each.name for each in found), describe_objects(found, scale))


def _segment(
    runtime: Runtime, pixels: np.ndarray, frame: np.ndarray, model: Model, *_: Any
) -> FramePrediction:
    classes, colours = segment(runtime, pixels), model.palette()
    found = shares(classes, model.class_names())
    drawn = draw_masks(frame, ((classes == number, colours[number]) for number, _, _ in found))
    first = found[:MOST_LABELS]
    labels = [f"{name} {share:.0%}" for _, name, share in first]
    drawn = draw_labels(drawn, labels, [colours[number] for number, _, _ in first])
    amounts = {name: share for _, name, share in found}
    return FramePrediction(drawn, amounts, {name: round(share, 4) for name, share in amounts.items()})


_PREDICT: dict[GraphKind, Callable[..., FramePrediction]] = {
    "classifier": _classify,
    "detector": _detect,
    "segmentor": _segment,
}


def count_classes(form: GraphKind, frames: Sequence[FramePrediction]) -> list[tuple[str, int, float]]:
    """Returns name, number of frames, and amount (see `AMOUNTS`) of every class, the most frequent first."""
    found: dict[str, list[float]] = defaultdict(list)
    for frame in frames:
        for name, amount in frame.amounts.items():
            found[name].append(amount)
    rows = [
        (name, len(amounts), sum(amounts) / (1 if form == "detector" else len(amounts)))
        for name, amounts in found.items()
    ]
    return sorted(rows, key=lambda row: (-row[1], -row[2]))


def write_frames(path: Path, frames: Sequence[np.ndarray], seconds: float) -> None:
    """Writes frames, uint8 `[H, W, 3]`, as an animated WebP of this length, which plays for ever."""
    first, *others = map(Image.fromarray, frames)
    duration = max(round(1000 * seconds / len(frames)), 20)
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0, method=0)  # the fastest
