"""Every setting of a run, pre-training or fine-tuning, as plain frozen data (no torch in here).

A run is described by one `PretrainConfig`: written to `run/config.json`, read back with `--from`, and stored
in the artifact (see `plain`). Presets are functions from a name to such data; flags override fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pretrain.errors import BadInput
from pretrain.methods import METHOD_PRESETS as METHOD_PRESETS
from pretrain.methods import BalancedCoMAConfig as BalancedCoMAConfig
from pretrain.methods import (
    BeyondConfig,
    CoMAConfig,
    ObjectiveConfig,
)
from pretrain.methods import CMTConfig as CMTConfig
from pretrain.methods import DecoderConfig as DecoderConfig
from pretrain.methods import Degradation as Degradation
from pretrain.methods import MAEConfig as MAEConfig
from pretrain.methods import TaughtConfig as TaughtConfig
from pretrain.methods import TeacherConfig as TeacherConfig
from pretrain.methods import method_preset as method_preset

Windows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DyViTConfig:
    """Hierarchical ViT with dynamic multi-window self-attention."""

    channels: int = 3
    """Input channels, 1 to 16."""
    patch: int = 4
    """Side of a stem patch in pixels; the mask unit is 8 patches wide (32 px at patch 4)."""
    dim: int = 96
    """Channels of the first stage; they double at every following stage."""
    depths: tuple[int, int, int, int] = (1, 1, 10, 2)
    """Blocks per stage."""
    heads: tuple[int, int, int, int] = (2, 4, 6, 12)
    """Attention heads per stage, shared out equally over the stage's windows."""
    windows: Windows = ((4, 8), (2, 4), (2, 14), (7,))
    """Window sides in tokens per stage, one group of heads each; 0 attends to the whole map."""
    global_blocks: int = 0
    """Blocks of stage 3, evenly spaced, whose heads all attend to the whole map, whatever the windows; with
    any, stage 4 does as well. For dense prediction at high resolution (ViTDet, Li et al. 2022, sec. 3)."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over its input width."""
    drop_path: float = 0.0
    """Largest stochastic-depth rate, reached linearly at the last block."""

    @property
    def unit(self) -> int:
        """Side of a mask unit in pixels: the total stride, so that merging never mixes two units."""
        return self.patch * 8

    @property
    def num_features(self) -> int:
        """Channels of the last stage."""
        return self.dim * 8

    def __post_init__(self) -> None:
        _check_channels(self.channels)
        if not (len(self.depths) == len(self.heads) == len(self.windows) == 4):
            raise BadInput("DyViT has 4 stages: give 4 depths, 4 heads and 4 sets of windows")
        if not 0 <= self.global_blocks <= self.depths[2]:
            raise BadInput(f"global blocks {self.global_blocks}: stage 3 has {self.depths[2]} blocks")
        for stage, (heads, windows) in enumerate(zip(self.heads, self.windows, strict=True)):
            width = self.dim * 2**stage
            if not windows or any(w < 0 for w in windows):
                raise BadInput(f"stage {stage + 1}: windows {windows} must be one or more sides >= 0")
            if heads % len(windows):
                raise BadInput(f"stage {stage + 1}: {heads} heads cannot be shared by {len(windows)} windows")
            if width % heads or (width // heads) % 4:
                raise BadInput(
                    f"stage {stage + 1}: {width} channels over {heads} heads must give a multiple of 4 "
                    "(2-D rotary positions rotate pairs along both axes)"
                )


@dataclass(frozen=True)
class ViTConfig:
    """Plain ViT, the backbone of MAE (He et al. 2021)."""

    channels: int = 3
    """Input channels, 1 to 16."""
    patch: int = 16
    """Side of a patch in pixels; it is also the mask unit."""
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over its input width."""
    drop_path: float = 0.0
    """Largest stochastic-depth rate, reached linearly at the last block."""

    @property
    def unit(self) -> int:
        """Side of a mask unit in pixels."""
        return self.patch

    @property
    def num_features(self) -> int:
        """Channels of the output."""
        return self.dim

    def __post_init__(self) -> None:
        _check_channels(self.channels)
        if self.dim % self.heads or self.dim % 4:
            raise BadInput(f"ViT dim {self.dim} must be a multiple of 4 and of its {self.heads} heads")


EncoderConfig = DyViTConfig | ViTConfig


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how to read it."""

    images: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")] = None
    """Folder of images (searched recursively), .npz pack, .tar shards or a folder of them."""
    image_size: int = 224
    """Side of the square training crop in pixels; a multiple of the mask unit."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean of pixels scaled to 0..1; measured on a sample of the data when not given."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation; measured when not given."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop as a share of the image (RandomResizedCrop)."""
    flip: bool = True
    """Flip half of the crops left to right."""
    repeats: int = 1
    """Samples in a row from one decoded image, each with its own crop, flip and masks (Hoffer et al. 2020,
    "Augment your batch"): 2 to 4 feed a faster GPU from the same cores, with less variety in a batch. An
    epoch remains as many samples as there are images."""
    on_bad_image: Literal["skip", "stop"] = "skip"
    """A file that will not decode is named, counted and skipped, or stops the run."""
    workers: int | None = None
    """Processes that decode images; default: one per core beside the trainer (0 on 1 or 2 cores)."""
    loader: Literal["workers", "dali"] = "workers"
    """Who decodes: those processes, or NVIDIA DALI (an extra) with as many threads, on the GPU where there is
    one; a quarter as many processes then read files. DALI decodes every sample, whatever --repeats."""

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise BadInput("give both --mean and --std, or neither (they are then measured)")
        if self.std is not None and (min(self.std) <= 0 or len(self.std) != len(self.mean or ())):
            raise BadInput(f"--std {self.std} must be positive and as long as --mean {self.mean}")
        if self.workers is not None and self.workers < 0:
            raise BadInput(f"--workers {self.workers} must be at least 0")
        if self.repeats < 1:
            raise BadInput(f"--repeats {self.repeats} must be at least 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise BadInput(f"--crop-scale {self.crop_scale} must satisfy 0 < low <= high <= 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay (MAE, appendix A.1)."""

    epochs: float = 100.0
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps; overrides --epochs when given."""
    batch_size: int = 256
    """Images per optimizer step, over all processes and accumulation steps."""
    micro_batch: int | None = None
    """Images per process and forward pass; the rest of the batch is accumulated. Default: no accumulation."""
    base_lr: float = 1.5e-4
    """Learning rate per 256 images; the rate used is base_lr x batch_size / 256."""
    warmup: float = 0.1
    """Share of the steps with linearly rising learning rate."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    ema: float = 0.0
    """Decay of a moving average of the weights that goes into the artifact in their place; 0: none. (That of
    --method cmt is another, --objective.ema.)"""

    @property
    def lr(self) -> float:
        """Peak learning rate: linear scaling (Goyal et al. 2017), as in MAE appendix A.1."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and how it uses the machine."""

    out: Path = Path("run")
    """Run directory: config.json, metrics.jsonl, tensorboard/, reconstructions/, state/, artifact/."""
    seed: int = 0
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, fp16 on older ones, fp32 on CPU."""
    compile: bool = False
    """Compile the step with torch.compile (slow to start, faster to run)."""
    checkpoint_gradients: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: replicate the model (ddp) or shard it (fsdp, FSDP2)."""
    save_minutes: float = 10.0
    """Save the resumable state at least this often (and at the end, on Ctrl-C and on SIGTERM)."""
    save_steps: int | None = None
    """Save the resumable state every so many steps instead."""
    log_steps: int = 10
    """Write metrics every so many steps."""
    sheet_steps: int = 500
    """Write a picture of reconstructions every so many steps; 0: only at the end."""


@dataclass(frozen=True)
class ProbeConfig:
    """What features are worth during training, measured on labelled images that are never trained on."""

    probe: Path | None = None
    """Folder that holds train and test (or val): folders with one folder per class, or .npz packs. Accuracy
    and collapse statistics go into metrics.jsonl, TensorBoard and the loss curve, DM-MSA's gates into the
    first two."""
    probe_epochs: float = 1.0
    """Measure every so many passes over the training images (and before the first step, and at the end)."""
    probe_steps: int | None = None
    """Measure every so many steps instead."""
    probe_protocols: tuple[Literal["knn", "linear"], ...] = ("knn", "linear")
    """As in `coma evaluate`."""
    probe_train: int = 2000
    """Labelled training images to use, drawn alike from every class; 0: all."""
    probe_test: int = 1000
    """Test images to count on, drawn likewise; 0: all."""

    def __post_init__(self) -> None:
        if not self.probe_epochs > 0:
            raise BadInput(f"--probe-epochs {self.probe_epochs} must be more than 0")
        if self.probe_steps is not None and self.probe_steps < 1:
            raise BadInput(f"--probe-steps {self.probe_steps} must be at least 1")
        if min(self.probe_train, self.probe_test) < 0:
            raise BadInput("--probe-train and --probe-test must be at least 0 images")


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


@dataclass(frozen=True)
class FinetuneRecipe(OptimizerConfig):
    """Fine-tuning of the whole encoder under a linear head (MAE, He et al. 2021, app. A.2, table 9).

    The values are those of that table, but for the batch (there 1024; the rate scales with it), the moving
    average, which MAE does not use, and gradient clipping, which is on as in pre-training.
    """

    base_lr: float = 1e-3
    """Learning rate of the head per 256 images; the rate used is base_lr x batch_size / 256."""
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float = 0.9999
    """Decay of the moving average of the weights that is validated and published (from 0.1 at the first step
    it rises to this); 0 takes the weights themselves."""
    layer_decay: float | None = None
    """Learning rate of a layer over that of the layer above it (Clark et al. 2020, ELECTRA; Bao et al. 2021,
    BEiT); 1: all the same. Default: 0.75, or 0.65 for the presets base and vit-base."""
    drop_path: float = 0.1
    """Largest stochastic-depth rate, reached linearly at the last block (Huang et al. 2016)."""
    rand_augment: int = 9
    """Strength of RandAugment (Cubuk et al. 2020), 0 to 10, varied by 0.5; 0: off. For 8-bit images of three
    channels; others are cropped and flipped only."""
    mixup: float = 0.8
    """Beta distribution of mixup (Zhang et al. 2018); 0: off. Every batch is mixed: half of them by mixup,
    half by CutMix where both are on."""
    cutmix: float = 1.0
    """Beta distribution of CutMix (Yun et al. 2019); 0: off."""
    erasing: float = 0.25
    """Share of the images with a random rectangle of noise (Zhong et al. 2020, random erasing)."""
    smoothing: float = 0.1
    """Label smoothing (Szegedy et al. 2016, sec. 7)."""
    validate: float = 1.0
    """Epochs between validations; the weights that do best on the validation images are published."""
    hold_out: float = 0.1
    """Share of every class's training images, 0 to 0.5, that are not trained on and choose the checkpoint
    where there are no validation images; 0 publishes the weights of the last step."""

    def __post_init__(self) -> None:
        if not 0 <= self.hold_out <= 0.5:
            raise BadInput(f"--hold-out {self.hold_out} must be 0 to 0.5")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise BadInput(f"--layer-decay {self.layer_decay} must be more than 0 and at most 1")
        if not 0 <= self.rand_augment <= 10:
            raise BadInput(f"--rand-augment {self.rand_augment} must be 0 to 10")
        for name in ("drop_path", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)} must be 0 or more, below 1")
        if not 0 <= self.erasing <= 1:
            raise BadInput(f"--erasing {self.erasing} must be 0 to 1")
        if min(self.mixup, self.cutmix) < 0:
            raise BadInput(f"--mixup {self.mixup} and --cutmix {self.cutmix} must be at least 0")
        if not self.validate > 0:
            raise BadInput(f"--validate {self.validate} must be more than 0 epochs")


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run."""

    artifact: Path
    """Of kind backbone or pretrained: where the encoder comes from."""
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


# presets ---------------------------------------------------------------------------------------

_DYVIT = {
    "tiny": {"dim": 32, "depths": (1, 1, 6, 2), "heads": (2, 4, 8, 16)},
    "small": {"dim": 64, "depths": (1, 1, 10, 2), "heads": (2, 2, 4, 8)},
    "base": {"dim": 96, "depths": (1, 1, 10, 2), "heads": (2, 4, 6, 12)},
    "large": {"dim": 144, "depths": (1, 1, 20, 2), "heads": (2, 6, 12, 24)},
}
_VIT = {
    "vit-tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit-small": {"dim": 384, "depth": 12, "heads": 6},
    "vit-base": {"dim": 768, "depth": 12, "heads": 12},
    "vit-large": {"dim": 1024, "depth": 24, "heads": 16},
}
ENCODER_PRESETS = (*_DYVIT, *_VIT)


def encoder_preset(name: str, image_size: int = 224, channels: int = 3) -> EncoderConfig:
    """The encoder called `name`, with patch and windows that suit square images of `image_size` pixels.

    Raises:
        BadInput: no preset has that name.
    """
    if name in _VIT:
        patch = 16 if image_size >= 112 else 8 if image_size >= 64 else 4
        return ViTConfig(channels=channels, patch=patch, **_VIT[name])
    if name in _DYVIT:
        return dyvit_preset(name, image_size, channels)
    raise BadInput(f"no model preset {name!r}; there are: {', '.join(ENCODER_PRESETS)}")


def dyvit_preset(name: str, image_size: int = 224, channels: int = 3) -> DyViTConfig:
    """DyViT `tiny`, `small`, `base` or `large` for images of `image_size` pixels.

    Windows lie inside a mask unit, or are as large as such an image: neither is cut from a map.
    """
    patch = 4 if image_size >= 112 else 2 if image_size >= 64 else 1
    units = -(-image_size // (patch * 8))
    windows = ((4, 8), (2, 4), (2, 2 * units), (units,))
    return DyViTConfig(channels=channels, patch=patch, windows=windows, **_DYVIT[name])


def _check_channels(channels: int) -> None:
    if not 1 <= channels <= 16:
        raise BadInput(f"channels {channels} must be 1 to 16")
