"""The ONNX Runtime runtime. It uses the requested execution provider or fails; it never falls back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coma.devices import current_gpu
from coma.errors import BadInput, CheckFailed
from coma.library_errors import first_line, load_packages
from coma.runtimes.base import check_inputs
from coma.runtimes.model_spec import eight_bit_part
from coma.runtimes.names import Provider
from coma.runtimes.onnx_file import ORT_WEIGHTS_FOLDER, name_of, read_onnx_file
from coma.runtimes.shape_ranges import Shapes
from coma.runtimes.tensorrt.discovery import load_library
from coma.runtimes.tensorrt.provider import provider_options

ORT_FP8_ENTRY = ("session.disable_quant_qdq", "1")
"""Session option for fp8 files. Without it ONNX Runtime moves Q/DQ pairs past transpositions, which it then
refuses to compute in fp8."""
_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}}
"""Provider options: fp32 matrix multiplications without TF32, as in PyTorch; and no exhaustive search for
the algorithms of convolutions, which would take place again for every size of image."""
_LACKING = {
    "cuda": "no GPU, or CUDA and cuDNN of another version",
    "tensorrt": "no GPU, or the libraries of TensorRT 10 were not found (pip install 'tensorrt-cu13<11')",
}
"""Likely reason why a provider did not start."""
_STOP_SPINNING = ("session.force_spinning_stop", "1")
"""Session option that ends the active waiting of threads after a run. Otherwise PyTorch took twice as long
when both ran in turns on two cores."""


class OnnxRuntime:
    """Runs an ONNX file with ONNX Runtime.

    On a GPU, inputs and outputs stay there (IO binding); it is the current device of PyTorch.

    Args:
        path: The file, or its content. bf16 runs on a CPU only as an emulation (`onnx_file.EMULATED`).
        provider: Execution provider.
        threads: Number of CPU threads (default: all cores).
        extra_outputs: Return all outputs of the graph, not only those of the specification.
        folder: Folder of the weights file of a content, if it has one.
        shapes: Shapes to prepare the provider tensorrt for; by default it builds engines as shapes occur.

    Raises:
        BadInput: a package is missing, coma export did not write the file, or the provider does not start or
            does not support the precision.
        CheckFailed: ONNX Runtime cannot load the file.
    """

    def __init__(
        self,
        path: Path | bytes,
        provider: Provider = "cpu",
        threads: int | None = None,
        extra_outputs: bool = False,
        folder: Path | None = None,
        shapes: Shapes | None = None,
    ) -> None:
        name = name_of(path)
        self.spec, emulated = read_onnx_file(path, folder)
        precision = self.spec.precision
        if precision == "bf16" and provider == "cpu" and not emulated:
            raise BadInput(f"{name}: ONNX Runtime has no bf16 on a CPU; use a GPU (cuda)")
        kept = path if isinstance(path, Path) else None
        options = provider_options(kept, self.spec, shapes) if provider == "tensorrt" else {}
        fp8_products = eight_bit_part(precision) == "fp8"
        self._session = _open(path, name, provider, threads, fp8_products, folder, options)
        self.title = f"ONNX Runtime {_library().__version__}, {provider}"
        if emulated:
            self.title += f", {emulated} emulated"
        self._device = torch.device("cpu") if provider == "cpu" else torch.device("cuda", current_gpu())
        ours = [each.name for each in self.spec.outputs]
        self._outputs = [out.name for out in self._session.get_outputs()] if extra_outputs else ours

    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Runs the model; see `Runtime`."""
        inputs = check_inputs(self.spec, images, others)
        if self._device.type == "cuda":
            return self._run_bound(
                {name: each.to(self._device).contiguous() for name, each in inputs.items()}
            )
        feeds = {name: each.detach().cpu().numpy() for name, each in inputs.items()}
        with _refusing(inputs):
            outputs = self._session.run(self._outputs, feeds)
        return dict(zip(self._outputs, map(torch.from_numpy, outputs), strict=True))

    def _run_bound(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.cuda.current_stream(self._device).synchronize()
        gpu = self._device.index
        with _refusing(inputs):
            binding = self._session.io_binding()
            for name, each in inputs.items():
                kind = np.dtype(str(each.dtype).removeprefix("torch.")).type
                binding.bind_input(name, "cuda", gpu, kind, tuple(each.shape), each.data_ptr())
            for name in self._outputs:
                binding.bind_output(name, "cuda", gpu)
            self._session.run_with_iobinding(binding)
        return {
            name: torch.from_dlpack(value._ortvalue)
            for name, value in zip(self._outputs, binding.get_outputs(), strict=True)
        }


def providers() -> list[Provider]:
    """Returns the providers of the installed ONNX Runtime; whether they start shows when a file is loaded.

    Raises:
        BadInput: ONNX Runtime is not installed.
    """
    there = _library().get_available_providers()
    return [name for name, title in _PROVIDERS.items() if title in there]


def require_provider(provider: Provider) -> None:
    """Checks that a provider starts by opening a graph of one node.

    Raises:
        BadInput: a package is missing, or the provider does not start.
    """
    load_packages("onnx", "onnxruntime")
    from onnx import helper

    values = [helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    _open(model.SerializeToString(), "a test graph", provider, None, fp8_products=False)


def _library() -> Any:
    load_packages("onnxruntime")
    import onnxruntime

    return onnxruntime


def _open(
    path: Path | bytes,
    name: str,
    provider: Provider,
    threads: int | None,
    fp8_products: bool,
    folder: Path | None = None,
    own_options: Mapping[str, str] | None = None,
) -> Any:
    library = _library()
    wanted = _PROVIDERS[provider]
    if provider not in providers():
        raise BadInput(
            f"{provider}: this build of ONNX Runtime has no {wanted}, only {', '.join(providers())}"
        )
    options = library.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry(*_STOP_SPINNING)
    if folder:
        options.add_session_config_entry(ORT_WEIGHTS_FOLDER, str(folder))
    if fp8_products:
        options.add_session_config_entry(*ORT_FP8_ENTRY)
    names, place = [wanted], {} if provider == "cpu" else {"device_id": str(current_gpu())}
    if provider == "tensorrt":
        names.append(_PROVIDERS["cuda"])
        with suppress(BadInput):  # loads the libraries that pip installed
            load_library("tensorrt")
    try:
        session = library.InferenceSession(
            str(path) if isinstance(path, Path) else path,
            options,
            providers=[(each, _OPTIONS.get(each, dict(own_options or {})) | place) for each in names],
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
