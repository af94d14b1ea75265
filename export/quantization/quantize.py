"""Quantising an ONNX file: calibrate, insert pairs, write the new file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from coma.errors import BadInput
from export.onnx_export import check_graph, save_onnx
from export.quantization.calibration import Batch, Method, activation_ranges
from export.quantization.qdq import INT8, Codes, Product, at_opset, fp8_codes, insert_qdq, weight_matmuls

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class Quantized:
    """What was done to a file."""

    layers: tuple[str, ...]
    """Of the products in 8 bits, in the order of the graph."""
    excluded: tuple[str, ...]
    """Of products with constant weights that stayed in float."""
    ranges: dict[str, float]
    """Of every quantised activation, the magnitude of its largest number."""


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
    """Write a copy of an ONNX file whose linear and convolutional layers multiply int8 numbers.

    Args:
        source: One file, fp32 or fp16 inside; a fp16 one becomes opset 19.
        target: Is replaced at the end, or left as it was.
        batches: Inputs by name, like those to be seen later: a hundred images are plenty.
        method: How far activations reach; see `calibration`.
        percentile: For the method of that name.
        exclude: Layers that stay in float, by module path, with * and ?: "backbone.stages.0.*".
        exclude_first: The first layer stays in float too; its input would be the image in 8 bits.
        metadata: Entries to add to what the source says of itself, or to put in place of it.
        progress: Told the number of batches done, after each.

    Raises:
        BadInput: no batches, a source without layers to quantise, or a pattern in `keep` that fits none.
        CheckFailed: an activation that is not finite.
    """
    chosen = _Chosen.of(source, exclude, exclude_first)
    ranges = activation_ranges(
        chosen.model, chosen.tensors, batches, method, percentile=percentile, progress=progress
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
    """The same in fp8 (E4M3FN), for TensorRT on GPUs of compute capability 8.9 and later; opset 19.

    Scales come from the largest magnitudes: the steps of fp8 grow with its numbers, so clipping gains
    nothing. Weights have one scale each: one for every channel made the errors no smaller. ONNX Runtime
    computes such a file on a CPU if `ORT_FP8_ENTRY` is set.

    Args:
        source: See `quantize_int8`; so are the others.
        target: Is replaced at the end, or left as it was.
        batches: Inputs by name.
        exclude: Layers that stay in float.
        exclude_first: The first layer too.
        metadata: Entries to add or to replace.
        progress: Told the number of batches done, after each.

    Raises:
        BadInput: see `quantize_int8`.
        CheckFailed: see `quantize_int8`.
    """
    chosen = _Chosen.of(source, exclude, exclude_first)
    ranges = activation_ranges(chosen.model, chosen.tensors, batches, "minmax", progress=progress)
    return chosen.write(target, ranges, metadata or {}, fp8_codes(), per_channel=False)


@dataclass(frozen=True)
class _Chosen:
    """A graph, and which of its products change."""

    model: ModelProto
    changed: list[Product]
    excluded: list[Product]

    @classmethod
    def of(cls, source: Path, exclude: Sequence[str], exclude_first: bool) -> _Chosen:
        import onnx
        from onnx import TensorProto

        model = onnx.load(source)
        products = list(weight_matmuls(model.graph))
        if any(each.data_type == TensorProto.BFLOAT16 for each in products):
            raise BadInput(f"{source}: layers in bf16; quantise an export in fp32 or fp16")
        for pattern in exclude:
            if not any(fnmatchcase(each.layer, pattern) for each in products):
                known = ", ".join(each.layer for each in products[:3])
                raise BadInput(f"{source}: no layer is called {pattern!r}; its layers are {known}, ...")
        kept = [
            each
            for index, each in enumerate(products)
            if (exclude_first and not index) or any(fnmatchcase(each.layer, pattern) for pattern in exclude)
        ]
        changed = [each for each in products if each not in kept]
        if not changed:
            raise BadInput(f"{source}: no linear or convolutional layer to quantise")
        return cls(model, changed, kept)

    @property
    def tensors(self) -> list[str]:
        return list(dict.fromkeys(each.activation for each in self.changed))

    def write(
        self,
        target: Path,
        ranges: dict[str, float],
        metadata: Mapping[str, str],
        codes: Codes,
        *,
        per_channel: bool,
    ) -> Quantized:
        from onnx import TensorProto, helper

        half = any(each.data_type == TensorProto.FLOAT16 for each in self.changed)
        model = at_opset(self.model, 19 if half or codes is not INT8 else 13)  # whose pairs take the types
        insert_qdq(model.graph, self.changed, ranges, codes, per_channel=per_channel)
        said = {each.key: each.value for each in model.metadata_props} | dict(metadata)
        helper.set_model_props(model, said)
        check_graph(model)
        save_onnx(model, target)
        return Quantized(
            tuple(each.layer for each in self.changed), tuple(each.layer for each in self.excluded), ranges
        )
