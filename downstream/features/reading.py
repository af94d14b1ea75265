"""From images to the features of a part."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from coma.data import Source
from coma.paths import Location
from coma.runtimes.image_batches import image_batches
from downstream.features.files import Rows, storable
from downstream.features.models import FeatureModel


@dataclass(frozen=True)
class Reading:
    """How images are read."""

    images: Location
    split: str | None = None
    batch_size: int = 64
    workers: int | None = None
    tiles: int | None = None


def compute_parts(
    model: FeatureModel,
    source: Source,
    names: list[str],
    reading: Reading,
    ranges: list[range],
    progress: Callable[[int], object] = lambda count: None,
) -> Generator[tuple[Rows, list[str]], None, None]:
    """Yields the rows of every range of images, and a line for each image that could not be read.

    Args:
        model: The model.
        source: Images.
        names: Their names.
        reading: Images per forward pass, and worker processes.
        ranges: Positions in the source.
        progress: Called with the number of images of every batch.
    """
    batches = [
        (number, range(at, min(at + reading.batch_size, part.stop)))
        for number, part in enumerate(ranges)
        for at in range(part.start, part.stop, reading.batch_size)
    ]
    read = image_batches(
        source,
        [batch for _, batch in batches],
        channels=model.channels,
        resize=model.resize,
        preprocessing=model.preprocessing,
        min_side=model.min_side,
        workers=reading.workers,
    )
    with closing(read):
        for _, group in groupby(batches, key=lambda each: each[0]):
            paths: list[str] = []
            values = [np.empty((0, *model.spec.shape), np.float32)]
            failures: list[str] = []
            for _, batch in zip(group, read, strict=False):
                failures += batch.failures
                if batch.images:
                    values.append(model(batch.images))
                    paths += [storable(names[i]) for i in batch.indices]
                progress(len(batch.images) + len(batch.failures))
            yield Rows(paths, np.concatenate(values)), failures
