"""Opens an ONNX file for its verification: as a device runs it, and with the steps of a detector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coma.library_errors import about_one_file, library_errors
from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import GraphKind, Precision, float_part
from coma.runtimes.names import Device, is_openvino
from coma.runtimes.open import open_onnx
from coma.runtimes.shape_ranges import Shapes
from export.half_precision_emulation import emulate, is_half
from export.verify.inner_values import recorded_steps, runtime_with
from export.verify.tolerances import Tolerance, tolerance_of

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class OpenedFile:
    """A file and its runtimes.

    Attributes:
        runtime: Runtime to verify.
        timed: Runtime to time; None if this device cannot run the file as it is.
        precision: Precision that the file should have.
        device: Where the runtimes run.
        as_run: The graph of an ONNX file as `runtime` runs it: in 16 bits a CPU runs an emulation in fp32.
        folder: Folder of the file, where the weights of `as_run` are if it is large.
        steps: Runtime that also returns the steps of a detector, if its file records them; None of
            16-bit files in OpenVINO, which may select from values with more bits than a step that it returns.
    """

    runtime: Runtime
    timed: Runtime | None
    precision: Precision
    device: Device = "cpu"
    as_run: ModelProto | None = None
    folder: Path | None = None
    steps: Runtime | None = None

    @property
    def tolerance(self) -> Tolerance:
        """Tolerances of the verification."""
        return tolerance_of(self.precision, gpu=self.device not in ("cpu", "openvino"))


def open_file(
    path: Path,
    model: ModelProto,
    graph: GraphKind,
    precision: Precision,
    device: Device = "cpu",
    shapes: Shapes | None = None,
) -> OpenedFile:
    """Opens an ONNX file.

    Args:
        path: The file.
        model: Its content.
        graph: Kind of graph that it should hold.
        precision: Precision that it should have.
        device: Where to run it. OpenVINO computes 16-bit files in fp32 where the device has no such products;
            what 16 bits do to them is emulated with ONNX Runtime's cpu.
        shapes: Shapes that it takes, for which the device tensorrt builds engines.

    Raises:
        CheckFailed: the file cannot be emulated or loaded.
    """
    rest = float_part(precision)
    emulated = device == "cpu" and is_half(rest)
    as_run = model
    if emulated and is_half(rest):
        with about_one_file(), library_errors("the graph cannot be emulated in fp32"):
            as_run = emulate(model, rest, path)
    steps = None
    if graph == "detector" and not (is_openvino(device) and is_half(rest)):
        steps = runtime_with(as_run, recorded_steps(as_run), device, path.parent, shapes)
    content = as_run.SerializeToString() if emulated else path
    runtime = open_onnx(content, device, folder=path.parent, shapes=shapes)
    timed = runtime
    if emulated:
        timed = open_onnx(path) if rest == "fp16" else None
    return OpenedFile(runtime, timed, precision, device, as_run, path.parent, steps)
