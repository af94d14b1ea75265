"""Finds the model that a command runs: an artifact, an exported file, or one of a folder of exports."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Literal

from coma.artifact import load_artifact
from coma.artifact.load import artifact_hash
from coma.devices import pick_device
from coma.errors import BadInput
from coma.messages import abridged
from coma.paths import artifact_directory, exports_beside
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import NAME, ForeignManifest, Manifest
from coma.runtimes.model_spec import GRAPH_KINDS, GraphKind
from coma.runtimes.names import SUFFIXES, Device, RuntimeName, is_openvino
from coma.runtimes.open import open_runtime

log = logging.getLogger(__name__)

DeviceName = Literal["auto", "cuda", "cpu"]


def open_model(
    path: Path,
    graph: GraphKind,
    runtime: RuntimeName = "auto",
    device: DeviceName = "auto",
) -> Runtime:
    """Opens one graph of a model, and logs which file and runtime are used.

    Args:
        path: An artifact, a `.onnx` or `.engine` file, or a folder that `coma export` wrote.
        graph: Graph to run.
        runtime: Runtime to use. Of a folder of exports, auto takes the fp32 ONNX file, or else its first
            file; for an artifact, all but `pytorch` take the exports in the folder beside it.
        device: auto is the GPU where the runtime has one; engines always run on one, OpenVINO where its name
            says.

    Raises:
        BadInput: no such model there, a model of another kind, or a runtime or device that is not available.
        CheckFailed: the runtime refuses the file.
    """
    file = find_model(path, graph, runtime)
    exported = not artifact_directory(file).is_dir()
    opened = open_runtime(file, _device(file, runtime, device), None if exported else graph)
    if opened.spec.graph != graph:
        raise BadInput(f"{file}: is a graph of the {opened.spec.graph}, not of the {graph}")
    if opened.spec.visible_units:
        raise BadInput(
            f"{file}: computes {opened.spec.visible_units} listed units only; give a file that coma export "
            "wrote without --visible-units"
        )
    log.info("model: %s (%s)", file, opened.title)
    return opened


def find_model(path: Path, graph: GraphKind, runtime: RuntimeName = "auto") -> Path:
    """Returns the artifact or exported file that `open_model` opens.

    Raises:
        BadInput: as `open_model`.
    """
    suffix = SUFFIXES.get(runtime)
    if path.suffix in SUFFIXES.values() and not path.is_dir():
        if runtime != "auto" and suffix != path.suffix:
            raise BadInput(f"--runtime {runtime}: does not run {path.name}; leave the flag out")
        return path
    if path.is_dir() and (manifest := _manifest(path)):
        if runtime == "pytorch":
            raise BadInput(f"--runtime pytorch: {path} holds exported files; give the artifact")
        return _exported(path, manifest, graph, suffix)
    about = load_artifact(path).config
    if graph not in (*GRAPH_KINDS[about.kind], "encoder"):  # every kind has one
        raise BadInput(f"{path}: its kind is {about.kind!r}; give a {graph}")
    if suffix is None:
        return path
    folder = exports_beside(path)
    manifest = _manifest(folder) if folder.is_dir() else None
    if manifest is None or manifest.source != artifact_hash(path):
        what = f"no {NAME}" if manifest is None else "files of another artifact"
        export = f"coma export {shlex.quote(str(path))}"
        raise BadInput(f"--runtime {runtime}: {folder} has {what}; run {export} first")
    return _exported(folder, manifest, graph, suffix)


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.read(folder, "export it again")
    except ForeignManifest:
        return None


def _exported(folder: Path, manifest: Manifest, graph: GraphKind, suffix: str | None) -> Path:
    files = [each for each in manifest.files if each.graph == graph and not each.visible_units]
    fitting = [each for each in files if suffix is None or each.file.endswith(suffix)]
    if not fitting:
        wanted = f"{suffix or ''} file of a {graph}".strip()
        found = abridged([each.file for each in manifest.files]) or "no verified file"
        raise BadInput(f"{folder}: has no {wanted}, only {found}; coma export writes it")
    plain = [each for each in fitting if each.precision == "fp32" and each.file.endswith(".onnx")]
    return folder / (plain or fitting)[0].file


def _device(file: Path, runtime: RuntimeName, name: DeviceName) -> Device:
    if is_openvino(runtime):
        if name == "cuda" or (name == "cpu") > (runtime == "openvino"):
            raise BadInput(f"--device {name}: --runtime openvino runs on a CPU, openvino-gpu on an Intel GPU")
        return runtime
    if file.suffix == ".engine":
        if name == "cpu":
            raise BadInput(f"--device cpu: {file} is an engine, which runs on a GPU; give an .onnx file")
        return "cuda"
    if pick_device(name).type != "cuda":
        return "cpu"
    if file.suffix == ".onnx" and name == "auto":
        from coma.runtimes.onnxruntime import providers

        return "cuda" if "cuda" in providers() else "cpu"
    return "cuda"
