"""Which TensorRT is installed and which GPU is there: asked before anything that would crash without one.

Creating a `Runtime` or a `Builder` of TensorRT where no driver is can end the process with a segmentation
fault, so the driver is asked first, through ctypes, and TensorRT is imported only when somebody uses it.
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
"""tensorrt: for every NVIDIA GPU, builds on the one it runs on. tensorrt_rtx: for RTX cards, builds without a
GPU; another product, whose engines TensorRT does not open."""

MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt_rtx_bindings"}
EXTRAS: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
TITLES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
OLDEST = (10, 13)
"""Of TensorRT: from there on, what is used of its Python API stays (tests/golden/tensorrt_surfaces.json)."""

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A GPU, as an engine remembers it: its name and its compute capability, such as "9.0"."""

    name: str
    compute_capability: str


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: the newest CUDA it runs, such as "13.0", and the GPUs it shows this process."""

    cuda: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Library:
    """An imported TensorRT. It has no type stubs: `module` is where Any comes from."""

    flavour: Flavour
    version: str
    module: Any

    @property
    def title(self) -> str:
        """Name and version, for messages and tables."""
        return f"{TITLES[self.flavour]} {self.version}"


def find_driver() -> Driver | None:
    """Ask NVIDIA's driver; None where there is none, or one that does not start."""
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
    """The GPU of that number, and its driver.

    Raises:
        BadInput: no driver, or no such GPU.
    """
    driver = find_driver()
    if driver is None or not driver.gpus:
        missing = "no working NVIDIA driver" if driver is None else "no NVIDIA GPU"
        raise BadInput(f"TensorRT needs an NVIDIA GPU, and there is {missing} here; use ONNX Runtime instead")
    if index >= len(driver.gpus):
        last = len(driver.gpus) - 1
        raise BadInput(f"there is no GPU {index}; the last one is {last} ({driver.gpus[last].name})")
    return driver.gpus[index], driver


def require_package(flavour: Flavour) -> None:
    """Whether the package is installed, without importing it.

    Raises:
        BadInput: it is not; the message names the extra.
    """
    if importlib.util.find_spec(MODULES[flavour]) is None:
        raise BadInput(
            f"{TITLES[flavour]} is not installed; install it with: "
            f"pip install 'coma-dyvit[{EXTRAS[flavour]}]'"
        )


def load_library(flavour: Flavour = "tensorrt") -> Library:
    """Import TensorRT (which needs a driver) or TensorRT-RTX (which does not).

    Raises:
        BadInput: it is missing, broken or too old, or there is no GPU for it.
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
    """The first four numbers of "10.13.3.9.post1", to be compared."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])
