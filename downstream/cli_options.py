"""What can be chosen about fine-tuning on the command line; plain frozen data, no mm and no torch in here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from coma.config import ENCODER_PRESETS
from coma.errors import BadInput
from coma.ranges import BATCH, DECAY, EPOCHS, PROCESSES, RATE, WEIGHT_DECAY, Range, Ranged

if TYPE_CHECKING:
    Preset = str
else:
    Preset = Literal[ENCODER_PRESETS]


@dataclass(frozen=True)
class TrainingOptions(Ranged):
    """How long and how to train.

    With --config only those of the encoder apply (drop path, head channels, frozen stages, global blocks,
    checkpoint gradients); the rest is the configuration's.
    """

    epochs: Annotated[float | None, EPOCHS] = None
    """Passes over the training images (default: 24 for detection, 100 for segmentation)."""
    steps: Annotated[int | None, Range(1, 10**9)] = None
    """Optimizer steps, in place of --epochs."""
    batch_size: Annotated[int | None, BATCH] = None
    """Images per step, all processes together (default: 4 for detection, 8 for segmentation)."""
    lr: Annotated[float | None, RATE] = None
    """Peak learning rate of AdamW (default: 1e-4)."""
    weight_decay: Annotated[float | None, WEIGHT_DECAY] = None
    """Of matrices; vectors have none (default: 0.05)."""
    layer_decay: Annotated[float | None, Range(0, 1, above=True)] = None
    """Learning rate of an encoder's layer over that of the next (default: 0.8 for detection, 0.75 for
    segmentation)."""
    drop_path: Annotated[float | None, DECAY] = None
    """Largest stochastic-depth rate of the encoder (default: 0.1)."""
    head_channels: Annotated[int | None, Range(1, 8192)] = None
    """Width of neck and head (default: 256 for detection, 512 for segmentation); 128 suits
    the tiny encoder, and CPUs."""
    frozen_stages: Annotated[int | None, Range(-1, 256)] = None
    """Keep the weights of the stem and so many stages (0: the stem alone; plain ViT: blocks); -1 trains all
    (default)."""
    global_blocks: Annotated[int | None, Range(0, 256)] = None
    """Blocks of stage 3 that attend to the whole map, evenly spaced; with any, all of stage 4 (DyViT)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of matrix products; bf16 and fp16 use automatic mixed precision."""
    validations: Annotated[int, Range(1, 10**6)] = 12
    """How often to measure on the validation images, evenly over the run."""
    save_steps: Annotated[int | None, Range(1, 10**9)] = None
    """Save the resumable state every so many steps (default: at every validation)."""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes that read images; default: one per core beside the trainer (0 on 1 or 2 cores), at most 8."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Of weights, order and augmentation."""


@dataclass(frozen=True)
class FromOptions:
    """Where the encoder and the configuration come from."""

    artifact: Annotated[Path | None, tyro.conf.Positional] = None
    """Pre-trained artifact (run/artifact)."""
    preset: Preset | None = None
    """In place of an artifact: an encoder with random weights, to compare with."""
    config: Path | None = None
    """Any mmengine configuration, in place of ours; --cfg-options change it. It is a Python program: run only
    what you trust."""
    cfg_options: tuple[str, ...] = ()
    """Changes to the configuration, as OpenMMLab's tools take them: model.backbone.drop_path=0.2 ..."""


ENCODER_OPTIONS = ("drop_path", "head_channels", "frozen_stages", "global_blocks", "grad_checkpointing")
"""Those that also apply to a configuration of the user's own, when an artifact or preset is put into it."""


def check_foreign(source: FromOptions, training: TrainingOptions, others: Mapping[str, object]) -> None:
    """Refuse options that --config leaves without effect.

    Args:
        source: Where the encoder comes from.
        training: What was asked for.
        others: Options of one command by name; None where they were not given.

    Raises:
        BadInput: naming them.
    """
    applies = ENCODER_OPTIONS if source.artifact or source.preset else ()
    given = [
        each.name
        for each in fields(training)
        if each.name not in applies and getattr(training, each.name) != each.default
    ]
    given += [name for name, value in others.items() if value is not None]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise BadInput(
            f"{flags}: without effect on a configuration of your own; change it there, or by --cfg-options"
        )


def is_main() -> bool:
    """Whether this process is the one that reports and writes; torchrun starts several."""
    return os.environ.get("RANK", "0") == "0"
