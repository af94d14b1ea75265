"""Puts training settings that were given as flags into a configuration of the user's own.

Only what was given changes: a configuration has reasons for the rest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from typing import Any

from coma.errors import BadInput
from coma.image_size import ImageSize
from downstream.cli_options import TrainOptions
from downstream.configs.load import OURS, pipeline_of
from downstream.configs.schedule import set_workers, split_batch, use_layer_decay

OVERRIDES = (
    *("epochs", "steps", "batch_size", "lr", "weight_decay", "layer_decay"),
    *("image_size", "workers", "seed"),
)
"""Training options that also apply to a configuration of the user's own."""
BACKBONE_OPTIONS = ("drop_path", "frozen_stages", "global_blocks", "grad_checkpointing")
"""Training options that also apply to a configuration whose backbone is one of ours."""
_SIZES = ("scale", "scales", "img_scale", "crop_size", "stride", "size", "pad_size", "random_size_range")


def override_training(config: Any, options: TrainOptions, given: Collection[str], images: int | None) -> None:
    """Sets what flags gave.

    Args:
        config: Configuration to change.
        options: Options of the command.
        given: Names of the options that were given.
        images: Number of training images; None if the dataset is the configuration's own.

    Raises:
        BadInput: a flag that does not fit the configuration.
    """
    optimizer = config.get("optim_wrapper", {}).get("optimizer")
    for flag in ("lr", "weight_decay", "layer_decay"):
        if flag in given and not optimizer:
            raise BadInput(f"--{flag.replace('_', '-')}: the configuration has no optim_wrapper.optimizer")
    if "lr" in given:
        optimizer["lr"] = options.lr
    if "weight_decay" in given:
        optimizer["weight_decay"] = options.weight_decay
    if "layer_decay" in given:
        _set_layer_decay(config, options.layer_decay)
    if "batch_size" in given:
        config.global_batch_size = options.batch_size
        split_batch(config)
    if {"epochs", "steps"} & set(given):
        _set_length(config, options, given, images)
    if options.image_size is not None:
        set_image_size(config, options.image_size)
    if "workers" in given:
        set_workers(config, options.workers)
    if "seed" in given:
        config.randomness = {**(config.get("randomness") or {}), "seed": options.seed}


def override_backbone(config: Any, options: TrainOptions, given: Collection[str]) -> None:
    """Sets what flags gave of a backbone of ours that a configuration already has."""
    names = {"grad_checkpointing": "with_cp"}
    for name in BACKBONE_OPTIONS:
        if name in given:
            config.model.backbone[names.get(name, name)] = getattr(options, name)


def _set_layer_decay(config: Any, rate: float) -> None:
    if config.model.backbone.get("type") not in OURS:
        raise BadInput("--layer-decay: needs one of our backbones; give an ARTIFACT or --preset")
    use_layer_decay(config.optim_wrapper, rate)


def _steps_of_epoch(config: Any, images: int) -> float:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return images / (config.get("global_batch_size") or config.train_dataloader.batch_size * processes)


def _set_length(config: Any, options: TrainOptions, given: Collection[str], images: int | None) -> None:
    """Sets the length of the training, and scales everything in the schedule that counts in its unit."""
    loop = config.get("train_cfg") or {}
    by_epoch = "max_epochs" in loop
    if not by_epoch and "max_iters" not in loop:
        raise BadInput("--epochs, --steps: the configuration's train_cfg has no max_epochs and no max_iters")
    if by_epoch:
        if "steps" in given:
            known = "" if images is None else f", of {_steps_of_epoch(config, images):.4g} steps each"
            raise BadInput(f"--steps: this configuration counts epochs{known}; give --epochs")
        if options.epochs < 1 or options.epochs % 1:
            raise BadInput(f"--epochs {options.epochs:g}: this configuration counts whole epochs, from 1 on")
        new = int(options.epochs)
    elif options.steps is not None:
        new = options.steps
    elif images is None:
        raise BadInput("--epochs: this configuration counts iterations; give --steps, or --data")
    else:
        new = max(round(options.epochs * _steps_of_epoch(config, images)), 1)
    name = "max_epochs" if by_epoch else "max_iters"
    ratio, loop[name] = new / loop[name], new
    schedulers = config.get("param_scheduler") or []
    listed = schedulers if isinstance(schedulers, list | tuple) else [schedulers]
    config.param_scheduler = [
        _scaled_scheduler(each, ratio if each.get("by_epoch", True) == by_epoch else min(ratio, 1))
        for each in listed
    ]
    intervals = [loop, *(hook for hook in (config.get("default_hooks") or {}).values() if hook)]
    for holder in intervals:
        for key in ("val_interval", "interval"):
            if isinstance(holder.get(key), int) and holder.get("by_epoch", by_epoch) == by_epoch:
                every = holder[key] if by_epoch else round(holder[key] * ratio)
                holder[key] = min(max(every, 1), new)
    if loop.get("dynamic_intervals"):
        pairs = loop["dynamic_intervals"]
        loop["dynamic_intervals"] = [(_scale(start, ratio), every) for start, every in pairs]
    for hook in config.get("custom_hooks") or ():
        for key in ("switch_epoch", "num_last_epochs"):
            if isinstance(hook.get(key), int):
                hook[key] = _scale(hook[key], ratio)


def _scaled_scheduler(scheduler: Any, ratio: float) -> Any:
    begin = _scale(scheduler.get("begin", 0), ratio)
    changes: dict[str, Any] = {"begin": begin} if "begin" in scheduler else {}
    if "end" in scheduler and scheduler["end"] < 10**6:
        changes["end"] = max(_scale(scheduler["end"], ratio), begin + 2)  # mmengine ends none of one step
    if "milestones" in scheduler:
        changes["milestones"] = [_scale(each, ratio) for each in scheduler["milestones"]]
    for name in ("T_max", "total_iters", "step_size"):
        if isinstance(scheduler.get(name), int):
            changes[name] = max(_scale(scheduler[name], ratio), 1)
    return {**scheduler, **changes}


def set_image_size(config: Any, size: ImageSize) -> None:
    """Sets the size that images are resized to fit, or cropped to, and scales all other sizes likewise.

    The size of a configuration is that of its training crops (`data_preprocessor.size`), or else that of the
    resized test images.

    Raises:
        BadInput: the configuration has neither.
    """
    preprocessor = config.model.get("data_preprocessor") or {}
    crop = preprocessor.get("size")
    steps = pipeline_of(config.test_dataloader.dataset) if config.get("test_dataloader") else []
    resized = [step["scale"] for step in steps if step.get("type") == "Resize" and "scale" in step]
    if not crop and not resized:
        raise BadInput("--image-size: the configuration resizes test images to no fixed size")
    before = _pair(crop or resized[0])
    ratio = math.sqrt(size.height * size.width / (before[0] * before[1]))
    images = ("train_dataloader", "val_dataloader", "test_dataloader", "tta_pipeline", "custom_hooks")
    for holder, key in _sizes([config.get(name) for name in images]):
        holder[key] = _resized(holder[key], before, size, ratio, rows_first=key == "crop_size")
    for holder, key in _sizes([preprocessor, config.model.get("test_cfg")]):
        holder[key] = _resized(holder[key], before, size, ratio, rows_first=True)


def _sizes(node: Any) -> Iterator[tuple[Any, str]]:
    """Yields dictionaries below `node`, each with a key that holds sizes in pixels."""
    if isinstance(node, dict):
        for key, value in list(node.items()):
            if key in _SIZES and isinstance(value, int | list | tuple):
                yield node, key
            else:
                yield from _sizes(value)
    elif isinstance(node, list | tuple):
        for child in node:
            yield from _sizes(child)


def _resized(value: Any, before: tuple[int, int], size: ImageSize, ratio: float, *, rows_first: bool) -> Any:
    if isinstance(value, list | tuple):
        if len(value) == 2 and sorted(value, key=str) == sorted(before, key=str):
            return type(value)(size if rows_first else (size.width, size.height))
        return type(value)(_resized(each, before, size, ratio, rows_first=rows_first) for each in value)
    return _scale(value, ratio) if isinstance(value, int) and not isinstance(value, bool) else value


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _scale(value: int, ratio: float) -> int:
    return round(value * ratio)
