"""The stream of training samples, cut into batches the same way for any number of processes.

Sample s of the stream belongs to optimizer step s // G (G: the global batch). Inside a step, accumulation
step a of process r takes rows a*m*W + r*m ... + m (m: micro batch, W: processes). Everything about a
sample, from the file to the flip, follows from the run's seed and s (see `order`), so batches are the
same for any number of workers, and what a run has consumed is one integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from coma.config import DataConfig
from coma.data.batches import Batch, BatchLayout, TrainingFetcher
from coma.data.shuffle import sample_seeds
from coma.data.sources.base import Source
from coma.data.transforms import centre_square, resize, stack
from coma.data.worker_pool import map_ordered
from coma.errors import BadImage, BadInput


def training_batches(
    source: Source,
    data: DataConfig,
    *,
    channels: int,
    seed: int,
    batch: BatchLayout,
    start: int = 0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Random crops, without end; call `close()` on the iterator to stop its workers early.

    Args:
        source: the images.
        data: crop, flip, workers, and what to do about images that will not decode.
        channels: of the batches; see `convert_channels` for what is converted.
        seed: of the run.
        batch: this process's share.
        start: samples consumed so far by whole optimizer steps.
        device: where they will be needed: what goes to a GPU is pinned.

    Raises:
        BadImage: while iterating, an image will not decode and `data.on_bad_image` is "stop".
        BadInput: DALI was asked for and cannot be used; while iterating, no image in a long row decodes.
    """
    check_start(start, batch)
    on_gpu = device is not None and device.type == "cuda"
    check_loader(data, channels)
    if data.loader == "dali":
        from coma.data.dali import CropFetcher, decoded

        crops = CropFetcher(source, data, channels, seed, batch.micro_batch)
        return decoded(crops, batch.micro_batch_starts(start), on_gpu)
    fetch = TrainingFetcher(source, data, channels, seed, batch.micro_batch)
    return map_ordered(fetch, batch.micro_batch_starts(start), data.workers, pin=on_gpu)


def check_start(start: int, batch: BatchLayout) -> None:
    """Refuse a position in the stream at which no optimizer step begins.

    Raises:
        ValueError: it is not a whole number of global batches.
    """
    if start < 0 or start % batch.global_batch:
        raise ValueError(f"start {start} is not a whole number of batches of {batch.global_batch}")


def check_loader(data: DataConfig, channels: int) -> None:
    """Refuse a loader that cannot be used here.

    Raises:
        BadInput: DALI is not installed, or does not make images of so many channels.
    """
    if data.loader == "dali":
        from coma.data.dali import check_dali

        check_dali(channels)


def evaluation_batches(
    source: Source, *, image_size: int, channels: int, batch_size: int, workers: int | None = None
) -> Iterator[Batch]:
    """Every image once, in order: its largest centred square, resized; bad ones are left out and named.

    Raises:
        BadInput: while iterating, not a single image is readable.
    """
    fetch = _EvaluationFetcher(source, image_size, channels, batch_size)
    held: Batch | None = None
    for batch in map_ordered(fetch, range(0, len(source), batch_size), workers):
        if held is None or not len(held.indices):
            held = replace(batch, failures=(*(held.failures if held else ()), *batch.failures))
        elif not len(batch.indices):
            held = replace(held, failures=held.failures + batch.failures)
        else:
            yield held
            held = batch
    if held is None or not len(held.indices):
        first = held.failures[0] if held and held.failures else "there is none"
        raise BadInput(f"{source.location}: no image could be read; the first: {first}")
    yield held


@dataclass(frozen=True)
class _EvaluationFetcher:
    source: Source
    image_size: int
    channels: int
    count: int

    def __call__(self, first: int) -> Batch:
        size = self.image_size
        images, indices, failures = [], [], []
        for index in range(first, min(first + self.count, len(self.source))):
            try:
                pixels = self.source.read(index, self.channels, min_side=size)
            except BadImage as error:
                failures.append(str(error))
                continue
            images.append(resize(pixels, centre_square(*pixels.shape[:2]), size, size))
            indices.append(index)
        stacked = stack(images) if images else torch.empty(0, self.channels, size, size, dtype=torch.uint8)
        seeds = torch.from_numpy(sample_seeds(0, np.array(indices, np.int64)))
        return Batch(stacked, seeds, torch.tensor(indices, dtype=torch.int64), tuple(failures))
