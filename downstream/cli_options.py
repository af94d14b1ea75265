"""Options that `coma detect` and `coma segment` share: frozen dataclasses, free of OpenMMLab and torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from coma.config import ENCODER_METAVAR
from coma.image_size import ImageSize
from coma.ranges import BATCH, DECAY, EPOCHS, PROCESSES, RATE, WEIGHT_DECAY, Range, Ranged
from coma.runtimes.names import RuntimeName

ENCODER_OPTIONS = ("drop_path", "head_channels", "frozen_stages", "global_blocks", "grad_checkpointing")
"""Training options that also apply to a configuration of the user's own, once an encoder is put into it."""
Device = Literal["auto", "cuda", "cpu"]
Split = Literal["train", "val", "test"]
UNSET = arg(help_behavior_hint="")
"""Marks flags that have no default."""


@dataclass(frozen=True)
class TrainOptions(Ranged):
    """Fine-tunes an encoder for dense prediction.

    With --config, the configuration holds the training settings; the flags that were given change them.
    """

    artifact: Annotated[Path | None, Positional, arg(metavar="ARTIFACT", help_behavior_hint="")] = None
    """Pre-trained artifact, for example runs/first/artifact, or tiny-64, which comes with the package. Of a
    detector (coma segment: a segmentor), all that fits is used: backbone, neck and heads; the layers of other
    classes are new."""
    data: Annotated[Path | None, arg(metavar="DATASET", help_behavior_hint="")] = None
    """Dataset with a train and a val split."""
    out: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="")] = None
    """New run directory."""
    resume: Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="")] = None
    """Resume the run in this directory with its saved settings."""
    device: Device = "auto"
    """Device to train on; auto is the GPU where there is one."""
    epochs: Annotated[float, EPOCHS] = 24
    """Passes over the training images."""
    steps: Annotated[int | None, Range(1, 10**9), UNSET] = None
    """Optimizer steps, instead of --epochs."""
    batch_size: Annotated[int, BATCH] = 4
    """Images per step, over all processes."""
    micro_batch: Annotated[
        int | None, BATCH, arg(help_behavior_hint="(default: as many as fit into the memory)")
    ] = None
    """Images per process and forward pass; gradients accumulate over the batch."""
    lr: Annotated[float, RATE] = 1e-4
    """Peak learning rate of AdamW."""
    image_size: Annotated[ImageSize | None, Range(32, 16384), arg(help_behavior_hint="")] = None
    """Height and width in pixels that images are resized to fit; one number for both."""
    workers: Annotated[int | None, PROCESSES, arg(help_behavior_hint="(default: cores - 1, at most 8)")] = (
        None
    )
    """Processes that load images."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of the new weights, the order of the images and the augmentation."""
    preset: Annotated[str | None, arg(metavar=ENCODER_METAVAR, help_behavior_hint="")] = None
    """Encoder with random weights, instead of an artifact: the baseline to compare with."""
    frozen_stages: Annotated[int | None, Range(-1, 256), arg(help_behavior_hint="(default: -1)")] = None
    """Freeze the stem and this many stages (plain ViT: blocks); 0 freezes the stem, -1 nothing."""
    drop_path: Annotated[float | None, DECAY, arg(help_behavior_hint="(default: 0.1)")] = None
    """Largest stochastic-depth rate of the encoder."""
    head_channels: Annotated[int | None, Range(1, 8192), arg(help_behavior_hint="(default: 256)")] = None
    """Channels of neck and head; 128 suits the tiny encoder, and CPUs."""
    global_blocks: Annotated[int | None, Range(0, 256), arg(help_behavior_hint="(default: 0)")] = None
    """Number of stage-3 blocks with global attention, evenly spaced; any also make stage 4 global (DyViT)."""
    weight_decay: Annotated[float, WEIGHT_DECAY] = 0.05
    """Weight decay of matrices; vectors have none."""
    layer_decay: Annotated[float, Range(0, 1, above=True)] = 0.8
    """Learning rate of an encoder layer relative to the next layer's."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of matrix products; bf16 and fp16 use automatic mixed precision."""
    validations: Annotated[int, Range(1, 10**6)] = 12
    """Number of validations, evenly spaced over the run."""
    save_steps: Annotated[
        int | None, Range(1, 10**9), arg(help_behavior_hint="(default: at every validation)")
    ] = None
    """Steps between two checkpoints."""
    config: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Any configuration of MMDetection or MMSegmentation, instead of ours. It is a Python program: use only
    configurations that you trust."""
    cfg_options: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE", help_behavior_hint="")] = ()
    """Changes to the configuration, as OpenMMLab's tools take them: model.backbone.drop_path=0.2"""


@dataclass(frozen=True)
class TestOptions:
    """Measures a fine-tuned model on labelled images."""

    artifact: Annotated[Path, Positional, arg(metavar="ARTIFACT")]
    """Artifact of `coma detect train` or `coma segment train`."""
    data: Annotated[Path, arg(metavar="DATASET")]
    """Dataset to measure on."""
    split: Split = "val"
    """Split to measure on."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder to write scores.json to."""
    device: Device = "auto"
    """Device to compute on; auto is the GPU where there is one."""


@dataclass(frozen=True)
class PredictOptions(Ranged):
    """Predicts on images and videos."""

    artifact: Annotated[Path, Positional, arg(metavar="ARTIFACT")]
    """Artifact of `coma detect train` or `coma segment train`."""
    images: Annotated[Path, Positional, arg(metavar="IMAGES")]
    """An image, a video, or a folder of them (searched recursively)."""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """New folder for the pictures and the predictions."""
    device: Device = "auto"
    """Device to compute on; auto is the GPU where there is one."""
    runtime: RuntimeName = "auto"
    """Runtime; auto is PyTorch. All others take the files in the folder export beside the artifact."""
    classes: Annotated[str, arg(metavar="NAME,NAME", help_behavior_hint="(default: all)")] = ""
    """Classes that are predicted, separated by commas."""
    format: Annotated[str, arg(metavar="FORMAT,FORMAT")] = "coco"
    """Formats of the results: some of coco, yolo, labelme, csv."""
    tile_size: Annotated[
        int | None, Range(32, 1 << 16), arg(help_behavior_hint="(default: pictures are taken whole)")
    ] = None
    """Side of the tiles that larger pictures are cut into, in pixels."""
    overlap: Annotated[float, Range(0, 0.9)] = 0.2
    """Share of a tile that also lies in the next one."""


@dataclass(frozen=True)
class RuntimeOptions(Ranged):
    """How a classifier is run on images."""

    runtime: RuntimeName = "auto"
    """Runtime; auto is PyTorch for an artifact, and ONNX Runtime or TensorRT for an exported file. For an
    artifact, all but pytorch take the files in the folder export beside it."""
    batch_size: Annotated[int, BATCH] = 64
    """Images per forward pass."""
    workers: Annotated[int | None, PROCESSES, arg(help_behavior_hint="(default: cores - 1, at most 8)")] = (
        None
    )
    """Processes that load images."""


@dataclass(frozen=True)
class CheckOptions:
    """Checks every file of a dataset and prints what it holds."""

    data: Annotated[Path, arg(metavar="DATASET")]
    """Dataset to check."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Folder for contact_sheet.png: images of every split with their labels."""


def is_main() -> bool:
    """Returns whether this process reports and writes; torchrun starts several."""
    return os.environ.get("RANK", "0") == "0"
