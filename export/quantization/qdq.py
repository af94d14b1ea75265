"""Inserts QuantizeLinear and DequantizeLinear (Q/DQ) pairs before multiplications with constant weights.

In fp8 the two products of attention get pairs too: one for each of Q, K, V and the softmax.

    x  ->  QuantizeLinear -> DequantizeLinear  -\
                                                 MatMul | Gemm | Conv
    w, stored in 8 bits   -> DequantizeLinear  -/

TensorRT supports these pairs as explicit quantisation (see its developer guide); other runtimes compute or
fuse them. Zero points are zero, because TensorRT supports no others. All other operators stay in float:
attention in int8, normalisation, softmax, GELU, resizing, and the steps after a detector's heads.
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


@dataclass(frozen=True)
class AttentionMatmul:
    """A product of attention: of Q and K, or of the softmax of such a product and V."""

    layer: str
    output: str
    operands: tuple[str, str]
    softmax: str | None
    """Which operand is the softmax; its range is 0 to 1."""
    data_type: int
    """ONNX's number for the type of the operands."""


LEAST_KEYS = 32
"""Fewest keys of an attention to quantise: matrix units add up products of fp8 by 32. TensorRT-RTX fuses in
fp8 what has 49 keys and more, but not 4 or 16, which it fuses in fp16 (benchmarks/LOG.md)."""


def attention_matmuls(model: ModelProto) -> Iterator[AttentionMatmul]:
    """Yields the two products of every attention of at least `LEAST_KEYS` keys, in graph order.

    The scale is on Q or K, and only a bias or a mask comes between the first product and the softmax: such
    graphs, with pairs directly in front of both products, are what TensorRT fuses in fp8 (its developer
    guide, "fused attention"; NVIDIA Model-Optimizer, pull request 1289).
    """
    from onnx import shape_inference

    typed = shape_inference.infer_shapes(model).graph
    types = {each.name: each.type.tensor_type for each in typed.value_info}
    sources = {output: node for node in model.graph.node for output in node.output}
    weights = {each.name for each in model.graph.initializer}
    found: dict[str, str | None] = {}
    for node in model.graph.node:
        softmax = sources.get(node.input[0]) if node.op_type == "MatMul" else None
        if softmax is None or softmax.op_type != "Softmax" or node.input[1] in weights:
            continue
        shape = types[node.input[0]].shape.dim if node.input[0] in types else ()
        if shape and 0 < shape[-1].dim_value < LEAST_KEYS:  # 0: depends on the size of the image
            continue
        first = sources.get(softmax.input[0])
        if first is not None and first.op_type == "Add":
            masked = (sources.get(name) for name in first.input)
            first = next((each for each in masked if each is not None and each.op_type == "MatMul"), None)
        if first is not None and first.op_type == "MatMul" and not weights & set(first.input):
            found |= {first.output[0]: None, node.output[0]: node.input[0]}
    for node in model.graph.node:
        if node.output and node.output[0] in found:
            layer, output, (one, other) = [node.name, *modules_of(node)][-1], node.output[0], node.input
            yield AttentionMatmul(layer, output, (one, other), found[output], types[one].elem_type)


def insert_qdq(
    graph: GraphProto,
    products: Sequence[WeightMatmul | AttentionMatmul],
    ranges: Mapping[str, float],
    codes: EightBitType,
    *,
    per_channel: bool,
) -> None:
    """Inserts Q/DQ pairs before every matrix multiplication and stores weights in 8 bits, in place.

    Multiplications of one activation share a pair; float weights without a use are removed.

    Args:
        graph: The graph, of an opset whose QuantizeLinear supports the type.
        products: Matrix multiplications to quantise.
        ranges: Clipping magnitude of every activation.
        codes: The 8-bit type.
        per_channel: Whether every output channel of a weight has its own scale.
    """
    from onnx import helper

    weights = {each.name: each for each in graph.initializer}
    chosen = {product.output: product for product in products}
    ready: set[str] = set()
    nodes: list[NodeProto] = []

    def quantised_activation(source: str, data_type: int) -> str:
        name = f"{source}/{codes.name}"
        if name not in ready:
            dtype = helper.tensor_dtype_to_np_dtype(data_type)
            nodes.extend(_activation_pair(graph, source, name, np.asarray(ranges[source]), dtype, codes))
            ready.add(name)
        return f"{name}/float"

    def quantised_weight(product: WeightMatmul) -> str:
        name = f"{product.weight}/{codes.name}/{product.axis}"
        if name not in ready:
            values = _array(weights[product.weight])
            nodes.append(_encoded_weight(graph, name, values, codes, product.axis, per_channel))
            ready.add(name)
        return f"{name}/float"

    for node in graph.node:
        product = chosen.get(node.output[0]) if node.output else None
        if isinstance(product, WeightMatmul):
            node.input[0] = quantised_activation(product.activation, product.data_type)
            node.input[1] = quantised_weight(product)
        elif product is not None:
            for index, source in enumerate(product.operands):
                node.input[index] = quantised_activation(source, product.data_type)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph, {each.weight for each in products if isinstance(each, WeightMatmul)})


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
        # fp32's subnormal numbers may be flushed to zero; fp16's have no less precision than what they scale
        least = max(float(np.finfo(dtype).smallest_subnormal), float(np.finfo(np.float32).tiny))
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
