"""Quantises an ONNX file: calibrates, inserts Q/DQ pairs and writes the new file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from coma.errors import BadInput
from export.external_data import place_weights, read_weights
from export.onnx_export import check_graph, load_onnx, save_onnx
from export.quantization.calibration import Batch, Method, activation_ranges
from export.quantization.qdq import (
    INT8,
    EightBitType,
    WeightMatmul,
    at_opset,
    fp8_codes,
    insert_qdq,
    weight_matmuls,
)

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Quantized:
    """Result of a quantisation."""

    layers: tuple[str, ...]
    """Quantised layers in the order of the graph."""
    excluded: tuple[str, ...]
    """Layers with constant weights that stay in float."""
    ranges: dict[str, float]
    """Clipping magnitude of every quantised activation."""


def quantize_int8(
    source: Path,
    target: Path,
    batches: Iterable[Batch],
    method: Method = "percentile",
    *,
    percentile: float = 99.99,
    exclude: Sequence[str] = (),
    exclude_first: bool = True,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Quantized:
    """Writes a copy of an ONNX file with linear and convolutional layers in int8.

    Args:
        source: ONNX file in fp32 or fp16; the copy of a fp16 file has opset 19.
        target: New file; it is written atomically.
        batches: Inputs by name; a hundred images like those that the model will see are enough.
        method: Calibration method; see `calibration`.
        percentile: Percentile of the method of that name.
        exclude: Layers that stay in float, as patterns of module paths: "backbone.stages.0.*".
        exclude_first: Keep the first layer in float, whose input is the image.
        metadata: Metadata entries to add or to replace.
        progress: Receives the number of finished batches.

    Raises:
        BadInput: there are no batches or no layers to quantise, or a pattern in `exclude` matches no layer.
        CheckFailed: an activation is not finite.
    """
    chosen = _Chosen.of(source, exclude, exclude_first)
    ranges = activation_ranges(
        chosen.model,
        chosen.tensors,
        batches,
        method,
        percentile=percentile,
        progress=progress,
        folder=chosen.folder,
    )
    return chosen.write(target, ranges, metadata or {}, INT8, per_channel=True)


def quantize_fp8(
    source: Path,
    target: Path,
    batches: Iterable[Batch],
    *,
    exclude: Sequence[str] = (),
    exclude_first: bool = True,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Quantized:
    """Writes a copy of an ONNX file in fp8 (E4M3), for TensorRT on GPUs of compute capability 8.9 and later.

    Scales come from the maximum magnitudes: the steps of fp8 grow with the value, so clipping gains nothing.
    Weights have one scale each, because one per channel did not reduce the errors. The opset is 19. ONNX
    Runtime runs such a file on a CPU with `ORT_FP8_ENTRY`.

    Args:
        source: ONNX file in fp32 or fp16.
        target: New file; it is written atomically.
        batches: Inputs by name.
        exclude: Layers that stay in float, as patterns of module paths.
        exclude_first: Keep the first layer in float.
        metadata: Metadata entries to add or to replace.
        progress: Receives the number of finished batches.

    Raises:
        BadInput: see `quantize_int8`.
        CheckFailed: see `quantize_int8`.
    """
    chosen = _Chosen.of(source, exclude, exclude_first)
    ranges = activation_ranges(
        chosen.model, chosen.tensors, batches, "minmax", progress=progress, folder=chosen.folder
    )
    return chosen.write(target, ranges, metadata or {}, fp8_codes(), per_channel=False)


@dataclass(frozen=True)
class _Chosen:
    """A graph, and its matrix multiplications to quantise."""

    model: ModelProto
    changed: list[WeightMatmul]
    excluded: list[WeightMatmul]
    folder: Path
    """Folder of the graph's weights file, if it has one."""

    @classmethod
    def of(cls, source: Path, exclude: Sequence[str], exclude_first: bool) -> _Chosen:
        from onnx import TensorProto

        model = load_onnx(source)
        products = list(weight_matmuls(model.graph))
        if any(each.data_type == TensorProto.BFLOAT16 for each in products):
            raise BadInput(f"{source}: has layers in bf16; quantise an fp32 or fp16 file")
        for pattern in exclude:
            if not any(fnmatchcase(each.layer, pattern) for each in products):
                known = ", ".join(each.layer for each in products[:3])
                raise BadInput(f"{source}: no layer has the name {pattern!r}; layers are {known}, ...")
        kept = [
            each
            for index, each in enumerate(products)
            if (exclude_first and not index) or any(fnmatchcase(each.layer, pattern) for pattern in exclude)
        ]
        changed = [each for each in products if each not in kept]
        if not changed:
            raise BadInput(f"{source}: no linear or convolutional layer to quantise")
        return cls(model, changed, kept, source.parent)

    @property
    def tensors(self) -> list[str]:
        return list(dict.fromkeys(each.activation for each in self.changed))

    def write(
        self,
        target: Path,
        ranges: dict[str, float],
        metadata: Mapping[str, str],
        codes: EightBitType,
        *,
        per_channel: bool,
    ) -> Quantized:
        from onnx import TensorProto, helper

        half = any(each.data_type == TensorProto.FLOAT16 for each in self.changed)
        model = at_opset(self.model, 19 if half or codes is not INT8 else 13)  # whose pairs take the types
        read_weights(model, self.folder)
        insert_qdq(model.graph, self.changed, ranges, codes, per_channel=per_channel)
        said = {each.key: each.value for each in model.metadata_props} | dict(metadata)
        helper.set_model_props(model, said)
        place_weights(model, target)
        check_graph(model)
        save_onnx(model, target)
        return Quantized(
            tuple(each.layer for each in self.changed), tuple(each.layer for each in self.excluded), ranges
        )
