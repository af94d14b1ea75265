"""Inserts QuantizeLinear and DequantizeLinear (Q/DQ) pairs before multiplications with constant weights.

    x  ->  QuantizeLinear -> DequantizeLinear  -\
                                                 MatMul | Gemm | Conv
    w, stored in 8 bits   -> DequantizeLinear  -/

TensorRT supports these pairs as explicit quantisation (see its developer guide); other runtimes compute or
fuse them. Zero points are zero, because TensorRT supports no others. All other operators stay in float:
attention (products of two activations), normalisation, softmax, GELU, resizing, and the steps after a
detector's heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from export.external_data import without_weights
from export.onnx_export import modules_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto


@dataclass(frozen=True)
class WeightMatmul:
    """A MatMul, Gemm or Conv of an activation with a constant weight."""

    layer: str
    """Path of the torch module that it was exported from, or the name of the node if the file has no path."""
    output: str
    activation: str
    weight: str
    axis: int
    """Axis of the output channels in the weight."""
    data_type: int
    """ONNX's number for the weight's type."""


def weight_matmuls(graph: GraphProto) -> Iterator[WeightMatmul]:
    """Yields the matrix multiplications with constant weights in fp32, fp16 or bf16, in graph order.

    Branches, loops and stacks of matrices are left out.
    """
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    weights = {each.name: each for each in graph.initializer if each.data_type in floats}
    for node in graph.node:
        axis = _output_axis(node)
        if axis is None or node.input[0] in weights or node.input[1] not in weights:
            continue
        weight = weights[node.input[1]]
        if node.op_type == "Conv" or len(weight.dims) == 2:
            layer, output = [node.name, *modules_of(node)][-1], node.output[0]
            yield WeightMatmul(layer, output, node.input[0], weight.name, axis, weight.data_type)


def insert_qdq(
    graph: GraphProto,
    products: Sequence[WeightMatmul],
    ranges: Mapping[str, float],
    codes: EightBitType,
    *,
    per_channel: bool,
) -> None:
    """Inserts a Q/DQ pair before every matrix multiplication and stores its weight in 8 bits, in place.

    Multiplications of one activation share a pair; float weights without a use are removed.

    Args:
        graph: The graph, of an opset whose QuantizeLinear supports the type.
        products: Matrix multiplications to quantise.
        ranges: Clipping magnitude of every activation.
        codes: The 8-bit type.
        per_channel: Whether every output channel of a weight has its own scale.
    """
    weights = {each.name: each for each in graph.initializer}
    chosen = {product.output: product for product in products}
    ready: set[str] = set()
    nodes: list[NodeProto] = []
    for node in graph.node:
        product = chosen.get(node.output[0]) if node.output else None
        if product is not None:
            activation = f"{product.activation}/{codes.name}"
            weight = f"{product.weight}/{codes.name}/{product.axis}"
            values = _array(weights[product.weight])
            if activation not in ready:
                amax = np.asarray(ranges[product.activation])
                nodes += _activation_pair(graph, product.activation, activation, amax, values.dtype, codes)
            if weight not in ready:
                nodes.append(_encoded_weight(graph, weight, values, codes, product.axis, per_channel))
            ready |= {activation, weight}
            node.input[0], node.input[1] = f"{activation}/float", f"{weight}/float"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph, {product.weight for product in products})


def _output_axis(node: NodeProto) -> int | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    flags = {each.name: each.i for each in node.attribute}
    if node.op_type == "Gemm":
        return None if flags.get("transA") else 1 - flags.get("transB", 0)
    return {"MatMul": 1, "Conv": 0}.get(node.op_type)


def _activation_pair(
    graph: GraphProto, source: str, name: str, amax: np.ndarray, dtype: np.dtype, codes: EightBitType
) -> list[NodeProto]:
    from onnx import helper

    scale, zero = _parameters(graph, name, codes.scale(amax, dtype), codes)
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [name], name=f"{name}/quantize"),
        helper.make_node("DequantizeLinear", [name, scale, zero], [f"{name}/float"], name=f"{name}/restore"),
    ]


def _encoded_weight(
    graph: GraphProto, name: str, values: np.ndarray, codes: EightBitType, axis: int, per_channel: bool
) -> NodeProto:
    from onnx import helper

    others = tuple(i for i in range(values.ndim) if i != axis)
    amax = np.abs(values).max(axis=others if per_channel else None)
    scale = codes.scale(amax, values.dtype)
    _store(graph, name, codes.encode(values, np.expand_dims(scale, others) if per_channel else scale))
    inputs = [name, *_parameters(graph, name, scale, codes)]
    node = helper.make_node("DequantizeLinear", inputs, [f"{name}/float"], name=f"{name}/restore")
    if per_channel:
        node.attribute.append(helper.make_attribute("axis", axis))
    return node


def _parameters(graph: GraphProto, name: str, scale: np.ndarray, codes: EightBitType) -> tuple[str, str]:
    # the zero point also says which type it is
    _store(graph, f"{name}/scale", scale)
    _store(graph, f"{name}/zero", np.zeros(scale.shape, codes.dtype))
    return f"{name}/scale", f"{name}/zero"


def _store(graph: GraphProto, name: str, values: np.ndarray) -> None:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))


def _array(tensor: TensorProto) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _drop_unused(graph: GraphProto, names: set[str]) -> None:
    unused = names - set(_used(graph))
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name in unused:
            del graph.initializer[index]


def _used(graph: GraphProto) -> Iterator[str]:
    # inputs of nodes, including those inside branches and loops
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _used(inner)


def at_opset(model: ModelProto, opset: int) -> ModelProto:
    """Converts a model to an opset that is no lower, and keeps the metadata of the model and its nodes."""
    from onnx import version_converter

    current = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if current >= opset:
        return model
    converted = version_converter.convert_version(without_weights(model), opset)
    outside = {each.name: each for each in model.graph.initializer if each.external_data}
    for index in reversed(range(len(converted.graph.input))):
        if converted.graph.input[index].name in outside:
            del converted.graph.input[index]
    converted.graph.initializer.extend(outside.values())
    converted.ir_version = max(model.ir_version, converted.ir_version)
    converted.metadata_props.MergeFrom(model.metadata_props)  # the converter drops them
    said = {node.output[0]: node.metadata_props for node in model.graph.node if node.output}
    for node in converted.graph.node:
        if node.output and not node.metadata_props:
            node.metadata_props.MergeFrom(said.get(node.output[0], []))
    return converted


@dataclass(frozen=True)
class EightBitType:
    """An 8-bit type, used symmetrically around zero."""

    name: str
    dtype: np.dtype
    largest: float
    """Value that represents the clipping magnitude."""

    def scale(self, amax: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Returns the scale in `dtype`; 1 if all values are zero, and never 0."""
        least = float(np.finfo(dtype).tiny)
        scale = np.asarray(amax, np.float64) / self.largest
        return np.where(scale > 0, np.maximum(scale, least), 1.0).astype(dtype)

    def encode(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Rounds to the nearest value, ties to even, and clips."""
        scaled = values.astype(np.float32) / scale.astype(np.float32)
        if np.issubdtype(self.dtype, np.integer):
            scaled = np.rint(scaled)
        return np.clip(scaled, -self.largest, self.largest).astype(self.dtype)


INT8 = EightBitType("int8", np.dtype(np.int8), 127.0)


def fp8_codes() -> EightBitType:
    """E4M3FN: -448 to 448, three bits of mantissa, no infinity (Micikevicius et al. 2022, table 1)."""
    import ml_dtypes  # onnx brings it

    return EightBitType("fp8", np.dtype(ml_dtypes.float8_e4m3fn), 448.0)
