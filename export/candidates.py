"""Builds candidate files: ONNX files traced from PyTorch or quantised from such a file, not yet verified.

A file gets its final name after verification; until then it is called `<name>.unverified.onnx`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from coma.errors import BadArtifact
from coma.library_errors import about_one_file, library_errors
from coma.runtimes.manifest import STAGED
from coma.runtimes.model_spec import (
    METADATA,
    ExportableModel,
    GraphKind,
    ModelSpec,
    Precision,
    centre_crop_rule,
    eight_bit_part,
    float_part,
    to_json,
)
from coma.runtimes.names import COMPILED, TorchDevice
from coma.runtimes.openvino import COPY
from coma.runtimes.preprocessing import resize_image, to_input
from coma.runtimes.shape_ranges import Shape, Shapes
from export.config import ExportConfig, ExportImages, file_name, in_file_name
from export.graphs.detector import AFTER_BACKBONE
from export.graphs.load import load_exportable, named_examples
from export.onnx_export import cast_weights, read_spec, with_normalization, write_onnx
from export.report import NAME as REPORT
from export.report_picture import NAME as PICTURE

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from export.progress import ProgressListener

log = logging.getLogger(__name__)

UNVERIFIED = ".unverified"
_BASE = ".base"
_GRAPHS = "|".join(get_args(GraphKind))
_PRECISIONS = "|".join(map(in_file_name, get_args(Precision)))
_TEMPORARY = (
    rf"({_GRAPHS})(-visible\d+)?(-({_PRECISIONS}))?({COMPILED})?"
    rf"({re.escape(UNVERIFIED)}\.(onnx|engine|engine\.json|pt2)|\.onnx{re.escape(_BASE)})|{re.escape(COPY)}"
)
_WRITTEN = "|".join(map(re.escape, (REPORT, PICTURE, STAGED)))
_UNFINISHED = re.compile(rf"{_TEMPORARY}|{re.escape(STAGED)}|\.({_TEMPORARY}|{_WRITTEN})\.part")
"""Names of the files that an export which was killed leaves behind."""


class CandidateBuilder:
    """Builds the candidate files of one graph.

    Attributes:
        float_files: Files of this run by precision, that quantised files are made from.
    """

    def __init__(
        self,
        config: ExportConfig,
        images: ExportImages,
        graph: GraphKind,
        shapes: Shapes,
        listener: ProgressListener,
        source: str,
    ) -> None:
        self.config, self.images, self.shapes, self.source = config, images, shapes, source
        self.graph: GraphKind = graph
        self.listener = listener
        self.float_files: dict[Precision, Path] = {}
        self._temporary: list[Path] = []

    def build(self, precision: Precision) -> Path:
        """Writes the candidate file of a precision and returns its path."""
        name = file_name(self.graph, precision, self.config.visible_units)
        target = self.candidate_path(self.config.folder / name)
        if eight_bit_part(precision):
            self._quantize(precision, target)
        else:
            write_onnx(self._prepare_model(precision), self.shapes, target, self.config.plugin_free)
        return target

    def build_program(self, path: Path, precision: Precision, compile_for: TorchDevice | None) -> Path:
        """Writes the candidate of a `.pt2` file, compiled if a device is given, and returns its path."""
        from export.torch_program import write_program

        target = self.candidate_path(path)
        model = self._prepare_model(precision)
        if compile_for:
            self.listener.step(f"{path.name}: compiling with AOTInductor")
        write_program(model, self.shapes, target, compile_for)
        return target

    def remove_temporary_files(self) -> None:
        """Removes candidates that got no final name, and intermediate files."""
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def candidate_path(self, path: Path) -> Path:
        """Returns the name of the file `path` before its verification."""
        return self.temporary(path.with_suffix(UNVERIFIED + path.suffix))

    def temporary(self, path: Path) -> Path:
        """Registers a file for removal at the end."""
        self._temporary.append(path)
        return path

    def base_file(self, precision: Precision) -> Path:
        """Returns the file that this precision is quantised from, and builds it if none was verified."""
        rest = float_part(precision)
        if rest not in self.float_files:
            name = file_name(self.graph, rest, self.config.visible_units)
            base = self.temporary(self.config.folder / f"{name}{_BASE}")
            write_onnx(self._prepare_model(rest), self.shapes, base, self.config.plugin_free)
            self.float_files[rest] = base
        return self.float_files[rest]

    def load_model(self) -> ExportableModel:
        """Loads the model.

        Raises:
            BadArtifact: the artifact cannot be loaded any more, or has changed since the export began.
        """
        model = load_exportable(self.config.artifact, self.graph, self.config.visible_units)
        if model.spec.source != self.source:
            raise BadArtifact(f"{self.config.artifact}: has changed during the export; export it again")
        return model

    def _prepare_model(self, precision: Precision) -> ExportableModel:
        self.listener.step(f"{self.graph} {precision}: tracing the graph")
        model = fit_preprocessing(self.load_model(), self.shapes)
        if self.config.normalize_in_graph:
            model = with_normalization(model)
        return cast_weights(model, precision)

    def _quantize(self, precision: Precision, target: Path) -> None:
        from export.quantization import quantize_fp8, quantize_int8

        base = self.base_file(precision)
        spec = read_spec(base)
        batches, total = self._calibration_batches(spec)
        title = f"{self.graph} {precision}: calibrating activation ranges"
        self.listener.step(title, 0, total)
        common: dict[str, Any] = {
            "exclude": self._excluded_layers(),
            "metadata": {METADATA: to_json(replace(spec, precision=precision))},
            "progress": lambda done: self.listener.step(title, done, total),
        }
        with about_one_file(), library_errors("the graph cannot be quantised"):
            if eight_bit_part(precision) == "int8":
                quantize_int8(base, target, batches, self.config.calibrate_method, **common)
            else:
                quantize_fp8(base, target, batches, **common)

    def _excluded_layers(self) -> list[str]:
        """Returns the patterns that match layers of this graph, with the names of its file."""
        patterns = self.config.exclude_layers
        if patterns is None:
            patterns = AFTER_BACKBONE if self.graph == "detector" else ()
        layers = layers_of(load_exportable(self.config.artifact, self.graph).module)
        matching = [pattern for pattern in patterns if matches_any(pattern, layers)]
        return [f"model.{each}" for each in matching] if self.config.normalize_in_graph else matching

    def _calibration_batches(self, spec: ModelSpec) -> tuple[Iterator[dict[str, np.ndarray]], int]:
        """Returns the batches of all calibration images, and their number; the last batch is filled up."""
        opt, rule = self.shapes.opt, spec.preprocessing
        batch = spec.inputs[0].axes[0]
        size = batch if isinstance(batch, int) else 1
        pictures = self.images.calibration.pictures if self.images.calibration else ()
        starts = range(0, len(pictures), size)

        def batch_from(start: int) -> dict[str, np.ndarray]:
            numbers = [i % len(pictures) for i in range(start, start + size)]
            inputs = named_examples(spec, size, opt.height, opt.width)
            inputs["images"] = to_input(
                [resize_image(pictures[i], rule, (opt.height, opt.width)) for i in numbers], rule
            )
            return {name: each.numpy() for name, each in inputs.items()}

        return map(batch_from, starts), len(starts)


def remove_unfinished(folder: Path) -> None:
    """Removes unfinished files of an export that was killed; no other export may be writing to the folder."""
    unfinished = [path for path in folder.iterdir() if _UNFINISHED.fullmatch(path.name) and path.is_file()]
    for path in unfinished:
        path.unlink()
    if unfinished:
        log.warning("%s: removed %d unfinished files of an export that was killed", folder, len(unfinished))


def fit_preprocessing(model: ExportableModel, shapes: Shapes) -> ExportableModel:
    """Returns the model with preprocessing for its training size if the shapes allow it, else for `opt`."""
    rule, opt = model.spec.preprocessing, shapes.opt
    if not rule.crops or rule.size is None or shapes.allows(Shape(opt.batch, *rule.size)):
        return model
    rule = centre_crop_rule(rule, (opt.height, opt.width))
    return replace(model, spec=replace(model.spec, preprocessing=rule))


def layers_of(module: nn.Module) -> set[str]:
    """Returns the paths of modules that hold a weight matrix, and of their parents."""
    names = [name for name, each in module.named_parameters(remove_duplicate=False) if each.ndim > 1]
    holders = {name.rpartition(".")[0] for name in names}
    return holders | {path.rpartition(".")[0] for path in holders}


def matches_any(pattern: str, layers: Iterable[str]) -> bool:
    """Whether a pattern matches one of the layers."""
    return any(fnmatchcase(layer, pattern) for layer in layers)
