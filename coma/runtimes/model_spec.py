"""Specification of an exported model: its inputs, outputs and the preprocessing of its images.

ONNX files hold it as JSON under `coma` in their metadata, TensorRT engines in the sidecar beside them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from coma.config.serialization import from_plain, to_plain
from coma.errors import BadInput
from coma.messages import counted

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

FORMAT_VERSION = 2

GraphKind = Literal["encoder", "reconstructor", "classifier", "segmentor", "detector"]
"""Part of a model that is exported as one graph; see `GRAPH_KINDS`."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of an input or output."""

    name: str
    dtype: Literal["float32", "uint8", "bool", "int64"]
    axes: tuple[str | int, ...]
    """Name of every dynamic axis and size of every fixed one, for example ("batch", 3, "height", "width")."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing from a decoded image to the input `images`."""

    resize: Literal["none", "centre-square", "centre-crop", "keep-ratio"]
    """none: no resizing. centre-crop: crops the largest box in the middle that has the shape of `size` and
    resizes it, bicubic with antialiasing; centre-square: the same, its name where `size` is square.
    keep-ratio: resizes to the largest size within `size`, bilinear."""
    size: tuple[int, int] | None
    """Height and width (centre-crop), or shorter and longer side (keep-ratio), in pixels."""
    mean: tuple[float, ...]
    """Mean per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]
    """Standard deviation per channel, of pixels scaled to 0..1."""
    normalize_in_graph: bool = False
    """True if the graph takes uint8 pixels and normalises them; otherwise it takes (x / 255 - mean) / std as
    float32."""
    channel_order: str = "RGB"
    """Order of the channels: RGB, grey, or as stored in the image files."""

    @property
    def crops(self) -> bool:
        """Whether images are resized by a centre crop."""
        return self.resize in ("centre-square", "centre-crop")


def centre_crop_rule(rule: Preprocessing, size: tuple[int, int]) -> Preprocessing:
    """Returns the rule with a centre crop of `size`, height and width."""
    height, width = size
    return replace(rule, resize="centre-square" if height == width else "centre-crop", size=(height, width))


@dataclass(frozen=True)
class ModelSpec:
    """Specification of an exported model."""

    graph: GraphKind
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing
    unit: int
    """Side of a mask unit in pixels: the minimum height and width."""
    class_names: tuple[str, ...] | None
    source: str
    """Hash of the artifact: `coma.artifact.load.artifact_hash`."""
    versions: dict[str, str]
    """Versions of the libraries that wrote the artifact."""
    multi_label: bool = False
    """True of a classifier of images with any number of classes: each of its logits is for a sigmoid."""
    format_version: int = FORMAT_VERSION

    @property
    def visible_units(self) -> int | None:
        """Number of mask units that the input `visible` lists; None where it is a mask, or absent."""
        listed = [each.axes[1] for each in self.inputs[1:] if each.dtype == "int64"]
        return int(listed[0]) if listed else None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probabilities of the classes, float32, for a classifier's logits `[..., classes]`."""
        return logits.float().sigmoid() if self.multi_label else logits.float().softmax(dim=-1)


@dataclass(frozen=True)
class ExportableModel:
    """A model that can be exported, and its specification.

    Attributes:
        module: The network, in evaluation mode, on the CPU and in fp32; takes the inputs of `spec` in order
            and returns a tuple of its outputs in order.
        spec: Specification of the fp32 file.
    """

    module: nn.Module
    spec: ModelSpec


METADATA = "coma"


def to_json(spec: ModelSpec) -> str:
    """Returns the JSON for the metadata of a file."""
    return json.dumps(to_plain(spec))


def read_model_spec(model: onnx.ModelProto, source: str) -> ModelSpec:
    """Reads the specification in the metadata of an ONNX model.

    Raises:
        BadInput: the metadata hold no specification, or one of another format.
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
    """Parses a specification from its JSON.

    Raises:
        BadInput: there is no specification, or it has another format.
    """
    try:
        plain = json.loads(text or "")
        version = plain.get("format_version")
    except (ValueError, RecursionError, AttributeError):
        raise BadInput(
            f"{source}: holds no specification of a model; give a file that coma export wrote"
        ) from None
    if version != FORMAT_VERSION:
        raise BadInput(
            f"{source}: format {version}, but this version reads format {FORMAT_VERSION}; export it again"
        )
    return from_plain(plain, ModelSpec, source=source)


GRAPH_KINDS: dict[str, tuple[GraphKind, ...]] = {
    "backbone": ("encoder",),
    "pretrained": ("encoder", "reconstructor"),
    "classifier": ("classifier",),
    "segmentor": ("segmentor",),
    "detector": ("detector",),
}
"""Graphs of each kind of artifact."""
