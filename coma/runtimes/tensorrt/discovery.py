"""Finds the installed TensorRT, the NVIDIA driver and the GPUs.

Creating a `Runtime` or `Builder` of TensorRT without a driver can end the process with a segmentation fault,
so the driver is queried first, through ctypes, and TensorRT is imported only when it is used.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

from coma.errors import BadInput

Flavour = Literal["tensorrt", "tensorrt_rtx"]
"""tensorrt: for all NVIDIA GPUs; builds engines on the GPU that runs them. tensorrt_rtx: for RTX cards;
builds without a GPU. TensorRT does not open its engines."""

MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_bindings"}
EXTRAS: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
TITLES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
OLDEST = (10, 13)
"""Oldest supported version: later ones keep the API used here (tests/golden/tensorrt_surfaces.json)."""

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """Name and compute capability of a GPU, such as "9.0"."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Driver:
    """NVIDIA driver: the newest CUDA version that it supports, such as "13.0", and the visible GPUs."""

    cuda: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Library:
    """An imported TensorRT; `module` is Any because it has no type stubs."""

    flavour: Flavour
    version: str
    module: Any

    @property
    def title(self) -> str:
        """Name and version for messages and tables."""
        return f"{TITLES[self.flavour]} {self.version}"


def find_driver() -> Driver | None:
    """Queries the NVIDIA driver; returns None if there is none or it does not start."""
    try:
        cuda: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return None
    if cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    return Driver(f"{version.value // 1000}.{version.value % 1000 // 10}", gpus)


def _gpu(cuda: Any, index: int) -> Gpu:
    device, name, value = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(value.value)
    return Gpu(name.value.decode(), ".".join(map(str, numbers)))


def require_gpu(index: int = 0) -> tuple[Gpu, Driver]:
    """Returns a GPU by its number, and the driver.

    Raises:
        BadInput: there is no driver or no such GPU.
    """
    driver = find_driver()
    if driver is None or not driver.gpus:
        missing = "no working NVIDIA driver" if driver is None else "no NVIDIA GPU"
        raise BadInput(f"TensorRT needs an NVIDIA GPU, and there is {missing}; use ONNX Runtime instead")
    if index >= len(driver.gpus):
        last = len(driver.gpus) - 1
        raise BadInput(f"there is no GPU {index}; the last one is {last} ({driver.gpus[last].name})")
    return driver.gpus[index], driver


def require_package(flavour: Flavour) -> None:
    """Checks that the package is installed, without importing it.

    Raises:
        BadInput: the package is missing; the message names the extra.
    """
    if importlib.util.find_spec(MODULES[flavour]) is None:
        raise BadInput(
            f"{TITLES[flavour]} is not installed; install it with: "
            f"pip install 'coma-dyvit[{EXTRAS[flavour]}]'"
        )


def load_library(flavour: Flavour = "tensorrt") -> Library:
    """Imports TensorRT, which needs a driver, or TensorRT-RTX, which does not.

    Raises:
        BadInput: the package is missing, broken or too old, or there is no GPU.
    """
    require_package(flavour)
    if flavour == "tensorrt":
        require_gpu()
    try:
        module: Any = importlib.import_module(MODULES[flavour])
    except (ImportError, OSError, RuntimeError) as error:
        raise BadInput(
            f"{TITLES[flavour]} is installed but does not load ({error}); "
            f"install it again: pip install --force-reinstall 'coma-dyvit[{EXTRAS[flavour]}]'"
        ) from None
    library = Library(flavour, module.__version__, module)
    if flavour == "tensorrt" and version_numbers(library.version)[:2] < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BadInput(f"{library.title} is too old; install {oldest} or later")
    return library


def version_numbers(version: str) -> tuple[int, ...]:
    """Returns the first four numbers of a version such as "10.13.3.9.post1", for comparisons."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])
