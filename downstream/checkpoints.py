"""mmengine's checkpoints through torch's safe loader, which unpickles nothing but what is allowed here.

Files that mmengine fetches from elsewhere go through it as well. Checkpoints hold, beside tensors and
numbers, mmengine's `HistoryBuffer`: numpy arrays, and its own four methods, pickled as calls of `getattr`.
That is allowed for these methods, and for nothing else.
"""

from __future__ import annotations

import importlib
import pickle
from functools import partial
from typing import Any

METHODS = ("min", "max", "current", "mean")


def allow_checkpoints() -> None:
    """Let `torch.load(..., weights_only=True)`, the default, read mmengine's checkpoints, and nothing more.

    mmengine fetches files from `http`, `torchvision` and `open-mmlab` addresses through a function of torch
    that unpickles anything unless it is told not to.
    """
    import numpy as np
    import torch
    from mmengine.logging import HistoryBuffer

    loading: Any = importlib.import_module("mmengine.runner.checkpoint")
    loading.load_url = partial(torch.hub.load_state_dict_from_url, weights_only=True)

    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    multiarray: Any = importlib.import_module("numpy._core.multiarray")
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            multiarray._reconstruct,
            multiarray.scalar,
            (_method, "builtins.getattr"),
            *dtypes,
        ]
    )


def _method(owner: Any, name: str) -> Any:
    """What `getattr` means in a checkpoint.

    Raises:
        pickle.UnpicklingError: anything but a `HistoryBuffer`'s own methods.
    """
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in METHODS:
        raise pickle.UnpicklingError(f"getattr of {owner!r} and {name!r} in a checkpoint")
    return getattr(owner, name)
