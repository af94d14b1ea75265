"""Exported files where they are deployed: ONNX Runtime on the device, and an engine of TensorRT-RTX."""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from exported_models import random_pretrained

from gpu_steps.session import Session, Skip, median_seconds

if TYPE_CHECKING:
    from coma.runtimes.tensorrt.runtime import TensorRTRuntime


def artifact_of(session: Session) -> Path:
    """A pre-trained artifact with random weights."""
    preset, side = ("tiny", 32) if session.small else ("small", 224)
    return random_pretrained(session.folder, preset, side)


def exported(session: Session, *flags: str) -> Path:
    """The folder of an exported encoder."""
    out = session.folder / "export"
    shape = f"1x3x{32 if session.small else 224}x{32 if session.small else 224}"
    most = shape.replace("1x3", f"{2 if session.small else 64}x3", 1)
    command = ["-m", "coma", "export", str(artifact_of(session)), "--graph", "encoder", "--out", str(out)]
    command += ["--shapes", f"{shape}:{most}:{most}", "--verify-images", "2" if session.small else "8"]
    session.run(*command, *flags)
    return out


def onnx_runtime(session: Session) -> None:
    """Exports and verifies on the device that ONNX Runtime has, and times the files beside PyTorch."""
    import onnxruntime

    offered = onnxruntime.get_available_providers()
    gpu = session.device.type == "cuda"
    if gpu and "CUDAExecutionProvider" not in offered:
        raise Skip(f"ONNX Runtime offers {', '.join(offered)}; onnxruntime-gpu is not installed")
    device, precisions = ("cuda", "fp32,fp16,bf16") if gpu else ("cpu", "fp32")
    seconds = "0.1" if session.small else "1"
    folder = exported(session, "--precision", precisions, "--device", device, "--benchmark-seconds", seconds)
    manifest = json.loads((folder / "manifest.json").read_text())
    for verdict in ("files", "rejected"):
        for entry in manifest[verdict]:
            session.add(entry["file"], ok=verdict == "files", MB=entry["bytes"] / 1e6, note=entry["runtime"])
            for times in entry["latency"]:
                name = f"{entry['precision']}, {times['shape']}, {times['what']}: {times['runtime']}"
                session.add(name, {"p50, ms": times["p50"], "images/s": times["images_per_second"]})


def tensorrt_rtx(session: Session) -> None:
    """Builds an engine of TensorRT-RTX and, on a GPU, runs it beside PyTorch."""
    if find_spec("tensorrt_rtx_bindings") is None:
        raise Skip("TensorRT-RTX is not installed")
    from coma.runtimes.pytorch import TorchRuntime
    from coma.runtimes.shape_ranges import Shape, Shapes
    from coma.runtimes.tensorrt.runtime import TensorRTRuntime
    from export.graphs.load import load_exportable
    from export.onnx_export import write_onnx
    from export.tensorrt.builder import build_engine

    side = 32 if session.small else 224
    path, engine = session.folder / "encoder.onnx", session.folder / "encoder.engine"
    write_onnx(load_exportable(artifact_of(session), "encoder"), Shapes(*[Shape(1, side, side)] * 3), path)
    sidecar = build_engine(path, engine, (), flavour="tensorrt_rtx")
    values = {"seconds": sidecar.seconds, "layers": sidecar.layers, "MB": engine.stat().st_size / 1e6}
    session.add("engine", values, ok=True, note=f"TensorRT-RTX {sidecar.version}")
    if session.device.type != "cuda":
        return
    images = torch.randn(1, 3, side, side, device=session.device)
    with session.attempt("engine on this GPU"):
        runtime = TensorRTRuntime(engine)
        expected = TorchRuntime(load_exportable(artifact_of(session), "encoder"), "cuda")(images)
        found = runtime(images)
        off = max(
            float((found[name].float() - each.float()).norm() / each.float().norm())
            for name, each in expected.items()
        )
        seconds = median_seconds(lambda: runtime(images), session.device, seconds=0.5)
        session.add("engine on this GPU", ok=off < 1e-2, relative_error=off, ms=1e3 * seconds)
        _check_streams(session, runtime, images)


def _check_streams(session: Session, runtime: TensorRTRuntime, images: torch.Tensor) -> None:
    """Feeds the engine from busy streams; without events it would read images that are not there yet."""
    wanted = runtime(images)["pooled"].sum()
    different = 0
    for _ in range(20):
        with torch.cuda.stream(torch.cuda.Stream()):
            late = torch.full_like(images, torch.nan)
            torch.cuda._sleep(10_000_000)
            late.copy_(images)
            found = runtime(late)["pooled"].sum()
            del late
            different += not torch.allclose(found, wanted, rtol=1e-4)
    session.add("engine between busy streams", ok=not different, of=20, different=different)


def tensorrt_provider(session: Session) -> None:
    """Opens and runs a file twice with ONNX Runtime's TensorRT provider, the second time from its cache."""
    from coma.errors import BadInput
    from coma.runtimes.onnxruntime import OnnxRuntime, require_provider
    from coma.runtimes.pytorch import TorchRuntime
    from coma.runtimes.shape_ranges import Shape, Shapes
    from export.graphs.load import load_exportable
    from export.onnx_export import cast_weights, write_onnx

    try:
        require_provider("tensorrt")
    except BadInput as error:
        raise Skip(str(error)) from None
    os.environ["XDG_CACHE_HOME"] = str(session.folder / "cache")
    path, shapes = session.folder / "encoder-fp16.onnx", Shapes(*(Shape(n, 224, 224) for n in (1, 8, 32)))
    exportable = load_exportable(artifact_of(session), "encoder")
    write_onnx(cast_weights(exportable, "fp16"), shapes, path)
    reference = TorchRuntime(load_exportable(artifact_of(session), "encoder"), "cuda")
    for which in ("first", "second"):
        started = time.perf_counter()
        runtime = OnnxRuntime(path, "tensorrt", shapes=shapes)
        for batch in (8, 1, 32):
            images = torch.randn(batch, 3, 224, 224, device=session.device)
            found, wanted = runtime(images)["pooled"].float(), reference(images)["pooled"]
            off = float((found - wanted).norm() / wanted.norm())
            values = {"seconds since opening": time.perf_counter() - started, "relative error": off}
            session.add(f"{which} time, batch {batch}", values, ok=off < 2e-2)
