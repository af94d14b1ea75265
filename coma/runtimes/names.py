"""Names of runtimes and of the devices that they run on, as flags take them; imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast, get_args

from coma.messages import parse_names

if TYPE_CHECKING:
    from typing_extensions import TypeIs

RuntimeName = Literal["auto", "pytorch", "onnxruntime", "openvino", "openvino-gpu", "tensorrt", "pt2"]
"""auto: PyTorch for an artifact; for an exported file ONNX Runtime, TensorRT or PyTorch, by its suffix."""
Provider = Literal["cpu", "cuda", "tensorrt"]
"""Execution provider of ONNX Runtime."""
OpenVINODevice = Literal["openvino", "openvino-gpu"]
"""OpenVINO on a CPU or on an Intel GPU."""
Device = Literal[Provider, OpenVINODevice]
"""Where an ONNX file runs."""
TorchDevice = Literal["cpu", "cuda"]
"""Device of tensors."""

SUFFIXES: dict[RuntimeName, str] = {
    "onnxruntime": ".onnx",
    "openvino": ".onnx",
    "openvino-gpu": ".onnx",
    "tensorrt": ".engine",
    "pt2": ".pt2",
}
"""Suffix of the files that a runtime runs."""
COMPILED = "-aoti"
"""End of the names, before the suffix, of programs that AOTInductor compiled."""


def is_openvino(name: str) -> TypeIs[OpenVINODevice]:
    """Whether a runtime or device is one of OpenVINO's."""
    return name in get_args(OpenVINODevice)


def library_of(device: Device) -> str:
    """Returns the library that runs an ONNX file there: the first words of its runtime's title."""
    return "OpenVINO" if is_openvino(device) else "ONNX Runtime"


def torch_device_of(device: Device) -> TorchDevice:
    """Returns the device of the tensors that go in and come out."""
    return "cuda" if device in ("cuda", "tensorrt") else "cpu"


def parse_devices(text: str) -> tuple[Device, ...]:
    """Parses a list of devices such as `cpu,openvino`, the value of `--device`.

    Raises:
        BadInput: an unknown name, or none.
    """
    return cast(tuple[Device, ...], parse_names(text, get_args(Device), "--device"))
