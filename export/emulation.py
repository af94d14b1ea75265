"""bf16 graphs where bf16 products cannot run: the same graph in fp32, every bf16 tensor rounded to bf16.

This is what a GPU computes that multiplies bf16 numbers and accumulates in fp32, up to the order of its sums.
ONNX Runtime's CPU provider, which has no bf16 products, can thus check an exported bf16 file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pretrain.errors import BadInput

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_EXACT = frozenset(
    {
        "Abs", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements",
        "GatherND", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu",
        "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile", "TopK", "Transpose",
        "Unsqueeze", "Where"
    }
)  # fmt: skip
"""Operators whose results are among their operands, up to sign and zero: nothing to round."""

_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def emulate_bf16(model: ModelProto) -> ModelProto:
    """A copy that computes in fp32 what the model computes in bf16, with the same inputs and outputs.

    Args:
        model: With inputs and outputs of other types than bf16, as exports have.

    Returns:
        A model without bf16 except between two Cast nodes, which round.

    Raises:
        BadInput: bf16 inputs or outputs, bf16 inside of branches or loops, or a node whose types cannot be
            inferred.
    """
    from onnx import ModelProto, inliner, shape_inference

    copy = ModelProto()
    copy.CopyFrom(model)
    if copy.functions:
        copy = inliner.inline_local_functions(copy)
    graph = copy.graph
    ports = [each.name for each in (*graph.input, *graph.output) if _is_bf16(each.type.tensor_type.elem_type)]
    if ports:
        raise BadInput(f"inputs or outputs in bf16 ({', '.join(ports)}): export them in fp32")
    typed = shape_inference.infer_shapes(copy).graph
    types = {
        each.name: each.type.tensor_type.elem_type
        for each in (*typed.value_info, *typed.input, *typed.output)
    }
    types |= {each.name: each.data_type for each in graph.initializer}

    for tensor in graph.initializer:
        _widen(tensor)
    nodes = [each for node in graph.node for each in _rounded(node, types)]
    del graph.node[:]
    del graph.value_info[:]
    graph.node.extend(nodes)
    return copy


def _rounded(node: NodeProto, types: Mapping[str, int]) -> Iterator[NodeProto]:
    # the node in fp32, and after it what rounds its results
    from onnx import TensorProto, helper

    for attribute in node.attribute:
        if any(_holds_bf16(graph, types) for graph in (attribute.g, *attribute.graphs)):
            raise BadInput(f"{node.op_type} {node.name!r} holds bf16 in a branch or loop: not emulated")
        if attribute.name in _TYPE_ATTRIBUTES and _is_bf16(attribute.i):
            attribute.i = TensorProto.FLOAT
        for tensor in (attribute.t, *attribute.tensors):
            _widen(tensor)
    after = []
    for index, name in enumerate(node.output):
        if name and name not in types:
            raise BadInput(f"the type of {name!r}, a result of {node.op_type} {node.name!r}, is not known")
        if name and _is_bf16(types[name]) and node.op_type not in _EXACT:
            node.output[index], rounded = f"{name}/float", f"{name}/bf16"
            after += [
                helper.make_node(
                    "Cast", [f"{name}/float"], [rounded], f"{rounded}/to", to=TensorProto.BFLOAT16
                ),
                helper.make_node("Cast", [rounded], [name], f"{rounded}/from", to=TensorProto.FLOAT),
            ]
    yield node
    yield from after


def _holds_bf16(graph: GraphProto, types: Mapping[str, int]) -> bool:
    for node in graph.node:
        if any(_is_bf16(types.get(name, 0)) for name in node.input):
            return True
        for each in node.attribute:
            declares = each.name in _TYPE_ATTRIBUTES and _is_bf16(each.i)
            if declares or _is_bf16(each.t.data_type):
                return True
            if any(_holds_bf16(inner, types) for inner in (each.g, *each.graphs)):
                return True
    return any(_is_bf16(each.data_type) for each in graph.initializer)


def _widen(tensor: TensorProto) -> None:
    # bf16 to fp32 in place, exactly
    import numpy as np
    from onnx import numpy_helper

    if _is_bf16(tensor.data_type):
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        )


def _is_bf16(data_type: int) -> bool:
    from onnx import TensorProto

    return data_type == TensorProto.BFLOAT16
