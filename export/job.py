"""What is to be exported, how it is checked, and who is told about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from coma.runtimes.model_spec import GraphKind, Precision

if TYPE_CHECKING:
    from coma.data.sources.base import Source
    from coma.runtimes.open import Device
    from coma.runtimes.tensorrt.sidecar import EngineOptions
    from export.image_sets import ImageSet
    from export.quantization import Method


class ProgressListener(Protocol):
    """Told what is going on."""

    def step(self, title: str, done: int = 0, total: int | None = None) -> None:
        """Something begins, or is so far."""
        ...

    def say(self, line: str) -> None:
        """A result."""
        ...


@dataclass(frozen=True)
class Request:
    """What is to be exported, and how it is checked.

    Attributes:
        artifact: Directory.
        out: Folder for the files.
        precisions: Of the ONNX files, and of the engines made of them.
        tensorrt: Build engines too.
        inside: The graph takes uint8 pixels.
        device: Where ONNX files are verified and timed.
        images: Images to compare on.
        calibration: Images that give int8 and fp8 their ranges; None where no file is quantised.
        method: How int8 finds them.
        keep: Layers that stay in float under int8 and fp8, by module path.
        labelled: Labelled images, for the top-1 of classifiers.
        dataset: A dataset, for the AP of detectors and the mIoU of segmentors.
        most: Labelled images to measure on.
        seconds: To time each runtime at each batch; 0: not at all.
        engine: How engines are built.
    """

    artifact: Path
    out: Path
    precisions: tuple[Precision, ...]
    tensorrt: bool
    normalize_in_graph: bool
    device: Device
    images: ImageSet
    calibration: ImageSet | None
    method: Method
    keep: tuple[str, ...]
    labelled: Source | None
    dataset: Path | None
    most: int
    seconds: float
    engine: EngineOptions | None


def folder_beside(artifact: Path) -> Path:
    """Where an artifact's exports lie unless told otherwise."""
    return artifact.resolve().parent / "export"


def file_name(graph: GraphKind, precision: Precision) -> str:
    """Of the ONNX file."""
    return f"{graph}.onnx" if precision == "fp32" else f"{graph}-{precision}.onnx"
