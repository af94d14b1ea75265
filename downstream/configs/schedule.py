"""The training schedule of a configuration: steps, learning rates, validations, checkpoints."""

from __future__ import annotations

import os
from typing import Any

import torch

from coma.errors import BadInput
from downstream.cli_options import TrainOptions

MULTIPLIERS = (
    *("bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "flat_decay_mult"),
    *("dwconv_decay_mult", "dcn_offset_lr_mult"),
)
SETTINGS = ("decay_rate", "custom_keys", *MULTIPLIERS, "bypass_duplicate")
"""What `paramwise_cfg` of `LayerDecayConstructor` may hold: the decay, and mmengine's settings."""


def set_schedule(config: Any, options: TrainOptions, images: int, best: str) -> None:
    """Sets steps, batch size, optimizer, learning rates, validations and checkpoints.

    Args:
        config: Configuration to change.
        options: Options of the command.
        images: Number of training images.
        best: Metric that the best checkpoint is chosen by; higher is better.

    Raises:
        BadInput: too few epochs for one step, or mixed precision without a GPU.
    """
    batch = options.batch_size
    steps = options.steps if options.steps is not None else round(options.epochs * images / batch)
    if steps < 1:
        raise BadInput(
            f"--epochs {options.epochs:g} of {images} images are less than one step; use more epochs"
        )
    every = max(-(-steps // options.validations), 1)
    warmup = min(500, steps // 10)
    warmup *= warmup > 1  # mmengine never ends a warm-up of one step
    if options.precision != "fp32" and (options.device == "cpu" or not torch.cuda.is_available()):
        raise BadInput(f"--precision {options.precision}: mmengine's mixed precision needs a GPU; use fp32")
    amp = {"type": "AmpOptimWrapper", "dtype": {"bf16": "bfloat16"}.get(options.precision, "float16")}
    config.optim_wrapper = {
        **({"type": "OptimWrapper"} if options.precision == "fp32" else amp),
        "constructor": "LayerDecayConstructor",
        "paramwise_cfg": {"decay_rate": options.layer_decay},
        "clip_grad": {"max_norm": 1.0, "norm_type": 2},
        "optimizer": {
            "type": "AdamW",
            "lr": options.lr,
            "betas": (0.9, 0.999),
            "weight_decay": options.weight_decay,
        },
    }
    rising = {"type": "LinearLR", "start_factor": 1e-3, "by_epoch": False, "begin": 0, "end": warmup}
    falling = {"type": "CosineAnnealingLR", "eta_min": 0.0, "by_epoch": False, "begin": warmup, "end": steps}
    config.param_scheduler = [rising] * (warmup > 0) + [{**falling, "T_max": steps - warmup}]
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": steps, "val_interval": every}
    config.val_cfg, config.test_cfg = {"type": "ValLoop"}, {"type": "TestLoop"}
    loader = config.train_dataloader
    config.global_batch_size = batch
    split_batch(config)
    loader.sampler = {"type": "InfiniteSampler", "shuffle": True, "seed": options.seed}
    loader.pop("batch_sampler", None)
    hooks = config.setdefault("default_hooks", {})
    hooks["checkpoint"] = {
        "type": "CheckpointHook",
        "by_epoch": False,
        "interval": options.save_steps or every,
        "max_keep_ckpts": 2,
        "save_best": best,
        "rule": "greater",
    }
    hooks["logger"] = {
        "type": "LoggerHook",
        "interval": min(50, max(steps // 20, 1)),
        "log_metric_by_epoch": False,
    }
    config.log_processor = {"type": "LogProcessor", "by_epoch": False, "window_size": min(50, steps)}
    config.randomness = {"seed": options.seed}


def use_layer_decay(wrapper: Any, rate: float) -> None:
    """Gives `optim_wrapper` our layer-wise learning rates, and keeps what they can take of its settings."""
    before = wrapper.get("paramwise_cfg") or {}
    kept = {name: before[name] for name in before if name in SETTINGS}
    wrapper["constructor"] = "LayerDecayConstructor"
    wrapper["paramwise_cfg"] = {**kept, "decay_rate": rate}


def split_batch(config: Any) -> None:
    """Splits `global_batch_size`, where the configuration has one, over the processes of this start.

    Raises:
        BadInput: the processes do not divide it.
    """
    batch = config.get("global_batch_size")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if batch is None:
        return
    if batch % world:
        raise BadInput(f"--batch-size {batch}: must be a multiple of the {world} processes")
    passes = config.get("train_cfg", {}).get("passes", 1)
    if batch // world % passes:
        raise BadInput(
            f"--batch-size {batch}: {batch // world} images per process cannot be split into the {passes} "
            "passes of this run; resume it with the number of processes that it began with"
        )
    config.train_dataloader.batch_size = batch // world


def set_workers(config: Any, workers: int | None) -> None:
    """Sets the number of worker processes of all data loaders."""
    from coma.data.worker_pool import default_workers

    count = min(default_workers(), 8) if workers is None else workers
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        config[name].num_workers = count
        config[name].persistent_workers = count > 0
