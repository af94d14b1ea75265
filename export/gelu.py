"""GELUs in the order of operations that ONNX Runtime recognises and computes as one operator.

torch.onnx.export writes x * (0.5 * (1 + erf(x / sqrt 2))) (Hendrycks and Gimpel 2016, arXiv 1606.08415,
sec. 2). ONNX Runtime fuses (0.5 * x) * (1 + erf(x / sqrt 2)), together with the bias before it; OpenVINO and
TensorRT take both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


def reorder_gelus(model: onnx.ModelProto) -> int:
    """Rewrites the GELUs of a graph in place and returns their number; other uses of erf stay as they are."""
    made = {name: node for node in model.graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def only_user(node: onnx.NodeProto, kind: str) -> onnx.NodeProto | None:
        found = users.get(node.output[0], [])
        return found[0] if len(found) == 1 and found[0].op_type == kind else None

    count = 0
    for erf in model.graph.node:
        scaled = made.get(erf.input[0]) if erf.op_type == "Erf" else None
        plus_one = only_user(erf, "Add") if scaled is not None and scaled.op_type == "Div" else None
        halved = only_user(plus_one, "Mul") if plus_one is not None else None
        product = only_user(halved, "Mul") if halved is not None else None
        if scaled is None or plus_one is None or halved is None or product is None:
            continue
        x, sum_ = scaled.input[0], plus_one.output[0]
        if set(product.input) != {x, halved.output[0]} or x in halved.input:
            continue
        half = next(name for name in halved.input if name != sum_)
        halved.input[:] = [x, half]
        product.input[:] = [halved.output[0], sum_]
        count += 1
    return count
