"""Artifacts of detectors and segmentors.

config.json        kind (detector or segmentor), encoder settings, mean, std and class names; `head` holds the
                   library, its model settings and its test pipeline
model.safetensors  all weights, under the library's names
"""

from __future__ import annotations

import os
import re
import warnings
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, cast

from torch import nn

from coma.artifact import (
    Artifact,
    ArtifactConfig,
    library_versions,
    load_artifact,
    load_strict,
)
from coma.config import EncoderConfig
from coma.config.serialization import to_plain
from coma.errors import BadArtifact, BadInput
from coma.image_size import ImageSize
from downstream.configs.load import config_errors, pipeline_of

Kind = Literal["detector", "segmentor"]
LIBRARIES = {"detector": "mmdet", "segmentor": "mmseg"}
_SCOPE = re.compile(r"^(mmengine|mmcv|mmdet|mmseg)\.")
_PACKAGES = {"mmdet": "mmdet", "mmseg": "mmsegmentation", "mmengine": "mmengine"}


def finetuned_config(
    kind: Kind,
    config: Any,
    encoder: EncoderConfig,
    class_names: tuple[str, ...] = ("to be known",),
    trained: dict[str, Any] | None = None,
    category_ids: list[int] | None = None,
) -> ArtifactConfig:
    """Returns the artifact configuration of a model from its mmengine configuration.

    Raises:
        BadInput: settings that are not plain data, or without mean and std of the pixels.
    """
    pixels = config.model.get("data_preprocessor", {})
    if not pixels.get("mean") or not pixels.get("std"):
        raise BadInput("the configuration's data_preprocessor has no mean and std, which an artifact needs")
    model = plain_settings(config.model)
    model["backbone"].pop("artifact", None)
    model["backbone"].pop("preset", None)
    model["backbone"]["encoder"] = to_plain(encoder, EncoderConfig)
    pipeline = pipeline_of(config.test_dataloader.dataset)
    palette = config.test_dataloader.dataset.get("metainfo", {}).get("palette")
    head = {
        "library": LIBRARIES[kind],
        "model": model,
        "pipeline": plain_settings(_without_labels(pipeline)),
        "category_ids": category_ids,
        "palette": plain_settings(palette),
        "versions": {name: metadata.version(package) for name, package in _PACKAGES.items()},
    }
    return ArtifactConfig(
        kind=kind,
        model=encoder,
        objective=None,
        image_size=ImageSize.of(_short_side(pipeline, pixels, encoder)),
        mean=tuple(value / 255 for value in pixels["mean"]),
        std=tuple(value / 255 for value in pixels["std"]),
        class_names=class_names,
        trained=trained or {},
        versions=library_versions(),
        head=head,
    )


class Finetuned(nn.Module):
    """Type of a model of OpenMMLab that was loaded from an artifact, for type checkers."""

    artifact: ArtifactConfig


def load_finetuned(directory: Path, kind: Kind | None = None) -> Finetuned:
    """Returns the detector or segmentor of an artifact, in evaluation mode on the CPU.

    Its attribute `artifact` is the artifact's description.

    Raises:
        BadArtifact: an artifact of another kind, or tensors that do not fit.
    """
    artifact = read_finetuned(directory, kind)
    config = artifact.config
    with config_errors(directory / "config.json", "describes a model that cannot be built"):
        model = cast(Finetuned, build_model(config))
    model.artifact = config
    load_strict(model, artifact.tensors, source=str(directory))
    return model.eval()


def read_finetuned(directory: Path, kind: Kind | None = None) -> Artifact:
    """Reads the artifact of a detector or segmentor without building its model.

    Raises:
        BadArtifact: an artifact of another kind.
    """
    artifact = load_artifact(directory)
    config = artifact.config
    if config.kind not in LIBRARIES or (kind and config.kind != kind):
        takes = {"detector": "use coma detect", "segmentor": "use coma segment"}
        hint = takes.get(config.kind, "fine-tune it with coma detect train or coma segment train")
        raise BadArtifact(f"{directory}: its kind is {config.kind!r}, not {kind or 'detector'!r}; {hint}")
    if not config.head or config.head.get("library") != LIBRARIES[config.kind]:
        raise BadArtifact(f"{directory}: its config.json has no settings of a {config.kind}")
    return artifact


def build_model(config: ArtifactConfig) -> nn.Module:
    """Builds the model that an artifact describes, with random weights."""
    from mmengine.registry import MODELS

    register_modules(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OpenMMLab's packages warn about each other
        return MODELS.build(model_settings(config.head or {}))


def model_settings(head: dict[str, Any]) -> Any:
    """Returns the settings of the model for mmengine."""
    from mmengine.config import ConfigDict

    settings = ConfigDict(head["model"])
    settings.data_preprocessor = lists_to_tuples(settings.data_preprocessor)
    return settings


def register_modules(config: ArtifactConfig) -> None:
    """Imports the modules that an artifact needs and makes its library the default scope.

    Raises:
        BadArtifact: settings that would make mmengine import or execute other code.
    """
    from mmengine.registry import DefaultScope, init_default_scope

    import downstream.openmmlab

    head = config.head or {}
    if head.get("library") == "mmdet":
        import downstream.openmmlab.ssd_head
    else:
        import mmseg.models  # noqa: F401
    if config.model.channels not in (1, 3):
        import downstream.openmmlab.data_preprocessor  # noqa: F401
    _check_types([head.get("model"), head.get("pipeline")])
    before = DefaultScope.get_current_instance()
    if before is None or before.scope_name != head.get("library"):
        init_default_scope(str(head.get("library")))


def _check_types(settings: Any) -> None:
    known = {*vars(import_module("mmcv.ops"))}  # pooling and NMS are named by function
    for library in ("mmengine", *LIBRARIES.values()):
        for name in ("MODELS", "TASK_UTILS", "TRANSFORMS", "WEIGHT_INITIALIZERS"):
            registry = getattr(import_module(f"{library}.registry"), name)
            registry.import_from_location()
            known |= registry.module_dict.keys()

    def check(node: Any) -> None:
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            check(child)
        if isinstance(node, dict) and "type" in node:
            name = str(node["type"])
            loads = name.startswith("Load") and name not in ("LoadImageFromFile", "LoadAnnotations")
            if loads or _SCOPE.sub("", name) not in known:
                raise BadArtifact(
                    f"the artifact's config.json names {name!r}, which mmengine, mmdet and mmseg do not "
                    "register for models; artifacts may name nothing else"
                )

    check(settings)


def lists_to_tuples(value: Any) -> Any:
    """Converts lists of numbers to tuples, which OpenMMLab distinguishes and JSON does not."""
    if isinstance(value, dict):
        return type(value)({key: lists_to_tuples(child) for key, child in value.items()})
    if isinstance(value, list):
        numbers = all(isinstance(child, int | float) for child in value)
        return tuple(value) if numbers else [lists_to_tuples(child) for child in value]
    return value


def check_classes(about: ArtifactConfig, names: tuple[str, ...], data: Path) -> None:
    """Checks that a dataset has the classes of an artifact.

    Raises:
        BadInput: other classes, naming both lists.
    """
    if about.class_names != names:
        raise BadInput(
            f"{data}: has classes {', '.join(names[:5])}{'...' if len(names) > 5 else ''}; the artifact has "
            f"{', '.join((about.class_names or ())[:5])}"
        )


def _without_labels(pipeline: list[Any]) -> list[Any]:
    return [step for step in pipeline if not str(step["type"]).startswith("LoadAnnotations")]


def _short_side(pipeline: list[Any], pixels: Any, encoder: EncoderConfig) -> int:
    """Returns the short side of resized test images; without resizing, that of training crops."""
    for step in pipeline:
        if step["type"] == "Resize" and "scale" in step:
            return max(int(min(step["scale"])), encoder.unit)
    return max(int(min(pixels.get("size") or (512, 512))), encoder.unit)


def plain_settings(value: Any) -> Any:
    """Converts mmengine's settings to JSON types."""
    if isinstance(value, dict):
        return {str(key): plain_settings(child) for key, child in value.items() if key != "_scope_"}
    if isinstance(value, list | tuple):
        return [plain_settings(child) for child in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    raise BadInput(f"the configuration holds {value!r}, which an artifact cannot hold")
