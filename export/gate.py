"""Compares a file with PyTorch, measures it, gives it its name or refuses it, and records what was found."""

from __future__ import annotations

import io
import logging
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from coma.atomic_io import sha256_of
from coma.errors import BadInput, CheckFailed, ComaError
from coma.library_errors import about_one_file, library_errors
from coma.messages import counted
from coma.runtimes.base import Runtime
from coma.runtimes.manifest import Entry, Manifest, Selection
from coma.runtimes.model_spec import Precision
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shapes
from coma.runtimes.tensorrt.sidecar import sidecar_path
from export.candidates import CandidateBuilder, describe, fit_preprocessing, load
from export.graphs.load import example_inputs, load_exportable
from export.half_precision_emulation import emulate, is_half
from export.job import ProgressListener, Request
from export.latency import compute, end_to_end, interleaved
from export.preprocessing import as_input, resized
from export.verify.parity import ParityResult, verify
from export.verify.task_metrics import measure, top1
from export.verify.tolerances import TOLERANCES

log = logging.getLogger(__name__)

REJECTED = ".rejected"


class Gate:
    """Compares, measures, names and records the files of one graph.

    A file that cannot be opened or measured raises CheckFailed, to be told to `failed`; BadInput is about
    what was asked for, and ends the export.
    """

    def __init__(
        self,
        request: Request,
        reference: TorchRuntime,
        shapes: Shapes,
        listener: ProgressListener,
        manifest: Manifest,
    ) -> None:
        self.request, self.reference, self.shapes = request, reference, shapes
        self.listener, self.manifest = listener, manifest
        self._fp32: Entry | None = None
        self._scores: dict[str, float] | None = None
        self._scored_images: Selection | None = None

    def onnx(self, waiting: Path, path: Path, precision: Precision, builder: CandidateBuilder) -> str | None:
        """Why the ONNX file is refused; None where it is kept."""
        from export.quantization import precision_summary

        runtime, timed = self._open(waiting, precision)
        place = "cpu" if self.request.device == "cpu" else "cuda"
        entry, verdict = self._entry(waiting, path.name, runtime, timed, place)
        with library_errors("the graph cannot be inspected"):
            entry.numbers = precision_summary(load(waiting))
        if not verdict.passed:
            entry.error = self._locate(waiting, runtime, builder)
        elif precision in ("int8", "fp8"):
            verdict = _worth_it(verdict, entry, builder.fp32().stat().st_size, self._fp32)
            entry.verification = verdict.plain()
        elif precision == "fp32":
            self._fp32 = entry
        return self._keep(waiting, path, entry, verdict)

    def engine(self, onnx_path: Path, builder: CandidateBuilder) -> str | None:
        """Why the engine made of an ONNX file is refused; None where it is kept."""
        from coma.runtimes.tensorrt.profiles import profile_of
        from coma.runtimes.tensorrt.runtime import TensorRTRuntime
        from export.tensorrt.builder import build_engine

        path = onnx_path.with_suffix(".engine")
        waiting = builder.waiting(path)
        builder.unwanted(sidecar_path(waiting))
        profile = profile_of(describe(onnx_path), self.shapes)

        def progress(phase: str, done: int, steps: int) -> None:
            self.listener.step(f"{path.name}: {phase}", done, steps)

        build_engine(onnx_path, waiting, (profile,), self.request.engine, progress)
        runtime = TensorRTRuntime(waiting, "cuda", cuda_graphs=not self.shapes.dynamic)
        entry, verdict = self._entry(waiting, path.name, runtime, runtime, "cuda")
        return self._keep(waiting, path, entry, verdict)

    def failed(
        self, path: Path, precision: Precision, builder: CandidateBuilder, error: CheckFailed
    ) -> str | None:
        """Why a file is refused that could not be made, opened or measured; what there is of it is kept."""
        waiting, verdict = builder.waiting(path), ParityResult((), 0, {}, (str(error),))
        return self._keep(waiting, path, self._described(waiting, path.name, precision, verdict), verdict)

    def _open(self, waiting: Path, precision: Precision) -> tuple[Runtime, Runtime | None]:
        # what is compared, and what is timed: the file as it is, if this device can run it
        from coma.runtimes.onnxruntime import OnnxRuntime

        if self.request.device == "cpu" and is_half(precision):
            with about_one_file(), library_errors("the graph cannot be emulated in fp32"):
                emulated = emulate(load(waiting), precision).SerializeToString()
            compared = OnnxRuntime(emulated)
            return compared, OnnxRuntime(waiting) if precision == "fp16" else None
        runtime = OnnxRuntime(waiting, self.request.device)
        return runtime, runtime

    def _entry(
        self, waiting: Path, name: str, runtime: Runtime, timed: Runtime | None, place: str
    ) -> tuple[Entry, ParityResult]:
        spec = runtime.spec
        label = f"{name}: comparing with PyTorch"
        self.listener.step(label)
        verdict = verify(
            self.reference,
            runtime,
            self.shapes,
            self.request.images.pictures,
            lambda done, total: self.listener.step(label, done, total),
        )
        metric = self._metric(runtime) if verdict.passed else {}
        gate = TOLERANCES[spec.precision]
        for score, value in metric.get("file", {}).items():
            lost = metric["torch"][score] - value
            if not lost <= gate.points + 1e-6:  # scores are rounded to tenths: 43.2 - 43.1 is more than 0.1
                fault = f"{score} fell by {lost:.2f} points, more than {gate.points}"
                verdict = replace(verdict, failures=(*verdict.failures, fault))
        latency = self._latency(timed, place) if verdict.passed and self.request.seconds and timed else []
        entry = self._described(waiting, name, spec.precision, verdict)
        return replace(entry, runtime=runtime.title, metric=metric, latency=latency), verdict

    def _described(self, waiting: Path, name: str, precision: Precision, verdict: ParityResult) -> Entry:
        there = waiting.exists()
        return Entry(
            file=name,
            graph=self.reference.spec.graph,
            precision=precision,
            runtime="",
            sha256=sha256_of(waiting) if there else "",
            bytes=waiting.stat().st_size if there else 0,
            parameters=sum(p.numel() for p in self.reference.module.parameters()),
            shapes=[str(s) for s in dict.fromkeys((self.shapes.min, self.shapes.opt, self.shapes.max))],
            tolerances=asdict(TOLERANCES[precision]),
            verification=verdict.plain(),
            images=str(self.request.images.selection),
            image_sets=self._image_sets(precision),
        )

    def _keep(self, waiting: Path, path: Path, entry: Entry, verdict: ParityResult) -> str | None:
        rejected = path.with_name(path.name + REJECTED)
        target = path if verdict.passed else rejected
        # the sidecar first: an engine beside that of another is refused, one without any cannot be told
        pairs = ((sidecar_path(waiting), sidecar_path(target)), (waiting, target))
        moves = [(source, to) for source, to in pairs if source.exists()]
        fault = None
        if not verdict.passed:
            where = f"; {entry.error}" if entry.error else ""
            fault = f"{path.name}: {'; '.join(verdict.failures)}{where}"
            entry.file += REJECTED
        self.manifest.commit(entry, verdict.passed, self.request.out, moves)
        if verdict.passed:
            for each in (rejected, sidecar_path(rejected)):  # of an earlier try
                each.unlink(missing_ok=True)
        mark = "kept   " if verdict.passed else "refused"
        self.listener.say(f"{mark} {entry.file}  {_found(entry, verdict)}")
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
        request, graph = self.request, runtime.spec.graph
        if graph == "classifier" and request.labelled is not None:
            self.listener.step(f"top-1 of {runtime.title}")
            return top1(runtime, request.labelled, request.most)
        if graph in ("detector", "segmentor") and request.dataset is not None:
            self.listener.step(f"the task's metric, of {runtime.title}")
            with library_errors(f"--dataset {request.dataset}", BadInput):  # mmdet and mmseg raise anything
                return measure(runtime, request.artifact, request.dataset, request.most), None
        return {}, None

    def _image_sets(self, precision: Precision) -> dict[str, Selection]:
        sets = {"verification": self.request.images.selection}
        if precision in ("int8", "fp8") and self.request.calibration:
            sets["calibration"] = self.request.calibration.selection
        if self._scored_images:
            sets["top-1"] = self._scored_images
        return sets

    @cached_property
    def _reference_on_gpu(self) -> TorchRuntime:
        model = load_exportable(self.request.artifact, self.reference.spec.graph)
        return TorchRuntime(fit_preprocessing(model, self.shapes), "cuda")

    def _latency(self, runtime: Runtime, place: str) -> list[dict[str, Any]]:
        """The file and PyTorch in turns, both on the device `place`; PyTorch's rows follow the file's."""
        opt, pictures = self.shapes.opt, self.request.images.pictures
        both = (runtime, self.reference if place == "cpu" else self._reference_on_gpu)
        rows = []
        for batch in dict.fromkeys((self.shapes.min.batch, opt.batch)):
            self.listener.step(f"timing a batch of {batch}")
            size, shape = (opt.height, opt.width), f"{batch} x {opt.height} x {opt.width}"
            calls = []
            for each in both:
                spec = each.spec
                names = [each.name for each in spec.inputs]
                inputs = dict(zip(names, example_inputs(spec, batch, *size), strict=True))
                pixels = [resized(self.request.images.pictures[0], spec.preprocessing, size)] * batch
                inputs["images"] = as_input(pixels, spec.preprocessing)
                calls.append(compute(each, {name: tensor.to(place) for name, tensor in inputs.items()}))
            timed = [("compute", call, each) for call, each in zip(calls, both, strict=True)]
            if runtime.spec.graph != "reconstructor":
                files = [_as_png(pictures[i % len(pictures)]) for i in range(batch)]
                channels = int(runtime.spec.inputs[0].axes[1])
                timed += [("end to end", end_to_end(each, files, size, channels), each) for each in both]
            results = interleaved([call for _, call, _ in timed], batch, self.request.seconds)
            rows += [
                {"shape": shape, "runtime": each.title, "what": what, **asdict(result)}
                for (what, _, each), result in zip(timed, results, strict=True)
            ]
        return rows

    def _locate(self, waiting: Path, runtime: Runtime, builder: CandidateBuilder) -> str | None:
        from export.verify.bisect import locate

        self.listener.step(f"{waiting.name}: looking for where the error starts")
        spec, opt = runtime.spec, self.shapes.opt
        batch = self.shapes.opt.batch if "batch" not in self.shapes.dynamic else 1
        rule, own = spec.preprocessing, self.reference.spec.preprocessing
        size = (opt.height, opt.width)
        pixels = [resized(self.request.images.pictures[0], own, size)] * batch
        others = example_inputs(self.reference.spec, batch, *size)[1:]
        model = load(waiting)
        try:
            with library_errors("not located"):
                found = locate(
                    self.reference.module,
                    emulate(model, spec.precision) if is_half(spec.precision) else model,
                    (as_input(pixels, own), *others),
                    TOLERANCES[spec.precision].cosine,
                    exported=(as_input(pixels, rule), *others),
                )
        except (ComaError, RuntimeError):  # it cannot even be run with its insides marked
            return None
        if not found:
            return None
        other = found.module.startswith(("box_heads", "mask_heads"))
        return f"{found}" + ("; or other proposals reach it than in PyTorch" if other else "")


def _found(entry: Entry, verdict: ParityResult) -> str:
    if not verdict.images:
        return "; ".join(verdict.failures)
    worst = [each.cosine for each in verdict.outputs.values() if each.compared or not each.finite]
    least = f"least cosine {min(worst):.6f}" if worst else "nothing to compare"
    scores = "".join(f", {k} {v:.2f}" for k, v in entry.metric.get("file", {}).items())
    if "top-1" in entry.image_sets:
        scores += f" over {counted(entry.image_sets['top-1'].used, 'image')}"
    return (
        f"{entry.bytes / 1e6:.1f} MB, {least} over {counted(verdict.images, 'image')} and "
        f"{counted(len(verdict.shapes), 'shape')}{scores}"
    )


def _worth_it(verdict: ParityResult, entry: Entry, fp32_bytes: int, fp32: Entry | None) -> ParityResult:
    """A quantised file is kept only if it is smaller than the fp32 file, or faster where both were timed."""
    ours, plain = _medians(entry), _medians(fp32) if fp32 else {}
    faster = bool(ours) and all(shape in plain and p50 < plain[shape] for shape, p50 in ours.items())
    if entry.bytes < fp32_bytes or faster:
        return verdict
    return replace(verdict, failures=(*verdict.failures, "neither smaller than the fp32 file nor faster"))


def _medians(entry: Entry) -> dict[str, float]:
    """Of the file alone, by shape: PyTorch's rows follow its own."""
    computed = [row for row in entry.latency if row["what"] == "compute"]
    return {row["shape"]: row["p50"] for row in computed[::2]}


def _as_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
        np.save(buffer, pixels)
        return buffer.getvalue()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
