"""From an ONNX file to an engine: parse, set the shapes and limits, compile, write with its sidecar."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coma.atomic_io import sha256_of
from coma.errors import BadInput, CheckFailed, Interrupted
from coma.library_errors import library_errors, load_packages
from coma.runtimes.model_spec import ModelSpec
from coma.runtimes.tensorrt.callbacks import Progress, make_logger, make_monitor
from coma.runtimes.tensorrt.discovery import Flavour, Library, load_library, require_gpu
from coma.runtimes.tensorrt.profiles import Profile, Shape, check_profiles
from coma.runtimes.tensorrt.sidecar import EngineOptions, Sidecar, write_sidecar

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A compiled engine.

    Attributes:
        data: Its bytes, as TensorRT holds them.
        layers: Of the network, before TensorRT fused any.
        seconds: That parsing and compiling took.
    """

    data: memoryview
    layers: int
    seconds: float


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    profiles: tuple[Profile, ...],
    options: EngineOptions | None = None,
    progress: Progress | None = None,
    *,
    flavour: Flavour = "tensorrt",
) -> Sidecar:
    """Build an engine for the shapes of `profiles` and write it, and what is known of it beside it.

    Args:
        onnx_path: Written by this toolkit: its metadata are kept in the sidecar.
        engine_path: Where the engine goes; replaced whole, or not at all.
        profiles: At least one, unless all shapes are fixed.
        options: Default: those of `EngineOptions`.
        progress: Called as `progress(phase, done, steps)` from another thread; phases lie in each other.
        flavour: tensorrt_rtx needs no GPU, and its engines run on RTX cards only.

    Raises:
        BadInput: no TensorRT, no GPU, not an ONNX file of ours, or profiles that do not fit it.
        CheckFailed: TensorRT does not take the graph; the message says which nodes, or its last errors.
        Interrupted: Ctrl-C; nothing was written.
    """
    options = options or EngineOptions()
    spec = _description(onnx_path)
    library = load_library(flavour)
    gpu, driver = require_gpu() if flavour == "tensorrt" else (None, None)
    try:
        plan = compile_plan(library, onnx_path, profiles, options, progress)
    except KeyboardInterrupt:
        raise Interrupted(f"{engine_path}: the build was cancelled; nothing was written") from None
    _write(engine_path, plan.data)
    sidecar = Sidecar(
        flavour=flavour,
        version=library.version,
        cuda=driver and driver.cuda,
        gpu=gpu,
        onnx_sha256=sha256_of(onnx_path),
        engine_sha256=hashlib.sha256(plan.data).hexdigest(),
        profiles=profiles,
        options=replace(options, timing_cache=None),
        spec=spec,
        layers=plan.layers,
        seconds=round(plan.seconds, 1),
    )
    write_sidecar(engine_path, sidecar)
    return sidecar


def _description(onnx_path: Path) -> ModelSpec:
    load_packages("onnx")
    import onnx

    from coma.runtimes.model_spec import read_model_spec

    if not onnx_path.is_file():
        raise BadInput(f"{onnx_path}: no such file")
    with library_errors(f"{onnx_path}: not an ONNX file", BadInput):
        model = onnx.load(str(onnx_path), load_external_data=False)
    return read_model_spec(model, str(onnx_path))


def _write(engine_path: Path, data: memoryview) -> None:
    from coma.atomic_io import write_whole

    write_whole(engine_path, lambda file: file.write(data))


def compile_plan(
    library: Library,
    onnx_path: Path,
    profiles: Sequence[Profile],
    options: EngineOptions,
    progress: Progress | None = None,
) -> Plan:
    """Parse and compile, in a thread, so that Ctrl-C is heard meanwhile.

    Raises:
        BadInput: no such file, or profiles that do not fit it.
        CheckFailed: TensorRT does not take the graph.
        KeyboardInterrupt: after TensorRT has stopped, at the end of the step it was in.
    """
    if not onnx_path.is_file():
        raise BadInput(f"{onnx_path}: no such file")
    cancelled = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt") as thread:
        work = thread.submit(_compile, library, onnx_path, profiles, options, progress, cancelled)
        try:
            return work.result()
        except BaseException:
            cancelled.set()
            raise


def _compile(
    library: Library,
    onnx_path: Path,
    profiles: Sequence[Profile],
    options: EngineOptions,
    progress: Progress | None,
    cancelled: threading.Event,
) -> Plan:
    started = time.perf_counter()
    trt = library.module
    with library_errors(f"{onnx_path}: {library.title} failed"):
        logger = make_logger(trt)
        trt.init_libnvinfer_plugins(logger, "")
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx_path)):
            raise CheckFailed(
                f"{onnx_path}: {library.title} does not take it: {_parser_errors(parser, logger)}"
            )
        check_profiles(profiles, _inputs(network), str(onnx_path))
        config = builder.create_builder_config()
        configure(trt, config, options)
        if options.version_compatible:
            config.plugins_to_serialize = parser.get_used_vc_plugin_libraries()
        for profile in profiles:
            _add_profile(builder, config, profile)
        monitor = make_monitor(trt, cancelled, progress)
        config.progress_monitor = monitor
        cache = options.timing_cache if library.flavour == "tensorrt" else None  # RTX measures nothing
        if cache is not None:
            open_timing_cache(config, cache)
        memory = builder.build_serialized_network(network, config)
    monitor.check()
    if memory is None:
        why = "cancelled" if cancelled.is_set() else logger.last_errors()
        raise CheckFailed(f"{onnx_path}: {library.title} built no engine: {why}")
    if cache is not None:
        try:
            save_timing_cache(config, cache)
        except OSError as error:  # the engine is complete all the same
            log.warning("%s: the timing cache was not saved (%s)", cache, error.strerror or error)
    return Plan(memoryview(memory).cast("B"), network.num_layers, time.perf_counter() - started)


def configure(trt: Any, config: Any, options: EngineOptions) -> None:
    """Everything of `options` that is a setting of TensorRT's."""
    levels = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    }
    flags = {
        trt.BuilderFlag.TF32: options.tf32,
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
        trt.BuilderFlag.REFIT: options.refit,
    }
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    config.builder_optimization_level = options.builder_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the inspector; costs no time
    config.hardware_compatibility_level = levels[options.hardware_compatibility]
    for flag, wanted in flags.items():
        change: Callable[[Any], None] = config.set_flag if wanted else config.clear_flag
        change(flag)


def _inputs(network: Any) -> Mapping[str, Shape]:
    shapes = {}
    for index in range(network.num_inputs):
        network_input = network.get_input(index)
        shapes[network_input.name] = tuple(network_input.shape)
    return shapes


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    ranges = builder.create_optimization_profile()
    for name, shapes in profile.shapes.items():
        ranges.set_shape(name, shapes.minimum, shapes.optimum, shapes.maximum)
    config.add_optimization_profile(ranges)


def _parser_errors(parser: Any, logger: Any) -> str:
    texts = []
    for index in range(parser.num_errors):
        fault = parser.get_error(index)
        why = " ".join(fault.desc().split())
        texts.append(f"node {fault.node()} {fault.node_name()} ({fault.node_operator()}): {why}")
    return "; ".join(texts) or logger.last_errors()


def open_timing_cache(config: Any, path: Path) -> None:
    """Let the build use what the file holds; an empty one where there is none.

    Raises:
        BadInput: the file is not a timing cache, or of another GPU or TensorRT.
    """
    known = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BadInput(
            f"{path}: not a timing cache of this GPU and this TensorRT; give another file, or delete it"
        )


def save_timing_cache(config: Any, path: Path) -> None:
    """Write what was there and what the build measured, and what another build has written meanwhile.

    Raises:
        OSError: the disk is full, or not to be written.
    """
    from coma.atomic_io import write_whole

    cache = config.get_timing_cache()
    if path.exists():
        other = config.create_timing_cache(path.read_bytes())
        if other is not None:
            cache.combine(other, ignore_mismatch=False)
    data = memoryview(cache.serialize()).cast("B")
    write_whole(path, lambda file: file.write(data))
