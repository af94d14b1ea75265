"""Settings of a pre-training or fine-tuning run, as plain frozen data.

One `PretrainConfig` describes a run. It is written to `run/config.json`, and `--from` reads it back (see
`serialization`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from coma.config.architectures import DyViTConfig, EncoderConfig
from coma.config.objectives import CoMAConfig, ObjectiveConfig
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
    """Training images, and how they are read."""

    images: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = None
    """Folder of images (searched recursively), .npz pack, .tar shards or a folder of them."""
    image_size: Annotated[int, SIDE] = 224
    """Side of the square training crop in pixels; a multiple of the mask unit."""
    mean: Annotated[tuple[float, ...] | None, MEAN] = None
    """Per-channel mean of pixels scaled to 0..1. Default: measured on a sample of the data."""
    std: Annotated[tuple[float, ...] | None, STD] = None
    """Per-channel standard deviation. Default: measured likewise."""
    crop_scale: Annotated[tuple[float, float], Range(0, 1, above=True)] = (0.2, 1.0)
    """Smallest and largest area of the random crop as a share of the image (RandomResizedCrop)."""
    flip: bool = True
    """Flip half of the crops left to right."""
    aug_repeats: Annotated[int, Range(1, 1024)] = 1
    """Samples taken from each decoded image, each with its own crop, flip and masks (Hoffer et al. 2020,
    "Augment your batch"). 2 to 4 feed a faster GPU from the same cores, at the price of less variety in a
    batch. The number of samples in an epoch stays the same."""
    on_bad_image: Literal["skip", "stop"] = "skip"
    """skip: files that will not decode are named, counted and skipped. stop: the first one stops the run."""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes that decode images. Default: one per core beside the trainer (0 on 1 or 2 cores)."""
    loader: Literal["workers", "dali"] = "workers"
    """workers: the processes decode. dali: NVIDIA DALI (an extra) decodes with as many threads, on a GPU if
    there is one, while a quarter as many processes read files; it decodes every sample, whatever
    --aug-repeats is."""

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
    """Optimizer steps; they override --epochs."""
    batch_size: Annotated[int, BATCH] = 256
    """Images per optimizer step, over all processes and accumulation steps."""
    micro_batch: Annotated[int | None, BATCH] = None
    """Images per process and forward pass; gradients of several passes are accumulated. Default: no
    accumulation."""
    base_lr: Annotated[float, RATE] = 1.5e-4
    """Learning rate per 256 images; the peak rate is base_lr x batch_size / 256."""
    warmup: Annotated[float, SHARE] = 0.1
    """Share of the steps in which the learning rate rises linearly from 0."""
    weight_decay: Annotated[float, WEIGHT_DECAY] = 0.05
    betas: Annotated[tuple[float, float], DECAY] = (0.9, 0.95)
    clip_grad: Annotated[float, Range(0, 1e9)] = 1.0
    """Largest gradient norm; 0 disables clipping."""
    ema_decay: Annotated[float, DECAY] = 0.0
    """Decay of a moving average of the weights, which is saved in the artifact in place of the weights; 0:
    none. (The averaged student of --method cmt has its own, --objective.ema-decay.)"""

    @property
    def lr(self) -> float:
        """Peak learning rate: linear scaling (Goyal et al. 2017), as in MAE appendix A.1."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class RunConfig(Ranged):
    """Run directory, device, number format, and how often the run saves and logs."""

    out: Path = Path("run")
    """Run directory: config.json, metrics.jsonl, tensorboard/, reconstructions/, state/ and artifact/."""
    seed: Annotated[int, SEED] = 0
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that support it, fp16 on older GPUs, fp32 on a CPU."""
    compile: bool = False
    """Compile the training step with torch.compile: slower to start, faster to run."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, and about a third more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: replicate the model on every GPU (ddp) or shard it (fsdp, FSDP2)."""
    save_minutes: Annotated[float, MINUTES] = 10.0
    """Save a checkpoint at least this often, and at the end, on Ctrl-C and on SIGTERM."""
    save_steps: Annotated[int | None, STEPS] = None
    """Save a checkpoint every so many steps instead."""
    log_steps: Annotated[int, STEPS] = 10
    """Steps between two lines of metrics."""
    reconstruction_every: Annotated[int, Range(0, 10**12)] = 500
    """Steps between two pictures of reconstructions; 0: only at the end."""


@dataclass(frozen=True)
class ProbeConfig(Ranged):
    """Online evaluation during pre-training: kNN and linear probe on labelled images."""

    probe: Path | None = None
    """Labelled images, which are never trained on: a folder that holds train and test (or val), each with one
    folder per class or as a .npz pack. Accuracy and collapse statistics are written to metrics.jsonl,
    TensorBoard and the loss curve, DM-MSA's gates to the first two."""
    probe_epochs: Annotated[float, EPOCHS] = 1.0
    """Epochs between two evaluations; there is one before the first step and one at the end as well."""
    probe_steps: Annotated[int | None, STEPS] = None
    """Steps between two evaluations, in place of --probe-epochs."""
    probe_protocols: tuple[Literal["knn", "linear"], ...] = ("knn", "linear")
    """Protocols, as in `coma evaluate`."""
    probe_train: Annotated[int, IMAGES] = 2000
    """Labelled training images to use, equally many of every class; 0: all."""
    probe_test: Annotated[int, IMAGES] = 1000
    """Test images to use, equally many of every class; 0: all."""


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of one pre-training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: EncoderConfig = field(default_factory=DyViTConfig)
    objective: ObjectiveConfig = field(default_factory=CoMAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    @property
    def view_size(self) -> int:
        """Side in pixels of the crops that the objective gets: --image-size, or more if it zooms in."""
        return view_size(self.data.image_size, self.model.unit, self.objective)


def view_size(image_size: int, unit: int, objective: ObjectiveConfig | None) -> int:
    """Returns the side in pixels of what an objective predicts when the encoder sees `image_size` pixels."""
    if objective is not None and objective.zooms_in:
        return image_size + 2 * unit * max(1, round(image_size / unit / 7))
    return image_size


@dataclass(frozen=True)
class FinetuneRecipe(OptimizerConfig):
    """Fine-tuning of the whole encoder under a linear head (MAE, He et al. 2021, app. A.2, table 9).

    The values are those of that table, but for the batch (there 1024; the rate scales with it), the moving
    average, which MAE does not use, and gradient clipping, which is on as in pre-training.
    """

    base_lr: Annotated[float, RATE] = 1e-3
    """Learning rate of the head per 256 images; the rate used is base_lr x batch_size / 256."""
    warmup: Annotated[float, SHARE] = 0.05
    betas: Annotated[tuple[float, float], DECAY] = (0.9, 0.999)
    ema_decay: Annotated[float, DECAY] = 0.9999
    """Decay of the moving average of the weights that is validated and published (from 0.1 at the first step
    it rises to this); 0 takes the weights themselves."""
    layer_decay: Annotated[float | None, Range(0, 1, above=True)] = None
    """Learning rate of a layer over that of the layer above it (Clark et al. 2020, ELECTRA; Bao et al. 2021,
    BEiT); 1: all the same. Default: 0.75, or 0.65 for the presets base and vit-base."""
    drop_path: Annotated[float, DECAY] = 0.1
    """Largest stochastic-depth rate, reached linearly at the last block (Huang et al. 2016)."""
    rand_augment: Annotated[int, Range(0, 10)] = 9
    """Strength of RandAugment (Cubuk et al. 2020), varied by 0.5; 0: off. For 8-bit images of three
    channels; others are cropped and flipped only."""
    mixup: Annotated[float, Range(0, 1000)] = 0.8
    """Beta distribution of mixup (Zhang et al. 2018); 0: off. Every batch is mixed: half of them by mixup,
    half by CutMix where both are on."""
    cutmix: Annotated[float, Range(0, 1000)] = 1.0
    """Beta distribution of CutMix (Yun et al. 2019); 0: off."""
    random_erasing: Annotated[float, SHARE] = 0.25
    """Share of the images with a random rectangle of noise (Zhong et al. 2020, random erasing)."""
    label_smoothing: Annotated[float, DECAY] = 0.1
    """Label smoothing (Szegedy et al. 2016, sec. 7)."""
    validate: Annotated[float, EPOCHS] = 1.0
    """Epochs between validations; the weights that do best on the validation images are published."""
    hold_out: Annotated[float, Range(0, 0.5)] = 0.1
    """Share of every class's training images that are not trained on and choose the checkpoint where there
    are no validation images; 0 publishes the weights of the last step."""


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run."""

    artifact: Path
    """Artifact of kind backbone or pretrained that the encoder comes from."""
    data: DataConfig
    """Labelled training images; mean and deviation are the artifact's when not given."""
    test: Path | None = None
    """Labelled test images; None: `data.images` holds train and test (or val)."""
    val: Path | None = None
    """Labelled images that choose the checkpoint; None: val beside test in `data.images`, or else a part of
    the training images, see `FinetuneRecipe.hold_out`."""
    from_scratch: bool = False
    """Random weights instead of the artifact's."""
    model: EncoderConfig = field(default_factory=DyViTConfig)
    """The artifact's, with the recipe's drop path; filled in when the run starts."""
    class_names: tuple[str, ...] | None = None
    """Filled in when the run starts."""
    optimizer: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    run: RunConfig = field(default_factory=RunConfig)
