"""`open_runtime(path, device)`: an artifact, an ONNX file or a TensorRT engine, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from export.description import Form
from export.runtimes.base import Runtime
from pretrain.errors import BadInput

Device = Literal["cpu", "cuda", "tensorrt"]


def open_runtime(path: Path, device: Device = "cpu", form: Form | None = None) -> Runtime:
    """Load what is at `path`.

    Args:
        path: An artifact's directory (PyTorch), a `.onnx` file (ONNX Runtime) or an `.engine` (TensorRT).
        device: cpu or cuda; `tensorrt` is ONNX Runtime's provider of that name.
        form: Of an artifact: what it is used as; default: the last that it can be (see `forms_of`).

    Raises:
        BadInput: nothing there that can be loaded, or not on that device; the message says why.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        from export.runtimes.onnxruntime import OnnxRuntime

        return OnnxRuntime(path, device)
    if path.suffix == ".engine":
        from export.runtimes.tensorrt import TensorRTRuntime

        return TensorRTRuntime(path, "cuda" if device == "tensorrt" else device)
    if path.is_file():
        raise BadInput(f"{path}: give an artifact's directory, a .onnx file or an .engine")
    from export.forms.load import forms_of, load_deployable
    from export.runtimes.pytorch import TorchRuntime

    if device == "tensorrt":
        raise BadInput(f"{path}: is an artifact; it runs on cpu or cuda")
    return TorchRuntime(load_deployable(path, form or forms_of(path)[-1]), device)
