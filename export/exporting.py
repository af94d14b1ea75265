"""From an artifact to a folder of verified files: make, compare, keep or refuse, report.

A file carries its name only after it has passed; until then it is called `<name>.unverified`, and what is
refused ends as `<name>.rejected`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from export.description import Description, Form, Precision
from export.forms.load import load_deployable
from export.images import as_input, resized
from export.latency import compute, end_to_end, interleaved
from export.manifest import Entry, Manifest
from export.runtimes.base import Runtime
from export.runtimes.open import Device
from export.runtimes.pytorch import TorchRuntime
from export.shapes import Shapes
from export.to_onnx import in_precision, with_preprocessing, write_onnx
from export.verify.check import Verdict, verify
from export.verify.gates import GATES
from export.verify.metric import measure, top1
from pretrain.errors import BadInput, CheckFailed

if TYPE_CHECKING:
    import numpy as np

    from export.tensorrt.sidecar import EngineOptions
    from pretrain.data.source import Source

UNVERIFIED, REJECTED = ".unverified", ".rejected"


class Watcher(Protocol):
    """Told what is going on."""

    def step(self, title: str, done: int = 0, total: int | None = None) -> None:
        """Something begins, or is so far."""
        ...

    def say(self, line: str) -> None:
        """A result."""
        ...


@dataclass(frozen=True)
class Request:
    """What is to be exported, and how it is checked.

    Attributes:
        artifact: Directory.
        out: Folder for the files.
        precisions: Of the ONNX files, and of the engines made of them.
        tensorrt: Build engines too.
        inside: The graph takes uint8 pixels.
        device: Where ONNX files are verified and timed.
        pictures: Decoded images to compare on.
        images: What they are, for people.
        calibration: Decoded images that give int8 and fp8 their ranges.
        method: How int8 finds them.
        keep: Layers that stay in float under int8 and fp8, by module path.
        labelled: Labelled images, for the top-1 of classifiers.
        dataset: A dataset, for the AP of detectors and the mIoU of segmentors.
        most: Labelled images to measure on.
        seconds: To time each runtime at each batch; 0: not at all.
        engine: How engines are built.
    """

    artifact: Path
    out: Path
    precisions: tuple[Precision, ...]
    tensorrt: bool
    inside: bool
    device: Device
    pictures: Sequence[np.ndarray]
    images: str
    calibration: Sequence[np.ndarray]
    method: Any
    keep: tuple[str, ...]
    labelled: Source | None
    dataset: Path | None
    most: int
    seconds: float
    engine: EngineOptions | None


def export(request: Request, form: Form, shapes: Shapes, manifest: Manifest, watcher: Watcher) -> list[str]:
    """Export one form in all precisions.

    Returns:
        Why files were refused, a line for each.

    Raises:
        BadInput: something that was asked for cannot be done; what was finished before stays.
    """
    refused = []
    reference = TorchRuntime(load_deployable(request.artifact, form))
    maker = _Maker(request, form, shapes, watcher)
    for precision in sorted(request.precisions, key=list(GATES).index):
        path = request.out / file_name(form, precision)
        waiting = maker.onnx(precision)
        judged = _Judge(request, reference, shapes, watcher, manifest)
        fault = judged.onnx(waiting, path, precision, maker)
        if fault:
            refused.append(fault)
        elif request.tensorrt:
            refused += judged.engine(path, maker)
    maker.clean()
    return refused


def file_name(form: Form, precision: Precision) -> str:
    """Of the ONNX file."""
    return f"{form}.onnx" if precision == "fp32" else f"{form}-{precision}.onnx"


class _Maker:
    """Writes the files that are still to be verified."""

    def __init__(self, request: Request, form: Form, shapes: Shapes, watcher: Watcher) -> None:
        self.request, self.form, self.shapes, self.watcher = request, form, shapes, watcher
        self._base: Path | None = None

    def onnx(self, precision: Precision) -> Path:
        """An ONNX file of this precision, `.unverified`."""
        target = self._waiting(precision)
        if precision in ("int8", "fp8"):
            self._quantize(precision, target)
        else:
            self._trace(precision, target)
        return target

    def clean(self) -> None:
        """Take away what was made on the way and not asked for."""
        if self._base:
            self._base.unlink(missing_ok=True)

    def _trace(self, precision: Precision, target: Path) -> None:
        self.watcher.step(f"{self.form} {precision}: tracing the graph")
        deployable = load_deployable(self.request.artifact, self.form)
        if self.request.inside:
            deployable = with_preprocessing(deployable)
        in_precision(deployable.module, precision)
        description = replace(deployable.description, precision=precision)
        write_onnx(replace(deployable, description=description), self.shapes, target)

    def _quantize(self, precision: Precision, target: Path) -> None:
        from export.quantization import quantize_fp8, quantize_int8
        from export.to_onnx import METADATA, as_json

        base = self._fp32()
        description = describe(base)
        total = len(self.request.calibration)
        title = f"{self.form} {precision}: reading ranges of activations"
        self.watcher.step(title, 0, total)
        common: dict[str, Any] = {
            "keep": self.request.keep,
            "metadata": {METADATA: as_json(replace(description, precision=precision))},
            "progress": lambda done: self.watcher.step(title, done, total),
        }
        batches = self._batches(description)
        if precision == "int8":
            quantize_int8(base, target, batches, self.request.method, **common)
        else:
            quantize_fp8(base, target, batches, **common)

    def _fp32(self) -> Path:
        kept = self.request.out / file_name(self.form, "fp32")
        if "fp32" in self.request.precisions and kept.exists():
            return kept
        if self._base is None:
            self._base = self.request.out / f"{self.form}.onnx.base"
            self._trace("fp32", self._base)
        return self._base

    def _batches(self, description: Description) -> Iterator[dict[str, np.ndarray]]:
        from export.forms.load import example_inputs

        usual, rule = self.shapes.usual, description.preprocessing
        batch = description.inputs[0].axes[0]
        size = batch if isinstance(batch, int) else 1
        pictures = self.request.calibration
        for start in range(0, len(pictures) - size + 1, size):
            images = [resized(p, rule, (usual.height, usual.width)) for p in pictures[start : start + size]]
            inputs = {"images": as_input(images, rule)}
            for port, example in zip(
                description.inputs[1:],
                example_inputs(description, size, usual.height, usual.width)[1:],
                strict=True,
            ):
                inputs[port.name] = example
            yield {name: each.numpy() for name, each in inputs.items()}

    def _waiting(self, precision: Precision) -> Path:
        name = file_name(self.form, precision)
        return self.request.out / (name.removesuffix(".onnx") + UNVERIFIED + ".onnx")


class _Judge:
    """Compares, measures, names and records one file."""

    def __init__(
        self, request: Request, reference: Runtime, shapes: Shapes, watcher: Watcher, manifest: Manifest
    ) -> None:
        self.request, self.reference, self.shapes = request, reference, shapes
        self.watcher, self.manifest = watcher, manifest

    def onnx(self, waiting: Path, path: Path, precision: Precision, maker: _Maker) -> str | None:
        """Why the ONNX file is refused; None where it is kept."""
        from export.quantization import precision_summary

        runtime, title = self._open(waiting, precision)
        entry, verdict = self._entry(waiting, path.name, runtime, title)
        entry.numbers = precision_summary(_load(waiting))
        if not verdict.passed:
            entry.error = self._locate(waiting, runtime, maker)
        elif precision in ("int8", "fp8"):
            verdict = _worth_it(verdict, entry, self.request.out / file_name(maker.form, "fp32"))
            entry.verification = verdict.plain()
        return self._keep(waiting, path, entry, verdict)

    def engine(self, onnx_path: Path, maker: _Maker) -> list[str]:
        """Why the engine made of an ONNX file is refused; empty where it is kept."""
        from export.runtimes.tensorrt import TensorRTRuntime
        from export.tensorrt.builder import build_engine
        from export.tensorrt.profiles import profile_of
        from export.tensorrt.sidecar import sidecar_path

        path = onnx_path.with_suffix(".engine")
        waiting = path.with_suffix(UNVERIFIED + ".engine")
        profile = profile_of(describe(onnx_path), self.shapes)

        def progress(phase: str, done: int, steps: int) -> None:
            self.watcher.step(f"{path.name}: {phase}", done, steps)

        build_engine(onnx_path, waiting, (profile,), self.request.engine, progress)
        runtime = TensorRTRuntime(waiting, "cuda", cuda_graphs=not self.shapes.dynamic)
        entry, verdict = self._entry(waiting, path.name, runtime, runtime.title)
        fault = self._keep(waiting, path, entry, verdict)
        kept = path if fault is None else path.with_name(path.name + REJECTED)
        sidecar_path(waiting).replace(sidecar_path(kept))
        return [fault] if fault else []

    def _open(self, waiting: Path, precision: Precision) -> tuple[Runtime, str]:
        from export.runtimes.onnxruntime import OnnxRuntime

        if precision == "bf16" and self.request.device == "cpu":
            from export.emulation import emulate_bf16

            runtime = OnnxRuntime(emulate_bf16(_load(waiting)).SerializeToString())
            return runtime, runtime.title + ", bf16 emulated"
        if precision == "fp8" and self.request.device == "cpu":
            runtime = OnnxRuntime(waiting, fp8_products=True)
            return runtime, runtime.title
        runtime = OnnxRuntime(waiting, self.request.device)
        return runtime, runtime.title

    def _entry(self, waiting: Path, name: str, runtime: Runtime, title: str) -> tuple[Entry, Verdict]:
        about = runtime.description
        label = f"{name}: comparing with PyTorch"
        self.watcher.step(label)
        verdict = verify(
            self.reference,
            runtime,
            self.shapes,
            self.request.pictures,
            lambda done, total: self.watcher.step(label, done, total),
        )
        metric = self._metric(runtime) if verdict.passed else {}
        gate = GATES[about.precision]
        for score, value in metric.get("file", {}).items():
            lost = metric["torch"][score] - value
            if not lost <= gate.points:
                fault = f"{score} fell by {lost:.2f} points, more than {gate.points}"
                verdict = replace(verdict, failures=(*verdict.failures, fault))
        emulated = "emulated" in title
        timed = self._latency(runtime) if verdict.passed and self.request.seconds and not emulated else []
        entry = Entry(
            file=name,
            form=about.form,
            precision=about.precision,
            runtime=title,
            sha256=_sha256(waiting),
            bytes=waiting.stat().st_size,
            parameters=sum(p.numel() for p in self._module().parameters()),
            shapes=[str(s) for s in dict.fromkeys((self.shapes.least, self.shapes.usual, self.shapes.most))],
            tolerances=asdict(gate),
            verification=verdict.plain(),
            metric=metric,
            latency=timed,
        )
        return entry, verdict

    def _keep(self, waiting: Path, path: Path, entry: Entry, verdict: Verdict) -> str | None:
        fault = None
        if verdict.passed:
            waiting.replace(path)
        else:
            waiting.replace(path.with_name(path.name + REJECTED))
            fault = f"{path.name}: {'; '.join(verdict.failures)}" + (
                f"; {entry.error}" if entry.error else ""
            )
            entry.file += REJECTED
        self.manifest.add(entry, verdict.passed)
        self.manifest.write(self.request.out)
        worst = [each.cosine for each in verdict.outputs.values() if each.compared or not each.finite]
        least = f"least cosine {min(worst):.6f}" if worst else "nothing to compare"
        scores = "".join(f", {k} {v:.2f}" for k, v in entry.metric.get("file", {}).items())
        mark = "kept   " if verdict.passed else "refused"
        self.watcher.say(
            f"{mark} {entry.file}  {entry.bytes / 1e6:.1f} MB, {least} over {verdict.images} images and "
            f"{len(verdict.shapes)} shapes{scores}"
        )
        return fault

    def _metric(self, runtime: Runtime) -> dict[str, dict[str, float]]:
        request, form = self.request, runtime.description.form
        if form == "classifier" and request.labelled is not None:
            self.watcher.step("top-1 of PyTorch and of the file")
            return {
                "torch": top1(self.reference, request.labelled, request.most),
                "file": top1(runtime, request.labelled, request.most),
            }
        if form in ("detector", "segmentor") and request.dataset is not None:
            self.watcher.step("the task's metric, of PyTorch and of the file")
            return {
                "torch": measure(self.reference, request.artifact, request.dataset, request.most),
                "file": measure(runtime, request.artifact, request.dataset, request.most),
            }
        return {}

    def _latency(self, runtime: Runtime) -> list[dict[str, Any]]:
        from export.forms.load import example_inputs

        usual = self.shapes.usual
        both = (runtime, self.reference)
        rows = []
        for batch in dict.fromkeys((self.shapes.least.batch, usual.batch)):
            self.watcher.step(f"timing a batch of {batch}")
            size, shape = (usual.height, usual.width), f"{batch} x {usual.height} x {usual.width}"
            calls = []
            for each in both:
                about = each.description
                names = [port.name for port in about.inputs]
                inputs = dict(zip(names, example_inputs(about, batch, *size), strict=True))
                pixels = [resized(self.request.pictures[0], about.preprocessing, size)] * batch
                inputs["images"] = as_input(pixels, about.preprocessing)
                calls.append(compute(each, inputs))
            timed = [("compute", call, each) for call, each in zip(calls, both, strict=True)]
            if runtime.description.form != "reconstructor":
                files = [_as_png(self.request.pictures[i % len(self.request.pictures)]) for i in range(batch)]
                channels = int(runtime.description.inputs[0].axes[1])
                timed += [("end to end", end_to_end(each, files, size, channels), each) for each in both]
            results = interleaved([call for _, call, _ in timed], batch, self.request.seconds)
            rows += [
                {"shape": shape, "runtime": each.title, "what": what, **asdict(result)}
                for (what, _, each), result in zip(timed, results, strict=True)
            ]
        return rows

    def _locate(self, waiting: Path, runtime: Runtime, maker: _Maker) -> str | None:
        from export.verify.locate import locate

        self.watcher.step(f"{waiting.name}: looking for where the error starts")
        about, usual = runtime.description, self.shapes.usual
        batch = self.shapes.usual.batch if "batch" not in self.shapes.dynamic else 1
        rule, own = about.preprocessing, self.reference.description.preprocessing
        size = (usual.height, usual.width)
        pixels = [resized(self.request.pictures[0], own, size)] * batch
        from export.forms.load import example_inputs

        others = example_inputs(self.reference.description, batch, *size)[1:]
        try:
            found = locate(
                self._module(),
                _load(waiting),
                (as_input(pixels, own), *others),
                GATES[about.precision].cosine,
                exported=(as_input(pixels, rule), *others),
            )
        except (BadInput, RuntimeError):  # a file that cannot even be run with its insides marked
            return None
        return str(found) if found else None

    def _module(self) -> torch.nn.Module:
        return self.reference.module  # pyright: ignore[reportAttributeAccessIssue]


def describe(path: Path) -> Description:
    """What an ONNX file says of itself."""
    from export.to_onnx import read_description

    return read_description(_load(path), path.name)


def _worth_it(verdict: Verdict, entry: Entry, plain: Path) -> Verdict:
    """A quantised file is kept only if it is smaller or faster than fp32."""
    if not plain.exists() or entry.bytes < plain.stat().st_size:
        return verdict
    return replace(verdict, failures=(*verdict.failures, "not smaller than the fp32 file"))


def _load(path: Path) -> Any:
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's own kinds of errors
        raise CheckFailed(f"{path}: not a readable ONNX file ({error})") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    if pixels.dtype != "uint8" or pixels.shape[2] not in (1, 3):
        buffer = io.BytesIO()
        import numpy

        numpy.save(buffer, pixels)
        return buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
