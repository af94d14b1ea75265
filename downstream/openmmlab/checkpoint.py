"""mmengine's checkpoints through torch's safe loader, which unpickles nothing but what is allowed here.

Files that mmengine fetches from elsewhere go through it as well. Checkpoints hold, beside tensors and
numbers, mmengine's `HistoryBuffer`: numpy arrays, and its own four methods, pickled as calls of `getattr`.
That is allowed for these methods, and for nothing else.
"""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coma.atomic_io import seal_holds
from coma.errors import BadInput
from downstream.private import download_safely, numpy_constructors

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
METHODS = ("min", "max", "current", "mean")
_NUMBERED = re.compile(r"(?:iter|epoch)_(\d+)\.pth")


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint with the best validation score, or the last one where nothing was validated.

    Raises:
        BadInput: there is none.
    """
    best = sorted(folder.glob("best_*.pth"), key=lambda path: path.stat().st_mtime)
    last = latest_checkpoint(folder)
    found = best[-1] if best else last
    if found is None:
        raise BadInput(f"{folder}: holds no checkpoint")
    return found


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the last checkpoint of a run, in this folder wherever it was when it was written."""
    noted = folder / "last_checkpoint"
    path = folder / Path(noted.read_text().strip()).name if noted.is_file() else None
    return path if path and path.is_file() else None


def intact_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint, or where it is damaged the one before; None where none was ever saved.

    Raises:
        BadInput: all of them are damaged.
    """
    last = latest_checkpoint(folder)
    found = ((_NUMBERED.fullmatch(path.name), path) for path in folder.glob("*.pth"))
    numbered = sorted(((int(name[1]), path) for name, path in found if name), reverse=True)
    before = [path for _, path in numbered if path != last]
    for path in (last, *before) if last else ():
        holds = path.is_file() and seal_holds(path)
        if holds is None:
            log.warning("warning: %s: has no checksum (of an older version): damage goes unnoticed", path)
        if holds is not False:
            return path
        log.warning("warning: %s: damaged (its checksum does not match); trying the one before", path)
    if last:
        raise BadInput(f"{folder}: all its checkpoints are damaged; start again in another folder")
    return None


def checkpoint_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint; nothing is unpickled but tensors, numbers and mmengine's histories.

    Raises:
        BadInput: it is damaged.
    """
    if seal_holds(path) is False:
        raise BadInput(f"{path}: damaged (its checksum does not match)")
    import torch

    allow_safe_loading()
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def allow_safe_loading() -> None:
    """Makes torch's safe loader, `torch.load(..., weights_only=True)`, accept mmengine's checkpoints."""
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer

    download_safely()
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    allowed = [HistoryBuffer, np.ndarray, np.dtype, *numpy_constructors(), *dtypes]
    torch.serialization.add_safe_globals([*allowed, (_method, "builtins.getattr")])


def _method(owner: Any, name: str) -> Any:
    """What `getattr` means in a checkpoint.

    Raises:
        pickle.UnpicklingError: anything but a `HistoryBuffer`'s own methods.
    """
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in METHODS:
        raise pickle.UnpicklingError(f"getattr of {owner!r} and {name!r} in a checkpoint")
    return getattr(owner, name)
