"""What TensorRT made of the network: its inspector's listing of every layer, in a few numbers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

LONGEST = 5
WIDTH = 100
"""Characters of a layer's name: fused layers carry the names of all that is in them."""

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
    """An engine's layers, after TensorRT fused what it could.

    Attributes:
        layers: How many.
        by_type: How many of every type, most first; empty for an engine built without details.
        by_format: How many layers write every format ("fp16"), most first; "?" where it is not said, as for
            free shapes.
        largest: The layers that write most: name, type and values of an image (free axes count as 1).
    """

    layers: int
    by_type: dict[str, int]
    by_format: dict[str, int]
    largest: tuple[tuple[str, str, int], ...]


def inspect_engine(trt: Any, engine: Any) -> EngineSummary:
    """Ask the engine's inspector."""
    inspector = engine.create_engine_inspector()
    return summarize(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def summarize(information: str) -> EngineSummary:
    """The inspector's JSON, as TensorRT 10 and 11 write it.

    A layer is an object, or only a name without details. The format of a tensor stands under
    "Format/Datatype" in TensorRT 10 and is split into two fields in 11.
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
