"""Summary of the precisions in a graph."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from export.quantization.qdq import weight_matmuls

if TYPE_CHECKING:
    from onnx import ModelProto


def precision_summary(model: ModelProto) -> dict[str, Any]:
    """Counts the operators and weights of a graph by element type.

    Args:
        model: The graph; nodes inside branches and loops are not counted.

    Returns:
        operators: Number of operators by element type and operator. The type is that of the first output or,
            for matrix multiplications of dequantised values, the quantised type; "unknown" if it cannot be
            inferred.
        weight_bytes: Bytes of the constants by element type.
        float_layers: Paths of layers with weights in fp32, fp16 or bf16.
    """
    from onnx import TensorProto, helper, shape_inference

    def name(data_type: int) -> str:
        return TensorProto.DataType.Name(data_type).lower()

    typed = shape_inference.infer_shapes(model).graph
    types = {each.name: name(each.type.tensor_type.elem_type) for each in (*typed.value_info, *typed.output)}
    stored = {each.name: each.data_type for each in typed.initializer}
    numbers = {
        node.output[0]: types.get(node.input[0], name(stored.get(node.input[0], TensorProto.UNDEFINED)))
        for node in typed.node
        if node.op_type == "DequantizeLinear"
    }
    operators: dict[str, Counter[str]] = defaultdict(Counter)
    for node in typed.node:
        operands = {numbers.get(each) for each in node.input[:2]}
        of_numbers = operands.pop() if len(operands) == 1 and len(node.input) > 1 else None
        operators[of_numbers or types.get(node.output[0], "unknown")][node.op_type] += 1
    weight_bytes: Counter[str] = Counter()
    for each in typed.initializer:
        count = 1
        for size in each.dims:
            count *= size
        weight_bytes[name(each.data_type)] += count * helper.tensor_dtype_to_np_dtype(each.data_type).itemsize
    return {
        "operators": {kind: dict(counts) for kind, counts in sorted(operators.items())},
        "weight_bytes": dict(weight_bytes),
        "float_layers": [product.layer for product in weight_matmuls(model.graph)],
    }
