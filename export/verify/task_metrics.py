"""Metrics of a task (top-1, AP, mIoU) on labelled images, in percent, for PyTorch and for exported files.

Top-1 is computed here. AP and mIoU are computed by the room that trained the model, with the metrics of its
library; it registers them under the entry points `coma.measure`.
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
from coma.runtimes.model_spec import GraphKind
from coma.runtimes.preprocessing import resize_image, to_input
from export.image_sets import name_in, reason_of
from export.preprocessing import evenly_spaced

Run = Callable[[Tensor], dict[str, Tensor]]
"""Runs normalised float32 images `[1, c, H, W]` and returns outputs by name."""


class Measure(Protocol):
    """Function behind an entry point `coma.measure`; there is one for each kind of artifact."""

    def __call__(self, directory: Path, data: Path, most: int) -> Callable[[Run], dict[str, float]]:
        """Opens up to `most` validation images; returns a function of a `Run` to its scores in percent."""
        ...


def top1(runtime: Runtime, source: Source, most: int) -> tuple[dict[str, float], Selection]:
    """Returns the top-1 accuracy in percent, and the images that it was measured on.

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

    def run_batch() -> None:
        nonlocal right, seen
        if not waiting:
            return
        images = [image for image, _ in waiting]
        images += images[:1] * (batch - len(images))  # fills up the last batch of a fixed size
        guessed = runtime(to_input(images, rule))["logits"].argmax(dim=1).tolist()
        right += sum(guess == label for guess, (_, label) in zip(guessed, waiting, strict=False))
        seen += len(waiting)
        waiting.clear()

    for i in evenly_spaced(len(source), most):
        try:
            pixels = source.read(i, int(channels))
        except BadImage as error:
            left_out[name_in(source, i)] = reason_of(error, source, i)
            continue
        waiting.append((resize_image(pixels, rule, (height, width)), labels[i]))
        if len(waiting) == batch:
            run_batch()
    run_batch()
    if not seen:
        raise BadInput(f"{source.location}: no image can be read: {named(left_out)}")
    return {"top-1": 100 * right / seen}, Selection(str(source.location), seen, len(source), left_out)


def open_metric(
    graph: GraphKind, directory: Path, data: Path, most: int
) -> Callable[[Runtime], dict[str, float]]:
    """Opens the validation images of a dataset; returns a function of a runtime to its scores in percent.

    The scores are the AP of a detector, or the mIoU of a segmentor.

    Raises:
        BadInput: the room that computes the metric is not installed, or the dataset does not fit the model.
    """
    for entry in metadata.entry_points(group="coma.measure", name=graph):
        task: Measure = entry.load()
        measured = task(directory, data, most)
        return lambda runtime: measured(lambda images: runtime(_as_file_input(images, runtime)))
    raise BadInput(f"--dataset: no installed package measures a {graph}; install coma-dyvit[downstream]")


def _as_file_input(images: Tensor, runtime: Runtime) -> Tensor:
    """Returns normalised images as pixels for a file that normalises in its graph."""
    rule = runtime.spec.preprocessing
    if not rule.normalize_in_graph:
        return images
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (rule.mean, rule.std))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
