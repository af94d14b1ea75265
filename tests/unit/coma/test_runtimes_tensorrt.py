"""Engines: which shapes they take, what their sidecars say and refuse, what is said where there is no GPU."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensorrt_files import ABOUT, IMAGES, PROFILE, needs_no_gpu

from coma.atomic_io import sha256_of
from coma.errors import BadInput
from coma.runtimes.model_spec import TensorSpec
from coma.runtimes.shape_ranges import parse_shapes
from coma.runtimes.tensorrt import discovery as library_module
from coma.runtimes.tensorrt.discovery import Driver, Gpu, Library, load_library, require_gpu
from coma.runtimes.tensorrt.engine_info import summarize
from coma.runtimes.tensorrt.profiles import Profile, ShapeRange, choose_profile, make_profile, profile_of
from coma.runtimes.tensorrt.provider import provider_options
from coma.runtimes.tensorrt.runtime import TensorRTRuntime
from coma.runtimes.tensorrt.sidecar import (
    EngineOptions,
    Sidecar,
    check_fits,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)

H200 = Gpu("NVIDIA H200", "9.0")
H100 = Gpu("NVIDIA H100", "9.0")
L4 = Gpu("NVIDIA L4", "8.9")
T4 = Gpu("Tesla T4", "7.5")
TRT = Library("tensorrt", "10.13.3.9", None)

VISIBLE = TensorSpec("visible", "bool", ("batch", "rows", "cols"))

# Profiles


def test_a_profile_follows_the_images_and_their_masks():
    spec = replace(
        ABOUT,
        inputs=(
            TensorSpec("images", "float32", ("batch", 3, "height", 64)),
            VISIBLE,
        ),
        unit=32,
    )
    profile = profile_of(spec, parse_shapes("1x3x32x64:2x3x70x64:8x3x96x64", 3))
    assert profile.shapes["images"] == ShapeRange((1, 3, 32, 64), (2, 3, 70, 64), (8, 3, 96, 64))
    assert profile.shapes["visible"] == ShapeRange((1, 1, 2), (2, 3, 2), (8, 3, 2))


def test_a_profile_needs_sizes_that_grow_of_every_axis():
    with pytest.raises(BadInput, match="sizes of the axes batch"):
        make_profile([IMAGES], {})
    with pytest.raises(BadInput, match="axis batch"):
        make_profile([IMAGES], {"batch": (1, 4, 2)})


def test_the_first_profile_that_takes_the_shape_is_used_and_others_are_refused_with_what_fits():
    small = Profile({"images": ShapeRange((1, 4, 8), (1, 4, 8), (1, 4, 8))})
    assert choose_profile((small, PROFILE), {"images": (1, 4, 8)}) == 0
    assert choose_profile((small, PROFILE), {"images": (3, 4, 8)}) == 1
    for shape in ((5, 4, 8), (2, 4, 9), (4, 8)):
        with pytest.raises(BadInput, match="1x4x8 to 1x4x8; or images 1x4x8 to 4x4x8"):
            choose_profile((small, PROFILE), {"images": shape})


# ONNX Runtime's provider


def test_onnx_runtimes_provider_keeps_engines_by_content_and_is_told_shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = TensorSpec("images", "float32", ("batch", 3, "height", 64))
    spec = replace(ABOUT, inputs=(images, VISIBLE), unit=32)
    file, shapes = tmp_path / "encoder.onnx", parse_shapes("1x3x32x64:2x3x70x64:8x3x96x64", 3)
    file.write_bytes(b"one")
    options = provider_options(file, spec, shapes)
    assert [options[f"trt_profile_{size}_shapes"] for size in ("min", "opt", "max")] == [
        "images:1x3x32x64,visible:1x1x2",
        "images:2x3x70x64,visible:2x3x2",
        "images:8x3x96x64,visible:8x3x2",
    ]
    folder = Path(options["trt_engine_cache_path"])
    assert folder.parent == tmp_path / "cache" / "coma-dyvit" / "tensorrt"
    assert options["trt_engine_cache_prefix"] == "engine"
    assert options["trt_engine_cache_enable"] == "1" and folder.stat().st_mode & 0o77 == 0
    renamed = file.rename(tmp_path / "other.onnx")
    assert provider_options(renamed, spec, shapes) == options
    renamed.write_bytes(b"other weights")
    assert provider_options(renamed, spec, shapes)["trt_engine_cache_path"] != str(folder)
    static = provider_options(renamed, spec, parse_shapes("2x64x64", 3))
    assert static["trt_engine_cache_enable"] and not any("profile" in name for name in static)


@pytest.mark.parametrize(
    ("precision", "allowed"),
    [
        ("fp32", []),
        ("fp16", ["fp16"]),
        ("bf16", ["bf16"]),
        ("int8", ["int8"]),
        ("int8+fp16", ["fp16", "int8"]),
    ],
)
def test_onnx_runtimes_provider_may_use_the_types_of_the_file(precision, allowed):
    options = provider_options(None, replace(ABOUT, precision=precision), None)
    assert options == {f"trt_{each}_enable": "1" for each in allowed}


def test_a_cache_that_cannot_be_written_is_said_and_left_out(tmp_path, monkeypatch, caplog):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "encoder.onnx").touch()
    assert provider_options(tmp_path / "encoder.onnx", ABOUT, None) == {"trt_fp16_enable": "1"}
    assert "TensorRT's engines are not kept there (Not a directory)" in caplog.text


# The runtime's stream


def test_work_runs_on_a_stream_of_its_own_between_what_was_queued_and_what_follows(monkeypatch):
    said: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.cuda_stream = name

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    callers, own = Stream("caller's"), Stream("own")
    current = [callers]

    @contextmanager
    def switched(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", switched)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    kept = lambda tensor, stream: said.append(f"{tuple(tensor.shape)} kept for {stream.cuda_stream}")  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", kept)
    context = SimpleNamespace(
        set_optimization_profile_async=lambda profile, stream: said.append(f"profile on {stream}") or True,
        set_input_shape=lambda *_: True,
        set_tensor_address=lambda *_: None,
        get_tensor_shape=lambda _: (2, 5),
        execute_async_v3=lambda stream: said.append(f"runs on {stream}") or True,
    )
    runtime = object.__new__(TensorRTRuntime)
    runtime.device, runtime.spec, runtime._profiles = torch.device("cpu"), ABOUT, (PROFILE,)
    runtime._engine = SimpleNamespace(create_execution_context=lambda: context)
    runtime._contexts, runtime._captured, runtime._stream = {}, None, own  # type: ignore[assignment]
    images = torch.zeros(2, *PROFILE.shapes["images"].optimum[1:])
    for _ in range(2):
        assert {name: tuple(each.shape) for name, each in runtime(images).items()} == {"out": (2, 5)}
    call = [
        "own waits for caller's",
        "runs on own",
        "caller's waits for own",
        f"{tuple(images.shape)} kept for own",
        "(2, 5) kept for caller's",
    ]
    assert said == [call[0], "profile on own", *call[1:], *call]
    assert current == [callers]


# Sidecars


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"an engine")
    write_sidecar(path, of(path))
    return path


def of(path: Path, **changed: Any) -> Sidecar:
    sidecar = Sidecar(
        flavour="tensorrt",
        version="10.13.3.9",
        cuda="13.0",
        gpu=H200,
        onnx_sha256="1" * 64,
        engine_sha256=sha256_of(path),
        profiles=(PROFILE,),
        options=EngineOptions(),
        spec=ABOUT,
        layers=7,
        seconds=1.5,
    )
    return replace(sidecar, **changed)


def test_a_sidecar_is_read_as_it_was_written(engine: Path):
    assert read_sidecar(engine) == of(engine)
    check_fits(read_sidecar(engine), engine, TRT, H200)


REFUSED = {
    "product": ({"flavour": "tensorrt_rtx"}, TRT, H200, "TensorRT 10.13.3.9 cannot open it"),
    "older library": ({"version": "10.16.1.11"}, TRT, H200, "built with TensorRT 10.16.1.11, and this is"),
    "newer library": ({"version": "10.13.2.6"}, TRT, H200, "built with TensorRT 10.13.2.6"),
    "compatible, but older library": (
        {"version": "11.0.0.114", "options": EngineOptions(version_compatible=True)},
        TRT,
        H200,
        "built with TensorRT 11.0.0.114",
    ),
    "platform": ({"platform": "Windows AMD64"}, TRT, H200, "built on Windows AMD64"),
    "another GPU": ({}, TRT, H100, r"NVIDIA H200 \(compute capability 9.0\).*this is NVIDIA H100"),
    "another capability": (
        {"options": EngineOptions(hardware_compatibility="same_compute_capability")},
        TRT,
        L4,
        "this is NVIDIA L4",
    ),
    "before Ampere": (
        {"options": EngineOptions(hardware_compatibility="ampere_plus")},
        TRT,
        T4,
        "this is Tesla T4",
    ),
    "another file": (
        {"engine_sha256": "0" * 64},
        TRT,
        H200,
        "differs from the file that its sidecar",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_engine_that_does_not_fit_is_refused(engine: Path, case: str):
    changed, library, gpu, message = REFUSED[case]
    with pytest.raises(BadInput, match=message) as refused:
        check_fits(of(engine, **changed), engine, library, gpu)
    assert str(engine) in str(refused.value) and "build it" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "version", "gpu"),
    [
        (EngineOptions(version_compatible=True), "10.13.3.9", H200),
        (EngineOptions(version_compatible=True), "11.4.0.106", H200),
        (EngineOptions(hardware_compatibility="same_compute_capability"), "10.13.3.9", H100),
        (EngineOptions(hardware_compatibility="ampere_plus"), "10.13.3.9.post1", L4),
    ],
)
def test_a_compatible_engine_is_let_through(engine: Path, options: EngineOptions, version: str, gpu: Gpu):
    check_fits(of(engine, options=options), engine, Library("tensorrt", version, None), gpu)


def test_a_missing_or_foreign_sidecar_is_refused(engine: Path):
    path = sidecar_path(engine)
    plain = json.loads(path.read_text())
    for text, message in (
        ("{", "not a readable sidecar"),
        ("[]", "format None"),
        (json.dumps({**plain, "format_version": 1}), "format 1, but this version reads format 2"),
        (json.dumps({**plain, "colour": "red"}), "colour"),
        (json.dumps({**plain, "layers": "7"}), "layers"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=message):
            read_sidecar(engine)
    path.unlink()
    with pytest.raises(BadInput, match=r"its sidecar model.engine.json is missing; build it again"):
        read_sidecar(engine)
    with pytest.raises(BadInput, match="no such file"):
        read_sidecar(engine.with_name("other.engine"))


def test_options_out_of_range_are_refused():
    with pytest.raises(BadInput, match="must be 0 to 5"):
        EngineOptions(builder_level=6)
    with pytest.raises(BadInput, match="at least 1"):
        EngineOptions(workspace=0)


# No GPU, no package


@needs_no_gpu
def test_without_a_gpu_a_runtime_says_so(engine: Path):
    with pytest.raises(BadInput, match="no working NVIDIA driver; use ONNX Runtime"):
        TensorRTRuntime(engine)


def test_a_runtime_is_for_gpus_only(engine: Path):
    with pytest.raises(BadInput, match="NVIDIA GPUs only, not on cpu"):
        TensorRTRuntime(engine, "cpu")


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library_module, "find_driver", lambda: Driver("13.0", ()))
    with pytest.raises(BadInput, match="no NVIDIA GPU; use"):
        require_gpu()
    driver = Driver("13.0", (H200, L4))
    monkeypatch.setattr(library_module, "find_driver", lambda: driver)
    assert require_gpu(1) == (L4, driver)
    with pytest.raises(BadInput, match=r"no GPU 2; the last one is 1 \(NVIDIA L4\)"):
        require_gpu(2)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, flavour: Any):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=rf"coma-dyvit\[{library_module.EXTRAS[flavour]}\]"):
        load_library(flavour)


def test_a_package_that_is_broken_or_too_old_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "tensorrt.py"
    package.write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(library_module, "find_driver", lambda: Driver("13.0", (H200,)))
    with pytest.raises(BadInput, match=r"does not load \(libnvinfer.so.10"):
        load_library()
    old = ModuleType("tensorrt")
    old.__dict__["__version__"] = "10.9.0.34"
    monkeypatch.setattr(importlib, "import_module", lambda name: old)
    with pytest.raises(BadInput, match=r"TensorRT 10.9.0.34 is too old; install 10.13"):
        load_library()


# The inspector's listing


def test_a_listing_is_summed_up_in_the_fields_of_both_versions():
    ten = {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Outputs": [{"Dimensions": [-1, 16, 8, 8], "Format/Datatype": "Channel major FP16 format"}],
    }
    eleven = {
        "Name": "gemm",
        "LayerType": "gemm",
        "Outputs": [{"Dimensions": [2, 8], "Format": "Row major linear", "DataType": "Float"}],
    }
    shape = {"Name": "shape", "LayerType": "shape_call", "Outputs": []}
    summary = summarize(json.dumps({"Layers": [eleven, ten, ten, shape], "Bindings": ["images"]}))
    assert summary.layers == 4
    assert summary.by_type == {"CaskConvolution": 2, "gemm": 1, "shape_call": 1}
    assert summary.by_format == {"fp16": 2, "fp32": 1}
    assert summary.largest[0] == ("conv + relu", "CaskConvolution", 1024)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Row major linear FP32", "fp32"),
        ("BFloat16", "bf16"),
        ("Half", "fp16"),
        ("Thirty-two wide channel vectorized row major Int8 format.", "int8"),
        ("E4M3 FP8", "fp8"),
        ("N/A due to dynamic shapes", "?"),
    ],
)
def test_formats_are_recognised(said: str, name: str):
    layer = {"Name": "a", "LayerType": "b", "Outputs": [{"Format/Datatype": said}]}
    assert summarize(json.dumps({"Layers": [layer]})).by_format == {name: 1}


def test_a_listing_without_details_still_counts():
    summary = summarize(json.dumps({"Layers": ["a", "b + c"]}))
    assert (summary.layers, summary.by_type, summary.largest) == (2, {}, ())
