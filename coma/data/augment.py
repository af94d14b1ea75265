"""Labelled training samples: the crops of pre-training, then RandAugment, all from the seed of the sample.

RandAugment (Cubuk et al. 2020, arXiv 1909.13719) is timm's, in the variant of MAE fine-tuning (He et al.
2021, table 9, "RandAug (9, 0.5)"): two operations per image, strength 9 of 10 with a standard deviation of
0.5, stronger operations for larger numbers. It is defined for 8-bit colour images; other images (16-bit,
float, or not of three channels) are only cropped and flipped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coma.config import DataConfig
from coma.data.batches import Batch, BatchLayout, TrainingFetcher
from coma.data.class_sampling import ClassSampler
from coma.data.loader import check_start
from coma.data.shuffle import splitmix64
from coma.data.sources.base import Source
from coma.data.worker_pool import map_ordered

_AUGMENT = 0x6175676D656E74  # makes these random numbers independent of those of the crop


def labelled_batches(
    source: Source,
    data: DataConfig,
    labels: Tensor,
    *,
    channels: int,
    seed: int,
    batch: BatchLayout,
    rand_augment: int = 0,
    sampler: ClassSampler | None = None,
    start: int = 0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Yields batches of random crops and their labels without end; see `training_batches`.

    Args:
        source: Images.
        data: Crop, flip, mean (the fill value of RandAugment), and what happens if an image does not decode.
        labels: Labels of all images of the source, int64 `[n]`, or `[n, classes]` for any number per image.
        channels: Number of channels of the batches.
        seed: Seed of the run.
        batch: This process's share of the global batch.
        rand_augment: Strength of RandAugment, 0 (off) to 10.
        sampler: Chooses the images; None shows every image once in an epoch.
        start: Number of samples that whole optimizer steps have consumed so far.
        device: Target device; batches for a GPU are in page-locked memory.

    Raises:
        BadImage: While iterating: an image does not decode and `data.on_bad_image` is "stop".
        BadInput: While iterating: many images in a row do not decode.
    """
    check_start(start, batch)
    fetch = LabelledFetcher(source, data, channels, seed, batch.micro_batch, labels, rand_augment, sampler)
    on_gpu = device is not None and device.type == "cuda"
    return map_ordered(fetch, batch.micro_batch_starts(start), data.workers, pin=on_gpu)


@dataclass(frozen=True)
class LabelledFetcher(TrainingFetcher):
    """Reads the labelled batch that begins at a given position of the stream."""

    labels: Tensor
    rand_augment: int
    sampler: ClassSampler | None = None

    def _indices(self, places: np.ndarray) -> np.ndarray:
        """Returns the images at `places [b]` of the order of all epochs."""
        return self.sampler.indices(self.seed, places) if self.sampler else super()._indices(places)

    def __call__(self, first: int) -> Batch:
        """Returns samples `first` to `first + count`."""
        batch = super().__call__(first)
        return replace(batch, labels=self.labels[batch.indices])

    def view(self, image: Any, seed: int) -> Tensor:
        """Returns a sample of an opened image."""
        view = super().view(image, seed)
        if not self.rand_augment or view.dtype != torch.uint8 or len(view) != 3:
            return view
        return rand_augment(view, self.rand_augment, seed, self.data.mean or (0.5,) * 3)


def rand_augment(image: Tensor, strength: int, seed: int, mean: Sequence[float]) -> Tensor:
    """Applies RandAugment to an image.

    Args:
        image: uint8 `[3, h, w]`.
        strength: 0 to 10.
        seed: Seed of the sample, which determines the result.
        mean: Fill value per channel, of pixels scaled to 0..1.
    """
    operations = _operations(strength, min(image.shape[-2:]), tuple(round(255 * value) for value in mean))
    with _seeded(splitmix64((seed ^ _AUGMENT) & (2**64 - 1))):
        augmented = operations(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(augmented)).permute(2, 0, 1)


@lru_cache(maxsize=8)
def _operations(strength: int, side: int, fill: tuple[int, ...]) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    how = {"translate_const": int(side * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    return rand_augment_transform(f"rand-m{strength}-mstd0.5-inc1", how)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds Python's and numpy's generators, which timm uses, and restores their states at the end."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
