"""The memory that a training step of a detector or segmentor takes, and passes that fit into what is free.

What backward keeps is counted in two small steps on random images; it grows in proportion to the pixels.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from coma.errors import BadInput
from coma.memory import GIB, SavedBytes, free_memory
from downstream.artifacts import Kind
from downstream.configs.load import config_errors

log = logging.getLogger(__name__)
PEAK = 1.6
"""Peak of a step over what forward keeps for backward, at most: measured 1.3 to 1.6 for UPerNet on a CPU."""
USED = 0.9
"""Share of the free memory that a step may take."""
_STATE = 16
"""Bytes for every parameter: weight, gradient and two moments of AdamW."""
_SIDES = {"segmentor": (64, 128), "detector": (128, 256)}
_IMAGES = 2


def fit_passes(kind: Kind, config: Any, size: tuple[int, int], device: torch.device, advice: str) -> None:
    """Splits the batch of a configuration into passes that fit into the free memory; says so in one line.

    Nothing is changed where the whole batch fits, or where the free memory is not known.

    Args:
        kind: Kind of the model.
        config: Configuration with `AdamW` and an iteration-based loop.
        size: Largest height and width of a training image.
        device: Where the model is trained.
        advice: What to do if not even the smallest pass fits; it may hold {}, which becomes the side of a
            square image that would.

    Raises:
        BadInput: no pass fits.
    """
    free = free_memory(device)
    if free is None:
        return
    free = int(free * USED) // (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1)
    fixed, per_pixel, state = _costs(kind, config)
    batch = config.train_dataloader.batch_size
    least = _IMAGES if kind == "segmentor" else 1  # batch normalisation needs two

    def need(images: int, pixels: int) -> float:
        return state + PEAK * images * (fixed + per_pixel * pixels)

    pixels = size[0] * size[1]
    fitting = [p for p in range(1, batch // least + 1) if batch % p == 0 and need(batch // p, pixels) <= free]
    if not fitting:
        side = int(max((free - state) / PEAK / least - fixed, 0) / per_pixel) ** 0.5
        raise BadInput(
            f"a training step of {least} image{'s' * (least > 1)} of {size[0]} x {size[1]} px takes about "
            f"{need(least, pixels) / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free; "
            + advice.format(int(side) // 32 * 32)
        )
    if fitting[0] > 1:
        set_passes(config, fitting[0])
        log.info(
            "a step of %d images takes about %.1f GiB, and %.1f GiB are free: each step takes %d passes of %d "
            "images; --micro-batch chooses another number",
            batch,
            need(batch, pixels) / GIB,
            free / GIB,
            fitting[0],
            batch // fitting[0],
        )


def set_passes(config: Any, passes: int) -> None:
    """Makes every step of a configuration take this many forward and backward passes."""
    config.train_cfg.update(type="AccumulatingTrainLoop", passes=passes)
    config.optim_wrapper.accumulative_counts = passes


def _costs(kind: Kind, config: Any) -> tuple[float, float, float]:
    """Returns the bytes of an image, of each of its pixels, and of the parameters with their state."""
    from mmengine.registry import DefaultScope

    with torch.random.fork_rng(devices=[]), config_errors_of(config), DefaultScope.overwrite_default_scope(
        config.get("default_scope")
    ):
        model = _build(config)
        small, large = _SIDES[kind]
        counted = [_saved(kind, config, model, side) / _IMAGES for side in (small, large)]
    per_pixel = (counted[1] - counted[0]) / (large**2 - small**2)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return max(counted[0] - per_pixel * small**2, 0.0), per_pixel, float(_STATE * trained)
