"""Samples and batches of the training stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coma.config import DataConfig
from coma.data.channels import convert_channels
from coma.data.image import Box
from coma.data.pixel_values import check_pixels, describe_filled
from coma.data.shuffle import permuted_indices, sample_seeds, uniforms
from coma.data.sources.base import Source
from coma.data.transforms import random_crop, resize, scaled_box, stack
from coma.errors import BadImage, BadInput
from coma.ranges import BATCH

MAX_ATTEMPTS = 100
"""Number of consecutive images that may fail to decode before the data are refused."""


@dataclass(frozen=True)
class BatchLayout:
    """Division of a global batch among processes and forward passes."""

    global_batch: int
    """Images per optimizer step."""
    micro_batch: int
    """Images per process and forward pass."""
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        BATCH.check("--batch-size", self.global_batch)
        BATCH.check("--micro-batch", self.micro_batch)
        together = self.micro_batch * self.world
        if self.global_batch % together:
            raise BadInput(
                f"batch size {self.global_batch} is not a multiple of {together} images per pass "
                f"({self.micro_batch} on each of {self.world} processes)"
            )

    @property
    def accumulation(self) -> int:
        """Number of forward passes per optimizer step."""
        return self.global_batch // (self.micro_batch * self.world)

    def micro_batch_starts(self, start: int) -> Iterator[int]:
        """Yields, without end, the position of this process's first sample in every pass from `start`."""
        return itertools.count(start + self.rank * self.micro_batch, self.micro_batch * self.world)


@dataclass(frozen=True)
class Batch:
    """Images and what identifies them."""

    images: Tensor
    """`[B, C, H, W]` uint8, or float32: 16-bit data are scaled to 0..1, float data are unchanged."""
    seeds: Tensor
    """int64 `[B]`: the random seed of each sample."""
    indices: Tensor
    """int64 `[B]`: positions in the source."""
    failures: tuple[str, ...] = ()
    """`path: reason` of every image that was skipped."""
    labels: Tensor | None = None
    """int64 `[B]`, or float32 `[B, classes]` for any number per image; None in self-supervised training."""
    filled: tuple[str, ...] = ()
    """`path: share` of every image whose missing values were filled."""

    def pin_memory(self, device: object = None) -> Batch:
        """Returns the batch in page-locked memory."""
        return replace(
            self,
            images=self.images.pin_memory(),
            seeds=self.seeds.pin_memory(),
            indices=self.indices.pin_memory(),
            labels=self.labels if self.labels is None else self.labels.pin_memory(),
        )


@dataclass(frozen=True)
class UnstackedBatch:
    """Samples that are not stacked into one tensor yet; `first` is the stream position of the first one."""

    first: int
    views: list[Any]
    seeds: Tensor
    indices: Tensor
    failures: tuple[str, ...]
    filled: tuple[str, ...] = ()

    def stack(self) -> Batch:
        """Returns the batch."""
        return Batch(stack(self.views), self.seeds, self.indices, self.failures, filled=self.filled)


class OpenedImage(NamedTuple):
    """A decoded image, possibly at a reduced scale."""

    pixels: np.ndarray
    height: int
    """Height at full scale."""
    width: int
    """Width at full scale."""
    filled: str = ""
    """Share of missing values of the image, in words; empty if none was missing."""


@dataclass(frozen=True)
class SampleFetcher:
    """Reads samples of the stream. `open` reads an image, and `view` makes a sample of it."""

    source: Source
    data: DataConfig
    channels: int
    seed: int
    count: int

    def samples(self, first: int) -> UnstackedBatch:
        """Returns samples `first` to `first + count`."""
        positions = np.arange(first, first + self.count)
        seeds = sample_seeds(self.seed, positions)
        places, repeats = np.unique(positions // self.data.aug_repeats, return_counts=True)
        chosen = self._indices(places)
        self.source.prefetch(chosen.tolist())
        views, indices, failures, filled = [], [], [], []
        for place, index, count in zip(places.tolist(), chosen.tolist(), repeats.tolist(), strict=True):
            image, used, failed = self._open_readable(place, index)
            for seed in seeds[len(views) : len(views) + count].tolist():
                views.append(self.view(image, seed))
                indices.append(used)
            failures.extend(failed)
            if isinstance(image, OpenedImage) and image.filled:
                filled.append(f"{self.source.describe(used)}: {image.filled}")
        seeds = torch.from_numpy(seeds)
        return UnstackedBatch(first, views, seeds, torch.tensor(indices), tuple(failures), tuple(filled))

    def _indices(self, places: np.ndarray) -> np.ndarray:
        """Returns the images at `places [b]` of the order of all epochs."""
        n, blocks = len(self.source), self.source.blocks
        if blocks is not None:
            return blocks.indices(self.seed, places // n, places % n)
        return permuted_indices(self.seed, places // n, places % n, n)

    def open(self, index: int, place: int) -> Any:
        """Returns image `index` for the samples at `place` in the order, as `view` takes it.

        Raises:
            BadImage: The image cannot be read or decoded, or has the wrong number of channels.
            BadInput: The run's mean and standard deviation do not fit the pixels.
        """
        full: list[tuple[int, int]] = []

        def min_side(height: int, width: int) -> int:
            full.append((height, width))
            return self._min_side(place, height, width)

        picture = self.source.decode(index, min_side)
        pixels = convert_channels(picture, self.channels, self.source.describe(index))
        check_pixels(pixels, self.data.mean, self.data.std, lambda: self.source.describe(index))
        filled = "" if picture.missing is None else describe_filled(picture)
        height, width = full[0] if full else pixels.shape[:2]
        return OpenedImage(pixels, height, width, filled)

    def view(self, image: Any, seed: int) -> Any:
        """Returns a sample of an opened image."""
        box, flipped = self.crop(image.height, image.width, seed)
        box = scaled_box(box, (image.height, image.width), image.pixels.shape)
        view = resize(image.pixels, box, *self.data.image_size)
        return view.flip(-1) if flipped else view

    def crop(self, height: int, width: int, seed: int) -> tuple[Box, bool]:
        """Returns the part of an image that a sample shows, and whether it is flipped."""
        draws = uniforms(seed)
        flipped = next(draws) < 0.5
        box = random_crop(height, width, self.data.crop_scale, draws, self.data.image_size)
        return box, self.data.flip and flipped

    def _open_readable(self, place: int, index: int) -> tuple[Any, int, list[str]]:
        """Opens image `index`, at `place` in the order, or the next readable one of the epoch.

        Returns:
            The image, its index, and the errors of the images that were skipped.
        """
        n = len(self.source)
        failures: list[str] = []
        for step in range(min(n, MAX_ATTEMPTS)):
            if step:
                index = int(self._indices(np.array([place // n * n + (place + step) % n]))[0])
            try:
                return self.open(index, place), index, failures
            except BadImage as error:
                if self.data.on_bad_image == "stop":
                    raise
                failures.append(str(error))
        row = f"{len(failures)} images in a row could not be used"
        raise BadInput(f"{self.source.location}: {row}; the last: {failures[-1]}")

    def _min_side(self, place: int, height: int, width: int) -> int:
        """The smallest image side at which none of the crops at `place` is enlarged."""
        repeats = self.data.aug_repeats
        seeds = sample_seeds(self.seed, np.arange(place * repeats, (place + 1) * repeats))
        boxes = (self.crop(height, width, seed)[0] for seed in seeds.tolist())
        short, size = min(height, width), self.data.image_size
        return max(
            math.ceil(target * short / side)
            for box in boxes
            for target, side in zip(size, box[2:], strict=True)
        )


class TrainingFetcher(SampleFetcher):
    """Reads the batch that begins at a given position of the stream."""

    def __call__(self, first: int) -> Batch:
        """Returns samples `first` to `first + count`."""
        return self.samples(first).stack()
