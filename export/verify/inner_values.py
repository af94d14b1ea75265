"""Runs a copy of an ONNX file that returns values from inside its graph."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coma.runtimes.base import Runtime
from coma.runtimes.names import Device
from coma.runtimes.open import open_onnx
from export.onnx_export import RECORDED, modules_of

if TYPE_CHECKING:
    import onnx


def runtime_with(
    model: onnx.ModelProto, values: Iterable[str], device: Device = "cpu", folder: Path | None = None
) -> Runtime:
    """Returns a runtime whose outputs include the given values of the graph, where their types are known.

    Args:
        model: The graph.
        values: Names of the values.
        device: Where to run it.
        folder: Folder of the graph's weights file, if it has one.
    """
    import onnx

    marked = copy.deepcopy(model)
    there = {out.name for out in marked.graph.output}
    types = {info.name: info for info in onnx.shape_inference.infer_shapes(marked).graph.value_info}
    for value in dict.fromkeys(values):
        if value not in there and value in types:
            marked.graph.output.append(types[value])
    return open_onnx(marked.SerializeToString(), device, extra_outputs=True, folder=folder)


def recorded_steps(model: onnx.ModelProto) -> list[str]:
    """Returns the names of the values that the graph of a detector records; see `RECORDED`."""
    names = [name for node in model.graph.node for name in node.output]
    return [name for name in names if name.startswith(RECORDED)]


def module_values(model: onnx.ModelProto, modules: Iterable[str]) -> dict[str, list[str]]:
    """Returns the floating-point values that each module computes, in the order of the graph.

    Args:
        model: The graph, whose nodes name the modules that they were exported from.
        modules: Paths of modules without children.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)  # numpy has no bf16
    infos = (*inferred.value_info, *inferred.output)
    floats = {each.name for each in infos if each.type.tensor_type.elem_type in types}
    values: dict[str, list[str]] = {name: [] for name in modules}
    for node in model.graph.node:
        path = _innermost(modules_of(node))
        for name in (path, path.removeprefix("model.")):  # the module that normalises calls the model so
            if name in values and node.output[0] in floats:
                values[name].append(node.output[0])
                break
    return values


def _innermost(paths: Sequence[str]) -> str:
    return paths[-1] if paths else ""
