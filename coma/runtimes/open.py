"""`open_runtime(path, device)`: an artifact, an ONNX file or a TensorRT engine, behind one interface.

Only what passed its gate is opened: no file that waits for it or failed, and none that has changed since.
"""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

from coma.artifact import load_artifact
from coma.errors import BadInput
from coma.library_errors import library_errors
from coma.preflight import check_regular_file
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import NAME, Manifest, OfOthers, is_verified
from coma.runtimes.model_spec import GRAPH_KINDS, ExportableModel, GraphKind

log = logging.getLogger(__name__)

Device = Literal["cpu", "cuda", "tensorrt"]

_UNFIT = {
    ".unverified": "was never verified: its export did not end; export it again",
    ".rejected": "failed its gate; report.md beside it says why",
}


def open_runtime(path: Path, device: Device = "cpu", graph: GraphKind | None = None) -> Runtime:
    """Load what is at `path`.

    Args:
        path: An artifact's directory (PyTorch), a `.onnx` file (ONNX Runtime) or an `.engine` (TensorRT).
        device: cpu or cuda; `tensorrt` is ONNX Runtime's provider of that name.
        graph: Of an artifact: what it is used as; default: the last that it can be (see `graph_kinds_of`).

    Raises:
        BadInput: nothing there that can be loaded, or not on that device, or not the file that was verified;
            the message says why.
        CheckFailed: ONNX Runtime or TensorRT refuses the file.
    """
    path = Path(path)
    try:
        with library_errors(f"{path}: cannot be opened", BadInput):
            return _open(path, device, graph)
    except OSError as error:
        raise BadInput(f"{path}: cannot be opened ({error.strerror or error})") from None


def _open(path: Path, device: Device, graph: GraphKind | None) -> Runtime:
    if device not in get_args(Device):
        raise BadInput(f"device {device!r}: give one of {', '.join(get_args(Device))}")
    for suffix in (*path.suffixes, *path.resolve().suffixes):
        if suffix in _UNFIT:
            raise BadInput(f"{path}: {_UNFIT[suffix]}")
    if path.suffix in (".onnx", ".engine") and not path.is_dir():
        check_regular_file(path)
        _check_listed(path)
    if path.suffix == ".onnx" and not path.is_dir():
        from coma.runtimes.onnxruntime import OnnxRuntime

        return OnnxRuntime(path, device)
    if path.suffix == ".engine" and not path.is_dir():
        from coma.runtimes.tensorrt.runtime import TensorRTRuntime

        return TensorRTRuntime(path, "cuda" if device == "tensorrt" else device)
    if path.is_file():
        raise BadInput(f"{path}: give an artifact's directory, a .onnx file or an .engine")
    from coma.runtimes.pytorch import TorchRuntime

    if device == "tensorrt":
        raise BadInput(f"{path}: is an artifact; it runs on cpu or cuda")
    return TorchRuntime(_rebuilt(path, graph or GRAPH_KINDS[load_artifact(path).config.kind][-1]), device)


def _rebuilt(path: Path, graph: GraphKind) -> ExportableModel:
    # graphs belong to the room `export`, which announces what builds them
    for entry in metadata.entry_points(group="coma.graphs", name="load"):
        return entry.load()(path, graph)
    raise BadInput(f"{path}: nothing installed here rebuilds models; install coma-dyvit[export]")


def _check_listed(path: Path) -> None:
    """Refuses a file that the manifest beside it does not list as verified; without a manifest, says so.

    Raises:
        BadInput: the file is not listed, was refused, or has changed since it was verified.
    """
    real = path.resolve()
    try:
        manifest = Manifest.read(real.parent, f"export {real.name} again")
    except OfOthers:
        manifest = None
    if manifest is None:
        log.warning("%s: has no %s of `coma export` beside it; nobody knows if it was verified", path, NAME)
        return
    for entry in manifest.files:
        if entry.file == real.name:
            if is_verified(real.parent, entry):
                return
            raise BadInput(
                f"{path}: differs from what was verified (by its SHA-256 in {NAME}); export it again"
            )
    raise BadInput(
        f"{path}: {NAME} beside it does not list it as verified; export it again, or move it to a folder of "
        "its own to open it unverified"
    )
