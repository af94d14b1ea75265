"""The stream of training samples, cut into batches the same way for any number of processes.

Sample s of the stream belongs to optimizer step s // G (G: the global batch). Inside a step, accumulation
step a of process r takes rows a*m*W + r*m ... + m (m: micro batch, W: processes). Everything about a
sample, from the file to the flip, follows from the run's seed and s (see `order`), so batches are the
same for any number of workers, and what a run has consumed is one integer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pretrain.config import DataConfig
from pretrain.data.order import sample_seeds, shuffled, uniforms
from pretrain.data.source import Source
from pretrain.data.transforms import RATIO, centre_square, random_crop, resize, stack
from pretrain.data.workers import in_workers
from pretrain.errors import BadImage, BadInput

MOST_TRIES = 100
"""Images tried in place of one that will not decode, before the data are refused."""


@dataclass(frozen=True)
class Slices:
    """How a global batch is shared out."""

    global_batch: int
    """Images per optimizer step."""
    micro_batch: int
    """Images per process and forward pass."""
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if min(self.global_batch, self.micro_batch) < 1:
            raise BadInput(f"batch sizes must be at least 1, got {self.global_batch} and {self.micro_batch}")
        together = self.micro_batch * self.world
        if self.global_batch % together:
            raise BadInput(
                f"batch size {self.global_batch} is no multiple of {together} images per pass "
                f"({self.micro_batch} on each of {self.world} processes)"
            )

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return self.global_batch // (self.micro_batch * self.world)

    def first_rows(self, start: int) -> Iterator[int]:
        """Stream position of this process's first sample of every pass, from `start` on, without end."""
        return itertools.count(start + self.rank * self.micro_batch, self.micro_batch * self.world)


@dataclass(frozen=True)
class Batch:
    """Images with what identifies them."""

    images: Tensor
    """`[B, C, S, S]` uint8, or float32: 16-bit data scaled to 0..1, float data as they are."""
    seeds: Tensor
    """int64 `[B]`, the samples' own randomness."""
    indices: Tensor
    """int64 `[B]`, positions in the source."""
    failures: tuple[str, ...] = ()
    """`path: reason` of every image that was tried and left out."""

    def pin_memory(self, device: object = None) -> Batch:
        """The same batch in page-locked memory (the loader calls this)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            seeds=self.seeds.pin_memory(),
            indices=self.indices.pin_memory(),
        )


def training_batches(
    source: Source,
    data: DataConfig,
    *,
    channels: int,
    seed: int,
    batch: Slices,
    start: int = 0,
    device_pin: bool = False,
) -> Iterator[Batch]:
    """Random crops, without end; call `close()` on the iterator to stop its workers early.

    Args:
        source: the images.
        data: crop, flip, workers, and what to do about images that will not decode.
        channels: of the batches; see `adapt` for what is converted.
        seed: of the run.
        batch: this process's share.
        start: samples consumed so far by whole optimizer steps.
        device_pin: whether batches go to a GPU.

    Raises:
        BadImage: while iterating, an image will not decode and `data.on_bad_image` is "stop".
        BadInput: while iterating, no image in a long row decodes.
    """
    if start < 0 or start % batch.global_batch:
        raise ValueError(f"start {start} is not a whole number of batches of {batch.global_batch}")
    fetch = _TrainingFetch(source, data, channels, seed, batch.micro_batch)
    return in_workers(fetch, batch.first_rows(start), data.workers, pin=device_pin)


def evaluation_batches(
    source: Source, *, image_size: int, channels: int, batch_size: int, workers: int | None = None
) -> Iterator[Batch]:
    """Every image once, in order: its largest centred square, resized; bad ones are left out and named.

    Raises:
        BadInput: while iterating, not a single image is readable.
    """
    fetch = _EvaluationFetch(source, image_size, channels, batch_size)
    held: Batch | None = None
    for batch in in_workers(fetch, range(0, len(source), batch_size), workers):
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
class _TrainingFetch:
    source: Source
    data: DataConfig
    channels: int
    seed: int
    count: int

    def __call__(self, first: int) -> Batch:
        n = len(self.source)
        positions = np.arange(first, first + self.count)
        seeds = sample_seeds(self.seed, positions)
        places, repeats = np.unique(positions // self.data.repeats, return_counts=True)
        chosen = shuffled(self.seed, places // n, places % n, n)
        images, indices, failures = [], [], []
        for place, index, count in zip(places.tolist(), chosen.tolist(), repeats.tolist(), strict=True):
            pixels, used, failed = self._readable(place, index)
            for seed in seeds[len(images) : len(images) + count].tolist():
                images.append(self._view(pixels, seed))
                indices.append(used)
            failures.extend(failed)
        return Batch(stack(images), torch.from_numpy(seeds), torch.tensor(indices), tuple(failures))

    def _readable(self, place: int, index: int) -> tuple[np.ndarray, int, list[str]]:
        """Image `index`, at `place` in the order, or the next readable one of the epoch; and what failed."""
        n = len(self.source)
        failures: list[str] = []
        for step in range(min(n, MOST_TRIES)):
            if step:
                rank = np.array([(place + step) % n])
                index = int(shuffled(self.seed, np.array([place // n]), rank, n)[0])
            try:
                return self.source.read(index, self.channels, self._at_least), index, failures
            except BadImage as error:
                if self.data.on_bad_image == "stop":
                    raise
                failures.append(str(error))
        row = f"{len(failures)} images in a row could not be used"
        raise BadInput(f"{self.source.location}: {row}; the last: {failures[-1]}")

    @property
    def _at_least(self) -> int:
        """Smallest image side for which even the smallest crop is not enlarged."""
        smallest = math.sqrt(self.data.crop_scale[0] * RATIO[0])
        return math.ceil(self.data.image_size / smallest)

    def _view(self, pixels: np.ndarray, seed: int) -> Tensor:
        draws, size = uniforms(seed), self.data.image_size
        flipped = next(draws) < 0.5
        box = random_crop(pixels.shape[0], pixels.shape[1], self.data.crop_scale, draws)
        view = resize(pixels, box, size, size)
        return view.flip(-1) if self.data.flip and flipped else view


@dataclass(frozen=True)
class _EvaluationFetch:
    source: Source
    image_size: int
    channels: int
    count: int

    def __call__(self, first: int) -> Batch:
        size = self.image_size
        images, indices, failures = [], [], []
        for index in range(first, min(first + self.count, len(self.source))):
            try:
                pixels = self.source.read(index, self.channels, at_least=size)
            except BadImage as error:
                failures.append(str(error))
                continue
            images.append(resize(pixels, centre_square(*pixels.shape[:2]), size, size))
            indices.append(index)
        stacked = stack(images) if images else torch.empty(0, self.channels, size, size, dtype=torch.uint8)
        seeds = torch.from_numpy(sample_seeds(0, np.array(indices, np.int64)))
        return Batch(stacked, seeds, torch.tensor(indices, dtype=torch.int64), tuple(failures))
