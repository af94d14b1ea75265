"""Every setting of a run, pre-training or fine-tuning, as plain frozen data.

A run is described by one `PretrainConfig`: written to `run/config.json`, read back with `--from`, and stored
in the artifact (see `serialization`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from coma.config.architectures import DyViTConfig, EncoderConfig
from coma.config.objectives import BeyondConfig, CoMAConfig, ObjectiveConfig
from coma.errors import BadInput
from coma.ranges import (
    BATCH,
    DECAY,
    EPOCHS,
    IMAGES,
    MEAN,
    MINUTES,
    PROCESSES,
    RATE,
    SEED,
    SHARE,
    SIDE,
    STD,
    STEPS,
    WEIGHT_DECAY,
    Range,
    Ranged,
)


@dataclass(frozen=True)
class DataConfig(Ranged):
    """What to train on and how to read it."""

    images: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = None
    """Folder of images (searched recursively), .npz pack, .tar shards or a folder of them."""
    image_size: Annotated[int, SIDE] = 224
    """Side of the square training crop in pixels; a multiple of the mask unit."""
    mean: Annotated[tuple[float, ...] | None, MEAN] = None
    """Per-channel mean of pixels scaled to 0..1; measured on a sample of the data when not given."""
    std: Annotated[tuple[float, ...] | None, STD] = None
    """Per-channel standard deviation; measured when not given."""
    crop_scale: Annotated[tuple[float, float], Range(0, 1, above=True)] = (0.2, 1.0)
    """Area of the random crop as a share of the image (RandomResizedCrop)."""
    flip: bool = True
    """Flip half of the crops left to right."""
    aug_repeats: Annotated[int, Range(1, 1024)] = 1
    """Samples in a row from one decoded image, each with its own crop, flip and masks (Hoffer et al. 2020,
    "Augment your batch"): 2 to 4 feed a faster GPU from the same cores, with less variety in a batch. An
    epoch remains as many samples as there are images."""
    on_bad_image: Literal["skip", "stop"] = "skip"
    """A file that will not decode is named, counted and skipped, or stops the run."""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes that decode images; default: one per core beside the trainer (0 on 1 or 2 cores)."""
    loader: Literal["workers", "dali"] = "workers"
    """Who decodes: those processes, or NVIDIA DALI (an extra) with as many threads, on the GPU where there is
    one; a quarter as many processes then read files. DALI decodes every sample, whatever --aug-repeats."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mean is None) != (self.std is None):
            raise BadInput("give both --mean and --std, or neither (they are then measured)")
        if self.mean is not None and self.std is not None and not 0 < len(self.mean) == len(self.std):
            raise BadInput(
                f"--mean has {len(self.mean)} and --std {len(self.std)} values; give one for each channel"
            )
        low, high = self.crop_scale
        if low > high:
            raise BadInput(f"--crop-scale {low:g} {high:g} must be the smallest share, then the largest")


@dataclass(frozen=True)
class OptimizerConfig(Ranged):
    """AdamW with warm-up and cosine decay (MAE, appendix A.1)."""

    epochs: Annotated[float, EPOCHS] = 100.0
    """Passes over the data."""
    steps: Annotated[int | None, STEPS] = None
    """Optimizer steps; overrides --epochs when given."""
    batch_size: Annotated[int, BATCH] = 256
    """Images per optimizer step, over all processes and accumulation steps."""
    micro_batch: Annotated[int | None, BATCH] = None
    """Images per process and forward pass; the rest of the batch is accumulated. Default: no accumulation."""
    base_lr: Annotated[float, RATE] = 1.5e-4
    """Learning rate per 256 images; the rate used is base_lr x batch_size / 256."""
    warmup: Annotated[float, SHARE] = 0.1
    """Share of the steps with linearly rising learning rate."""
    weight_decay: Annotated[float, WEIGHT_DECAY] = 0.05
    betas: Annotated[tuple[float, float], DECAY] = (0.9, 0.95)
    clip_grad: Annotated[float, Range(0, 1e9)] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    ema_decay: Annotated[float, DECAY] = 0.0
    """Decay of a moving average of the weights that goes into the artifact in their place; 0: none. (That of
    --method cmt is another, --objective.ema-decay.)"""

    @property
    def lr(self) -> float:
        """Peak learning rate: linear scaling (Goyal et al. 2017), as in MAE appendix A.1."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class RunConfig(Ranged):
    """Where the run lives and how it uses the machine."""

    out: Path = Path("run")
    """Run directory: config.json, metrics.jsonl, tensorboard/, reconstructions/, state/, artifact/."""
    seed: Annotated[int, SEED] = 0
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPU."""
    compile: bool = False
    """Compile the step with torch.compile (slow to start, faster to run)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: replicate the model (ddp) or shard it (fsdp, FSDP2)."""
    save_minutes: Annotated[float, MINUTES] = 10.0
    """Save the resumable state at least this often (and at the end, on Ctrl-C and on SIGTERM)."""
    save_steps: Annotated[int | None, STEPS] = None
    """Save the resumable state every so many steps instead."""
    log_steps: Annotated[int, STEPS] = 10
    """Write metrics every so many steps."""
    reconstruction_every: Annotated[int, Range(0, 10**12)] = 500
    """Write a picture of reconstructions every so many steps; 0: only at the end."""


@dataclass(frozen=True)
class ProbeConfig(Ranged):
    """What features are worth during training, measured on labelled images that are never trained on."""

    probe: Path | None = None
    """Folder that holds train and test (or val): folders with one folder per class, or .npz packs. Accuracy
    and collapse statistics go into metrics.jsonl, TensorBoard and the loss curve, DM-MSA's gates into the
    first two."""
    probe_epochs: Annotated[float, EPOCHS] = 1.0
    """Measure every so many passes over the training images (and before the first step, and at the end)."""
    probe_steps: Annotated[int | None, STEPS] = None
    """Measure every so many steps instead."""
    probe_protocols: tuple[Literal["knn", "linear"], ...] = ("knn", "linear")
    """As in `coma evaluate`."""
    probe_train: Annotated[int, IMAGES] = 2000
    """Labelled training images to use, drawn alike from every class; 0: all."""
    probe_test: Annotated[int, IMAGES] = 1000
    """Test images to count on, drawn likewise; 0: all."""


@dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: EncoderConfig = field(default_factory=DyViTConfig)
    objective: ObjectiveConfig = field(default_factory=CoMAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    @property
    def view_size(self) -> int:
        """Side in pixels of the crops that the objective gets: --image-size, unless it zooms in."""
        return view_size(self.data.image_size, self.model.unit, self.objective)


def view_size(image_size: int, unit: int, objective: ObjectiveConfig | None) -> int:
    """Side in pixels of what an objective rebuilds where the encoder sees `image_size` pixels of it."""
    if isinstance(objective, BeyondConfig) and objective.zooms_in:
        return image_size + 2 * unit * max(1, round(image_size / unit / 7))
    return image_size
