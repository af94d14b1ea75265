"""The TensorRT runtime. Tensors stay on the GPU, and work is queued on a stream of the runtime's own.

On the default stream TensorRT would synchronise with the CPU at every call. Events order the work behind what
PyTorch's current stream has queued, and what follows there behind the work.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coma.devices import current_gpu
from coma.errors import BadInput, CheckFailed
from coma.library_errors import library_errors
from coma.runtimes.base import DTYPES, check_inputs
from coma.runtimes.model_spec import TensorSpec
from coma.runtimes.tensorrt.callbacks import make_logger
from coma.runtimes.tensorrt.discovery import load_library, require_gpu
from coma.runtimes.tensorrt.engine_info import EngineSummary, inspect_engine
from coma.runtimes.tensorrt.profiles import Shape, choose_profile, written
from coma.runtimes.tensorrt.sidecar import REBUILD, check_fits, read_sidecar

log = logging.getLogger(__name__)

CAPTURED = 4
"""Maximum number of CUDA graphs, one per shape; each has its own memory."""


class TensorRTRuntime:
    """Runs an engine on one GPU. Implements `coma.runtimes.base.Runtime`.

    Args:
        path: The engine, with its sidecar beside it. Opening an engine runs code that it contains.
        device: "cuda", which is the current device of PyTorch, or "cuda:1".
        cuda_graphs: Whether to record a CUDA graph per shape and replay it, which is faster for small
            batches; the last four shapes are kept.

    Raises:
        BadInput: there is no GPU or no TensorRT, or the engine is not for them; the message says what to do.
        CheckFailed: TensorRT refuses an engine whose sidecar matches.
    """

    def __init__(self, path: Path, device: str | torch.device = "cuda", *, cuda_graphs: bool = False) -> None:
        self.device = torch.device(device)
        if self.device.type != "cuda":
            raise BadInput(f"TensorRT runs on NVIDIA GPUs only, not on {device}; use ONNX Runtime instead")
        index = current_gpu() if self.device.index is None else self.device.index
        sidecar = read_sidecar(path)
        gpu, _ = require_gpu(index)
        if not torch.cuda.is_available():
            raise BadInput("TensorRT needs a PyTorch with CUDA, which this one is not; install one")
        library = load_library(sidecar.flavour)
        check_fits(sidecar, path, library, gpu)
        self.device = torch.device("cuda", index)
        self.title = f"{library.title} {gpu.name}" + (" CUDA graphs" if cuda_graphs else "")
        self.spec = sidecar.spec
        self._profiles = sidecar.profiles
        self._path = path
        self._trt = library.module
        self._logger = make_logger(library.module)
        with torch.cuda.device(self.device), library_errors(f"{path}: does not open"):
            self._runtime, self._engine = _open(
                self._trt, self._logger, path, host_code=sidecar.options.version_compatible
            )
            self._stream = torch.cuda.Stream()
        _check_tensors(self._trt, self._engine, path, (*self.spec.inputs, *self.spec.outputs))
        self._contexts: dict[int, Any] = {}
        self._captured: OrderedDict[tuple[Shape, ...], _Captured | None] | None = (
            OrderedDict() if cuda_graphs else None
        )

    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Runs the engine; the outputs are ready once PyTorch's current stream has finished.

        Raises:
            BadInput: an input has the wrong name, type or shape; the message says what the engine takes.
            CheckFailed: TensorRT refused to run.
        """
        given = check_inputs(self.spec, images, others)
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        profile = choose_profile(self._profiles, shapes) if self._profiles else 0
        with torch.cuda.device(self.device):
            placed = {name: tensor.detach().to(self.device).contiguous() for name, tensor in given.items()}
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                outputs = self._run(profile, placed)
            caller.wait_stream(self._stream)
            # neither allocator may reuse memory that the other stream still reads
            for tensor in placed.values():
                tensor.record_stream(self._stream)
            for tensor in outputs.values():
                tensor.record_stream(caller)
            return outputs

    def _run(self, profile: int, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs the engine on the current stream, which is the runtime's."""
        captured = self._capture_for(profile, inputs)
        if captured is not None:
            return captured.replay(inputs)
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        context = self._contexts[profile]
        outputs = self._bind(context, inputs)
        self._enqueue(context)
        return outputs

    @property
    def largest_batch(self) -> int | None:
        """Returns the largest batch of images that a profile takes; None without profiles."""
        return max((each.shapes["images"].maximum[0] for each in self._profiles), default=None)

    def inspect(self) -> EngineSummary:
        """Returns a summary of the engine's layers."""
        return inspect_engine(self._trt, self._engine)

    def _new_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise self._failed("cannot create an execution context; GPU memory may be too small")
        if not context.set_optimization_profile_async(profile, torch.cuda.current_stream().cuda_stream):
            raise self._failed(f"has no profile {profile}")
        return context

    def _bind(self, context: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Binds inputs to the context, and outputs that it allocates."""
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise self._failed(f"does not take {name} {written(tensor.shape)}")
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for each in self.spec.outputs:
            shape = tuple(context.get_tensor_shape(each.name))
            if min(shape, default=1) < 0:
                raise self._failed(f"has a shape of {each.name} that depends on the data")
            outputs[each.name] = torch.empty(shape, dtype=DTYPES[each.dtype], device=self.device)
            context.set_tensor_address(each.name, outputs[each.name].data_ptr())
        return outputs

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise self._failed("did not run")

    def _failed(self, what: str) -> CheckFailed:
        return CheckFailed(f"{self._path}: {what}: {self._logger.last_errors()}")

    def _capture_for(self, profile: int, inputs: Mapping[str, Tensor]) -> _Captured | None:
        """Returns the CUDA graph for these shapes, or None; records it if it is new."""
        if self._captured is None:
            return None
        shapes = tuple(tuple(tensor.shape) for tensor in inputs.values())
        if shapes not in self._captured:
            self._captured[shapes] = self._capture(profile, inputs)
            if len(self._captured) > CAPTURED:
                self._captured.popitem(last=False)
        self._captured.move_to_end(shapes)
        return self._captured[shapes]

    def _capture(self, profile: int, inputs: Mapping[str, Tensor]) -> _Captured | None:
        context = self._new_context(profile)  # a CUDA graph holds the state of its context
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs = self._bind(context, held)
        self._enqueue(context)  # work that TensorRT does at the first run cannot be recorded
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._enqueue(context)
        except (RuntimeError, CheckFailed) as error:
            log.warning("%s: runs without CUDA graphs because recording failed: %s", self._path, error)
            return None
        return _Captured(graph, context, held, outputs)


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    context: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def replay(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, held in self.inputs.items():
            held.copy_(inputs[name])
        self.graph.replay()
        return {name: output.clone() for name, output in self.outputs.items()}


def _open(trt: Any, logger: Any, path: Path, *, host_code: bool) -> tuple[Any, Any]:
    trt.init_libnvinfer_plugins(logger, "")
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = host_code  # a version-compatible engine brings its own runtime
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise CheckFailed(f"{path}: does not open: {logger.last_errors()}; {REBUILD}")
    return runtime, engine


def _check_tensors(trt: Any, engine: Any, path: Path, tensors: tuple[TensorSpec, ...]) -> None:
    """Checks that the engine has the tensors of its specification."""
    types = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.UINT8: "uint8",
        trt.DataType.BOOL: "bool",
        trt.DataType.INT64: "int64",
    }
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: types.get(engine.get_tensor_dtype(name)) for name in names}
    if found != {each.name: each.dtype for each in tensors}:
        described = ", ".join(f"{each.name} {each.dtype}" for each in tensors)
        has = ", ".join(f"{name} {engine.get_tensor_dtype(name)}" for name in names)
        raise BadInput(f"{path}: has {has}, and its sidecar describes {described}; {REBUILD}")
