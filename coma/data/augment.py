"""Training samples with labels: the crops of pre-training, then RandAugment, all from the sample's own seed.

RandAugment (Cubuk et al. 2020, arXiv 1909.13719) is timm's, in the variant that MAE fine-tunes with (He et
al. 2021, table 9, "RandAug (9, 0.5)"): two operations per image, strength 9 of 10 with a deviation of 0.5,
stronger operations for larger numbers. It is defined on 8-bit colour images; images of another kind, 16-bit,
float, or of other than three channels, are cropped and flipped only.
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
from coma.data.loader import check_start
from coma.data.shuffle import splitmix64
from coma.data.sources.base import Source
from coma.data.worker_pool import map_ordered

_AUGMENT = 0x6175676D656E74  # keeps these numbers apart from those of the crop


def labelled_batches(
    source: Source,
    data: DataConfig,
    labels: Tensor,
    *,
    channels: int,
    seed: int,
    batch: BatchLayout,
    rand_augment: int = 0,
    start: int = 0,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Random crops with their labels, without end; otherwise like `training_batches`.

    Args:
        source: the images.
        data: crop, flip, mean (which RandAugment fills in), and what to do about images that will not decode.
        labels: of all images of the source, int64 `[n]`.
        channels: of the batches.
        seed: of the run.
        batch: this process's share.
        rand_augment: strength of RandAugment, 0 to 10; 0: off.
        start: samples consumed so far by whole optimizer steps.
        device: where they will be needed: what goes to a GPU is pinned.

    Raises:
        BadImage: while iterating, an image will not decode and `data.on_bad_image` is "stop".
        BadInput: while iterating, no image in a long row decodes.
    """
    check_start(start, batch)
    fetch = LabelledFetcher(source, data, channels, seed, batch.micro_batch, labels, rand_augment)
    on_gpu = device is not None and device.type == "cuda"
    return map_ordered(fetch, batch.micro_batch_starts(start), data.workers, pin=on_gpu)


@dataclass(frozen=True)
class LabelledFetcher(TrainingFetcher):
    """The labelled batch whose first sample has a given position in the stream."""

    labels: Tensor
    rand_augment: int

    def __call__(self, first: int) -> Batch:
        """Samples `first` to `first + count`."""
        batch = super().__call__(first)
        return replace(batch, labels=self.labels[batch.indices])

    def view(self, image: Any, seed: int) -> Tensor:
        """A sample from an opened image."""
        view = super().view(image, seed)
        if not self.rand_augment or view.dtype != torch.uint8 or len(view) != 3:
            return view
        return rand_augment(view, self.rand_augment, seed, self.data.mean or (0.5,) * 3)


def rand_augment(image: Tensor, strength: int, seed: int, mean: Sequence[float]) -> Tensor:
    """RandAugment of one image, the same for the same seed.

    Args:
        image: uint8 `[3, h, w]`.
        strength: 0 to 10.
        seed: of the sample.
        mean: per channel, of pixels scaled to 0..1: fills what an operation leaves empty.
    """
    operations = _operations(strength, min(image.shape[-2:]), tuple(round(255 * value) for value in mean))
    with _numbers_from(splitmix64((seed ^ _AUGMENT) & (2**64 - 1))):
        shown = operations(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1)


@lru_cache(maxsize=8)
def _operations(strength: int, side: int, fill: tuple[int, ...]) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    how = {"translate_const": int(side * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    return rand_augment_transform(f"rand-m{strength}-mstd0.5-inc1", how)


@contextmanager
def _numbers_from(seed: int) -> Iterator[None]:
    """Inside, Python's and numpy's generators, from which timm draws, start from `seed`; then as before."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
