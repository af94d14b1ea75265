"""Builds, through the real API: TensorRT needs a GPU, TensorRT-RTX builds without one by the same code."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import export_files
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tensorrt_files import ABOUT, FLOAT, PROFILE, graph, needs_no_gpu, needs_rtx, node

from coma.atomic_io import sha256_of
from coma.config import ViTConfig
from coma.errors import BadInput, CheckFailed, Interrupted
from coma.runtimes.shape_ranges import parse_shapes
from coma.runtimes.tensorrt.callbacks import make_logger
from coma.runtimes.tensorrt.discovery import load_library
from coma.runtimes.tensorrt.profiles import Profile, ShapeRange
from coma.runtimes.tensorrt.runtime import _open
from coma.runtimes.tensorrt.sidecar import EngineOptions, read_sidecar
from export.graphs.load import load_exportable
from export.onnx_export import cast_weights, write_onnx
from export.quantization import quantize_fp8, quantize_int8
from export.tensorrt.builder import (
    build_engine,
    compile_plan,
    configure,
    open_timing_cache,
    save_timing_cache,
)
from export.tensorrt.rtx import check_rtx

WEIGHT = np.random.default_rng(0).normal(size=(8, 8))
HALF = [
    node("Cast", "images", "half", to=TensorProto.FLOAT16),
    node("MatMul", "half", "weight", "product"),
    node("LayerNormalization", "product", "one", "zero", "normed"),
    node("Cast", "normed", "out", to=FLOAT),
]
HALF_CONSTANTS = {"weight": WEIGHT.astype("f2"), "one": np.ones(8, "f2"), "zero": np.zeros(8, "f2")}
REJECTED = [node("MatMul", "images", "weight", "product"), node("DynamicQuantizeLinear", "product", "out")]
FUSED_ATTENTION = b"_gemm_mha_v2_params_t"
"""What engines of TensorRT-RTX hold for every attention in one kernel."""
FAR_TOO_MANY = {"count": np.array([4000])}
"""A number of results of TopK that the parser takes; the compiler takes 3840 at most."""


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    return graph(tmp_path / "model.onnx", HALF, HALF_CONSTANTS)


@needs_rtx
def test_an_engine_and_its_sidecar_are_written(onnx_file: Path):
    path = onnx_file.with_name("model.engine")
    phases: list[tuple[str, int, int]] = []
    options = EngineOptions(workspace=64, builder_level=1)
    sidecar = build_engine(
        onnx_file, path, (PROFILE,), options, lambda *told: phases.append(told), flavour="tensorrt_rtx"
    )
    assert read_sidecar(path) == sidecar
    assert sidecar.spec == ABOUT and sidecar.profiles == (PROFILE,) and sidecar.options == options
    assert sidecar.engine_sha256 == sha256_of(path) and sidecar.onnx_sha256 == sha256_of(onnx_file)
    assert sidecar.layers >= len(HALF) and sidecar.gpu is None
    assert all(0 <= done <= steps for _, done, steps in phases) and len({name for name, *_ in phases}) > 3
    assert {each.name for each in path.parent.iterdir()} == {onnx_file.name, path.name, path.name + ".json"}


@needs_rtx
def test_what_is_no_file_of_ours_is_refused(tmp_path: Path):
    path = tmp_path / "model.onnx"

    def build() -> None:
        build_engine(path, tmp_path / "engine", (PROFILE,), flavour="tensorrt_rtx")

    with pytest.raises(BadInput, match="no such file"):
        build()
    path.write_bytes(b"\xff not protobuf")
    with pytest.raises(BadInput, match="not an ONNX file"):
        build()
    model = onnx.load(graph(path, HALF, HALF_CONSTANTS))
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(BadInput, match="holds no specification"):
        build()
    assert not (tmp_path / "engine").exists()


@needs_rtx
@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ((), "needs a profile"),
        ((Profile({"pictures": PROFILE.shapes["images"]}),), r"takes \['images'\]"),
        ((Profile({"images": ShapeRange((1, 4, 8), (2, 4, 8), (4, 4, 9))}),), "cannot be 4x4x9"),
        ((Profile({"images": ShapeRange((2, 4, 8), (1, 4, 8), (4, 4, 8))}),), "cannot be 1x4x8"),
    ],
)
def test_profiles_that_do_not_fit_the_graph_are_refused(onnx_file: Path, profiles: Any, message: str):
    with pytest.raises(BadInput, match=message):
        build_engine(onnx_file, onnx_file.with_name("engine"), profiles, flavour="tensorrt_rtx")


@needs_rtx
def test_what_the_parser_does_not_take_is_named(tmp_path: Path):
    file = graph(tmp_path / "model.onnx", REJECTED, {"weight": WEIGHT.astype("f4")})
    with pytest.raises(CheckFailed, match=r"node 1 /DynamicQuantizeLinear_out \(DynamicQuantizeLinear\)"):
        build_engine(file, tmp_path / "engine", (PROFILE,), flavour="tensorrt_rtx")


@needs_rtx
def test_a_build_that_gives_nothing_says_why(tmp_path: Path):
    top = helper.make_node("TopK", ["images", "count"], ["out", "indices"], axis=-1)
    file = graph(tmp_path / "model.onnx", [top], FAR_TOO_MANY, shape=["batch", 9000])
    profile = Profile({"images": ShapeRange((1, 9000), (1, 9000), (2, 9000))})
    with pytest.raises(CheckFailed, match=r"built no engine: .*K exceeds the maximum"):
        build_engine(file, tmp_path / "engine", (profile,), flavour="tensorrt_rtx")
    assert not (tmp_path / "engine").exists()


@needs_rtx
def test_ctrl_c_leaves_the_old_engine_and_nothing_else(onnx_file: Path):
    path = onnx_file.with_name("model.engine")
    path.write_bytes(b"the old one")

    heard = threading.Event()

    def hear(*_: object) -> None:
        heard.set()
        raise KeyboardInterrupt

    def interrupt(phase: str, done: int, steps: int) -> None:
        if not heard.is_set():  # once: another phase may start before the build ends, and the test after it
            os.kill(os.getpid(), signal.SIGINT)
            assert heard.wait(30)
            time.sleep(0.2)  # until it has got from the main thread to the build

    before = signal.signal(signal.SIGINT, hear)
    try:
        with pytest.raises(Interrupted, match="cancelled; nothing was written"):
            build_engine(onnx_file, path, (PROFILE,), progress=interrupt, flavour="tensorrt_rtx")
    finally:
        signal.signal(signal.SIGINT, before)
    assert path.read_bytes() == b"the old one"
    assert {each.name for each in path.parent.iterdir()} == {onnx_file.name, path.name}


@needs_rtx
def test_an_error_of_the_progress_bar_ends_the_build_and_is_raised(onnx_file: Path):
    def fail(phase: str, done: int, steps: int) -> None:
        raise ValueError("no terminal")

    with pytest.raises(ValueError, match="no terminal"):
        build_engine(
            onnx_file, onnx_file.with_name("engine"), (PROFILE,), progress=fail, flavour="tensorrt_rtx"
        )


@needs_rtx
def test_options_become_settings():
    trt = load_library("tensorrt_rtx").module
    builder = trt.Builder(make_logger(trt))
    config = builder.create_builder_config()
    flags = {"TF32": "tf32", "VERSION_COMPATIBLE": "version_compatible", "REFIT": "refit"}
    for wanted in (True, False):
        configure(trt, config, EngineOptions(**{option: wanted for option in flags.values()}))  # type: ignore[arg-type]
        assert {flag: config.get_flag(getattr(trt.BuilderFlag, flag)) for flag in flags} == dict.fromkeys(
            flags, wanted
        )
    configure(trt, config, EngineOptions(workspace=32, builder_level=5))
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 32 * 2**20
    assert config.builder_optimization_level == 5


@needs_rtx
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_a_timing_cache_is_written_and_read_again(tmp_path: Path):
    """Through the real API; that it saves time only TensorRT itself could show."""
    trt = load_library("tensorrt_rtx").module
    builder = trt.Builder(make_logger(trt))
    config = builder.create_builder_config()
    path = tmp_path / "timing.cache"
    for _ in range(2):
        open_timing_cache(config, path)
        save_timing_cache(config, path)
        assert path.stat().st_size > 0


@needs_rtx
@needs_no_gpu
def test_an_engine_that_does_not_open_says_why(onnx_file: Path):
    path = onnx_file.with_name("model.engine")
    build_engine(onnx_file, path, (PROFILE,), flavour="tensorrt_rtx")
    trt = load_library("tensorrt_rtx").module
    with pytest.raises(CheckFailed, match=r"does not open: .*CUDA driver version is insufficient"):
        _open(trt, make_logger(trt), path, host_code=False)


@needs_rtx
def test_the_check_without_a_gpu_reports_what_it_proves(onnx_file: Path):
    report = check_rtx(onnx_file, (PROFILE,))
    assert report.engine_bytes > 1000 and report.layers >= len(HALF) and report.seconds > 0
    assert "TensorRT is another product" in report.proves


@needs_rtx
def test_a_graph_that_crashes_the_compiler_does_not_crash_us(tmp_path: Path):
    attention = [node("Attention", "images", "images", "images", "out")]
    file = graph(tmp_path / "model.onnx", attention, opset=23, shape=["batch", 4, 16, 8])
    profile = Profile({"images": ShapeRange((1, 4, 16, 8), (2, 4, 16, 8), (4, 4, 16, 8))})
    with pytest.raises(CheckFailed, match=r"crashed on this graph \(its process was killed by SIGSEGV\)"):
        check_rtx(file, (profile,))


@needs_rtx
def test_errors_of_the_check_come_through(tmp_path: Path):
    file = graph(tmp_path / "model.onnx", REJECTED, {"weight": WEIGHT.astype("f4")})
    with pytest.raises(CheckFailed, match="DynamicQuantizeLinear"):
        check_rtx(file, (PROFILE,))


@needs_rtx
@needs_no_gpu
def test_a_plugin_that_only_lacks_a_gpu_is_not_called_unsupported(tmp_path: Path):
    align = node("RoiAlign", "images", "boxes", "which", "out", output_height=2, output_width=2)
    constants = {"boxes": np.zeros((5, 4), "f4"), "which": np.zeros(5, "i8")}
    file = graph(tmp_path / "model.onnx", [align], constants, shape=[1, 4, 8, 8])
    with pytest.raises(CheckFailed, match=r"RoiAlign\): .*This is inconclusive"):
        check_rtx(file, ())


INT8 = [
    node("QuantizeLinear", "images", "scale", "zero", "quantized"),
    node("DequantizeLinear", "quantized", "scale", "zero", "known"),
    node("DequantizeLinear", "weight", "scales", "zeros", "weights", axis=1),
    node("MatMul", "known", "weights", "out"),
]
INT8_CONSTANTS = {
    "scale": np.float32(0.02),
    "zero": np.int8(0),
    "weight": (WEIGHT * 20).astype("i1"),
    "scales": np.full(8, 0.05, "f4"),
    "zeros": np.zeros(8, "i1"),
}


@needs_rtx
def test_explicit_int8_is_taken(tmp_path: Path):
    file = graph(tmp_path / "model.onnx", INT8, INT8_CONSTANTS, about=replace(ABOUT, precision="int8"))
    sidecar = build_engine(file, tmp_path / "engine", (PROFILE,), flavour="tensorrt_rtx")
    assert sidecar.spec.precision == "int8"


@needs_rtx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.onnx warns of itself
def test_attention_is_fused_where_what_is_not_quantised_is_in_16_bits(tmp_path: Path):
    model = ViTConfig(patch=16, dim=64, depth=1, heads=2)
    exportable = load_exportable(export_files.classifier(tmp_path / "artifact", model), "classifier")
    shapes, library = parse_shapes("2x96x96", 3), load_library("tensorrt_rtx")
    files = {name: tmp_path / f"{name}.onnx" for name in ("fp32", "fp16", "int8", "int8+fp16", "fp8+fp16")}
    for precision in ("fp32", "fp16"):
        write_onnx(cast_weights(exportable, precision), shapes, files[precision])
    batches = [{"images": np.random.default_rng(0).normal(size=(2, 3, 96, 96)).astype("f4")}]
    quantize_int8(files["fp32"], files["int8"], batches)
    quantize_int8(files["fp16"], files["int8+fp16"], batches)
    quantize_fp8(files["fp16"], files["fp8+fp16"], batches)
    fused = {
        name: bytes(compile_plan(library, file, (), EngineOptions()).data).count(FUSED_ATTENTION) > 0
        for name, file in files.items()
    }
    assert fused == {"fp32": False, "fp16": True, "int8": False, "int8+fp16": True, "fp8+fp16": True}
