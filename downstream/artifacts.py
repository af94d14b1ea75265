"""Detectors and segmentors as artifacts: what the export room and `predict` take.

config.json        kind detector or segmentor; the encoder's settings; mean, std and class names; `head`:
the library, its model settings with the encoder in them, and how images are resized
model.safetensors  all weights, under the names that the library gives them
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
    """What an artifact says of a model, from its mmengine configuration.

    Raises:
        BadInput: settings that are not plain data, or without the pixels' mean and deviation.
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
        image_size=_short_side(pipeline, pixels, encoder),
        mean=tuple(value / 255 for value in pixels["mean"]),
        std=tuple(value / 255 for value in pixels["std"]),
        class_names=class_names,
        trained=trained or {},
        versions=library_versions(),
        head=head,
    )


class Finetuned(nn.Module):
    """What type checkers see of a model of OpenMMLab that was loaded from an artifact."""

    artifact: ArtifactConfig


def load_finetuned(directory: Path, kind: Kind | None = None) -> Finetuned:
    """Returns the detector or segmentor of an artifact, in evaluation mode on the CPU.

    Its attribute `artifact` is the artifact's description.

    Raises:
        BadArtifact: not an artifact of this kind, or tensors that do not fit.
    """
    artifact = read_finetuned(directory, kind)
    config = artifact.config
    with config_errors(directory / "config.json", "describes no model that can be built"):
        model = cast(Finetuned, build_model(config))
    model.artifact = config
    load_strict(model, artifact.tensors, source=str(directory))
    return model.eval()


def read_finetuned(directory: Path, kind: Kind | None = None) -> Artifact:
    """An artifact of a detector or segmentor, without building its model.

    Raises:
        BadArtifact: not an artifact of this kind; the message says what it is.
    """
    artifact = load_artifact(directory)
    config = artifact.config
    if config.kind not in LIBRARIES or (kind and config.kind != kind):
        takes = {"detector": "coma detect takes it", "segmentor": "coma segment takes it"}
        hint = takes.get(config.kind, "coma detect train and coma segment train make one of it")
        raise BadArtifact(f"{directory}: its kind is {config.kind!r}, not {kind or 'detector'!r}; {hint}")
    if not config.head or config.head.get("library") != LIBRARIES[config.kind]:
        raise BadArtifact(f"{directory}: has no settings of a {config.kind} in its config.json")
    return artifact


def build_model(config: ArtifactConfig) -> nn.Module:
    """The model that an artifact describes, with random weights."""
    from mmengine.registry import MODELS

    register_modules(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mm's packages warn of each other's names
        return MODELS.build(model_settings(config.head or {}))


def model_settings(head: dict[str, Any]) -> Any:
    """The model's settings, as mmengine takes them."""
    from mmengine.config import ConfigDict

    settings = ConfigDict(head["model"])
    settings.data_preprocessor = lists_to_tuples(settings.data_preprocessor)
    return settings


def register_modules(config: ArtifactConfig) -> None:
    """Import what the settings of an artifact name, and make its library's the default scope.

    Raises:
        BadArtifact: they name what mmengine would take from any module, or execute.
    """
    from mmengine.registry import DefaultScope, init_default_scope

    import downstream.openmmlab

    head = config.head or {}
    if head.get("library") == "mmdet":
        import mmdet.models  # noqa: F401 - likewise
    else:
        import mmseg.models  # noqa: F401
    if config.model.channels not in (1, 3):
        import downstream.openmmlab.data_preprocessor  # noqa: F401
    _check_types([head.get("model"), head.get("pipeline")])
    before = DefaultScope.get_current_instance()
    if before is None or before.scope_name != head.get("library"):
        init_default_scope(str(head.get("library")))


def _check_types(settings: Any) -> None:
    known = {*vars(import_module("mmcv.ops"))}  # pooling and suppression are named by function
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
                    "register for models; nothing else is built from an artifact"
                )

    check(settings)


def lists_to_tuples(value: Any) -> Any:
    """Lists of numbers as tuples, which mm tells apart and JSON does not."""
    if isinstance(value, dict):
        return type(value)({key: lists_to_tuples(child) for key, child in value.items()})
    if isinstance(value, list):
        numbers = all(isinstance(child, int | float) for child in value)
        return tuple(value) if numbers else [lists_to_tuples(child) for child in value]
    return value


def dataset_meta(config: ArtifactConfig) -> dict[str, Any]:
    """Class names and colours, as mm's visualisers and metrics take them."""
    from downstream.datasets.label_classes import default_palette

    names = config.class_names or ()
    palette = (config.head or {}).get("palette") or default_palette(len(names))
    return {"classes": names, "palette": [tuple(colour) for colour in palette]}


def check_classes(about: ArtifactConfig, names: tuple[str, ...], data: Path) -> None:
    """Refuse to measure on images of other classes.

    Raises:
        BadInput: naming both lists.
    """
    if about.class_names != names:
        raise BadInput(
            f"{data}: has classes {', '.join(names[:5])}{'...' if len(names) > 5 else ''}; the artifact has "
            f"{', '.join((about.class_names or ())[:5])}"
        )


def _without_labels(pipeline: list[Any]) -> list[Any]:
    return [step for step in pipeline if not str(step["type"]).startswith("LoadAnnotations")]


def _short_side(pipeline: list[Any], pixels: Any, encoder: EncoderConfig) -> int:
    """Pixels of the short side that test images are resized to; else of training crops."""
    for step in pipeline:
        if step["type"] == "Resize" and "scale" in step:
            return max(int(min(step["scale"])), encoder.unit)
    return max(int(min(pixels.get("size") or (512, 512))), encoder.unit)


def plain_settings(value: Any) -> Any:
    """Mmengine's settings as JSON holds them: dicts, lists, numbers, strings."""
    if isinstance(value, dict):
        return {str(key): plain_settings(child) for key, child in value.items() if key != "_scope_"}
    if isinstance(value, list | tuple):
        return [plain_settings(child) for child in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return str(value)
    raise BadInput(f"the configuration holds {value!r}, which an artifact cannot")
