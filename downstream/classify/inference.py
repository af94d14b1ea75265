"""Runs a classifier on images, in any runtime."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coma.data import Source
from coma.errors import BadInput, CheckFailed
from coma.runtimes.base import Runtime
from coma.runtimes.find import DeviceName, open_model
from coma.runtimes.image_batches import Resize, channels_of, image_batches
from coma.runtimes.names import RuntimeName
from coma.runtimes.preprocessing import to_input


@dataclass(frozen=True)
class Probabilities:
    """Probabilities of the classes of some images.

    Attributes:
        values: float32 `[b, classes]` on the CPU.
        indices: Position of each image in the source.
        failures: One line for each image that was skipped.
    """

    values: Tensor
    indices: list[int]
    failures: list[str]


def open_classifier(path: Path, runtime: RuntimeName = "auto", device: DeviceName = "auto") -> Runtime:
    """Opens a classifier: an artifact, an exported file, or a folder of exports; see `open_model`.

    Raises:
        BadInput: As `open_model`.
        CheckFailed: The runtime refuses the file.
    """
    return open_model(path, "classifier", runtime, device)


def class_names_of(classifier: Runtime) -> tuple[str, ...]:
    """Returns the class names of a classifier, numbers if it has none."""
    spec = classifier.spec
    return spec.class_names or tuple(map(str, range(int(spec.outputs[0].axes[1]))))


def classify_images(
    classifier: Runtime,
    source: Source,
    ranges: Sequence[range] | None = None,
    *,
    batch_size: int = 64,
    workers: int | None = None,
) -> Generator[Probabilities, None, None]:
    """Yields the probabilities of the images, in order; unreadable images are skipped and named.

    Images are preprocessed as the classifier specifies. Close the iterator to stop its workers early.

    Args:
        classifier: From `open_classifier`.
        source: Images.
        ranges: Positions of the images in the source, none of them empty; a batch has images of one range.
            None: all images.
        batch_size: Images per forward pass; smaller if an engine takes fewer. Files with a fixed batch size
            get batches of that size.
        workers: Number of processes that decode images; None chooses by the number of cores.

    Raises:
        CheckFailed: While iterating: outputs that are not finite.
    """
    spec = classifier.spec
    rule, (batch, _, *sides) = spec.preprocessing, spec.inputs[0].axes
    fixed = batch if isinstance(batch, int) else None
    count = fixed or min(batch_size, getattr(classifier, "largest_batch", None) or batch_size)
    usual = rule.size or (224, 224)
    height, width = (side if isinstance(side, int) else own for side, own in zip(sides, usual, strict=True))
    resize = Resize(rule, (height, width))
    batches = image_batches(
        source,
        [
            range(at, min(at + count, part.stop))
            for part in ([range(len(source))] if ranges is None else ranges)
            for at in range(part.start, part.stop, count)
        ],
        channels=channels_of(spec),
        resize=resize,
        preprocessing=rule,
        min_side=resize.min_side,
        workers=workers,
    )
    with closing(batches):
        for each in batches:
            found = torch.empty(0, len(class_names_of(classifier)))
            if here := len(each.images):
                images = each.images + each.images[:1] * ((fixed or here) - here)
                logits = classifier(to_input(images, rule))["logits"][:here].float().cpu()
                if not logits.isfinite().all():
                    raise CheckFailed(f"{source.describe(each.indices[0])}: the outputs are not finite")
                found = spec.probabilities(logits)
            yield Probabilities(found, each.indices, each.failures)


def none_readable(source: Source, failures: Sequence[str]) -> BadInput:
    """Returns the error of a source of which no image could be read."""
    return BadInput(
        f"{source.location}: none of {len(source):,} images could be read; the first: {failures[0]}"
    )
