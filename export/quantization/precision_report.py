"""What precisions a graph is made of."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from export.quantization.qdq import weight_matmuls

if TYPE_CHECKING:
    from onnx import ModelProto


def precision_summary(model: ModelProto) -> dict[str, Any]:
    """Operators and weights of a graph by element type, as plain data.

    Args:
        model: Any; what its branches and loops hold is not counted.

    Returns:
        operators: For every element type, how many of each operator compute in it: the type of the first
            output, and of the numbers behind it for products of dequantised ones. "unknown" where inference
            of types fails.
        weight_bytes: For every element type, bytes of the constants.
        float_layers: Paths of layers whose weights are fp32, fp16 or bf16.
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
