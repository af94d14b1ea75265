"""Settings of a pre-training run, as plain frozen data.

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
from coma.image_size import ImageSize
from coma.messages import parse_names
from coma.paths import Location
from coma.ranges import (
    BATCH,
    DECAY,
    EPOCHS,
    IMAGES,
    MEAN,
    MINUTES,
    PROCESSES,
    RARE,
    RATE,
    SEED,
    SHARE,
    SIDE,
    STD,
    STEPS,
    TILE,
    WEIGHT_DECAY,
    Range,
    Ranged,
)

TRACKERS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class DataConfig(Ranged):
    """Training images and how they are read."""

    images: Annotated[Location | None, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = None
    """Folder of images (searched recursively), .npz pack, .tar shards or .parquet files, or the address of
    shards or parquet files."""
    image_size: Annotated[ImageSize, SIDE] = field(default=ImageSize(224, 224))
    """Side of the crop in pixels, or its height and width."""
    mean: Annotated[tuple[float, ...] | None, MEAN, RARE, tyro.conf.arg(metavar="R G B")] = None
    """Mean of every channel, of pixels scaled to 0..1; default: measured on a sample of the images"""
    std: Annotated[tuple[float, ...] | None, STD, RARE, tyro.conf.arg(metavar="R G B")] = None
    """Standard deviation of every channel; default: measured on a sample of the images"""
    tiles: Annotated[int | None, TILE, RARE] = None
    """Side in pixels of windows that larger images are cut into, each of them a sample; also reads all
    frames of DICOM files; default: no windows"""
    crop_scale: Annotated[
        tuple[float, float], Range(0, 1, above=True), RARE, tyro.conf.arg(metavar="MIN MAX")
    ] = (0.2, 1.0)
    """Smallest and largest area of the random crop, as shares of the image (RandomResizedCrop)."""
    flip: Annotated[bool, RARE] = True
    """Flip half of the crops left to right."""
    aug_repeats: Annotated[int, Range(1, 1024), RARE] = 1
    """Consecutive samples from one decoded image, each with its own crop, flip and masks (Hoffer et al. 2020,
    "Augment your batch"). 2 to 4 feed a faster GPU from the same cores, with less variety in a batch. The
    number of samples in an epoch stays the same."""
    on_bad_image: Annotated[Literal["skip", "stop"], RARE] = "skip"
    """Handling of files that cannot be decoded: skip names, counts and skips them, stop ends the run."""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes that decode images; default: all cores but one, 0 on two"""
    loader: Annotated[Literal["workers", "dali"], RARE] = "workers"
    """Decoder: worker processes, or NVIDIA DALI (an extra) with as many threads, on the GPU where there is
    one; a quarter as many processes then read files. DALI ignores --aug-repeats."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "image_size", ImageSize.of(self.image_size))  # code may give a number
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
class InitConfig(Ranged):
    """Weights to start from; without them, training starts from random weights."""

    init: Annotated[str | None, tyro.conf.arg(metavar="WEIGHTS")] = None
    """An artifact or tiny-64, a ViT's .safetensors or .pth file, or timm:NAME or hf-hub:ORG/NAME from the
    local cache. Without --model, the model is theirs."""
    init_partial: Annotated[bool, RARE] = False
    """Start also from weights that lack some of the encoder's tensors; those start from random values."""
    download: Annotated[bool, RARE] = False
    """Download the weights that --init names if they are not in the local cache."""
    init_normalization: Annotated[Literal["weights", "images"], RARE] = "weights"
    """Without --mean and --std: normalise pixels by the mean and standard deviation of the weights, where
    these are known and fit the images, or by those of the images."""
    init_sha256: Annotated[str | None, RARE, tyro.conf.arg(metavar="HEX")] = None
    """SHA-256 that the file of weights must have. It is filled in when the run starts."""


@dataclass(frozen=True)
class OptimizerConfig(Ranged):
    """AdamW or Muon with warm-up and cosine decay (MAE, appendix A.1)."""

    optimizer: Annotated[Literal["adamw", "muon"], RARE] = "adamw"
    """muon: the matrices of attention, MLPs and patch merging by Muon, all else by AdamW. Its best --base-lr
    may be another one than AdamW's."""
    epochs: Annotated[float, EPOCHS] = 100.0
    """Passes over the images."""
    steps: Annotated[int | None, STEPS, RARE] = None
    """Optimizer steps; overrides --epochs."""
    batch_size: Annotated[int, BATCH] = 256
    """Images per optimizer step, over all processes."""
    micro_batch: Annotated[int | None, BATCH] = None
    """Images per process and forward pass; gradients accumulate over the batch; default: the whole batch"""
    base_lr: Annotated[float, RATE] = 1.5e-4
    """Learning rate per 256 images of the batch."""
    warmup: Annotated[float, SHARE, RARE] = 0.1
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: Annotated[float, WEIGHT_DECAY, RARE] = 0.05
    """Weight decay of matrices; biases, norms and tokens have none."""
    betas: Annotated[tuple[float, float], DECAY, RARE, tyro.conf.arg(metavar="BETA1 BETA2")] = (0.9, 0.95)
    """Decay rates of AdamW's two moving averages (Muon's momentum is 0.95)."""
    clip_grad: Annotated[float, Range(0, 1e9), RARE] = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    ema_decay: Annotated[float, DECAY, RARE] = 0.0
    """Decay of a moving average of the weights, which the artifact then holds; 0: none. (--method cmt has
    another one, --objective.ema-decay.)"""

    @property
    def lr(self) -> float:
        """Peak learning rate, scaled linearly with the batch (Goyal et al. 2017; MAE, appendix A.1)."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class RunConfig(Ranged):
    """Directory of the run, and its use of the machine."""

    out: Path = Path("run")
    """Run directory for settings, metrics, state and artifact."""
    seed: Annotated[int, SEED] = 0
    """Seed of weights, crops and masks."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU (fp16 on older ones), fp32 on a CPU."""
    compile: Annotated[bool, RARE] = False
    """Compile the model: a slower start, faster steps."""
    grad_checkpointing: Annotated[bool, RARE] = False
    """Recompute activations: less memory, a third more time."""
    parallel: Annotated[Literal["ddp", "fsdp"], RARE] = "ddp"
    """Parallelism under torchrun: replicate the model (ddp) or shard it (fsdp, which is FSDP2)."""
    save_minutes: Annotated[float, MINUTES, RARE] = 10.0
    """Minutes between saves of the resumable state, which the end, Ctrl-C and SIGTERM save as well."""
    save_steps: Annotated[int | None, STEPS, RARE] = None
    """Steps between saves of the resumable state; overrides --save-minutes."""
    log_steps: Annotated[int, STEPS, RARE] = 10
    """Steps between log points."""
    reconstruction_every: Annotated[int, Range(0, 10**12), RARE] = 500
    """Steps between pictures of reconstructions; 0: only at the end."""
    track: Annotated[str, RARE, tyro.conf.arg(metavar="NAMES")] = "tensorboard"
    """Trackers of metrics, settings and pictures, separated by commas: tensorboard, wandb, mlflow; or none.
    wandb is offline without an API key."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.trackers

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers.

        Raises:
            BadInput: an unknown name.
        """
        names = parse_names(self.track, (*TRACKERS, "none"), "--track")
        return tuple(name for name in names if name != "none")


@dataclass(frozen=True)
class ProbeConfig(Ranged):
    """Online evaluation during pre-training: kNN and linear probe on labelled images."""

    probe: Location | None = None
    """Labelled images that are never trained on: a folder with train and test, each with a folder per class
    or an .npz pack."""
    probe_epochs: Annotated[float, EPOCHS, RARE] = 1.0
    """Epochs between evaluations; there is also one before the first step and one at the end."""
    probe_steps: Annotated[int | None, STEPS, RARE] = None
    """Steps between evaluations; overrides --probe-epochs."""
    probe_protocols: Annotated[tuple[Literal["knn", "linear"], ...], RARE] = ("knn", "linear")
    """Protocols, as in `coma evaluate`."""
    probe_train: Annotated[int, IMAGES, RARE] = 2000
    """Labelled training images, equally many from every class; 0: all."""
    probe_test: Annotated[int, IMAGES, RARE] = 1000
    """Test images, equally many from every class; 0: all."""


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of one pre-training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: EncoderConfig = field(default_factory=DyViTConfig)
    objective: ObjectiveConfig = field(default_factory=CoMAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    init: InitConfig = field(default_factory=InitConfig)

    @property
    def view_size(self) -> ImageSize:
        """Size of the objective's crops: --image-size, unless it zooms in."""
        return view_size(self.data.image_size, self.model.unit, self.objective)


def view_size(seen: ImageSize, unit: int, objective: ObjectiveConfig | None) -> ImageSize:
    """Returns the size of an objective's crops where the encoder sees images of the size `seen`."""
    if objective is None or not objective.zooms_in:
        return seen
    return ImageSize(*(side + 2 * unit * max(1, round(side / unit / 7)) for side in seen))
