"""Settings of `coma export`, from the flags to the code that uses them, and the images that it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import tyro

from coma.messages import parse_names
from coma.paths import Location, exports_beside
from coma.ranges import Range, Ranged
from coma.runtimes.model_spec import GraphKind, Precision
from coma.runtimes.names import Device, parse_devices
from coma.runtimes.tensorrt.sidecar import EngineOptions

if TYPE_CHECKING:
    from coma.data.sources.base import Source
    from export.image_sets import ImageSet

PROGRAMS = ("pt2", "aoti")
"""Formats of PyTorch itself: programs as they are, and compiled."""


@dataclass(frozen=True)
class ExportConfig(Ranged):
    """Export an artifact to ONNX and TensorRT and verify the exported files against PyTorch on real images.

    Every file runs beside PyTorch at several batch sizes and image sizes before it gets its final name. A
    file whose error exceeds the tolerance of its precision is kept as NAME.rejected, the report names the
    module where the error starts, and the exit code is 1.
    """

    artifact: Annotated[Path, tyro.conf.Positional]
    """Artifact directory of any kind: backbone, pretrained, classifier, segmentor or detector; or tiny-64,
    which comes with the package."""
    to: str = "onnx"
    """Formats, separated by commas: onnx, which is always written, tensorrt (engines of the ONNX files),
    triton (the ONNX files as a model repository for Triton Inference Server, in the folder triton), pt2 (the
    program of torch.export) and aoti (that program compiled by AOTInductor, which takes minutes)."""
    precision: str = "fp32"
    """Precisions, separated by commas: fp32, fp16, bf16, int8, fp8, and int8+fp16, fp8+fp16, whose other
    layers are in fp16, for GPUs."""
    graph: Literal["all", "encoder", "reconstructor"] = "all"
    """Graphs to export from a pre-trained artifact."""
    visible_units: Annotated[int | None, Range(1, 10**6)] = None
    """Write encoders and reconstructors that take a list of this many visible mask units (int64, batch x N)
    and compute these alone, as in pre-training; the image size must be fixed. The files are called
    encoder-visibleN.onnx and reconstructor-visibleN.onnx."""
    shapes: str | None = None
    """Input shapes as min:opt:max, each NxCxHxW; a single shape makes the graph static. By default the batch
    size is dynamic from 1 to 32 at the training size; detectors and segmentors also take any height and width
    from one mask unit up to twice the training size (detectors at least 800 x 1344)."""
    out: Path | None = None
    """Folder for the files, manifest.json and report.md (default: the folder export beside the artifact)."""
    verify: Location | None = None
    """Images for verification: a folder, .npz or .tar shards (default: photographs bundled with
    scikit-image). A folder with one subfolder per class also measures the top-1 accuracy of a classifier; if
    the folder has splits, test or val is used."""
    verify_images: Annotated[int, Range(1, 10**6)] = 16
    """Number of verification images. Broken files, duplicates and images of a single colour do not count;
    fewer than 4 usable images are refused unless this number is smaller."""
    dataset: Path | None = None
    """Dataset of a detector or segmentor; measures AP or mIoU in PyTorch and in every file."""
    metric_images: Annotated[int, Range(1, 10**9)] = 1000
    """Maximum number of labelled images for top-1, AP or mIoU."""
    calibrate: Location | None = None
    """Calibration images for int8 and fp8, which require them."""
    calibrate_images: Annotated[int, Range(1, 10**6)] = 64
    """Number of calibration images. Fewer than 8 usable images are refused unless this number is smaller."""
    calibrate_method: Literal["percentile", "entropy", "minmax"] = "percentile"
    """Method that chooses the clipping range of int8 activations."""
    exclude_layers: tuple[str, ...] | None = None
    """Layers that int8 and fp8 do not quantise, as patterns of module paths such as "*.merge.*" (default: in
    detectors all layers after the backbone, where small errors select other proposals; otherwise none). The
    word none quantises all layers."""
    normalize_in_graph: bool = False
    """Make the exported files take uint8 pixels and normalise them with mean and standard deviation."""
    plugin_free: bool = False
    """Write detectors without NonMaxSuppression and RoiAlign, which TensorRT-RTX lacks: loops of basic
    operators give the same boxes, and take longer in ONNX Runtime."""
    triton_preprocess: bool = False
    """Add a preprocessing model to the repository for Triton and an ensemble of both, which takes decoded
    images (uint8, height x width x channels) of any size."""
    device: str = "cpu"
    """Where the ONNX files are verified and timed, separated by commas: cpu, cuda and tensorrt (execution
    providers of ONNX Runtime), openvino (a CPU), openvino-gpu (an Intel GPU). Files that fail in one are
    rejected."""
    check: Literal["none", "rtx"] = "none"
    """rtx also parses and compiles the ONNX files with NVIDIA TensorRT-RTX, which needs no GPU; detectors
    need --plugin-free for it."""
    benchmark_seconds: Annotated[float, Range(0, 86400)] = 2.0
    """Seconds to time each file beside PyTorch at each batch size; 0 skips timing."""
    engine: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)

    @property
    def folder(self) -> Path:
        """Folder for the exported files."""
        return self.out or exports_beside(self.artifact)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions in the order that they were given in.

        Raises:
            BadInput: `precision` holds an unknown name.
        """
        return cast(tuple[Precision, ...], parse_names(self.precision, get_args(Precision), "--precision"))

    @property
    def devices(self) -> tuple[Device, ...]:
        """Where the ONNX files are verified, in the order that was given.

        Raises:
            BadInput: `device` holds an unknown name.
        """
        return parse_devices(self.device)

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats in the order that was given.

        Raises:
            BadInput: `to` holds an unknown name.
        """
        return parse_names(self.to, ("onnx", "tensorrt", "triton", *PROGRAMS), "--to")

    @property
    def builds_engines(self) -> bool:
        """Whether TensorRT engines are built."""
        return "tensorrt" in self.formats

    @property
    def writes_triton(self) -> bool:
        """Whether a model repository for Triton is written."""
        return "triton" in self.formats

    @property
    def programs(self) -> tuple[str, ...]:
        """Formats of PyTorch itself that are written."""
        return tuple(name for name in self.formats if name in PROGRAMS)


@dataclass(frozen=True)
class ExportImages:
    """Images that an export reads before its first long step.

    Attributes:
        verification: Images to compare the files with PyTorch on.
        calibration: Images for int8 and fp8; None if nothing is quantised.
        labelled: Labelled source for the top-1 accuracy of a classifier; None without labels.
    """

    verification: ImageSet
    calibration: ImageSet | None = None
    labelled: Source | None = None


def file_name(graph: GraphKind, precision: Precision, visible_units: int | None = None) -> str:
    """Returns the name of an ONNX file."""
    name = f"{graph}-visible{visible_units}" if visible_units else graph
    return f"{name}.onnx" if precision == "fp32" else f"{name}-{in_file_name(precision)}.onnx"


def in_file_name(precision: Precision) -> str:
    """Returns a precision as file names hold it: int8-fp16 for int8+fp16."""
    return precision.replace("+", "-")
