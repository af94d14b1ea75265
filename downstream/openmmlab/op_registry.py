"""Registers operators for mmcv-lite, which lacks the compiled module `mmcv._ext`.

mmcv-lite has every Python file of `mmcv.ops`, but `mmcv._ext` must be compiled for each torch release.
torchvision has compiled NMS and RoIAlign, on CPU and GPU, for every torch release. `register_ops` puts a
module with the operators of `mmcv_ops` in the place of `mmcv._ext`; calling any other operator raises an
error. A compiled mmcv is used unchanged.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

from coma.errors import BadInput
from downstream.openmmlab.mmcv_ops import OPERATORS, raise_unsupported

_log = logging.getLogger(__name__)

_EXTENSION = "mmcv._ext"


def register_ops() -> None:
    """Makes `mmcv.ops` importable; call it before the first import, any number of times.

    Raises:
        BadInput: mmcv is missing, or its compiled operators cannot be loaded.
    """
    import torch  # noqa: F401 - a compiled mmcv needs torch's libraries

    try:
        mmcv = importlib.import_module("mmcv")
    except ModuleNotFoundError as error:
        if error.name != "mmcv":
            raise
        raise BadInput(
            "mmcv is missing: `pip install mmcv-lite==2.1.0`, or a compiled mmcv==2.1.0"
        ) from error
    try:
        importlib.import_module(_EXTENSION)  # compiled, or registered before
    except ModuleNotFoundError as error:
        if error.name != _EXTENSION:
            raise
    except ImportError as error:
        raise BadInput(
            f"mmcv's compiled operators cannot be loaded ({error}): they were compiled for another torch. "
            "Compile mmcv again, or `pip uninstall mmcv` and `pip install mmcv-lite==2.1.0`"
        ) from error
    else:
        return
    module = module_from_spec(ModuleSpec(_EXTENSION, _Operators(), origin=__name__))
    _Operators().exec_module(module)
    sys.modules[_EXTENSION] = module
    vars(mmcv)["_ext"] = module
    _log.info("mmcv has no compiled operators: using those of torchvision %s", version("torchvision"))


class _Operators(Loader):
    """Fills a module with `OPERATORS`; mmcv treats a module without a loader as missing."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(OPERATORS, __getattr__=_absent)


def _absent(name: str) -> Callable[..., Any]:
    """Returns any other operator: `mmcv.ops` can import it, but calling it raises an error."""
    if name.startswith("_"):
        raise AttributeError(name)

    def absent(*_: object, **__: object) -> None:
        raise_unsupported(name)

    return absent
