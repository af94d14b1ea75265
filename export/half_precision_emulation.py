"""Emulates a 16-bit graph in fp32 by rounding every 16-bit tensor.

The result is that of a GPU that multiplies 16-bit numbers and accumulates in fp32, up to the order of its
sums and with the same overflows. ONNX Runtime's CPU provider cannot verify 16-bit files directly: it has no
bf16 matrix multiplications, and it keeps intermediate results of fp16 graphs in fp32, where nothing
overflows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeGuard

from coma.errors import BadInput
from coma.runtimes.onnx_file import EMULATED
from export.external_data import place_weights, read_weights

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

Half = Literal["fp16", "bf16"]


_EXACT = frozenset(
    {
        "Abs", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements",
        "GatherND", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu",
        "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile", "TopK", "Transpose",
        "Unsqueeze", "Where"
    }
)  # fmt: skip
"""Operators that only select operands, up to sign and zero, so their results need no rounding."""

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def is_half(precision: str) -> TypeGuard[Half]:
    """Whether files of this precision are emulated on a CPU."""
    return precision in ("fp16", "bf16")


def emulate(model: ModelProto, precision: Half, path: Path | None = None) -> ModelProto:
    """Returns a copy of a model that computes in fp32 what the model computes in 16 bits.

    Args:
        model: A model with inputs and outputs of other types, as in exported files.
        precision: Precision of its 16-bit tensors.
        path: File of the model. The copy's weights are in a file beside it if they are large; see
            `place_weights`.

    Returns:
        A model with 16-bit tensors only between two Cast nodes, which round; its metadata hold `EMULATED`.

    Raises:
        BadInput: the model has 16-bit inputs or outputs, 16 bits inside branches or loops, or a node whose
            types cannot be inferred.
    """
    from onnx import ModelProto, TensorProto, inliner, shape_inference

    short = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
    copy = ModelProto()
    copy.CopyFrom(model)
    if copy.functions:
        copy = inliner.inline_local_functions(copy)
    graph = copy.graph
    sixteen_bit = [
        each.name for each in (*graph.input, *graph.output) if each.type.tensor_type.elem_type == short
    ]
    if sixteen_bit:
        raise BadInput(f"inputs or outputs in {precision} ({', '.join(sixteen_bit)}): export them in fp32")
    typed = shape_inference.infer_shapes(copy).graph
    types = {
        each.name: each.type.tensor_type.elem_type
        for each in (*typed.value_info, *typed.input, *typed.output)
    }
    types |= {each.name: each.data_type for each in graph.initializer}

    if path:
        read_weights(copy, path.parent)
    for tensor in graph.initializer:
        _widen(tensor, short)
    nodes = [each for node in graph.node for each in _rounded(node, types, short)]
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend(nodes)
    copy.metadata_props.add(key=EMULATED, value=precision)
    if path:
        place_weights(copy, path)
    return copy


def _rounded(node: NodeProto, types: Mapping[str, int], short: int) -> Iterator[NodeProto]:
    """Yields the node in fp32, followed by the nodes that round its results."""
    from onnx import TensorProto, helper

    for attribute in node.attribute:
        if any(_holds(graph, types, short) for graph in (attribute.g, *attribute.graphs)):
            raise BadInput(
                f"{node.op_type} {node.name!r} has 16 bits in a branch or loop, which cannot be emulated"
            )
        if attribute.name in _TYPE_ATTRIBUTES and attribute.i == short:
            attribute.i = TensorProto.FLOAT
        for tensor in (attribute.t, *attribute.tensors):
            _widen(tensor, short)
    after = []
    for index, name in enumerate(node.output):
        if name and name not in types:
            raise BadInput(f"the type of {name!r}, a result of {node.op_type} {node.name!r}, is not known")
        if name and types[name] == short and node.op_type not in _EXACT:
            node.output[index], rounded = f"{name}/float", f"{name}/short"
            after += [
                helper.make_node("Cast", [f"{name}/float"], [rounded], f"{rounded}/to", to=short),
                helper.make_node("Cast", [rounded], [name], f"{rounded}/from", to=TensorProto.FLOAT),
            ]
    for each in after:
        each.metadata_props.extend(node.metadata_props)
    yield node
    yield from after


def _holds(graph: GraphProto, types: Mapping[str, int], short: int) -> bool:
    for node in graph.node:
        if any(types.get(name) == short for name in node.input):
            return True
        for each in node.attribute:
            declares = each.name in _TYPE_ATTRIBUTES and each.i == short
            if declares or each.t.data_type == short:
                return True
            if any(_holds(inner, types, short) for inner in (each.g, *each.graphs)):
                return True
    return any(each.data_type == short for each in graph.initializer)


def _widen(tensor: TensorProto, short: int) -> None:
    """Converts a 16-bit tensor to fp32 in place."""
    import numpy as np
    from onnx import numpy_helper

    if tensor.data_type == short:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        )
