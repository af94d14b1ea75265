"""`open_runtime(path, device)` opens an artifact, an ONNX file, an engine or a program behind one interface.

Exported files open only if they passed verification and have not changed since.
"""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path
from typing import get_args

from coma.artifact import load_artifact
from coma.errors import BadInput
from coma.library_errors import library_errors
from coma.preflight import check_regular_file
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import NAME, Entry, ForeignManifest, Manifest, is_verified
from coma.runtimes.model_spec import GRAPH_KINDS, ExportableModel, GraphKind
from coma.runtimes.names import SUFFIXES, Device, is_openvino, library_of
from coma.runtimes.shape_ranges import Shapes

log = logging.getLogger(__name__)

_UNFIT = {
    ".unverified": "was not verified, because its export did not finish; export it again",
    ".rejected": "failed verification; report.md beside it says why",
}


def open_runtime(
    path: Path,
    device: Device = "cpu",
    graph: GraphKind | None = None,
    visible_units: int | None = None,
) -> Runtime:
    """Opens a model.

    Args:
        path: An artifact directory (PyTorch), a `.onnx` file (ONNX Runtime, OpenVINO), an `.engine` file
            (TensorRT) or a `.pt2` file (a program of PyTorch).
        device: cpu or cuda; `tensorrt` is the execution provider of ONNX Runtime with that name; `openvino`
            and `openvino-gpu` are OpenVINO on a CPU and on an Intel GPU.
        graph: Graph of an artifact; by default the last one of its kind in `GRAPH_KINDS`.
        visible_units: Opens the graph of an artifact that takes a list of this many visible units, as the
            files of `coma export --visible-units` do.

    Raises:
        BadInput: the path holds no model, the model does not run on the device, or the file has changed since
            its verification.
        CheckFailed: ONNX Runtime, OpenVINO or TensorRT refuses the file.
    """
    path = Path(path)
    try:
        with library_errors(f"{path}: cannot be opened", BadInput):
            return _open(path, device, graph, visible_units)
    except OSError as error:
        raise BadInput(f"{path}: cannot be opened ({error.strerror or error})") from None


def _open(path: Path, device: Device, graph: GraphKind | None, visible_units: int | None) -> Runtime:
    if device not in get_args(Device):
        raise BadInput(f"device {device!r}: give one of {', '.join(get_args(Device))}")
    for suffix in (*path.suffixes, *path.resolve().suffixes):
        if suffix in _UNFIT:
            raise BadInput(f"{path}: {_UNFIT[suffix]}")
    if path.suffix in SUFFIXES.values() and not path.is_dir():
        check_regular_file(path)
        entry = _check_listed(path, device)
        return _open_file(path, device, entry.shape_range() if entry and device == "tensorrt" else None)
    if path.is_file():
        raise BadInput(f"{path}: give an artifact directory, or a .onnx, .engine or .pt2 file")
    from coma.runtimes.pytorch import TorchRuntime

    if device not in ("cpu", "cuda"):
        raise BadInput(f"{path}: an artifact runs on cpu or cuda")
    graph = graph or GRAPH_KINDS[load_artifact(path).config.kind][-1]
    return TorchRuntime(_load_exportable(path, graph, visible_units), device)


def _open_file(path: Path, device: Device, shapes: Shapes | None) -> Runtime:
    if path.suffix == ".engine":
        from coma.runtimes.tensorrt.runtime import TensorRTRuntime

        return TensorRTRuntime(path, "cuda" if device == "tensorrt" else device)
    if path.suffix == ".pt2":
        from coma.runtimes.torch_program import TorchProgramRuntime

        return TorchProgramRuntime(path, device)
    return open_onnx(path, device, shapes=shapes)


def open_onnx(
    file: Path | bytes,
    device: Device = "cpu",
    threads: int | None = None,
    extra_outputs: bool = False,
    folder: Path | None = None,
    shapes: Shapes | None = None,
) -> Runtime:
    """Opens an ONNX file, or its content, with the library of the device, verified or not.

    Args:
        file: The file, or its content.
        device: As of `open_runtime`.
        threads: Number of CPU threads (default: all cores).
        extra_outputs: Return all outputs of the graph, not only those of the specification.
        folder: Folder of the weights file of a content, if it has one.
        shapes: Shapes to prepare the device tensorrt for.

    Raises:
        BadInput: a package or device is missing, or coma export did not write the file.
        CheckFailed: the library cannot load the file.
    """
    if isinstance(file, Path):
        file = file.resolve()  # weights lie beside the file itself, not beside a link to it
    if is_openvino(device):
        from coma.runtimes.openvino import OpenVINORuntime

        return OpenVINORuntime(file, device, threads, extra_outputs, folder)
    from coma.runtimes.onnxruntime import OnnxRuntime

    return OnnxRuntime(file, device, threads, extra_outputs, folder, shapes)


def _load_exportable(path: Path, graph: GraphKind, visible_units: int | None) -> ExportableModel:
    # the room `export` builds graphs and registers its loader as an entry point
    for entry in metadata.entry_points(group="coma.graphs", name="load"):
        return entry.load()(path, graph, visible_units)
    raise BadInput(f"{path}: no installed package loads models for runtimes; install coma-dyvit[export]")


def _check_listed(path: Path, device: Device) -> Entry | None:
    """Returns a file's entry in the manifest beside it, None without a manifest; refuses files not listed.

    Warns if there is no manifest, or if an ONNX file was verified with another library than the device's.

    Raises:
        BadInput: the file is not listed, was rejected, or has changed since its verification.
    """
    real = path.resolve()
    try:
        manifest = Manifest.read(real.parent, f"export {real.name} again")
    except ForeignManifest:
        manifest = None
    if manifest is None and path.suffix == ".pt2":
        raise BadInput(
            f"{path}: opening a .pt2 file may run code, so it opens only beside the {NAME} that lists it"
        )
    if manifest is None:
        log.warning(
            "%s: there is no %s of coma export beside it, so it may not have been verified", path, NAME
        )
        return None
    for entry in manifest.files:
        if entry.file == real.name:
            if is_verified(real.parent, entry):
                warn_of_another_library(path, entry, device)
                return entry
            weights = f", or its weights in {' and '.join(entry.weights)} have" if entry.weights else ""
            raise BadInput(
                f"{path}: has changed since its verification{weights} (by the SHA-256 in {NAME}); export it "
                "again"
            )
    raise BadInput(
        f"{path}: {NAME} beside it does not list it as verified; export it again, or move it to a folder of "
        "its own to open it unverified"
    )


def warn_of_another_library(path: Path, entry: Entry, device: Device) -> None:
    """Warns if an ONNX file was verified with another library than the one that runs it on a device."""
    library = library_of(device)
    if (
        path.suffix == ".onnx"
        and entry.runtime
        and not any(title.startswith(library) for title in entry.runtimes)
    ):
        known = " and ".join(entry.runtimes)
        log.warning(
            "%s: was verified with %s, not with %s; export it again with --device %s",
            path,
            known,
            library,
            device,
        )
