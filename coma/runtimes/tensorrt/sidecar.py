"""`<engine>.json`: what an engine is, with which TensorRT and GPU it was built, and where it may be used.

An engine holds machine code for one GPU and one version of TensorRT, and opening a foreign one may do
anything, so nothing is opened that its sidecar does not vouch for. The hash shows damage and mix-ups, not
forgery: open only engines of people you trust, as with any program.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from coma.atomic_io import sha256_of
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
    """How an engine is built. What is computed in which precision is not among it: the ONNX file says that.

    Attributes:
        workspace_mib: Most memory of the GPU that a layer may use for itself, MiB.
        optimization_level: 0 (quick build) to 5 (quick engine).
        timing_cache: File of measured kernels, read and added to; makes later builds quick. Of one GPU and
            one TensorRT.
        tf32: Multiply fp32 matrices with 10 bits of mantissa: quicker, less like PyTorch.
        version_compatible: Later versions of TensorRT may run it, somewhat slower.
        hardware_compatibility: Which other GPUs may run it.
        refit: Its weights can be replaced.
        strip_plan: It is stored without its weights, and runs only after a refit.
        gpu: Number of the GPU to build on and for.
    """

    workspace_mib: Annotated[int, Range(1, 2**24)] = 4096
    optimization_level: Annotated[int, Range(0, 5)] = 3
    timing_cache: Path | None = None
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    refit: bool = False
    strip_plan: bool = False
    gpu: int = 0


@dataclass(frozen=True)
class Sidecar:
    """What is known of an engine.

    Attributes:
        flavour: Which product built it.
        version: Its version.
        cuda: Newest CUDA of the driver it was built with; None without a driver.
        gpu: The GPU it was built on; None without one (TensorRT-RTX).
        platform: Operating system and processor.
        onnx_sha256: Of the ONNX file.
        engine_sha256: Of the engine.
        profiles: Which shapes it takes.
        options: How it was built.
        description: Of the ONNX file, `precision` included.
        layers: Of the network, before TensorRT fused any.
        seconds: That the build took.
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
    """Such as Linux x86_64."""
    return f"{platform.system()} {platform.machine()}"


def sidecar_path(engine_path: Path) -> Path:
    """Where the sidecar of an engine lies."""
    return engine_path.with_name(engine_path.name + ".json")


def write_sidecar(engine_path: Path, sidecar: Sidecar) -> None:
    """Write it whole or not at all.

    Raises:
        OSError: the disk is full, or not to be written.
    """
    from coma.atomic_io import write_whole

    text = json.dumps(to_plain(sidecar), indent=2) + "\n"
    write_whole(sidecar_path(engine_path), lambda file: file.write(text.encode()))


def read_sidecar(engine_path: Path) -> Sidecar:
    """What is known of that engine; the engine itself is not looked at.

    Raises:
        BadInput: no engine, no sidecar, or one that cannot be understood.
    """
    path = sidecar_path(engine_path)
    if not engine_path.is_file():
        raise BadInput(f"{engine_path}: no such file")
    try:
        check_regular_file(path, REBUILD, must_exist=False)
        plain = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{engine_path}: {path.name} is not beside it; {REBUILD}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable sidecar ({error}); {REBUILD}") from None
    version = plain.get("format_version") if isinstance(plain, dict) else None
    if version != FORMAT_VERSION:
        raise BadInput(f"{path}: of format {version}, and this program reads {FORMAT_VERSION}; {REBUILD}")
    return from_plain(plain, Sidecar, source=str(path))


def check_fits(sidecar: Sidecar, engine_path: Path, library: Library, gpu: Gpu) -> None:
    """Refuse an engine of another product, version, platform or GPU, and a file that is not the one built.

    Raises:
        BadInput: with the reason and what to do.
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
    if options.strip_plan:
        raise BadInput(f"{engine_path}: is stored without its weights; build it without strip_plan")
    if sha256_of(engine_path) != sidecar.engine_sha256:
        raise BadInput(f"{engine_path}: is not the file that its sidecar describes (SHA-256); {REBUILD}")


def _runs_on(gpu: Gpu, built_for: Gpu, level: str) -> bool:
    if level == "ampere_plus":
        return version_numbers(gpu.compute_capability) >= (8, 0)
    return gpu == built_for or (
        level == "same_compute_capability" and gpu.compute_capability == built_for.compute_capability
    )


def _named(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.compute_capability})"
