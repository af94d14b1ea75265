"""The stream of training samples, divided into batches in the same way for any number of processes.

Sample s of the stream belongs to optimizer step s // G (G: global batch). Within a step, accumulation step a
of process r takes the rows from a*m*W + r*m to a*m*W + r*m + m (m: micro batch, W: number of processes). The
file, the crop and the flip of a sample follow from the run's seed and s (see `shuffle`), so batches are the
same for any number of workers, and the state of a loader is the number of samples consumed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from coma.config import DataConfig
from coma.data.batches import Batch, BatchLayout, TrainingFetcher
from coma.data.shuffle import sample_seeds
from coma.data.sources.base import Source
from coma.data.transforms import centre_crop, normalize, resize, stack
from coma.data.worker_pool import map_ordered
from coma.errors import BadImage, BadInput
from coma.image_size import ImageSize


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
    """Yields batches of random crops without end. Call `close()` on the iterator to stop its workers early.

    Args:
        source: Images.
        data: Crop, flip, workers, and what happens if an image does not decode.
        channels: Number of channels of the batches; see `convert_channels`.
        seed: Seed of the run.
        batch: This process's share of the global batch.
        start: Number of samples that whole optimizer steps have consumed so far.
        device: Target device; batches for a GPU are in page-locked memory.

    Raises:
        BadImage: While iterating: an image does not decode and `data.on_bad_image` is "stop".
        BadInput: DALI is requested and cannot be used. While iterating: many images in a row do not decode.
    """
    check_start(start, batch)
    on_gpu = _is_gpu(device)
    check_loader(data, channels)
    if data.loader == "dali":
        from coma.data.dali import CropFetcher, dali_batches

        crops = CropFetcher(source, data, channels, seed, batch.micro_batch)
        return dali_batches(crops, batch.micro_batch_starts(start), on_gpu)
    fetch = TrainingFetcher(source, data, channels, seed, batch.micro_batch)
    return map_ordered(fetch, batch.micro_batch_starts(start), data.workers, pin=on_gpu)


def _is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def check_start(start: int, batch: BatchLayout) -> None:
    """Checks that a position in the stream is the beginning of an optimizer step.

    Raises:
        ValueError: It is not a multiple of the global batch.
    """
    if start < 0 or start % batch.global_batch:
        raise ValueError(f"start {start} is not a whole number of batches of {batch.global_batch}")


def check_loader(data: DataConfig, channels: int) -> None:
    """Checks that the loader can be used here.

    Raises:
        BadInput: DALI is not installed, or does not support this number of channels.
    """
    if data.loader == "dali":
        from coma.data.dali import check_dali

        check_dali(channels)


def evaluation_batches(
    source: Source,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    batch_size: int,
    workers: int | None = None,
    device: torch.device | None = None,
) -> Generator[Batch, None, None]:
    """Yields every image once, in order, as its resized centre crop; unreadable ones are skipped and named.

    The crop is the largest box in the middle that has the shape of `image_size`: the side of a square, or
    height and width. Batches have at least one image; those for a GPU as `device` are in page-locked memory.

    Raises:
        BadInput: While iterating: no image is readable.
    """
    fetch = _EvaluationFetcher(source, ImageSize.of(image_size), channels, batch_size)
    held: Batch | None = None  # empty batches pass their failures on to a neighbour
    starts = range(0, len(source), batch_size)
    for batch in map_ordered(fetch, starts, workers, pin=_is_gpu(device)):
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


def normalized_batches(
    source: Source,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    image_size: int | tuple[int, int],
    channels: int,
    batch_size: int,
    workers: int | None = None,
    device: torch.device | str = "cpu",
) -> Generator[tuple[Tensor, Batch], None, None]:
    """Yields the images of `evaluation_batches`, float32 `[b, C, H, W]` on the device, and their batches.

    Close the iterator to stop its workers early.

    Args:
        source: Images.
        mean: Mean per channel, of pixels scaled to 0..1.
        std: Standard deviation per channel.
        image_size: Side of the square crops, or height and width.
        channels: Number of channels to read.
        batch_size: Number of images of a batch.
        workers: Number of processes that decode images.
        device: Device to compute on.

    Raises:
        BadInput: While iterating: no image is readable.
    """
    device = torch.device(device)
    statistics = [torch.tensor(values, device=device) for values in (mean, std)]
    batches = evaluation_batches(
        source,
        image_size=image_size,
        channels=channels,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    with closing(batches):
        for batch in batches:
            yield normalize(batch.images.to(device, non_blocking=True), *statistics), batch


@dataclass(frozen=True)
class _EvaluationFetcher:
    source: Source
    size: ImageSize
    channels: int
    count: int

    def __call__(self, first: int) -> Batch:
        images, indices, failures = [], [], []
        chosen = range(first, min(first + self.count, len(self.source)))
        self.source.prefetch(chosen)
        for index in chosen:
            try:
                pixels = self.source.read(index, self.channels, min_side=max(self.size))
            except BadImage as error:
                failures.append(str(error))
                continue
            height, width = pixels.shape[:2]
            images.append(resize(pixels, centre_crop(height, width, self.size), *self.size))
            indices.append(index)
        none = torch.empty(0, self.channels, *self.size, dtype=torch.uint8)
        stacked = stack(images) if images else none
        seeds = torch.from_numpy(sample_seeds(0, np.array(indices, np.int64)))
        return Batch(stacked, seeds, torch.tensor(indices, dtype=torch.int64), tuple(failures))
