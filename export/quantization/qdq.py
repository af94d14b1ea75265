"""Products of activations with constant weights, and how they become products of 8-bit numbers.

    x  ->  QuantizeLinear -> DequantizeLinear  -\
                                                 MatMul | Gemm | Conv
    w, stored in 8 bits   -> DequantizeLinear  -/

TensorRT parses this form as explicit quantisation (its developer guide, "Explicit Quantization"); other
runtimes compute it as written, or fuse it. Zero points are zero: TensorRT takes no others. All else stays in
float: products of two activations (those of attention), normalisations, softmax, GELU, resizing, whatever
follows a detector's heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from export.onnx_export import modules_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto


@dataclass(frozen=True)
class Product:
    """A MatMul, Gemm or Conv of an activation and a constant."""

    layer: str
    """Path of the torch module that it was exported from; the node's name where the file does not tell."""
    output: str
    activation: str
    weight: str
    axis: int
    """Of the output channels in the weight."""
    data_type: int
    """ONNX's number for the weight's type."""


def weight_matmuls(graph: GraphProto) -> Iterator[Product]:
    """Products whose second operand is a constant of fp32, fp16 or bf16, in the order of the graph.

    Left out are those inside of branches and loops, and stacks of matrices.
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
            yield Product(layer, output, node.input[0], weight.name, axis, weight.data_type)


def insert_qdq(
    graph: GraphProto,
    products: Sequence[Product],
    ranges: Mapping[str, float],
    codes: Codes,
    *,
    per_channel: bool,
) -> None:
    """Put a pair before every product and keep its weight in 8 bits, in place.

    Products of one activation share its pair; float weights that nothing uses any more are dropped.

    Args:
        graph: Holds the products; of an opset whose QuantizeLinear takes the type.
        products: What is to change.
        ranges: Of every product's activation, the magnitude that becomes the largest number.
        codes: The type.
        per_channel: One scale for every output channel of a weight, instead of one for all of it.
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
    graph: GraphProto, source: str, name: str, amax: np.ndarray, dtype: np.dtype, codes: Codes
) -> list[NodeProto]:
    from onnx import helper

    scale, zero = _parameters(graph, name, codes.scale(amax, dtype), codes)
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [name], name=f"{name}/quantize"),
        helper.make_node("DequantizeLinear", [name, scale, zero], [f"{name}/float"], name=f"{name}/restore"),
    ]


def _encoded_weight(
    graph: GraphProto, name: str, values: np.ndarray, codes: Codes, axis: int, per_channel: bool
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


def _parameters(graph: GraphProto, name: str, scale: np.ndarray, codes: Codes) -> tuple[str, str]:
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
    # names that nodes take, inside of branches and loops too
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _used(inner)


def at_opset(model: ModelProto, opset: int) -> ModelProto:
    """The model for an opset no lower than this, with all that its file says of it and of its nodes."""
    from onnx import version_converter

    current = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if current >= opset:
        return model
    converted = version_converter.convert_version(model, opset)
    converted.ir_version = max(model.ir_version, converted.ir_version)
    converted.metadata_props.MergeFrom(model.metadata_props)  # what the converter leaves out
    said = {node.output[0]: node.metadata_props for node in model.graph.node if node.output}
    for node in converted.graph.node:
        if node.output and not node.metadata_props:
            node.metadata_props.MergeFrom(said.get(node.output[0], []))
    return converted


@dataclass(frozen=True)
class Codes:
    """A type of 8 bits, used symmetrically around zero."""

    name: str
    dtype: np.dtype
    largest: float
    """The number that the largest magnitude becomes."""

    def scale(self, amax: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """What the number 1 stands for, in `dtype`: 1 where all is zero, and never zero itself."""
        least = float(np.finfo(dtype).tiny)
        scale = np.asarray(amax, np.float64) / self.largest
        return np.where(scale > 0, np.maximum(scale, least), 1.0).astype(dtype)

    def encode(self, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The nearest numbers, ties to even; what lies beyond the largest becomes the largest."""
        scaled = values.astype(np.float32) / scale.astype(np.float32)
        if np.issubdtype(self.dtype, np.integer):
            scaled = np.rint(scaled)
        return np.clip(scaled, -self.largest, self.largest).astype(self.dtype)


INT8 = Codes("int8", np.dtype(np.int8), 127.0)


def fp8_codes() -> Codes:
    """E4M3FN: -448 to 448, three bits of mantissa, no infinity (Micikevicius et al. 2022, table 1)."""
    import ml_dtypes  # onnx brings it

    return Codes("fp8", np.dtype(ml_dtypes.float8_e4m3fn), 448.0)
