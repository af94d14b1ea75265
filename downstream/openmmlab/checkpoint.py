"""Loads mmengine's checkpoints, also downloaded ones, through torch's safe loader.

Files of safetensors load too, wherever mmengine takes a checkpoint (`load_from`, `init_cfg`, its tools):
those of artifacts with their checksums and classes, others as they are.

Besides tensors and numbers, checkpoints hold mmengine's `HistoryBuffer`: numpy arrays, and four of its
methods, pickled as calls of `getattr`. The loader admits these methods and nothing else.
"""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from safetensors import SafetensorError
from safetensors.torch import load_file

from coma.artifact import load_artifact
from coma.artifact.schema import TENSORS
from coma.atomic_io import seal_holds
from coma.errors import BadInput
from downstream.datasets.label_classes import dataset_meta
from downstream.private import download_safely, numpy_constructors

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
METHODS = ("min", "max", "current", "mean")
_NUMBERED = re.compile(r"(?:iter|epoch)_(\d+)\.pth")


def best_checkpoint(folder: Path) -> Path:
    """Returns the undamaged checkpoint with the best validation score, or else the last undamaged one.

    Raises:
        BadInput: no checkpoint, or only damaged ones.
    """
    for path in sorted(folder.glob("best_*.pth"), key=lambda path: path.stat().st_mtime, reverse=True):
        if not (why := _damage(path)):
            return path
        log.warning("%s: damaged (%s); it is ignored", path, why)
    found = intact_checkpoint(folder)
    if found is None:
        raise BadInput(f"{folder}: holds no checkpoint")
    return found


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint that `last_checkpoint` names, also if the folder has moved since.

    Where that file is empty or missing, or names none that is there, it is the one with the highest number.
    """
    noted = folder / "last_checkpoint"
    path = folder / Path(noted.read_text().strip()).name if noted.is_file() else folder
    return path if path.is_file() else next(iter(_numbered_checkpoints(folder)), None)


def intact_checkpoint(folder: Path) -> Path | None:
    """Returns the last undamaged checkpoint; None if none was saved.

    Raises:
        BadInput: all checkpoints are damaged.
    """
    last = latest_checkpoint(folder)
    if last is None:
        return None
    for path in (last, *(each for each in _numbered_checkpoints(folder) if each != last)):
        if not (why := _damage(path)):
            if seal_holds(path) is None:
                log.warning("%s: has no checksum (of an older version): damage goes unnoticed", path)
            return path
        log.warning("%s: damaged (%s); trying the one before", path, why)
    raise BadInput(f"{folder}: all its checkpoints are damaged; start again in another folder")


def _numbered_checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints that are named after a step or an epoch, the highest number first."""
    found = ((_NUMBERED.fullmatch(path.name), path) for path in folder.glob("*.pth"))
    return [path for _, path in sorted(((int(name[1]), path) for name, path in found if name), reverse=True)]


def _damage(path: Path) -> str:
    """Returns what is wrong with a checkpoint's file; empty if nothing is."""
    holds = seal_holds(path)
    if holds or (holds is None and is_zipfile(path)):
        return ""
    return "is cut off" if holds is None else "its checksum does not match"


def forget_lost_best(known: dict[str, Any], folder: Path) -> None:
    """Removes best scores whose checkpoints are gone or damaged, so that lower scores replace them.

    Checkpoints that have moved with their run directory get their new paths.

    Args:
        known: The mutable `runtime_info` of mmengine's message hub.
        folder: The run directory.
    """
    for key in [key for key in known if key.startswith("best_ckpt")]:
        noted = Path(known[key])
        path = next((each for each in (noted, folder / noted.name) if each.is_file()), None)
        if path is not None and not _damage(path):
            known[key] = str(path)
            continue
        log.warning("%s: is missing or damaged; the next validation chooses the best checkpoint anew", noted)
        del known[key]
        known.pop(key.replace("best_ckpt", "best_score"), None)


def checkpoint_weights(path: Path) -> dict[str, Tensor]:
    """Loads the weights of a checkpoint without unpickling other objects.

    Raises:
        BadInput: a damaged checkpoint.
    """
    if why := _damage(path):
        raise BadInput(f"{path}: damaged ({why})")
    import torch

    allow_safe_loading()
    return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def allow_safe_loading() -> None:
    """Makes torch's safe loader, `torch.load(..., weights_only=True)`, accept mmengine's checkpoints."""
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader

    CheckpointLoader.register_scheme(r".*\.safetensors$", loader=_load_safetensors, force=True)
    download_safely()
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    allowed = [HistoryBuffer, np.ndarray, np.dtype, *numpy_constructors(), *dtypes]
    torch.serialization.add_safe_globals([*allowed, (_method, "builtins.getattr")])


def _load_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Loads a file of safetensors as mmengine's checkpoints are: `state_dict` and `meta`.

    Raises:
        BadArtifact: a damaged artifact.
        BadInput: a file that cannot be read.
    """
    path = Path(filename)
    if path.name == TENSORS:
        found = load_artifact(path.parent)
        return {"state_dict": found.tensors, "meta": {"dataset_meta": dataset_meta(found.config)}}
    try:
        return {"state_dict": load_file(path), "meta": {}}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


def _method(owner: Any, name: str) -> Any:
    """Replaces `getattr` in a checkpoint.

    Raises:
        pickle.UnpicklingError: any attribute but the four methods of `HistoryBuffer`.
    """
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in METHODS:
        raise pickle.UnpicklingError(f"getattr of {owner!r} and {name!r} in a checkpoint")
    return getattr(owner, name)
