"""Very small artifacts of every kind, with weights that give answers worth comparing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coma.artifact import LINEAR_HEAD, ArtifactConfig, library_versions, save_artifact
from coma.cli import main
from coma.config import CoMAConfig, DecoderConfig, DyViTConfig, EncoderConfig, ObjectiveConfig, ViTConfig
from coma.models import build_encoder
from coma.models.classifiers import build_classifier
from coma.objectives import build_objective
from coma.runtimes.base import Runtime
from coma.runtimes.find import open_model

DYVIT = DyViTConfig(
    patch=2, dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), windows=((4, 8), (2, 4), (0, 2), (0,))
)
VIT = ViTConfig(patch=16, dim=16, depth=1, heads=2)
OBJECTIVE = CoMAConfig(decoder=DecoderConfig(dim=16, depth=1, heads=2))
CLASSES = ("cat", "cup", "face")
MEAN, STD = (0.45, 0.42, 0.39), (0.24, 0.23, 0.25)


def open_as_int8(*given: Any) -> Runtime:
    """Opens a model whose specification says that it is quantised."""
    runtime = open_model(*given)
    runtime.spec = replace(runtime.spec, precision="int8")
    return runtime


def awake(module: nn.Module) -> nn.Module:
    """Weights as wide as trained ones: fresh ones make gates and heads silent."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return module


def about(kind: Any, model: EncoderConfig = DYVIT, size: int = 48, **changes: Any) -> ArtifactConfig:
    fields: dict[str, Any] = {
        "kind": kind,
        "model": model,
        "objective": None,
        "image_size": size,
        "mean": MEAN[: model.channels],
        "std": STD[: model.channels],
        "class_names": None,
        "trained": {},
        "versions": library_versions(),
    }
    return ArtifactConfig(**{**fields, **changes})


def backbone(folder: Path, model: EncoderConfig = DYVIT) -> Path:
    save_artifact(folder, tensors=awake(build_encoder(model)).state_dict(), config=about("backbone", model))
    return folder


def pretrained(
    folder: Path, model: EncoderConfig = DYVIT, method: ObjectiveConfig = OBJECTIVE, size: int = 48
) -> Path:
    objective = awake(build_objective(method, build_encoder(model)))
    config = about("pretrained", model, size, objective=method)
    save_artifact(folder, tensors=objective.state_dict(), config=config)
    return folder


def classifier(folder: Path, model: EncoderConfig = DYVIT) -> Path:
    config = about("classifier", model, class_names=CLASSES, head=LINEAR_HEAD)
    module = awake(build_classifier(model, len(CLASSES)))
    save_artifact(folder, tensors=module.state_dict(), config=config)
    return folder


def segmentor(folder: Path, model: EncoderConfig = DYVIT) -> Path:
    from downstream.artifacts import build_model, finetuned_config
    from downstream.cli_options import TrainOptions
    from downstream.configs.adapt import EncoderSpec, set_encoder
    from downstream.configs.load import load_config
    from downstream.tasks.segmentation import PRESET

    config = load_config(PRESET)
    set_encoder(config, EncoderSpec(model, MEAN, STD, {"preset": "tiny"}), TrainOptions(head_channels=32))
    for head in (config.model.decode_head, config.model.auxiliary_head):
        head.num_classes, head.norm_cfg = len(CLASSES), {"type": "BN"}
    config.model.test_cfg = {"mode": "whole"}
    config.model.data_preprocessor["size"] = (64, 64)
    config.test_dataloader.dataset.pipeline = [
        {"type": "ReadImage", "channels": model.channels},
        {"type": "Resize", "scale": (256, 64), "keep_ratio": True},
        {"type": "PackSegInputs"},
    ]
    config_of = finetuned_config("segmentor", config, model, CLASSES)
    module = awake(build_model(config_of))
    save_artifact(folder, tensors=module.state_dict(), config=config_of)
    return folder


def export(artifact: Path, *more: str) -> int:
    """Exit code of the shortest export of one size."""
    quick = ("--shapes", "1x48x48", "--benchmark-seconds", "0", "--verify-images", "4")
    return main(["export", str(artifact), *quick, *more])


class Silent:
    """A listener of exports that shows nothing."""

    def step(self, title: str, done: int = 0, total: int | None = None) -> None: ...
    def say(self, line: str) -> None: ...
