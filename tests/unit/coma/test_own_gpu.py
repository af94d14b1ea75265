"""A process of torchrun keeps its work on its own GPU, whatever runs it. torch.cuda is faked."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coma.errors import BadInput
from coma.runtimes import onnxruntime
from coma.runtimes.onnxruntime import OnnxRuntime
from coma.runtimes.tensorrt import runtime as tensorrt
from downstream.features.models import _torch_device


@pytest.fixture(autouse=True)
def second_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process uses the second of two GPUs."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)


def test_models_of_timm_run_there():
    assert _torch_device("auto") == _torch_device("cuda") == torch.device("cuda", 1)
    assert _torch_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_providers_of_onnx_runtime_open_there(provider, monkeypatch):
    asked: dict[str, dict[str, str]] = {}

    def open_session(*_, providers: list[tuple[str, dict[str, str]]]) -> Any:
        asked.update(providers)
        return SimpleNamespace(get_providers=lambda: [providers[0][0]])

    names = list(onnxruntime._PROVIDERS.values())
    options = SimpleNamespace(add_session_config_entry=lambda *_: None)
    library = SimpleNamespace(
        SessionOptions=lambda: options,
        InferenceSession=open_session,
        get_available_providers=lambda: names,
    )
    monkeypatch.setattr(onnxruntime, "_library", lambda: library)
    monkeypatch.setattr(onnxruntime, "load_library", lambda _: None)
    onnxruntime._open(b"", "a graph", provider, None, fp8_products=False)
    assert [each["device_id"] for each in asked.values()] == ["1"] * (1 + (provider == "tensorrt"))
    asked.clear()
    onnxruntime._open(b"", "a graph", "cpu", None, fp8_products=False)
    assert list(asked.values()) == [{}]


def test_onnx_runtime_reads_and_writes_there(monkeypatch):
    waited: list[torch.device] = []
    bound: list[tuple[str, int]] = []
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: waited.append(device) or stream)
    binding = SimpleNamespace(
        bind_input=lambda _, *place: bound.append(place[:2]),
        bind_output=lambda _, *place: bound.append(place),
        get_outputs=lambda: [SimpleNamespace(_ortvalue=torch.ones(1))],
    )
    runtime = object.__new__(OnnxRuntime)
    runtime._session = SimpleNamespace(io_binding=lambda: binding, run_with_iobinding=lambda _: None)
    runtime._outputs, runtime._device = ["logits"], torch.device("cuda", 1)
    assert runtime._run_bound({"images": torch.zeros(1)})["logits"] == 1
    assert waited == [torch.device("cuda", 1)] and bound == [("cuda", 1)] * 2


@pytest.mark.parametrize(("device", "number"), [("cuda", 1), ("cuda:0", 0)])
def test_engines_open_there_unless_another_is_named(device, number, monkeypatch):
    def require(index: int) -> None:
        raise BadInput(f"GPU {index}")

    monkeypatch.setattr(tensorrt, "read_sidecar", lambda _: None)
    monkeypatch.setattr(tensorrt, "require_gpu", require)
    with pytest.raises(BadInput, match=f"GPU {number}"):
        tensorrt.TensorRTRuntime(Path("model.engine"), device)
