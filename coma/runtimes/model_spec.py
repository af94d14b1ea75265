"""What an exported file says of itself: its inputs and outputs, and how to make the first from an image file.

ONNX files carry it as JSON under `coma` in their metadata, TensorRT engines in the sidecar beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FORMAT_VERSION = 1

Form = Literal["encoder", "reconstructor", "classifier", "segmentor", "detector"]
"""What is exported: an artifact of kind backbone gives an encoder, one of kind pretrained an encoder or a
reconstructor, the others what they are."""

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


@dataclass(frozen=True)
class Port:
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
class Description:
    """An exported file."""

    form: Form
    precision: Precision
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    preprocessing: Preprocessing
    unit: int
    """Side of a mask unit in pixels: the least height and width."""
    class_names: tuple[str, ...] | None
    source: str
    """Of the artifact: `export.graphs.load.artifact_hash`."""
    versions: dict[str, str]
    """Of the libraries that wrote it."""
    format_version: int = FORMAT_VERSION
