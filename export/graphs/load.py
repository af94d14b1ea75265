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


def load_exportable(directory: Path, graph: GraphKind) -> ExportableModel:
    """Loads one graph of an artifact, or the encoder of any artifact, in fp32 on the CPU.

    Raises:
        BadArtifact: the directory is not an artifact, or is damaged.
        BadInput: the artifact has no such graph, or its model cannot be exported; the message says why.
    """
    artifact = load_artifact(directory)
    config = artifact.config
    if graph not in (*GRAPH_KINDS[config.kind], "encoder"):
        raise BadInput(
            f"{directory}: an artifact of kind {config.kind!r} has no {graph}, only "
            f"{' and '.join(GRAPH_KINDS[config.kind])}"
        )
    with library_errors(f"{directory}: cannot be loaded as its config.json specifies", BadArtifact):
        module, outputs = _build(directory, graph, config)
        preprocessing = preprocessing_of(config, graph)
    inputs = [TensorSpec("images", "float32", ("batch", config.model.channels, "height", "width"))]
    if graph == "reconstructor":
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


def named_examples(spec: ModelSpec, batch: int, height: int, width: int) -> dict[str, Tensor]:
    """Returns example inputs by name; see `example_inputs`."""
    examples = example_inputs(spec, batch, height, width)
    return {each.name: example for each, example in zip(spec.inputs, examples, strict=True)}


def example_inputs(spec: ModelSpec, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Returns random images of a size and, for a reconstructor, masks with every other unit visible."""
    generator = torch.Generator().manual_seed(0)
    channels = cast(int, spec.inputs[0].axes[1])
    images = torch.randn(batch, channels, height, width, generator=generator)
    if spec.graph != "reconstructor":
        return (images,)
    rows, cols = unit_grid(height, width, spec.unit)
    return images, (torch.arange(rows * cols) % 2 == 0).view(rows, cols).expand(batch, -1, -1).contiguous()


def size_of(config: ArtifactConfig, graph: GraphKind) -> ImageSize:
    """Returns the size of the training images of a graph."""
    return config.view_size if graph == "reconstructor" else config.image_size


def preprocessing_of(config: ArtifactConfig, graph: GraphKind = "encoder") -> Preprocessing:
    """Returns the preprocessing of the model's images in evaluation; for a reconstructor, in training.

    Raises:
        BadInput: a pipeline that cannot be exported.
    """
    size = size_of(config, graph)
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


def _build(
    directory: Path, graph: GraphKind, config: ArtifactConfig
) -> tuple[nn.Module, tuple[TensorSpec, ...]]:
    if graph == "encoder":
        return _encoder(directory)
    if graph == "reconstructor":
        from coma.objectives.load import load_pretrained
        from export.graphs.wrappers import ReconstructorGraph

        axes = ("batch", config.model.channels, "height", "width")
        return ReconstructorGraph(load_pretrained(directory)), (
            TensorSpec("reconstruction", "float32", axes),
        )
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


def _encoder(directory: Path) -> tuple[nn.Module, tuple[TensorSpec, ...]]:
    from export.graphs.wrappers import EncoderGraph

    encoder: Encoder = load_encoder(directory)
    maps = [
        TensorSpec(f"stride{stride}", "float32", ("batch", width, f"height/{stride}", f"width/{stride}"))
        for stride, width in zip(encoder.strides, encoder.config.widths, strict=True)
    ]
    return EncoderGraph(encoder), (
        *maps,
        TensorSpec("pooled", "float32", ("batch", encoder.num_features)),
    )


def _load_finetuned(directory: Path, kind: str) -> nn.Module:
    for entry in metadata.entry_points(group="coma.finetuned", name=kind):
        return entry.load()(directory)
    raise BadInput(f"{directory}: no installed package loads a {kind}; install coma-dyvit[downstream]")
