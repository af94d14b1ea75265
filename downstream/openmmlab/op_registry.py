"""mmcv without its compiled operators: torchvision's in the place of the missing module.

mmcv-lite ships every Python file of `mmcv.ops`; what it lacks is the binary module `mmcv._ext`, which has to
be compiled against each torch release. torchvision brings non-maximum suppression and RoIAlign compiled, for
CPU and GPU, with every release of torch. `register_ops` puts those, and what else `mmcv_ops` has,
in the missing module's place; any other operator is an error when it is called. A compiled mmcv is used as it
is.
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
    """Make `mmcv.ops` importable; called before its first import, any number of times.

    Raises:
        BadInput: there is no mmcv, or its compiled operators cannot be loaded.
    """
    import torch  # noqa: F401 - a compiled mmcv needs torch's libraries to be loaded

    try:
        mmcv = importlib.import_module("mmcv")
    except ModuleNotFoundError as error:
        if error.name != "mmcv":
            raise
        raise BadInput(
            "mmcv is missing: `pip install mmcv-lite==2.1.0`, or a compiled mmcv==2.1.0"
        ) from error
    try:
        importlib.import_module(_EXTENSION)  # compiled, or ours from a call before
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
    _log.info("mmcv has no compiled operators: those of torchvision %s stand in", version("torchvision"))


class _Operators(Loader):
    """Fills a module with `OPERATORS`; mmcv takes a module whose spec has no loader for a missing one."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(OPERATORS, __getattr__=_absent)


def _absent(name: str) -> Callable[..., Any]:
    """Any other operator: there when `mmcv.ops` asks for it on import, an error when it is called."""
    if name.startswith("_"):
        raise AttributeError(name)

    def absent(*_: object, **__: object) -> None:
        raise_unsupported(name)

    return absent
