"""Opens an ONNX file for its verification: as a device runs it, and with the steps of a detector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coma.library_errors import about_one_file, library_errors
from coma.runtimes.base import Runtime
from coma.runtimes.model_spec import GraphKind, Precision
from coma.runtimes.onnxruntime import OnnxRuntime, Provider
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
        on_gpu: Whether the runtimes run on a GPU.
        as_run: The graph of an ONNX file as `runtime` runs it: in 16 bits a CPU runs an emulation in fp32.
        steps: Runtime that also returns the steps of a detector, if its file records them.
    """

    runtime: Runtime
    timed: Runtime | None
    precision: Precision
    on_gpu: bool
    as_run: ModelProto | None = None
    steps: Runtime | None = None

    @property
    def tolerance(self) -> Tolerance:
        """Tolerances of the verification."""
        return tolerance_of(self.precision, gpu=self.on_gpu)


def open_file(
    path: Path, model: ModelProto, graph: GraphKind, precision: Precision, device: Provider = "cpu"
) -> OpenedFile:
    """Opens an ONNX file.

    Args:
        path: The file.
        model: Its content.
        graph: Kind of graph that it should hold.
        precision: Precision that it should have.
        device: Execution provider.

    Raises:
        CheckFailed: the file cannot be emulated or loaded.
    """
    emulated = device == "cpu" and is_half(precision)
    as_run = model
    if emulated and is_half(precision):
        with about_one_file(), library_errors("the graph cannot be emulated in fp32"):
            as_run = emulate(model, precision)
    steps = None
    if graph == "detector":
        steps = runtime_with(as_run, recorded_steps(as_run), device)
    runtime = OnnxRuntime(as_run.SerializeToString() if emulated else path, device)
    timed = runtime
    if emulated:
        timed = OnnxRuntime(path) if precision == "fp16" else None
    return OpenedFile(runtime, timed, precision, device != "cpu", as_run, steps)
