"""Runs ONNX graphs that are not files of `coma export`."""

from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
from onnx import ModelProto

from coma.runtimes.onnxruntime import ORT_FP8_ENTRY


def run(model: Path | ModelProto, images: np.ndarray, name: str = "images") -> list[np.ndarray]:
    """Returns the outputs of a graph for its one input, on one thread of a CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
    if b"/fp8" in content:
        options.add_session_config_entry(*ORT_FP8_ENTRY)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return cast(list[np.ndarray], session.run(None, {name: images}))
