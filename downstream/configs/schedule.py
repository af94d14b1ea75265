"""How long a configuration trains, at which rate, and how often it is measured and saved."""

from __future__ import annotations

import os
from typing import Any

import torch

from coma.errors import BadInput
from downstream.cli_options import TrainOptions


def set_schedule(
    config: Any, options: TrainOptions, images: int, defaults: dict[str, float], best: str
) -> None:
    """Steps, batches, rates, validations and saving.

    Args:
        config: What to change.
        options: What was asked for.
        images: Training images.
        defaults: A task's own epochs, batch_size, lr, weight_decay and layer_decay.
        best: The metric that the best checkpoint is chosen by; more is better.

    Raises:
        BadInput: numbers that make no run.
    """
    batch = int(defaults["batch_size"]) if options.batch_size is None else options.batch_size
    epochs = options.epochs if options.epochs is not None else defaults["epochs"]
    steps = options.steps if options.steps is not None else round(epochs * images / batch)
    if steps < 1:
        raise BadInput(f"--epochs {epochs:g} of {images} images make no step; give more of them")
    every = max(-(-steps // options.validations), 1)
    warmup = min(500, steps // 10)
    warmup *= warmup > 1  # mmengine's warm-up of one step would never end
    lr = options.lr if options.lr is not None else defaults["lr"]
    decay = options.weight_decay if options.weight_decay is not None else defaults["weight_decay"]
    rate = options.layer_decay if options.layer_decay is not None else defaults["layer_decay"]
    if options.precision != "fp32" and not torch.cuda.is_available():
        raise BadInput(f"--precision {options.precision}: mmengine's mixed precision needs a GPU; use fp32")
    amp = {"type": "AmpOptimWrapper", "dtype": {"bf16": "bfloat16"}.get(options.precision, "float16")}
    config.optim_wrapper = {
        **({"type": "OptimWrapper"} if options.precision == "fp32" else amp),
        "constructor": "LayerDecayConstructor",
        "paramwise_cfg": {"decay_rate": rate},
        "clip_grad": {"max_norm": 1.0, "norm_type": 2},
        "optimizer": {"type": "AdamW", "lr": lr, "betas": (0.9, 0.999), "weight_decay": decay},
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


def split_batch(config: Any) -> None:
    """Share out `global_batch_size`, where the configuration has one, over the processes there are now.

    Raises:
        BadInput: it cannot be.
    """
    batch = config.get("global_batch_size")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if batch is None:
        return
    if batch % world:
        raise BadInput(f"--batch-size {batch}: must be a multiple of the {world} processes")
    config.train_dataloader.batch_size = batch // world


def set_workers(config: Any, workers: int | None) -> None:
    """The same number of reading processes for all loaders."""
    from coma.data.worker_pool import default_workers

    count = min(default_workers(), 8) if workers is None else workers
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        config[name].num_workers = count
        config[name].persistent_workers = count > 0
