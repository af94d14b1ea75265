"""Samples and batches of the training stream, and how each of them is made."""

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
from coma.data.pixel_values import check_pixels, filled_share
from coma.data.shuffle import permuted_indices, sample_seeds, uniforms
from coma.data.sources.base import Source
from coma.data.transforms import Box, random_crop, resize, scaled_box, stack
from coma.errors import BadImage, BadInput
from coma.ranges import BATCH

MAX_ATTEMPTS = 100
"""Images tried in place of one that will not decode, before the data are refused."""


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is shared out."""

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
                f"batch size {self.global_batch} is no multiple of {together} images per pass "
                f"({self.micro_batch} on each of {self.world} processes)"
            )

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step."""
        return self.global_batch // (self.micro_batch * self.world)

    def micro_batch_starts(self, start: int) -> Iterator[int]:
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
    labels: Tensor | None = None
    """int64 `[B]`, where the samples are to be learned with their labels."""
    filled: tuple[str, ...] = ()
    """`path: how much` of every image whose missing values were filled."""

    def pin_memory(self, device: object = None) -> Batch:
        """The same batch in page-locked memory (the loader calls this)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            seeds=self.seeds.pin_memory(),
            indices=self.indices.pin_memory(),
            labels=self.labels if self.labels is None else self.labels.pin_memory(),
        )


@dataclass(frozen=True)
class UnstackedBatch:
    """Samples before they are one tensor, the first of them at position `first`; otherwise like `Batch`."""

    first: int
    views: list[Any]
    seeds: Tensor
    indices: Tensor
    failures: tuple[str, ...]
    filled: tuple[str, ...] = ()

    def stacked(self) -> Batch:
        """The batch."""
        return Batch(stack(self.views), self.seeds, self.indices, self.failures, filled=self.filled)


class OpenedImage(NamedTuple):
    """A decoded image, perhaps at a reduced scale."""

    pixels: np.ndarray
    height: int
    """At full scale, as `width`."""
    width: int
    filled: str = ""
    """How much of it was missing, if anything was."""


@dataclass(frozen=True)
class SampleFetcher:
    """Samples of the stream; what becomes of an image is in `open` and `view`."""

    source: Source
    data: DataConfig
    channels: int
    seed: int
    count: int

    def samples(self, first: int) -> UnstackedBatch:
        """Samples `first` to `first + count`."""
        n = len(self.source)
        positions = np.arange(first, first + self.count)
        seeds = sample_seeds(self.seed, positions)
        places, repeats = np.unique(positions // self.data.aug_repeats, return_counts=True)
        chosen = permuted_indices(self.seed, places // n, places % n, n)
        views, indices, failures, filled = [], [], [], []
        for place, index, count in zip(places.tolist(), chosen.tolist(), repeats.tolist(), strict=True):
            image, used, failed = self._readable(place, index)
            for seed in seeds[len(views) : len(views) + count].tolist():
                views.append(self.view(image, seed))
                indices.append(used)
            failures.extend(failed)
            if isinstance(image, OpenedImage) and image.filled:
                filled.append(f"{self.source.describe(used)}: {image.filled}")
        seeds = torch.from_numpy(seeds)
        return UnstackedBatch(first, views, seeds, torch.tensor(indices), tuple(failures), tuple(filled))

    def open(self, index: int, place: int) -> Any:
        """Image `index`, for the samples at `place` in the order, as `view` takes it.

        Raises:
            BadImage: it cannot be read or decoded, or its channels do not fit.
            BadInput: the run's mean and standard deviation are not meant for such pixels.
        """
        full: list[tuple[int, int]] = []

        def min_side(height: int, width: int) -> int:
            full.append((height, width))
            return self._enough(place, height, width)

        picture = self.source.decode(index, min_side)
        pixels = convert_channels(picture, self.channels, self.source.describe(index))
        check_pixels(pixels, self.data.mean, self.data.std, lambda: self.source.describe(index))
        filled = "" if picture.missing is None else filled_share(picture)
        height, width = full[0] if full else pixels.shape[:2]
        return OpenedImage(pixels, height, width, filled)

    def view(self, image: Any, seed: int) -> Any:
        """A sample from an opened image."""
        size = self.data.image_size
        box, flipped = self.crop(image.height, image.width, seed)
        view = resize(
            image.pixels, scaled_box(box, (image.height, image.width), image.pixels.shape), size, size
        )
        return view.flip(-1) if flipped else view

    def crop(self, height: int, width: int, seed: int) -> tuple[Box, bool]:
        """Which part of an image a sample shows, and whether it is flipped."""
        draws = uniforms(seed)
        flipped = next(draws) < 0.5
        return random_crop(height, width, self.data.crop_scale, draws), self.data.flip and flipped

    def _readable(self, place: int, index: int) -> tuple[Any, int, list[str]]:
        """Image `index`, at `place` in the order, or the next readable one of the epoch; and what failed."""
        n = len(self.source)
        failures: list[str] = []
        for step in range(min(n, MAX_ATTEMPTS)):
            if step:
                rank = np.array([(place + step) % n])
                index = int(permuted_indices(self.seed, np.array([place // n]), rank, n)[0])
            try:
                return self.open(index, place), index, failures
            except BadImage as error:
                if self.data.on_bad_image == "stop":
                    raise
                failures.append(str(error))
        row = f"{len(failures)} images in a row could not be used"
        raise BadInput(f"{self.source.location}: {row}; the last: {failures[-1]}")

    def _enough(self, place: int, height: int, width: int) -> int:
        """Smallest image side for which no crop at `place` is enlarged, whichever pass it is part of."""
        repeats = self.data.aug_repeats
        seeds = sample_seeds(self.seed, np.arange(place * repeats, (place + 1) * repeats))
        boxes = (self.crop(height, width, seed)[0] for seed in seeds.tolist())
        smallest = min(min(box[2:]) for box in boxes)
        return math.ceil(self.data.image_size * min(height, width) / smallest)


class TrainingFetcher(SampleFetcher):
    """The batch whose first sample has a given position in the stream."""

    def __call__(self, first: int) -> Batch:
        """Samples `first` to `first + count`."""
        return self.samples(first).stacked()
