"""Summary of an engine: TensorRT's inspector lists every layer after fusion."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

LONGEST = 5
WIDTH = 100
"""Maximum length of a layer's name; fused layers have the names of all their parts."""

_FORMATS = {
    "fp8": "FP8|E4M3",
    "bf16": "BF16|BFLOAT16",
    "fp16": "FP16|FLOAT16|HALF",
    "fp32": "FP32|FLOAT32|FLOAT",
    "int8": "INT8",
    "int64": "INT64",
    "int32": "INT32",
    "uint8": "UINT8",
    "bool": "BOOL",
}
_FORMAT = re.compile("|".join(rf"(?P<{name}>\b(?:{words})\b)" for name, words in _FORMATS.items()), re.I)


@dataclass(frozen=True)
class EngineSummary:
    """Layers of an engine after fusion.

    Attributes:
        layers: Number of layers.
        by_type: Number of layers by type, in descending order; empty for an engine built without details.
        by_format: Number of layers by output format ("fp16"), in descending order; "?" if the inspector does
            not report it, as for dynamic shapes.
        largest: Layers with the largest outputs: name, type and number of values (dynamic axes count as 1).
    """

    layers: int
    by_type: dict[str, int]
    by_format: dict[str, int]
    largest: tuple[tuple[str, str, int], ...]


def inspect_engine(trt: Any, engine: Any) -> EngineSummary:
    """Queries the inspector of an engine."""
    inspector = engine.create_engine_inspector()
    return summarize(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def summarize(information: str) -> EngineSummary:
    """Summarises the inspector's JSON of TensorRT 10 and 11.

    A layer is an object, or only a name without details. The format of a tensor is the field
    "Format/Datatype" in TensorRT 10 and two fields in 11.
    """
    layers = json.loads(information).get("Layers") or []
    detailed = [layer for layer in layers if isinstance(layer, dict)]
    sizes = [(_text(layer, "Name")[:WIDTH], _text(layer, "LayerType"), _size(layer)) for layer in detailed]
    return EngineSummary(
        layers=len(layers),
        by_type=_counted(_text(layer, "LayerType") for layer in detailed),
        by_format=_counted(_format(tensor) for layer in detailed for tensor in _outputs(layer)[:1]),
        largest=tuple(sorted(sizes, key=lambda entry: -entry[2])[:LONGEST]),
    )


def _counted(names: Any) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _outputs(layer: dict[str, Any]) -> list[dict[str, Any]]:
    return [tensor for tensor in layer.get("Outputs") or [] if isinstance(tensor, dict)]


def _format(tensor: dict[str, Any]) -> str:
    fields = ("DataType", "Datatype", "Format/Datatype", "Format")
    found = _FORMAT.search(" ".join(str(tensor[field]) for field in fields if field in tensor))
    return str(found.lastgroup) if found else "?"


def _size(layer: dict[str, Any]) -> int:
    shapes = [tensor.get("Dimensions") or [0] for tensor in _outputs(layer)]
    return max((math.prod(abs(size) for size in shape) for shape in shapes), default=0)


def _text(layer: dict[str, Any], field: str) -> str:
    return str(layer.get(field, "?"))
