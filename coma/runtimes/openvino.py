"""The OpenVINO runtime, on CPUs and Intel GPUs. It reads the ONNX files of `coma export` as they are.

OpenVINO chooses the precision of its products by the machine: on CPUs with bf16 and on Intel GPUs it runs
fp32 files in 16 bits. Here a file is run in its own precision, or in fp32 where the device has no such
products, and fp16 on every CPU.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from coma.devices import cores
from coma.errors import BadInput, CheckFailed
from coma.library_errors import load_packages
from coma.runtimes.base import check_inputs
from coma.runtimes.model_spec import Precision, float_part
from coma.runtimes.names import OpenVINODevice
from coma.runtimes.onnx_file import name_of, read_graph, read_onnx_file, weights_file

_PLUGINS: dict[OpenVINODevice, str] = {"openvino": "CPU", "openvino-gpu": "GPU"}
_HALF: dict[str, tuple[str, str]] = {"fp16": ("f16", "FP16"), "bf16": ("bf16", "BF16")}
"""Inference precision of 16-bit files, and what a device that has it lists among its capabilities."""
_LONGEST = 300
COPY = ".openvino.onnx"
"""Name of a content beside its weights file, while it is read."""


class OpenVINORuntime:
    """Runs an ONNX file with OpenVINO. Implements `coma.runtimes.base.Runtime`; calls run one after another.

    Nothing is written to disk: the cache of compiled models is off.

    Args:
        path: The file, or its content.
        device: openvino (CPU) or openvino-gpu (the first Intel GPU).
        threads: Number of CPU threads (default: all cores).
        extra_outputs: Return all outputs of the graph, not only those of the specification.
        folder: Folder of the weights file of a content, if it has one.

    Raises:
        BadInput: a package is missing, there is no such device, or coma export did not write the file.
        CheckFailed: OpenVINO cannot load the file.
    """

    def __init__(
        self,
        path: Path | bytes,
        device: OpenVINODevice = "openvino",
        threads: int | None = None,
        extra_outputs: bool = False,
        folder: Path | None = None,
    ) -> None:
        name = name_of(path)
        self.spec, _ = read_onnx_file(path, folder)
        core, plugin = require_device(device), _PLUGINS[device]
        precision = _inference_precision(core, plugin, self.spec.precision)
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "EXECUTION_MODE_HINT": "ACCURACY",
            "NUM_STREAMS": 1,
            "CACHE_DIR": "",
        }
        if plugin == "CPU":
            # threads that are pinned to cores wait for those that other libraries run on the same ones
            options |= {"INFERENCE_NUM_THREADS": threads or cores(), "ENABLE_CPU_PINNING": False}
        with _raising(f"{name}: OpenVINO cannot load it", CheckFailed):
            model = _read_model(core, path, folder)
            in_fp32 = float_part(self.spec.precision) in _HALF and precision == "f32"
            if plugin == "CPU" and _is_wrong_in_int8(model):
                options["LP_TRANSFORMS_MODE"], in_fp32 = "NO", True
            compiled = core.compile_model(model, plugin, options)
            self._outputs = {each.name: compiled.output(each.name) for each in self.spec.outputs}
            if extra_outputs:
                self._outputs |= {name: port for port in compiled.outputs for name in port.get_names()}
            self._request = compiled.create_infer_request()
        self._lock = threading.Lock()  # a request runs once at a time
        self.title = f"OpenVINO {_library().__version__.partition('-')[0]}, {plugin.lower()}"
        if in_fp32:
            self.title += f", {self.spec.precision} computed in fp32"

    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Runs the model; see `Runtime`."""
        inputs = check_inputs(self.spec, images, others)
        shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in inputs.items())
        with self._lock, _raising(f"OpenVINO could not run {shapes}", BadInput):
            arrays = {name: each.detach().cpu().contiguous().numpy() for name, each in inputs.items()}
            found = self._request.infer(arrays, share_inputs=True)
            outputs = {name: torch.from_numpy(found[port]) for name, port in self._outputs.items()}
        if empty := [name for name, each in outputs.items() if not each.numel()]:
            # shapes that do not fit give empty tensors there, not an error
            raise BadInput(f"OpenVINO could not run {shapes}: {', '.join(empty)} came back empty")
        return outputs


def require_device(device: OpenVINODevice) -> Any:
    """Returns OpenVINO's core after a check that it finds the device.

    Raises:
        BadInput: the package is missing, or OpenVINO finds no such device; the message lists those it finds.
    """
    core = _core()
    there = core.available_devices
    if not any(each.partition(".")[0] == _PLUGINS[device] for each in there):
        known = ", ".join(f"{each} ({core.get_property(each, 'FULL_DEVICE_NAME')})" for each in there)
        what = "no Intel GPU, or not its driver (OpenCL)" if device == "openvino-gpu" else "no CPU"
        raise BadInput(f"{device}: OpenVINO finds {what}, only {known or 'no device'}")
    return core


def _inference_precision(core: Any, plugin: str, precision: Precision) -> str:
    """Returns the precision to compute in: that of a 16-bit file if the device has it, otherwise fp32.

    Without the check OpenVINO computes in bf16 on CPUs that have bf16 and are asked for fp16. On CPUs that
    have fp16, OpenVINO 2026.4 is slower in it than in fp32 and errs more (benchmarks/LOG.md).
    """
    if plugin == "CPU" and float_part(precision) == "fp16":
        return "f32"
    hint, capability = _HALF.get(float_part(precision), ("f32", "FP32"))
    return hint if capability in core.get_property(plugin, "OPTIMIZATION_CAPABILITIES") else "f32"


def _read_model(core: Any, file: Path | bytes, folder: Path | None) -> Any:
    if isinstance(file, Path):
        return core.read_model(str(file))
    if folder is None or weights_file(read_graph(file), folder, name_of(file)) is None:
        return core.read_model(file)
    path = folder / COPY  # OpenVINO finds a weights file only beside a file
    try:
        path.write_bytes(file)
        return core.read_model(str(path))
    finally:
        path.unlink(missing_ok=True)


def _is_wrong_in_int8(model: Any) -> bool:
    """Whether a convolution reads quantised maps that were concatenated before, as in UPerNet's heads.

    OpenVINO 2026.4 moves the quantisation in front of the concatenation, and the convolution errs by 20 % and
    more, except on CPUs with AMX; matrix products do not. Such graphs are computed in fp32, with the same
    quantised values, on every CPU, so that a file gives the same wherever it runs.
    """
    for convolution in model.get_ops():
        if convolution.get_type_name() not in ("Convolution", "GroupConvolution"):
            continue
        node, passed = convolution.input_value(0).get_node(), set()
        while (kind := node.get_type_name()) not in ("Convolution", "GroupConvolution", "MatMul", "Concat"):
            passed.add(kind)
            if not node.get_input_size():
                break
            node = node.input_value(0).get_node()
        if kind == "Concat" and "FakeQuantize" in passed:
            return True
    return False


@cache
def _core() -> Any:
    return _library().Core()


def _library() -> Any:
    if "openvino" not in sys.modules:
        # importing openvino reports the import to Google Analytics, unless this package cannot be imported
        sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    load_packages("openvino")
    import openvino

    return openvino


@contextmanager
def _raising(attempt: str, kind: type[BadInput] | type[CheckFailed]) -> Iterator[None]:
    """Raises what OpenVINO raises inside as `kind`: the attempt, and the last line, which says the reason."""
    try:
        yield
    except RuntimeError as error:  # the library has no class of its own
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        raise kind(f"{attempt}: {(lines or [type(error).__name__])[-1][:_LONGEST]}") from error
