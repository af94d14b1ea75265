"""How long an artifact takes in PyTorch and in every file that was exported of it, run in turns.

A file is run only if it is the one that was verified: its hash must be the one in manifest.json. What cannot
be run is handed out with its reason, beside what could.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coma.artifact.load import artifact_hash
from coma.devices import cores
from coma.errors import BadInput, ComaError
from coma.library_errors import library_errors
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import NAME, Entry, Manifest, is_verified
from coma.runtimes.model_spec import GraphKind
from coma.runtimes.open import Device
from coma.runtimes.pytorch import TorchRuntime
from export.graphs.load import example_inputs, load_exportable
from export.image_sets import ImageSet
from export.job import ProgressListener
from export.latency import Latency, compute, end_to_end, interleaved
from export.preprocessing import as_input, resized

EAGER, COMPILED = "torch eager", "torch compiled"
MOST_IMAGES = 64
"""Different images that are shown; larger batches repeat them."""
_WARM_UP, _LEAST = 3, 5  # runs: the first as `interleaved` has it, the second as it is told


@dataclass(frozen=True)
class Contender:
    """A loaded model.

    Attributes:
        name: torch eager, torch compiled, or the file's.
        precision: Of its products.
        runtime: It.
        device: Where its inputs lie when only computing is timed.
    """

    name: str
    precision: str
    runtime: Runtime
    device: str


@dataclass(frozen=True)
class Row:
    """What was measured of one contender.

    Attributes:
        name: The contender's.
        precision: Of its products.
        runtime: Library, version and device.
        batch: Images of a call.
        what: "compute" (from tensors to outputs) or "end to end" (from the bytes of image files).
        latency: In milliseconds.
        speed: Median time of PyTorch on the same device over its own; None where PyTorch did not run there.
    """

    name: str
    precision: str
    runtime: str
    batch: int
    what: str
    latency: Latency
    speed: float | None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(self)
        return values | values.pop("latency")


@dataclass(frozen=True)
class NotRun:
    """Something that takes part in no comparison, or not in that of one batch size, and why."""

    name: str
    reason: str
    batch: int | None = None


def exported(
    folder: Path, artifact: Path, graph: GraphKind, required: bool
) -> tuple[list[Entry], list[NotRun]]:
    """The files of one graph in a folder of exports, and those that are out of the question.

    Args:
        folder: With its manifest.json.
        artifact: What the files must have been made of.
        graph: Which of them.
        required: A folder without exports of this artifact is an error; otherwise it is only named.

    Raises:
        BadInput: that error; a manifest that cannot be read; a file that is not the one that was verified.
    """
    manifest = Manifest.read(folder, f"make it again with coma export {artifact}")
    if manifest is None or manifest.source != artifact_hash(artifact):
        reason = f"no {NAME} there" if manifest is None else "holds exports of another artifact"
        reason += f"; coma export {artifact} makes its own"
        if required:
            raise BadInput(f"--exports {folder}: {reason}")
        return [], [NotRun(str(folder), reason)]
    entries, absent = [], []
    for entry in manifest.files:
        path = folder / entry.file
        if entry.graph != graph:
            absent.append(NotRun(entry.file, f"is of the graph {entry.graph}, not {graph}"))
        elif not path.is_file():
            absent.append(NotRun(entry.file, f"listed in {NAME}, but no longer there"))
        elif not is_verified(folder, entry):
            raise BadInput(
                f"{path}: is not the file that was verified (its SHA-256 is not the one in {NAME}); "
                f"make it again with coma export {artifact}"
            )
        else:
            entries.append(entry)
    for entry in manifest.rejected:
        failures = "; ".join(entry.verification.get("failures", ()))
        absent.append(NotRun(entry.file, f"was refused by coma export: {failures}"))
    return entries, absent


def open_torch(
    artifact: Path, graph: GraphKind, device: Device, compiled: bool
) -> tuple[list[Contender], list[NotRun]]:
    """PyTorch as it is and, if asked for, compiled."""
    place = "cpu" if device == "cpu" else "cuda"
    exportable = load_exportable(artifact, graph)
    found = [Contender(EAGER, "fp32", TorchRuntime(exportable, place), place)]
    if compiled:
        found.append(Contender(COMPILED, "fp32", TorchRuntime(exportable, place, compiled=True), place))
        return found, []
    return found, [NotRun(COMPILED, "not asked for; --compile runs it, compiling takes a while")]


def open_exports(
    folder: Path, entries: Sequence[Entry], device: Device, threads: int, listener: ProgressListener
) -> tuple[list[Contender], list[NotRun]]:
    """Load files: .onnx on `device`, .engine on a GPU."""
    found, absent = [], []
    for number, entry in enumerate(entries):
        listener.step(f"loading {entry.file}", number, len(entries))
        try:
            found.append(_open(folder / entry.file, entry, device, threads))
        except ComaError as error:
            absent.append(NotRun(entry.file, str(error)))
    return found, absent


@dataclass(frozen=True)
class Call:
    """Something to time.

    Attributes:
        contender: Whose it is.
        what: "compute" or "end to end".
        run: It.
        seconds: That its second run took.
    """

    contender: Contender
    what: str
    run: Callable[[], object]
    seconds: float


def try_out(
    contenders: Sequence[Contender],
    images: ImageSet,
    batch: int,
    size: tuple[int, int],
    listener: ProgressListener,
) -> tuple[list[Call], list[NotRun]]:
    """What can be timed at one batch size, and what cannot: every call is made twice.

    Args:
        contenders: What is compared.
        images: Shown again and again where they are fewer than the batch.
        batch: How many at a time.
        size: Height and width they are resized to.
        listener: Told what is being tried.
    """
    calls, absent = [], []
    for number, each in enumerate(contenders):
        listener.step(f"batch {batch}: trying {each.name}", number, len(contenders))
        try:
            with library_errors(each.name):
                calls += [
                    Call(each, what, run, _second_run(run)) for what, run in _calls(each, images, batch, size)
                ]
        except (ComaError, RuntimeError) as error:  # of torch: no memory, no compiler
            absent.append(NotRun(each.name, str(error).strip().partition("\n")[0][:300], batch))
    return sorted(calls, key=lambda call: call.what), absent  # compute first; contenders in their order


def expected_seconds(calls: Sequence[Call], seconds: float) -> float:
    """How long timing them will take."""
    once = sum(call.seconds for call in calls)
    return _WARM_UP * once + max(seconds * len(calls), _LEAST * once)


def measure(calls: Sequence[Call], batch: int, seconds: float) -> list[Row]:
    """Run all of them in turns, for so many seconds each; `speed` relates to PyTorch's on the same device."""
    with library_errors(f"timing a batch of {batch}"):
        results = interleaved([call.run for call in calls], batch, seconds, least=_LEAST)
    pairs = list(zip(calls, results, strict=True))
    eager = {
        (call.what, call.contender.device): result.p50
        for call, result in pairs
        if call.contender.name == EAGER
    }
    rows = []
    for call, result in pairs:
        each, theirs = call.contender, eager.get((call.what, call.contender.device))
        speed = None if theirs is None else theirs / result.p50
        rows.append(Row(each.name, each.precision, each.runtime.title, batch, call.what, result, speed))
    return rows


def busy_note(threads: int) -> str | None:
    """What to know of the numbers where other processes want the same cores; None where they do not."""
    if not hasattr(os, "getloadavg"):
        return None
    load = os.getloadavg()[0]
    if load - 1 + threads <= cores() + 0.5:  # one of the load may be this process
        return None
    return (
        f"the {cores()} cores were busy before this began (load {load:.1f}), so the numbers are unsteady; "
        "with several threads PyTorch's most of all, since they wait actively for each other: take fewer "
        "--threads, or set OMP_WAIT_POLICY=passive in the environment"
    )


def _open(path: Path, entry: Entry, device: Device, threads: int) -> Contender:
    if path.suffix == ".engine":
        from coma.runtimes.tensorrt.runtime import TensorRTRuntime

        return Contender(path.name, entry.precision, TensorRTRuntime(path, cuda_graphs=True), "cuda")
    from coma.runtimes.onnxruntime import OnnxRuntime

    runtime = OnnxRuntime(path, device, threads)
    return Contender(path.name, entry.precision, runtime, "cpu" if device == "cpu" else "cuda")


def _calls(
    each: Contender, images: ImageSet, batch: int, size: tuple[int, int]
) -> list[tuple[str, Callable[[], object]]]:
    spec = each.runtime.spec
    rule = spec.preprocessing
    pictures = [images.pictures[i % len(images.pictures)] for i in range(min(batch, len(images.pictures)))]
    shown = [resized(picture, rule, size) for picture in pictures]
    examples = example_inputs(spec, batch, *size)
    inputs = {tensor_spec.name: tensor for tensor_spec, tensor in zip(spec.inputs, examples, strict=True)}
    inputs["images"] = as_input([shown[i % len(shown)] for i in range(batch)], rule)
    found = [("compute", compute(each.runtime, {k: v.to(each.device) for k, v in inputs.items()}))]
    if images.files and spec.graph != "reconstructor":  # which takes a mask beside the images
        files = [images.files[i % len(images.files)] for i in range(batch)]
        found.append(("end to end", end_to_end(each.runtime, files, size, inputs["images"].shape[1])))
    return found


def _second_run(call: Callable[[], object]) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
