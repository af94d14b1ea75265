"""What a run is going to do, in the lines that open it and that `--dry-run` prints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from coma.amp import Precision
from coma.config import EncoderConfig, FinetuneConfig, ObjectiveConfig, PretrainConfig, encoder_preset
from coma.config.serialization import to_plain
from coma.image_size import ImageSize
from coma.masking.patchify import unit_grid
from coma.messages import counted
from coma.models import build_encoder
from coma.models.blocks import freeze_stages
from coma.models.classifiers import Classifier, build_classifier
from coma.objectives import build_objective
from coma.progress import clock
from coma.registry import ARCHITECTURES, presets
from pretrain.training import throughput
from pretrain.training.distributed import Processes
from pretrain.training.run_plan import RunPlan, disk_space

Config = PretrainConfig | FinetuneConfig
_NOTHING_WRITTEN = "nothing was written: a dry run"


@dataclass(frozen=True)
class Measurement:
    """Steps that were taken to estimate a run."""

    steps: int
    """Number of steps, without the first one, which also starts the loader and warms up the device."""
    seconds: float
    """Mean duration of a step, with the wait for images."""
    waited: float | None
    """Share of it that was spent waiting for images; None if that was not measured."""
    left: int
    """Steps that the run has left."""
    memory: float | None
    """Peak memory in GiB; None where it cannot be measured."""
    device: torch.device
    unit: tuple[str, str] = ("step", "steps")
    """What a step is called, and several of them."""
    without: str = "pictures, evaluations and saves"
    """What the run does besides its steps, which is not measured."""


def summary(plan: RunPlan[Any], group: Processes, precision: Precision) -> list[str]:
    """Returns the lines; only shapes are computed."""
    config: Config = plan.config
    trains = {"steps": _steps(plan, group), "learning rate": _learning_rate(plan)}
    rows = {
        "images": _images(plan),
        "crops": _crops(config),
        "model": _model(config),
        "FLOPs": _flops(config),
        **({} if is_frozen(config) else trains),
        "device": _device(config, group, precision),
        "writes": _writes(config),
    }
    return _table(rows)


def estimate(measured: Measurement | None) -> list[str]:
    """Returns the lines that end a dry run, on time and memory; None: no step is left to measure."""
    if measured is None:
        return [*_table({"time": "all steps are done"}), _NOTHING_WRITTEN]
    on_gpu, memory = measured.device.type == "cuda", "cannot be measured on this device"
    if measured.memory is not None:
        what = "allocated on the GPU" if on_gpu else "resident in this process, without its workers"
        memory = f"{measured.memory:.2f} GiB at most, {what}"
    seconds, left, unit = measured.seconds, measured.left, measured.unit
    waited = "" if measured.waited is None else f", {measured.waited:.0%} of it waiting for images"
    time = (
        f"{clock(seconds * left)} for {counted(left, *unit)}, without {measured.without}: "
        f"{seconds:.3g} s a {unit[0]}{waited} "
        f"(mean of {counted(measured.steps, *unit)} after the first)"
    )
    return [*_table({"time": time, "memory": memory}), _NOTHING_WRITTEN]


def is_frozen(config: Config) -> bool:
    """Returns whether a run fits a linear head on frozen features."""
    return isinstance(config, FinetuneConfig) and config.optimizer.frozen


def _table(rows: dict[str, str]) -> list[str]:
    return [f"{name:15}{text}" for name, text in rows.items()]


def _images(plan: RunPlan[Any]) -> str:
    named = {name.removesuffix("images"): each for name, each in plan.sources.items()}
    parts = [f"{len(each):,} {name}in {each.location}" for name, each in named.items()]
    return f"{', '.join(parts)}; {counted(plan.config.model.channels, 'channel')}"


def _crops(config: Config) -> str:
    data, (low, high) = config.data, config.data.crop_scale  # shares of the image's area
    size = config.view_size if isinstance(config, PretrainConfig) else data.image_size
    flipped = ", half of them flipped" if data.flip else ""
    repeats = f", {data.aug_repeats} from each decoded image" if data.aug_repeats > 1 else ""
    shown = f"{low:.0%} to {high:.0%} of the area{flipped}{repeats}"
    if is_frozen(config):
        shown = "the centre crop of each image"
    rows, cols = unit_grid(*size, config.model.unit)
    units = f"{counted(rows * cols, 'mask unit')} of {config.model.unit} px"
    return f"{size.height} x {size.width} px, {shown}; {units}"


def _model(config: Config) -> str:
    encoder, objective = _parameters(config)
    head = "a decoder" if isinstance(config, PretrainConfig) else "a linear head"
    trained = f"{name_of(config.model, config.data.image_size)}, {encoder:,} parameters"
    text = f"{trained}; with {head} {objective:,} are trained"
    if isinstance(config, PretrainConfig):
        views = throughput.views_per_image(config)
        method = to_plain(config.objective, ObjectiveConfig)["method"]
        text += f", by {method} on {counted(views, 'view')} of each image"
    return text


def _parameters(config: Config) -> tuple[int, int]:
    """Returns the parameters of the encoder, and all that are trained."""
    with torch.device("meta"):
        encoder = build_encoder(config.model)
        whole = (
            build_objective(config.objective, build_encoder(config.model))
            if isinstance(config, PretrainConfig)
            else _classifier(config)
        )
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    return sum(p.numel() for p in encoder.parameters()), trained


def _classifier(config: FinetuneConfig) -> Classifier:
    """Returns the classifier, of which what is trained requires gradients."""
    classifier, recipe = build_classifier(config.model, len(config.class_names or ())), config.optimizer
    freeze_stages(classifier, len(classifier.parts()) - 1 if recipe.frozen else recipe.frozen_stages)
    return classifier


def name_of(model: EncoderConfig, image_size: ImageSize) -> str:
    """Returns the architecture of an encoder, and its preset if it is one."""
    plain = to_plain(model, EncoderConfig)
    alike = (n for n in presets(ARCHITECTURES) if encoder_preset(n, image_size, model.channels) == model)
    named = plain.get("name") or next(alike, "")  # timm's networks have names
    return f"{plain['architecture']} {named}".strip()


def _flops(config: Config) -> str:
    try:
        encoder = throughput.encoder_flops(config.model, config.data.image_size)
        each = f"{_si(encoder)} for the encoder on one image of {config.data.image_size} px"
        if is_frozen(config):
            return each
        step = throughput.flops_per_image(config) * config.optimizer.batch_size
    except RuntimeError as error:
        return f"cannot be counted ({str(error).partition(chr(10))[0]})"
    return f"{_si(step)} for a step, forward and backward; {each}"


def _si(number: float) -> str:
    """Returns a number of FLOPs with the prefix that suits it."""
    power = min(max(int(math.log10(max(number, 1)) // 3), 2), 5)
    return f"{number / 1000**power:.4g} {' kMGTP'[power]}FLOPs"


def _steps(plan: RunPlan[Any], group: Processes) -> str:
    layout = plan.slices
    split = [f"{group.world} processes"] if group.world > 1 else []
    split += [f"{layout.accumulation} passes of {layout.micro_batch}"] if layout.accumulation > 1 else []
    return (
        f"{plan.steps:,} of {counted(layout.global_batch, 'image')}"
        + (f" ({' x '.join(split)})" if split else "")
        + f", which are {plan.epochs(plan.steps):.4g} epochs"
    )


def _learning_rate(plan: RunPlan[Any]) -> str:
    optimizer = plan.config.optimizer
    warmup = round(optimizer.warmup * plan.steps)
    return (
        f"{optimizer.lr:.3g} at its peak ({optimizer.base_lr:.3g} x {optimizer.batch_size} / 256), after "
        f"{counted(warmup, 'step')} of warm-up; then half a cosine to 0"
    )


def _device(config: Config, group: Processes, precision: Precision) -> str:
    device = group.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    extras = {
        name: name,
        precision: True,
        "compiled": config.run.compile,
        "gradient checkpointing": config.run.grad_checkpointing,
        config.run.parallel: group.world > 1,
    }
    return ", ".join([device.type, *(what for what, there in extras.items() if there)])


def _writes(config: Config) -> str:
    files = ["config.json", "metrics.jsonl", "artifact/"]
    if is_frozen(config):
        return f"{config.run.out}: {', '.join(files)}"
    files += ["data.json.gz", "loss_curve.png", "state/"]
    files += ["reconstructions/"] if isinstance(config, PretrainConfig) else []
    files += [f"{name}/" for name in config.run.trackers]
    space = disk_space(config, _parameters(config)[1]) / 1e6
    return f"{config.run.out}: {', '.join(files)}; up to {space:,.0f} MB, and the pictures"
