"""Processes that read images for mm's loaders."""

from __future__ import annotations

import os
from typing import Any

from mmengine.dataset import worker_init_fn
from mmengine.registry import FUNCTIONS


@FUNCTIONS.register_module()
def settle_worker(worker_id: int, **facts: Any) -> None:
    """First thing in such a process: leave the trainer's process group, then seed as mmengine does.

    Ctrl-C and schedulers signal whole groups; a reader that died of it would take the trainer along.
    """
    os.setpgrp()
    worker_init_fn(worker_id, **facts)


def settle_workers(loader: Any, seed: int) -> None:
    """Have the workers of a loader's settings, if it has any, begin so."""
    if loader and loader.get("num_workers"):
        rank = int(os.environ.get("RANK", "0"))
        facts = {"num_workers": loader.num_workers, "rank": rank, "seed": seed}
        loader.worker_init_fn = {"type": "settle_worker", **facts}
