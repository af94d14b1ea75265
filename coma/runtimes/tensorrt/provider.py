"""Options of ONNX Runtime's TensorRT provider: where it keeps engines, and for which shapes it builds them.

Without them it builds an engine when a file is opened, again in every process, and once more whenever a batch
is larger or smaller than all before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from coma.atomic_io import sha256_of
from coma.runtimes.model_spec import ModelSpec, Precision, eight_bit_part, float_part
from coma.runtimes.shape_ranges import Shapes
from coma.runtimes.tensorrt.profiles import ShapeRange, profile_of, written

log = logging.getLogger(__name__)


def provider_options(path: Path | None, spec: ModelSpec, shapes: Shapes | None) -> dict[str, str]:
    """Returns the options for a file.

    Args:
        path: The file; None for a graph in memory, whose engines are not kept.
        spec: Its specification.
        shapes: Shapes that it takes; None if they are not known.
    """
    options = _types(spec.precision) | (_profile_options(spec, shapes) if shapes and shapes.dynamic else {})
    if path is None:
        return options
    folder = cache_folder(path)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        log.warning("%s: TensorRT's engines are not kept there (%s)", folder, error.strerror or error)
        return options
    return options | {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": "engine",  # not the file's name, which changes after the verification
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def cache_folder(path: Path) -> Path:
    """Returns the folder of the engines of a file: one for every content, in the user's cache.

    ONNX Runtime finds an engine by the name and the operators of its file, and not by the weights. Opening an
    engine runs code that it holds, so none is taken from the folder of the file.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "coma-dyvit" / "tensorrt" / sha256_of(path)[:32]


def _types(precision: Precision) -> dict[str, str]:
    """Allows the types that a file holds; TensorRT refuses them otherwise, and uses no others."""
    types = {float_part(precision), eight_bit_part(precision)} & {"fp16", "bf16", "int8"}
    return {f"trt_{each}_enable": "1" for each in sorted(types, key=str)}


def _profile_options(spec: ModelSpec, shapes: Shapes) -> dict[str, str]:
    inputs = profile_of(spec, shapes).shapes

    def listed(size: Callable[[ShapeRange], tuple[int, ...]]) -> str:
        return ",".join(f"{name}:{written(size(each))}" for name, each in inputs.items())

    return {
        "trt_profile_min_shapes": listed(lambda each: each.minimum),
        "trt_profile_opt_shapes": listed(lambda each: each.optimum),
        "trt_profile_max_shapes": listed(lambda each: each.maximum),
    }
