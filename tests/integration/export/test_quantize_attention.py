"""fp8 inside attention: which products are found, and with which scales, subnormal ones too."""

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from graph_runs import run  # noqa: E402
from onnx import ModelProto, TensorProto, helper, numpy_helper  # noqa: E402

from export.quantization import quantize_fp8  # noqa: E402
from export.quantization.qdq import INT8, attention_matmuls, fp8_codes  # noqa: E402


def attention(keys: int | str, bias: bool, *, kind: int = TensorProto.FLOAT) -> ModelProto:
    """Attention of images [b, 2, keys, 16] to themselves, beside products that belong to none."""
    shape = ["b", 2, keys, 16]
    make = helper.make_node
    nodes = [
        make("Mul", ["images", "scale"], ["q"]),
        make("Transpose", ["images"], ["k"], perm=[0, 1, 3, 2]),
        make("MatMul", ["q", "k"], ["scores"]),
        make("Add", ["scores", "bias"], ["masked"]),
        make("Softmax", ["masked" if bias else "scores"], ["weights"], axis=-1),
        make("MatMul", ["weights", "images"], ["mixed"]),
        make("MatMul", ["mixed", "linear"], ["out"]),
        make("MatMul", ["q", "k"], ["similar"]),
        make("Softmax", ["similar"], ["gates"], axis=-1),
    ]
    values = (("scale", 0.25), ("bias", 1.0), ("linear", np.eye(16)))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    constants = [numpy_helper.from_array(np.asarray(value, dtype), name) for name, value in values]
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in ("images", "out")]
    ends.append(helper.make_tensor_value_info("gates", kind, ["b", 2, keys, keys]))
    graph = helper.make_graph(nodes, "attention", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("keys", [32, 49, "tokens"])
@pytest.mark.parametrize("bias", [False, True])
def test_both_products_of_attention_are_found_and_no_others(keys, bias) -> None:
    found = list(attention_matmuls(attention(keys, bias)))
    assert [(each.output, each.softmax) for each in found] == [("scores", None), ("mixed", "weights")]
    assert [each.operands for each in found] == [("q", "k"), ("weights", "images")]


def test_attention_to_few_keys_is_left_as_it_is() -> None:
    assert not list(attention_matmuls(attention(31, bias=False)))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_fp8_quantises_q_k_v_and_the_softmax_by_448(tmp_path: Path, kind: int) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(attention(40, bias=True, kind=kind), source)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    images = np.random.default_rng(0).normal(size=(2, 2, 40, 16)).astype(dtype)
    done = quantize_fp8(source, target, [{"images": images}], exclude_first=False)
    graph = onnx.load(target).graph
    scales = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for name, amax in (("q", np.abs(images).max() / 4), ("weights", 1.0), ("images", np.abs(images).max())):
        scale = scales[f"{name}/fp8/scale"]
        assert scale.dtype == dtype and np.isclose(scale, amax / 448, rtol=2e-3), name
    assert done.ranges["weights"] == 1.0
    products = {each.output[0]: list(each.input) for each in graph.node if each.op_type == "MatMul"}
    assert products["scores"] == ["q/fp8/float", "k/fp8/float"]
    assert products["mixed"] == ["weights/fp8/float", "images/fp8/float"]
    assert products["similar"] == ["q", "k"]
    found, wanted = run(target, images)[0], run(source, images)[0]
    assert np.linalg.norm(found - wanted) < 0.06 * np.linalg.norm(wanted)


def test_scales_in_fp16_may_be_subnormal() -> None:
    values = np.array([0.0, 1e-3, -2e-3], np.float16)  # 2e-3 / 448 is less than fp16's smallest normal number
    for codes in (INT8, fp8_codes()):
        scale = codes.scale(np.asarray(2e-3), np.dtype(np.float16))
        restored = codes.encode(values, scale).astype(np.float32) * np.float32(scale)
        assert 0 < scale < np.finfo(np.float16).tiny and np.allclose(restored, values, rtol=0.07)
    assert INT8.scale(np.asarray(1e-40), np.dtype(np.float32)) == np.finfo(np.float32).tiny
