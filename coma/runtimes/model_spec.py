"""What an exported file says of itself: its inputs and outputs, and how to make the first from an image file.

ONNX files carry it as JSON under `coma` in their metadata, TensorRT engines in the sidecar beside them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from coma.config.serialization import from_plain, to_plain
from coma.errors import BadInput
from coma.messages import counted

if TYPE_CHECKING:
    import onnx
    from torch import nn

FORMAT_VERSION = 1

GraphKind = Literal["encoder", "reconstructor", "classifier", "segmentor", "detector"]
"""What is exported: an artifact of kind backbone gives an encoder, one of kind pretrained an encoder or a
reconstructor, the others what they are."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output tensor."""

    name: str
    dtype: Literal["float32", "uint8", "bool", "int64"]
    axes: tuple[str | int, ...]
    """Name of every axis, for example ("batch", 3, "height", "width"); a number where it never changes."""


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image, RGB as people see it (or any number of channels), to the input `images`."""

    resize: Literal["none", "centre-square", "keep-ratio"]
    """none: as it is. centre-square: the largest square in the middle (all of the image where `size` is no
    square), bicubic with antialiasing. keep-ratio: as large as fits into `size`, bilinear."""
    size: tuple[int, int] | None
    """Pixels: height and width of centre-square; shorter and longer side of keep-ratio."""
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]
    """Per channel, likewise."""
    inside: bool = False
    """The graph takes uint8 pixels and does mean and deviation itself; otherwise it takes (x / 255 - mean)
    / std as float32."""
    channel_order: str = "RGB"
    """RGB, grey, or as stored in the image files."""


@dataclass(frozen=True)
class ModelSpec:
    """An exported file."""

    form: GraphKind
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing
    unit: int
    """Side of a mask unit in pixels: the least height and width."""
    class_names: tuple[str, ...] | None
    source: str
    """Of the artifact: `coma.artifact.load.artifact_hash`."""
    versions: dict[str, str]
    """Of the libraries that wrote it."""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class ExportableModel:
    """A model and what will be written about it.

    Attributes:
        module: In evaluation mode, on the CPU, fp32; takes the description's inputs in order, gives a
            tuple of its outputs in order.
        description: Of the fp32 file.
    """

    module: nn.Module
    description: ModelSpec


METADATA = "coma"


def as_json(description: ModelSpec) -> str:
    """What is written into a file."""
    return json.dumps(to_plain(description))


def read_model_spec(model: onnx.ModelProto, source: str) -> ModelSpec:
    """What an ONNX file of ours says of itself.

    Raises:
        BadInput: it says nothing, or something that is not known here.
    """
    found = {prop.key: prop.value for prop in model.metadata_props}.get(METADATA)
    return parse_model_spec(found, source)


def inspect_onnx(path: Path) -> tuple[ModelSpec | None, dict[str, str]]:
    """Returns what an ONNX file says of itself, None unless it is ours, and facts about its graph.

    Raises:
        BadInput: the package onnx is missing, or the file is not readable.
    """
    from coma.library_errors import library_errors, load_packages

    load_packages("onnx")
    import onnx

    with library_errors(f"{path}: not a readable ONNX file", BadInput):
        model = onnx.load(path, load_external_data=False)
        opset = {each.domain: each.version for each in model.opset_import}.get("", "?")
        facts = {
            "graph": f"{counted(len(model.graph.node), 'node')}, opset {opset}",
            "made by": f"{model.producer_name} {model.producer_version}".strip(),
        }
    try:
        return read_model_spec(model, str(path)), facts
    except BadInput:
        return None, facts


def parse_model_spec(text: str | None, source: str) -> ModelSpec:
    """A description from its JSON.

    Raises:
        BadInput: there is none, or it is not known here.
    """
    try:
        plain = json.loads(text or "")
        version = plain.get("format_version")
    except (ValueError, RecursionError, AttributeError):
        raise BadInput(
            f"{source}: has no description of ours; give a file that `coma export` wrote"
        ) from None
    if version != FORMAT_VERSION:
        raise BadInput(f"{source}: format {version}, known here is {FORMAT_VERSION}; export it again")
    return from_plain(plain, ModelSpec, source=source)


GRAPH_KINDS: dict[str, tuple[GraphKind, ...]] = {
    "backbone": ("encoder",),
    "pretrained": ("encoder", "reconstructor"),
    "classifier": ("classifier",),
    "segmentor": ("segmentor",),
    "detector": ("detector",),
}
"""Forms that can be made of each kind of artifact."""
