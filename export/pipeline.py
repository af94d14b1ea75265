"""From an artifact to a folder of verified files, form by form: make, compare, keep or refuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coma.errors import CheckFailed
from coma.library_errors import load_packages
from coma.runtimes.manifest import Manifest
from coma.runtimes.model_spec import GraphKind
from coma.runtimes.onnxruntime import Provider, require_provider
from coma.runtimes.pytorch import TorchRuntime
from coma.runtimes.shape_ranges import Shapes
from export.candidates import CandidateBuilder, fitted
from export.gate import Gate
from export.job import ProgressListener, Request, file_name
from export.verify.tolerances import GATES


@dataclass
class Outcome:
    """What became of the files, so far.

    Attributes:
        kept: ONNX files that passed.
        refused: Why others were refused, a line for each.
    """

    kept: list[Path] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def require(device: Provider) -> None:
    """Checks that what an export needs can be imported and started, before its first long step.

    Raises:
        BadInput: a package is missing or broken, or ONNX Runtime cannot use the device.
    """
    load_packages("onnx", "onnxscript")
    require_provider(device)


def export(
    request: Request,
    form: GraphKind,
    shapes: Shapes,
    manifest: Manifest,
    watcher: ProgressListener,
    outcome: Outcome,
) -> None:
    """Export one form in all precisions, and add to `outcome` what became of them.

    A file that cannot be made, opened or measured is refused, and the others are made.

    Raises:
        BadInput: something that was asked for cannot be done; what was finished before stays.
        Interrupted: Ctrl-C, likewise.
    """
    require(request.device)
    maker = CandidateBuilder(request, form, shapes, watcher, manifest.source)
    reference = TorchRuntime(fitted(maker.deployable(), shapes))
    judge = Gate(request, reference, shapes, watcher, manifest)
    try:
        for precision in sorted(request.precisions, key=list(GATES).index):
            path = request.out / file_name(form, precision)
            try:
                fault = judge.onnx(maker.onnx(precision), path, precision, maker)
            except CheckFailed as error:
                fault = judge.failed(path, precision, maker, error)
            if fault:
                outcome.refused.append(fault)
                continue
            outcome.kept.append(path)
            maker.passed(precision, path)
            if request.tensorrt:
                try:
                    fault = judge.engine(path, maker)
                except CheckFailed as error:
                    fault = judge.failed(path.with_suffix(".engine"), precision, maker, error)
                outcome.refused += [fault] if fault else []
    finally:
        maker.clean()
