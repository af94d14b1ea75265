"""What the tests of engines share: a spec, small ONNX files of it, and who can be tested here."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from coma.config.serialization import to_plain
from coma.runtimes.model_spec import ModelSpec, Preprocessing, TensorSpec
from coma.runtimes.tensorrt.discovery import find_driver
from coma.runtimes.tensorrt.profiles import Profile, ShapeRange

FLOAT = TensorProto.FLOAT
IMAGES = TensorSpec("images", "float32", ("batch", 4, 8))
ABOUT = ModelSpec(
    graph="encoder",
    precision="fp16",
    inputs=(IMAGES,),
    outputs=(TensorSpec("out", "float32", ("batch", 4, 8)),),
    preprocessing=Preprocessing("none", None, (0.5,), (0.5,)),
    unit=4,
    class_names=None,
    source="0" * 64,
    versions={"torch": "2.11"},
)
PROFILE = Profile({"images": ShapeRange((1, 4, 8), (2, 4, 8), (4, 4, 8))})

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None,
    reason="TensorRT-RTX is not installed (extra tensorrt-rtx)",
)
needs_no_gpu = pytest.mark.skipif(find_driver() is not None, reason="there is a GPU here")


def graph(
    path: Path, nodes: list[onnx.NodeProto], constants: dict[str, Any] | None = None, **more: Any
) -> Path:
    """An ONNX file from images [batch, 4, 8] to out, with our spec."""
    arrays = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    inputs = [helper.make_tensor_value_info("images", FLOAT, more.get("shape", ["batch", 4, 8]))]
    outputs = [helper.make_tensor_value_info("out", FLOAT, None)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, arrays),
        opset_imports=[helper.make_opsetid("", more.get("opset", 18))],
        ir_version=9,
    )
    helper.set_model_props(model, {"coma": json.dumps(to_plain(more.get("about", ABOUT)))})
    onnx.save(model, path)
    return path


def node(operator: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        operator, list(names[:-1]), [names[-1]], name=f"/{operator}_{names[-1]}", **attributes
    )
