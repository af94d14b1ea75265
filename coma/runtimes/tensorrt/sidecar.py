"""The sidecar `<engine>.json`: specification of an engine, how it was built, and where it may run.

An engine holds machine code for one GPU and one version of TensorRT, and opening a foreign one may do
anything, so an engine opens only if its sidecar matches. The hash detects damage and mix-ups, not forgery:
open only engines from people you trust, as with any program.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from coma.atomic_io import sha256_of, write_json
from coma.config.serialization import from_plain, to_plain
from coma.errors import BadInput
from coma.preflight import check_regular_file
from coma.ranges import Range, Ranged
from coma.runtimes.model_spec import ModelSpec
from coma.runtimes.tensorrt.discovery import TITLES, Flavour, Gpu, Library, version_numbers
from coma.runtimes.tensorrt.profiles import Profile

FORMAT_VERSION = 2
REBUILD = "build it again from its ONNX file on this machine"


@dataclass(frozen=True)
class EngineOptions(Ranged):
    """Options of the TensorRT builder (--to onnx,tensorrt); it runs on the GPU that will run the engine."""

    workspace: Annotated[int, Range(1, 2**24)] = 4096
    """Maximum GPU memory in MiB that a layer may use as its workspace."""
    builder_level: Annotated[int, Range(0, 5)] = 3
    """Builder optimization level, from 0 (fast build) to 5 (fast engine)."""
    timing_cache: Path | None = None
    """File of kernel timings, which is read and extended; makes later builds on the same GPU faster."""
    tf32: bool = False
    """Allow TF32 in fp32 matrix multiplications: faster, with a mantissa of 10 bits."""
    version_compatible: bool = False
    """Allow later versions of TensorRT to run the engine."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """Other GPUs that may run the engine."""
    refit: bool = False
    """Allow the weights to be replaced without a new build."""


@dataclass(frozen=True)
class Sidecar:
    """Content of a sidecar.

    Attributes:
        flavour: Product that built the engine.
        version: Version of the product.
        cuda: Newest CUDA that the driver supports; None without a driver.
        gpu: GPU that the engine was built on; None without one (TensorRT-RTX).
        platform: Operating system and processor.
        onnx_sha256: SHA-256 of the ONNX file.
        engine_sha256: SHA-256 of the engine.
        profiles: Optimization profiles: shapes that the engine takes.
        options: Options of the builder.
        spec: Specification in the ONNX file.
        layers: Number of layers before fusion.
        seconds: Build time.
    """

    flavour: Flavour
    version: str
    cuda: str | None
    gpu: Gpu | None
    onnx_sha256: str
    engine_sha256: str
    profiles: tuple[Profile, ...]
    options: EngineOptions
    spec: ModelSpec
    layers: int
    seconds: float
    platform: str = field(default_factory=lambda: this_platform())
    format_version: int = FORMAT_VERSION


def this_platform() -> str:
    """Returns the operating system and processor, such as Linux x86_64."""
    return f"{platform.system()} {platform.machine()}"


def sidecar_path(engine_path: Path) -> Path:
    """Returns the path of an engine's sidecar."""
    return engine_path.with_name(engine_path.name + ".json")


def write_sidecar(engine_path: Path, sidecar: Sidecar) -> None:
    """Writes the sidecar atomically.

    Raises:
        OSError: the disk is full or not writable.
    """
    write_json(sidecar_path(engine_path), to_plain(sidecar))


def read_sidecar(engine_path: Path) -> Sidecar:
    """Reads the sidecar of an engine, but not the engine itself.

    Raises:
        BadInput: the engine or its sidecar is missing, or the sidecar cannot be read.
    """
    path = sidecar_path(engine_path)
    if not engine_path.is_file():
        raise BadInput(f"{engine_path}: no such file")
    try:
        check_regular_file(path, REBUILD, must_exist=False)
        plain = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{engine_path}: its sidecar {path.name} is missing; {REBUILD}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable sidecar ({error}); {REBUILD}") from None
    version = plain.get("format_version") if isinstance(plain, dict) else None
    if version != FORMAT_VERSION:
        raise BadInput(f"{path}: format {version}, but this version reads format {FORMAT_VERSION}; {REBUILD}")
    return from_plain(plain, Sidecar, source=str(path))


def check_fits(sidecar: Sidecar, engine_path: Path, library: Library, gpu: Gpu) -> None:
    """Refuses an engine for another product, version, platform or GPU, and an engine that has changed.

    Raises:
        BadInput: the engine cannot run here; the message says why and what to do.
    """
    built = f"{TITLES[sidecar.flavour]} {sidecar.version}"
    options = sidecar.options
    if sidecar.flavour != library.flavour:
        raise BadInput(f"{engine_path}: built with {built}, and {library.title} cannot open it; {REBUILD}")
    theirs, ours = version_numbers(sidecar.version), version_numbers(library.version)
    later = options.version_compatible and sidecar.flavour == "tensorrt" and ours > theirs
    if ours != theirs and not later:
        raise BadInput(f"{engine_path}: built with {built}, and this is {library.title}; {REBUILD}")
    if sidecar.platform != this_platform():
        raise BadInput(f"{engine_path}: built on {sidecar.platform}, this is {this_platform()}; {REBUILD}")
    if sidecar.gpu is not None and not _runs_on(gpu, sidecar.gpu, options.hardware_compatibility):
        raise BadInput(
            f"{engine_path}: built for {_named(sidecar.gpu)} (hardware compatibility: "
            f"{options.hardware_compatibility}), and this is {_named(gpu)}; {REBUILD}"
        )
    if sha256_of(engine_path) != sidecar.engine_sha256:
        raise BadInput(
            f"{engine_path}: differs from the file that its sidecar describes (SHA-256); {REBUILD}"
        )


def _runs_on(gpu: Gpu, built_for: Gpu, level: str) -> bool:
    if level == "ampere_plus":
        return version_numbers(gpu.compute_capability) >= (8, 0)
    return gpu == built_for or (
        level == "same_compute_capability" and gpu.compute_capability == built_for.compute_capability
    )


def _named(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.compute_capability})"
