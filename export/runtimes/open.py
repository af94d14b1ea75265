"""`open_runtime(path, device)`: an artifact, an ONNX file or a TensorRT engine, behind one interface.

Only what passed its gate is opened: no file that waits for it or failed, and none that has changed since.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from export.description import Form
from export.manifest import NAME, Manifest, OfOthers
from export.runtimes.base import Runtime
from pretrain.errors import BadInput
from pretrain.hashing import sha256_of

Device = Literal["cpu", "cuda", "tensorrt"]

_UNFIT = {
    ".unverified": "was never verified: its export did not end; export it again",
    ".rejected": "failed its gate; report.md beside it says why",
}


def open_runtime(path: Path, device: Device = "cpu", form: Form | None = None) -> Runtime:
    """Load what is at `path`.

    Args:
        path: An artifact's directory (PyTorch), a `.onnx` file (ONNX Runtime) or an `.engine` (TensorRT).
        device: cpu or cuda; `tensorrt` is ONNX Runtime's provider of that name.
        form: Of an artifact: what it is used as; default: the last that it can be (see `forms_of`).

    Raises:
        BadInput: nothing there that can be loaded, or not on that device, or not the file that was verified;
            the message says why.
        CheckFailed: ONNX Runtime or TensorRT refuses the file.
    """
    path = Path(path)
    if device not in get_args(Device):
        raise BadInput(f"device {device!r}: give one of {', '.join(get_args(Device))}")
    for suffix in path.suffixes:
        if suffix in _UNFIT:
            raise BadInput(f"{path}: {_UNFIT[suffix]}")
    if path.suffix == ".onnx":
        from export.runtimes.onnxruntime import OnnxRuntime

        _check_content(path)
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


def _check_content(path: Path) -> None:
    """Refuse a file that is not what the manifest beside it, if there is one that lists it, says."""
    try:
        manifest = Manifest.read(path.parent, f"export {path.name} again")
    except OfOthers:
        return
    listed = {each.file: each.sha256 for each in manifest.files} if manifest and path.is_file() else {}
    if path.name in listed and listed[path.name] != sha256_of(path):
        raise BadInput(f"{path}: differs from what was verified (by its SHA-256 in {NAME}); export it again")
