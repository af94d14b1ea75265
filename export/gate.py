"""The gate: verifies a candidate file against PyTorch, keeps or rejects it, and records the measurements."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coma.atomic_io import sha256_of
from coma.errors import BadInput, CheckFailed, ComaError
from coma.library_errors import about_one_file, library_errors
from coma.messages import counted
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import Entry, Manifest, Selection
from coma.runtimes.model_spec import ModelSpec, Precision, eight_bit_part, float_part
from coma.runtimes.names import torch_device_of
from coma.runtimes.onnx_file import read_graph, weights_file
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shapes
from coma.runtimes.tensorrt.sidecar import sidecar_path
from export.candidates import CandidateBuilder, fit_preprocessing
from export.config import ExportConfig, ExportImages
from export.graphs.load import load_exportable
from export.latency import end_to_end, time_interleaved
from export.onnx_export import check_axes, load_onnx, normalized, read_spec, with_sizes
from export.verify.opened_file import OpenedFile, open_file
from export.verify.parity import batch_inputs, verify
from export.verify.task_metrics import open_metric, top1
from export.verify.tolerances import Tolerance, tolerance_of
from export.verify.verdict import ParityResult, worst_shape

if TYPE_CHECKING:
    from export.progress import ProgressListener

log = logging.getLogger(__name__)

REJECTED = ".rejected"


class Gate:
    """Verifies, measures, names and records the files of one graph.

    CheckFailed means that one file cannot be opened or measured; the caller passes it to `reject`. BadInput
    is about the settings and ends the export.
    """

    def __init__(
        self,
        config: ExportConfig,
        images: ExportImages,
        reference: TorchRuntime,
        shapes: Shapes,
        listener: ProgressListener,
        manifest: Manifest,
    ) -> None:
        self.config, self.images, self.reference, self.shapes = config, images, reference, shapes
        self.listener, self.manifest = listener, manifest
        self._kept: dict[Precision, Entry] = {}
        self._scores: dict[str, float] | None = None
        self._scored_images: Selection | None = None

    def verify_onnx(
        self, candidate: Path, path: Path, precision: Precision, builder: CandidateBuilder
    ) -> str | None:
        """Verifies an ONNX file; returns why it is rejected, or None if it is kept."""
        from export.quantization import precision_summary

        model = load_onnx(candidate)
        device, *others = self.config.devices
        opened = open_file(candidate, model, self.reference.spec.graph, precision, device, self.shapes)
        with library_errors("the graph cannot be inspected"):
            check_axes(model, opened.runtime.spec)
            numbers = precision_summary(model)
        entry, result = self._verify(candidate, path.name, opened)
        entry.numbers = numbers
        if not result.passed:
            entry.error = self._locate_error(opened, result)
        elif eight_bit_part(precision):
            rest = float_part(precision)
            base_bytes = _bytes_of(builder.base_file(precision))
            result = _require_gain(result, entry, rest, base_bytes, self._kept.get(rest))
            entry.verification = result.to_dict()
        else:
            self._kept[precision] = entry
        for device in others if result.passed else ():
            opened = open_file(candidate, model, self.reference.spec.graph, precision, device, self.shapes)
            entry, result = self._verify_again(candidate, path.name, opened, entry, result)
        return self._record(candidate, path, entry, result)

    def verify_engine(self, onnx_path: Path, builder: CandidateBuilder) -> str | None:
        """Builds and verifies the engine of an ONNX file; returns why it is rejected, or None."""
        from coma.runtimes.tensorrt.profiles import profile_of
        from coma.runtimes.tensorrt.runtime import TensorRTRuntime
        from export.tensorrt.builder import build_engine

        path = onnx_path.with_suffix(".engine")
        candidate = builder.candidate_path(path)
        builder.temporary(sidecar_path(candidate))
        profile = profile_of(read_spec(onnx_path), self.shapes)

        def progress(phase: str, done: int, steps: int) -> None:
            self.listener.step(f"{path.name}: {phase}", done, steps)

        build_engine(onnx_path, candidate, (profile,), self.config.engine, progress)
        runtime = TensorRTRuntime(candidate, "cuda", cuda_graphs=not self.shapes.dynamic)
        precision = read_spec(onnx_path).precision
        opened = OpenedFile(runtime, runtime, precision, device="cuda")
        entry, result = self._verify(candidate, path.name, opened)
        return self._record(candidate, path, entry, result)

    def verify_program(
        self, path: Path, precision: Precision, builder: CandidateBuilder, compiled: bool
    ) -> str | None:
        """Writes and verifies a `.pt2` file; returns why it is rejected, or None if it is kept."""
        from coma.runtimes.torch_program import TorchProgramRuntime

        device = torch_device_of(self.config.devices[0])
        candidate = builder.build_program(path, precision, device if compiled else None)
        runtime = TorchProgramRuntime(candidate, device)
        entry, result = self._verify(
            candidate, path.name, OpenedFile(runtime, runtime, precision, device=device)
        )
        return self._record(candidate, path, entry, result)

    def reject(
        self, path: Path, precision: Precision, builder: CandidateBuilder, error: CheckFailed
    ) -> str | None:
        """Records a file that cannot be built, opened or measured; returns why it is rejected."""
        candidate, result = builder.candidate_path(path), ParityResult(0, {}, (str(error),))
        return self._record(candidate, path, self._entry(candidate, path.name, precision, result), result)

    def _verify(self, candidate: Path, name: str, opened: OpenedFile) -> tuple[Entry, ParityResult]:
        title = f"{name}: comparing with PyTorch"
        self.listener.step(title)
        runtime, precision, tolerance = opened.runtime, opened.precision, opened.tolerance
        result = verify(
            self.reference,
            runtime,
            self.shapes,
            self.images.verification.pictures,
            expected=replace(with_sizes(self._spec, self.shapes), precision=precision),
            steps=opened.steps,
            tolerance=tolerance,
            progress=lambda done, total: self.listener.step(title, done, total),
        )
        metric = self._metric(runtime) if result.passed else {}
        for score, value in metric.get("file", {}).items():
            lost = metric["torch"][score] - value
            if (
                not lost <= tolerance.points + 1e-6
            ):  # scores are rounded to tenths: 43.2 - 43.1 is more than 0.1
                fault = f"{score} fell by {lost:.2f} points, more than {tolerance.points}"
                result = replace(result, failures=(*result.failures, fault))
        latency = []
        if result.passed and self.config.benchmark_seconds and opened.timed:
            latency = self._latency(opened.timed, torch_device_of(opened.device))
        entry = self._entry(candidate, name, precision, result, tolerance)
        return replace(entry, runtime=runtime.title, metric=metric, latency=latency), result

    def _verify_again(
        self, candidate: Path, name: str, opened: OpenedFile, entry: Entry, result: ParityResult
    ) -> tuple[Entry, ParityResult]:
        """Verifies a file with one more runtime, and adds what it finds to the entry and the failures."""
        also, found = self._verify(candidate, name, opened)
        failures = (f"{also.runtime}: {failure}" for failure in found.failures)
        result = replace(result, failures=(*result.failures, *failures))
        entry = replace(
            entry,
            verification=result.to_dict(),
            also_verified={**entry.also_verified, also.runtime: found.to_dict()},
            metric={**entry.metric, **({also.runtime: also.metric["file"]} if also.metric else {})},
            latency=[*entry.latency, *also.latency],
        )
        return entry, result

    @property
    def _spec(self) -> ModelSpec:
        """Specification of the files, but for their precision and fixed axes."""
        return normalized(self.reference.spec) if self.config.normalize_in_graph else self.reference.spec

    def _entry(
        self,
        candidate: Path,
        name: str,
        precision: Precision,
        result: ParityResult,
        tolerance: Tolerance | None = None,
    ) -> Entry:
        weights = _weights_of(candidate)
        files = [candidate, *weights] if candidate.exists() else []
        return Entry(
            file=name,
            graph=self.reference.spec.graph,
            precision=precision,
            runtime="",
            sha256=sha256_of(candidate) if files else "",
            bytes=sum(path.stat().st_size for path in files),
            weights={path.name: sha256_of(path) for path in weights},
            parameters=sum(p.numel() for p in self.reference.module.parameters()),
            shapes=[str(each) for each in (self.shapes.min, self.shapes.opt, self.shapes.max)],
            tolerances=asdict(tolerance or tolerance_of(precision)),
            verification=result.to_dict(),
            images=str(self.images.verification.selection),
            image_sets=self._image_sets(precision),
            visible_units=self.reference.spec.visible_units,
        )

    def _record(self, candidate: Path, path: Path, entry: Entry, result: ParityResult) -> str | None:
        rejected = path.with_name(path.name + REJECTED)
        target = path if result.passed else rejected
        # the sidecar moves first: an engine beside a foreign sidecar is refused, one without any cannot be
        pairs = ((sidecar_path(candidate), sidecar_path(target)), (candidate, target))
        moves = [(source, to) for source, to in pairs if source.exists()]
        fault = None
        if not result.passed:
            where = f"; {entry.error}" if entry.error else ""
            fault = f"{path.name}: {'; '.join(result.failures)}{where}"
            entry.file += REJECTED
        self.manifest.commit(entry, result.passed, self.config.folder, moves)
        if result.passed:
            for each in (rejected, sidecar_path(rejected)):  # of an earlier export
                each.unlink(missing_ok=True)
        mark = "kept   " if result.passed else "refused"
        self.listener.say(f"{mark} {entry.file}  {_summary(entry, result)}")
        return fault

    def _metric(self, runtime: Runtime) -> dict[str, dict[str, float]]:
        if self._scores is None:
            self._scores, self._scored_images = self._score(self.reference)
            if self._scored_images and self._scored_images.left_out:
                log.warning("top-1 over %s: %s", self._scored_images, self._scored_images.names)
        if not self._scores:
            return {}
        with about_one_file():  # PyTorch took these images
            return {"torch": self._scores, "file": self._score(runtime)[0]}

    def _score(self, runtime: Runtime) -> tuple[dict[str, float], Selection | None]:
        config, graph = self.config, runtime.spec.graph
        if graph == "classifier" and self.images.labelled is not None:
            self.listener.step(f"top-1 of {runtime.title}")
            return top1(runtime, self.images.labelled, config.metric_images)
        if graph in ("detector", "segmentor") and config.dataset is not None:
            self.listener.step(f"{'AP' if graph == 'detector' else 'mIoU'} of {runtime.title}")
            with library_errors(f"--dataset {config.dataset}", BadInput):  # mmdet and mmseg raise anything
                return self._measure(runtime), None
        return {}, None

    @cached_property
    def _measure(self) -> Callable[[Runtime], dict[str, float]]:
        config = self.config
        assert config.dataset is not None
        return open_metric(self.reference.spec.graph, config.artifact, config.dataset, config.metric_images)

    def _image_sets(self, precision: Precision) -> dict[str, Selection]:
        sets = {"verification": self.images.verification.selection}
        if eight_bit_part(precision) and self.images.calibration:
            sets["calibration"] = self.images.calibration.selection
        if self._scored_images:
            sets["top-1"] = self._scored_images
        return sets

    @cached_property
    def _reference_on_gpu(self) -> TorchRuntime:
        spec = self.reference.spec
        model = load_exportable(self.config.artifact, spec.graph, spec.visible_units)
        return TorchRuntime(fit_preprocessing(model, self.shapes), "cuda")

    def _latency(self, runtime: Runtime, place: str) -> list[dict[str, Any]]:
        """Times the file and PyTorch in turns on the device `place`; PyTorch's row follows the file's."""
        opt, pictures = self.shapes.opt, self.images.verification.pictures
        both = (runtime, self.reference if place == "cpu" else self._reference_on_gpu)
        rows = []
        for batch in dict.fromkeys((self.shapes.min.batch, opt.batch)):
            self.listener.step(f"timing a batch of {batch}")
            size, shape = (opt.height, opt.width), f"{batch} x {opt.height} x {opt.width}"
            timed = []
            for each in both:
                inputs = batch_inputs(each.spec, pictures, [0] * batch, *size)
                inputs = {name: tensor.to(place) for name, tensor in inputs.items()}
                timed.append(("compute", partial(each, **inputs), each))
            if len(runtime.spec.inputs) == 1:
                files = [_as_png(pictures[i % len(pictures)]) for i in range(batch)]
                channels = int(runtime.spec.inputs[0].axes[1])
                timed += [("end to end", end_to_end(each, files, size, channels), each) for each in both]
            results = time_interleaved([call for _, call, _ in timed], batch, self.config.benchmark_seconds)
            rows += [
                {"shape": shape, "runtime": each.title, "what": what, **asdict(result)}
                for (what, _, each), result in zip(timed, results, strict=True)
            ]
        return rows

    def _locate_error(self, opened: OpenedFile, result: ParityResult) -> str | None:
        """Returns a description of the module where the error starts, or None if it cannot be located."""
        from export.verify.bisect import locate

        if not result.errors or opened.as_run is None:
            return None
        self.listener.step("locating the error")
        shape, pictures = worst_shape(result.errors), self.images.verification.pictures
        numbers = [i % len(pictures) for i in range(max(min(shape.batch, 3), self.shapes.min.batch))]
        inputs, exported = (
            tuple(batch_inputs(each, pictures, numbers, shape.height, shape.width).values())
            for each in (self.reference.spec, self._spec)
        )
        try:
            with library_errors("not located"):
                found = locate(
                    self.reference.module,
                    opened.as_run,
                    inputs,
                    opened.tolerance.relative,
                    exported=exported,
                    folder=opened.folder,
                )
        except (ComaError, RuntimeError):  # the graph does not run with intermediate outputs
            return None
        return str(found) if found else None


def _weights_of(path: Path) -> list[Path]:
    """Returns the weights file of an ONNX file that has one."""
    if path.suffix != ".onnx":
        return []
    with suppress(BadInput):  # not readable, which is why it is rejected
        found = weights_file(read_graph(path), path.parent, path.name)
        return [found] if found else []
    return []


def _bytes_of(path: Path) -> int:
    return sum(each.stat().st_size for each in (path, *_weights_of(path)))


def _summary(entry: Entry, result: ParityResult) -> str:
    if not result.images:
        return "; ".join(result.failures)
    worst = [each.cosine for each in result.outputs.values() if each.compared or not each.finite]
    lowest = f"minimum cosine {min(worst):.6f}" if worst else "nothing to compare"
    scores = "".join(f", {k} {v:.2f}" for k, v in entry.metric.get("file", {}).items())
    if "top-1" in entry.image_sets:
        scores += f" over {counted(entry.image_sets['top-1'].used, 'image')}"
    return (
        f"{entry.bytes / 1e6:.1f} MB, {lowest} over {counted(result.images, 'image')} and "
        f"{counted(len(result.shapes), 'shape')}{scores}"
    )


def _require_gain(
    result: ParityResult, entry: Entry, rest: Precision, base_bytes: int, base: Entry | None
) -> ParityResult:
    """Fails a quantised file that is neither smaller than its base nor faster where both were timed."""
    ours, plain = _medians(entry), _medians(base) if base else {}
    faster = bool(ours) and all(shape in plain and p50 < plain[shape] for shape, p50 in ours.items())
    if entry.bytes < base_bytes or faster:
        return result
    return replace(result, failures=(*result.failures, f"neither smaller than the {rest} file nor faster"))


def _medians(entry: Entry) -> dict[str, float]:
    """Returns the file's median computing time by shape, with the runtime of its verification."""
    ours = [row for row in entry.latency if (row["what"], row["runtime"]) == ("compute", entry.runtime)]
    return {row["shape"]: row["p50"] for row in ours}


def _as_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
        np.save(buffer, pixels)
        return buffer.getvalue()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
