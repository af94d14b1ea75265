"""Loads the graphs of an artifact.

Detectors and segmentors are loaded by the room that trained them: it registers one entry point
`coma.finetuned` for each kind, a function `load(directory) -> model`. This room imports no other room.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from coma.artifact import ArtifactConfig, is_multi_label, load_artifact, load_classifier, load_encoder
from coma.artifact.load import artifact_hash
from coma.errors import BadArtifact, BadInput
from coma.image_size import ImageSize
from coma.library_errors import library_errors
from coma.masking.patchify import unit_grid
from coma.messages import counted
from coma.models import Encoder
from coma.runtimes.model_spec import (
    GRAPH_KINDS,
    ExportableModel,
    GraphKind,
    ModelSpec,
    Preprocessing,
    TensorSpec,
    centre_crop_rule,
)

_LOADERS = ("ReadImage", "LoadImageFromFile", "LoadAnnotations")
"""Steps of pipelines that read files and leave pixels as they are."""


def load_exportable(directory: Path, graph: GraphKind, visible_units: int | None = None) -> ExportableModel:
    """Loads one graph of an artifact, or the encoder of any artifact, in fp32 on the CPU.

    Args:
        directory: The artifact.
        graph: Graph to load.
        visible_units: Number of units that the input `visible` lists; the graph of an encoder or
            reconstructor then computes these alone.

    Raises:
        BadArtifact: the directory is not an artifact, or is damaged.
        BadInput: the artifact has no such graph, its model cannot be exported, or no list of units can be
            given to it; the message says why.
    """
    artifact = load_artifact(directory)
    config = artifact.config
    if graph not in (*GRAPH_KINDS[config.kind], "encoder"):
        raise BadInput(
            f"{directory}: an artifact of kind {config.kind!r} has no {graph}, only "
            f"{' and '.join(GRAPH_KINDS[config.kind])}"
        )
    if visible_units is not None:
        check_takes_list(directory, graph, config)
    with library_errors(f"{directory}: cannot be loaded as its config.json specifies", BadArtifact):
        module, outputs = _build(directory, graph, config, visible_units)
        preprocessing = preprocessing_of(config, graph)
    inputs = [TensorSpec("images", "float32", ("batch", config.model.channels, "height", "width"))]
    if visible_units is not None:
        inputs.append(TensorSpec("visible", "int64", ("batch", visible_units)))
    elif graph == "reconstructor":
        inputs.append(TensorSpec("visible", "bool", ("batch", "rows", "cols")))
    spec = ModelSpec(
        graph=graph,
        precision="fp32",
        inputs=tuple(inputs),
        outputs=outputs,
        preprocessing=preprocessing,
        unit=config.model.unit,
        class_names=config.class_names,
        source=artifact_hash(directory),
        versions=config.versions,
        multi_label=graph == "classifier" and is_multi_label(config),
    )
    return ExportableModel(module.eval().requires_grad_(False), spec)


def check_takes_list(directory: Path, graph: GraphKind, config: ArtifactConfig) -> None:
    """Checks that a graph can compute listed units only.

    Raises:
        BadInput: it is of another kind, or its model does not reconstruct masked images.
    """
    if graph not in ("encoder", "reconstructor"):
        raise BadInput(
            f"--visible-units: {directory} is a {config.kind}; give a pretrained artifact or a backbone"
        )
    degrade = getattr(config.objective, "degrade", None)
    if graph == "reconstructor" and degrade:
        raise BadInput(
            f"--visible-units: {directory} was trained with --degrade {degrade}, not to fill in units that a "
            "list leaves out; add --graph encoder"
        )


def check_visible_units(count: int, height: int, width: int, unit: int) -> None:
    """Checks that images have more units than are visible.

    Raises:
        BadInput: they do not.
    """
    rows, cols = unit_grid(height, width, unit)
    if count >= rows * cols:
        raise BadInput(
            f"--visible-units {count}: images of {height} x {width} px have only "
            f"{counted(rows * cols, 'mask unit')}; give a smaller number"
        )


def named_examples(spec: ModelSpec, batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Returns example inputs by name; see `example_inputs`."""
    examples = example_inputs(spec, batch, height, width)
    return {each.name: example for each, example in zip(spec.inputs, examples, strict=True)}


def example_inputs(spec: ModelSpec, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Returns random images of a size and, where the model takes them, visible units.

    A mask shows every other unit; lists are drawn at random for every image.
    """
    generator = torch.Generator().manual_seed(0)
    channels = cast(int, spec.inputs[0].axes[1])
    images = torch.randn(batch, channels, height, width, generator=generator)
    if len(spec.inputs) == 1:
        return (images,)
    rows, cols = unit_grid(height, width, spec.unit)
    if spec.visible_units:
        lists = [torch.randperm(rows * cols, generator=generator) for _ in range(batch)]
        return images, torch.stack(lists)[:, : spec.visible_units].contiguous()
    return images, (torch.arange(rows * cols) % 2 == 0).view(rows, cols).expand(batch, -1, -1).contiguous()


def size_of(config: ArtifactConfig, graph: GraphKind) -> ImageSize:
    """Returns the size of the training images of a graph."""
    return config.view_size if graph == "reconstructor" else config.image_size


def preprocessing_of(config: ArtifactConfig, graph: GraphKind = "encoder") -> Preprocessing:
    """Returns the preprocessing of the model's images in evaluation; for a reconstructor, in training.

    Raises:
        BadInput: a pipeline that cannot be exported, or a model that takes pixels in BGR.
    """
    size = size_of(config, graph)
    if config.kind in ("detector", "segmentor"):
        _check_pixel_steps(config)
    order = {1: "grey", 3: "RGB"}.get(config.model.channels, "as stored")
    rule = Preprocessing("none", None, config.mean, config.std, channel_order=order)
    if graph not in ("detector", "segmentor"):
        return centre_crop_rule(rule, size)
    resizes = [step for step in (config.head or {}).get("pipeline", []) if "Resize" in step["type"]]
    if not resizes:
        return rule
    step = resizes[0]
    if len(resizes) > 1 or step["type"] != "Resize" or "scale" not in step or not step.get("keep_ratio"):
        raise BadInput(f"images resized by {resizes} cannot be exported; one Resize that keeps the ratio can")
    short, long = sorted(int(side) for side in step["scale"])
    return replace(rule, resize="keep-ratio", size=(short, long))


def _check_pixel_steps(config: ArtifactConfig) -> None:
    """Checks that a detector or segmentor changes pixels in no way that `Preprocessing` cannot record.

    Raises:
        BadInput: naming the step or the setting.
    """
    head = config.head or {}
    for step in head.get("pipeline", []):
        name = str(step["type"]).rpartition(".")[2]
        if "Resize" not in name and name not in _LOADERS and not name.startswith("Pack"):
            raise BadInput(
                f"the pipeline step {name} of test images cannot be exported; train without it, or "
                "use it for training images only"
            )
    pixels = head["model"].get("data_preprocessor") or {}
    if config.model.channels == 3 and not (pixels.get("bgr_to_rgb") or pixels.get("rgb_to_bgr")):
        raise BadInput(
            "the model takes pixels in BGR (bgr_to_rgb of its data_preprocessor is false), and exported "
            "files take RGB; train it with bgr_to_rgb=True"
        )


def _build(
    directory: Path, graph: GraphKind, config: ArtifactConfig, visible_units: int | None
) -> tuple[nn.Module, tuple[TensorSpec, ...]]:
    if graph == "encoder":
        return _encoder(directory, visible_units)
    if graph == "reconstructor":
        from coma.objectives.load import load_pretrained
        from export.graphs.wrappers import ListedReconstructorGraph, ReconstructorGraph

        kind = ListedReconstructorGraph if visible_units else ReconstructorGraph
        axes = ("batch", config.model.channels, "height", "width")
        return kind(load_pretrained(directory)), (TensorSpec("reconstruction", "float32", axes),)
    if graph == "classifier":
        from export.graphs.wrappers import ClassifierGraph

        classes = len(config.class_names or ())
        return ClassifierGraph(load_classifier(directory)), (
            TensorSpec("logits", "float32", ("batch", classes)),
        )
    model, settings = _load_finetuned(directory, graph), (config.head or {})["model"]
    if graph == "segmentor":
        from export.graphs.wrappers import SegmentorGraph

        classes = int(settings["decode_head"]["num_classes"])
        return SegmentorGraph(model, settings), (
            TensorSpec("logits", "float32", ("batch", classes, "height", "width")),
            TensorSpec("classes", "int64", ("batch", "height", "width")),
        )
    from export.graphs.detector import detector

    module = detector(model, config.head or {})
    most = detections(settings)
    outputs = [
        TensorSpec("boxes", "float32", ("batch", most, 4)),
        TensorSpec("scores", "float32", ("batch", most)),
        TensorSpec("labels", "int64", ("batch", most)),
    ]
    if settings.get("roi_head", {}).get("mask_head"):
        outputs.append(TensorSpec("masks", "float32", ("batch", most, 28, 28)))
    return module, tuple(outputs)


def detections(settings: dict[str, Any]) -> int:
    """Returns the number of detections per image, including empty slots."""
    test = settings["test_cfg"]
    return int(test.get("rcnn", test)["max_per_img"])


def _encoder(directory: Path, visible_units: int | None) -> tuple[nn.Module, tuple[TensorSpec, ...]]:
    from export.graphs.wrappers import EncoderGraph, ListedEncoderGraph

    encoder: Encoder = load_encoder(directory)
    pooled = TensorSpec("pooled", "float32", ("batch", encoder.num_features))
    if visible_units:
        features = TensorSpec("features", "float32", ("batch", visible_units, encoder.num_features))
        return ListedEncoderGraph(encoder), (features, pooled)
    maps = [
        TensorSpec(f"stride{stride}", "float32", ("batch", width, f"height/{stride}", f"width/{stride}"))
        for stride, width in zip(encoder.strides, encoder.config.widths, strict=True)
    ]
    return EncoderGraph(encoder), (*maps, pooled)


def _load_finetuned(directory: Path, kind: str) -> nn.Module:
    for entry in metadata.entry_points(group="coma.finetuned", name=kind):
        return entry.load()(directory)
    raise BadInput(f"{directory}: no installed package loads a {kind}; install coma-dyvit[downstream]")
