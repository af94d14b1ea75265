"""Writes the files that are still to be verified: traced from PyTorch, or quantised from the fp32 file.

A file carries its name only after it has passed; until then it is called `<name>.unverified.onnx`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.description import Description, Form, Precision
from export.forms.load import example_inputs, load_deployable
from export.images import as_input, resized
from export.request import Request, Watcher, file_name
from export.shapes import Shapes
from export.to_onnx import METADATA, as_json, in_precision, read_description, with_preprocessing, write_onnx
from pretrain.errors import CheckFailed

if TYPE_CHECKING:
    import numpy as np

UNVERIFIED = ".unverified"


class Maker:
    """Writes the files that are still to be verified."""

    def __init__(self, request: Request, form: Form, shapes: Shapes, watcher: Watcher) -> None:
        self.request, self.shapes, self.watcher = request, shapes, watcher
        self.form: Form = form
        self._base: Path | None = None
        self._unverified: list[Path] = []

    def onnx(self, precision: Precision) -> Path:
        """An ONNX file of this precision, `.unverified`."""
        target = self.waiting(self.request.out / file_name(self.form, precision))
        if precision in ("int8", "fp8"):
            self._quantize(precision, target)
        else:
            self._trace(precision, target)
        return target

    def clean(self) -> None:
        """Take away what was made on the way and not asked for, or not finished."""
        for path in (*self._unverified, *filter(None, (self._base,))):
            path.unlink(missing_ok=True)

    def waiting(self, path: Path) -> Path:
        """What `path` is called until it is verified."""
        waiting = path.with_suffix(UNVERIFIED + path.suffix)
        self._unverified.append(waiting)
        return waiting

    def fp32_bytes(self) -> int:
        """Size of the fp32 file, from which the quantised ones are made."""
        return self._fp32().stat().st_size

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


def describe(path: Path) -> Description:
    """What an ONNX file says of itself."""
    return read_description(load(path), path.name)


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
