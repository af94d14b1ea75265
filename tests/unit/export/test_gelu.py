"""GELUs of exported graphs are fused by ONNX Runtime, and compute the same."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.gelu import reorder_gelus


def gelu(*, shared: bool = False, half: float = 0.5) -> onnx.ModelProto:
    """A GELU as torch.onnx.export writes it; `shared`: half of 1 + erf is an output, too."""
    constants = {"root": 2**0.5, "one": 1.0, "half": half}
    nodes = [
        helper.make_node("Div", ["x", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["sum"]),
        helper.make_node("Mul", ["half", "sum"], ["share"]),
        helper.make_node("Mul", ["x", "share"], ["y"]),
    ]
    if shared:
        nodes.append(helper.make_node("Neg", ["share"], ["z"]))
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xyz")
    tensors = [
        numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()
    ]
    graph = helper.make_graph(nodes, "g", [x], [y, z] if shared else [y], tensors)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def run(model: onnx.ModelProto, x: np.ndarray, optimized: str = "") -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = optimized
    options.log_severity_level = 4
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [np.asarray(each) for each in session.run(None, {"x": x})]


def test_a_gelu_is_fused_after_reordering_and_not_before(tmp_path):
    model, x = gelu(), np.linspace(-6, 6, 101, dtype=np.float32)
    wanted = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    kinds = []
    for count in (0, 1):
        if count:
            assert reorder_gelus(model) == 1
            onnx.checker.check_model(model, full_check=True)
        file = str(tmp_path / f"{count}.onnx")
        np.testing.assert_allclose(run(model, x, file)[0], wanted, atol=1e-6)
        kinds.append([node.op_type for node in onnx.load(file).graph.node])
    assert "Erf" in kinds[0] and kinds[1] == ["Gelu"]


@pytest.mark.parametrize("changes", [{"shared": True}, {"half": 0.75}])
def test_what_only_looks_like_one_computes_what_it_did(changes):
    model, x = gelu(**changes), np.linspace(-3, 3, 7, dtype=np.float32)
    before = run(model, x)
    assert reorder_gelus(model) == (0 if changes.get("shared") else 1)
    for one, other in zip(before, run(model, x), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
