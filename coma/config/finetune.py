"""Settings of `coma classify train`: a run's `config.json` stores them, and the flags are made from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from coma.config.architectures import DyViTConfig, EncoderConfig
from coma.config.runs import DataConfig, OptimizerConfig, RunConfig
from coma.image_size import ImageSize
from coma.paths import Location
from coma.ranges import DECAY, EPOCHS, IMAGES, MEAN, RARE, RATE, SEED, SHARE, STD, TILE, Range

_NO_FLAG = tyro.conf.Fixed, tyro.conf.Suppress


@dataclass(frozen=True)
class FinetuneDataConfig(DataConfig):
    """Labelled images and how they are read."""

    images: Annotated[Location, tyro.conf.arg(name="data", metavar="CLASSES")] = field()
    """Folder that holds train and test, and perhaps val: folders with one folder per class, .npz packs, or
    .csv files with a path and labels in every line. With --test, the training images themselves."""
    image_size: Annotated[ImageSize, Range(0, 16384)] = field(default=ImageSize(0, 0))
    """Size of the training crop in pixels, whole mask units: side of a square, or height and width; 0: as in
    pre-training."""
    mean: Annotated[tuple[float, ...] | None, MEAN, *_NO_FLAG] = None
    """Filled in when the run starts, like `std`: those of the artifact."""
    std: Annotated[tuple[float, ...] | None, STD, *_NO_FLAG] = None
    tiles: Annotated[int | None, TILE, *_NO_FLAG] = None
    """Labels are those of whole images."""
    crop_scale: Annotated[
        tuple[float, float], Range(0, 1, above=True), RARE, tyro.conf.arg(metavar="LOW HIGH")
    ] = (0.08, 1.0)
    """Area of the random crop as a share of the image (RandomResizedCrop)."""
    loader: Annotated[Literal["workers", "dali"], *_NO_FLAG] = "workers"
    """NVIDIA DALI does not augment as RandAugment does."""


@dataclass(frozen=True)
class FinetuneRecipe(OptimizerConfig):
    """Fine-tuning of the whole encoder under a linear head (MAE, He et al. 2021, app. A.2, table 9).

    The values are those of that table, except for the batch (1024 there; the learning rate scales with it),
    the moving average, which MAE does not use, and gradient clipping, which is on as in pre-training.
    """

    base_lr: Annotated[float, RATE] = 1e-3
    """Learning rate of the head per 256 images; the rate used is base_lr x batch_size / 256."""
    warmup: Annotated[float, SHARE, RARE] = 0.05
    betas: Annotated[tuple[float, float], DECAY, RARE, tyro.conf.arg(metavar="BETA1 BETA2")] = (0.9, 0.999)
    ema_decay: Annotated[float, DECAY] = 0.9999
    """Decay of the moving average of the weights that is validated and published (it rises to this value from
    0.1 at the first step); 0 uses the weights themselves."""
    layer_decay: Annotated[float | None, Range(0, 1, above=True)] = None
    """Ratio of a layer's learning rate to that of the layer above it (Clark et al. 2020, ELECTRA; Bao et al.
    2021, BEiT); 1: no decay. Default: 0.75, or 0.65 for the presets base and vit-base."""
    drop_path: Annotated[float, DECAY] = 0.1
    """Stochastic-depth rate of the last block; it grows linearly with depth (Huang et al. 2016)."""
    frozen_stages: Annotated[int, Range(-1, 256)] = -1
    """Freeze the stem and this many stages (plain ViT: blocks); 0 freezes the stem, -1 nothing."""
    frozen: bool = False
    """Train a linear head on frozen features of centre crops, without augmentation, to the optimum (L-BFGS):
    minutes instead of hours. The penalty of the head is chosen on the validation images."""
    class_balance: Literal["none", "weights", "sampling"] = "none"
    """Rare classes count as much as frequent ones. weights: weight the loss of every class by the inverse of
    its number of training images. sampling: draw the images class by class, so that all classes are shown
    equally often; an image of several classes is drawn for each of them."""
    rand_augment: Annotated[int, Range(0, 10), RARE] = 9
    """Magnitude of RandAugment (Cubuk et al. 2020), with standard deviation 0.5; 0: off. It applies to 8-bit
    images of three channels; other images are cropped and flipped only."""
    mixup: Annotated[float, Range(0, 1000), RARE] = 0.8
    """Alpha of mixup (Zhang et al. 2018); 0: off. Every batch is mixed: half of them by mixup and half by
    CutMix if both are on."""
    cutmix: Annotated[float, Range(0, 1000), RARE] = 1.0
    """Alpha of CutMix (Yun et al. 2019); 0: off."""
    random_erasing: Annotated[float, SHARE, RARE] = 0.25
    """Probability that a rectangle of an image is replaced by noise (Zhong et al. 2020)."""
    label_smoothing: Annotated[float, DECAY, RARE] = 0.1
    """Label smoothing (Szegedy et al. 2016, sec. 7)."""
    label_share: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Share of every class's training images that is used, held-out ones included: at least one of a class,
    drawn with the seed. Few labels are what pre-training is for."""
    validate: Annotated[float, EPOCHS] = 1.0
    """Epochs between validations; the weights with the best validation accuracy are published."""
    hold_out: Annotated[float, Range(0, 0.5)] = 0.1
    """Share of every class's training images that is held out for validation if there are no validation
    images; 0 publishes the weights of the last step."""


@dataclass(frozen=True)
class FinetuneRunConfig(RunConfig):
    """Directory of the run, and its use of the machine."""

    out: Path = field()
    """New run directory: config.json, metrics.jsonl, tensorboard/, state/, loss_curve.png, and artifact/, the
    classifier that did best on the validation images."""
    seed: Annotated[int, SEED] = 0
    """Seed of the head, crops, augmentation and held-out images."""
    parallel: Annotated[Literal["ddp", "fsdp"], *_NO_FLAG] = "ddp"
    """A classifier is trained in one process."""
    reconstruction_every: Annotated[int, IMAGES, *_NO_FLAG] = 0
    """A classifier reconstructs nothing."""


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run."""

    artifact: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ARTIFACT")]
    """Artifact of any kind whose encoder is trained on (run/artifact, or tiny-64, which comes with the
    package). A classifier of the same classes keeps its head."""
    data: FinetuneDataConfig
    run: FinetuneRunConfig
    optimizer: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    test: Location | None = None
    """Labelled test images, if they are not in --data."""
    val: Location | None = None
    """Labelled images that choose the checkpoint, if they are not in --data."""
    from_scratch: bool = False
    """Start from random weights instead of the artifact's: the baseline of fine-tuning."""
    model: Annotated[EncoderConfig, *_NO_FLAG] = field(default_factory=DyViTConfig)
    """Filled in when the run starts: the artifact's encoder with the recipe's drop path."""
    class_names: Annotated[tuple[str, ...] | None, *_NO_FLAG] = None
    """Filled in when the run starts."""
