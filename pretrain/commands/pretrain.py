"""Pre-train an encoder on a folder of images.

The model learns to fill in what masks hide. The run writes an artifact for `coma evaluate`,
`coma export` and fine-tuning. Ctrl-C saves the run; --resume continues it.

Examples:
  coma pretrain PHOTOS --out runs/first --model tiny --image-size 64 --epochs 100
  coma pretrain PHOTOS --out runs/mae --model vit-base --method mae --batch-size 1024
  coma pretrain PHOTOS --out runs/cmt --model vit-base --method cmt --teacher-weights FILE
  coma pretrain PHOTOS --out runs/more --init runs/first/artifact
  coma pretrain --resume runs/first
  torchrun --nproc-per-node 8 -m coma pretrain PHOTOS --out runs/eight --batch-size 2048
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from coma.arguments import parse_arguments, parse_known
from coma.config import (
    ENCODER_METAVAR,
    METHOD_PRESETS,
    BeyondConfig,
    DataConfig,
    Degradation,
    EncoderConfig,
    InitConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    decoder_dim,
    encoder_preset,
    method_preset,
)
from coma.config.serialization import read_config, to_plain
from coma.errors import BadInput, ComaError
from coma.image_size import ImageSize
from coma.preflight import require_packages
from coma.ranges import CHANNELS, EPOCHS, RARE, SIDE, STEPS, Ranged
from coma.registry import METHODS, presets

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[METHOD_PRESETS]

_RECIPES = {
    "default": OptimizerConfig(),
    "small-data": OptimizerConfig(epochs=400, batch_size=64, base_lr=4e-3, warmup=0.05),
}

_METHOD_HELP = (
    "; ".join(f"{name}: {preset.help}" for name, preset in presets(METHODS).items())
    + ". --method X --help-all lists the settings of X; default: coma"
)

_NOT_RESUMED = ("model", "method", "degrade", "recipe", "channels", "from_", "init")


@dataclass(frozen=True)
class Presets(Ranged):
    """Presets; the flags below override what they set."""

    model: Annotated[str | None, tyro.conf.arg(metavar=ENCODER_METAVAR)] = None
    """Encoder: tiny to large are DyViT, vit-* are plain ViT, timm:NAME is timm's network of that name;
    default: small"""
    method: Annotated[Method | None, tyro.conf.arg(help=_METHOD_HELP)] = None
    degrade: Annotated[Degradation | None, RARE] = None
    """Degradation of --method beyond; `coma degrade IMAGE --out SHEET` draws all of them; default:
    zoom-in+mask"""
    teacher: Annotated[str | None, RARE, tyro.conf.arg(metavar="NAME")] = None
    """Teacher of --method cmt and coma-balanced: a vision transformer by its name in timm, or the directory
    of an artifact. CMT-MAE's published accuracy was reached with CLIP. With --resume: where that artifact is
    now; default: vit_base_patch16_clip_quickgelu_224.openai, which is CLIP ViT-B/16"""
    teacher_weights: Annotated[Path | None, RARE] = None
    """The teacher's .safetensors file; nothing is downloaded; default: that in the model hub's local cache"""
    recipe: Literal["default", "small-data"] | None = None
    """small-data suits up to about 10,000 images on one GPU; default: default"""
    channels: Annotated[int | None, CHANNELS, RARE] = None
    """Channels of the images; default: 3"""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Settings of another run, or of a JSON, YAML or TOML file."""
    resume: Path | None = None
    """Resume the run in this directory with its saved settings."""
    allow_changed_data: Annotated[bool, RARE] = False
    """With --resume: continue although images were added, removed, renamed or changed in size meanwhile."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Describe the run, estimate time and memory, and write nothing."""


@dataclass(frozen=True)
class _First(Presets):
    """Flags that decide the defaults of the others."""

    image_size: Annotated[ImageSize | None, SIDE] = None
    epochs: Annotated[float | None, EPOCHS] = None
    steps: Annotated[int | None, STEPS] = None
    probe_epochs: Annotated[float | None, EPOCHS] = None
    probe_steps: Annotated[int | None, STEPS] = None
    init: str | None = None
    download: bool = False


def run(argv: list[str]) -> None:
    """Trains and prints where the results are.

    Raises:
        BadInput: settings, images or directories that cannot be used.
        CheckFailed: a loss that is not finite, or results that could not be written.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    main = "LOCAL_RANK" not in os.environ or os.environ.get("RANK") == "0"  # torchrun sets both
    try:
        config, resume, allow_changed_data, dry_run = parse(argv)
        require_packages("tensorboard", "matplotlib")
        from pretrain.training import pretrain

        folder = pretrain(config, resume=resume, allow_changed_data=allow_changed_data, dry_run=dry_run)
    except ComaError as error:
        from pretrain.training.distributed import AGREED

        if main or AGREED not in getattr(error, "__notes__", ()):
            raise
        raise SystemExit(error.exit_code) from None  # process 0 prints it
    if main and not dry_run:
        print(summary(folder))


def parse(argv: list[str]) -> tuple[PretrainConfig, bool, bool, bool]:
    """Returns the settings in `argv`, and whether they resume a run, allow changed data, and run dry.

    Raises:
        BadInput: presets that contradict each other, or a run that cannot be read.
    """
    first = parse_known(_First, argv, prog="coma pretrain")
    defaults = _counted_in_epochs(_defaults(first), first)
    flat = tyro.conf.OmitArgPrefixes
    groups: list[tuple[str, Any, Any]] = [
        ("presets", Annotated[Presets, flat], Presets()),
        ("init", Annotated[InitConfig, flat], defaults.init),
        ("data", Annotated[DataConfig, flat], defaults.data),
        ("optimizer", Annotated[OptimizerConfig, flat], defaults.optimizer),
        ("run", Annotated[RunConfig, flat], defaults.run),
        ("probe", Annotated[ProbeConfig, flat], defaults.probe),
        ("model", Annotated[type(defaults.model), RARE], defaults.model),
        ("objective", Annotated[type(defaults.objective), RARE], defaults.objective),
    ]
    fields = [(name, kind, dataclasses.field(default=default)) for name, kind, default in groups]
    flags = dataclasses.make_dataclass("Flags", fields, frozen=True)
    given: Any = parse_arguments(flags, argv, prog="coma pretrain", description=__doc__)
    data: DataConfig = given.data
    if first.from_ and data.images != defaults.data.images and data.mean == defaults.data.mean:
        data = replace(data, mean=None, std=None)  # those of other images: to be measured again
    config = PretrainConfig(
        data, given.model, given.objective, given.optimizer, given.run, given.probe, given.init
    )
    if first.resume and config.run.out != defaults.run.out:
        raise BadInput(
            f"--out {config.run.out} does not go with --resume, which continues in {defaults.run.out}"
        )
    if first.allow_changed_data and not first.resume:
        raise BadInput("--allow-changed-data goes with --resume; a new run takes the images as they are")
    for name in ("init", "probe"):
        _refuse_idle(name, getattr(config, name), getattr(defaults, name))
    return config, first.resume is not None, first.allow_changed_data, first.dry_run


def _refuse_idle(needed: str, group: Any, defaults: Any) -> None:
    """Refuses flags of a group that were given without the one that they belong to."""
    values, before = vars(group), vars(defaults)
    idle = [f"--{name.replace('_', '-')}" for name in values if values[name] != before[name]]
    if idle and values[needed] is None:
        raise BadInput(f"{', '.join(idle)}: no effect without --{needed}; give that too, or leave it out")


def _defaults(first: _First) -> PretrainConfig:
    if first.resume:
        given = [name for name in _NOT_RESUMED if getattr(first, name) is not None]
        if given:
            flag = given[0].strip("_")
            raise BadInput(f"--{flag} does not go with --resume, which takes the settings of the run")
        config = read_config(first.resume)
        folder = first.resume.parent if first.resume.is_file() else first.resume
        if first.teacher or first.teacher_weights:
            config = replace(config, objective=_with_teacher(config.objective, first))
        return replace(config, run=replace(config.run, out=folder))
    like_weights = first.init is not None and not (first.model or first.from_)
    config = read_config(first.from_, image_size=first.image_size) if first.from_ else PretrainConfig()
    if like_weights:
        config = _like_weights(config, str(first.init), first)
    elif first.from_ and config.init.init_sha256:
        config = replace(config, init=replace(config.init, init_sha256=None))
    size = first.image_size or config.data.image_size
    channels = config.model.channels if first.channels is None else first.channels
    if first.model or not (first.from_ or like_weights):
        model = encoder_preset(first.model or "small", size, channels)
    else:
        model = replace(config.model, channels=channels)
    if first.method or not first.from_:
        width = decoder_dim(model) if first.model else config.objective.decoder.dim
        objective = method_preset(first.method or "coma", decoder_dim=width)
        if like_weights:
            objective = replace(objective, decoder=config.objective.decoder)
    else:
        objective = _with_any_weights(config.objective)
    if first.degrade:
        if not isinstance(objective, BeyondConfig):
            raise BadInput(
                f"--degrade {first.degrade} belongs to --method beyond; give that, or leave it out"
            )
        objective = replace(objective, degrade=first.degrade)
    if first.teacher or first.teacher_weights:
        objective = _with_teacher(objective, first)
    optimizer = _RECIPES[first.recipe] if first.recipe else config.optimizer
    return replace(config, model=model, objective=objective, optimizer=optimizer)


def _like_weights(config: PretrainConfig, source: str, first: _First) -> PretrainConfig:
    """Returns the settings with the encoder, decoder and image size of the weights to start from."""
    from coma.artifact.weights import model_of  # loads torch

    model, about = model_of(source, download=first.download)
    decoder = replace(config.objective.decoder, dim=decoder_dim(model))
    facts = ", ".join(f"{name} {value}" for name, value in to_plain(model, EncoderConfig).items())
    data = config.data if about is None else replace(config.data, image_size=about.image_size)
    size = "" if about is None or first.image_size else f", at its --image-size {about.image_size.words}"
    log.info("--init %s: trains its model (%s)%s", source, facts, size)
    if about is not None and about.objective is not None:
        decoder = about.objective.decoder
    objective = replace(config.objective, decoder=decoder)
    return replace(config, data=data, model=model, objective=objective)


def _counted_in_epochs(config: PretrainConfig, first: _First) -> PretrainConfig:
    """Drops the other run's steps, which override epochs, where only epochs are given."""
    if first.epochs is not None and first.steps is None:
        config = replace(config, optimizer=replace(config.optimizer, steps=None))
    if first.probe_epochs is not None and first.probe_steps is None:
        config = replace(config, probe=replace(config.probe, probe_steps=None))
    return config


def _with_teacher(objective: ObjectiveConfig, first: Presets) -> ObjectiveConfig:
    if objective.teacher is None:
        flag = f"--teacher {first.teacher}" if first.teacher else f"--teacher-weights {first.teacher_weights}"
        taught = [name for name in METHOD_PRESETS if method_preset(name).teacher]
        raise BadInput(
            f"{flag} belongs to --method {' and '.join(taught)}; give one of them, or leave it out"
        )
    teacher = replace(objective.teacher, weights=first.teacher_weights)
    if first.teacher:
        teacher = replace(teacher, name=first.teacher, sha256=None)
    return replace(objective, teacher=teacher)


def _with_any_weights(objective: ObjectiveConfig) -> ObjectiveConfig:
    # a new run notes for itself which weights its teacher has
    if objective.teacher is None:
        return objective
    return replace(objective, teacher=replace(objective.teacher, sha256=None))


def summary(folder: Path) -> str:
    """Returns what a finished run says: its loss, where its files are, and what to do next."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]  # probes have rows of their own
    last = rows[-1]
    length = "--steps" if read_config(folder).optimizer.steps else "--epochs"
    sheets = list((folder / "reconstructions").glob("step-*.png"))
    sheet = max(sheets, key=lambda path: (len(path.name), path.name), default=folder / "reconstructions")
    return f"""
{last["step"]} steps, {last["images_seen"]} images seen, loss {rows[0]["loss"]:.4f} -> {last["loss"]:.4f}

  artifact         {folder / "artifact"} (encoder and decoder)
  reconstructions  {sheet}
  loss curve       {folder / "loss_curve.png"}
  metrics          {folder / "metrics.jsonl"}, or: tensorboard --logdir {folder / "tensorboard"}

next:
  coma evaluate {shlex.quote(str(folder / "artifact"))} --data CLASSES
      measure its features on labelled images: CLASSES holds train and test, a folder per class in each
  coma pretrain --resume {shlex.quote(str(folder))} {length} N
      train it for longer; its learning rate rises again, along the longer schedule"""
