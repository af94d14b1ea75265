"""Processes that read images for mm's loaders."""

from __future__ import annotations

import os
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from typing import Any

from mmengine.dataset import worker_init_fn
from mmengine.registry import FUNCTIONS
from torch import Tensor

from coma.data.worker_pool import SharedPickle


@FUNCTIONS.register_module()
def settle_worker(worker_id: int, **facts: Any) -> None:
    """First thing in such a process: leave the trainer's process group, then seed as mmengine does.

    Ctrl-C and schedulers signal whole groups; a reader that died of it would take the trainer along. Images
    travel without /dev/shm, and what cannot be sent ends the process: torch would wait for it for ever.
    """
    ForkingPickler.register(Tensor, lambda tensor: SharedPickle(tensor).__reduce__())
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]
    os.setpgrp()
    worker_init_fn(worker_id, **facts)


def _end(error: Exception, _: object) -> None:
    os.write(2, f"a reading process cannot send its images: {type(error).__name__}: {error}\n".encode())
    os._exit(1)


def settle_workers(loader: Any, seed: int) -> None:
    """Have the workers of a loader's settings, if it has any, begin so."""
    if loader and loader.get("num_workers"):
        rank = int(os.environ.get("RANK", "0"))
        facts = {"num_workers": loader.num_workers, "rank": rank, "seed": seed}
        loader.worker_init_fn = {"type": "settle_worker", **facts}
