"""Lists the runtimes of a model, and why others are not available.

An exported file is used only if the `manifest.json` beside it lists it as verified, with the hash of the file
and the hash of the artifact. So a file that failed verification, changed or belongs to other weights never
runs under the name of the artifact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from coma.atomic_io import sha256_of
from coma.errors import BadInput
from coma.runtimes.manifest import NAME as MANIFEST
from coma.runtimes.manifest import Manifest
from coma.runtimes.model_spec import GraphKind
from coma.runtimes.names import COMPILED, SUFFIXES, Device, RuntimeName, is_openvino

LIBRARIES: dict[RuntimeName, str] = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "openvino-gpu": "OpenVINO on an Intel GPU",
    "tensorrt": "TensorRT",
    "pt2": "PyTorch program",
}
"""Title of every runtime of exported files."""


@dataclass(frozen=True)
class RuntimeOption:
    """A runtime of one graph of a model, available or not.

    Attributes:
        title: Name on the page, for example "ONNX Runtime fp16".
        form: Kind of the graph.
        path: Artifact or exported file; None where there is none.
        device: Device for `open_runtime`.
        reason: Why the runtime is not available; None if it is.
    """

    title: str
    form: GraphKind
    path: Path | None
    device: Device = "cpu"
    reason: str | None = None


@dataclass(frozen=True)
class Exported:
    """A verified file and its entry in the manifest.

    Attributes:
        path: The file.
        form: Kind of the graph.
        precision: Precision of the matrix products.
        sha256: SHA-256 of the file when it was verified.
        source: SHA-256 of the artifact's weights.
        kind: Kind of the artifact.
        visible_units: Number of units that its input `visible` lists; None for files that take none.
    """

    path: Path
    form: GraphKind
    precision: str
    sha256: str
    source: str
    kind: str
    visible_units: int | None = None

    @cached_property
    def changed(self) -> str | None:
        """Returns why the file differs from the verified one; None if it does not."""
        if sha256_of(self.path) == self.sha256:
            return None
        return f"differs from the file that {MANIFEST} lists; export it again"


def exported_files(folder: Path) -> Iterator[Exported]:
    """Yields the files that a folder's manifest lists and that exist.

    Raises:
        BadInput: a missing or unreadable manifest.
    """
    manifest = Manifest.read(folder, "export again")
    if manifest is None:
        raise BadInput(f"{folder}: no {MANIFEST}; use a folder that `coma export` wrote")
    for each in manifest.files:
        path = folder / each.file
        if path.is_file():
            yield Exported(
                path,
                each.graph,
                each.precision,
                each.sha256,
                manifest.source,
                manifest.kind,
                each.visible_units,
            )


def verified_file(path: Path) -> Exported:
    """Returns an exported file.

    Raises:
        BadInput: a file that is missing, not verified, or changed since.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    for entry in exported_files(path.parent):
        if entry.path.name == path.name:
            if entry.changed:
                raise BadInput(f"{path}: {entry.changed}")
            return entry
    raise BadInput(f"{path}: is not listed in the {MANIFEST} beside it; export it again")


def runtime_options(
    entries: list[Exported], form: GraphKind, artifact: Path | None, device: Device
) -> list[RuntimeOption]:
    """Returns all runtimes of one graph, available ones first.

    Args:
        entries: Exported files of the same weights.
        form: Kind of the graph.
        artifact: Directory of the artifact, if it was given.
        device: Device for PyTorch and ONNX Runtime.
    """
    options = []
    if artifact is not None:
        options.append(RuntimeOption("PyTorch", form, artifact, device))
    else:
        options.append(
            RuntimeOption("PyTorch", form, None, reason="the artifact was not given when the demo started")
        )
    for runtime, title in LIBRARIES.items():
        files = [each for each in entries if each.form == form and each.path.suffix == SUFFIXES[runtime]]
        options += [_option(entry, runtime, device) for entry in files]
        if all(each.visible_units for each in files):
            reason = _how_to_make(SUFFIXES[runtime], artifact)
            options.append(RuntimeOption(title, form, None, reason=reason))
    return sorted(options, key=lambda option: option.reason is not None)


def _option(entry: Exported, runtime: RuntimeName, device: Device) -> RuntimeOption:
    title = LIBRARIES[runtime] + (", compiled" if entry.path.stem.endswith(COMPILED) else "")
    title += "" if entry.precision == "fp32" else f" {entry.precision}"
    if entry.visible_units:
        title += f", {entry.visible_units} visible units"
        reason = "takes lists of a fixed number of visible units, and masks on this page show any number"
        return RuntimeOption(title, entry.form, entry.path, reason=reason)
    try:
        where = _place(runtime, device)
    except BadInput as error:
        return RuntimeOption(title, entry.form, entry.path, reason=str(error))
    if where in ("cpu", "openvino") and device != "cpu":
        title += " on the CPU"
    return RuntimeOption(title, entry.form, entry.path, where, entry.changed)


def _place(runtime: RuntimeName, device: Device) -> Device:
    """Returns the device for a runtime: the GPU for engines; `device` or else the CPU for ONNX Runtime.

    Raises:
        BadInput: this machine lacks OpenVINO, TensorRT or a GPU.
    """
    if is_openvino(runtime):
        from coma.runtimes.openvino import require_device

        require_device(runtime)
        return runtime
    if runtime == "onnxruntime":
        from coma.runtimes.onnxruntime import providers

        return device if device in providers() else "cpu"
    if runtime == "pt2":
        return device
    from coma.runtimes.tensorrt.discovery import require_gpu, require_package

    require_package("tensorrt")
    require_gpu(0)
    return "cuda"


def _how_to_make(suffix: str, artifact: Path | None) -> str:
    name = artifact.name if artifact else "ARTIFACT"
    if suffix == ".onnx":
        return f"not exported; coma export {name} writes a file"
    if suffix == ".pt2":
        return f"not exported; coma export {name} --to onnx,pt2 writes a file"
    return f"not exported; coma export {name} --to onnx,tensorrt builds one on a machine with an NVIDIA GPU"
