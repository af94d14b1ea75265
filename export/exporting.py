"""From an artifact to a folder of verified files, form by form: make, compare, keep or refuse."""

from __future__ import annotations

from export.description import Form
from export.forms.load import load_deployable
from export.judging import Judge
from export.making import Maker
from export.manifest import Manifest
from export.request import Request, Watcher, file_name
from export.runtimes.pytorch import TorchRuntime
from export.shapes import Shapes
from export.verify.gates import GATES


def export(request: Request, form: Form, shapes: Shapes, manifest: Manifest, watcher: Watcher) -> list[str]:
    """Export one form in all precisions.

    Returns:
        Why files were refused, a line for each.

    Raises:
        BadInput: something that was asked for cannot be done; what was finished before stays.
    """
    refused = []
    reference = TorchRuntime(load_deployable(request.artifact, form))
    maker = Maker(request, form, shapes, watcher)
    try:
        for precision in sorted(request.precisions, key=list(GATES).index):
            path = request.out / file_name(form, precision)
            waiting = maker.onnx(precision)
            judged = Judge(request, reference, shapes, watcher, manifest)
            fault = judged.onnx(waiting, path, precision, maker)
            if fault:
                refused.append(fault)
            elif request.tensorrt:
                refused += judged.engine(path, maker)
    finally:
        maker.clean()
    return refused
