"""What the task itself says: the same metric of PyTorch and of the file, in percent, on labelled images.

Top-1 is computed here. AP and mIoU are computed by the room that made the model, with its library's own
metrics, which announces itself under the entry points `coma.measure`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from coma.data.labels import class_indices
from coma.data.sources.base import Source
from coma.errors import BadImage, BadInput
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import Selection, named
from export.image_sets import name_in, reason_of
from export.preprocessing import as_input, evenly, resized

Run = Callable[[Tensor], dict[str, Tensor]]
"""Images `[1, c, H, W]` as the model takes them, normalised float32, to outputs by name."""


class Measure(Protocol):
    """Of the entry points `coma.measure`: one for each kind of artifact."""

    def __call__(self, directory: Path, data: Path, run: Run, most: int) -> dict[str, float]:
        """Scores in percent of `run` on up to `most` validation images of the dataset at `data`."""
        ...


def top1(runtime: Runtime, source: Source, most: int) -> tuple[dict[str, float], Selection]:
    """Returns the share of images whose likeliest class is their label, in percent, and those images.

    Raises:
        BadInput: no labels, classes that the model does not know, or no image that can be read.
    """
    spec = runtime.spec
    labels = class_indices(source, spec.class_names or (), "the model").tolist()
    rule = spec.preprocessing
    batch_axis, channels, *size = spec.inputs[0].axes
    batch = batch_axis if isinstance(batch_axis, int) else 1
    height, width = (
        side if isinstance(side, int) else own
        for side, own in zip(size, rule.size or (224, 224), strict=True)
    )
    right, seen = 0, 0
    left_out: dict[str, str] = {}
    waiting: list[tuple[Tensor, int]] = []

    def ask() -> None:
        nonlocal right, seen
        if not waiting:
            return
        images = [image for image, _ in waiting]
        images += images[:1] * (batch - len(images))  # of a fixed batch the last may not be full
        guessed = runtime(as_input(images, rule))["logits"].argmax(dim=1).tolist()
        right += sum(guess == label for guess, (_, label) in zip(guessed, waiting, strict=False))
        seen += len(waiting)
        waiting.clear()

    for i in evenly(len(source), most):
        try:
            pixels = source.read(i, int(channels))
        except BadImage as error:
            left_out[name_in(source, i)] = reason_of(error, source, i)
            continue
        waiting.append((resized(pixels, rule, (height, width)), labels[i]))
        if len(waiting) == batch:
            ask()
    ask()
    if not seen:
        raise BadInput(f"{source.location}: no image can be read: {named(left_out)}")
    return {"top-1": 100 * right / seen}, Selection(str(source.location), seen, len(source), left_out)


def measure(runtime: Runtime, directory: Path, data: Path, most: int) -> dict[str, float]:
    """AP of a detector, mIoU of a segmentor, in percent, on its dataset's validation images.

    Raises:
        BadInput: the room that computes it is not installed, or the dataset does not fit.
    """
    graph = runtime.spec.graph
    for entry in metadata.entry_points(group="coma.measure", name=graph):
        task: Measure = entry.load()
        return task(directory, data, lambda images: runtime(_again(images, runtime)), most)
    raise BadInput(f"--dataset: nothing installed here measures a {graph}; install coma-dyvit[downstream]")


def _again(images: Tensor, runtime: Runtime) -> Tensor:
    """Normalised images as pixels, for files that normalise themselves."""
    rule = runtime.spec.preprocessing
    if not rule.normalize_in_graph:
        return images
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (rule.mean, rule.std))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
