"""Worker processes that load images for OpenMMLab's data loaders."""

from __future__ import annotations

import os
from multiprocessing.reduction import ForkingPickler
from typing import Any

from mmengine.dataset import worker_init_fn
from mmengine.registry import FUNCTIONS
from torch import Tensor

from coma.data.worker_pool import SharedPickle
from downstream.private import exit_on_send_error


@FUNCTIONS.register_module()
def init_worker(worker_id: int, **settings: Any) -> None:
    """Initialises a worker process: leaves the trainer's process group, then seeds as mmengine does.

    Ctrl-C and job schedulers signal whole process groups, and a worker that dies of the signal ends the
    training. Images are sent without /dev/shm.
    """
    ForkingPickler.register(Tensor, lambda tensor: SharedPickle(tensor).__reduce__())
    exit_on_send_error("a worker process cannot send its images")
    os.setpgrp()
    worker_init_fn(worker_id, **settings)


def set_worker_init(loader: Any, seed: int) -> None:
    """Sets `init_worker` in the settings of a data loader that has worker processes."""
    if loader and loader.get("num_workers"):
        rank = int(os.environ.get("RANK", "0"))
        settings = {"num_workers": loader.num_workers, "rank": rank, "seed": seed}
        loader.worker_init_fn = {"type": "init_worker", **settings}
