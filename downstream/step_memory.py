"""The memory that a training step of a detector or segmentor takes, and passes that fit into what is free.

What backward keeps is counted in two small steps on random images; it grows in proportion to the pixels.
"""

from __future__ import annotations

import copy
import logging
import warnings
from importlib import import_module
from typing import Any

import numpy as np
import torch

from coma.errors import BadInput
from coma.memory import GIB, SavedBytes, memory_of_process
from coma.messages import counted
from downstream.artifacts import Kind

log = logging.getLogger(__name__)
PEAK = 1.6
"""Peak of a step over what forward keeps for backward, at most: measured 1.3 to 1.6 for UPerNet on a CPU."""
_STATE = 16
"""Bytes of every trained parameter: weight, gradient and two moments of AdamW."""
SHORT: dict[Kind, float] = {"segmentor": 1.0, "detector": (800 / 1333) ** 0.5 / 1.25}
"""Value of the flag that sets the size of images, over the root of the largest image's pixels."""
_SIDES: dict[Kind, tuple[int, int]] = {"segmentor": (64, 128), "detector": (128, 256)}
_IMAGES, _OBJECTS = 2, 8


def split_into_passes(kind: Kind, config: Any, micro_batch: int | None, device: str) -> None:
    """Splits the batch of one of our configurations into passes of `micro_batch` images.

    By default they are as large as the free memory allows; if one is not enough, a line says so.

    Args:
        kind: Kind of the model.
        config: Configuration; nothing is changed where one pass takes the whole batch.
        micro_batch: Images per process and pass.
        device: cuda or cpu.

    Raises:
        BadInput: a micro-batch that does not divide the batch, or no pass that fits into the free memory.
    """
    batch = config.train_dataloader.batch_size
    least = 2 if kind == "segmentor" else 1  # batch normalisation needs two images
    sizes = [size for size in range(batch, least - 1, -1) if batch % size == 0]
    if micro_batch is not None:
        if micro_batch not in sizes:
            raise BadInput(
                f"--micro-batch {micro_batch}: must divide the {batch} images per process"
                f"{' and be at least 2, for batch normalisation' * (least > 1)}; choose one of "
                f"{', '.join(map(str, sizes))}"
            )
        _set_passes(config, batch // micro_batch)
        return
    free, pixels = memory_of_process(torch.device(device)), _largest_image(config)
    if free is None or pixels is None:
        return
    fixed, per_pixel, state = _costs(kind, config)

    def need(images: int) -> float:
        return state + PEAK * images * (fixed + per_pixel * pixels)

    fitting = next((size for size in sizes if need(size) <= free), None)
    if fitting is None:
        side = (max((free - state) / PEAK / sizes[-1] - fixed, 0) / per_pixel) ** 0.5
        flag = "--crop-size" if kind == "segmentor" else "--short-side"
        smaller = f"{flag} {int(side * SHORT[kind]) // 32 * 32}, " if side * SHORT[kind] >= 32 else ""
        raise BadInput(
            f"training on {counted(sizes[-1], 'image')} of {pixels / 1e6:.2f} megapixels takes about "
            f"{need(sizes[-1]) / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free; try {smaller}"
            "--grad-checkpointing, fewer --head-channels or a smaller encoder"
        )
    if fitting < batch:
        _set_passes(config, batch // fitting)
        log.info(
            "a step of %d images would take about %.1f GiB, and %.1f GiB are free: it takes %d passes of %d "
            "images; --micro-batch chooses another number",
            batch,
            need(batch) / GIB,
            free / GIB,
            batch // fitting,
            fitting,
        )


def _set_passes(config: Any, passes: int) -> None:
    if passes > 1:
        config.train_cfg.update(type="AccumulatingTrainLoop", passes=passes)
        config.optim_wrapper.accumulative_counts = passes


def _largest_image(config: Any) -> float | None:
    """Returns the pixels of the largest training image; None for a pipeline that does not say."""
    for step in config.train_dataloader.dataset.pipeline:
        if step.get("type") == "RandomCrop":
            return float(np.prod(step["crop_size"]))
        if step.get("type") == "RandomResize" and config.default_scope == "mmdet":
            return float(np.prod(step["scale"])) * max(step["ratio_range"]) ** 2
    return None


def _costs(kind: Kind, config: Any) -> tuple[float, float, float]:
    """Returns the bytes of an image, of each of its pixels, and of the parameters with their state."""
    from mmengine.registry import MODELS, DefaultScope
    from mmengine.utils import import_modules_from_strings

    from downstream.openmmlab.runner import replace_sync_bn

    scope, settings = str(config.default_scope), copy.deepcopy(config.model)
    import_modules_from_strings(**config.custom_imports)  # registers the modules that the settings name
    import_module(f"{scope}.models")
    replace_sync_bn(settings)
    with (
        torch.random.fork_rng(devices=[]),
        DefaultScope.overwrite_default_scope(scope),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # OpenMMLab's packages warn about each other
        model: Any = MODELS.build(settings)
        model.train()
        counts = [_kept(kind, model, side) / _IMAGES for side in _SIDES[kind]]
    small, large = (side**2 for side in _SIDES[kind])
    per_pixel = (counts[1] - counts[0]) / (large - small)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return max(counts[0] - per_pixel * small, 0.0), per_pixel, float(_STATE * trained)


def _kept(kind: Kind, model: Any, side: int) -> int:
    """Returns the bytes that forward keeps for backward, of random images with labels."""
    channels = len(model.data_preprocessor.mean)
    images = [torch.randint(0, 256, (channels, side, side), dtype=torch.uint8) for _ in range(_IMAGES)]
    labelled = _segmented if kind == "segmentor" else _detected
    if kind == "segmentor":
        model.data_preprocessor.size = (side, side)
    batch = {"inputs": images, "data_samples": [labelled(side) for _ in images]}
    with SavedBytes(model) as saved:
        model(**model.data_preprocessor(batch, True), mode="loss")
    return saved.total


def _segmented(side: int) -> Any:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    classes = PixelData(data=torch.randint(0, 2, (1, side, side)))
    return SegDataSample(gt_sem_seg=classes, metainfo={"img_shape": (side, side), "ori_shape": (side, side)})


def _detected(side: int) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    corners = torch.rand(_OBJECTS, 2) * side / 2
    objects = InstanceData(
        bboxes=torch.cat([corners, corners + side / 3], dim=1),
        labels=torch.zeros(_OBJECTS, dtype=torch.int64),
        masks=BitmapMasks(np.ones((_OBJECTS, side, side), np.uint8), side, side),
    )
    about = {"img_shape": (side, side), "ori_shape": (side, side), "scale_factor": (1.0, 1.0)}
    return DetDataSample(
        gt_instances=objects,
        ignored_instances=InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
        metainfo=about,
    )
