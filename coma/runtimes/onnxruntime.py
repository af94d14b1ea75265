"""ONNX Runtime, with the provider that was asked for or an error: never another one in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from coma.errors import BadInput, CheckFailed
from coma.library_errors import first_line, library_errors, load_packages
from coma.runtimes.base import check_inputs
from coma.runtimes.model_spec import ModelSpec, read_model_spec
from coma.runtimes.trt.discovery import load_library

Provider = Literal["cpu", "cuda", "tensorrt"]
EMULATED = "coma.emulated"
"""In a graph's metadata: what it emulates, "fp16" or "bf16"."""
ORT_FP8_ENTRY = ("session.disable_quant_qdq", "1")
"""Session configuration without which ONNX Runtime moves fp8 pairs past transpositions, which it then refuses
to compute in fp8."""
_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_STRICT = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""Options of providers: fp32 products with all bits of the mantissa, as PyTorch's, not with 10."""
_LACKING = {
    "cuda": "no GPU, or CUDA and cuDNN of another version",
    "tensorrt": "no GPU, or TensorRT 10's libraries were not found (pip install 'tensorrt-cu13<11')",
}
"""Why another provider stood in, most likely."""
_STILL = ("session.force_spinning_stop", "1")
"""Threads wait actively within a run, but not after it: PyTorch, run in turns with it on two cores, took
twice as long."""


class OnnxRuntime:
    """A session on one ONNX file.

    On GPUs inputs and outputs stay there (IO binding); nothing goes through the host.

    Args:
        path: The file, or its content. The CPU runs bf16 only emulated (`export.half_precision_emulation`).
        provider: Who computes.
        threads: Of a CPU; default: all cores.
        extra_outputs: Hand out all outputs of the graph, not only those of the description.

    Raises:
        BadInput: a package is missing, the file is none of ours, or the provider is not at hand or cannot
            compute in the file's precision.
        CheckFailed: ONNX Runtime cannot load this file.
    """

    def __init__(
        self,
        path: Path | bytes,
        provider: Provider = "cpu",
        threads: int | None = None,
        extra_outputs: bool = False,
    ) -> None:
        name = path.name if isinstance(path, Path) else "the graph"
        self.description, emulated = _read(path, name)
        precision = self.description.precision
        if precision == "bf16" and provider == "cpu" and not emulated:
            raise BadInput(f"{name}: ONNX Runtime computes no bf16 on a CPU; it needs a GPU (cuda)")
        self._session = _open(path, name, provider, threads, fp8_products=precision == "fp8")
        self.title = f"ONNX Runtime {_library().__version__}, {provider}"
        if emulated:
            self.title += f", {emulated} emulated"
        self._device = torch.device("cpu" if provider == "cpu" else "cuda")
        ours = [port.name for port in self.description.outputs]
        self._outputs = [out.name for out in self._session.get_outputs()] if extra_outputs else ours

    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Run; see `Runtime`."""
        inputs = check_inputs(self.description, images, others)
        if self._device.type == "cuda":
            return self._run_bound(
                {name: each.to(self._device).contiguous() for name, each in inputs.items()}
            )
        feeds = {name: each.detach().cpu().numpy() for name, each in inputs.items()}
        with _refusing(inputs):
            outputs = self._session.run(self._outputs, feeds)
        return dict(zip(self._outputs, map(torch.from_numpy, outputs), strict=True))

    def _run_bound(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.cuda.current_stream().synchronize()
        with _refusing(inputs):
            binding = self._session.io_binding()
            for name, each in inputs.items():
                kind = np.dtype(str(each.dtype).removeprefix("torch.")).type
                binding.bind_input(name, "cuda", 0, kind, tuple(each.shape), each.data_ptr())
            for name in self._outputs:
                binding.bind_output(name, "cuda", 0)
            self._session.run_with_iobinding(binding)
        return {
            name: torch.from_dlpack(value._ortvalue)
            for name, value in zip(self._outputs, binding.get_outputs(), strict=True)
        }


def providers() -> list[Provider]:
    """Those that this build of ONNX Runtime has; whether they start shows when a file is loaded.

    Raises:
        BadInput: it is not installed.
    """
    there = _library().get_available_providers()
    return [name for name, title in _PROVIDERS.items() if title in there]


def require_provider(provider: Provider) -> None:
    """Opens a session on a graph of one node, before anything is traced for this provider.

    Raises:
        BadInput: a package is missing, or the provider does not start here.
    """
    load_packages("onnx", "onnxruntime")
    from onnx import helper

    ports = [helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    _open(model.SerializeToString(), "a first graph", provider, None, fp8_products=False)


def _library() -> Any:
    load_packages("onnxruntime")
    import onnxruntime

    return onnxruntime


def _read(path: Path | bytes, name: str) -> tuple[ModelSpec, str | None]:
    # what a file says of itself, and what it emulates: before a session, whose settings depend on it
    load_packages("onnx")
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    if isinstance(path, Path) and not path.is_file():
        raise BadInput(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    with library_errors(f"{name}: not a readable ONNX file", BadInput):
        content = path.read_bytes() if isinstance(path, Path) else path
        model = onnx.load_model_from_string(content)
        outside = any(map(uses_external_data, _get_all_tensors(model)))
    if outside:
        raise BadInput(
            f"{name}: keeps weights in other files, as no file of `coma export` does; export it again"
        )
    emulated = {each.key: each.value for each in model.metadata_props}.get(EMULATED)
    return read_model_spec(model, name), emulated


def _open(path: Path | bytes, name: str, provider: Provider, threads: int | None, fp8_products: bool) -> Any:
    library = _library()
    wanted = _PROVIDERS[provider]
    if provider not in providers():
        raise BadInput(
            f"{provider}: this build of ONNX Runtime has no {wanted}, only {', '.join(providers())}"
        )
    options = library.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry(*_STILL)
    if fp8_products:
        options.add_session_config_entry(*ORT_FP8_ENTRY)
    names = [wanted]
    if provider == "tensorrt":
        names.append(_PROVIDERS["cuda"])
        with suppress(BadInput):  # only the package knows where pip put TensorRT's libraries
            load_library("tensorrt")
    try:
        session = library.InferenceSession(
            str(path) if isinstance(path, Path) else path,
            options,
            providers=[(each, _STRICT.get(each, {})) for each in names],
        )
    except Exception as error:
        raise CheckFailed(f"{name}: ONNX Runtime cannot load it: {first_line(error)}") from None
    used = session.get_providers()[0]
    if used != wanted:
        raise BadInput(f"{provider}: ONNX Runtime fell back to {used}: {_LACKING[provider]}")
    return session


@contextmanager
def _refusing(inputs: dict[str, Tensor]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library has no public class for it
        shapes = ", ".join(f"{name} {list(each.shape)}" for name, each in inputs.items())
        raise BadInput(f"ONNX Runtime could not run {shapes}: {first_line(error)}") from None
