"""Writes the files that are still to be verified: traced from PyTorch, or quantised from the fp32 file.

A file carries its name only after it has passed; until then it is called `<name>.unverified.onnx`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from coma.errors import BadArtifact, CheckFailed
from coma.library_errors import about_one_file, library_errors
from coma.runtimes.manifest import STAGED
from coma.runtimes.model_spec import (
    METADATA,
    ExportableModel,
    GraphKind,
    ModelSpec,
    Precision,
    read_model_spec,
    to_json,
)
from coma.runtimes.shape_ranges import Shape, Shapes
from export.graphs.load import example_inputs, load_exportable
from export.job import ProgressListener, Request, file_name
from export.onnx_export import in_precision, with_preprocessing, write_onnx
from export.preprocessing import as_input, resized
from export.report import NAME as REPORT

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

log = logging.getLogger(__name__)

UNVERIFIED = ".unverified"
_BASE = ".onnx.base"


class CandidateBuilder:
    """Writes the files that are still to be verified."""

    def __init__(
        self, request: Request, graph: GraphKind, shapes: Shapes, listener: ProgressListener, source: str
    ) -> None:
        self.request, self.shapes, self.listener, self.source = request, shapes, listener, source
        self.graph: GraphKind = graph
        self._fp32_file: Path | None = None
        self._unwanted: list[Path] = []

    def onnx(self, precision: Precision) -> Path:
        """An ONNX file of this precision, `.unverified`."""
        target = self.waiting(self.request.out / file_name(self.graph, precision))
        if precision in ("int8", "fp8"):
            self._quantize(precision, target)
        else:
            self._trace(precision, target)
        return target

    def clean(self) -> None:
        """Take away what was made on the way and not asked for, or not finished."""
        for path in self._unwanted:
            path.unlink(missing_ok=True)

    def waiting(self, path: Path) -> Path:
        """What `path` is called until it is verified."""
        return self.unwanted(path.with_suffix(UNVERIFIED + path.suffix))

    def unwanted(self, path: Path) -> Path:
        """A file to take away at the end, if it is still called so."""
        self._unwanted.append(path)
        return path

    def passed(self, precision: Precision, path: Path) -> None:
        """Told of a file that is kept: quantised ones are made of this run's fp32 file, no older one."""
        if precision == "fp32":
            self._fp32_file = path

    def fp32(self) -> Path:
        """The fp32 file of which quantised ones are made: the one that passed, or one made for that alone."""
        if self._fp32_file is None:
            base = self.unwanted(self.request.out / f"{self.graph}{_BASE}")
            self._trace("fp32", base)
            self._fp32_file = base
        return self._fp32_file

    def exportable(self) -> ExportableModel:
        """The model, read anew.

        Raises:
            BadArtifact: it cannot be read any more, or has become another one since the export began.
        """
        found = load_exportable(self.request.artifact, self.graph)
        if found.spec.source != self.source:
            raise BadArtifact(f"{self.request.artifact}: has changed during the export; export it again")
        return found

    def _trace(self, precision: Precision, target: Path) -> None:
        self.listener.step(f"{self.graph} {precision}: tracing the graph")
        exportable = fit_preprocessing(self.exportable(), self.shapes)
        if self.request.normalize_in_graph:
            exportable = with_preprocessing(exportable)
        in_precision(exportable.module, precision)
        spec = replace(exportable.spec, precision=precision)
        write_onnx(replace(exportable, spec=spec), self.shapes, target)

    def _quantize(self, precision: Precision, target: Path) -> None:
        from export.quantization import quantize_fp8, quantize_int8

        base = self.fp32()
        spec = describe(base)
        batches, total = self._batches(spec)
        title = f"{self.graph} {precision}: reading ranges of activations"
        self.listener.step(title, 0, total)
        common: dict[str, Any] = {
            "keep": self._keep(),
            "metadata": {METADATA: to_json(replace(spec, precision=precision))},
            "progress": lambda done: self.listener.step(title, done, total),
        }
        with about_one_file(), library_errors("the graph cannot be quantised"):
            if precision == "int8":
                quantize_int8(base, target, batches, self.request.method, **common)
            else:
                quantize_fp8(base, target, batches, **common)

    def _keep(self) -> list[str]:
        """The patterns that mean something in this graph, as its file names the layers."""
        layers = layers_of(load_exportable(self.request.artifact, self.graph).module)
        here = [pattern for pattern in self.request.keep if fits(pattern, layers)]
        return [f"model.{pattern}" for pattern in here] if self.request.normalize_in_graph else here

    def _batches(self, spec: ModelSpec) -> tuple[Iterator[dict[str, np.ndarray]], int]:
        """All calibration images, batch by batch, and the number of batches; the last batch is filled up."""
        opt, rule = self.shapes.opt, spec.preprocessing
        batch = spec.inputs[0].axes[0]
        size = batch if isinstance(batch, int) else 1
        pictures = self.request.calibration.pictures if self.request.calibration else ()
        starts = range(0, len(pictures), size)

        def batch_from(start: int) -> dict[str, np.ndarray]:
            numbers = [i % len(pictures) for i in range(start, start + size)]
            images = [resized(pictures[i], rule, (opt.height, opt.width)) for i in numbers]
            inputs = {"images": as_input(images, rule)}
            for tensor_spec, example in zip(
                spec.inputs[1:],
                example_inputs(spec, size, opt.height, opt.width)[1:],
                strict=True,
            ):
                inputs[tensor_spec.name] = example
            return {name: each.numpy() for name, each in inputs.items()}

        return map(batch_from, starts), len(starts)


def remove_unfinished(folder: Path) -> None:
    """Removes what an export that was killed left in a folder; no other export may be writing there."""
    files = [file_name(graph, each) for graph in get_args(GraphKind) for each in get_args(Precision)]
    names = {
        f"{Path(file).stem}{UNVERIFIED}{end}"
        for file in files
        for end in (".onnx", ".engine", ".engine.json")
    }
    names |= {f"{form}{_BASE}" for form in get_args(GraphKind)}
    written = (*names, REPORT, STAGED)
    found = [folder / name for name in (*names, STAGED, *(f".{name}.part" for name in written))]
    there = [path for path in found if path.is_file()]
    for path in there:
        path.unlink()
    if there:
        log.warning("%s: removed %d unfinished files of an export that was killed", folder, len(there))


def fit_preprocessing(exportable: ExportableModel, shapes: Shapes) -> ExportableModel:
    """The same model, preparing images for its own size if the shapes allow that, else for the usual one."""
    spec = exportable.spec
    rule, opt = spec.preprocessing, shapes.opt
    if rule.resize != "centre-square" or rule.size is None or shapes.allows(Shape(opt.batch, *rule.size)):
        return exportable
    rule = replace(rule, size=(opt.height, opt.width))
    return replace(exportable, spec=replace(spec, preprocessing=rule))


def layers_of(module: nn.Module) -> set[str]:
    """Modules that hold a matrix, and those that use one of a part of theirs, by path."""
    names = [name for name, each in module.named_parameters(remove_duplicate=False) if each.ndim > 1]
    holders = {name.rpartition(".")[0] for name in names}
    return holders | {path.rpartition(".")[0] for path in holders}


def fits(pattern: str, layers: Iterable[str]) -> bool:
    """Whether a pattern names one of the layers."""
    return any(fnmatchcase(layer, pattern) for layer in layers)


def describe(path: Path) -> ModelSpec:
    """What an ONNX file says of itself."""
    return read_model_spec(load(path), path.name)


def load(path: Path) -> Any:
    """An ONNX file in memory.

    Raises:
        CheckFailed: it is none.
    """
    import onnx

    try:
        return onnx.load(path)
    except Exception as error:  # protobuf's own kinds of errors
        raise CheckFailed(f"{path}: not a readable ONNX file ({error})") from None
