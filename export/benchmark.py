"""Latency of an artifact in PyTorch and in all of its exported files, measured in turns.

A file runs only if it was verified: its hash must be the one in manifest.json. Models that cannot run are
returned with the reason.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coma.artifact.load import artifact_hash
from coma.devices import cores
from coma.errors import BadInput, ComaError
from coma.library_errors import library_errors
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import NAME, Entry, Manifest, is_verified
from coma.runtimes.model_spec import GraphKind
from coma.runtimes.names import SUFFIXES, Device, torch_device_of
from coma.runtimes.open import open_onnx, warn_of_another_library
from coma.runtimes.preprocessing import resize_image, to_input
from coma.runtimes.pytorch import TorchRuntime
from export.graphs.load import load_exportable, named_examples
from export.image_sets import ImageSet
from export.latency import Latency, end_to_end, time_interleaved
from export.progress import ProgressListener

EAGER, COMPILED = "torch eager", "torch compiled"
MOST_IMAGES = 64
"""Maximum number of different images; larger batches repeat them."""
_WARM_UP, _LEAST = 3, 5  # runs of each call in `time_interleaved`


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model.

    Attributes:
        name: torch eager, torch compiled, or the name of the file.
        precision: Precision of its matrix multiplications.
        runtime: Runtime that runs the model.
        device: Device of its inputs when only computing is timed.
    """

    name: str
    precision: str
    runtime: Runtime
    device: str


@dataclass(frozen=True)
class Row:
    """Measurement of one model at one batch size.

    Attributes:
        name: Name of the model.
        precision: Precision of its matrix multiplications.
        runtime: Library, version and device.
        batch: Number of images in a call.
        what: "compute" (from tensors to outputs) or "end to end" (from the bytes of image files).
        latency: Latency in milliseconds.
        speed: Speed-up over PyTorch on the same device; None if PyTorch did not run there.
    """

    name: str
    precision: str
    runtime: str
    batch: int
    what: str
    latency: Latency
    speed: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the values for JSON."""
        values = asdict(self)
        return values | values.pop("latency")


@dataclass(frozen=True)
class NotRun:
    """A model that did not run, or not at one batch size, and the reason."""

    name: str
    reason: str
    batch: int | None = None


def list_exports(
    folder: Path, artifact: Path, graph: GraphKind, required: bool, visible_units: int | None = None
) -> tuple[list[Entry], list[NotRun]]:
    """Lists the verified files of one graph in a folder of exports, and the files that cannot take part.

    Args:
        folder: Folder with a manifest.json.
        artifact: Artifact that the files must be exported from.
        graph: Graph of the files.
        required: Whether a folder without exports of this artifact is an error.
        visible_units: Number of visible units that the files take a list of; None for other files.

    Raises:
        BadInput: the folder has no exports of this artifact although they are required, its manifest cannot
            be read, or a file has changed since its verification.
    """
    export = f"run coma export {shlex.quote(str(artifact))}"
    manifest = Manifest.read(folder, f"{export} again")
    if manifest is None or manifest.source != artifact_hash(artifact):
        reason = f"no {NAME}" if manifest is None else "holds exports of another artifact"
        reason += f"; {export}"
        if required:
            raise BadInput(f"--exports {folder}: {reason}")
        return [], [NotRun(str(folder), reason)]
    entries, absent = [], []
    for entry in manifest.files:
        path = folder / entry.file
        if entry.graph != graph:
            absent.append(NotRun(entry.file, f"is a graph of the {entry.graph}, not of the {graph}"))
        elif entry.visible_units != visible_units:
            listed, remedy = entry.visible_units, "leave --visible-units out"
            what = f"computes {listed} listed units only" if listed else "computes all units"
            if listed:
                remedy = f"add --visible-units {listed}"
            absent.append(NotRun(entry.file, f"{what}; {remedy}"))
        elif missing := [name for name in entry.hashes if not (folder / name).is_file()]:
            absent.append(NotRun(entry.file, f"{missing[0]} is listed in {NAME} but missing"))
        elif not is_verified(folder, entry):
            raise BadInput(
                f"{path}: has changed since its verification (its SHA-256 differs from {NAME}); "
                f"{export} again"
            )
        else:
            entries.append(entry)
    for entry in manifest.rejected:
        failures = "; ".join(entry.verification.get("failures", ()))
        absent.append(NotRun(entry.file, f"was refused by coma export: {failures}"))
    listed = {entry.file for entry in (*manifest.files, *manifest.rejected)}
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES.values() and path.name not in listed:
            absent.append(NotRun(path.name, f"is not listed in {NAME}, so it was never verified"))
    return entries, absent


def open_torch(
    artifact: Path,
    graph: GraphKind,
    devices: Sequence[Device],
    compiled: bool,
    visible_units: int | None = None,
) -> tuple[list[LoadedModel], list[NotRun]]:
    """Loads the artifact in PyTorch beside every device, eager and, if `compiled`, also compiled."""
    found = []
    for place in dict.fromkeys(map(torch_device_of, devices)):
        exportable = load_exportable(artifact, graph, visible_units)
        found.append(LoadedModel(EAGER, "fp32", TorchRuntime(exportable, place), place))
        if compiled:
            found.append(LoadedModel(COMPILED, "fp32", TorchRuntime(exportable, place, compiled=True), place))
    if compiled:
        return found, []
    return found, [NotRun(COMPILED, "add --compile, which takes a minute or more per batch size")]


def open_exports(
    folder: Path,
    entries: Sequence[Entry],
    devices: Sequence[Device],
    threads: int,
    listener: ProgressListener,
) -> tuple[list[LoadedModel], list[NotRun]]:
    """Loads exported files: .onnx on all `devices`, others on the one that they are for."""
    found, absent = [], []
    for number, entry in enumerate(entries):
        listener.step(f"loading {entry.file}", number, len(entries))
        for device in devices if entry.file.endswith(".onnx") else devices[:1]:
            try:
                found.append(_open(folder / entry.file, entry, device, threads))
            except ComaError as error:
                absent.append(NotRun(entry.file, str(error)))
    return found, absent


@dataclass(frozen=True)
class Call:
    """A call to time.

    Attributes:
        model: Model that the call runs.
        what: "compute" or "end to end".
        run: The call.
        seconds: Duration of its second run.
    """

    model: LoadedModel
    what: str
    run: Callable[[], object]
    seconds: float


def prepare_calls(
    models: Sequence[LoadedModel],
    images: ImageSet,
    batch: int,
    size: tuple[int, int],
    listener: ProgressListener,
) -> tuple[list[Call], list[NotRun]]:
    """Returns the calls to time at one batch size and the models that cannot run; every call runs twice.

    Args:
        models: Models to compare.
        images: Images; a batch repeats them if it is larger.
        batch: Batch size.
        size: Height and width that images are resized to.
        listener: Receives progress updates.
    """
    calls, absent = [], []
    for number, each in enumerate(models):
        listener.step(f"batch {batch}: trying {each.name}", number, len(models))
        try:
            with library_errors(each.name):
                calls += [
                    Call(each, what, run, _time_second_run(run))
                    for what, run in _calls(each, images, batch, size)
                ]
        except (ComaError, RuntimeError) as error:  # of torch: no memory, no compiler
            absent.append(NotRun(each.name, str(error).strip().partition("\n")[0][:300], batch))
    return sorted(calls, key=lambda call: call.what), absent  # compute first; models in their order


def expected_seconds(calls: Sequence[Call], seconds: float) -> float:
    """Returns the expected duration of `measure`."""
    once = sum(call.seconds for call in calls)
    return _WARM_UP * once + max(seconds * len(calls), _LEAST * once)


def measure(calls: Sequence[Call], batch: int, seconds: float) -> list[Row]:
    """Times all calls in turns, for `seconds` each; `speed` compares with PyTorch on the same device."""
    with library_errors(f"timing a batch of {batch}"):
        results = time_interleaved([call.run for call in calls], batch, seconds, least=_LEAST)
    pairs = list(zip(calls, results, strict=True))
    eager = {(call.what, call.model.device): result.p50 for call, result in pairs if call.model.name == EAGER}
    rows = []
    for call, result in pairs:
        each, theirs = call.model, eager.get((call.what, call.model.device))
        speed = None if theirs is None else theirs / result.p50
        rows.append(Row(each.name, each.precision, each.runtime.title, batch, call.what, result, speed))
    return rows


def busy_note(threads: int) -> str | None:
    """Returns a warning if other processes use the same cores, or None."""
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load - 1 + threads <= cores() + 0.5:  # one of the load may be this process
        return None
    return (
        f"the {cores()} cores were busy before this began (load {load:.1f}), so the numbers vary, most of "
        "all those of several threads; use fewer --threads"
    )


def _open(path: Path, entry: Entry, device: Device, threads: int) -> LoadedModel:
    if path.suffix == ".engine":
        from coma.runtimes.tensorrt.runtime import TensorRTRuntime

        return LoadedModel(path.name, entry.precision, TensorRTRuntime(path, cuda_graphs=True), "cuda")
    if path.suffix == ".pt2":
        from coma.runtimes.torch_program import TorchProgramRuntime

        place = torch_device_of(device)
        return LoadedModel(path.name, entry.precision, TorchProgramRuntime(path, place), place)
    warn_of_another_library(path, entry, device)
    shapes = entry.shape_range() if device == "tensorrt" else None
    runtime = open_onnx(path, device, threads, shapes=shapes)
    return LoadedModel(path.name, entry.precision, runtime, torch_device_of(device))


def _calls(
    each: LoadedModel, images: ImageSet, batch: int, size: tuple[int, int]
) -> list[tuple[str, Callable[[], object]]]:
    spec = each.runtime.spec
    rule = spec.preprocessing
    pictures = [images.pictures[i % len(images.pictures)] for i in range(min(batch, len(images.pictures)))]
    shown = [resize_image(picture, rule, size) for picture in pictures]
    inputs = named_examples(spec, batch, *size)
    inputs["images"] = to_input([shown[i % len(shown)] for i in range(batch)], rule)
    on_device = {name: tensor.to(each.device) for name, tensor in inputs.items()}
    found: list[tuple[str, Callable[[], object]]] = [("compute", partial(each.runtime, **on_device))]
    if images.files and len(spec.inputs) == 1:  # others also take the visible units
        files = [images.files[i % len(images.files)] for i in range(batch)]
        found.append(("end to end", end_to_end(each.runtime, files, size, inputs["images"].shape[1])))
    return found


def _time_second_run(call: Callable[[], object]) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
