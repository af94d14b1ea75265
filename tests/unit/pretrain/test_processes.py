"""Processes that cannot reach each other say why."""

import pytest
import torch.distributed as dist

from coma.errors import ComaError
from pretrain.training.distributed import processes


def test_what_nccl_could_not_do_is_named(monkeypatch):
    """All processes fail alike, so no other message says why."""

    def fail(*_, **__):
        raise dist.DistBackendError(
            "NCCL error in: NCCLUtils.cpp:94, unhandled system error\nLast error:\n"
            "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)\n"
        )

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", fail)
    with (
        pytest.raises(ComaError, match=r"^process 1 of 2: .* creating shared memory segment .* --shm-size"),
        processes("cpu"),
    ):
        raise AssertionError("there is no group")
