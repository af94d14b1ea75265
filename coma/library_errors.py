"""Turns errors of libraries into one-line errors of this toolkit that name the attempt.

onnx, onnxscript, ONNX Runtime, TensorRT, protobuf and torch.export raise dozens of classes, several of them
not public, so whatever they raise is caught where they are called. `coma --traceback` shows the original.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager

from coma.errors import BadInput, CheckFailed, ComaError, is_out_of_gpu_memory

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LONGEST = 300
_INSTALL = {
    "onnx": "'coma-dyvit[export]'",
    "onnxscript": "'coma-dyvit[export]'",
    "onnxruntime": "onnxruntime-gpu (or onnxruntime, for CPUs)",
    "openvino": "'coma-dyvit[openvino]'",
    "tensorboard": "tensorboard",
    "wandb": "'coma-dyvit[track]'",
    "mlflow": "'coma-dyvit[track]'",
}


@contextmanager
def library_errors(attempt: str, kind: type[ComaError] = CheckFailed) -> Iterator[None]:
    """Raises what a library raises inside as `kind`: the attempt, and the first line of the cause.

    Errors of this toolkit, of disks, and of a GPU's memory pass: they say what to do already.
    """
    try:
        yield
    except (ComaError, OSError):
        raise
    except Exception as error:
        if is_out_of_gpu_memory(error):
            raise
        raise kind(f"{attempt}: {first_line(error)}") from error


@contextmanager
def about_one_file() -> Iterator[None]:
    """Raises BadInput as CheckFailed: only the file at hand is refused, and the others are made."""
    try:
        yield
    except BadInput as error:
        raise CheckFailed(str(error)) from error


def load_packages(*names: str) -> None:
    """Imports packages that may be missing or broken; `preflight.require_packages` only looks for them.

    Raises:
        BadInput: one of them is missing or broken; the message says how to install it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            state = "is not installed" if missing else f"does not load ({first_line(error)})"
            raise BadInput(f"the package {name} {state}; pip install {_INSTALL[name]}") from error


def first_line(error: BaseException) -> str:
    """Returns the first line of the root cause, with its class if the text alone says little."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = _COLOURS.sub("", str(error)).strip().partition("\n")[0][:_LONGEST]
    return text if " " in text else f"{type(error).__name__} {text}".strip()
